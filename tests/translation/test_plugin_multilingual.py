"""A multilingual task, which trains the parts of its model in turns."""

from __future__ import annotations

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

TINY = (
    "--task multilingual_translation --arch multilingual_transformer --lang-pairs de-en,en-de "
    "--encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    "--encoder-attention-heads 2 "
    "--decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 "
    "--decoder-attention-heads 2 --ddp-backend legacy_ddp"
).split()


def test_each_part_learns_from_its_own_teacher(fairseq):
    still = ["--lr", "0", "--dropout", "0"]  # what does not move is its own teacher
    run = fairseq.train("multilingual", *TINY, *still, "--max-epoch", "3").expect_success()
    assert run.column("alpha") == pytest.approx([0.0, 0.467, 0.7], abs=1e-3)
    assert run.column("teacher_nll_loss") == run.column("nll_loss")[1:]
    assert run.column("teacher_agreement") == [1.0, 1.0]
