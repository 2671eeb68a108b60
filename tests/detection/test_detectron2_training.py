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

import pytest
import torch
from PIL import Image

pytest.importorskip(
    "detectron2",
    reason="needs Detectron2: https://detectron2.readthedocs.io/tutorials/install.html",
)

import detectron2_tiny as tiny  # noqa: E402
from detectron2.data import DatasetCatalog  # noqa: E402
from detectron2.data.datasets import register_pascal_voc  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from pskd_detectron2 import register_spec  # noqa: E402
from pskd_detectron2.evaluation import build_evaluators  # noqa: E402

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
        ValueError, match="the checkpoint's teacher is another model's: size mismatch for roi_h"
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


@pytest.mark.parametrize("kind", ["fpn", "cascade"])
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
    assert {"d_ece", "la_ece", "aurc", "excess_aurc", "num_detections"} <= confidence.keys()
    assert (confidence["iou_threshold"], confidence["score_threshold"]) == (0.5, 0.05)
    rois = results["ground_truth_rois"]
    assert rois["num_rois"] == 14 and rois["nll"] > 0 and 0 <= rois["accuracy"] <= 1
    assert (evaluated / "inference" / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_eval_only_gives_the_same_results(evaluated, spec, tmp_path):
    trained = json.loads((evaluated / "results.json").read_text())
    weights = f"MODEL.WEIGHTS {evaluated / 'model_final.pth'}"
    out = tiny.run("fpn", tmp_path, weights, flags=("--eval-only",), train=spec, test=spec)
    alone = json.loads((out / "results.json").read_text())
    for part in ("bbox", "confidence", "ground_truth_rois"):
        assert alone[part] == trained[part]


def test_a_stock_model_reads_the_checkpoint(evaluated, spec, tmp_path):
    opts = (tiny.stock("fpn"), f"MODEL.WEIGHTS {evaluated / 'model_final.pth'}")
    out = tiny.run("fpn", tmp_path, *opts, flags=("--eval-only",), train=spec, test=spec)
    results = [json.loads((folder / "results.json").read_text()) for folder in (out, evaluated)]
    assert results[0]["bbox"] == results[1]["bbox"]


def test_a_voc_set_has_voc_ap_too(tmp_path):
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    tiny.make_images(tmp_path)
    coco = json.loads((tmp_path / "set.json").read_text())
    for image in coco["images"]:
        name = f"img{image['id']}"
        with Image.open(tmp_path / "set" / image["file_name"]) as picture:
            picture.save(root / "JPEGImages" / f"{name}.jpg")
        objects = "".join(
            f"<object><name>{tiny.CLASSES[a['category_id'] - 1]}</name><pose>x</pose>"
            "<truncated>0</truncated><difficult>0</difficult><bndbox>"
            f"<xmin>{a['bbox'][0] + 1}</xmin><ymin>{a['bbox'][1] + 1}</ymin>"
            f"<xmax>{a['bbox'][0] + a['bbox'][2]}</xmax>"
            f"<ymax>{a['bbox'][1] + a['bbox'][3]}</ymax></bndbox></object>"
            for a in coco["annotations"]
            if a["image_id"] == image["id"]
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{objects}</annotation>"
        )
    names = "\n".join(f"img{image['id']}" for image in coco["images"])
    (root / "ImageSets" / "Main" / "all.txt").write_text(names)
    voc = f"voc:{root}:all"
    out = tiny.run("fpn", tmp_path / "run", SCHEDULED, LONGER, train=voc, test=voc)
    results = json.loads((out / "results.json").read_text())
    assert results["voc"].keys() == {"AP", "AP50", "AP75"}
    assert set(results["bbox"]) > {"AP-ring", "AP-square"}
    # The same folder as Detectron2 itself registers it, classes in another order.
    register_pascal_voc("made_voc", f"{root}/", "all", 2007, ("square", "ring"))
    evaluators = build_evaluators("made_voc", str(tmp_path / "made"))
    assert [type(e).__name__ for e in evaluators] == ["VOCEvaluator", "ConfidenceEvaluator"]
    first = DatasetCatalog.get("made_voc")[0]
    found = Instances((80, 64))
    found.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in first["annotations"]]))
    found.scores = torch.full((len(found.pred_boxes),), 0.9)
    found.pred_classes = torch.tensor([a["category_id"] for a in first["annotations"]])
    evaluators[1].process([first], [{"instances": found}])
    assert evaluators[1].evaluate()["confidence"]["num_matched"] == 2
    assert results["ground_truth_rois"]["num_rois"] == 14


# ---- LazyConfig --------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_lazy_config_trains_and_resumes(teacher, spec, tmp_path):
    register_spec(spec, tmp_path)
    assert spec in DatasetCatalog.list()
    words = [
        "train.seed=1",
        f"dataloader.train.dataset.names={json.dumps(spec)}",
        # Two of them are the eight images: the second epoch meets again what the first one saw.
        "dataloader.train.total_batch_size=4",
        "dataloader.train.num_workers=0",
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        f"dataloader.test.dataset.names={json.dumps(spec)}",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "dataloader.test.num_workers=0",
        "model.backbone.bottom_up.freeze_at=0",
        "model.backbone.bottom_up.stem.norm=BN",  # FrozenBN diverges from random weights
        "model.backbone.bottom_up.stages.norm=BN",
        "model.pixel_std=[57.0,57.0,57.0]",
        "model.roi_heads.num_classes=2",
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
    line = ["--config-file", config, *words]
    tiny.train_net.main(tiny.train_net.parse(line))
    out = tmp_path / "run"
    log = (out / "log.txt").read_text()
    assert "PS-KD: epoch 2 of 2, alpha 0.7000" in log
    # The last line holds the evaluation.
    assert any(line.get("pskd/teacher_nll", 0) > 0 for line in tiny.metrics(out))
    assert "bbox" in json.loads((out / "results.json").read_text())
    (out / "last_checkpoint").write_text("model_0000002.pth")  # inside the second epoch
    tiny.train_net.main(tiny.train_net.parse(["--resume", *line]))
    assert "Starting training from iteration 3" in (out / "log.txt").read_text()
