"""Resuming with the fairseq plugin: a resumed run is the straight run, wherever it was cut.

fairseq breaks ties among sentences of equal length anew after a restart, so that even plain
cross-entropy does not resume bit by bit; the toy corpus has no such ties, and here everything must.
"""

from __future__ import annotations

import math
import signal

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

from fairseq_toys import (  # noqa: E402
    ALPHA_FINAL,
    BATCHES,
    EPOCHS,
    continued_from,
    same,
)

TO_THE_END = ["--max-epoch", str(EPOCHS)]
BLEU = ["--eval-bleu", "--eval-bleu-args", '{"beam": 1, "max_len_a": 0, "max_len_b": 5}']
BLEU += ["--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"]


@pytest.fixture(scope="module")
def chains(fairseq, straight, stock):
    """Cut runs and their continuations, each a function so that two go on side by side."""
    return {
        "middle": resume(fairseq, straight, "checkpoint_3_16.pt", "--save-interval-updates", "1"),
        "end": resume(fairseq, straight, "checkpoint2.pt"),
        "first_epoch": resume(fairseq, straight, "checkpoint_1_4.pt"),
        "stopped": fairseq.submit(stop_and_resume, fairseq, "stopped"),
        "killed": fairseq.submit(kill_and_resume, fairseq),
        "half": fairseq.submit(half_precision, fairseq),
        "shards": fairseq.submit(sharded, fairseq),
        "mean": fairseq.submit(mean_of_weights, fairseq),
        "bleu": fairseq.submit(stop_and_resume, fairseq, "bleu", *BLEU),
        "warm": resume(
            fairseq, stock, "checkpoint2.pt", "--reset-optimizer", "--save-interval-updates", "1",
            "--max-update", "2",
        ),
    }  # fmt: skip


def resume(fairseq, run, checkpoint: str, *flags: str):
    """Start a training that continues from a copy of one of a run's checkpoints."""
    name = f"{run.save_dir.name}_from_{checkpoint.removesuffix('.pt')}"
    continued_from(run.save_dir / checkpoint, fairseq.folder / name)
    return fairseq.start(name, *TO_THE_END, *flags)


def stop_and_resume(fairseq, name: str, *flags: str):
    flags = [*TO_THE_END, *flags]
    stopped = fairseq.train(name, *flags, "--max-update", "9").expect_success()
    cut = stopped.checkpoint()
    return stopped, cut, fairseq.train(name, *flags)


def kill_and_resume(fairseq):
    flags = ["killed", *TO_THE_END, "--save-interval-updates", "4"]
    killed = fairseq.train(*flags, kill_at="checkpoint_3_16.pt")
    return killed, fairseq.train(*flags[:-2])


def mean_of_weights(fairseq):
    """Return a straight run, those that go on from its checkpoints, and one that starts over."""
    flags = ["--max-epoch", "3", "--pskd-teacher", "ema", "--save-interval-updates", "4"]
    whole = fairseq.train("mean", *flags).expect_success()
    runs = {}
    for cut in ("checkpoint2.pt", "checkpoint_3_16.pt"):
        runs[cut] = f"mean_from_{cut}"
        continued_from(whole.save_dir / cut, fairseq.folder / runs[cut])
        runs[cut] = fairseq.train(runs[cut], *flags)
    cut = str(whole.save_dir / "checkpoint2.pt")
    over = ["--reset-dataloader", "--reset-optimizer", "--restore-file", cut]
    return whole, runs, fairseq.train("mean_anew", *flags, *over)


def half_precision(fairseq):
    flags = ["--max-epoch", "3", "--memory-efficient-fp16", "--save-interval-updates", "4"]
    whole = fairseq.train("half", *flags).expect_success()
    continued_from(whole.save_dir / "checkpoint_2_8.pt", fairseq.folder / "half_resumed")
    return whole, fairseq.train("half_resumed", *flags)


def sharded(fairseq):
    """Two shards, which fairseq loads in turns, an epoch each, without a cached iterator."""
    flags = [f"{fairseq.data}:{fairseq.data}", *TO_THE_END, "--save-interval-updates", "4"]
    runs = [fairseq.train("shards", *flags).expect_success()]
    for cut in ("checkpoint2.pt", "checkpoint_3_16.pt"):
        name = f"shards_from_{cut}"
        continued_from(runs[0].save_dir / cut, fairseq.folder / name)
        runs.append(fairseq.train(name, *flags))
    return runs


@pytest.mark.parametrize("cut, epochs", [("first_epoch", 4), ("end", 2), ("middle", 2)])
def test_a_resumed_run_ends_and_logs_as_the_straight_run(chains, straight, cut, epochs):
    """Alpha, the teacher's figures and the losses of all epochs that were left."""
    run = chains[cut].result().expect_success()
    assert same(run.model("checkpoint4.pt"), straight.model("checkpoint4.pt"))
    timing = ("train_wps", "train_ups", "train_train_wall", "train_wall")
    for ours, theirs in zip(run.log("train"), straight.log("train")[-epochs:], strict=True):
        assert {key: value for key, value in ours.items() if key not in timing} == {
            key: value for key, value in theirs.items() if key not in timing
        }


def test_resuming_inside_an_epoch_restores_its_teacher(chains, straight):
    run = chains["middle"].result().expect_success()
    assert same(run.teacher("checkpoint_3_17.pt"), straight.model("checkpoint2.pt"))
    assert "restored the teacher of epoch 3" in run.output


def test_a_run_with_the_mean_of_weights_ends_as_the_straight_run(chains, straight):
    whole, runs, _ = chains["mean"].result()
    assert not same(whole.model("checkpoint3.pt"), straight.model("checkpoint3.pt"))
    for run in runs.values():
        assert same(run.expect_success().model("checkpoint3.pt"), whole.model("checkpoint3.pt"))


def test_a_training_that_starts_over_takes_no_mean_with_weights_of_the_old_one(chains):
    run = chains["mean"].result()[2].expect_success()
    assert same(run.teacher("checkpoint_2_8.pt"), run.model("checkpoint1.pt"))


def test_resuming_inside_the_first_epoch_has_no_teacher(chains):
    run = chains["first_epoch"].result().expect_success()
    assert run.column("alpha")[0] == 0.0
    assert "train_teacher_nll_loss" not in run.log("train")[0]
    assert "restored the teacher" not in run.output


def test_a_run_stopped_inside_an_epoch_goes_on_to_the_same_end(chains, straight):
    stopped, cut, resumed = chains["stopped"].result()
    resumed.expect_success()
    assert cut["extra_state"]["train_iterator"]["epoch"] == 2
    assert cut["extra_state"]["train_iterator"]["iterations_in_epoch"] == 3
    assert same(resumed.model(), straight.model())
    assert resumed.column("alpha") == straight.column("alpha")[1:]


def test_a_run_that_validates_by_bleu_resumes(chains, straight):
    """fairseq then keeps numpy counts in its checkpoints, which torch refuses to read by itself."""
    stopped, cut, resumed = chains["bleu"].result()
    assert "valid_bleu" in stopped.log("valid")[0]
    assert "numpy" in str([type(value) for value in numbers(cut["extra_state"]["metrics"])])
    assert same(resumed.expect_success().model(), straight.model())


def numbers(tree):
    """Yield the leaves of nested lists, tuples and dicts."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if not isinstance(tree, list | tuple):
        yield tree
        return
    for branch in tree:
        yield from numbers(branch)


def test_max_update_beside_max_epoch_leaves_alpha_to_the_epochs(chains):
    stopped, _, _ = chains["stopped"].result()
    assert stopped.column("alpha") == pytest.approx([0.0, ALPHA_FINAL * 2 / EPOCHS], abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_end(chains, straight):
    killed, resumed = chains["killed"].result()
    assert killed.code == -signal.SIGKILL
    resumed.expect_success()
    first_step = int(resumed.log("train_inner")[0]["num_updates"])
    assert 2 * BATCHES + 4 < first_step <= EPOCHS * BATCHES
    assert same(resumed.model(), straight.model())


def test_half_precision_trains_and_resumes_with_its_teacher(chains):
    whole, resumed = chains["half"].result()
    resumed.expect_success()
    expected = [0.0, ALPHA_FINAL * 2 / 3, ALPHA_FINAL]
    assert whole.column("alpha") == pytest.approx(expected, abs=1e-4)
    losses = whole.column("loss") + whole.column("loss", "valid")
    assert all(math.isfinite(loss) for loss in losses)
    # The model of a checkpoint is raised to float32 by fairseq, the teacher is kept as it is used.
    teacher, model = whole.teacher("checkpoint_2_8.pt"), whole.model("checkpoint1.pt")
    assert same({name: weight.float() for name, weight in teacher.items()}, model)
    assert {str(weight.dtype) for weight in teacher.values()} >= {"torch.float16"}
    assert same(resumed.model(), whole.model())


def test_sharded_data_resumes_with_the_teacher_of_the_last_epoch(chains):
    whole, *resumed = chains["shards"].result()
    for run in resumed:
        run.expect_success()
        assert same(run.model(), whole.model())
        assert run.column("teacher_nll_loss") == whole.column("teacher_nll_loss")[1:]


def test_from_another_criterions_epoch_end_its_model_is_the_teacher(chains, stock):
    run = chains["warm"].result().expect_success()
    assert same(run.teacher("checkpoint_3_1.pt"), stock.model("checkpoint2.pt"))
    assert run.column("alpha") == pytest.approx([ALPHA_FINAL * 3 / EPOCHS], abs=1e-4)
