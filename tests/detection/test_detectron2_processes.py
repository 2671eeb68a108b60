"""Detectron2 trainings that need processes of their own: two that train together, one killed."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import detectron2_tiny as tiny
import pytest
import torch
from detectron2_tiny import stopped_after, train_net

PRELOADED = ["pskd_detectron2.train_net"]
MEMORY = f"{tiny.EXACT} MODEL.PSKD.TEACHER memory MODEL.PSKD.EPOCH_ITERS 4"
TIMEOUT_S = 240


# ---- two processes -----------------------------------------------------------------------------


def launch(words: list[str]) -> None:
    """Run train_net's command line with two processes, of which Detectron2 starts new ones."""
    start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.multiprocessing, "start_processes", start)
        assert train_net.run(["--num-gpus", "2", "--dist-url", "auto", *words]) == 0


@pytest.fixture(scope="module")
def two_processes(forkserver, spec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    launch(tiny.arguments("fpn", out, MEMORY, "SOLVER.CHECKPOINT_PERIOD 2", train=spec))
    return out


def remembered(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=True)["trainer"]["hooks"]["PSKDHook"]["memory"]


def test_two_processes_remember_together(two_processes):
    memory = remembered(two_processes / "model_0000005.pth")
    # Four batches of two are the eight images of an epoch, half of them seen by each process.
    assert memory["seen"].all() and memory["counts"].sum() > 0
    assert torch.allclose(memory["probs"].sum(1), torch.ones(len(memory["probs"])), atol=1e-5)
    assert tiny.metrics(two_processes)[-1]["pskd/alpha"] == pytest.approx(0.7)


def test_two_processes_evaluate_every_image_once(two_processes, spec, tmp_path):
    weights = f"MODEL.WEIGHTS {two_processes / 'model_final.pth'}"
    specs = {"train": spec, "test": spec}
    tiny.run("fpn", tmp_path / "alone", weights, flags=("--eval-only",), **specs)
    launch(["--eval-only", *tiny.arguments("fpn", tmp_path / "both", weights, **specs)])
    alone, both = (tiny.results(tmp_path / name, "evaluation") for name in ("alone", "both"))
    assert both["confidence"] == alone["confidence"] and both["confidence"]["num_detections"] > 0
    assert both["ground_truth_rois"] == pytest.approx(alone["ground_truth_rois"])
    assert both["ground_truth_rois"]["num_rois"] == 14


def test_two_processes_resume(two_processes, spec, tmp_path):
    out = stopped_after(two_processes, 6, tmp_path / "stopped")
    launch(["--resume", *tiny.arguments("fpn", out, MEMORY, train=spec)])
    last = "model_final.pth"
    counts = [remembered(folder / last)["counts"].sum() for folder in (out, two_processes)]
    # The sums that were saved are added up once and not once a process; ROIs are sampled anew.
    assert 0.7 < counts[0] / counts[1] < 1.4


def test_two_processes_have_a_snapshot(forkserver, spec, tmp_path):
    options = (tiny.EXACT, "MODEL.PSKD.TEACHER snapshot MODEL.PSKD.EPOCH_ITERS 4")
    launch(tiny.arguments("fpn", tmp_path, *options, "SOLVER.MAX_ITER 6", train=spec))
    last = tiny.metrics(tmp_path)[-1]
    assert last["pskd/alpha"] == pytest.approx(0.7) and last["pskd/teacher_nll"] > 0
    # In the middle of the second epoch, next to the model that the first one ended with.
    hook = tiny.checkpoint(tmp_path)["trainer"]["hooks"]["PSKDHook"]
    assert hook["snapshot"]["model"].keys() < tiny.checkpoint(tmp_path)["model"].keys()


# ---- a kill ------------------------------------------------------------------------------------


def killed_while_it_writes(name: str, words: list[str]) -> None:
    """Train until a file is half written, and get the signal that cannot be handled."""
    save = torch.save

    def interrupted(content, file, *args, **kwargs):
        path = Path(file if isinstance(file, str | os.PathLike) else file.name)
        if not path.name.startswith(name):
            return save(content, file, *args, **kwargs)
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = interrupted
    train_net.run(words)


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory) -> dict:
    """The last checkpoint of a run that was not stopped."""
    return tiny.checkpoint(tiny.run("fpn", tmp_path_factory.mktemp("whole"), MEMORY, train=spec))


def test_a_run_that_is_killed_goes_on_where_it_stood(forkserver, whole, spec, tmp_path):
    words = tiny.arguments("fpn", tmp_path, MEMORY, "SOLVER.CHECKPOINT_PERIOD 1", train=spec)
    process = forkserver.Process(target=killed_while_it_writes, args=("model_0000005", words))
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    train_net.main(train_net.parse(["--resume", *words]))
    assert tiny.differing(whole["model"], tiny.checkpoint(tmp_path)["model"]) == []
