"""Training with the fairseq plugin: the loss, the schedule, the teacher, the logs and the options.

Fairseq's own commands run as a user runs them; where one number must equal another to the last bit,
the criterion is built in this process by fairseq's own builder.
"""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from conftest import (  # noqa: E402
    ALPHA_FINAL,
    BATCHES,
    EPOCHS,
    LENGTHS,
    PLUGIN,
    Payload,
    build_criterion,
    entry,
    same,
)
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.criterions.label_smoothed_cross_entropy import (  # noqa: E402
    LabelSmoothedCrossEntropyCriterion,
    label_smoothed_nll_loss,
)
from fairseq.logging import metrics  # noqa: E402
from pskd_fairseq.criterion import PSKDCriterion  # noqa: E402
from pskd_fairseq.epoch import Schedule  # noqa: E402

STATISTICS = ("alpha", "teacher_nll", "teacher_agreement", "gradient_rescaling")


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
        "cosine": fairseq.start("cosine", *epochs, "--pskd-alpha-schedule", "cosine"),
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
        "adaptive": fairseq.start("adaptive", *epochs, "--adaptive-softmax-cutoff", "10,20"),
    }


@pytest.fixture(scope="module")
def validations(fairseq, straight):
    """fairseq-validate on the teacher of epoch 3: with the plugin, and with fairseq's criterion.

    What that training was resumed from is long gone, and nothing that evaluation needs.
    """
    teacher, stock = fairseq.folder / "teacher.pt", fairseq.folder / "relabelled.pt"
    state = straight.checkpoint("checkpoint2.pt")
    state["cfg"]["criterion"]["restore_file"] = "gone.pt"
    torch.save(state, teacher)
    state["cfg"]["criterion"] = {
        "_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1, "report_accuracy": False,
        "ignore_prefix_size": 0, "sentence_avg": False,
    }  # fmt: skip
    torch.save(state, stock)
    flags = (
        "--task translation --valid-subset train,valid --batch-size 4 "
        "--required-batch-size-multiple 1 --num-workers 0 --cpu --log-format json"
    ).split() + ["--user-dir", str(PLUGIN)]

    def validate(path):
        command = fairseq.command if path is teacher else fairseq.forked
        return command("validate", str(fairseq.data), "--path", str(path), *flags, name=path.stem)

    return {"pskd": fairseq.submit(validate, teacher), "stock": fairseq.submit(validate, stock)}


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
    return fairseq.command(
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


def test_a_checkpoint_of_an_epochs_end_holds_no_teacher(straight):
    for epoch in range(1, EPOCHS + 1):
        kept = entry(straight.checkpoint(f"checkpoint{epoch}.pt"))
        assert kept["epoch"] == epoch
        assert kept["teacher"] == {"model": None}


def test_a_checkpoint_inside_the_first_epoch_holds_no_teacher(straight):
    assert straight.teacher("checkpoint_1_4.pt") is None


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
    assert "train_alpha" in first and "train_teacher_nll" not in first
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


def test_the_logged_teacher_is_last_epochs_model_without_dropout(straight, validations):
    """fairseq-validate scores the training set with the model that ended epoch 2."""
    run = validations["pskd"].result().expect_success()
    (scored,) = run.log("train")
    third_epoch = straight.log("train")[2]
    assert third_epoch["train_teacher_nll"] == scored["train_nll_loss"]


def test_validation_is_that_of_label_smoothed_cross_entropy(straight, validations):
    ours, theirs = (validations[name].result().expect_success() for name in ("pskd", "stock"))
    assert ours.log("valid") == theirs.log("valid")
    in_training = [line for line in straight.log("valid") if line["epoch"] == 2][-1]
    assert in_training["valid_loss"] == ours.log("valid")[0]["valid_loss"]
    assert in_training["valid_nll_loss"] == ours.log("valid")[0]["valid_nll_loss"]


def test_a_student_that_is_its_teacher_logs_its_own_hard_nll(variants):
    """One update an epoch, no dropout: the teacher is the student that is trained."""
    run = variants["one_update"].result().expect_success()
    for line in run.log("train")[1:]:
        assert line["train_nll_loss"] == line["train_teacher_nll"]
        assert float(line["train_teacher_agreement"]) == 1.0
        rescaling = 1.0 - float(line["train_alpha"])
        for name in ("train_gradient_rescaling", "train_gradient_rescaling_hard"):
            assert float(line[name]) == pytest.approx(rescaling, abs=1.5e-4)


def test_what_a_step_adds_to_the_log():
    """Rows 0 and 8 are those of which the largest score is looked for."""
    from pskd_fairseq.criterion import _Past, _statistics

    from pskd import PSKDStats, TopK

    target, probs = torch.zeros(16, dtype=torch.int64), torch.full((16, 2), 0.25)
    indices = torch.tensor([[0, 1]]).repeat(16, 1)
    indices[8] = torch.tensor([2, 0])  # the teacher had it wrong
    is_token = torch.arange(16) < 12
    taught = is_token & (torch.arange(16) != 1)
    past = _Past(None, TopK(indices, probs), taught, 0.5 * taught)
    student, teacher = torch.full((16,), 0.75), torch.full((16,), 0.5)
    student[8], teacher[8] = 0.6, 0.2
    scores = torch.zeros(16, 3)
    scores[:, 0] = 1.0
    sums = _statistics(scores, target, past, is_token, PSKDStats(-student.log(), teacher), 0.5)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(
        dict(
            pskd_tokens=12, pskd_alpha=6, pskd_taught=11, pskd_top_k_mass=5.5,
            pskd_teacher_nll=10 * math.log(2) + math.log(5), pskd_compared=2, pskd_agree=1,
            pskd_student_error=10 * 0.25 + 0.4, pskd_teacher_error=0.5 * (10 * 0.5 + 0.8),
            pskd_hard_student_error=0.4, pskd_hard_teacher_error=0.4,
        )
    )  # fmt: skip


def test_a_student_without_any_error_is_logged():
    """Every token learned to the last bit: no error to weight the gradient rescaling with."""
    log = dict(
        loss=2.0, nll_loss=0.0, ntokens=4, sample_size=4, pskd_tokens=4.0, pskd_alpha=2.0,
        pskd_taught=4.0, pskd_teacher_nll=0.1, pskd_compared=1.0, pskd_agree=1.0,
        pskd_student_error=0.0, pskd_teacher_error=0.0, pskd_top_k_mass=0.0,
        pskd_hard_student_error=0.0, pskd_hard_teacher_error=0.0,
    )  # fmt: skip
    with metrics.aggregate(new_root=True) as logged:
        PSKDCriterion.reduce_metrics([log])
    values = logged.get_smoothed_values()
    assert values["alpha"] == 0.5
    assert math.isfinite(values.get("gradient_rescaling", 0.0))


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


def test_a_cosine_schedule_trains(variants):
    run = variants["cosine"].result().expect_success()
    expected = [0.0, *(ALPHA_FINAL * (1 - math.cos(math.pi * epoch / 3)) / 2 for epoch in (2, 3))]
    assert run.column("alpha") == pytest.approx(expected, abs=1e-4)
    assert entry(run.checkpoint())["schedule"]["name"] == "cosine"


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


def test_automatic_mixed_precision_trains(variants):
    run = variants["amp"].result().expect_success()
    assert run.column("alpha") == pytest.approx([0.0, ALPHA_FINAL * 2 / 3, ALPHA_FINAL], abs=1e-4)
    losses = run.column("loss") + run.column("loss", "valid")
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[2] < losses[0]
    assert len(run.column("teacher_nll")) == 2


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


def test_an_lstm_trains_with_its_teacher(variants):
    run = variants["lstm"].result().expect_success()
    assert run.column("alpha")[1:] == pytest.approx([ALPHA_FINAL * 2 / 3, ALPHA_FINAL], abs=1e-4)
    assert "train_teacher_nll" in run.log("train")[1]
    assert run.column("loss")[2] < run.column("loss")[0]


def test_adaptive_softmax_ends_in_fairseqs_own_error_before_the_first_update(variants):
    """label_smoothed_cross_entropy cannot train it either: no number is better than a wrong one."""
    run = variants["adaptive"].result()
    assert run.code != 0
    assert not run.log("train_inner")


# --- the loss, in this process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def models(straight):
    """The models that ended epochs 1 and 3, as teacher and student."""
    paths = [str(straight.save_dir / f"checkpoint{epoch}.pt") for epoch in (1, 3)]
    ensemble, _, _ = checkpoint_utils.load_model_ensemble_and_task(paths)
    teacher, student = ensemble
    return teacher.eval(), student.train()


def batch(task, subset: str = "valid") -> dict:
    task.load_dataset(subset)
    data = task.dataset(subset)
    return data.collater([data[index] for index in range(len(data))])


def forward(criterion, model, sample, **options):
    """Run a criterion with a fixed seed and return its outputs, the gradients and the RNG state."""
    model.zero_grad()
    torch.manual_seed(7)
    loss, size, log = criterion(model, sample, **options)
    state = torch.get_rng_state()
    loss.sum().backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return loss.detach(), size, log, grads, state


def written_out(model, teacher, sample, *, alpha, smoothing, prefix, padding) -> torch.Tensor:
    """The loss as its definition reads: every distribution is built."""
    torch.manual_seed(7)
    lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
    with torch.no_grad():
        past = teacher.get_normalized_probs(teacher(**sample["net_input"]), log_probs=False)
    lprobs, past = lprobs[:, prefix:], past[:, prefix:]
    target = sample["target"][:, prefix:]
    hard, _ = label_smoothed_nll_loss(
        lprobs.flatten(0, 1), target.flatten(), smoothing, ignore_index=padding
    )
    soft = -(past * lprobs).sum(-1)[target != padding].sum()
    return (1 - alpha) * hard + alpha * soft


def test_the_batch_has_padding(task):
    """The tests below are about a padded batch."""
    assert (batch(task)["target"] == task.target_dictionary.pad()).any()


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("schedule, alpha", [("linear", 0.525), ("constant", 0.7)])
def test_the_loss_is_its_definition_in_value_and_gradient(
    task, models, tmp_path, schedule, alpha, smoothing, prefix
):
    teacher, student = models
    criterion = build_criterion(
        task, tmp_path, label_smoothing=smoothing, ignore_prefix_size=prefix,
        pskd_alpha_schedule=schedule,
    )  # fmt: skip
    sample = batch(task)
    task.begin_epoch(2, student)
    task.begin_epoch(3, teacher)
    loss, _, _, grads, _ = forward(criterion, student, sample)

    student.zero_grad()
    expected = written_out(
        student, teacher, sample, alpha=alpha, smoothing=smoothing, prefix=prefix,
        padding=task.target_dictionary.pad(),
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0.0)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(grads[name], weight.grad, rtol=1e-4, atol=1e-4)


def test_nothing_but_the_loss_differs_from_the_stock_criterion(task, models, tmp_path):
    """Sample size, hard NLL, counts and accuracy are fairseq's; so are the random numbers drawn."""
    teacher, student = models
    options = {"report_accuracy": True, "sentence_avg": True, "ignore_prefix_size": 1}
    criterion = build_criterion(task, tmp_path, **options)
    theirs = LabelSmoothedCrossEntropyCriterion(task, True, 0.1, 1, True).train()
    sample = batch(task)
    task.begin_epoch(3, teacher)
    ours, theirs = forward(criterion, student, sample), forward(theirs, student, sample)
    assert torch.equal(ours[4], theirs[4])
    assert ours[1] == theirs[1] == len(LENGTHS["valid"])
    torch.testing.assert_close(ours[2].pop("nll_loss"), theirs[2].pop("nll_loss"))
    assert ours[2].pop("loss") != theirs[2].pop("loss")
    assert {key: ours[2][key] for key in theirs[2]} == theirs[2]


def test_without_reduction_there_is_a_loss_a_token(task, models, tmp_path):
    teacher, student = models
    criterion = build_criterion(task, tmp_path)
    sample = batch(task)
    task.begin_epoch(3, teacher)
    total = forward(criterion, student, sample)[0]
    each = forward(criterion, student, sample, reduce=False)[0]
    assert each.shape == (sample["target"].numel(), 1)
    torch.testing.assert_close(each.sum(), total)
    assert (each.squeeze(1)[sample["target"].flatten() == criterion.padding_idx] == 0).all()


@pytest.mark.parametrize("smoothing", [0.97, 0.99, 0.999, 1.0])
def test_label_smoothing_is_refused_at_the_start_or_works_with_a_teacher(
    task, models, tmp_path, smoothing
):
    """fairseq spreads epsilon over V - 1 types; spread over V, its share can pass 1."""
    teacher, student = models
    try:
        criterion = build_criterion(task, tmp_path, label_smoothing=smoothing)
    except ValueError as error:
        assert "--label-smoothing" in str(error)
        assert smoothing > 0.97
        return
    task.begin_epoch(3, teacher)
    assert forward(criterion, student, batch(task))[0].isfinite()


class Sharpened(torch.nn.Module):
    """A model whose distribution is not the softmax of its output, as adaptive softmax's is not."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)

    def get_targets(self, sample, net_output):
        return sample["target"]

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        lprobs = (2.0 * net_output[0]).log_softmax(-1)
        return lprobs if log_probs else lprobs.exp()


def test_a_model_with_another_distribution_is_scored_by_its_own(task, models, tmp_path):
    teacher, student = (Sharpened(deepcopy(model)) for model in models)
    criterion = build_criterion(task, tmp_path)
    sample = batch(task)
    task.begin_epoch(3, teacher)
    loss = forward(criterion, student, sample)[0]
    expected = written_out(
        student, teacher, sample, alpha=0.525, smoothing=0.1, prefix=0,
        padding=task.target_dictionary.pad(),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0.0)


def test_the_teacher_stays_as_it_was_while_the_student_trains(task, models, tmp_path):
    teacher, student = (deepcopy(model) for model in models)
    criterion = build_criterion(task, tmp_path)
    task.begin_epoch(2, student)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    criterion(student, batch(task))[0].backward()
    optimizer.step()
    criterion.train()
    snapshot = criterion.epoch_state.teacher.model
    assert same(snapshot.state_dict(), before)
    assert not same(student.state_dict(), before)
    assert not any(module.training for module in snapshot.modules())
    assert all(weight.grad is None for weight in snapshot.parameters())
    assert not list(criterion.parameters()) and not criterion.state_dict()


def test_in_evaluation_the_criterion_is_the_stock_one_to_the_bit(task, models, tmp_path):
    teacher, student = models
    criterion = build_criterion(task, tmp_path).eval()
    theirs = LabelSmoothedCrossEntropyCriterion(task, False, 0.1).eval()
    sample = batch(task)
    task.begin_epoch(3, teacher)
    with torch.no_grad():
        ours, theirs = criterion(teacher, sample), theirs(teacher, sample)
    assert torch.equal(ours[0], theirs[0])
    assert ours[2] == theirs[2]


@pytest.mark.parametrize("name", ["linear", "constant", "cosine"])
def test_alpha_stays_final_past_the_end(name):
    schedule = Schedule.build(name, 0.7, 10, 0)
    assert schedule.alpha(10, 10) == schedule.alpha(11, 11) == pytest.approx(0.7)
    assert schedule.unit == "epoch"


def test_epochs_come_before_updates_as_the_unit_of_progress():
    assert Schedule.build("linear", 0.7, 10, 500).unit == "epoch"
    by_update = Schedule.build("linear", 0.7, 0, 500)
    assert (by_update.unit, by_update.alphas.num_epochs) == ("update", 500)
    assert by_update.alpha(250, 3) == pytest.approx(0.35)


# --- evaluating a checkpoint ------------------------------------------------------------------


@pytest.fixture(scope="module")
def translations(fairseq, straight):
    """fairseq-generate and fairseq-interactive on the same sentences, and a load it must refuse."""
    marker = fairseq.folder / "generate_was_run"
    refused = straight.checkpoint("checkpoint2.pt")
    refused["extra_state"]["metrics"] = Payload(marker)
    torch.save(refused, fairseq.folder / "payload.pt")
    plugin = ["--user-dir", str(PLUGIN)]
    common = "--beam 2 --max-len-a 0 --max-len-b 12 --num-workers 0 --cpu".split()
    common += ["--batch-size", "1"]  # a batch's padding moves scores in the last digits

    def flags(path, *more):
        multiple = ["--required-batch-size-multiple", "1"]
        return [str(fairseq.data), "--path", str(path), *common, *multiple, *more]

    whole = straight.save_dir / "checkpoint_3_16.pt"
    text = (fairseq.folder / "test.de").read_text(encoding="utf-8")
    runs = {
        "generate": lambda: fairseq.command("generate", *flags(whole, *plugin)),
        "interactive": lambda: fairseq.command("interactive", *flags(whole, *plugin), stdin=text),
        "no_plugin": lambda: fairseq.forked("generate", *flags(whole), name="no_plugin"),
        "payload": lambda: fairseq.forked(
            "generate", *flags(fairseq.folder / "payload.pt", *plugin), name="payload"
        ),
    }
    return {"marker": marker, **{name: fairseq.submit(run) for name, run in runs.items()}}


def hypotheses(run) -> dict[str, str]:
    found = re.findall(r"^H-(\d+)\t\S+\t(.*)$", run.output, re.M)
    return dict(found)


def test_generate_and_interactive_read_a_checkpoint_and_agree(translations):
    generated = hypotheses(translations["generate"].result().expect_success())
    typed = hypotheses(translations["interactive"].result().expect_success())
    assert len(generated) == len(LENGTHS["test"])
    assert generated == typed


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="torch < 2.6 trusts pickles"
)
def test_without_the_plugin_fairseq_cannot_read_its_own_checkpoint(translations):
    """Why the allow-list exists: fairseq pickles its command line as argparse.Namespace."""
    run = translations["no_plugin"].result()
    assert run.code != 0
    assert "argparse.Namespace was not an allowed global" in run.output


def test_generate_refuses_a_foreign_object_and_does_not_run_it(fairseq, translations):
    run = translations["payload"].result()
    assert run.code != 0 and "Weights only load failed" in run.output
    assert "system" in run.output and not hypotheses(run)
    assert not translations["marker"].exists()
    # The payload is a real one.
    torch.load(fairseq.folder / "payload.pt", weights_only=False)
    assert translations["marker"].exists()
