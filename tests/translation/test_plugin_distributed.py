"""Several processes: the fairseq plugin on two ranks computes what it computes on one.

fairseq trains in several CPU processes by gloo and its own gradient reduction (legacy_ddp) only.
"""

from __future__ import annotations

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq_toys import ALPHA_FINAL, EPOCHS, continued_from, same  # noqa: E402

# Five batches for two ranks: the last update of an epoch has a dummy batch on the second rank.
FLAGS = f"--max-epoch {EPOCHS} --dropout 0 --batch-size 5 --save-interval-updates 2".split()
FIGURES = ("loss", "nll_loss", "alpha", "teacher_nll_loss", "gradient_rescaling")


@pytest.fixture(scope="module")
def runs(fairseq):
    """Two ranks, one process with the same batches an update, and two ranks resumed."""
    one = fairseq.start("one_rank", *FLAGS, "--update-freq", "2")
    two = fairseq.train_ranks("two_ranks", *FLAGS)
    two[0].expect_success()
    resumed = {}
    for name, checkpoint in (("inside", "checkpoint_3_8.pt"), ("end", "checkpoint2.pt")):
        continued_from(two[0].save_dir / checkpoint, fairseq.folder / f"ranks_{name}")
        resumed[name] = fairseq.submit(
            lambda name=name: fairseq.train_ranks(f"ranks_{name}", *FLAGS)
        )
    return {"one": one.result().expect_success(), "two": two, **resumed}


def test_two_ranks_log_and_train_what_one_process_does(runs):
    """A teacher or an alpha of its own on the second rank would show in the sums over both."""
    assert [run.code for run in runs["two"]] == [0, 0]
    one, two = runs["one"], runs["two"][0]
    for name in FIGURES:
        assert two.column(name) == pytest.approx(one.column(name), abs=1.5e-3), name
    assert two.column("alpha")[-1] == pytest.approx(ALPHA_FINAL, abs=1e-4)
    for name, weight in one.model().items():
        torch.testing.assert_close(two.model()[name], weight, rtol=1e-3, atol=1e-5)


def test_inside_an_epoch_the_teacher_is_the_model_that_ended_the_last(runs):
    two = runs["two"][0]
    assert same(two.teacher("checkpoint_3_8.pt"), two.model("checkpoint2.pt"))


@pytest.mark.parametrize("cut", ["inside", "end"])
def test_two_ranks_resume_to_the_same_end(runs, cut):
    """fairseq reads the checkpoint on the first rank and broadcasts its objects to the others."""
    first, second = runs[cut].result()
    assert (first.code, second.code) == (0, 0), second.output[-4000:]
    assert same(first.model(), runs["two"][0].model())
    assert first.column("alpha") == runs["two"][0].column("alpha")[2:]
    assert first.column("teacher_nll_loss") == runs["two"][0].column("teacher_nll_loss")[1:]
