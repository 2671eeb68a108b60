#!/usr/bin/env python
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

Needs pskd, and torchvision_resnet.py beside it.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision_resnet import (
    STEM_WIDTH,
    Architecture,
    find_architecture,
    some,
    torchvision_shapes,
)

from pskd_tools.checkpoint import load_archive, write_archive
from pskd_tools.files import written_aside

COUNTER = ".num_batches_tracked"
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile, in any nesting
CONTAINERS = ("model", "state_dict")
# ImageNet's, times 255: Detectron2 normalises pixels from 0 to 255.
PIXEL_MEAN = [123.675, 116.280, 103.530]
PIXEL_STD = [58.395, 57.120, 57.375]


# ---- reading -----------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, without a prefix that all its keys share.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is no checkpoint, or holds no state dict.
    """
    # torchvision's own training script keeps its argparse.Namespace beside the model.
    with torch.serialization.safe_globals(_not_yet_safe(argparse.Namespace)):
        value = load_archive(path, "a checkpoint that torch.load reads with weights_only=True")
    for container in CONTAINERS:
        if isinstance(value, Mapping) and isinstance(value.get(container), Mapping):
            value = value[container]
            break
    is_named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if not is_named or not any(isinstance(entry, Tensor) for entry in value.values()):
        got = f"keys {some(value)}" if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{path}: expected a state dict, bare or under {' or '.join(CONTAINERS)}, got {got}"
        )
    return _without_prefix(value)


def _not_yet_safe(*types: type) -> list[type]:
    """Those that torch's allow-list lacks: its context would take the others off it at its end."""
    known = torch.serialization.get_safe_globals()
    return [kind for kind in types if kind not in known]


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state_dict = dict(state_dict)
    while shared := [p for p in PREFIXES if all(key.startswith(p) for key in state_dict)]:
        state_dict = {key.removeprefix(shared[0]): value for key, value in state_dict.items()}
    return state_dict


# ---- converting --------------------------------------------------------------------------------


def convert(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Architecture]:
    """Return Detectron2's names with float32 weights on the CPU, and the architecture.

    The classifier and the counters of batches are left out: Detectron2 has no use for them.

    Args:
        state_dict: of one of torchvision's ResNets.

    Raises:
        ValueError: naming the key, what was expected and what came.

    Source: detectron2/modeling/backbone/resnet.py (names and shapes of its ResNet).
    """
    architecture = find_architecture(state_dict)
    shapes = torchvision_shapes(architecture)
    _check_keys(state_dict, shapes, architecture)
    for key, shape in shapes.items():
        value = state_dict[key]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key}: expected a floating-point tensor, got {got}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{key}: expected shape {shape}, got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{key}: expected finite values, got NaN or infinity")
    # Copies: a view would take all that lies in its storage into the file.
    as_is = {"dtype": torch.float32, "copy": True, "memory_format": torch.contiguous_format}
    weights = {detectron2_name(key): state_dict[key].detach().to(**as_is) for key in shapes}
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
    unknown = [
        key
        for key in state_dict
        if key not in shapes and not key.startswith("fc.") and not key.endswith(COUNTER)
    ]
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
        config["MODEL.RESNETS.RES2_OUT_CHANNELS"] = STEM_WIDTH
    if architecture.groups != 1:
        config["MODEL.RESNETS.NUM_GROUPS"] = architecture.groups
    if architecture.width_per_group != 64:
        config["MODEL.RESNETS.WIDTH_PER_GROUP"] = architecture.width_per_group
    return config


def write_weights(path: str | os.PathLike, weights: Mapping[str, Tensor]) -> None:
    """Write what DetectionCheckpointer loads, aside and then renamed.

    A ``.pth`` holds tensors and is read as data; a ``.pkl`` is a pickle of numpy arrays, as those
    of Detectron2's model zoo, which another major version of numpy may not read.

    Raises:
        ValueError: another suffix, or a folder that is not there.

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN", help="torchvision-layout checkpoint")
    parser.add_argument("target", metavar="OUT", help="the file to write, .pth or .pkl")
    args = parser.parse_args(argv)
    try:
        config = convert_file(args.source, args.target)
    except (OSError, ValueError) as error:
        print(f"convert_backbone: {error}", file=sys.stderr)
        return 1
    print(f"{args.target}: a backbone of depth {config['MODEL.RESNETS.DEPTH']}. Its config keys:")
    for key, value in config.items():
        print(f"    {key} {shlex.quote(str(value))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
