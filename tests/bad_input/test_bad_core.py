"""Bad input to the core: the loss, targets, schedules, criteria, metrics, temperature."""

from __future__ import annotations

import copy

import numpy as np
import torch
from bad_input import Part, check, every_case

import pskd
from pskd import calibration
from pskd.calibration.temperature import fit_temperature
from pskd.criterion import make_criterion
from pskd_tools.files import write_json

N, C = 4, 3
VALUES = torch.linspace(-1.0, 1.0, N * C).reshape(N, C)
TARGET = torch.tensor([0, 1, 2, 0])
PAST = torch.full((N, C), 1.0 / C)
NAN = float("nan")

LOSS = Part(
    "The loss and its targets",
    "`logits` are (4, 3), labels four. In place the logits, too, are what they were.",
)
CRITERIA = Part(
    "Criteria of a training loop",
    "Four samples, three classes, three epochs. A criterion that refuses is as it was.",
)
METRICS = Part("Metrics, temperature and plots")
PARTS = [LOSS, CRITERIA, METRICS]


def loss(logits=VALUES, target=TARGET, past=PAST, alpha=0.5, **options):
    return lambda: pskd.pskd_cross_entropy(logits, target, past, alpha, **options)


def linear(target=TARGET, teacher=PAST, alpha=0.5, *, weight=(C, 2), **options):
    hidden = torch.ones(N, 2)
    return lambda: pskd.pskd_linear_cross_entropy(
        hidden, torch.ones(weight), target, teacher, alpha, **options
    )


LOSS.add("alpha 1.5", loss(alpha=1.5), "alpha: expected a number in [0, 1], got 1.5")
LOSS.add("alpha NaN", loss(alpha=NAN), "alpha: expected a number in [0, 1], got nan")
LOSS.add("alpha as text", loss(alpha="high"), "alpha: expected a number in [0, 1], got 'high'")
LOSS.add(
    "alpha of three rows for four",
    loss(alpha=torch.ones(3)),
    "alpha: expected a number or shape (4,), got (3,)",
)
LOSS.add(
    "one row's alpha NaN",
    loss(alpha=torch.tensor([0.5, NAN, 0.5, 0.5])),
    "alpha: expected every row in [0, 1], got a row outside of it or NaN",
)
LOSS.add(
    "a label that is no class",
    loss(target=torch.tensor([0, 1, 3, 0])),
    "target: expected labels in [0, 2], got [0, 3]",
)
LOSS.add(
    "labels as floats",
    loss(target=torch.ones(N)),
    "target: expected integer labels of shape (N,), got torch.float32 of shape (4,)",
)
LOSS.add("three labels", loss(target=TARGET[:3]), "target: expected 4 labels, got 3")
LOSS.add(
    "logits of whole numbers",
    loss(logits=VALUES.long()),
    "logits: expected a floating-point tensor of shape (N, C), got torch.int64 of shape (4, 3)",
)
LOSS.add(
    "logits of images, (4, 3, 2, 2)",
    loss(logits=torch.zeros(N, C, 2, 2)),
    "logits: expected a floating-point tensor of shape (N, C), got torch.float32 of shape "
    "(4, 3, 2, 2)",
)
LOSS.add(
    "a teacher of two classes",
    loss(past=PAST[:, :2]),
    "teacher: expected shape (4, 3) as the logits, got (4, 2)",
)
LOSS.add(
    "a teacher of class numbers",
    loss(past=torch.ones(N, C, dtype=torch.int64)),
    "teacher: expected a floating-point tensor, got torch.int64",
)
LOSS.add(
    "both forms of a teacher",
    loss(teacher_logits=VALUES),
    "expected teacher_probs or teacher_logits, got both",
)
LOSS.add(
    "`TopK` of an unknown class",
    loss(past=pskd.TopK(torch.full((N, 1), 3), torch.ones(N, 1))),
    "teacher_probs: expected TopK of classes in [0, 2], got [3, 3]",
)
LOSS.add(
    "`TopK` of more classes than there are",
    loss(past=pskd.TopK(torch.zeros(N, 4, dtype=torch.int64), torch.ones(N, 4))),
    "teacher_probs: expected 1 to 3 integer classes a row, got 4 of torch.int64",
)
LOSS.add(
    "label smoothing 2",
    loss(label_smoothing=2.0),
    "label_smoothing: expected a number in [0, 1], got 2.0",
)
LOSS.add(
    'reduction "average"',
    loss(reduction="average"),
    "reduction: expected 'none', 'mean' or 'sum', got 'average'",
)
LOSS.add(
    "statistics without a teacher",
    loss(past=None, return_stats=True),
    "return_stats: expected a teacher, got none",
)


def in_place(target=TARGET, alpha=0.5, *, leaf: bool = False):
    """Return a generator whose logits must keep their values, and their place in autograd."""

    def run():
        logits = VALUES.clone().requires_grad_() if leaf else VALUES.clone().requires_grad_() * 1
        yield lambda: (logits.detach().clone(), logits._version)
        pskd.pskd_cross_entropy(logits, target, PAST, alpha, inplace=True)

    return run


LOSS.add(
    "in place, and a label that is no class",
    in_place(target=torch.tensor([0, 1, 2, 7])),
    "target: expected labels in [0, 2], got [0, 7]",
)
LOSS.add(
    "in place, and a row's alpha of 2",
    in_place(alpha=torch.tensor([0.5, 0.5, 0.5, 2.0])),
    "alpha: expected every row in [0, 1], got a row outside of it or NaN",
)
LOSS.add(
    "in place on a leaf",
    in_place(leaf=True),
    "inplace: expected logits that were computed, got a leaf, whose value stays",
)
LOSS.add(
    "hidden states and an embedding that do not fit",
    linear(weight=(C, 5)),
    "weight: expected 2 columns as hidden has, got 5",
)
LOSS.add(
    "`pskd_linear_cross_entropy` and a label that is no class",
    linear(target=torch.tensor([0, 1, 2, -1])),
    "target: expected labels in [0, 2], got [-1, 2]",
)
LOSS.add(
    "its teacher of other rows",
    linear(teacher=pskd.LinearTeacher(torch.ones(2, 2), torch.ones(C, 2))),
    "teacher: expected 4 hidden states and 3 classes, got 2 and 3",
)
LOSS.add(
    "its loss row by row",
    linear(reduction="none"),
    "reduction: expected 'mean' or 'sum', got 'none'",
)
LOSS.add(
    "`mix_targets` without a teacher and a number of classes",
    lambda: pskd.mix_targets(TARGET, None, 0.5),
    "num_classes: expected the number of classes, got None",
)
LOSS.add(
    "`gradient_rescaling` of other rows",
    lambda: pskd.gradient_rescaling(torch.ones(4), torch.ones(3), 0.5),
    "teacher_probs_at_label: expected shape (4,), got (3,)",
)
LOSS.add(
    "a schedule past its end",
    lambda: pskd.linear_alpha(11, 10, 0.8),
    "epoch: expected a number in [0, 10], got 11",
)
LOSS.add(
    "a schedule of no epochs",
    lambda: pskd.cosine_alpha(1, 0, 0.8),
    "num_epochs: expected a finite number above 0, got 0",
)
LOSS.add(
    "alpha_final below 0",
    lambda: pskd.constant_alpha(1, 10, -0.1),
    "alpha_final: expected a number in [0, 1], got -0.1",
)


# ---- criteria ------------------------------------------------------------------------------------


def memory_criterion(**options):
    return pskd.MemoryCriterion(N, C, **({"num_epochs": 3} | options))


def net(width: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(width, C)


def logits() -> torch.Tensor:
    return VALUES.clone().requires_grad_()


CRITERIA.add(
    "no epochs",
    lambda: memory_criterion(num_epochs=0),
    "num_epochs: expected 1 or more, got 0",
)
CRITERIA.add(
    "an unknown schedule",
    lambda: memory_criterion(alpha_schedule="square"),
    "alpha_schedule: expected one of linear, constant, cosine, got 'square'",
)
CRITERIA.add(
    "a memory of 2.5 samples",
    lambda: pskd.MemoryCriterion(2.5, C, num_epochs=3),
    "num_rows: expected an integer, got 2.5",
)
CRITERIA.add(
    "statistics of other samples",
    lambda: memory_criterion(examples=pskd.ExampleStats(5)),
    "examples: expected 4 samples, got 5",
)
CRITERIA.add(
    "statistics of no samples",
    lambda: pskd.ExampleStats(-1),
    "num_rows: expected at least 1, got -1",
)


def asked(tried: str, says: str, *, ends=ValueError, epoch: int = 1, **call) -> None:
    """Add a case of a batch that a memory's criterion refuses."""

    def run():
        criterion = memory_criterion(examples=pskd.ExampleStats(N))
        for number in range(1, epoch + 1):
            criterion.begin_epoch(number)
        yield lambda: copy.deepcopy(criterion.state_dict())
        arguments = {"logits": logits(), "target": TARGET, "rows": torch.arange(N)} | call
        criterion(**arguments)

    CRITERIA.add(tried, run, says, ends=ends)


asked(
    "a batch before the first epoch",
    "expected begin_epoch(1) before the first batch",
    ends=RuntimeError,
    epoch=0,
)
asked(
    "a batch without row numbers",
    "rows: expected the row number of each sample of the batch, got none; pskd.WithRows(dataset) "
    "gives it",
    rows=None,
)
asked(
    "a row that the data set does not have",
    "rows: expected numbers in [0, 3], got [0, 4]",
    rows=torch.tensor([0, 1, 2, 4]),
)
asked(
    "a row twice",
    "rows: expected each sample once in a batch, got 1 more than once (1 such rows)",
    rows=torch.tensor([0, 1, 1, 2]),
)
asked(
    "rows as floats",
    "rows: expected integers of shape (4,), got torch.float32 of (4,)",
    rows=torch.arange(4.0),
)
for _epoch, _when in ((1, "the first epoch"), (2, "the second epoch")):
    asked(
        f"a label that is no class, in {_when}",
        "target: expected labels in [0, 2], got [0, 3]",
        epoch=_epoch,
        target=torch.tensor([0, 1, 2, 3]),
    )
asked(
    "logits of images in the first epoch",
    "logits: expected a floating-point tensor of shape (N, C), got torch.float32 of shape "
    "(4, 3, 2, 2)",
    logits=torch.zeros(N, C, 2, 2, requires_grad=True),
)
asked("three labels in the first epoch", "target: expected 4 labels, got 3", target=TARGET[:3])


@CRITERIA.case(
    "a snapshot's rows that the statistics do not have",
    "rows: expected numbers in [0, 3], got [0, 4]",
)
def _rows_of_statistics():
    model, seen = net(), pskd.ExampleStats(N)
    criterion = pskd.SnapshotCriterion(model, num_epochs=3, examples=seen)
    criterion.begin_epoch(1)
    inputs = torch.ones(N, 2)
    yield lambda: copy.deepcopy(seen.state_dict())
    criterion(model(inputs), TARGET, inputs, rows=torch.tensor([0, 1, 2, 4]))


@CRITERIA.case("an epoch left out", "epoch: expected 2 after the last, got 3")
def _epoch_left_out():
    criterion = memory_criterion()
    criterion.begin_epoch(1)
    yield criterion.state_dict
    criterion.begin_epoch(3)


@CRITERIA.case("an epoch after the last", "epoch: expected one of 1 to 3, got 4")
def _epoch_after_the_last():
    memory_criterion().begin_epoch(4)


def loaded(tried: str, says: str, make, state) -> None:
    """Add a case of a state that a criterion refuses, and stays as it was."""

    def run():
        criterion, wrong = make(), state()
        yield lambda: (copy.deepcopy(criterion.state_dict(inside_epoch=True)), criterion.alpha)
        criterion.load_state_dict(wrong)

    CRITERIA.add(tried, run, says)


def trained(criterion, epochs: int = 2):
    for epoch in range(1, epochs + 1):
        criterion.begin_epoch(epoch)
        criterion(logits(), TARGET, torch.arange(N))
    return criterion


def snapshot_state(model: torch.nn.Module, **options) -> dict:
    criterion = pskd.SnapshotCriterion(model, num_epochs=3, **options)
    criterion.begin_epoch(1)
    criterion.begin_epoch(2)
    return criterion.state_dict(inside_epoch=True)


loaded(
    "the state of a model in place of the criterion's",
    "expected a criterion's state with 'epoch' and 'options', got ['bias', 'weight']",
    memory_criterion,
    lambda: dict(net().state_dict()),
)
loaded(
    "the state of another alpha",
    "alpha_final: expected 0.8, with which the checkpoint was trained, got 0.5",
    lambda: trained(memory_criterion(alpha_final=0.5)),
    lambda: trained(memory_criterion()).state_dict(),
)
loaded(
    "the state of a longer training, without a teacher",
    "epoch: expected a state of epoch 0 to 1, got 2",
    lambda: memory_criterion(alpha_final=0.0, num_epochs=1),
    lambda: trained(memory_criterion(alpha_final=0.0)).state_dict(),
)
loaded(
    "the state of the snapshot's form",
    "criterion: expected 'SnapshotCriterion', with which the checkpoint was trained, got "
    "'MemoryCriterion'",
    memory_criterion,
    lambda: snapshot_state(net()),
)
loaded(
    "the state of other data",
    "memory: expected fingerprint 'mine', got ''",
    lambda: trained(memory_criterion(fingerprint="mine")),
    lambda: trained(memory_criterion()).state_dict(),
)
loaded(
    "the snapshot of another model",
    "teacher: expected the weights of this model: size mismatch for weight: ...",
    lambda: pskd.SnapshotCriterion(net(), num_epochs=3),
    lambda: snapshot_state(net(5)),
)
loaded(
    "a snapshot's state with statistics of other samples",
    "examples: expected 4 samples, got 9",
    lambda: pskd.SnapshotCriterion(net(), num_epochs=3, examples=pskd.ExampleStats(N)),
    lambda: snapshot_state(net(), examples=pskd.ExampleStats(9)),
)
CRITERIA.add(
    "`WithRows` of a data set without a length",
    lambda: pskd.WithRows(iter([1, 2])),
    "dataset: expected one with a length, got list_iterator",
)
CRITERIA.add(
    "`WithRows` of samples that are plain numbers",
    lambda: pskd.WithRows([1, 2])[0],
    "dataset: expected a sample to be a tuple or a mapping, got int",
)
CRITERIA.add(
    "a teacher asked before the first epoch's end",
    lambda: pskd.SnapshotTeacher().model,
    "the teacher has no model: expected refresh() at an epoch's end",
    ends=RuntimeError,
)


CRITERIA.add(
    "Lightning and Transformers: a data set without row numbers",
    lambda: make_criterion(net(), [(1, 2)], C, num_epochs=3),
    "training data: expected pskd.WithRows(dataset), got list",
)
CRITERIA.add(
    "Lightning and Transformers: an unknown teacher",
    lambda: make_criterion(net(), [(1, 2)], C, num_epochs=3, teacher="oracle"),
    "teacher: expected 'memory' or 'snapshot'..., got 'oracle'",
)


# ---- metrics -------------------------------------------------------------------------------------

METRICS.add(
    "logits in place of probabilities",
    lambda: calibration.expected_calibration_error(VALUES, TARGET),
    "probs: expected values in [0, 1], got values in [-1, 1]",
)
METRICS.add(
    "rows that do not sum to 1",
    lambda: calibration.negative_log_likelihood(PAST / 2, TARGET),
    "probs: expected rows that sum to 1, got a row that sums to 0.5",
)
METRICS.add(
    "a label that is no class",
    lambda: calibration.negative_log_likelihood(PAST, TARGET + 1),
    "target: expected labels in [0, 3), got labels in [1, 3]",
)
METRICS.add(
    "no bins",
    lambda: calibration.expected_calibration_error(PAST, TARGET, bins=0),
    "bins: expected an integer of at least 1, got 0",
)
METRICS.add(
    "no rows",
    lambda: calibration.aurc(np.empty(0), np.empty(0, bool)),
    "expected at least one example, got none: a metric of zero examples is undefined",
)
METRICS.add(
    "confidence NaN",
    lambda: calibration.aurc(np.array([0.5, NAN]), np.array([True, False])),
    "confidence: expected numbers, got NaN",
)
METRICS.add(
    "labels where it is asked what is correct",
    lambda: calibration.aurc(np.ones(3), np.array([0, 1, 2])),
    "correct: expected booleans or 0 and 1, got 2",
)
METRICS.add(
    "a metric of text",
    lambda: calibration.aurc(np.array(["a"]), np.array([True])),
    "confidence: expected real numbers, got dtype <U1",
)


@METRICS.case(
    "a batch with a negative NLL, after a good one",
    "nll: expected values of at least 0, got -1",
)
def _negative_nll():
    rows = calibration.ConfidenceAccumulator()
    rows.update(PAST, TARGET)
    yield rows.compute
    rows.update_from(np.ones(1), np.ones(1, bool), -np.ones(1))


METRICS.add(
    "a temperature of logits with infinity",
    lambda: fit_temperature(torch.tensor([[0.0, float("inf")]]), torch.tensor([0])),
    "logits: expected finite values, got values in [0, inf]",
)
METRICS.add(
    "a temperature of no rows",
    lambda: fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)),
    "expected at least one example, got none",
)


@METRICS.case(
    "a picture of no known format",
    "...expected...png...got...",
    needs=("matplotlib",),
)
def _picture_format():
    from pskd_tools.plots import reliability_diagram

    reliability_diagram({"a": (np.ones(2), np.ones(2, bool))}, "picture.docs")


@METRICS.case(
    "numbers that JSON cannot hold, over a file that is there",
    "Object of type complex is not JSON serializable",
    ends=TypeError,
)
def _not_json():
    write_json("results.json", {"ece": 0.1})
    yield None
    write_json("results.json", {"ece": 1j})


@every_case(*PARTS)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
