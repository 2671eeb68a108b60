"""What the fairseq plugin refuses: before the first update, by name, and leaving files alone."""

from __future__ import annotations

import os
import shutil

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq_toys import (  # noqa: E402
    ALPHA_FINAL,
    EPOCHS,
    Payload,
    build_criterion,
    continued_from,
    digests,
    same,
)

TO_THE_END = ["--max-epoch", str(EPOCHS)]
OTHER_LENGTH = ["'4 epochs'", "'9 epochs'", "--pskd-allow-schedule-change"]


@pytest.fixture
def refused(fairseq):
    """Trains on from a copy of a checkpoint, changed, and expects an error that says words."""

    def train(name, source, flags, *words, file="checkpoint_last.pt", change=lambda path: None):
        folder = continued_from(source, fairseq.folder / name)
        change((folder / "checkpoint_last.pt").rename(folder / file))
        before = digests(folder)
        fairseq.train(name, *flags).expect_refusal(file, *words)
        assert digests(folder) == before
        return folder

    return train


def test_a_damaged_checkpoint_is_refused_and_an_older_one_takes_its_place(
    fairseq, straight, refused
):
    source = straight.save_dir / "checkpoint_3_16.pt"
    words = ["complete", "damaged", "--restore-file"]
    folder = refused(
        "cut_off", source, TO_THE_END, *words,
        change=lambda path: os.truncate(path, source.stat().st_size // 2),
    )  # fmt: skip
    older = str(shutil.copy(source, folder))
    run = fairseq.train(folder.name, *TO_THE_END, "--restore-file", older).expect_success()
    assert same(run.model(), straight.model())


def test_a_foreign_object_is_refused_and_not_run(fairseq, straight, refused):
    marker, source = fairseq.folder / "resume_was_run", straight.save_dir / "checkpoint_3_16.pt"

    def add_payload(path):
        state = torch.load(path, weights_only=False)
        state["extra_state"]["metrics"] = Payload(marker)
        torch.save(state, path)

    words = ["types of a fairseq checkpoint", "system"]
    refused("payload", source, TO_THE_END, *words, change=add_payload)
    assert not marker.exists()


def test_the_checkpoint_that_is_checked_is_the_one_that_fairseq_reads(straight, stock, refused):
    name = "checkpoint_3_16.pt"
    flags = [*TO_THE_END, "--reset-optimizer", "--checkpoint-suffix", "_a"]
    words = ["middle of epoch 3", "teacher", "got none", "--reset-dataloader"]
    refused("suffix", stock.save_dir / name, flags, *words, file="checkpoint_last_a.pt")
    flags = ["--max-epoch", "9", "--checkpoint-suffix", "_a", "--restore-file", "named/older.pt"]
    refused("named", straight.save_dir / name, flags, *OTHER_LENGTH, file="older_a.pt")


def test_a_checkpoint_to_continue_once_is_checked_as_the_last_one(fairseq, straight):
    other = ["--continue-once", str(straight.save_dir / "checkpoint_3_16.pt")]
    run = fairseq.train("continue_once", "--max-epoch", "9", *other)
    run.expect_refusal("checkpoint_3_16.pt", *OTHER_LENGTH)


def test_an_allowed_schedule_change_takes_the_new_schedule(fairseq, straight):
    continued_from(straight.save_dir / "checkpoint2.pt", fairseq.folder / "shorter")
    run = fairseq.train("shorter", "--max-epoch", "3", "--pskd-allow-schedule-change")
    assert run.expect_success().column("alpha") == pytest.approx([ALPHA_FINAL], abs=1e-4)
    assert "the schedule changes" in run.output


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"patience": 3}, "--patience 3 may end the training early"),
        ({"stop_min_lr": 1e-5}, "--stop-min-lr 1e-05 may"),
        ({"max_update": 50}, "--max-update 50 may"),
        ({"patience": 3, "max_update": 50, "pskd_alpha_schedule": "cosine"},
         "--patience 3 or --max-update 50 may"),
        ({"patience": 3, "max_epoch": 0, "max_update": 50}, "until update 50 (linear); give"),
        ({}, ""),
        ({"max_epoch": 0, "max_update": 50}, ""),
        ({"patience": 3, "pskd_alpha_schedule": "constant"}, ""),
        ({"patience": 3, "pskd_alpha_final": 0.0}, ""),
    ],
)  # fmt: skip
def test_an_end_before_alpha_has_grown_is_warned_of(task, tmp_path, caplog, flags, said):
    build_criterion(task, tmp_path, **flags)
    assert said in caplog.text
    assert bool(said) == ("with alpha below --pskd-alpha-final 0.7" in caplog.text)
