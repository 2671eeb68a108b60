"""Images a second of a training of small images: by a DataLoader, on the device, the network alone.

One process, made-up images of 32x32, three models of the same weights that take turns: an epoch of
train.py's loop with the images read by a DataLoader, one with the images on the device, and as many
steps of the bare network on one batch that is there already. Crop, flip and normalisation are those
of CIFAR.

The exit status says whether a step with the images on the device takes at most 1.05 of one of the
bare network.

    python benchmarks/classification_throughput.py [--device cuda --amp bf16] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from _timing import at_least, machine, medians, new_file, quartiles, ratios_to, seconds
from PIL import Image
from pskd_classification import Images, Mixer, Objective, Trainer, build_model
from pskd_classification.on_device import DeviceImages, DeviceLoader
from pskd_classification.transforms import View, train_transform
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from pskd import MemoryCriterion
from pskd.distributed import World
from pskd_tools.files import write_json
from pskd_tools.training import AMP, autocast

LIMIT = 1.05  # of a step with the images on the device over the bare network's
BASE = "network"
FORMS = ("loader", "on device", BASE)
SIDE, CLASSES = 32, 100
VIEW = View("crop", SIDE, 0.5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
#: Told with the figures.
SETTINGS = (
    "model", "batch_size", "steps", "rounds", "workers", "amp", "channels_last", "compile_mode",
    "cpu_time",
)  # fmt: skip


class MadeUp:
    """Noise with labels, as a source of images."""

    classes = tuple(range(CLASSES))

    def __init__(self, count: int) -> None:
        random = np.random.default_rng(0)
        self.targets = random.integers(CLASSES, size=count)
        self._pixels = random.integers(256, size=(count, SIDE, SIDE, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[row]), int(self.targets[row])


def sgd(model: nn.Module, device: torch.device) -> Optimizer:
    """Return train.py's optimizer for CIFAR."""
    recipe = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    return SGD(model.parameters(), 0.1, fused=device.type == "cuda" or None, **recipe)


def trainings(args: argparse.Namespace) -> dict[str, Callable[[int], object]]:
    """Return what trains an epoch of each form, given its number from 1."""
    device = torch.device(args.device)
    count = args.batch_size * args.steps
    source = MadeUp(count)
    images = Images(source, [str(i) for i in range(count)], range(count), train_transform(VIEW))
    placed = DeviceImages(images, VIEW, device, augmented=True)
    model = build_model(args.model, CLASSES).to(device)

    def trainer(data: Images | DeviceImages) -> Trainer:
        own = copy.deepcopy(model)
        optimizer = sgd(own, device)
        criterion = MemoryCriterion(count, CLASSES, num_epochs=args.rounds + 1, alpha_final=0)
        return Trainer(
            own,
            data,
            Objective(criterion, Mixer()),
            optimizer,
            MultiStepLR(optimizer, []),
            world=World(0, 1, device),
            batch_size=args.batch_size,
            workers=args.workers,
            amp=args.amp,
            compiled=args.compile_mode is not None,
            compile_mode=args.compile_mode,
            channels_last=args.channels_last,
        )

    (batch,) = DeviceLoader(placed, batch_size=args.batch_size, sampler=range(args.batch_size))
    return {
        "loader": trainer(images).train_epoch,
        "on device": trainer(placed).train_epoch,
        BASE: partial(bare_epoch, args, *bare(args, model), batch[1], batch[2]),
    }


def bare(args: argparse.Namespace, model: nn.Module) -> tuple[Callable, Optimizer]:
    """Return a network and its optimizer, set up as a `Trainer` does."""
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    network = copy.deepcopy(model).train().to(memory_format=memory_format)
    optimizer = sgd(network, torch.device(args.device))
    if args.compile_mode is None:
        return network, optimizer
    return torch.compile(network, mode=args.compile_mode), optimizer


def bare_epoch(args, network, optimizer, images, target, _number) -> None:
    """Make as many steps as an epoch has, all on one batch."""
    if args.channels_last:
        images = images.to(memory_format=torch.channels_last)
    scaler = torch.amp.GradScaler(images.device.type, enabled=args.amp == "fp16")
    for _ in range(args.steps):
        optimizer.zero_grad()
        with autocast(args.amp, images.device):
            loss = F.cross_entropy(network(images), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def cpu_seconds(function: Callable[[], object], _device: str) -> float:
    """Return the seconds that this process computes, whatever else the machine does."""
    start = time.process_time()
    function()
    return time.process_time() - start


def run(args: argparse.Namespace) -> dict:
    torch.manual_seed(1)
    if args.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
    calls = trainings(args)
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, clock = list(calls), cpu_seconds if args.cpu_time else seconds
    for number in range(1, args.rounds + 2):  # the first is not counted
        for name in order:
            taken = clock(partial(calls[name], number), args.device)
            if number > 1:
                found[name].append(taken)
        order.reverse()
    ratios, count = ratios_to(BASE, found), args.batch_size * args.steps
    ratio = medians(ratios)
    return {
        "machine": machine(args.device),
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in SETTINGS},
        "images_per_second": {name: count / taken for name, taken in medians(found).items()},
        "ms_per_step": {name: 1e3 * taken / args.steps for name, taken in medians(found).items()},
        "ratio_median": ratio,
        "ratio_quartiles": quartiles(ratios),
        "limit": LIMIT,
        "within_limit": ratio["on device"] <= LIMIT,
    }


def table(result: dict) -> str:
    lines = ["               images/s     ms a step   time over the network's (quartiles)"]
    for name in FORMS:
        rate, step = result["images_per_second"][name], result["ms_per_step"][name]
        line = f"  {name:<12}{rate:9,.0f}{step:14.2f}"
        if name != BASE:
            low, high = result["ratio_quartiles"][name]
            line += f"{result['ratio_median'][name]:14.3f}  ({low:.3f} to {high:.3f})"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="preact_resnet10_tiny", help="any of train.py's")
    parser.add_argument("--batch-size", type=at_least(2), default=128, help="images of 32x32")
    parser.add_argument("--steps", type=at_least(1), default=10, help="of each form in a round")
    parser.add_argument("--rounds", type=at_least(2), default=7)
    parser.add_argument("--workers", type=at_least(0), default=0, help="of the DataLoader")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--amp", choices=list(AMP), default=False, help="mixed precision")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile-mode", help="of torch.compile; default: not compiled")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time this process alone, on a shared machine"
    )
    parser.add_argument("--json", type=new_file, help="a file for the figures")
    args = parser.parse_args(argv)
    if args.cpu_time and (args.workers or args.device != "cpu"):
        parser.error("--cpu-time: expected --device cpu and --workers 0, which are this process")
    torch.set_num_threads(args.threads)
    try:
        result = run(args)
    except ValueError as error:  # of the model's name
        parser.error(str(error))
    print(f"{result['machine']}, torch {result['torch']}, {args.model}, {args.batch_size} images")
    print(table(result))
    verdict = "within" if result["within_limit"] else "ABOVE"
    ratio = result["ratio_median"]["on device"]
    print(f"on device over the {BASE}, a step: {ratio:.3f}, {verdict} the limit of {LIMIT}")
    if args.json:
        write_json(args.json, result, indent=2)
    return 0 if result["within_limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
