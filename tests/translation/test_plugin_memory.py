"""The memory teacher through fairseq-train: what an epoch said is what the next one learns from."""

from __future__ import annotations

import random
import shutil
import signal
import zipfile
from types import SimpleNamespace

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq_toys import (  # noqa: E402
    EPOCHS,
    continued_from,
    entry,
    same,
)
from pskd_fairseq.checkpoint import ENTRY  # noqa: E402

# The toy corpus's 40 words, fairseq's four and its filling to a multiple of 8: the past is whole.
MEMORY = ["--pskd-teacher", "memory", "--pskd-top-k", "48", "--max-epoch", str(EPOCHS)]
SAVES = ["--save-interval-updates", "4"]


def copied(fairseq, run, checkpoint: str, name: str):
    """Copy a run's folder, its memory included, with one of its checkpoints as the last."""
    folder = continued_from(run.save_dir / checkpoint, fairseq.folder / name)
    shutil.copytree(run.save_dir / "pskd_memory", folder / "pskd_memory")
    return folder


@pytest.fixture(scope="module")
def whole(fairseq):
    """A run whose data come from workers, which those that are compared with it do not have."""
    return fairseq.train("memory", *MEMORY, *SAVES, "--num-workers", "2").expect_success()


@pytest.fixture(scope="module")
def runs(fairseq, whole):
    sharded = [f"{fairseq.data}:{fairseq.data}", *MEMORY, *SAVES]
    return {
        "late": fairseq.start(
            "memory_late", *MEMORY, "--pskd-start-epoch", "3", "--pskd-skip-wrong-teacher"
        ),
        "shards": fairseq.start("memory_shards", *sharded),
        "few": fairseq.start("memory_few", *MEMORY, "--pskd-top-k", "3"),
        "prefix": fairseq.start("memory_prefix", *MEMORY, "--ignore-prefix-size", "1"),
    }


def test_the_teachers_nll_is_that_of_the_last_epoch(whole):
    """What the student said in training, with its dropout, to half precision."""
    nll, teacher = whole.column("nll_loss"), whole.column("teacher_nll_loss")
    assert teacher == pytest.approx(nll[:-1], abs=1e-2)
    assert whole.column("alpha") == pytest.approx([0.0, 0.35, 0.525, 0.7], abs=1e-4)
    assert whole.column("teacher_coverage") == [1.0] * (EPOCHS - 1)
    assert whole.column("top_k_mass") == pytest.approx([1.0] * (EPOCHS - 1), abs=1e-3)


def files(run) -> list[str]:
    """Return the numbers of the memory's files, the running epoch's with its ending."""
    folder = run.save_dir / "pskd_memory" / "shard_0"
    return sorted(path.name.removeprefix("epoch_0000") for path in folder.glob("epoch_*"))


def test_only_the_files_that_a_resume_may_need_are_left(whole):
    # The last checkpoint before the fourth epoch began is that of the third's end.
    assert files(whole) == ["3.pskd", "4.pskd.part"]


#: As seen when the fourth epoch began.
KEPT = {
    "epochs": (["--keep-last-epochs", "2"], ["2.pskd", "3.pskd", "4.pskd.part"]),
    "updates": (  # checkpoint_2_8.pt and checkpoint_3_16.pt
        [*SAVES, "--keep-interval-updates", "2"],
        ["1.pskd", "2.pskd", "3.pskd", "4.pskd.part"],
    ),
    "best": (  # by a measure of which the first epoch's is the best
        ["--maximize-best-checkpoint-metric"], ["1.pskd", "3.pskd", "4.pskd.part"]
    ),
    "bests": (["--keep-best-checkpoints", "2"], ["2.pskd", "3.pskd", "4.pskd.part"]),
}  # fmt: skip
OLDER = {
    "epochs": "checkpoint3.pt", "updates": "checkpoint_4_20.pt", "best": "checkpoint_best.pt",
}  # fmt: skip


@pytest.fixture(scope="module")
def keeping(fairseq):
    return {
        name: fairseq.start(f"memory_keeping_{name}", *MEMORY, *flags)
        for name, (flags, _) in KEPT.items()
    }


@pytest.mark.parametrize("name", KEPT)
def test_files_stay_for_as_many_checkpoints_as_fairseq_keeps(keeping, name):
    assert files(keeping[name].result().expect_success()) == KEPT[name][1]


@pytest.mark.parametrize("name", OLDER)
def test_a_kept_checkpoint_can_be_resumed(fairseq, keeping, name):
    run = keeping[name].result()
    copied(fairseq, run, OLDER[name], f"memory_older_{name}")
    resumed = fairseq.train(f"memory_older_{name}", *MEMORY, *KEPT[name][0]).expect_success()
    assert resumed.column("teacher_coverage")[0] == 1.0
    assert same(resumed.model(), run.model())


def test_a_reset_run_leaves_no_file_of_the_old_one(fairseq, whole):
    name = "memory_reset"
    copied(fairseq, whole, "checkpoint_last.pt", name)
    flags = [*MEMORY, "--max-epoch", "2", "--reset-dataloader", "--reset-optimizer"]
    run = fairseq.train(name, *flags, "--reset-lr-scheduler", "--reset-meters").expect_success()
    assert files(run) == ["1.pskd", "2.pskd.part"]


def test_ignored_prefixes_have_no_past(runs):
    run = runs["prefix"].result().expect_success()
    # fairseq divides by all tokens, of which there are 15.5 in a sentence.
    nll = [15.5 / 14.5 * value for value in run.column("nll_loss")]
    assert run.column("teacher_nll_loss") == pytest.approx(nll[:-1], abs=1e-2)


def test_a_shard_learns_from_its_own_last_epoch(runs):
    run = runs["shards"].result().expect_success()
    nll, teacher = run.column("nll_loss"), run.column("teacher_nll_loss")
    assert teacher == pytest.approx(nll[:2], abs=1e-2)  # of epochs 3 and 4, two epochs before
    assert "no predictions of an earlier epoch" not in run.output


def test_a_teacher_may_start_late_and_be_believed_only_where_it_is_right(runs, whole):
    run = runs["late"].result().expect_success()
    assert run.column("alpha") == pytest.approx([0.0, 0.0, 0.525, 0.7], abs=1e-4)
    coverage = run.column("teacher_coverage")
    assert len(coverage) == 2 and all(0.0 < part < 1.0 for part in coverage)
    assert max(run.column("teacher_nll_loss")) < min(whole.column("teacher_nll_loss"))


def test_the_mass_that_few_types_hold_is_logged(runs, straight):
    mass = runs["few"].result().expect_success().column("top_k_mass")
    assert len(mass) == EPOCHS - 1 and all(3 / 48 < part < 0.9 for part in mass)
    assert straight.column("top_k_mass") == []  # a snapshot keeps all


# ---- resume ------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["checkpoint_4_20.pt", "checkpoint3.pt"])
def test_a_resumed_run_ends_as_the_straight_run(fairseq, whole, checkpoint):
    copied(fairseq, whole, checkpoint, f"memory_from_{checkpoint}")
    run = fairseq.train(f"memory_from_{checkpoint}", *MEMORY, *SAVES).expect_success()
    assert same(run.model(), whole.model())
    assert run.column("teacher_nll_loss")[-1] == whole.column("teacher_nll_loss")[-1]
    assert run.column("teacher_coverage")[-1] == 1.0


def test_a_run_that_is_killed_five_times_goes_on_to_the_same_end(fairseq, whole):
    draw = random.Random(5)
    flags = ["memory_killed", *MEMORY, "--save-interval-updates", "1"]
    codes = []
    for _ in range(5):
        run = fairseq.train(*flags, *intact(fairseq), limit_s=draw.uniform(0.3, 1.1))
        codes.append(run.code)
    assert -signal.SIGALRM in codes and set(codes) <= {0, -signal.SIGALRM}
    run = fairseq.train(*flags, *intact(fairseq)).expect_success()
    assert same(run.model(), whole.model())


def intact(fairseq) -> list[str]:
    """Name the newest whole checkpoint where the kill cut fairseq's copy of it, the last."""
    newest = sorted(
        (fairseq.folder / "memory_killed").glob("*.pt"), key=lambda p: -p.stat().st_mtime
    )
    whole = [path for path in newest if zipfile.is_zipfile(path)]
    return ["--restore-file", str(whole[0])] if whole != newest else []


def test_a_checkpoint_whose_file_is_gone_is_told_how_files_stay(fairseq, whole):
    copied(fairseq, whole, "checkpoint2.pt", "memory_gone")
    fairseq.train("memory_gone", *MEMORY, *SAVES).expect_refusal(
        "the predictions of epoch 2, got none", "--keep-last-epochs", "checkpoint_last"
    )


def test_a_new_save_dir_is_told_where_the_files_are(fairseq, whole):
    old = ["--restore-file", str(whole.save_dir / "checkpoint3.pt")]
    folder = whole.save_dir / "pskd_memory"
    run = fairseq.train("memory_new_dir", *MEMORY, *old)
    run.expect_refusal("epoch 3, got none", f"copy that folder to {run.save_dir / 'pskd_memory'}",
                       f"--pskd-memory {folder}")  # fmt: skip
    shutil.copytree(folder, run.save_dir / "pskd_memory", dirs_exist_ok=True)
    run = fairseq.train("memory_new_dir", *MEMORY, *SAVES, *old).expect_success()
    assert same(run.model(), whole.model())


def test_another_top_k_is_told_what_to_give(fairseq, whole):
    copied(fairseq, whole, "checkpoint3.pt", "memory_top_k")
    run = fairseq.train("memory_top_k", *MEMORY, "--pskd-top-k", "5")
    run.expect_refusal("expected top_k 5, got 48", "--pskd-top-k", "--reset-dataloader")


def test_a_checkpoint_of_an_older_version_is_read(fairseq, whole):
    name = "memory_older_version"
    last = copied(fairseq, whole, "checkpoint3.pt", name)
    state = torch.load(last / "checkpoint_last.pt", weights_only=False)
    shard = entry(state)["memory"]["0"]
    del shard["folder"], shard["memory"]["ended"]
    torch.save(state, last / "checkpoint_last.pt")
    run = fairseq.train(name, *MEMORY, *SAVES).expect_success()
    assert same(run.model(), whole.model())


def test_a_training_without_pskd_goes_on_with_an_empty_memory(fairseq, straight):
    name = "memory_from_baseline"
    last = continued_from(straight.save_dir / "checkpoint2.pt", fairseq.folder / name)
    state = torch.load(last / "checkpoint_last.pt", weights_only=False)
    for of_task in state["extra_state"].values():
        if isinstance(of_task, dict):
            of_task.pop(ENTRY, None)  # fairseq's own criterion leaves none
    torch.save(state, last / "checkpoint_last.pt")
    run = fairseq.train(name, *MEMORY).expect_success()
    assert "no predictions of an earlier epoch: hard targets in this one" in run.output
    assert run.column("teacher_coverage") == [1.0]  # of the epoch after


# ---- processes ---------------------------------------------------------------------------------


def test_the_ranks_of_two_machines_learn_what_one_process_learns(fairseq):
    """With five batches the last update of an epoch has dummy batches."""
    flags = [*MEMORY, "--dropout", "0", "--batch-size", "5"]
    one = fairseq.start("memory_alone", *flags, "--update-freq", "4")
    several = fairseq.train_ranks("memory_ranks", *flags, ranks=4, machines=2)
    assert [run.code for run in several] == [0] * 4, several[0].output[-3000:]
    one, first = one.result().expect_success(), several[0]
    for figure in ("loss", "nll_loss", "alpha", "teacher_nll_loss", "teacher_coverage"):
        assert first.column(figure) == pytest.approx(one.column(figure), abs=2e-3), figure
    for key, weight in one.model().items():
        torch.testing.assert_close(first.model()[key], weight, rtol=1e-3, atol=1e-4)


# ---- rows --------------------------------------------------------------------------------------


def test_rows_of_a_batch(tmp_path):
    from pskd_fairseq.memory import TokenMemory

    memory = TokenMemory(str(tmp_path), 50, 4)
    memory.begin_epoch(1, SimpleNamespace(tgt_sizes=(3, 2, 4)))
    pad = 1
    target = torch.tensor([[5, 6, 2, 1], [1, 1, 7, 2], [5, 6, 7, 2], [5, 6, 2, 1]])
    sample = {"id": torch.tensor([0, 1, 1, 7])}  # a sentence of another length, an id of elsewhere
    rows, valid = memory.rows(sample, target, pad)
    assert rows.tolist() == [[0, 1, 2, 9], [9, 9, 3, 4], [9] * 4, [9] * 4]
    assert valid.tolist() == [[True] * 3 + [False], [False] * 2 + [True] * 2, [False] * 4] + [
        [False] * 4
    ]
