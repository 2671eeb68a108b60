"""Seconds per training step of PS-KD in image classification over cross-entropy, side by side.

One process, one batch of made-up images, four models of the same weights whose steps alternate:
cross-entropy, PS-KD with the memory, PS-KD with the snapshot, and PS-KD as the published
implementation has it, written from its description. A step is forward, loss, backward, step of
the optimizer; the arithmetic limit of the snapshot is 1.33. A network's step hides what the loss
and its teacher cost: they are timed alone too, loss and gradient on the logits, without a network.

The exit status says whether a step with the memory takes at most 1.03 of one with cross-entropy.

    python benchmarks/classification_step.py [--model preact_resnet18 --classes 100] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from functools import partial

import torch
import torch.nn.functional as F
from _measuring import at_least, conditions, judged, markdown, measure, options, ratio
from pskd_classification import build_model
from torch import Tensor, nn

from pskd import MemoryCriterion, SnapshotCriterion

ALPHA = 0.8  # the paper's, at the end of training
LIMIT = 1.03  # of the memory's step over cross-entropy's
BASE = "cross-entropy"
FORMS = (BASE, "memory", "snapshot", "published")
PARTS = ((128, 100), (256, 1000))  # images and classes of CIFAR-100 and ImageNet
PART_CALLS = 25  # a round
SETTINGS = ("model", "classes", "batch_size", "rows", "steps", "rounds")  # written with the figures


class Published:
    """The published implementation's loss and bank, from its description.

    A one-hot row is one of an identity matrix, which is made only once here; the mixed target
    exists. The bank is of float32 on the CPU, holds one-hot rows at first, and is written row by
    row.
    """

    def __init__(self, one_hot: Tensor, device: torch.device) -> None:
        self.bank = one_hot
        self.identity = torch.eye(one_hot.size(1), device=device)

    def __call__(self, logits: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        past = self.bank[rows].to(logits.device)
        mixed = (1.0 - ALPHA) * self.identity[target] + ALPHA * past
        loss = -(mixed * logits.log_softmax(dim=1)).sum(dim=1).mean()
        probs = logits.detach().softmax(dim=1).cpu()
        for row, new in zip(rows.tolist(), probs, strict=True):
            self.bank[row] = new
        return loss


class Bench:
    """A batch, and of each form a model of the same weights with its loss, in the first epoch.

    The data set repeats the images of the batch; a step shows each of them under the row of one of
    its repetitions, at random, and no row twice before all were shown.

    Args:
        model: gives (N, C) logits; is copied. Of one without weights, loss and gradient are a step.
        images: a batch that it takes.
        classes: C; the labels are made up.
        num_rows: M, of the data set; at least N.
    """

    def __init__(self, model: nn.Module, images: Tensor, classes: int, num_rows: int) -> None:
        count, device = len(images), images.device
        self.images, self.target = images, torch.randint(classes, (count,), device=device)
        repetitions = torch.rand(num_rows // count, count).argsort(dim=0)
        self.rows = repetitions * count + torch.arange(count)
        self.next_rows = {name: itertools.cycle(self.rows) for name in FORMS}
        self.models = {name: copy.deepcopy(model).train() for name in FORMS}
        # The paper's for CIFAR.
        recipe = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
        self.optimizers = {
            name: torch.optim.SGD(own.parameters(), **recipe)
            for name, own in self.models.items()
            if list(own.parameters())
        }
        given = {"num_epochs": 2, "alpha_final": ALPHA}
        self.memory = MemoryCriterion(num_rows, classes, device=device, **given)
        self.snapshot = SnapshotCriterion(self.models["snapshot"], **given)
        labels = self.target.cpu().repeat(num_rows // count + 1)[:num_rows]
        self.published = Published(F.one_hot(labels, classes).float(), device)
        for criterion in (self.memory, self.snapshot):
            criterion.begin_epoch(1)

    @torch.no_grad()
    def begin_second_epoch(self) -> None:
        """Give all teachers the snapshot's prediction for each row."""
        past = self.models["snapshot"].eval()(self.images).softmax(dim=1)
        self.models["snapshot"].train()
        for rows in self.rows:
            self.memory.memory.write(rows, past)
            self.published.bank[rows] = past.cpu()
        for criterion in (self.memory, self.snapshot):
            criterion.begin_epoch(2)

    def step(self, name: str) -> Tensor:
        """Make the next training step of a form and return its loss."""
        self.images.grad = None
        if name in self.optimizers:
            self.optimizers[name].zero_grad()
        loss = self.loss(name, next(self.next_rows[name]))
        loss.backward()
        if name in self.optimizers:
            self.optimizers[name].step()
        return loss.detach()

    def loss(self, name: str, rows: Tensor) -> Tensor:
        logits = self.models[name](self.images)
        if name == BASE:
            return F.cross_entropy(logits, self.target)
        if name == "memory":
            return self.memory(logits, self.target, rows)
        if name == "snapshot":
            return self.snapshot(logits, self.target, self.images)
        return self.published(logits, self.target, rows)

    def measure(self, rounds: int, calls: int) -> dict:
        """Measure steps of the second epoch."""
        self.begin_second_epoch()
        steps = {name: partial(self.step, name) for name in FORMS}
        return measure(steps, BASE, rounds, self.images.device, calls=calls)

    def teacher_bytes(self) -> dict[str, int]:
        """Return the size of each form's teacher."""
        memory, weights = self.memory.memory, self.models["snapshot"].state_dict().values()
        return {
            "memory": memory.bytes_per_row * memory.num_rows * 2,  # two epochs
            "snapshot": sum(weight.nbytes for weight in weights),
            "published": self.published.bank.nbytes,
        }


def run(args: argparse.Namespace) -> dict:
    torch.manual_seed(1)
    device = torch.device(args.device)
    model = build_model(args.model, args.classes).to(device)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    bench = Bench(model, images, args.classes, args.rows)
    result = {
        **conditions(args, device, *SETTINGS),
        "limit": LIMIT,
        "teacher_bytes": bench.teacher_bytes(),
        "step": bench.measure(args.rounds, args.steps),
    }
    for batch_size, classes in PARTS:
        logits = torch.randn(batch_size, classes, device=device).requires_grad_()
        part = Bench(nn.Identity(), logits, classes, args.rows)
        result[f"alone_{batch_size}x{classes}"] = part.measure(args.rounds, PART_CALLS)
    return result


def table(title: str, found: dict) -> str:
    lines = [
        [name, f"{taken * 1e3:.3f}", ratio(found, name, 3)]
        for name, taken in found["seconds"].items()
    ]
    return f"{title}\n\n{markdown(['form', 'ms', f'over {BASE} (quartiles)'], lines)}\n"


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, "device", "threads", "json", rounds=7)
    parser.add_argument("--model", default="preact_resnet18", help="any of train.py's")
    parser.add_argument("--classes", type=at_least(1), default=100, help="C")
    parser.add_argument("--batch-size", type=at_least(2), default=128, help="images of 32x32")
    parser.add_argument("--rows", type=int, default=50_000, help="M, images in the data set")
    parser.add_argument("--steps", type=at_least(1), default=2, help="of each form in a round")
    args = parser.parse_args(argv)
    least = max(args.batch_size, *(batch_size for batch_size, _ in PARTS))
    if args.rows < least:
        parser.error(f"expected --rows {least} or more, which is a batch, and --rounds 2 or more")
    torch.set_num_threads(args.threads)
    try:
        result = run(args)
    except ValueError as error:  # of the model's name
        parser.error(str(error))
    print(f"{result['machine']}, torch {result['torch']}, {args.rows:,} rows\n")
    print(table(f"step of {args.model}, {args.batch_size} images", result["step"]))
    for batch_size, classes in PARTS:
        found = result[f"alone_{batch_size}x{classes}"]
        print(table(f"loss and teacher alone, ({batch_size}, {classes})", found))
    sizes = (f"{name} {size / 1e6:.1f}" for name, size in result["teacher_bytes"].items())
    print(f"MB of the teacher: {', '.join(sizes)}")
    of_memory = result["step"]["ratio_median"]["memory"]
    return judged(f"memory over {BASE}, a step", of_memory, result, args.json)


if __name__ == "__main__":
    sys.exit(main())
