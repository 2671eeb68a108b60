"""The converted backbone computes in Detectron2 what it computed in torchvision."""

from __future__ import annotations

import argparse
import pickle
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="needs torchvision: pip install torchvision")
import torchvision  # noqa: E402
from pskd_torchvision import convert_backbone  # noqa: E402
from pskd_torchvision.weights import read_state_dict  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
#: Builder and options. A narrow network of another width per group computes as the wide one does.
NETWORKS = {
    "resnet18": ("resnet18", {}),
    "resnet50": ("resnet50", {}),
    "resnext50": ("resnext50_32x4d", {}),
    "narrow50": ("resnet50", {"width_per_group": 16}),
}


def random_network(name: str, seed: int = 0):
    """A network whose norms are no identity, with activations of ordinary size."""
    torch.manual_seed(seed)
    builder, options = NETWORKS[name]
    model = getattr(torchvision.models, builder)(weights=None, num_classes=7, **options).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 0.9)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(100)
    return model


@pytest.fixture(scope="module")
def networks():
    return {name: random_network(name) for name in NETWORKS}


@pytest.fixture
def small():
    """A state dict to spoil."""
    return random_network("resnet18").state_dict()


def torchvision_features(model, images):
    """(res2, res3, res4, res5) as torchvision computes them from normalised images."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        features.append(x)
    return features


# ---- in Detectron2 -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detectron2():
    return pytest.importorskip(
        "detectron2",
        reason="needs Detectron2: https://detectron2.readthedocs.io/tutorials/install.html",
    )


def detectron2_config(keys: dict[str, object], norm: str = "FrozenBN"):
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_list([word for pair in keys.items() for word in pair])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    return cfg


def detectron2_features(cfg, images):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_backbone

    backbone = build_backbone(cfg).eval()
    DetectionCheckpointer(backbone).load(cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        return list(backbone(images).values())


@pytest.mark.parametrize(
    "name, norm, suffix",
    [
        ("resnet18", "BN", ".pth"),
        ("resnet50", "FrozenBN", ".pkl"),
        ("resnet50", "BN", ".pth"),
        ("resnext50", "FrozenBN", ".pth"),
        ("narrow50", "FrozenBN", ".pth"),
    ],
)
def test_features_are_equal_in_both_frameworks(detectron2, networks, tmp_path, name, norm, suffix):
    torch.save(networks[name].state_dict(), tmp_path / "in.pth")
    keys = convert_backbone.convert_file(tmp_path / "in.pth", tmp_path / f"out{suffix}")
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torchvision_features(networks[name], images)
    got = detectron2_features(detectron2_config(keys, norm), images)
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.std() > 0.05  # there is something to compare
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_pixels_reach_the_backbone_as_they_were_normalised_for_torchvision(
    detectron2, networks, tmp_path
):
    """From the same image file: colour order, mean and deviation."""
    from detectron2.data.detection_utils import read_image
    from detectron2.modeling import build_model
    from PIL import Image
    from torchvision.transforms import functional

    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    torch.save(networks["resnet18"].state_dict(), tmp_path / "in.pth")
    keys = convert_backbone.convert_file(tmp_path / "in.pth", tmp_path / "out.pth")
    cfg = detectron2_config(keys)
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"])
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3"]
    model = build_model(cfg)
    image = read_image(str(tmp_path / "image.png"), format=cfg.INPUT.FORMAT)
    image = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
    got = model.preprocess_image([{"image": image}]).tensor
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    expected = functional.normalize(
        torch.as_tensor(pixels).permute(2, 0, 1) / 255, weights.mean, weights.std
    )
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)


def test_the_shipped_recipe_takes_every_weight(detectron2, networks, tmp_path):
    """C4: the first four stages in the backbone, the last in the ROI heads."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model
    from pskd_detectron2 import load_config

    torch.save(networks["resnet50"].state_dict(), tmp_path / "in.pth")
    keys = convert_backbone.convert_file(tmp_path / "in.pth", tmp_path / "out.pth")
    recipe = ROOT / "configs" / "detection" / "voc_faster_rcnn_R_50_C4_torchvision.yaml"
    cfg = load_config(recipe, ["MODEL.WEIGHTS", str(tmp_path / "out.pth"), "MODEL.DEVICE", "cpu"])
    plain = detectron2_config(keys)
    for key in keys:
        *path, last = key.split(".")
        nodes = [cfg, plain]
        for name in path:
            nodes = [node[name] for node in nodes]
        assert nodes[0][last] == nodes[1][last], key
    model = build_model(cfg)
    incompatible = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(cfg.MODEL.WEIGHTS)
    assert incompatible[0].unexpected_keys == [] and incompatible[0].incorrect_shapes == []
    missing = {key.split(".")[0] for key in incompatible[0].missing_keys}
    assert "backbone" not in missing
    assert not [key for key in incompatible[0].missing_keys if "res5" in key]
    loaded = model.state_dict()
    weights = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    for key, value in weights.items():
        owner = "roi_heads." if key.startswith("res5") else "backbone."
        assert torch.equal(loaded[owner + key], value), key


# ---- without Detectron2 ------------------------------------------------------------------------


def test_names_and_values(small):
    weights, architecture = convert_backbone.convert(small)
    assert architecture == (18, 1, 64) and len(weights) == 100
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.1.conv2.norm.bias": "layer1.1.bn2.bias",
        "res4.0.shortcut.weight": "layer3.0.downsample.0.weight",
        "res4.0.shortcut.norm.running_mean": "layer3.0.downsample.1.running_mean",
        "res5.1.conv1.weight": "layer4.1.conv1.weight",
    }
    for name, key in pairs.items():
        assert torch.equal(weights[name], small[key])
        assert weights[name].data_ptr() != small[key].data_ptr()


@pytest.mark.parametrize(
    "name, depth, groups, width, count",
    [
        ("resnet34", 34, 1, 64, 180),
        ("resnet50", 50, 1, 64, 265),
        ("resnet101", 101, 1, 64, 520),
        ("resnet152", 152, 1, 64, 775),
        ("resnext50_32x4d", 50, 32, 4, 265),
        ("resnext101_64x4d", 101, 64, 4, 520),
        ("wide_resnet101_2", 101, 1, 128, 520),
    ],
)
def test_every_resnet_of_torchvision_is_known(name, depth, groups, width, count):
    with torch.device("meta"):
        state_dict = getattr(torchvision.models, name)(weights=None).state_dict()
    architecture = convert_backbone.find_architecture(state_dict)
    assert architecture == (depth, groups, width)
    shapes = architecture.shapes()
    backbone = {
        key: tuple(value.shape)
        for key, value in state_dict.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }
    assert shapes == backbone and len(shapes) == count
    assert len({convert_backbone.detectron2_name(key) for key in shapes}) == count


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {key: value for key, value in state.items() if not key.startswith("fc.")},
    ],
    ids=["reference script", "DataParallel", "compiled", "no classifier"],
)
def test_ways_to_save_a_checkpoint(small, tmp_path, wrap):
    torch.save(wrap(small), tmp_path / "in.pth")
    keys = convert_backbone.convert_file(tmp_path / "in.pth", tmp_path / "out.pth")
    assert keys["MODEL.RESNETS.DEPTH"] == 18 and keys["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert content["matching_heuristics"] is True and content["__author__"] == "pskd"
    expected, _ = convert_backbone.convert(small)
    assert all(torch.equal(content["model"][key], value) for key, value in expected.items())


def test_reading_leaves_torchs_allow_list_as_it_was(small, tmp_path):
    path = tmp_path / "in.pth"
    torch.save({"model": small, "args": argparse.Namespace(lr=0.1)}, path)
    before = torch.serialization.get_safe_globals()
    try:
        for known in ([], [argparse.Namespace]):  # which an adapter may have listed
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(known)
            read_state_dict(path)
            assert torch.serialization.get_safe_globals() == known
    finally:  # without `known`, which another test's checkpoints must not be read with
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_half_precision_is_widened(small):
    weights, _ = convert_backbone.convert(
        {
            key: value.bfloat16() if value.is_floating_point() else value
            for key, value in small.items()
        }
    )
    assert {value.dtype for value in weights.values()} == {torch.float32}
    name = "res3.0.conv1.weight"
    assert torch.equal(weights[name], small["layer2.0.conv1.weight"].bfloat16().float())


def test_a_pickle_holds_numpy_arrays(small, tmp_path):
    torch.save(small, tmp_path / "in.pth")
    convert_backbone.convert_file(tmp_path / "in.pth", tmp_path / "out.pkl")
    content = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    array = content["model"]["stem.conv1.weight"]
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, small["conv1.weight"].numpy())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: {"model": {"lr": 0.1}}, "expected a state dict.*got keys lr"),
        (lambda s: [1, 2], "expected a state dict.*got list"),
        (lambda s: s | {"conv1.weight": torch.zeros(32, 3, 7, 7)}, r"got \(32, 3, 7, 7\)$"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("layer4.1.")},
            r"known depth.*18: \[2, 2, 2, 2\].*got \[2, 2, 2, 1\]",
        ),
        (lambda s: (s.pop("bn1.bias"), s)[1], "100 keys.*none for bn1.bias"),
        (lambda s: s | {"layer1.0.se.weight": torch.ones(1)}, "got also layer1.0.se.weight"),
        (
            lambda s: s | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
            r"layer1.0.conv1.weight: expected shape \(64, 64, 3, 3\), got \(64, 64, 1, 1\)",
        ),
        (
            lambda s: s | {"bn1.running_mean": torch.full((64,), float("nan"))},
            "bn1.running_mean: expected finite",
        ),
        (lambda s: s | {"bn1.bias": torch.zeros(64, dtype=torch.int8)}, "floating-point.*int8"),
    ],
)
def test_what_cannot_be_converted_is_named(small, tmp_path, spoil, message):
    torch.save(spoil(dict(small)), tmp_path / "in.pth")
    (tmp_path / "out.pth").write_text("older")
    with pytest.raises(ValueError, match=f"in.pth: .*{message}"):
        convert_backbone.convert_file(tmp_path / "in.pth", tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_text() == "older"
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_files_are_named(small, tmp_path):
    torch.save(small, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"no checkpoint\n",
        "half": whole[: len(whole) // 2],
        "code": pickle.dumps(subprocess.Popen),
    }.items():
        path = tmp_path / f"{name}.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.pth: expected a checkpoint"):
            read_state_dict(path)


def test_command_line_prints_pairs_that_detectron2_takes(small, tmp_path, capsys):
    torch.save(small, tmp_path / "in.pth")
    arguments = [str(tmp_path / "in.pth"), str(tmp_path / "out file.pth")]
    assert convert_backbone.main(arguments) == 0
    words = shlex.split("\n".join(capsys.readouterr().out.splitlines()[1:]))
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    assert pairs["MODEL.WEIGHTS"] == arguments[1]
    assert pairs["MODEL.RESNETS.DEPTH"] == "18"
    assert pairs["MODEL.PIXEL_STD"] == "[58.395, 57.12, 57.375]"
    assert convert_backbone.main([str(tmp_path / "none.pth"), arguments[1]]) == 1
    assert "none.pth" in capsys.readouterr().err


def test_shipped_keys_are_the_scripts():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install pyyaml")
    path = ROOT / "configs" / "detection" / "torchvision_backbone.yaml"
    shipped = yaml.safe_load(path.read_text("utf-8"))
    flat = {"INPUT.FORMAT": shipped["INPUT"]["FORMAT"]}
    for key, value in shipped["MODEL"].items():
        nested = value if isinstance(value, dict) else {None: value}
        flat |= {f"MODEL.{key}" + (f".{k}" if k else ""): v for k, v in nested.items()}
    expected = convert_backbone.backbone_config(convert_backbone.Architecture(50))
    assert flat | {"MODEL.RESNETS.DEPTH": 50} == expected
