"""Which checkpoints the fairseq plugin goes on from: damaged, foreign and of another training."""

from __future__ import annotations

import fractions
import os
import shutil
from collections import namedtuple
from types import SimpleNamespace

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq_toys import (  # noqa: E402
    ALPHA_FINAL,
    EPOCHS,
    build_criterion,
    entry,
)
from pskd_fairseq import checkpoint  # noqa: E402


@pytest.fixture
def check(task, tmp_path):
    """Build a criterion that goes on from the checkpoint in ``tmp_path``."""

    def check_resume(allow_change=False, **options):
        build_criterion(task, tmp_path, pskd_allow_schedule_change=allow_change, **options)

    return check_resume


@pytest.fixture
def last(tmp_path, straight):
    """A whole checkpoint of the middle of epoch 3."""
    path = tmp_path / "checkpoint_last.pt"
    shutil.copyfile(straight.save_dir / "checkpoint_3_16.pt", path)
    return path


def change(path, function) -> None:
    """Change a checkpoint's content and save it again."""
    state = torch.load(path, weights_only=False)
    function(state)
    torch.save(state, path)


def test_a_whole_checkpoint_is_accepted(check, last):
    check()


def test_a_first_run_has_nothing_to_check(check, tmp_path):
    check()


@pytest.mark.parametrize("part", [0.0, 1e-5, 1e-4, 0.01, 0.3, 0.9, 0.99999])
def test_a_checkpoint_cut_off_anywhere_is_damaged(check, last, part):
    os.truncate(last, int(part * last.stat().st_size))
    with pytest.raises(ValueError, match="checkpoint_last.pt: expected a complete .* damaged"):
        check()


@pytest.mark.parametrize("content", [b"no checkpoint\n" * 99, b"\x80\x02]q\x00.", b"PK\x03\x04"])
def test_another_file_is_no_checkpoint(check, last, content):
    last.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint_last.pt: expected"):
        check()


@pytest.mark.parametrize("content", [[1, 2], 7, torch.zeros(3)])
def test_another_torch_file_is_no_checkpoint(check, last, content):
    torch.save(content, last)
    with pytest.raises(ValueError, match="checkpoint_last.pt: expected"):
        check()


def test_a_bit_flipped_in_the_pickle_is_named_or_harmless(check, last):
    """Never an error without the file's name, whichever byte is hit."""
    data = last.read_bytes()
    start = data.find(b"data.pkl") + 64
    for position in range(start, start + 24_000, 293):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        last.write_bytes(damaged)
        try:
            check(allow_change=True)
        except ValueError as error:
            assert "checkpoint_last.pt" in str(error), position


def flip_teacher(path) -> None:
    """Flip one bit of the teacher's weights in a checkpoint's file."""
    state = torch.load(path, weights_only=False)
    data = bytearray(path.read_bytes())
    weight = max(entry(state)["teacher"]["model"].values(), key=torch.Tensor.numel)
    start = data.find(weight.numpy().tobytes())
    assert start > 0
    data[start + 101] ^= 4
    path.write_bytes(data)


def test_flipped_teacher_weights_are_found(check, last):
    flip_teacher(last)
    with pytest.raises(ValueError, match="teacher's weights are damaged: expected SHA-256"):
        check()


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize("foreign", [fractions.Fraction(1, 3), Point(1, 2), SimpleNamespace(a=1)])
def test_an_object_that_fairseq_does_not_write_is_refused(check, last, foreign):
    change(last, lambda state: state["extra_state"].update(metrics=foreign))
    expected = f"checkpoint_last.pt: expected the types of a fairseq.*{type(foreign).__name__}"
    with pytest.raises(ValueError, match=expected):
        check()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"pskd_alpha_final": 0.6}, f"--pskd-alpha-final: expected {ALPHA_FINAL}, .*got 0.6"),
        (
            {"pskd_alpha_schedule": "cosine"},
            "--pskd-alpha-schedule: expected 'linear', .*got 'cosine'",
        ),
        ({"max_epoch": 0, "max_update": 5}, f"length .*'{EPOCHS} epochs', .*got '5 updates'"),
        ({"max_epoch": 5}, f"length of the training: expected '{EPOCHS} epochs', .*got '5 epochs'"),
        ({"pskd_start_epoch": 2}, "--pskd-start-epoch: expected 1, .*got 2"),
    ],
)
def test_another_schedule_is_refused_unless_it_is_allowed(check, last, changed, message):
    expected = rf"checkpoint_last.pt: {message} \(--pskd-allow-schedule-change allows it\)$"
    with pytest.raises(ValueError, match=expected):
        check(**changed)
    check(allow_change=True, **changed)


CHANGED_OPTIONS = pytest.mark.parametrize(
    "flag, trained, value",
    [
        ("--label-smoothing", 0.1, 0.2),
        ("--pskd-teacher", "snapshot", "memory"),
        ("--pskd-skip-wrong-teacher", False, True),
    ],
)


@CHANGED_OPTIONS
def test_another_loss_or_teacher_is_refused(check, last, flag, trained, value):
    """A change of schedule that is allowed allows no other."""
    changed = {flag[2:].replace("-", "_"): value}
    expected = f"checkpoint_last.pt: {flag}: expected {trained!r}, with which .*got {value!r}"
    for allowed in (False, True):
        with pytest.raises(ValueError, match=f"{expected}$"):
            check(allow_change=allowed, **changed)
    check(reset_dataloader=True, **changed)


@CHANGED_OPTIONS
def test_an_older_checkpoint_tells_its_teacher_only(check, last, flag, trained, value):
    changed = {flag[2:].replace("-", "_"): value}
    change(last, lambda state: entry(state).pop("options"))
    check()
    if flag != "--pskd-teacher":
        check(**changed)
        return
    with pytest.raises(ValueError, match="--pskd-teacher: expected 'snapshot', .*got 'memory'"):
        check(**changed)
    change(last, lambda state: entry(state).update(memory={"0": {}}))
    check(**changed)


def drop_entry(state) -> None:
    del state["extra_state"]["TranslationTask"]


def of_alpha_0(state) -> None:
    kept = entry(state)
    kept["schedule"]["alpha_final"] = 0.0
    kept["teacher"] = {"model": None}
    kept["teacher_sha256"] = checkpoint.digest(kept["teacher"])


@pytest.mark.parametrize("of_another", [drop_entry, of_alpha_0])
def test_the_middle_of_an_epoch_needs_its_teacher(check, last, of_another):
    """The rest of the epoch would train without one."""
    change(last, of_another)
    with pytest.raises(ValueError, match="checkpoint_last.pt.* epoch 3.* teacher"):
        check(allow_change=True)
    check(allow_change=True, pskd_alpha_final=0.0)  # needs none
    check(reset_dataloader=True)  # begins anew with epoch 1


@pytest.mark.parametrize("position", [{"epoch": 1}, {"iterations_in_epoch": 0}])
def test_the_first_epoch_and_an_epochs_end_need_no_teacher(check, last, position):
    def move(state):
        drop_entry(state)
        state["extra_state"]["train_iterator"].update(position)

    change(last, move)
    check()
