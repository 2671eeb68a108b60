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
import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from _measuring import at_least, conditions, judged, markdown, measure, options, ratio, seconds
from PIL import Image
from pskd_classification import Images, Mixer, Objective, Trainer, build_model
from pskd_classification.on_device import DeviceImages, DeviceLoader
from pskd_classification.transforms import View, train_transform
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from pskd import MemoryCriterion
from pskd.distributed import World
from pskd_tools.training import AMP, autocast

LIMIT = 1.05  # of a step with the images on the device over the bare network's
BASE = "network"
SIDE, CLASSES = 32, 100
VIEW = View("crop", SIDE, 0.5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
#: Written with the figures.
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


def trainings(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Return what trains the next epoch of each form."""
    device = torch.device(args.device)
    count = args.batch_size * args.steps
    source = MadeUp(count)
    images = Images(source, [str(i) for i in range(count)], range(count), train_transform(VIEW))
    placed = DeviceImages(images, VIEW, device, augmented=True)
    model = build_model(args.model, CLASSES).to(device)

    def epochs(data: Images | DeviceImages) -> Callable[[], object]:
        own = copy.deepcopy(model)
        optimizer = sgd(own, device)
        criterion = MemoryCriterion(count, CLASSES, num_epochs=args.rounds + 1, alpha_final=0)
        trainer = Trainer(
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
        numbers = itertools.count(1)
        return lambda: trainer.train_epoch(next(numbers))

    (batch,) = DeviceLoader(placed, batch_size=args.batch_size, sampler=range(args.batch_size))
    return {
        "loader": epochs(images),
        "on device": epochs(placed),
        BASE: bare_epochs(args, copy.deepcopy(model), batch[1], batch[2]),
    }


def bare_epochs(
    args: argparse.Namespace, network: nn.Module, images: Tensor, target: Tensor
) -> Callable[[], None]:
    """Return what makes as many steps as an epoch has, all on one batch, as a `Trainer` does."""
    if args.channels_last:
        network, images = (x.to(memory_format=torch.channels_last) for x in (network, images))
    optimizer = sgd(network.train(), images.device)
    scaler = torch.amp.GradScaler(images.device.type, enabled=args.amp == "fp16")
    run = network if args.compile_mode is None else torch.compile(network, mode=args.compile_mode)

    def epoch() -> None:
        for _ in range(args.steps):
            optimizer.zero_grad()
            with autocast(args.amp, images.device):
                loss = F.cross_entropy(run(images), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return epoch


def cpu_seconds(function: Callable[[], object], _device: object) -> float:
    """Return the seconds that this process computes, whatever else the machine does."""
    start = time.process_time()
    function()
    return time.process_time() - start


def run(args: argparse.Namespace) -> dict:
    torch.manual_seed(1)
    if args.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
    clock = cpu_seconds if args.cpu_time else seconds
    found = measure(trainings(args), BASE, args.rounds, args.device, clock=clock)
    taken, count = found.pop("seconds"), args.batch_size * args.steps
    return {
        **conditions(args, args.device, *SETTINGS),
        "limit": LIMIT,
        "images_per_second": {name: count / epoch for name, epoch in taken.items()},
        "ms_per_step": {name: 1e3 * epoch / args.steps for name, epoch in taken.items()},
        **found,
    }


def table(result: dict) -> str:
    lines = [
        [name, f"{rate:,.0f}", f"{result['ms_per_step'][name]:.2f}", ratio(result, name, 3)]
        for name, rate in result["images_per_second"].items()
    ]
    return markdown(["form", "images/s", "ms a step", f"over the {BASE}'s (quartiles)"], lines)


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__, "device", "threads", "json", rounds=7)
    parser.add_argument("--model", default="preact_resnet10_tiny", help="any of train.py's")
    parser.add_argument("--batch-size", type=at_least(2), default=128, help="images of 32x32")
    parser.add_argument("--steps", type=at_least(1), default=10, help="of each form in a round")
    parser.add_argument("--workers", type=at_least(0), default=0, help="of the DataLoader")
    parser.add_argument("--amp", choices=list(AMP), default=False, help="mixed precision")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile-mode", help="of torch.compile; default: not compiled")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time this process alone, on a shared machine"
    )
    args = parser.parse_args(argv)
    if args.cpu_time and (args.workers or args.device != "cpu"):
        parser.error("--cpu-time: expected --device cpu and --workers 0, which are this process")
    torch.set_num_threads(args.threads)
    try:
        result = run(args)
    except ValueError as error:  # of the model's name
        parser.error(str(error))
    print(f"{result['machine']}, torch {result['torch']}, {args.model}, {args.batch_size} images\n")
    print(table(result), end="\n\n")
    ratio_on_device = result["ratio_median"]["on device"]
    return judged(f"on device over the {BASE}, a step", ratio_on_device, result, args.json)


if __name__ == "__main__":
    sys.exit(main())
