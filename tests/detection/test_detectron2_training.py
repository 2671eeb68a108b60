"""train_net.py as a whole: resume, processes, precision, logs, results, LazyConfig.

Runs are made in this process but where its end is the subject (a kill, several processes).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip(
    "detectron2",
    reason="needs Detectron2: https://detectron2.readthedocs.io/tutorials/install.html",
)

import detectron2_tiny as tiny  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data.datasets import register_pascal_voc  # noqa: E402
from detectron2.structures import Boxes, BoxMode, Instances  # noqa: E402
from pskd_detectron2 import register_spec  # noqa: E402
from pskd_detectron2.evaluation import build_evaluators  # noqa: E402
from pskd_detectron2.resume import AsideCheckpointer  # noqa: E402

ITERATIONS, EPOCH = 8, 3
SCHEDULED = f"MODEL.PSKD.ALPHA_FINAL 0.6 MODEL.PSKD.EPOCH_ITERS {EPOCH}"
LONGER = "SOLVER.MAX_ITER 80"  # until something is detected
TEACHERS = ("snapshot", "memory")


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return tiny.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def straight(spec, tmp_path_factory) -> dict[str, Path]:
    """A run with each teacher that was not stopped, a checkpoint at every iteration."""
    folder = tmp_path_factory.mktemp("straight")
    return {
        teacher: tiny.run(
            "fpn",
            folder / teacher,
            tiny.EXACT,
            SCHEDULED,
            f"MODEL.PSKD.TEACHER {teacher} SOLVER.CHECKPOINT_PERIOD 1",
            f"SOLVER.MAX_ITER {ITERATIONS}",
            train=spec,
        )
        for teacher in TEACHERS
    }


def stopped_after(straight: Path, iterations: int, out: Path) -> Path:
    """A run's folder as a stop after some iterations would have left it."""
    out.mkdir()
    name = f"model_{iterations - 1:07d}.pth"
    shutil.copy(straight / name, out / name)
    (out / "last_checkpoint").write_text(name)
    for memory in straight.glob(f"pskd_memory_{iterations - 1:07d}.pt"):
        shutil.copy(memory, out)
    return out


def resume(teacher: str, out: Path, spec: str, *opts: str) -> Path:
    common = (tiny.EXACT, SCHEDULED, f"MODEL.PSKD.TEACHER {teacher}")
    length = f"SOLVER.MAX_ITER {ITERATIONS}"
    return tiny.run("fpn", out, *common, length, *opts, flags=("--resume",), train=spec)


def command(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", str(tiny.ROOT / "detection" / "train_net.py"), *words]


def launch(*words: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        command(*words),
        cwd=tiny.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


# ---- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("iterations", [2, EPOCH, EPOCH + 2, 2 * EPOCH, 2 * EPOCH + 1])
def test_a_resumed_run_equals_the_straight_one(teacher, iterations, straight, spec, tmp_path):
    out = stopped_after(straight[teacher], iterations, tmp_path / "stopped")
    resume(teacher, out, spec)
    model = [tiny.checkpoint(folder)["model"] for folder in (straight[teacher], out)]
    assert tiny.differing(*model) == []
    scalars = [
        {key: value for key, value in tiny.metrics(folder)[-1].items() if "pskd" in key}
        for folder in (straight[teacher], out)
    ]
    assert scalars[0]["pskd/alpha"] == scalars[1]["pskd/alpha"] == 0.6


@pytest.mark.parametrize("kind, teacher", [("c4", "snapshot"), ("cascade", "memory")])
def test_the_other_heads_resume_too(kind, teacher, spec, tmp_path):
    """An evaluation that follows the checkpoint leaves no trace either."""
    options = (tiny.EXACT, SCHEDULED, f"MODEL.PSKD.TEACHER {teacher} SOLVER.CHECKPOINT_PERIOD 1")
    evaluation = "TEST.EVAL_PERIOD 5"
    whole = tiny.run(kind, tmp_path / "whole", *options, evaluation, train=spec, test=spec)
    out = stopped_after(whole, 5, tmp_path / "stopped")
    tiny.run(kind, out, *options, evaluation, flags=("--resume",), train=spec, test=spec)
    model = [tiny.checkpoint(folder)["model"] for folder in (whole, out)]
    assert tiny.differing(*model) == []


def test_the_teacher_travels_only_where_the_model_is_not_the_teacher(straight):
    for done in range(1, ITERATIONS + 1):
        state = tiny.checkpoint(straight["snapshot"], f"model_{done - 1:07d}")
        hook = state["hooks"]["PSKDHook"] if "hooks" in state else state["trainer"]["hooks"][
            "PSKDHook"]  # fmt: skip
        assert ("snapshot" in hook) == (done % EPOCH != 0)
        if done > EPOCH and done % EPOCH:
            last_end = f"model_{done // EPOCH * EPOCH - 1:07d}"
            taught = tiny.checkpoint(straight["snapshot"], last_end)["model"]
            for name, weight in hook["snapshot"]["model"].items():
                assert torch.equal(weight, taught[name])
        assert not any("pskd" in name for name in state["model"])


def test_a_run_that_is_killed_goes_on_where_it_stood(spec, tmp_path):
    length = "SOLVER.MAX_ITER 40 SOLVER.CHECKPOINT_PERIOD 1"
    options = (tiny.EXACT, SCHEDULED, "MODEL.PSKD.TEACHER memory", length)
    whole = tiny.run("fpn", tmp_path / "whole", *options, train=spec)
    out = tmp_path / "killed"
    process = launch(*tiny.arguments("fpn", out, *options, train=spec))
    deadline = time.monotonic() + 120
    while not (out / "model_0000011.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    last = (out / "last_checkpoint").read_text().removesuffix(".pth")
    assert 10 <= tiny.checkpoint(out, last)["iteration"] < 39
    tiny.run("fpn", out, *options, flags=("--resume",), train=spec)
    assert tiny.differing(tiny.checkpoint(whole)["model"], tiny.checkpoint(out)["model"]) == []


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpointer = AsideCheckpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("first", iteration=1)
    names = ["first.pth", "last_checkpoint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")
    half = lambda state, file: (file.write(b"half"), 1 / 0)  # noqa: E731
    monkeypatch.setattr("fvcore.common.checkpoint.torch.save", half)
    with pytest.raises(ZeroDivisionError):
        checkpointer.save("second")
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "first.pth")
    AsideCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), save_to_disk=False).save("third")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_resume_without_a_checkpoint_starts_from_the_beginning(straight, spec, tmp_path):
    out = resume("snapshot", tmp_path / "new", spec)
    model = [tiny.checkpoint(folder)["model"] for folder in (straight["snapshot"], out)]
    assert tiny.differing(*model) == []


def test_the_sampler_goes_on_where_it_stood_with_workers_too(spec, tmp_path):
    from pskd_detectron2 import Trainer

    seen = []
    for start, opts in ((0, "DATALOADER.NUM_WORKERS 0"), (6, "DATALOADER.NUM_WORKERS 2")):
        cfg = tiny.config("fpn", tmp_path / str(start), tiny.EXACT, opts, train=spec)
        trainer = Trainer(cfg)
        trainer._sampler.start_at(start * cfg.SOLVER.IMS_PER_BATCH)
        stream = iter(trainer.data_loader)
        seen.append([[image["file_name"] for image in next(stream)] for _ in range(10 - start)])
    assert seen[0][6:] == seen[1]


# ---- refusals of a resume ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, message",
    [
        ("MODEL.PSKD.ALPHA_FINAL 0.5", "alpha_final: expected 0.6.*got 0.5.*ALLOW_SCHEDULE_CHANGE"),
        ("MODEL.PSKD.ALPHA_SCHEDULE cosine", "schedule: expected 'linear'.*got 'cosine'"),
        ("MODEL.PSKD.EPOCH_ITERS 4", "epoch_iters: expected 3.*got 4"),
        ("SOLVER.MAX_ITER 20", "num_epochs: expected 3.*got 7"),
        ("MODEL.PSKD.TEACHER memory", "teacher: expected 'snapshot'.*got 'memory'"),
        ("MODEL.PSKD.LABEL_SMOOTHING 0.1", "label_smoothing: expected 0.0.*got 0.1"),
        ("MODEL.PSKD.FOREGROUND_ONLY True", "foreground_only: expected False.*got True"),
    ],
)
def test_a_changed_schedule_is_refused_on_resume(opts, message, straight, spec, tmp_path):
    out = stopped_after(straight["snapshot"], 5, tmp_path / "stopped")
    with pytest.raises(ValueError, match=message):
        resume("snapshot", out, spec, opts)
    assert sorted(p.name for p in out.glob("model_*.pth")) == ["model_0000004.pth"]


def test_a_changed_schedule_can_be_allowed(straight, spec, tmp_path):
    out = stopped_after(straight["snapshot"], 5, tmp_path / "stopped")
    allowed = "MODEL.PSKD.ALLOW_SCHEDULE_CHANGE True MODEL.PSKD.ALPHA_FINAL 0.3"
    resume("snapshot", out, spec, allowed)
    assert tiny.metrics(out)[-1]["pskd/alpha"] == 0.3


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_checkpoint_of_another_training_set_is_refused(teacher, straight, tmp_path):
    other = tiny.make_images(tmp_path, "other", count=6)
    out = stopped_after(straight[teacher], 5, tmp_path / "stopped")
    with pytest.raises(ValueError, match="training_set: expected '[0-9a-f]{16}'.* got '"):
        resume(teacher, out, other)


def test_a_teacher_of_another_model_is_refused(straight, spec, tmp_path):
    out = stopped_after(straight["snapshot"], 5, tmp_path / "stopped")
    with pytest.raises(
        ValueError, match="teacher: expected the weights of this model: size mismatch for roi_h"
    ):
        resume("snapshot", out, spec, "MODEL.ROI_BOX_HEAD.FC_DIM 8")


def test_a_checkpoint_without_the_teacher_it_needs_is_refused(straight, spec, tmp_path):
    for teacher in TEACHERS:
        out = stopped_after(straight[teacher], 5, tmp_path / teacher)
        path = out / "model_0000004.pth"
        state = torch.load(path, weights_only=True)
        del state["trainer"]["hooks"]["PSKDHook"]
        torch.save(state, path)
        with pytest.raises(ValueError, match=f"epoch 2: expected a checkpoint with the {teacher}"):
            resume(teacher, out, spec)


def test_a_memory_file_that_is_missing_damaged_or_foreign_is_refused(straight, spec, tmp_path):
    out = stopped_after(straight["memory"], 5, tmp_path / "stopped")
    path = out / "pskd_memory_0000004.pt"
    whole = path.read_bytes()
    foreign = torch.load(path, weights_only=True) | {"fingerprint": "of another set"}
    for content, message in (
        (None, f"{path}: expected the memory of the checkpoint, got no file"),
        (whole[: len(whole) // 2], f"{path}: expected the memory of this run"),
        (foreign, "expected the annotations .* got of another set"),
        ({"probs": 1}, "expected a memory with"),
    ):
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            resume("memory", out, spec)


def test_a_full_disk_leaves_the_last_good_checkpoint(straight, spec, tmp_path, monkeypatch):
    out = stopped_after(straight["memory"], 5, tmp_path / "stopped")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(obj, file, *args, **kwargs):
        target = Path(file if isinstance(file, str | os.PathLike) else file.name)
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        resume("memory", out, spec, "SOLVER.CHECKPOINT_PERIOD 1")
    monkeypatch.undo()
    left = {path.name: path for path in out.iterdir()}
    for name, content in before.items():
        assert left[name].read_bytes() == content
    assert not [name for name in left if "tmp" in name or name.startswith(("model", "pskd"))
                and name not in before]  # fmt: skip
    resume("memory", out, spec)
    assert tiny.differing(
        tiny.checkpoint(straight["memory"])["model"], tiny.checkpoint(out)["model"]
    ) == []  # fmt: skip


# ---- processes and precision -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(spec, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("two") / "run"
    options = (tiny.EXACT, "MODEL.PSKD.TEACHER memory MODEL.PSKD.EPOCH_ITERS 4")
    words = tiny.arguments("fpn", out, *options, "SOLVER.CHECKPOINT_PERIOD 2", train=spec)
    process = launch("--num-gpus", "2", "--dist-url", "auto", *words)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-4000:]
    return out, output


def test_two_processes_remember_together(two_processes):
    out, _ = two_processes
    memory = torch.load(out / "pskd_memory_0000005.pt", weights_only=True)
    # Four batches of two are the eight images of an epoch, half of them seen by each process.
    assert memory["seen"].all() and memory["counts"].sum() > 0
    assert torch.allclose(memory["probs"].sum(1), torch.ones(len(memory["probs"])), atol=1e-5)
    assert tiny.metrics(out)[-1]["pskd/alpha"] == pytest.approx(0.7)


def test_two_processes_resume(two_processes, spec, tmp_path):
    out = stopped_after(two_processes[0], 6, tmp_path / "stopped")
    options = (tiny.EXACT, "MODEL.PSKD.TEACHER memory MODEL.PSKD.EPOCH_ITERS 4")
    words = tiny.arguments("fpn", out, *options, train=spec)
    process = launch("--resume", "--num-gpus", "2", "--dist-url", "auto", *words)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-4000:]
    counts = [
        torch.load(folder / "pskd_memory_0000007.pt", weights_only=True)["counts"].sum()
        for folder in (out, two_processes[0])
    ]
    # The sums of the file are added up once and not once a process; ROIs are sampled anew.
    assert 0.7 < counts[0] / counts[1] < 1.4


def test_two_processes_have_a_snapshot(spec, tmp_path):
    options = (tiny.EXACT, "MODEL.PSKD.TEACHER snapshot MODEL.PSKD.EPOCH_ITERS 4")
    words = tiny.arguments("fpn", tmp_path, *options, "SOLVER.MAX_ITER 6", train=spec)
    process = launch("--num-gpus", "2", "--dist-url", "auto", *words)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output[-4000:]
    last = tiny.metrics(tmp_path)[-1]
    assert last["pskd/alpha"] == pytest.approx(0.7) and last["pskd/teacher_nll"] > 0
    # In the middle of the second epoch, next to the model that the first one ended with.
    hook = tiny.checkpoint(tmp_path)["trainer"]["hooks"]["PSKDHook"]
    assert hook["snapshot"]["model"].keys() < tiny.checkpoint(tmp_path)["model"].keys()


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_sigmoid_head_trains(teacher, spec, tmp_path):
    sigmoid = "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True MODEL.PSKD.EPOCH_ITERS 4"
    runs = {
        alpha: tiny.run(
            "fpn",
            tmp_path / str(alpha),
            sigmoid,
            f"MODEL.PSKD.TEACHER {teacher} MODEL.PSKD.ALPHA_FINAL {alpha}",
            train=spec,
        )
        for alpha in (0.0, 0.7)
    }
    hard, soft = (tiny.metrics(out)[-1] for out in runs.values())
    assert soft["pskd/teacher_nll"] > 0 and "pskd/teacher_nll" not in hard
    assert soft["loss_cls"] != hard["loss_cls"]


@pytest.mark.parametrize("kind", ["fpn", "c4", "cascade"])
def test_mixed_precision_on_the_cpu(kind, spec, tmp_path):
    out = tiny.run(kind, tmp_path, SCHEDULED, "SOLVER.AMP.ENABLED True", train=spec)
    plain = tiny.run(kind, tmp_path / "plain", SCHEDULED, train=spec)
    last = [tiny.metrics(folder)[-1] for folder in (out, plain)]
    assert last[0]["total_loss"] != last[1]["total_loss"]
    assert last[0]["total_loss"] == pytest.approx(last[1]["total_loss"], rel=0.2)
    key = "stage0/pskd/teacher_nll" if kind == "cascade" else "pskd/teacher_nll"
    assert last[0][key] == pytest.approx(last[1][key], rel=0.2)


# ---- logs, results -----------------------------------------------------------------------------


def test_what_is_logged_where(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = straight["snapshot"]
    names = {"pskd/alpha", "pskd/teacher_nll", "pskd/teacher_agreement", "pskd/gradient_rescaling"}
    assert names <= tiny.metrics(out)[-1].keys()
    events = EventAccumulator(str(out))
    events.Reload()
    assert names <= set(events.Tags()["scalars"])
    log = (out / "log.txt").read_text()
    for epoch, alpha in ((1, 0.0), (2, 0.4), (3, 0.6)):
        assert f"PS-KD: epoch {epoch} of 3, alpha {alpha:.4f}" in log


def test_the_console_shows_the_teacher(spec, tmp_path):
    out = tiny.run("cascade", tmp_path, SCHEDULED, "SOLVER.MAX_ITER 20", train=spec)
    log = (out / "log.txt").read_text()
    line = next(line for line in log.splitlines() if "pskd/alpha: " in line)
    for name in ("teacher_nll", "teacher_agreement", "gradient_rescaling"):
        assert f"stage2/pskd/{name}: " in line


@pytest.fixture(scope="module")
def evaluated(spec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    return tiny.run("fpn", out, SCHEDULED, LONGER, train=spec, test=spec)


def test_results_are_a_file(evaluated, spec):
    results = json.loads((evaluated / "results.json").read_text())
    assert results["seed"] == 1 and results["seconds_per_iteration"] > 0
    assert {"AP", "AP50", "AP75"} <= results["bbox"].keys()
    confidence = results["confidence"]
    assert {"d_ece", "la_ece", "aurc", "e_aurc", "num_detections"} <= confidence.keys()
    assert (confidence["iou_threshold"], confidence["score_threshold"]) == (0.5, 0.05)
    rois = results["ground_truth_rois"]
    assert rois["num_rois"] == 14 and rois["nll"] > 0 and 0 <= rois["accuracy"] <= 1
    assert (evaluated / "inference" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    with np.load(evaluated / "inference" / "confidence.npz") as found:
        assert len(found["confidence"]) == confidence["num_detections"]
        assert found["correct"].sum() == confidence["num_matched"]


def test_eval_only_gives_the_same_results(evaluated, spec, tmp_path):
    trained = json.loads((evaluated / "results.json").read_text())
    weights = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'}"
    out = tiny.run("fpn", tmp_path, weights, flags=("--eval-only",), train=spec, test=spec)
    alone = json.loads((out / "evaluation.json").read_text())
    assert not (out / "results.json").exists()
    for part in ("bbox", "confidence", "ground_truth_rois"):
        assert alone[part] == trained[part]


def test_a_stock_model_reads_the_checkpoint(evaluated, spec, tmp_path):
    opts = (tiny.stock("fpn"), f"MODEL.WEIGHTS {evaluated / 'model_final.pth'}")
    out = tiny.run("fpn", tmp_path, *opts, flags=("--eval-only",), train=spec, test=spec)
    stock = json.loads((out / "evaluation.json").read_text())
    assert stock["bbox"] == json.loads((evaluated / "results.json").read_text())["bbox"]


def test_eval_only_wants_weights(spec, tmp_path):
    with pytest.raises(ValueError, match="--eval-only: expected MODEL.WEIGHTS, or --resume and a"):
        tiny.run("fpn", tmp_path, flags=("--eval-only", "--resume"), train=spec, test=spec)


def test_a_finished_run_that_is_resumed_keeps_its_seconds(evaluated, spec, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(evaluated, out)
    tiny.run("fpn", out, SCHEDULED, LONGER, flags=("--resume",), train=spec, test=spec)
    before, after = (json.loads((f / "results.json").read_text()) for f in (evaluated, out))
    assert after["seconds_per_iteration"] == before["seconds_per_iteration"] > 0
    assert after["bbox"] == before["bbox"]


def test_the_threshold_that_is_told_is_the_one_that_held(evaluated, spec, tmp_path):
    opts = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'} MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.3"
    out = tiny.run("fpn", tmp_path, opts, flags=("--eval-only",), train=spec, test=spec)
    confidence = json.loads((out / "evaluation.json").read_text())["confidence"]
    assert confidence["score_threshold"] == 0.3


def test_a_dataset_that_is_known_by_its_function_only(evaluated, spec, tmp_path):
    """As Detectron2's guide registers them; COCOEvaluator converts it."""
    name = "made_by_function"
    register_spec(spec, tmp_path)
    records = DatasetCatalog.get(spec)
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = list(tiny.CLASSES)
    opts = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'} DATASETS.TEST ('{name}',)"
    out = tiny.run("fpn", tmp_path / "run", opts, flags=("--eval-only",), train=spec)
    results = json.loads((out / "evaluation.json").read_text())
    trained = json.loads((evaluated / "results.json").read_text())
    assert results["bbox"]["AP"] == pytest.approx(trained["bbox"]["AP"])
    assert results["confidence"] == pytest.approx(trained["confidence"])


def make_voc(folder: Path, name: str, *, minimal: bool) -> Path:
    """Write the made images in VOC's layout; ``minimal`` as other tools write it, with fractions
    and without the keys that only VOC's own files have."""
    root = folder / name
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    tiny.make_images(folder)
    coco = json.loads((folder / "set.json").read_text())
    keys = "" if minimal else "<pose>x</pose><truncated>0</truncated><difficult>0</difficult>"
    dot = ".0" if minimal else ""
    for image in coco["images"]:
        name = f"img{image['id']}"
        with Image.open(folder / "set" / image["file_name"]) as picture:
            picture.save(root / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{tiny.CLASSES[a['category_id'] - 1]}</name>{keys}<bndbox>"
            f"<xmin>{a['bbox'][0] + 1}{dot}</xmin><ymin>{a['bbox'][1] + 1}{dot}</ymin>"
            f"<xmax>{a['bbox'][0] + a['bbox'][2]}{dot}</xmax>"
            f"<ymax>{a['bbox'][1] + a['bbox'][3]}{dot}</ymax></bndbox></object>"
            for a in coco["annotations"]
            if a["image_id"] == image["id"]
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
    names = "\n".join(f"img{image['id']}" for image in coco["images"])
    (root / "ImageSets" / "Main" / "all.txt").write_text(names)
    return root


def as_detected(record: dict) -> dict:
    """What a perfect detector would find in an image."""
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]
    ]
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.full((len(boxes),), 0.9)
    found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
    return {"instances": found}


@pytest.mark.parametrize("year", [2007, 2012])
def test_a_voc_set_has_voc_ap_too(year, tmp_path):
    voc = f"voc:{make_voc(tmp_path, f'VOC{year}', minimal=True)}:all"
    out = tiny.run("fpn", tmp_path / "run", SCHEDULED, LONGER, train=voc, test=voc)
    results = json.loads((out / "results.json").read_text())
    assert results["voc"].keys() == {"AP", "AP50", "AP75"}
    assert set(results["bbox"]) > {"AP-ring", "AP-square"}
    assert results["ground_truth_rois"]["num_rois"] == 14
    _, evaluator, _ = build_evaluators(voc, str(tmp_path / "made"))
    evaluator.reset()
    records = DatasetCatalog.get(voc)
    evaluator.process(records, [as_detected(record) for record in records])
    assert evaluator.evaluate()["voc"] == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    # Of the objects 4 in 7 are found: that is the area under the curve, and 6 of its 11 points.
    evaluator.reset()
    part = [r if r["image_id"] % 2 else r | {"annotations": []} for r in records]
    evaluator.process(records, [as_detected(record) for record in part])
    area = 6 / 11 if year == 2007 else 4 / 7
    assert evaluator.evaluate()["voc"]["AP50"] == pytest.approx(100 * area)


def test_a_voc_set_that_detectron2_registered(tmp_path):
    root = make_voc(tmp_path, "voc", minimal=False)
    register_pascal_voc("made_voc", f"{root}/", "all", 2007, ("square", "ring"))
    evaluators = build_evaluators("made_voc", str(tmp_path / "made"))
    assert [type(e).__name__ for e in evaluators] == ["VOCEvaluator", "ConfidenceEvaluator"]
    first = DatasetCatalog.get("made_voc")[0]
    evaluators[1].process([first], [as_detected(first)])
    assert evaluators[1].evaluate()["confidence"]["num_matched"] == 2


# ---- LazyConfig --------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_lazy_config_trains_and_resumes(teacher, spec, tmp_path):
    words = [
        "train.seed=1",
        # Two of them are the eight images: the second epoch meets again what the first one saw.
        "dataloader.train.total_batch_size=4",
        "dataloader.train.num_workers=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "dataloader.test.num_workers=0",
        "model.roi_heads.box_head.fc_dims=[16]",
        "model.roi_heads.box_predictor.input_shape.channels=16",
        "model.roi_heads.mask_head.conv_dims=[8,8]",
        "model.backbone.bottom_up.freeze_at=0",
        "model.backbone.bottom_up.stem.norm=BN",  # FrozenBN diverges from random weights
        "model.backbone.bottom_up.stages.norm=BN",
        "model.pixel_std=[57.0,57.0,57.0]",
        "train.init_checkpoint=",
        "train.device=cpu",
        f"train.output_dir={tmp_path / 'run'}",
        "train.max_iter=4",
        "train.checkpointer.period=3",
        "train.eval_period=0",
        "train.pskd.epoch_iters=2",
        f"train.pskd.teacher={teacher}",
    ]
    config = str(tiny.CONFIGS / "mask_rcnn_R_50_FPN_1x_pskd.py")
    line = ["--config-file", config, "--train", spec, "--test", spec, *words]
    tiny.train_net.main(tiny.train_net.parse(line))
    out = tmp_path / "run"
    log = (out / "log.txt").read_text()
    assert log.rstrip().endswith(f"results: {out / 'results.json'}")
    assert "PS-KD: epoch 2 of 2, alpha 0.7000" in log
    # The last line holds the evaluation.
    assert any(line.get("pskd/teacher_nll", 0) > 0 for line in tiny.metrics(out))
    results = json.loads((out / "results.json").read_text())
    assert {"bbox", "confidence", "seconds_per_iteration"} <= results.keys()
    assert results["ground_truth_rois"]["num_rois"] == 14
    (out / "last_checkpoint").write_text("model_0000002.pth")  # inside the second epoch
    tiny.train_net.main(tiny.train_net.parse(["--resume", *line]))
    assert "Starting training from iteration 3" in (out / "log.txt").read_text()
