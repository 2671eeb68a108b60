"""The fairseq plugin's loss, of a criterion that fairseq's own builder makes in this process."""

from __future__ import annotations

from copy import deepcopy

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq.criterions.label_smoothed_cross_entropy import (  # noqa: E402
    LabelSmoothedCrossEntropyCriterion,
    label_smoothed_nll_loss,
)
from fairseq_toys import LENGTHS, batch, build_criterion, same, step  # noqa: E402


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
    sample, padding = batch(task), task.target_dictionary.pad()
    assert (sample["target"] == padding).any()
    task.begin_epoch(2, student)
    task.begin_epoch(3, teacher)
    ours = step(criterion, student, sample)

    student.zero_grad()
    expected = written_out(
        student, teacher, sample, alpha=alpha, smoothing=smoothing, prefix=prefix, padding=padding
    )
    expected.backward()
    torch.testing.assert_close(ours.loss, expected.detach(), rtol=1e-5, atol=0.0)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(ours.grads[name], weight.grad, rtol=1e-4, atol=1e-4)


def test_nothing_but_the_loss_differs_from_the_stock_criterion(task, models, tmp_path):
    """Sample size, hard NLL, counts and accuracy are fairseq's; so are the random numbers drawn."""
    teacher, student = models
    options = {"report_accuracy": True, "sentence_avg": True, "ignore_prefix_size": 1}
    criterion = build_criterion(task, tmp_path, **options)
    theirs = LabelSmoothedCrossEntropyCriterion(task, True, 0.1, 1, True).train()
    sample = batch(task)
    task.begin_epoch(3, teacher)
    ours, theirs = step(criterion, student, sample), step(theirs, student, sample)
    assert torch.equal(ours.random, theirs.random)
    assert ours.size == theirs.size == len(LENGTHS["valid"])
    torch.testing.assert_close(ours.log.pop("nll_loss"), theirs.log.pop("nll_loss"))
    assert ours.log.pop("loss") != theirs.log.pop("loss")
    assert {key: ours.log[key] for key in theirs.log} == theirs.log


def test_without_reduction_there_is_a_loss_a_token(task, models, tmp_path):
    teacher, student = models
    criterion = build_criterion(task, tmp_path)
    sample = batch(task)
    task.begin_epoch(3, teacher)
    total = step(criterion, student, sample).loss
    each = step(criterion, student, sample, reduce=False).loss
    assert each.shape == (sample["target"].numel(), 1)
    torch.testing.assert_close(each.sum(), total)
    assert (each.squeeze(1)[sample["target"].flatten() == criterion.padding_idx] == 0).all()


@pytest.mark.parametrize("smoothing", [0.97, 0.999])
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
    assert step(criterion, student, batch(task)).loss.isfinite()


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
    loss = step(criterion, student, sample).loss
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
