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
#: By name: the flags, and what the error must say (the flag or file, what it expected, what came).
WRONG = {
    "cut_off": (TO_THE_END, ["checkpoint_last.pt", "complete", "damaged", "--restore-file"]),
    "payload": (TO_THE_END, ["checkpoint_last.pt", "types of a fairseq checkpoint", "system"]),
    "suffix": (
        [*TO_THE_END, "--reset-optimizer", "--checkpoint-suffix", "_a"],
        ["checkpoint_last_a.pt", "middle of epoch 3", "teacher", "got none", "--reset-dataloader"],
    ),
    "suffix_and_file": (
        [
            "--max-epoch", "9", "--checkpoint-suffix", "_a",
            "--restore-file", "wrong_suffix_and_file/older.pt",
        ],
        ["older_a.pt", "'4 epochs'", "'9 epochs'", "--pskd-allow-schedule-change"],
    ),
}  # fmt: skip
#: The checkpoint's name where it is not checkpoint_last.pt.
NAMES = {"suffix": "checkpoint_last_a.pt", "suffix_and_file": "older_a.pt"}


@pytest.fixture(scope="module")
def wrong_checkpoints(fairseq, straight, stock):
    """Save folders that no training may continue from, by name."""
    source = straight.save_dir / "checkpoint_3_16.pt"
    foreign = {"suffix": stock.save_dir / "checkpoint_3_16.pt"}
    folders = {
        name: continued_from(foreign.get(name, source), fairseq.folder / f"wrong_{name}")
        for name in WRONG
    }
    last = {name: folder / "checkpoint_last.pt" for name, folder in folders.items()}
    for name, file in NAMES.items():
        last[name].rename(folders[name] / file)
    os.truncate(last["cut_off"], source.stat().st_size // 2)
    shutil.copyfile(source, folders["cut_off"] / "checkpoint_3_16.pt")
    state = torch.load(source, weights_only=False)
    state["extra_state"]["metrics"] = Payload(fairseq.folder / "resume_was_run")
    torch.save(state, last["payload"])
    return folders


@pytest.fixture(scope="module")
def refusals(fairseq, wrong_checkpoints):
    """Every wrong command, two at a time, with the folder's contents before it."""
    started = {}
    for name, (flags, _) in WRONG.items():
        started[name] = digests(wrong_checkpoints[name]), fairseq.start(f"wrong_{name}", *flags)
    return started


@pytest.fixture(scope="module")
def ways_out(fairseq, straight, wrong_checkpoints, refusals):
    """What the errors advise."""
    continued_from(straight.save_dir / "checkpoint2.pt", fairseq.folder / "shorter")
    refusals["cut_off"][1].result()
    older = str(wrong_checkpoints["cut_off"] / "checkpoint_3_16.pt")
    return {
        "older": fairseq.start("wrong_cut_off", *TO_THE_END, "--restore-file", older),
        "change": fairseq.start("shorter", "--max-epoch", "3", "--pskd-allow-schedule-change"),
    }


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_ends_before_the_first_update(fairseq, refusals, name):
    before, future = refusals[name]
    run = future.result()
    run.expect_refusal(*WRONG[name][1])
    assert digests(run.save_dir) == before
    assert not (fairseq.folder / "resume_was_run").exists()


def test_a_checkpoint_to_continue_once_is_checked_as_the_last_one(fairseq, straight):
    other = ["--continue-once", str(straight.save_dir / "checkpoint_3_16.pt")]
    run = fairseq.train("wrong_continue_once", "--max-epoch", "9", *other)
    run.expect_refusal("checkpoint_3_16.pt", "'4 epochs'", "'9 epochs'")


def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(ways_out, straight):
    run = ways_out["older"].result().expect_success()
    assert same(run.model(), straight.model())


def test_an_allowed_schedule_change_takes_the_new_schedule(ways_out):
    run = ways_out["change"].result().expect_success()
    assert run.column("alpha") == pytest.approx([ALPHA_FINAL], abs=1e-4)
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
