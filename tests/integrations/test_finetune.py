"""integrations/finetune.py on made-up sentences and a tiny encoder."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install '.[transformers]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[transformers]'")

from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

SCRIPT = Path(__file__).resolve().parents[2] / "integrations" / "finetune.py"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "a", "the"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pinned memory without a GPU


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.VALID, module.TEST = 10, 20
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Sentences, and a model with its tokenizer."""
    data, model = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("model")
    for name, word in (("neg", "bad"), ("pos", "good")):
        lines = [f"{word} {'the ' * (place % 5)}film" for place in range(30)]
        (data / f"rt-polarity.{name}").write_text("\n".join(lines) + "\n", encoding="latin-1")
    (model / "vocab.txt").write_text("\n".join(WORDS))
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 16, "vocab_size": len(WORDS), "max_position_embeddings": 64}
    BertForSequenceClassification(BertConfig(**size)).save_pretrained(model)
    BertTokenizerFast(vocab_file=str(model / "vocab.txt")).save_pretrained(model)
    return data, model


@pytest.mark.parametrize("teacher", [None, "memory", "snapshot"])
def test_results_have_the_metrics_before_and_after_scaling(
    teacher, finetune, folders, tmp_path, monkeypatch, capsys
):
    data, model = folders
    words = ["--data", str(data), "--model", str(model), "--output-dir", str(tmp_path / "run")]
    words += ["--epochs", "2", "--label-noise", "0.2", "--trained-layers", "1", "--train", "25"]
    if teacher is not None:
        words += ["--alpha-final", "0.8", "--teacher", teacher]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
    finetune.main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["train"] == 25
    assert results["test"].keys() >= {"accuracy", "nll", "ece", "aurc"}
    assert results["test"]["accuracy"] == results["test_scaled"]["accuracy"]
    assert ("pskd/alpha" in capsys.readouterr().out) is (teacher is not None)


def test_the_draw_is_the_same_for_all_seeds_and_the_noise_is_not(finetune, folders):
    texts, labels = finetune.read_sentences(folders[0])
    again, _ = finetune.read_sentences(folders[0])
    assert texts == again and len(texts) == 60 and labels.sum() == 30
    one, other = (finetune.flipped(labels, 0.3, seed) for seed in (1, 2))
    assert (one != labels).sum() == (other != labels).sum() == 18
    assert not np.array_equal(one, other)
