"""Turn a torchvision ResNet checkpoint into weights for Detectron2's MODEL.WEIGHTS.

    python detection/convert_backbone.py resnet50.pth r50.pth

Reads ResNet-18, 34, 50, 101 and 152, ResNeXt and Wide ResNet in torchvision's layout (conv1, bn1,
layer1.0.conv1, ..., fc), as a bare state dict or under "model" or "state_dict", with or without
DataParallel's "module." prefix. The classifier is left out.

Prints the config that goes with the weights, as KEY VALUE pairs for a command line. Detectron2's
defaults are those of the MSRA networks, which have their stride in the 1x1 convolutions, read BGR,
and have the pixels' deviation in their first weights: under them a torchvision network loads
without a word and computes something else.
The same keys, without the file and the depth, are in configs/detection/torchvision_backbone.yaml.
Without a checkout of the project the program is python -m pskd_torchvision.convert_backbone.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pskd_tools.checkpoint import write_archive
from pskd_tools.files import written_aside
from pskd_tools.program import exit_status
from pskd_torchvision.weights import read_state_dict, some

BLOCKS = {  # depth: blocks of each stage
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC_DEPTHS = (18, 34)
STEM = (64, 3, 7, 7)
COUNTER = ".num_batches_tracked"
# ImageNet's, times 255: Detectron2 normalises pixels from 0 to 255.
PIXEL_MEAN = [123.675, 116.280, 103.530]
PIXEL_STD = [58.395, 57.120, 57.375]


# ---- which network it is -----------------------------------------------------------------------


class Architecture(NamedTuple):
    """What distinguishes one of torchvision's ResNets from another."""

    depth: int
    groups: int = 1
    width_per_group: int = 64

    @property
    def is_basic(self) -> bool:
        """Whether its blocks have two 3x3 convolutions, and not a bottleneck."""
        return self.depth in BASIC_DEPTHS

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of torchvision's network, without its classifier and counters."""
        block: Any = BasicBlock if self.is_basic else Bottleneck
        options = {"groups": self.groups, "width_per_group": self.width_per_group}
        with torch.device("meta"):
            network = ResNet(block, BLOCKS[self.depth], **options)
        state = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        return {key: shape for key, shape in state.items() if not is_left_out(key)}


def is_left_out(key: str) -> bool:
    """Whether Detectron2 has no use for a weight: the classifier, and counters of batches."""
    return key.startswith("fc.") or key.endswith(COUNTER)


def find_architecture(state_dict: Mapping[str, Tensor]) -> Architecture:
    """Tell which of torchvision's ResNets a state dict is, from its stem and its block counts."""
    stem = state_dict.get("conv1.weight")
    if stem is None or "layer1.0.conv1.weight" not in state_dict:
        raise ValueError(
            "expected a ResNet in torchvision's layout (conv1.weight, layer1.0.conv1.weight, ...), "
            f"got {some(state_dict)}"
        )
    if (shape := tuple(stem.shape)) != STEM:
        reason = ""
        if shape[2:] == (3, 3):
            reason = (
                ": a CIFAR network, whose 3x3 stem keeps the resolution where Detectron2's stem "
                "has 7x7, stride 2 and max-pooling; train the backbone with the ImageNet stem"
            )
        raise ValueError(f"conv1.weight: expected shape {STEM}, got {shape}{reason}")
    places = {tuple(key.split(".")[:2]) for key in state_dict}
    counts = [sum(stage == f"layer{n}" for stage, *_ in places) for n in (1, 2, 3, 4)]
    is_basic = "layer1.0.conv3.weight" not in state_dict
    known = {d: list(blocks) for d, blocks in BLOCKS.items() if (d in BASIC_DEPTHS) == is_basic}
    for depth, blocks in known.items():
        if blocks == counts:
            return Architecture(depth) if is_basic else _widths(state_dict, depth)
    kind = "basic" if is_basic else "bottleneck"
    told = ", ".join(f"{depth}: {blocks}" for depth, blocks in known.items())
    raise ValueError(
        f"expected a known depth (blocks of the stages for {kind} blocks: {told}), got {counts}"
    )


def _widths(state_dict: Mapping[str, Tensor], depth: int) -> Architecture:
    """ResNeXt and Wide ResNet differ in the first stage's 3x3 convolution."""
    middle = state_dict.get("layer1.0.conv2.weight")
    if middle is None or middle.dim() != 4 or not middle.numel():
        return Architecture(depth)  # whose keys and shapes are looked at next
    width, per_group = middle.shape[:2]
    return Architecture(depth, groups=max(1, width // per_group), width_per_group=per_group)


# ---- converting --------------------------------------------------------------------------------


def convert(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Architecture]:
    """Return Detectron2's names with float32 weights on the CPU, and the architecture.

    Raises:
        ValueError: naming the key, what was expected and what came.

    Source: detectron2/modeling/backbone/resnet.py (names and shapes of its ResNet).
    """
    architecture = find_architecture(state_dict)
    shapes = architecture.shapes()
    _check_keys(state_dict, shapes, architecture)
    for key, shape in shapes.items():
        value = state_dict[key]
        if not value.is_floating_point():
            raise ValueError(f"{key}: expected a floating-point tensor, got {value.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{key}: expected shape {shape}, got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{key}: expected finite values, got NaN or infinity")
    # Copies: torch would write the whole storage of a view.
    weights = {
        detectron2_name(key): state_dict[key]
        .detach()
        .to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key in shapes
    }
    return weights, architecture


def detectron2_name(key: str) -> str:
    """Detectron2's name of a torchvision key: its norms are children of their convolutions."""
    *path, module, leaf = key.split(".")
    place = module.removeprefix("bn").removeprefix("conv")
    if path[-1:] == ["downsample"]:
        name = ["shortcut"] if module == "0" else ["shortcut", "norm"]
        path = path[:-1]
    else:
        name = [f"conv{place}"] if module.startswith("conv") else [f"conv{place}", "norm"]
    stage = [f"res{int(path[0].removeprefix('layer')) + 1}", path[1]] if path else ["stem"]
    return ".".join([*stage, *name, leaf])


def _check_keys(
    state_dict: Mapping[str, Tensor], shapes: Mapping[str, tuple], architecture: Architecture
) -> None:
    missing = [key for key in shapes if key not in state_dict]
    if missing:
        raise ValueError(
            f"expected the {len(shapes)} keys of a ResNet-{architecture.depth}, "
            f"got none for {some(missing)}"
        )
    unknown = [key for key in state_dict if key not in shapes and not is_left_out(key)]
    if unknown:  # left out, they would make another network of it
        raise ValueError(
            f"expected the keys of a ResNet-{architecture.depth} and its fc only, "
            f"got also {some(unknown)}"
        )


def backbone_config(architecture: Architecture) -> dict[str, object]:
    """The Detectron2 keys that differ from its defaults for this network, by their dotted names."""
    config: dict[str, object] = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": PIXEL_MEAN,
        "MODEL.PIXEL_STD": PIXEL_STD,
        "MODEL.RESNETS.DEPTH": architecture.depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    if architecture.is_basic:
        config["MODEL.RESNETS.RES2_OUT_CHANNELS"] = STEM[0]
    if architecture.groups != 1:
        config["MODEL.RESNETS.NUM_GROUPS"] = architecture.groups
    if architecture.width_per_group != 64:
        config["MODEL.RESNETS.WIDTH_PER_GROUP"] = architecture.width_per_group
    return config


def write_weights(path: str | os.PathLike, weights: Mapping[str, Tensor]) -> None:
    """Write what DetectionCheckpointer loads, aside and then renamed.

    A ``.pth`` holds tensors and is read as data; a ``.pkl`` is a pickle of numpy arrays, as those
    of Detectron2's model zoo, which another major version of numpy may not read.

    Source: detectron2/checkpoint/detection_checkpoint.py (keys of the file).
    """
    path = _checked_target(path)
    content = {"model": dict(weights), "__author__": "pskd", "matching_heuristics": True}
    if path.suffix == ".pth":
        write_archive(path, content)
        return
    content["model"] = {key: value.numpy() for key, value in weights.items()}
    with written_aside(path) as aside, aside.open("wb") as file:
        pickle.dump(content, file)


def _checked_target(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix not in (".pth", ".pkl"):
        raise ValueError(f"{path}: expected a name that ends in .pth or .pkl, got {path.suffix!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: expected an existing folder, got {path.parent}")
    return path


def convert_file(source: str | os.PathLike, target: str | os.PathLike) -> dict[str, object]:
    """Convert a checkpoint file and return the config keys that go with it.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: as `read_state_dict`, `convert` and `write_weights`; or both are one file.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{target}: expected another file than the one that is read, got the same")
    _checked_target(target)
    state_dict = read_state_dict(source)
    try:
        weights, architecture = convert(state_dict)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    write_weights(target, weights)
    return {"MODEL.WEIGHTS": os.fspath(target), **backbone_config(architecture)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", metavar="IN", help="torchvision-layout checkpoint")
    parser.add_argument("target", metavar="OUT", help="the file to write, .pth or .pkl")
    args = parser.parse_args(argv)

    def work() -> None:
        config = convert_file(args.source, args.target)
        depth = config["MODEL.RESNETS.DEPTH"]
        print(f"{args.target}: a backbone of depth {depth}. Its config keys:")
        for key, value in config.items():
            print(f"    {key} {shlex.quote(str(value))}")

    return exit_status("convert_backbone", work)


if __name__ == "__main__":
    sys.exit(main())
