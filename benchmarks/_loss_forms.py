"""What benchmarks/loss.py compares: the forms of the loss, and the rows that all are given.

Shapes: N rows (samples, tokens or boxes), C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pskd import TopK, mix_targets, pskd_cross_entropy

ALPHA = 0.8  # the paper's, at the end of training
KEPT = 16  # classes of a sparse teacher
BASE, COMPILED = "cross-entropy", "compiled"
IN_PLACE = " in place"  # ends the names of forms that leave the gradient in the logits
# Forms that leave sums to half precision are off by that much.
TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.float16: {"rtol": 2e-2, "atol": 1e-3},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-3},
}

Form = Callable[[Tensor], Tensor]  # from (N, C) logits to the loss
Step = Callable[[], tuple[Tensor, Tensor]]  # to the loss and its gradient on the logits


class Case(NamedTuple):
    """The rows that all forms are given. The teacher's forward is not part of the loss.

    Attributes:
        values: (N, C) the student's scores.
        target: (N,) labels.
        probs: (N, C) float32; the past prediction.
        teacher_logits: (N, C) of the dtype of ``values``; its scores.
        top_k: its largest classes.
    """

    values: Tensor
    target: Tensor
    probs: Tensor
    teacher_logits: Tensor
    top_k: TopK

    @classmethod
    def made_up(cls, rows: int, classes: int, dtype: str, device: str) -> Case:
        values, teacher = (
            torch.randn(rows, classes, device=device).mul_(3.0).to(getattr(torch, dtype))
            for _ in range(2)
        )
        target = torch.randint(classes, (rows,), device=device)
        probs = teacher.float().softmax(dim=1)
        kept, indices = probs.topk(min(KEPT, classes), dim=1)
        return cls(values, target, probs, teacher, TopK(indices, kept))

    def first(self, rows: int) -> Case:
        """Return the case of the first rows only."""
        dense = (part[:rows] for part in self[:4])
        return Case(*dense, TopK(*(part[:rows] for part in self.top_k)))

    def least_bytes(self, name: str) -> int:
        """Return the bytes of scores and past prediction, read once, and of the gradient, written.

        Args:
            name: of a form of pskd.
        """
        past = self.teacher_logits.nbytes if "logits" in name else self.probs.nbytes
        if "top-k" in name:
            past = sum(part.nbytes for part in self.top_k)
        return 2 * self.values.nbytes + past


def forms_of(case: Case, *, compiled: bool) -> dict[str, Form]:
    """Return all forms by name; in what ``compiled`` adds nothing is kept of earlier shapes."""
    given = {"target": case.target, "probs": case.probs}
    found = {
        BASE: partial(F.cross_entropy, target=case.target),
        "mixed target": partial(_mixed, **given),
        "published": partial(_published, **given),
    }
    if compiled:
        torch.compiler.reset()
        found[COMPILED] = partial(torch.compile(_plain, dynamic=False), **given)
    teachers = {
        "dense": {"teacher_probs": case.probs},
        "logits": {"teacher_probs": None, "teacher_logits": case.teacher_logits},
        "top-k": {"teacher_probs": case.top_k},
    }
    for name, teacher in teachers.items():
        ours = partial(pskd_cross_entropy, target=case.target, alpha=ALPHA, **teacher)
        found[f"pskd {name}"] = ours
        found[f"pskd {name}{IN_PLACE}"] = partial(ours, inplace=True)
    return found


def _mixed(logits: Tensor, target: Tensor, probs: Tensor) -> Tensor:
    return F.cross_entropy(logits, mix_targets(target, probs, ALPHA))


def _published(logits: Tensor, target: Tensor, probs: Tensor) -> Tensor:
    # Written from its description. It takes a one-hot row from an identity matrix, of 65 GB for
    # 128,000 classes; writing the ones costs no more and is possible at any size.
    one_hot = torch.zeros_like(probs).scatter_(1, target[:, None], 1.0)
    mixed = (1.0 - ALPHA) * one_hot + ALPHA * probs
    return -(mixed * logits.log_softmax(dim=1)).sum(dim=1).mean()


def _plain(logits: Tensor, target: Tensor, probs: Tensor) -> Tensor:
    hard, soft = F.cross_entropy(logits, target), F.cross_entropy(logits, probs)
    return (1.0 - ALPHA) * hard + ALPHA * soft


def peers_of(case: Case) -> dict[str, Form]:
    """Return Liger-Kernel's losses between two distributions, where it is installed and runs.

    They are of the past prediction alone, without labels, and start from log-probabilities, which
    are made of the student's scores in the step; the teacher's are ready.
    """
    if not case.values.is_cuda or find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.jsd import LigerJSDFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    log_probs = case.teacher_logits.log_softmax(dim=1, dtype=torch.float32)

    def kl(logits: Tensor) -> Tensor:
        scores = logits.log_softmax(dim=1, dtype=torch.float32)
        return LigerKLDivLossFunction.apply(scores, case.probs, "batchmean")

    def jsd(logits: Tensor) -> Tensor:
        return LigerJSDFunction.apply(logits.log_softmax(dim=1, dtype=torch.float32), log_probs)

    return {"Liger KL": kl, "Liger JSD": jsd}


def steps_of(case: Case, *, compiled: bool, names: Iterable[str] | None = None) -> dict[str, Step]:
    """Return what computes the loss and gradient of each form, or of those that are named.

    The forms in place share logits of their own, which hold the last gradient from the first step
    on: what a loss costs does not depend on their values, and to restore them would cost a copy.
    """
    forms = forms_of(case, compiled=compiled) | peers_of(case)
    logits, scratch = _as_activations(case.values), _as_activations(case.values)
    return {
        name: partial(_step, forms[name], scratch if name.endswith(IN_PLACE) else logits)
        for name in names or forms
    }


def _as_activations(values: Tensor) -> Tensor:
    """Return a copy that is not a leaf, as a network's logits are, with nothing large below."""
    return values + torch.zeros((), device=values.device, requires_grad=True)


def _step(form: Form, logits: Tensor) -> tuple[Tensor, Tensor]:
    loss = form(logits)
    # backward() might copy the gradient into a leaf's .grad, which is not part of the loss.
    (grad,) = torch.autograd.grad(loss, logits)
    return loss.detach(), grad


def check(case: Case, forms: dict[str, Form]) -> None:
    """Raise AssertionError unless the forms agree with float64 in value and gradient.

    ``forms`` are of ``case``, which is best small.
    """
    classes, tolerance = case.probs.size(1), TOLERANCES[case.values.dtype]
    for name, form in forms.items():
        probs = case.top_k.dense(classes) if "top-k" in name else case.probs
        mixed = mix_targets(case.target, probs.double(), 0.0 if name == BASE else ALPHA)
        exact = _step(partial(F.cross_entropy, target=mixed), _as_activations(case.values.double()))
        found = _step(form, _as_activations(case.values))
        for what, value, wanted in zip(("loss", "gradient"), found, exact, strict=True):
            torch.testing.assert_close(
                value.double(),
                wanted,
                **tolerance,
                msg=lambda text, name=name, what=what: f"{what} of {name}: {text}",
            )
