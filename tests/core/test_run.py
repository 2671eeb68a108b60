"""What a train script does around its work: options, exit status, checkpoint, log, seeds."""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys

import numpy as np
import pytest
import torch

from pskd.distributed import World
from pskd_tools import checkpoint
from pskd_tools.job import KEYS, find_saved
from pskd_tools.log import MetricsLog
from pskd_tools.options import in_range
from pskd_tools.program import exit_status, run_program
from pskd_tools.training import seed_epoch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs 0", "--epochs: expected 1 or more, got 0"),
        ("--epochs 2.5", "--epochs: invalid int value: '2.5'"),
        ("--rate 1.5", "--rate: expected 0 to 1, got 1.5"),
        ("--rate nan", "--rate: expected 0 to 1, got nan"),
        ("--lr inf", "--lr: expected 0 or more, got inf"),
        ("--epochs 3 --rate 1 --lr 0", ""),
    ],
)
def test_an_option_out_of_range_is_named(words, message, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=in_range(int, 1))
    parser.add_argument("--rate", type=in_range(float, 0.0, 1.0))
    parser.add_argument("--lr", type=in_range(float, 0.0))
    if not message:
        assert vars(parser.parse_args(words.split())) == {"epochs": 3, "rate": 1.0, "lr": 0.0}
        return
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(words.split())
    assert f"argument {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("Traceback of a worker\nValueError: the last line"), "ValueError: the last li"),
        (OSError(28, "no room"), "[Errno 28] no room"),
        (FloatingPointError(), "FloatingPointError()"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, shown, capsys):
    def fails():
        raise error

    assert exit_status("train", fails) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"train: {shown}") and told.count("\n") == 1


def test_an_error_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_status("train", lambda: 1 / 0)


def test_a_program_runs_in_one_process_without_torchrun():
    seen = []
    args = argparse.Namespace(device="cpu")
    assert run_program("train", lambda: args, lambda *given: seen.append(given)) == 0
    assert seen == [(args, World(0, 1, torch.device("cpu")))]


# -- Checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a checkpoint of this program, got EOFError"),
        ([1], r"expected a checkpoint with \['epoch', 'model'\], got list"),
        ({"model": {}}, r"expected a checkpoint with \['epoch', 'model'\], got \['model'\]"),
    ],
)
def test_what_is_no_checkpoint_is_named(content, message, tmp_path):
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"x.pth: {message}"):
        checkpoint.read_checkpoint(path, {"model", "epoch"})


def test_another_runs_checkpoint_is_written_over_where_that_is_asked_for(tmp_path):
    torch.save(dict.fromkeys(KEYS, 1), tmp_path / "checkpoint.pth")
    asked = dict.fromkeys(("resume", "overwrite", "test_only"), False)
    asked |= {"output_dir": str(tmp_path)}
    assert find_saved(argparse.Namespace(**asked | {"resume": True}), ()) == dict.fromkeys(KEYS, 1)
    for flag in ("overwrite", "test_only"):
        assert find_saved(argparse.Namespace(**asked | {flag: True}), ()) is None
    with pytest.raises(ValueError, match="--output-dir: expected a folder without a training"):
        find_saved(argparse.Namespace(**asked), ())


def test_what_does_not_fit_a_checkpoint_is_named(tmp_path):
    path, net = tmp_path / "x.pth", torch.nn.Linear(2, 3)
    checkpoint.load_weights(path, net, torch.nn.Linear(2, 3).state_dict())
    with pytest.raises(ValueError, match="x.pth: expected the weights of this model: size mism"):
        checkpoint.load_weights(path, net, torch.nn.Linear(2, 4).state_dict())
    checkpoint.check_classes(path, ["a", "b"], ("a", "b"))
    with pytest.raises(ValueError, match="x.pth: expected the classes b, a, got a, b"):
        checkpoint.check_classes(path, ["a", "b"], ["b", "a"])


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), ValueError("x")])
def test_what_cannot_be_loaded_names_the_file(error, tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(ValueError, match="x.pth: .*x"), checkpoint.naming(path):
        raise error
    with pytest.raises(ValueError, match=f"^{path}: x$"), checkpoint.naming(path):
        raise ValueError(f"{path}: x")


def test_a_change_that_is_allowed_is_told(tmp_path, caplog):
    checkpoint.tell_changes(tmp_path, {"lr": 1, "seed": 2, "gone": 3}, {"lr": 5, "seed": 2})
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: trained with lr 1, goes on with 5"
    ]


def test_an_optimizer_goes_on_with_its_own_rate():
    def optimizer(lr):
        weight = torch.nn.Parameter(torch.ones(2))
        made = torch.optim.SGD([weight], lr=lr, momentum=0.9)
        weight.sum().backward()
        return made

    (trained := optimizer(0.1)).step()
    checkpoint.load_optimizer(other := optimizer(0.3), trained.state_dict())
    (group,) = other.param_groups
    assert group["lr"] == 0.3
    assert torch.equal(other.state[group["params"][0]]["momentum_buffer"], torch.ones(2))


# -- Log and seeds ---------------------------------------------------------------------------------


def test_a_log_without_a_folder_writes_nothing(caplog):
    log = MetricsLog(None)
    with caplog.at_level(logging.INFO):
        log.write({"epoch": 1, "iteration": 1, "loss": 1.0})
    log.close()
    assert not caplog.records


def test_a_log_without_tensorboard_is_metrics_json_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO):
        log = MetricsLog(tmp_path)
        log.write({"epoch": 1, "iteration": 4, "loss": float("inf"), "lr": 0.125})
        log.close()
    assert "TensorBoard is not installed" in caplog.text
    assert caplog.records[-1].getMessage() == "epoch 1  iteration 4  lr 0.125"
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"epoch": 1, "iteration": 4, "loss": None, "lr": 0.125}


def test_a_resumed_log_drops_what_it_will_write_again(tmp_path):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path)
    for epoch in (1, 2):
        log.write({"epoch": epoch, "iteration": 5 * epoch, "loss": float("nan"), "lr": None})
    log.close()
    path = tmp_path / "metrics.json"
    with path.open("a") as file:
        file.write('[1]\n{"epoch": 2, "itera')  # none of ours, and as a kill leaves it
    MetricsLog(tmp_path, epoch=1).close()
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {"epoch": 1, "iteration": 5, "loss": None, "lr": None}
    MetricsLog(tmp_path).close()
    assert path.read_text() == ""
    assert {p.name.split(".")[0] for p in tmp_path.iterdir()} == {"metrics", "events"}


def test_a_seed_sets_every_random_state():
    def draws(*key):
        seed_epoch(*key)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draws(1, 2, 3)
    assert first == draws(1, 2, 3)
    for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not set(draws(*key)) & set(first)
