"""What the loss costs from hidden states, with and without the logits.

A step is the output layer of student and teacher, the loss, and the gradients on the student's
hidden states and output embedding. The forms take turns in each round. Compared with hard-label
cross-entropy of the student's logits are PS-KD from the logits of both, and
`pskd.pskd_linear_cross_entropy`, which makes some rows of them at a time. Extra peak memory is what
a step adds to the memory in use before it, over the size of the logits; the gradients count.

    python benchmarks/linear_loss.py [--rows 1024 --classes 32000 --hidden 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch
import torch.nn.functional as F
from _measuring import (
    alone,
    at_least,
    conditions,
    extra_peak,
    markdown,
    measure,
    options,
    ratio,
)
from torch import Tensor

from pskd import LinearTeacher, pskd_cross_entropy, pskd_linear_cross_entropy
from pskd_tools.files import write_json

BASE = "cross-entropy"
ALPHA = 0.7
SETTINGS = ("rows", "classes", "hidden", "dtype", "rounds")  # written with the figures


class Case:
    """Hidden states and output embeddings of a student and of a teacher, and labels."""

    def __init__(self, args: argparse.Namespace) -> None:
        made = {"dtype": getattr(torch, args.dtype), "device": args.device}
        torch.manual_seed(1)
        self.student = [
            torch.randn(args.rows, args.hidden, **made).requires_grad_(),
            (torch.randn(args.classes, args.hidden, **made) * 0.05).requires_grad_(),
        ]
        self.teacher = LinearTeacher(*(t.detach() + 0.01 for t in self.student))
        self.target = torch.randint(args.classes, (args.rows,), device=args.device)

    def hard(self) -> Tensor:
        return F.cross_entropy(F.linear(*self.student), self.target)

    def from_logits(self) -> Tensor:
        with torch.no_grad():
            past = F.linear(*self.teacher)
        logits = F.linear(*self.student)
        return pskd_cross_entropy(
            logits, self.target, None, ALPHA, teacher_logits=past, inplace=True
        )

    def from_hidden(self) -> Tensor:
        return pskd_linear_cross_entropy(*self.student, self.target, self.teacher, ALPHA)

    def steps(self) -> dict:
        """Return what is timed: each loss to its gradients."""
        forms = {
            BASE: self.hard,
            "pskd_cross_entropy, in place": self.from_logits,
            "pskd_linear_cross_entropy": self.from_hidden,
        }
        return {name: partial(self._step, form) for name, form in forms.items()}

    def _step(self, form) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(), self.student)


def times(args: argparse.Namespace) -> dict:
    """Return the figures of `measure`.

    Raises:
        AssertionError: unless both forms of PS-KD give the same.
    """
    case = Case(args)
    loss = case.from_logits()
    assert loss.isfinite()
    torch.testing.assert_close(loss, case.from_hidden(), rtol=1e-3, atol=1e-3)
    return measure(case.steps(), BASE, args.rounds, args.device)


def memory(args: argparse.Namespace) -> dict[str, float | None]:
    """Return the extra peak memory of each form over the logits' size."""
    case = Case(args)
    size = args.rows * args.classes * case.student[0].element_size()
    found = {name: extra_peak(step, args.device) for name, step in case.steps().items()}
    return {name: None if peak is None else peak / size for name, peak in found.items()}


def told(result: dict) -> str:
    lines = []
    for name, taken in result["seconds"].items():
        peak = result["memory"][name]
        held = "-" if peak is None else f"{peak:.2f}"
        over_base = "1" if name == BASE else ratio(result, name)
        lines.append([name, f"{taken * 1e3:,.0f}", over_base, held])
    return markdown(["form", "ms", "time over cross-entropy's", "memory over the logits'"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, "dtype", "device", "json", rounds=7)
    parser.add_argument("--rows", type=at_least(1), default=1024, help="target tokens")
    parser.add_argument("--classes", type=at_least(1), default=32000, help="of the vocabulary")
    parser.add_argument("--hidden", type=at_least(1), default=512, help="units of the decoder")
    args = parser.parse_args(argv)
    result = conditions(args, args.device, *SETTINGS) | times(args)
    result["memory"] = alone(torch.get_num_threads(), args.device, memory, args)
    print(result["machine"], told(result), sep="\n\n")
    if args.json:
        write_json(args.json, result, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
