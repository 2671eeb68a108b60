"""Which of torchvision's ResNets a state dict is, and the keys and shapes that it must have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["STEM_WIDTH", "Architecture", "find_architecture", "some", "torchvision_shapes"]

BLOCKS = {  # depth: blocks of each stage; with fewer than 50 layers they are basic blocks
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC_DEPTHS = (18, 34)
STEM_WIDTH = 64
EXPANSION = 4  # of a bottleneck's output over ResNet's width
NORM_KEYS = ("weight", "bias", "running_mean", "running_var")
SHOWN_KEYS = 5  # in an error


class Architecture(NamedTuple):
    """What distinguishes one of torchvision's ResNets from another."""

    depth: int
    groups: int = 1
    width_per_group: int = 64

    @property
    def is_basic(self) -> bool:
        return self.depth in BASIC_DEPTHS


def torchvision_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The keys of torchvision's network without its classifier, and their shapes.

    Source: torchvision/models/resnet.py (the layout of names and widths).
    """
    shapes = _conv_and_norm("conv1", "bn1", (STEM_WIDTH, 3, 7, 7))
    channels = STEM_WIDTH
    for stage, count in enumerate(BLOCKS[architecture.depth]):
        base = STEM_WIDTH * 2**stage
        for number in range(count):
            block = f"layer{stage + 1}.{number}."
            convs = _block_convs(architecture, channels, base)
            for place, shape in enumerate(convs, start=1):
                shapes |= _conv_and_norm(f"{block}conv{place}", f"{block}bn{place}", shape)
            out = convs[-1][0]
            if number == 0 and (stage > 0 or out != channels):
                shapes |= _conv_and_norm(
                    f"{block}downsample.0", f"{block}downsample.1", (out, channels, 1, 1)
                )
            channels = out
    return shapes


def _block_convs(architecture: Architecture, channels: int, base: int) -> list[tuple[int, ...]]:
    """Weight shapes of a block's convolutions, (out, in / groups, height, width)."""
    if architecture.is_basic:
        return [(base, channels, 3, 3), (base, base, 3, 3)]
    per_group = architecture.width_per_group * base // 64
    width = per_group * architecture.groups
    out = base * EXPANSION
    return [(width, channels, 1, 1), (width, per_group, 3, 3), (out, width, 1, 1)]


def _conv_and_norm(conv: str, norm: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{conv}.weight": shape} | {f"{norm}.{key}": (shape[0],) for key in NORM_KEYS}


def find_architecture(state_dict: Mapping[str, Tensor]) -> Architecture:
    """Tell which of torchvision's ResNets a state dict is, from its stem and its block counts.

    Raises:
        ValueError: the keys are no ResNet's, its stem is not ImageNet's, or no known depth fits.
    """
    stem = state_dict.get("conv1.weight")
    stages = [_count_blocks(state_dict, stage) for stage in (1, 2, 3, 4)]
    if stem is None or "layer1.0.conv1.weight" not in state_dict:
        raise ValueError(
            "expected a ResNet in torchvision's layout (conv1.weight, layer1.0.conv1.weight, ...), "
            f"got {some(state_dict)}"
        )
    expected, shape = (STEM_WIDTH, 3, 7, 7), tuple(getattr(stem, "shape", ()))
    if shape != expected:
        reason = ""
        if shape[2:] == (3, 3):
            reason = (
                ": a CIFAR network, whose 3x3 stem keeps the resolution where Detectron2's stem "
                "has 7x7, stride 2 and max-pooling; train the backbone with the ImageNet stem"
            )
        raise ValueError(f"conv1.weight: expected shape {expected}, got {shape}{reason}")
    is_basic = "layer1.0.conv3.weight" not in state_dict
    for depth, blocks in BLOCKS.items():
        if blocks == tuple(stages) and (depth in BASIC_DEPTHS) == is_basic:
            return Architecture(depth) if is_basic else _widths(state_dict, depth)
    kind = "basic" if is_basic else "bottleneck"
    known = ", ".join(
        f"{depth}: {list(blocks)}"
        for depth, blocks in BLOCKS.items()
        if (depth in BASIC_DEPTHS) == is_basic
    )
    raise ValueError(
        f"expected a known depth (blocks of the stages for {kind} blocks: {known}), got {stages}"
    )


def _count_blocks(state_dict: Mapping[str, Tensor], stage: int) -> int:
    prefix = f"layer{stage}."
    return len({key.split(".")[1] for key in state_dict if key.startswith(prefix)})


def _widths(state_dict: Mapping[str, Tensor], depth: int) -> Architecture:
    """ResNeXt and Wide ResNet differ in the first stage's 3x3 convolution."""
    middle = state_dict.get("layer1.0.conv2.weight")
    shape = tuple(getattr(middle, "shape", ()))
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"layer1.0.conv2.weight: expected a convolution, got shape {shape}")
    width, per_group = shape[:2]
    return Architecture(depth, groups=max(1, width // per_group), width_per_group=per_group)


def some(keys) -> str:
    """A few of many keys, for an error."""
    keys = [str(key) for key in keys]
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(keys[:SHOWN_KEYS]) + more if keys else "none"
