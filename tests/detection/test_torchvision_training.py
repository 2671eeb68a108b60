"""detection/train_torchvision.py from the command line on: training, resume, processes, errors.

Runs that several tests look at are made once. A process of its own is started only where that is
the point: a kill, several processes, the exit status.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import in_two_processes
from pskd_detection import load_dataset
from pskd_torchvision import DetectionImages, build_detector
from pskd_torchvision import train as program
from pskd_torchvision.data import collate
from pskd_torchvision.training import Trainer
from torch.utils.data import DistributedSampler
from torchvision_toys import CLASSES, ROOT, same, write_images

from pskd_tools.report.files import read_boxes
from pskd_tools.training import seed_epoch

SCRIPT = ROOT / "detection" / "train_torchvision.py"
CHECKPOINT = "checkpoint.pth"
PRELOADED = ["pskd_torchvision.training", "pskd_torchvision.evaluation", "tensorboard"]
EPOCHS, ITERATIONS = 3, 4  # of 2 images each
ALPHA = 0.7
TIMEOUT_S = 120
FLAGS = (
    f"--model fasterrcnn_tiny_fpn --min-size 96 --epochs {EPOCHS} --batch-size 2 --lr 0.01 "
    "--lr-steps 2 --warmup-iters 2 --workers 0 --print-freq 1 --seed 3 --device cpu"
).split()
PSKD = ["--pskd-alpha-final", str(ALPHA)]


class Run:
    """A finished run and what it left."""

    def __init__(self, folder: Path, code: int, output: str, error: str = "") -> None:
        self.folder, self.code, self.output, self.error = folder, code, output, error

    def lines(self) -> list[dict]:
        """The lines of metrics.json, as strict JSON."""

        def refuse(constant):
            raise ValueError(f"not JSON: {constant}")

        text = (self.folder / "metrics.json").read_text()
        return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]

    def training(self) -> list[dict]:
        """The lines of training, without what depends on the clock."""
        timing = "seconds_per_iteration"
        return [
            {k: v for k, v in line.items() if k != timing}
            for line in self.lines()
            if "total_loss" in line
        ]

    def results(self, name: str = "results.json") -> dict:
        return json.loads((self.folder / name).read_text())

    def checkpoint(self) -> dict:
        return torch.load(self.folder / CHECKPOINT, map_location="cpu", weights_only=True)

    def expect_success(self) -> Run:
        assert self.code == 0, self.output + self.error
        return self


class Tool:
    """Runs the script's main in this process, as the command line would."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.data = write_images(folder / "data", 8)
        self.test = write_images(folder / "test", 5, seed=1)

    def flags(self, name: str, *flags: str) -> list[str]:
        given = ["--train", self.data, "--test", self.test, "--output-dir", str(self.folder / name)]
        return [*given, *FLAGS, *flags]

    def run(self, name: str, *flags: str) -> Run:
        argv = self.flags(name, *flags)
        self._monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
        return Run(self.folder / name, program.main(argv), "")

    def stopped(self, name: str, *flags: str, after: int = 1) -> Run:
        """Run until an epoch's end, and stop in the middle of the next one."""

        def train_epoch(trainer, epoch):
            if epoch > after:
                raise KeyboardInterrupt
            return original(trainer, epoch)

        original = Trainer.train_epoch
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "train_epoch", train_epoch)
            self.run(name, *flags)
        return Run(self.folder / name, 0, "")


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Tool(tmp_path_factory.mktemp("torchvision"), monkeypatch)


@pytest.fixture(scope="module")
def baseline(tool) -> Run:
    return tool.run("baseline", "--eval-period", "2").expect_success()


@pytest.fixture(scope="module")
def straight(tool) -> Run:
    return tool.run("straight", *PSKD).expect_success()


# ---- what a run leaves ---------------------------------------------------------------------------


def test_results_tell_the_command_and_every_metric(tool, straight):
    results = straight.results()
    assert results["command"] == [str(SCRIPT), *tool.flags("straight", *PSKD)]
    assert results["seed"] == 3
    assert 0.0 < results["seconds_per_iteration"] < 60.0
    names = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-red", "AP-green"}
    assert results["bbox"].keys() == names
    names = {"d_ece", "la_ece", "aurc", "e_aurc", "num_detections", "num_matched"}
    assert results["confidence"].keys() == names | {"iou_threshold", "score_threshold", "bins"}
    rois = results["ground_truth_rois"]
    assert rois["num_rois"] == 8 and rois["nll"] > 0.0 and 0.0 <= rois["accuracy"] <= 1.0


def test_detections_and_plots_lie_beside_the_results(straight):
    folder, found = straight.folder / "inference", straight.results()["confidence"]
    for name in ("reliability.png", "risk_coverage.png"):
        assert (folder / name).stat().st_size > 1000
    with np.load(folder / "confidence.npz") as arrays:
        assert len(arrays["confidence"]) == found["num_detections"]
        assert arrays["correct"].sum() == found["num_matched"]
        assert set(arrays["ids"].tolist()) <= read_boxes(folder / "test_images.json").keys()
    rows = json.loads((folder / "coco_instances_results.json").read_text())
    assert sum(row["score"] >= 0.05 for row in rows) == found["num_detections"]
    assert {row["category_id"] for row in rows} <= {1, 2}
    assert all(set(row) == {"image_id", "category_id", "bbox", "score"} for row in rows)


def test_every_iteration_is_logged_with_what_the_teacher_did(straight, baseline):
    lines = straight.training()
    assert [line["iteration"] for line in lines] == list(range(EPOCHS * ITERATIONS))
    teacher = {"pskd/teacher_nll", "pskd/teacher_agreement", "pskd/gradient_rescaling"}
    for line in lines:
        epoch = line["epoch"]
        # The paper's schedule; in the first epoch there is nothing to learn from.
        assert line["pskd/alpha"] == pytest.approx(ALPHA * epoch / EPOCHS if epoch > 1 else 0.0)
        assert (line.keys() >= teacher) == (epoch > 1)
        parts = [line[name] for name in line if name.startswith("loss_")]
        assert line["total_loss"] == pytest.approx(sum(parts), rel=1e-5) and len(parts) == 4
    assert not any(name.startswith("pskd/") for line in baseline.training() for name in line)
    assert lines[-1]["lr"] == pytest.approx(0.001) and lines[0]["lr"] == pytest.approx(1e-5)


def test_tensorboard_gets_the_same_numbers(straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(straight.folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"total_loss", "loss_classifier", "lr", "bbox/AP", "ground_truth_rois/nll"} <= set(tags)
    for name in ("pskd/alpha", "pskd/teacher_nll", "total_loss"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(line["iteration"], line[name]) for line in straight.lines() if name in line]
        assert points == [(step, pytest.approx(value)) for step, value in logged]


def test_the_first_epoch_is_the_baselines_bit_for_bit_and_the_second_is_not(straight, baseline):
    own, other = (
        [{k: v for k, v in line.items() if not k.startswith("pskd/")} for line in run.training()]
        for run in (straight, baseline)
    )
    assert own[:ITERATIONS] == other[:ITERATIONS]
    assert own[ITERATIONS]["loss_box_reg"] == other[ITERATIONS]["loss_box_reg"]
    assert own[ITERATIONS]["loss_classifier"] != other[ITERATIONS]["loss_classifier"]


def test_an_evaluation_in_between(baseline):
    evaluated = [line for line in baseline.lines() if "bbox/AP50" in line]
    assert [(line["epoch"], line["iteration"]) for line in evaluated] == [(2, 7), (3, 11)]
    assert evaluated[-1]["bbox/AP"] == baseline.results()["bbox"]["AP"]
    assert evaluated[-1]["ground_truth_rois/nll"] == baseline.results()["ground_truth_rois"]["nll"]


# ---- resume --------------------------------------------------------------------------------------


def expect_the_same_end(resumed: Run, straight: Run) -> None:
    own, other = resumed.checkpoint(), straight.checkpoint()
    assert same(own["model"], other["model"])
    momenta, expected = own["optimizer"]["state"], other["optimizer"]["state"]
    assert momenta.keys() == expected.keys() and len(momenta) > 10
    assert all(same(momenta[key], expected[key]) for key in momenta)
    assert own["epoch"] == other["epoch"] == EPOCHS
    assert resumed.training() == straight.training()
    drop = {"command", "seconds_per_iteration"}
    pairs = (run.results() for run in (resumed, straight))
    left, right = ({k: v for k, v in pair.items() if k not in drop} for pair in pairs)
    assert left == right


def killed_in_the_second_epoch(argv: list[str]) -> None:
    """Train until the signal that cannot be handled comes."""
    step, number = Trainer._step, itertools.count(1)

    def interrupted(*args):
        if next(number) == ITERATIONS + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    Trainer._step = interrupted
    program.main(argv)


def test_killed_in_the_middle_of_an_epoch_it_ends_as_if_it_had_not_been(forkserver, tool, straight):
    """The run that goes on reads its images in a worker: their number changes nothing."""
    argv = tool.flags("killed", *PSKD)
    process = forkserver.Process(target=killed_in_the_second_epoch, args=(argv,))
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL
    killed = Run(tool.folder / "killed", 0, "")
    assert killed.checkpoint()["epoch"] == 1 and len(killed.lines()) == ITERATIONS + 1
    assert not (killed.folder / "results.json").exists()
    tool.run("killed", *PSKD, "--resume", "--workers", "1").expect_success()
    expect_the_same_end(killed, straight)


VARIANTS = {
    "baseline": [],
    "rest": [*PSKD, "--amp", "--opt", "adamw", "--lr", "0.001", "--pskd-foreground-only",
             "--pskd-alpha-schedule", "cosine", "--pskd-label-smoothing", "0.1"],
}  # fmt: skip


#: Of what the box head got in the run "rest", a batch each: the dtypes of its maps and boxes.
POOLED: list[tuple[torch.dtype, torch.dtype]] = []


@pytest.fixture(scope="module")
def rest(tool) -> Run:
    """Everything that the other runs do not use: bfloat16, AdamW, foreground only, smoothing."""
    original = program.build_trainer

    def watched(job):
        job.model.roi_heads.box_roi_pool.register_forward_pre_hook(
            lambda _module, args: POOLED.append((args[0]["0"].dtype, args[1][0].dtype))
        )
        return original(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "build_trainer", watched)
        return tool.run("rest", *VARIANTS["rest"]).expect_success()


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_at_an_epochs_end_it_ends_as_if_it_had_not_been(tool, name, request):
    straight = request.getfixturevalue(name)
    flags = VARIANTS[name] + (["--eval-period", "2"] if name == "baseline" else [])
    stopped = tool.stopped(f"{name}_stopped", *flags, after=2)
    assert stopped.checkpoint()["epoch"] == 2
    expect_the_same_end(tool.run(f"{name}_stopped", *flags, "--resume"), straight)


def test_mixed_precision_trains_with_a_teacher(rest, straight):
    lines = rest.training()
    assert lines[-1]["pskd/alpha"] == pytest.approx(ALPHA)
    assert all(isinstance(line["pskd/teacher_nll"], float) for line in lines[ITERATIONS:])
    assert lines[0]["total_loss"] != straight.training()[0]["total_loss"]
    dtypes = {value.dtype for value in rest.checkpoint()["model"].values()}
    assert torch.bfloat16 not in dtypes
    assert set(POOLED[:ITERATIONS]) == {(torch.bfloat16, torch.float32)}  # boxes stay exact


def test_a_finished_run_is_evaluated_again(tool, straight):
    folder = tool.folder / "again"
    shutil.copytree(straight.folder, folder)
    (folder / "results.json").unlink()
    again = tool.run("again", *PSKD, "--resume").expect_success()
    assert again.results()["seconds_per_iteration"] is None
    assert again.results()["bbox"] == straight.results()["bbox"]
    assert same(again.checkpoint()["model"], straight.checkpoint()["model"])


# ---- evaluation of given weights -----------------------------------------------------------------


def test_a_checkpoint_is_evaluated_without_training(tool, straight):
    folder = tool.folder / "tested"
    folder.mkdir()
    shutil.copy(straight.folder / CHECKPOINT, folder)
    flags = ["--test", tool.test, "--output-dir", str(folder), *FLAGS, "--test-only", "--resume"]
    assert program.main(flags) == 0  # the classes are those in the checkpoint
    expected = straight.results()
    results = Run(folder, 0, "").results("evaluation.json")
    assert {k: results[k] for k in results if k != "command"} == {
        k: v for k, v in expected.items() if k in results and k != "command"
    }
    assert not (folder / "metrics.json").exists()


def test_a_weights_file_is_evaluated_and_trained_on(tool, straight):
    weights = ["--weights", str(straight.folder / CHECKPOINT)]
    tested = tool.run("weights", *weights, "--test-only").expect_success()
    scores = tested.results("evaluation.json")["ground_truth_rois"]
    assert scores == straight.results()["ground_truth_rois"]
    tuned = tool.run("tuned", *weights, "--epochs", "1", "--lr", "0").expect_success()
    parameters = dict(build_detector("fasterrcnn_tiny_fpn", len(CLASSES)).named_parameters())
    own, other = tuned.checkpoint()["model"], straight.checkpoint()["model"]
    assert all(torch.equal(own[name], other[name]) for name in parameters)


# ---- masks ---------------------------------------------------------------------------------------


def test_a_mask_builder_trains_on_polygons(tool):
    flags = ["--model", "maskrcnn_tiny_fpn", "--epochs", "2", *PSKD]
    run = tool.run("masks", *flags).expect_success()
    assert all(line["loss_mask"] > 0.0 for line in run.training())
    assert run.training()[-1]["pskd/teacher_nll"] > 0.0
    assert run.results()["bbox"]["AP"] is not None


# ---- two processes -------------------------------------------------------------------------------


def train_and_keep(folder: Path, argv: list[str]) -> None:
    """Be a process of two: train, and keep model, teacher and output."""
    original, rank = program.train, os.environ["RANK"]

    def train(job):
        results = original(job)
        teacher = job.model.roi_heads.pskd.snapshot.model
        state = {"model": job.model.state_dict(), "teacher": teacher.state_dict()}
        torch.save(state, folder / f"rank{rank}.pt")
        return results

    program.train = train
    with open(folder / f"rank{rank}.log", "w") as output, contextlib.redirect_stdout(output):
        assert program.main(argv) == 0


@pytest.fixture(scope="module")
def pair(forkserver, tool) -> Run:
    """Two processes of one image each, four iterations an epoch."""
    flags = tool.flags("pair", *PSKD, "--epochs", "2", "--batch-size", "1")
    in_two_processes(train_and_keep, tool.folder, flags)
    output = "".join((tool.folder / f"rank{rank}.log").read_text() for rank in (0, 1))
    return Run(tool.folder / "pair", 0, output)


def test_two_processes_end_with_the_same_model_and_teacher(tool, pair):
    first, second = (
        torch.load(tool.folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    # Batch norm's statistics too, which each process gathers on its own images.
    assert same(first["model"], second["model"])
    assert same(first["teacher"], second["teacher"])
    assert same(first["model"], pair.checkpoint()["model"])
    assert not same(
        {k: v for k, v in first["model"].items() if k.startswith("backbone.")},
        {k: v for k, v in first["teacher"].items() if k.startswith("backbone.")},
    )


def test_two_processes_log_once_the_mean_of_what_each_does(tool, pair):
    """The first step's losses, which one process computes on the images of both."""
    lines = pair.training()
    assert [line["iteration"] for line in lines] == list(range(2 * ITERATIONS))
    assert pair.output.count("epoch 2 of 2") == 1
    images = DetectionImages(load_dataset(tool.data), hflip=0.5, seed=3)
    images.set_epoch(1)
    torch.manual_seed(3)
    model = build_detector("fasterrcnn_tiny_fpn", len(CLASSES), min_size=[96]).train()
    orders, losses = [], []
    for rank in (0, 1):
        sampler = DistributedSampler(images, 2, rank, seed=3)
        sampler.set_epoch(1)
        orders.append(list(sampler))
        seed_epoch(3, 1, rank)
        with torch.no_grad():
            losses.append(float(sum(model(*collate([images[orders[rank][0]]])).values())))
    assert sorted(orders[0] + orders[1]) == list(range(8))
    assert lines[0]["total_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_two_processes_evaluate_every_image_once(tool, pair):
    """Five images: padded to equal shares, one would count twice."""
    alone = ["--resume", "--test-only", "--batch-size", "1"]
    results = pair.results()
    tested = tool.run("pair", *PSKD, *alone, "--epochs", "2").expect_success()
    tested = tested.results("evaluation.json")
    assert results["ground_truth_rois"]["num_rois"] == 8
    assert results["bbox"] == tested["bbox"]
    assert results["confidence"] == tested["confidence"]


# ---- what is refused -----------------------------------------------------------------------------


def expect_refusal(tool, capsys, name: str, flags: list[str], *parts: str) -> None:
    """One line on the standard error, status 1, and nothing written."""
    before = sorted(tool.folder.rglob(f"{name}/*"))
    capsys.readouterr()
    assert tool.run(name, *flags).code == 1
    error = capsys.readouterr().err
    assert error.startswith("train_torchvision: ") and error.count("\n") == 1, error
    missing = [part for part in parts if part not in error]
    assert not missing, f"not in the error: {missing}\n{error}"
    assert sorted(tool.folder.rglob(f"{name}/*")) == before


def test_random_weights_are_not_evaluated(tool, capsys):
    """Of another number of classes, or of a ResNet."""
    other = build_detector("fasterrcnn_tiny_fpn", 7)
    resnet = other.backbone.body.state_dict()
    for name, state, count in (("seven", other.state_dict(), 4), ("resnet", resnet, None)):
        path = tool.folder / f"{name}.pth"
        torch.save(state, path)
        message = "--weights: expected all weights of a detector of 2 classes to evaluate, got a "
        message += "file that lacks" + (f" {count} of them" if count else "")
        expect_refusal(tool, capsys, "random", ["--test-only", "--weights", str(path)], message)


@pytest.mark.parametrize("option", ["--train", "--test"])
def test_strict_data_refuses_what_would_be_mended(tool, capsys, option):
    spec = write_images(tool.folder / f"outside{option}", 4)
    path = tool.folder / f"outside{option}" / "set.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["bbox"] = [60, 60, 90, 90]
    path.write_text(json.dumps(content))
    message = "set.json: strictly read, expected nothing to mend, got 1 boxes more than 1 pixel"
    expect_refusal(tool, capsys, "refused", [option, spec, "--strict-data"], message)


def test_checkpoints_of_another_run_are_refused(tool, straight, capsys):
    shutil.copytree(straight.folder, tool.folder / "mismatched")
    cases = [
        (["--model", "maskrcnn_tiny_fpn"], "got 'maskrcnn_tiny_fpn'"),
        (["--frozen-bn"], "frozen_bn: expected False, with which"),
    ]
    for flags, message in cases:
        expect_refusal(tool, capsys, "mismatched", [*PSKD, "--resume", *flags], CHECKPOINT, message)


def test_a_changed_schedule_is_allowed_and_told_when_asked_for(tool, straight, caplog):
    shutil.copytree(straight.folder, tool.folder / "longer")
    flags = ["--pskd-alpha-final", "0.4", "--epochs", "4", "--pskd-allow-schedule-change"]
    changed = ["--lr", "0.002", "--weight-decay", "0.001"]
    run = tool.run("longer", *flags, "--resume", *changed).expect_success()
    assert run.training()[-1]["pskd/alpha"] == pytest.approx(0.4)
    assert run.training()[-1]["lr"] == pytest.approx(0.0002)
    assert run.checkpoint()["optimizer"]["param_groups"][0]["weight_decay"] == 0.001
    assert "trained with lr 0.01, goes on with 0.002" in caplog.text
    assert "trained with epochs 3, goes on with 4" in caplog.text


class Payload:
    """Runs a command where a pickle is trusted."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_no_code_in_a_checkpoint_is_run(tool, tmp_path, capsys):
    folder = tool.folder / "hostile"
    folder.mkdir()
    torch.save({"model": Payload(tmp_path / "ran")}, folder / CHECKPOINT)
    expect_refusal(tool, capsys, "hostile", ["--resume"], "expected a checkpoint of this program")
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tool, capsys):
    capsys.readouterr()
    run = tool.run("diverged", "--lr", "1e20", "--warmup-iters", "0", "--print-freq", "3")
    error = capsys.readouterr().err
    assert run.code == 1 and error.count("\n") == 1
    assert "train_torchvision: iteration 1: expected finite losses, got total_loss" in error
    assert not (run.folder / CHECKPOINT).exists()


def test_an_image_that_cannot_be_read_by_a_worker_is_named_in_one_line(tool, capsys):
    spec = write_images(tool.folder / "broken", 4)
    (tool.folder / "broken" / "2.png").write_bytes(b"no image")
    capsys.readouterr()
    assert tool.run("unread", "--train", spec, "--workers", "1").code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2.png: expected an image, got" in error


def test_every_image_is_checked_before_the_first_step(tool, capsys, caplog):
    caplog.set_level("INFO")
    spec = write_images(tool.folder / "checked", 4)
    flags = ("--train", spec, "--test", spec, "--check-images", "--workers", "0")
    assert tool.run("checked_run", *flags, "--epochs", "1").code == 0
    assert "--check-images: read 8 images" in caplog.text
    (tool.folder / "checked" / "2.png").write_bytes(b"")
    capsys.readouterr()
    run = tool.run("unchecked_run", *flags)
    error = capsys.readouterr().err
    assert run.code == 1 and error.count("\n") == 1
    assert "--check-images: expected 8 images that can be read, got 2 that cannot: " in error
    assert "checked/2.png: expected an image, got" in error
    assert not (run.folder / "metrics.json").exists()
