"""Training with the fairseq plugin: the schedule, the teacher, the logs and the options."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq_toys import (  # noqa: E402
    ALPHA_FINAL,
    BATCHES,
    EPOCHS,
    LENGTHS,
    PLUGIN,
    SIZES,
    entry,
    same,
)
from pskd_fairseq.criterion import PSKDCriterion  # noqa: E402
from pskd_fairseq.epoch import Schedule  # noqa: E402

STATISTICS = ("alpha", "teacher_nll_loss", "teacher_agreement", "gradient_rescaling")


@pytest.fixture(scope="module")
def variants(fairseq, straight):
    """Trainings that differ from the straight one in an option each."""
    epochs = ["--max-epoch", "3"]
    # Without dropout, and with one update an epoch, the student is the teacher when it is trained.
    whole = ["--dropout", "0", *epochs]
    lstm = (
        "--arch lstm --encoder-embed-dim 32 --encoder-hidden-size 32 --decoder-embed-dim 32 "
        "--decoder-hidden-size 32 --decoder-out-embed-dim 32"
    ).split()
    return {
        "alpha_0": fairseq.start("alpha_0", "--max-epoch", str(EPOCHS), "--pskd-alpha-final", "0"),
        "hydra": fairseq.submit(hydra_train, fairseq, "hydra"),
        "bf16": fairseq.submit(hydra_train_in_bf16, fairseq),
        "one_update": fairseq.start("one_update", *whole, "--batch-size", "24"),
        "two_halves": fairseq.start(
            "two_halves", *whole, "--batch-size", "12", "--update-freq", "2"
        ),
        "updates": fairseq.start("updates", "--max-update", "15"),
        "amp": fairseq.start("amp", *epochs, "--amp"),
        "options": fairseq.start(
            "options", *epochs, "--sentence-avg", "--ignore-prefix-size", "1", "--report-accuracy"
        ),
        "lstm": fairseq.start("lstm", *epochs, *lstm),
    }


def hydra_train_in_bf16(fairseq):
    """Train in bfloat16, which the command line of fairseq takes for a TPU; Hydra does not."""
    return hydra_train(
        fairseq,
        "bf16",
        common={"bf16": True, "memory_efficient_bf16": True},
        checkpoint={"save_interval_updates": 4},
    )


def hydra_train(fairseq, name: str, **changes):
    """Do the straight run with `fairseq-hydra-train` and a YAML file, changed by section."""
    side = {"layers": 1, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}
    config = {
        "common": {
            "user_dir": str(PLUGIN), "cpu": True, "seed": 3, "log_format": "json",
            "no_progress_bar": True, "log_interval": 1,
        },
        "task": {"_name": "translation", "data": str(fairseq.data)},
        "criterion": {"_name": "pskd", "label_smoothing": 0.1, "pskd_alpha_final": ALPHA_FINAL},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "dataset": {"batch_size": 4, "required_batch_size_multiple": 1, "num_workers": 0},
        "optimization": {"max_epoch": EPOCHS, "lr": [5e-3]},
        "checkpoint": {"save_dir": str(fairseq.folder / name)},
        "model": {
            "_name": "transformer", "dropout": 0.3, "share_decoder_input_output_embed": True,
            "encoder": side, "decoder": side,
        },
    }  # fmt: skip
    for section, values in changes.items():
        config[section] |= values
    folder = fairseq.folder / f"{name}_config"
    folder.mkdir()
    text = "# @package _group_\n" + json.dumps(config)  # a JSON object is YAML
    (folder / "tiny.yaml").write_text(text, encoding="utf-8")
    output = f"hydra.run.dir={fairseq.folder / f'{name}_output'}"
    return fairseq.forked(
        "hydra_train", "--config-dir", str(folder), "--config-name", "tiny", output, name=name
    )


# --- alpha 0, and what PS-KD adds to a checkpoint ---------------------------------------------


def test_alpha_0_trains_bit_for_bit_like_label_smoothed_cross_entropy(variants, stock):
    run = variants["alpha_0"].result().expect_success()
    assert same(run.model(), stock.model())
    assert run.column("loss") == stock.column("loss")
    assert run.column("alpha") == [0.0] * EPOCHS


def test_alpha_changes_what_is_learned_once_there_is_a_teacher(straight, stock):
    assert same(straight.model("checkpoint1.pt"), stock.model("checkpoint1.pt"))
    assert not same(straight.model("checkpoint2.pt"), stock.model("checkpoint2.pt"))


def test_a_checkpoint_holds_the_stock_model_and_optimizer_and_no_criterion(straight, stock):
    for name in ("checkpoint_3_16.pt", "checkpoint4.pt"):
        ours, theirs = straight.checkpoint(name), stock.checkpoint(name)
        assert ours.keys() == theirs.keys()
        assert ours["criterion"] is None
        assert {key: value.shape for key, value in ours["model"].items()} == {
            key: value.shape for key, value in theirs["model"].items()
        }
        ours, theirs = ours["last_optimizer_state"], theirs["last_optimizer_state"]
        assert ours["state"].keys() == theirs["state"].keys()
        assert ours["param_groups"] == theirs["param_groups"]


def test_a_checkpoint_of_an_epochs_end_or_the_first_epoch_holds_no_teacher(straight):
    assert straight.teacher("checkpoint_1_4.pt") is None
    for epoch in range(1, EPOCHS + 1):
        kept = entry(straight.checkpoint(f"checkpoint{epoch}.pt"))
        assert kept["epoch"] == epoch
        assert kept["teacher"] == {"model": None}


@pytest.mark.parametrize("epoch, update", [(2, 8), (3, 16), (4, 20)])
def test_inside_an_epoch_the_teacher_is_the_model_that_ended_the_last(straight, epoch, update):
    teacher = straight.teacher(f"checkpoint_{epoch}_{update}.pt")
    assert same(teacher, straight.model(f"checkpoint{epoch - 1}.pt"))
    assert not same(teacher, straight.model(f"checkpoint_{epoch}_{update}.pt"))


# --- logs -------------------------------------------------------------------------------------


def test_alpha_follows_the_epochs_and_is_0_before_there_is_a_teacher(straight):
    expected = [0.0] + [ALPHA_FINAL * epoch / EPOCHS for epoch in range(2, EPOCHS + 1)]
    assert straight.column("alpha") == pytest.approx(expected, abs=1e-4)


def test_statistics_are_logged_in_training_from_the_second_epoch(straight):
    first, *later = straight.log("train")
    assert "train_alpha" in first and "train_teacher_nll_loss" not in first
    for line in later:
        assert {f"train_{name}" for name in STATISTICS} <= line.keys()
        assert 0.0 <= float(line["train_teacher_agreement"]) <= 1.0
        assert float(line["train_gradient_rescaling"]) < 1.0
    assert len(straight.log("train_inner")) == EPOCHS * BATCHES


def test_statistics_are_absent_from_validation(straight):
    lines = straight.log("valid")
    assert len(lines) == EPOCHS + 4  # at every epoch's end and every checkpoint inside one
    for line in lines:
        assert not {f"valid_{name}" for name in STATISTICS} & line.keys()


def test_statistics_are_in_tensorboard(fairseq, straight):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = {}
    for part in ("train", "train_inner", "valid"):
        board[part] = EventAccumulator(str(fairseq.folder / "board" / part))
        board[part].Reload()
    assert set(STATISTICS) <= set(board["train"].Tags()["scalars"])
    assert set(STATISTICS) <= set(board["train_inner"].Tags()["scalars"])
    assert "loss" in board["valid"].Tags()["scalars"]
    assert not set(STATISTICS) & set(board["valid"].Tags()["scalars"])
    values = [event.value for event in board["train"].Scalars("alpha")]
    assert values == pytest.approx(straight.column("alpha"))


def test_a_student_that_is_its_teacher_logs_its_own_hard_nll(variants):
    """One update an epoch, no dropout: the teacher is the student that is trained."""
    run = variants["one_update"].result().expect_success()
    for line in run.log("train")[1:]:
        assert line["train_nll_loss"] == line["train_teacher_nll_loss"]
        assert float(line["train_teacher_agreement"]) == 1.0
        rescaling = 1.0 - float(line["train_alpha"])
        for name in ("train_gradient_rescaling", "train_gradient_rescaling_hard"):
            assert float(line[name]) == pytest.approx(rescaling, abs=1.5e-4)


def test_what_a_step_adds_to_the_log():
    """Rows 0 and 8 are those of which the largest score is looked for."""
    from pskd_fairseq.past import Past
    from pskd_fairseq.step_statistics import COMPARED, step_statistics

    from pskd import TopK
    from pskd.loss import PSKDStats

    target = torch.zeros(16, dtype=torch.int64)
    prefers = torch.zeros(16, dtype=torch.int64)
    prefers[8] = 2  # the teacher had it wrong
    is_token = torch.arange(16) < 12
    taught = is_token & (torch.arange(16) != 1)
    student, teacher = torch.full((16,), 0.75), torch.full((16,), 0.5)
    student[8], teacher[8] = 0.6, 0.2
    stats = PSKDStats(nll=-student.log(), teacher_probs_at_label=teacher)
    said = TopK(prefers[:, None], torch.full((16, 1), 0.5))
    sums = step_statistics(
        Past(None, said, taught, 0.5), stats, target, is_token,
        target[COMPARED], prefers[COMPARED], alpha=0.5,
    )  # fmt: skip
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        dict(
            pskd_tokens=12, pskd_alpha=6, pskd_taught=11, pskd_top_k_mass=5.5,
            pskd_teacher_nll=10 * math.log(2) + math.log(5), pskd_compared=2, pskd_agree=1,
            pskd_error=10 * 0.25 + 0.4, pskd_removed=0.5 * (10 * 0.5 + 0.8),
            pskd_hard_error=0.4, pskd_hard_removed=0.4,
        )
    )  # fmt: skip


def logged_of(**sums: float) -> dict[str, float]:
    """Return what fairseq logs of a step of 4 tokens with alpha 0.5."""
    log = dict(
        loss=2.0, nll_loss=0.0, ntokens=4, sample_size=4, pskd_tokens=4.0, pskd_alpha=2.0,
        pskd_taught=4.0, pskd_teacher_nll=0.1, pskd_compared=1.0, pskd_agree=1.0,
        pskd_error=0.2, pskd_removed=0.1, pskd_top_k_mass=0.0,
        pskd_hard_error=0.0, pskd_hard_removed=0.0,
    ) | sums  # fmt: skip
    with metrics.aggregate(new_root=True) as logged:
        PSKDCriterion.reduce_metrics([log])
    return logged.get_smoothed_values()


def test_a_student_without_any_error_has_no_gradient_that_is_rescaled():
    assert logged_of()["gradient_rescaling"] == 0.5
    values = logged_of(pskd_error=0.0, pskd_removed=0.0)
    assert values["alpha"] == 0.5
    assert "gradient_rescaling" not in values


def test_of_tokens_without_a_past_nothing_but_alpha_and_coverage_is_logged():
    names = ("taught", "teacher_nll", "compared", "agree", "error", "removed")
    values = logged_of(**{f"pskd_{name}": 0.0 for name in names})
    assert (values["alpha"], values["teacher_coverage"]) == (0.5, 0.0)
    assert not {"teacher_nll_loss", "teacher_agreement", "gradient_rescaling"} & values.keys()


# --- front ends and options -------------------------------------------------------------------


def test_hydra_trains_bit_for_bit_like_the_command_line(variants, straight):
    run = variants["hydra"].result().expect_success()
    assert same(run.model(), straight.model())
    assert run.column("alpha") == straight.column("alpha")


def test_in_bf16_the_teacher_is_the_model_of_the_epoch_before(variants):
    run = variants["bf16"].result().expect_success()
    assert run.column("alpha") == pytest.approx([0.0, 0.35, 0.525, 0.7], abs=1e-4)
    assert all(math.isfinite(loss) for loss in run.column("loss"))
    for inside, end in (
        ("checkpoint_2_8.pt", "checkpoint1.pt"),
        ("checkpoint_3_16.pt", "checkpoint2.pt"),
    ):
        teacher = run.teacher(inside)
        assert "torch.bfloat16" in {str(weight.dtype) for weight in teacher.values()}
        # fairseq raises the model of a checkpoint to float32, which changes no value.
        raised = {name: weight.float() for name, weight in teacher.items()}
        assert same(raised, run.model(end))
        assert not same(raised, run.model(inside))


def test_update_freq_2_equals_one_batch_of_double_size(variants):
    whole, halves = (
        variants[name].result().expect_success() for name in ("one_update", "two_halves")
    )
    for name in ("loss", "nll_loss", *STATISTICS[:2]):
        values = [run.column(name) for run in (whole, halves)]
        assert values[0] == pytest.approx(values[1], abs=1.5e-3), name
    for key, weight in whole.model().items():
        torch.testing.assert_close(halves.model()[key], weight, atol=1e-4, rtol=1e-3)


def test_with_max_update_alone_alpha_grows_by_update(variants):
    run = variants["updates"].result().expect_success()
    steps = {int(line["num_updates"]): float(line["alpha"]) for line in run.log("train_inner")}
    expected = {step: ALPHA_FINAL * step / 15 if step > BATCHES else 0.0 for step in range(1, 16)}
    assert steps == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["amp", "lstm"])
def test_mixed_precision_and_other_models_train_with_their_teacher(variants, name):
    run = variants[name].result().expect_success()
    assert run.column("alpha") == pytest.approx([0.0, ALPHA_FINAL * 2 / 3, ALPHA_FINAL], abs=1e-4)
    assert len(run.column("teacher_nll_loss")) == 2
    losses = run.column("loss")
    assert losses[2] < losses[0] and all(map(math.isfinite, run.column("loss", "valid")))


def test_sentence_avg_prefix_and_accuracy_train_together(variants):
    run = variants["options"].result().expect_success()
    line = run.log("train")[2]
    targets = [length + 1 for length in LENGTHS["train"]]  # with the end of sentence
    # Accuracy counts what the loss counts, that is all tokens but each sentence's first.
    counted = sum(targets) - len(targets)
    assert float(line["train_total"]) * BATCHES == pytest.approx(counted, abs=0.1)
    assert 0.0 < float(line["train_accuracy"]) <= 100.0
    assert float(line["train_loss"]) > 3 * float(line["train_nll_loss"])  # a sentence, not a token
    assert float(line["train_alpha"]) == pytest.approx(ALPHA_FINAL, abs=1e-4)


@pytest.mark.parametrize("name", ["linear", "constant", "cosine"])
def test_alpha_stays_final_past_the_end(name):
    schedule = Schedule.build(name, 0.7, 10, 0)
    alphas = [schedule.at(epoch) for epoch in (10, 11)]
    assert alphas == pytest.approx([0.7, 0.7])
    assert schedule.unit == "epoch"


def test_epochs_come_before_updates_as_the_unit_of_progress():
    assert Schedule.build("linear", 0.7, 10, 500).unit == "epoch"
    by_update = Schedule.build("linear", 0.7, 0, 500)
    assert (by_update.unit, by_update.num_epochs) == ("update", 500)
    assert by_update.at(3, 250) == pytest.approx(0.35)


# --- a task that trains the parts of its model in turns -----------------------------------------

MULTILINGUAL = (
    "--task multilingual_translation --arch multilingual_transformer --lang-pairs de-en,en-de "
    "--ddp-backend legacy_ddp"
).split()


def test_each_part_learns_from_its_own_teacher(fairseq):
    still = ["--lr", "0", "--dropout", "0"]  # what does not move is its own teacher
    run = fairseq.train(
        "multilingual", *MULTILINGUAL, *SIZES, *still, "--max-epoch", "3"
    ).expect_success()
    assert run.column("alpha") == pytest.approx([0.0, 0.467, 0.7], abs=1e-3)
    assert run.column("teacher_nll_loss") == run.column("nll_loss")[1:]
    assert run.column("teacher_agreement") == [1.0, 1.0]
