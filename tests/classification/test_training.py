"""classification/train.py from the command line on: training, resume, processes, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from classification_toys import (
    SCRIPT,
    checkpoint,
    parse,
    results,
    same,
    train,
)
from processes import in_two_processes
from pskd_classification.options import check
from pskd_classification.training import Trainer

import pskd
from pskd_tools.training import amp_dtype

PRELOADED = ["pskd_classification.train"]
PSKD = ["--pskd-alpha-final", "0.8"]
ALL = (
    "--label-smoothing 0.1 --cutmix-alpha 1 --mixup-alpha 0.2 --mix-prob 0.4 --dropout 0.2 "
    "--weight-decay 0.01"
).split()


def lines(folder: Path) -> list[dict]:
    text = (folder / "metrics.json").read_text()
    return [json.loads(line) for line in text.splitlines()]


def stopped(folder: Path, *flags: str, after: int) -> None:
    """Run until an epoch's end, and stop in the next."""
    original = Trainer.train_epoch

    def train_epoch(trainer, epoch):
        if epoch > after:
            raise KeyboardInterrupt
        return original(trainer, epoch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_epoch", train_epoch)
        train(folder, *flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with PS-KD, nothing else."""
    folder = tmp_path_factory.mktemp("runs") / "pskd"
    assert train(folder, *PSKD) == 0
    return folder


def test_a_run_leaves_its_figures_and_what_the_report_reads(run):
    told = results(run)
    assert told["task"] == "classification" and told["last"]["count"] == 21
    assert told["last"]["epoch"] == 4 and 1 <= told["best"]["epoch"] <= 4
    assert set(told["scaled"]) == set(told["last"]) - {"epoch"} and told["temperature"] > 0
    rows = np.load(run / "confidence.npz")
    assert 1 - rows["correct"].mean() == pytest.approx(told["last"]["top1_error"])
    assert rows["nll"].mean() == pytest.approx(told["last"]["nll"])
    assert rows["scaled_nll"].mean() == pytest.approx(told["scaled"]["nll"])
    assert (rows["correct"] == (rows["label"] == rows["predicted"])).all()
    assert len(set(rows["ids"].tolist())) == 21 and len(rows["class_names"]) > 1
    pictures = json.loads((run / "test_pictures.json").read_text())
    assert pictures.keys() == set(rows["ids"][~rows["correct"]].tolist())
    assert all(uri.startswith("data:image/png;base64,") for uri in pictures.values())
    epochs = lines(run)
    assert [line["pskd/alpha"] for line in epochs] == pytest.approx([0.0, 0.4, 0.6, 0.8])
    assert all({"train/loss", "val/nll", "lr", "seconds"} <= set(line) for line in epochs)
    with (run / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["val/nll"]) for row in table] == [line["val/nll"] for line in epochs]
    assert list(run.glob("events.out.tfevents.*"))
    assert not list(run.glob("*.part*"))


def test_what_happened_to_each_example_is_kept(run):
    examples = np.load(run / "examples.npz")
    assert len(set(examples["ids"].tolist())) == len(examples["label"]) == 33
    assert ((examples["difficulty"] > 0) & (examples["difficulty"] < 1)).all()
    assert (examples["rescaling"] <= 1).all()
    told = json.loads((run / "reweighted.json").read_text())
    factors = [entry["rescaling"] for entry in told["most"]]
    assert factors == sorted(factors) and factors[0] == pytest.approx(examples["rescaling"].min())
    assert told["least"][0]["rescaling"] == pytest.approx(examples["rescaling"].max())
    assert told["most"][0]["image"].startswith("data:image/png;base64,")


def test_without_the_flags_it_is_cross_entropy(run, tmp_path):
    assert train(tmp_path / "ce") == 0
    losses = [[line["train/loss"] for line in lines(folder)] for folder in (run, tmp_path / "ce")]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    content = checkpoint(tmp_path / "ce")
    assert content["criterion"]["memory"] is None
    assert not any(key.startswith("pskd") for line in lines(tmp_path / "ce") for key in line)
    assert not (tmp_path / "ce" / "reweighted.json").exists()
    assert np.isnan(np.load(tmp_path / "ce" / "examples.npz")["rescaling"]).all()
    # Neither teacher changes anything at alpha 0.
    assert train(tmp_path / "zero", "--pskd-teacher", "snapshot") == 0
    assert same(content["model"], checkpoint(tmp_path / "zero")["model"])


def test_the_teacher_is_the_one_that_was_asked_for(run, tmp_path, capsys):
    made = {"memory": checkpoint(run)}
    for teacher in ("snapshot", "ema"):
        assert train(tmp_path / teacher, *PSKD, "--pskd-teacher", teacher) == 0
        made[teacher] = checkpoint(tmp_path / teacher)
    kept = [content["criterion"]["options"] for content in made.values()]
    assert [options.get("teacher") for options in kept] == [None, "snapshot", "ema"]
    assert not any(same(made["ema"]["model"], made[name]["model"]) for name in list(made)[:2])
    flags = ["--pskd-teacher", "snapshot", "--resume"]
    assert train(tmp_path / "ema", *PSKD, *flags) == 1
    assert "teacher: expected 'ema', with which the checkpoint" in capsys.readouterr().err


def test_a_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path, caplog):
    caplog.set_level("INFO")
    assert train(tmp_path, "--epochs", "1", "--resume") == 0
    assert f"--resume: no {tmp_path / 'checkpoint.pth'}, so from the start" in caplog.text
    assert [line["epoch"] for line in lines(tmp_path)] == [1]


@pytest.mark.parametrize(
    "flags",
    [
        [*PSKD, *ALL, "--pskd-top-k", "2", "--pskd-momentum", "0.5"],
        [*PSKD, *ALL, "--pskd-teacher", "snapshot", "--lr-schedule", "cosine"],
        [*PSKD, *ALL, "--pskd-teacher", "ema"],
        # Of 8 pixels the last map is one pixel wide, where torch's bfloat16 convolution on a CPU
        # leaves the gradients of unused taps undefined.
        [*PSKD, "--amp", "--image-size", "16", "--channels-last"],
        [*PSKD, "--no-data-on-device", "--workers", "1", "--pskd-alpha-schedule", "constant"],
        ["--tf-kd-alpha", "0.3", *ALL, "--opt", "adamw", "--lr", "0.001"],
    ],
)
def test_a_resumed_run_equals_the_straight_one(flags, tmp_path):
    assert train(tmp_path / "straight", *flags) == 0
    stopped(tmp_path / "resumed", *flags, after=2)
    # Something else draws random numbers in between.
    torch.rand(3)
    np.random.rand(3)
    assert train(tmp_path / "resumed", *flags, "--resume") == 0
    one, other = (checkpoint(tmp_path / name) for name in ("straight", "resumed"))
    assert one["epoch"] == other["epoch"] == 4
    for key in ("model", "optimizer", "scheduler", "criterion", "best"):
        assert same(one[key], other[key]), key
    told = [results(tmp_path / name) for name in ("straight", "resumed")]
    assert told[0]["last"] == told[1]["last"] and told[0]["best"] == told[1]["best"]
    timeless = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / name)]
        for name in ("straight", "resumed")
    ]
    assert timeless[0] == timeless[1]
    if "--tf-kd-alpha" not in flags:
        assert told[0]["options"]["cutmix_alpha"] == (1.0 if "--cutmix-alpha" in flags else 0.0)


def test_the_scale_of_mixed_precision_goes_on(tmp_path, monkeypatch):
    """On a GPU float16 needs one, which grows with every second step here."""

    def scaler(device: str, enabled: bool) -> torch.amp.GradScaler:
        return torch.amp.grad_scaler.GradScaler(device, 2.0, growth_interval=2)

    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    assert train(tmp_path / "straight", "--epochs", "2") == 0
    stopped(tmp_path / "resumed", "--epochs", "2", after=1)
    assert train(tmp_path / "resumed", "--epochs", "2", "--resume") == 0
    one, other = (checkpoint(tmp_path / name)["scaler"] for name in ("straight", "resumed"))
    assert one == other and one["scale"] > 2.0


def test_wrong_labels_are_recorded_and_another_draw_is_not_resumed(tmp_path, capsys):
    noise = ["--label-noise", "0.25", "--train-per-class", "8", "--epochs", "2"]
    stopped(tmp_path, *noise, after=1)
    for other, (name, trained, given) in (
        (["--label-noise", "0.5"], ("label_noise", "'0.25:symmetric'", "'0.5:symmetric'")),
        (["--label-noise", "0.25:next"], ("label_noise", "'0.25:symmetric'", "'0.25:next'")),
        (["--label-noise", "0"], ("label_noise", "'0.25:symmetric'", "None")),
        (["--label-noise-seed", "1"], ("label_noise_seed", "0", "1")),
        (["--train-per-class", "7"], ("train_per_class", "8", "7")),
        (["--num-classes", "2"], ("num_classes", "None", "2")),
        (["--mean", ".1", ".2", ".3"], ("mean", "[0.485, 0.456, 0.406]", "[0.1, 0.2, 0.3]")),
        (["--std", ".1", ".2", ".3"], ("std", "[0.229, 0.224, 0.225]", "[0.1, 0.2, 0.3]")),
    ):
        assert train(tmp_path, *noise, *other, "--resume") == 1
        told = f"{name}: expected {trained}, with which the checkpoint was trained, got {given}"
        assert f"checkpoint.pth: {told}" in capsys.readouterr().err
    assert train(tmp_path, *noise, "--resume") == 0
    options = results(tmp_path)["options"]
    assert options == checkpoint(tmp_path)["options"]
    assert (options["label_noise"], options["label_noise_seed"]) == ("0.25:symmetric", 0)
    assert (options["samples"], options["noisy_samples"], options["noisy_share"]) == (24, 6, 0.25)
    examples = np.load(tmp_path / "examples.npz")
    assert examples["noisy"].sum() == 6
    right = np.array([int(name) % 3 for name in examples["ids"]])  # of the toys
    assert np.array_equal(examples["label"] != right, examples["noisy"])


def test_a_checkpoint_of_before_these_options_is_resumed(tmp_path):
    stopped(tmp_path, *PSKD, "--epochs", "2", after=1)
    content = checkpoint(tmp_path)
    for name in (
        "num_classes",
        "train_per_class",
        "label_noise",
        "label_noise_seed",
        "mean",
        "std",
    ):
        del content["options"][name]
    torch.save(content, tmp_path / "checkpoint.pth")
    assert train(tmp_path, *PSKD, "--epochs", "2", "--resume") == 0


def test_the_best_checkpoint_is_the_best_of_validation_not_of_test(run):
    errors = [line["val/top1_error"] for line in lines(run)]
    best = torch.load(run / "best.pth", weights_only=True)
    assert best["epoch"] == 1 + errors.index(min(errors)) == checkpoint(run)["best"]["epoch"]


def test_epochs_are_evaluated_and_saved_as_often_as_asked(run, tmp_path):
    assert "best_by_test" not in results(run) and "test/nll" not in lines(run)[0]
    flags = [*PSKD, "--eval-every", "3", "--checkpoint-every", "2", "--eval-test-every-epoch"]
    stopped(tmp_path, *flags, after=3)
    assert checkpoint(tmp_path)["epoch"] == 2
    assert train(tmp_path, *flags, "--resume") == 0
    evaluated = [line for line in lines(tmp_path) if "val/nll" in line]
    assert [line["epoch"] for line in evaluated] == [3, 4]
    with (tmp_path / "metrics.csv").open() as file:
        assert [bool(row["val/nll"]) for row in csv.DictReader(file)] == [False, False, True, True]
    # Looking at the test set changes neither the training nor what is chosen.
    assert same(checkpoint(tmp_path)["model"], checkpoint(run)["model"])
    told, errors = results(tmp_path), [line["test/top1_error"] for line in evaluated]
    assert errors[-1] == told["last"]["top1_error"] and told["last"] == results(run)["last"]
    best = told["best_by_test"]
    place = errors.index(min(errors))
    assert (best["epoch"], best["nll"]) == (3 + place, evaluated[place]["test/nll"])
    rows = np.load(tmp_path / "best_by_test" / "confidence.npz")
    assert rows["nll"].mean() == pytest.approx(best["nll"]) and best["count"] == 21


def test_weights_that_saw_another_normalisation_are_told(run, tmp_path, caplog):
    flags = ["--test-only", "--weights", str(run / "best.pth"), "--std", "1", "1", "1"]
    assert train(tmp_path, *flags) == 0
    assert "trained with std [0.229, 0.224, 0.225], goes on with [1.0, 1.0, 1.0]" in caplog.text


def test_a_checkpoint_is_evaluated_and_a_finished_run_again(run, tmp_path):
    before = results(run)
    assert train(tmp_path, "--test-only", "--weights", str(run / "best.pth")) == 0
    assert results(tmp_path, "evaluation.json")["last"] == before["best"]
    assert not (tmp_path / "checkpoint.pth").exists()
    assert train(run, *PSKD, "--resume") == 0
    assert all(results(run)[key] == before[key] for key in ("last", "best", "seconds_per_epoch"))


def test_without_validation_there_is_no_best_and_no_temperature(tmp_path):
    assert train(tmp_path, "--val-fraction", "0", "--epochs", "1") == 0
    assert not {"best", "temperature", "scaled"} & set(results(tmp_path))
    assert not (tmp_path / "best.pth").exists()


def test_a_compiled_model_trains_as_the_plain_one_and_a_smaller_last_batch_without(tmp_path):
    sizes, compile_ = [], torch.compile

    def compiled(model, mode):
        assert mode == "reduce-overhead"
        # The eager backend traces as any other and needs no compiler.
        model = compile_(model, backend="eager")
        model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        return model

    flags = ["--epochs", "2", "--batch-size", "10", *PSKD, "--pskd-teacher", "snapshot"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        assert train(tmp_path / "compiled", *flags, "--compile-mode", "reduce-overhead") == 0
    assert sizes == [10] * 6  # of 33 in an epoch
    assert train(tmp_path / "plain", *flags) == 0
    one, other = (checkpoint(tmp_path / name)["model"] for name in ("compiled", "plain"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], atol=1e-4) for key in one)


def test_mixed_precision_by_name(tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert amp_dtype(True, cuda) is amp_dtype("fp16", cpu) is torch.float16
    assert amp_dtype(True, cpu) is amp_dtype("bf16", cuda) is torch.bfloat16
    assert amp_dtype(False, cuda) is None
    parsed = [parse(*flags).amp for flags in ([], ["--amp"], ["--amp", "bf16"])]
    assert parsed == [False, True, "bf16"]
    assert parse("--amp", "--no-amp").amp is False
    flags = ["--image-size", "16", "--epochs", "1", "--amp"]
    for name in ("bf16", "fp16"):
        assert train(tmp_path / name, *flags, name) == 0
        content = checkpoint(tmp_path / name)
        assert content["options"]["amp"] == name
        assert bool(content["scaler"]) == (name == "fp16")


def test_a_config_file_stands_on_its_base_and_below_the_command_line(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 7\nlr: 0.5\nlr_steps: [2, 3]\namp: true\n")
    (tmp_path / "delta.yaml").write_text("base: base.yaml\nlr: 0.25\namp: false\n")
    config = ["--config", str(tmp_path / "delta.yaml")]
    args = parse(*config, "--epochs", "9")
    assert (args.epochs, args.lr, args.lr_steps, args.amp) == (9, 0.25, [2, 3], False)
    assert parse("--PSKD").pskd_alpha_final == 0.8
    assert parse("--alpha_T", "0.3").pskd_alpha_final == 0.3


def test_every_recipe_is_one_that_the_script_takes():
    recipes = sorted((SCRIPT.parents[1] / "configs" / "classification").glob("*.yaml"))
    assert len(recipes) >= 4
    for recipe in recipes:
        args = parse("--config", str(recipe))
        check(args)
        assert ("pskd" in recipe.stem) == (args.pskd_alpha_final > 0)


def test_the_published_recipe_is_the_published_one():
    configs = SCRIPT.parents[1] / "configs" / "classification"
    args = parse("--config", str(configs / "cifar100_published_pskd.yaml"))
    check(args)
    assert (args.model, args.val_fraction) == ("preact_resnet18_published", 0)
    assert (args.mean, args.std) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    assert (args.epochs, args.batch_size, args.lr_steps) == (300, 128, [150, 225])
    assert (args.opt, args.lr, args.lr_gamma, args.momentum) == ("sgd", 0.1, 0.1, 0.9)
    assert (args.weight_decay, args.pskd_alpha_final, args.pskd_teacher) == (5e-4, 0.8, "memory")
    assert args.eval_test_every_epoch


# ---- processes ---------------------------------------------------------------------------------


def test_two_processes_share_the_memory_and_go_on_as_one(forkserver, tmp_path):
    in_two_processes(train, tmp_path, *PSKD, "--epochs", "3", "--batch-size", "5")
    content = checkpoint(tmp_path)
    memory = content["criterion"]["memory"]
    # Every sample is known, whichever process had it.
    for name in ("past", "present"):
        assert len(memory[name]) == 33 and (memory[name][:, -1] > 0).all()
    visits = content["criterion"]["examples"]["sums"][:, 0]
    assert visits.sum() > 33 and results(tmp_path)["last"]["count"] == 21
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3]
    # The state is whole: one process goes on with it.
    content["options"]["epochs"] = 4
    content["criterion"]["options"]["num_epochs"] = 4
    torch.save(content, tmp_path / "checkpoint.pth")
    steps = ["--lr-steps", "1", "2"]  # those of three epochs
    assert train(tmp_path, *PSKD, *steps, "--resume") == 0
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3, 4]


# ---- what ends a run -----------------------------------------------------------------------------


def test_a_training_is_written_over_where_that_is_asked_for(tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(b"of another training")
    assert train(tmp_path, "--epochs", "1") == 1
    assert train(tmp_path, "--epochs", "1", "--overwrite") == 0
    assert checkpoint(tmp_path)["epoch"] == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys):
    stopped(tmp_path, *PSKD, after=1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pskd.MemoryCriterion, "__call__", lambda *_args, **_kwargs: torch.tensor(
            float("nan"), requires_grad=True
        ))  # fmt: skip
        assert train(tmp_path, *PSKD, "--resume") == 1
    assert "epoch 2, iteration 1: expected a finite loss, got nan" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


# ---- a backbone for detection ------------------------------------------------------------------


def test_a_checkpoint_becomes_a_backbone_of_detectron2(tmp_path):
    pytest.importorskip("pycocotools", reason="needs pycocotools: pip install pycocotools")
    from pskd_torchvision.convert_backbone import convert_file

    assert train(tmp_path, *"--model resnet18 --epochs 1 --dropout 0.1".split(), *PSKD) == 0
    config = convert_file(tmp_path / "best.pth", tmp_path / "backbone.pth")
    assert config["MODEL.RESNETS.DEPTH"] == 18
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)["model"]
    best = torch.load(tmp_path / "best.pth", weights_only=True)["model"]
    assert torch.equal(weights["stem.conv1.weight"], best["conv1.weight"])
