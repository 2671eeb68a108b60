"""A resumed Detectron2 training equals the one that was not stopped, or is refused."""

from __future__ import annotations

from pathlib import Path

import detectron2_tiny as tiny
import pytest
import torch
from detectron2_tiny import stopped_after
from pskd_detectron2.resume import AsideCheckpointer

ITERATIONS, EPOCH = 8, 3
SCHEDULED = f"MODEL.PSKD.ALPHA_FINAL 0.6 MODEL.PSKD.EPOCH_ITERS {EPOCH}"
TEACHERS = ("snapshot", "memory", "ema")


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


def resume(teacher: str, out: Path, spec: str, *opts: str) -> Path:
    common = (tiny.EXACT, SCHEDULED, f"MODEL.PSKD.TEACHER {teacher}")
    length = f"SOLVER.MAX_ITER {ITERATIONS}"
    return tiny.run("fpn", out, *common, length, *opts, flags=("--resume",), train=spec)


# ---- the same end -------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("iterations", [2, EPOCH + 2, 2 * EPOCH])
def test_a_resumed_run_equals_the_straight_one(teacher, iterations, straight, spec, tmp_path):
    out = stopped_after(straight[teacher], iterations, tmp_path / "stopped")
    resume(teacher, out, spec)
    model = [tiny.checkpoint(folder)["model"] for folder in (straight[teacher], out)]
    assert tiny.differing(*model) == []
    assert tiny.metrics(out)[-1]["pskd/alpha"] == 0.6


@pytest.mark.parametrize("kind, teacher", [("c4", "snapshot"), ("cascade", "memory")])
def test_the_other_heads_resume_too(kind, teacher, spec, tmp_path):
    """An evaluation that follows the checkpoint leaves no trace either."""
    options = (tiny.EXACT, SCHEDULED, f"MODEL.PSKD.TEACHER {teacher} SOLVER.CHECKPOINT_PERIOD 1")
    evaluation = f"TEST.EVAL_PERIOD {EPOCH + 1} SOLVER.MAX_ITER {EPOCH + 3}"
    whole = tiny.run(kind, tmp_path / "whole", *options, evaluation, train=spec, test=spec)
    out = stopped_after(whole, EPOCH + 1, tmp_path / "stopped")
    tiny.run(kind, out, *options, evaluation, flags=("--resume",), train=spec, test=spec)
    model = [tiny.checkpoint(folder)["model"] for folder in (whole, out)]
    assert tiny.differing(*model) == []


def test_the_teacher_travels_only_where_the_model_is_not_the_teacher(straight):
    for done in range(1, ITERATIONS + 1):
        state = tiny.checkpoint(straight["snapshot"], f"model_{done - 1:07d}")
        hook = state["trainer"]["hooks"]["PSKDHook"]
        assert ("snapshot" in hook) == (done > EPOCH and done % EPOCH != 0)
        if done > EPOCH and done % EPOCH:
            last_end = f"model_{done // EPOCH * EPOCH - 1:07d}"
            taught = tiny.checkpoint(straight["snapshot"], last_end)["model"]
            for name, weight in hook["snapshot"]["model"].items():
                assert torch.equal(weight, taught[name])
        assert not any("pskd" in name for name in state["model"])


def test_the_mean_of_weights_is_another_teacher_and_always_in_the_checkpoint(straight):
    """From the second epoch's end on no model equals it."""
    for done in range(EPOCH + 1, ITERATIONS + 1):
        state = tiny.checkpoint(straight["ema"], f"model_{done - 1:07d}")
        assert "snapshot" in state["trainer"]["hooks"]["PSKDHook"]
    model = [tiny.checkpoint(straight[teacher])["model"] for teacher in ("ema", "snapshot")]
    assert tiny.differing(*model) != []


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


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opts, message",
    [
        ("MODEL.PSKD.ALPHA_SCHEDULE cosine", "alpha_schedule: expected 'linear'.*got 'cosine'"),
        ("MODEL.PSKD.EPOCH_ITERS 4", "epoch_iters: expected 3.*got 4"),
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


def test_a_checkpoint_of_another_training_set_is_refused(straight, tmp_path):
    other = tiny.make_images(tmp_path, "other", count=6)
    out = stopped_after(straight["memory"], 5, tmp_path / "stopped")
    with pytest.raises(ValueError, match="training_set: expected '[0-9a-f]{16}'.* got '"):
        resume("memory", out, other)


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


def test_an_older_checkpoint_has_its_memory_in_a_file(straight, spec, tmp_path):
    out = stopped_after(straight["memory"], 5, tmp_path / "stopped")
    checkpoint, path = out / "model_0000004.pth", out / "pskd_memory_0000004.pt"
    state = torch.load(checkpoint, weights_only=True)
    hook = state["trainer"]["hooks"]["PSKDHook"]
    memory = hook.pop("memory")
    hook["memory_file"] = path.name
    torch.save(state, checkpoint)
    torch.save(memory, path)
    whole = path.read_bytes()
    for content, message in (
        (None, f"{path}"),
        (whole[: len(whole) // 2], f"{path}: expected the memory of the checkpoint"),
        (memory | {"fingerprint": "another set"}, "expected the annotations .* got another set"),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises((ValueError, OSError), match=message):
            resume("memory", out, spec)
    path.write_bytes(whole)
    resume("memory", out, spec)
    assert tiny.differing(*(tiny.checkpoint(f)["model"] for f in (out, straight["memory"]))) == []
