"""Bad input to train_net.py: an error before the first iteration that names expected and got."""

from __future__ import annotations

import json

import pytest

pytest.importorskip(
    "detectron2",
    reason="needs Detectron2: https://detectron2.readthedocs.io/tutorials/install.html",
)

import detectron2_tiny as tiny  # noqa: E402
from detectron2.config import LazyConfig  # noqa: E402
from pskd_detectron2 import PSKDHook, Trainer, register_spec  # noqa: E402
from pskd_detectron2.lazy import carry_rows, pskd_hook  # noqa: E402


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return tiny.make_images(tmp_path_factory.mktemp("images"))


def refused(kind: str, out, message: str, *opts: str, **specs) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.run(kind, out, *opts, **specs)
    assert not (out / "metrics.json").exists()
    assert not list(out.glob("*.pth"))


@pytest.mark.parametrize(
    "opts, message",
    [
        ("ALPHA_FINAL 1.5", r"MODEL.PSKD.ALPHA_FINAL: expected a number in \[0, 1\], got 1.5"),
        ("ALPHA_FINAL float('nan')", "MODEL.PSKD.ALPHA_FINAL"),
        ("ALPHA_SCHEDULE step", "ALPHA_SCHEDULE: expected one of linear, constant, cosine.*'step'"),
        ("TEACHER ema", "TEACHER: expected one of snapshot, memory, got 'ema'"),
        ("EPOCH_ITERS -1", "EPOCH_ITERS: expected 0 or more, got -1"),
        ("LABEL_SMOOTHING 2.0", r"LABEL_SMOOTHING: expected a number in \[0, 1\], got 2.0"),
    ],
)
def test_values_of_pskd(opts, message, spec, tmp_path):
    if "nan" in opts:  # which a command line cannot say
        cfg = tiny.config("fpn", tmp_path, train=spec).clone()
        cfg.defrost()
        cfg.MODEL.PSKD.ALPHA_FINAL = float("nan")
        with pytest.raises(ValueError, match=message):
            Trainer(cfg)
    else:
        refused("fpn", tmp_path, message, f"MODEL.PSKD.{opts}", train=spec)


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            "MODEL.ROI_HEADS.NAME StandardROIHeads",
            "MODEL.ROI_HEADS.NAME: with PS-KD expected PSKDROIHeads, got StandardROIHeads",
        ),
        (
            "MODEL.ROI_HEADS.NAME RROIHeads",
            "expected PSKDROIHeads or PSKDRes5ROIHeads or PSKDCascadeROIHeads, got RROIHeads",
        ),
        (
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True MODEL.PSKD.LABEL_SMOOTHING 0.1",
            "LABEL_SMOOTHING: expected 0 with ROI_BOX_HEAD.USE_SIGMOID_CE, got 0.1",
        ),
        ("SOLVER.MAX_ITER 0", "SOLVER.MAX_ITER: expected 1 or more, got 0"),
        (
            "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler DATALOADER.REPEAT_THRESHOLD 0.1",
            "EPOCH_ITERS: expected a number of iterations with .*RepeatFactorTraining.*got 0",
        ),
    ],
)
def test_configs_under_which_pskd_could_not_work(opts, message, spec, tmp_path):
    refused("fpn", tmp_path, message, opts, train=spec)


def test_a_sampler_without_epochs_trains_with_epoch_iters(spec, tmp_path):
    opts = "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler DATALOADER.REPEAT_THRESHOLD 0.1"
    out = tiny.run("fpn", tmp_path, opts, "MODEL.PSKD.EPOCH_ITERS 4", train=spec)
    assert tiny.metrics(out)[-1]["pskd/alpha"] == pytest.approx(0.7)


def test_a_class_count_that_is_not_the_datasets(spec, tmp_path):
    register_spec(spec, tmp_path)
    opts = f"DATASETS.TRAIN ('{spec}',) MODEL.ROI_HEADS.NUM_CLASSES 5"
    message = "NUM_CLASSES: expected 2, the classes of coco:.*, got 5"
    refused("fpn", tmp_path, message, opts, train=None)


def test_a_dataset_that_is_not_registered(tmp_path):
    message = "dataset 'nowhere': expected a registered one, or --train/--test"
    refused("fpn", tmp_path, message, "DATASETS.TRAIN ('nowhere',)", train=None)


def changed(spec: str, folder, change) -> str:
    """A spec of the same images whose annotations went through ``change``."""
    _, path, images = spec.split(":")
    with open(path) as file:
        content = json.load(file)
    change(content)
    other = folder / "changed.json"
    other.write_text(json.dumps(content))
    return f"coco:{other}:{images}"


def test_an_annotation_outside_its_image(spec, tmp_path):
    other = changed(spec, tmp_path, lambda c: c["annotations"][0].update(bbox=[60, 60, 40, 40]))
    message = r"expected every box .* inside its image.*annotation 100.*\[60, 60, 40, 40\]"
    refused("fpn", tmp_path / "run", message, train=other)


def test_a_test_set_with_other_classes(spec, tmp_path):
    other = changed(spec, tmp_path, lambda c: c["categories"][0].update(name="circle"))
    message = r"expected the classes of the training set \(square, ring\), got also circle"
    refused("fpn", tmp_path / "run", message, train=spec, test=other)


def test_a_config_file_that_is_not_there(spec, tmp_path):
    with pytest.raises(ValueError, match="--config-file: expected a YAML or LazyConfig file, got"):
        tiny.run(str(tmp_path / "none.yaml"), tmp_path, train=spec)


def test_a_recipe_of_detectron2s_own_by_its_name(spec, tmp_path):
    words = tiny.arguments("fpn", tmp_path, train=spec)
    words[1] = "detectron2:COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    words += ["MODEL.PSKD.ENABLED", "True", "MODEL.ROI_HEADS.NAME", "PSKDROIHeads"]
    tiny.train_net.main(tiny.train_net.parse([*words, "SOLVER.MAX_ITER", "2"]))
    assert (tmp_path / "model_final.pth").exists()


def test_the_hook_wants_a_model_with_pskd_heads(spec, tmp_path):
    cfg = tiny.config("fpn", tmp_path, tiny.stock("fpn"), train=spec)
    with pytest.raises(ValueError, match="expected a model with PSKD ROI heads, got Standard"):
        PSKDHook(Trainer.build_model(cfg), epoch_iters=3)


def test_lazy_options(spec, tmp_path):
    register_spec(spec, tmp_path)
    cfg = LazyConfig.load(str(tiny.CONFIGS / "mask_rcnn_R_50_FPN_1x_pskd.py"))
    cfg.dataloader.train.dataset.names = spec
    cfg.train.pskd.alpha = 0.5
    with pytest.raises(ValueError, match="train.pskd: expected options of PSKDHook: .*'alpha'"):
        pskd_hook(cfg, None)
    cfg.dataloader.train.mapper._target_ = "somewhere.OtherMapper"
    with pytest.raises(ValueError, match="mapper: with the memory.*expected .*DatasetMapper, got"):
        carry_rows(cfg)
