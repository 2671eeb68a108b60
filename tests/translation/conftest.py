"""The data and the runs that many tests of the fairseq plugin read; each is made once a session."""

from __future__ import annotations

import logging

import pytest
from fairseq_toys import EPOCHS, STOCK, Fairseq, write_corpus


@pytest.fixture(autouse=True)
def _keeps_the_log(monkeypatch):
    """prepare.py and evaluate.py would take pytest's handlers away."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


@pytest.fixture(scope="session")
def fairseq(tmp_path_factory):
    """fairseq's commands on a binarised toy corpus."""
    folder = tmp_path_factory.mktemp("fairseq")
    write_corpus(folder)
    tool = Fairseq(folder / "data", folder)
    tool.forked(
        "preprocess", "-s", "de", "-t", "en", "--trainpref", "train", "--validpref", "valid",
        "--testpref", "test", "--destdir", "data", "--workers", "1", name="preprocess",
    ).expect_success()  # fmt: skip
    yield tool
    tool.close()


@pytest.fixture(scope="session")
def _baselines(fairseq):
    epochs = ["--max-epoch", str(EPOCHS), "--save-interval-updates", "4"]
    board = ["--tensorboard-logdir", str(fairseq.folder / "board")]
    return {
        "straight": fairseq.start("straight", *epochs, *board),
        "stock": fairseq.start("stock", *STOCK, *epochs),
    }


@pytest.fixture(scope="session")
def straight(_baselines):
    """A PS-KD training of 4 epochs of 6 updates, with a checkpoint every 4 updates and epoch."""
    return _baselines["straight"].result().expect_success()


@pytest.fixture(scope="session")
def stock(_baselines):
    """The same training with fairseq's label-smoothed cross-entropy."""
    return _baselines["stock"].result().expect_success()


@pytest.fixture(scope="session")
def models(straight):
    """The models that ended epochs 1 and 3, as teacher and student; what changes one copies it."""
    import pskd_fairseq  # noqa: F401  torch's allow-list for fairseq checkpoints
    from fairseq import checkpoint_utils

    paths = [str(straight.save_dir / f"checkpoint{epoch}.pt") for epoch in (1, 3)]
    (teacher, student), _, _ = checkpoint_utils.load_model_ensemble_and_task(paths)
    return teacher.eval(), student.train()


@pytest.fixture
def task(fairseq):
    """A translation task of its own, for criterions built in this process."""
    import torch
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    torch.set_num_threads(1)  # models this small are faster so
    config = TranslationConfig(
        data=str(fairseq.data), source_lang="de", target_lang="en", train_subset="train",
        dataset_impl=None, required_seq_len_multiple=1,
    )  # fmt: skip
    return TranslationTask.setup_task(config)
