"""classification/compare.py: its methods are trained as train.py trains them, within a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from classification_toys import ROOT, parse, program
from pskd_classification import compare

RECIPE = ROOT / "configs" / "classification" / "cifar100_published.yaml"

TOYS = (
    "--dataset classification_toys:build --model preact_resnet10_tiny --batch-size 8 --lr 0.02 "
    "--seed 3 --device cpu"
).split()
METHODS = {"cross_entropy": [], "label_smoothing": ["--label-smoothing", "0.1"], "pskd": ["--PSKD"]}


def told(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    assert compare.main([*TOYS, "--epochs", "5", "--output-dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_trained_as_by_the_train_script(method, compared, tmp_path):
    found = told(compared)
    assert (found["epochs"], found["epochs_done"], found["preset"]) == (5, 5, "paper")
    flags = ["--config", str(RECIPE), *TOYS, *METHODS[method]]
    flags += ["--epochs", "5", "--lr-steps", "2", "3", "--output-dir", str(tmp_path)]
    assert program.main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    history = found["methods"][method]["history"]
    for key in ("epoch", "lr", "train/loss"):
        assert [line[key] for line in lines] == [entry[key] for entry in history], key
    errors = [100 * line["test/top1_error"] for line in lines]
    assert [entry["top1_error"] for entry in history] == pytest.approx(errors)
    rows, other = (np.load(folder / "confidence.npz") for folder in (compared / method, tmp_path))
    assert np.array_equal(rows["nll"], other["nll"])
    assert found["methods"][method]["options"]["lr_steps"] == [2, 3]


def test_a_table_of_each_epoch(compared, capsys):
    assert compare.main([*TOYS, "--epochs", "4", "--output-dir", str(compared)]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"| epoch {epoch} of 4 |") for epoch in range(1, 5)] == [1, 1, 1, 1]
    last = told(compared)["methods"]["pskd"]["history"][-1]
    assert f"| pskd | {last['top1_error']:.2f} | {last['top5_error']:.2f} |" in out
    assert last["pskd/alpha"] == 0.8


def test_what_does_not_fit_is_cut_off_and_what_there_is_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compare, "longest", lambda *_args: 50)
    assert compare.main([*TOYS, "--seconds", "0.001", "--output-dir", str(tmp_path)]) == 0
    found = told(tmp_path)
    assert (found["epochs"], found["epochs_done"]) == (50, 1)
    assert all(len(each["history"]) == 1 for each in found["methods"].values())
    assert "stopped after epoch 1 of 50: out of time" in caplog.text


def test_the_schedule_is_the_longest_that_fits(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "time", clock := Clock())
    runs = {name: Timed(clock, seconds) for name, seconds in (("a", 1.0), ("b", 2.5))}
    # 7 of the timing, and with the reserve 3.5 / 0.9 an epoch.
    assert compare.longest(runs, tmp_path, 300, 7 + 10.9 * 3.5 / 0.9) == 10
    assert compare.longest(runs, tmp_path, 8, 7 + 10.9 * 3.5 / 0.9) == 8
    with pytest.raises(ValueError, match="--seconds: expected 23 s after .* 4 epochs .* got 22 s"):
        compare.longest(runs, tmp_path, 300, 22.0)


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed:
    """A method whose epochs take a given time."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def begin(self, _epochs: int) -> None:
        self.history = []

    def train_epoch(self, _folder: Path) -> None:
        self.clock.now += self.seconds
        self.history.append({"seconds_with_test": self.seconds})


def test_its_recipe_is_the_published_one():
    own = vars(compare.options(["--device", "cpu"]))
    published = vars(parse("--config", str(RECIPE), "--device", "cpu"))
    differing = {name for name in published if own[name] != published[name]}
    assert differing == {"config", "lr_steps", "output_dir"}  # the steps are those of its epochs


def test_on_a_gpu_it_is_bfloat16_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = compare.options([])
    assert (args.amp, args.channels_last, args.seconds) == ("bf16", True, 540.0)
    assert compare.options(["--amp", "fp16"]).amp == "fp16"
    assert compare.options(["--no-amp"]).amp is compare.options(["--device", "cpu"]).amp is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epochs 3", "--epochs: expected 4 or more, got 3"),
        ("--resume", "expected a comparison from its beginning, got --resume or --test-only"),
        ("--seconds 0.01", "for 4 epochs of each method, got"),
        ("--model resnet19", "--model: expected one of"),
    ],
)
def test_what_cannot_be_compared_is_refused(flags, message, tmp_path, capsys):
    assert compare.main([*TOYS, "--output-dir", str(tmp_path), *flags.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "compare.json").exists()
