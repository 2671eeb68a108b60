"""Every path that Detectron2 opens through its PathManager may be remote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import detectron2_tiny as tiny
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.utils.file_io import PathHandler, PathManager
from pskd_detection import load_dataset
from pskd_detectron2 import Trainer, load_config, register_spec
from pskd_detectron2.config import recipe_path
from pskd_detectron2.evaluation import ConfidenceEvaluator, build_evaluators
from pskd_detectron2.registered import _known
from test_detectron2_evaluation import as_detected, make_voc


class Folder(PathHandler):
    """A local folder as ``mem://``, with what a handler at least has and Detectron2 calls."""

    root: Path

    def _get_supported_prefixes(self) -> list[str]:
        return ["mem://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        return os.path.join(self.root, path.removeprefix("mem://"))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)

    def _exists(self, path: str, **kwargs) -> bool:
        return os.path.exists(self._get_local_path(path))

    def _isfile(self, path: str, **kwargs) -> bool:
        return os.path.isfile(self._get_local_path(path))

    def _mkdirs(self, path: str, **kwargs) -> None:
        os.makedirs(self._get_local_path(path), exist_ok=True)


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Path:
    """The folder behind ``mem://``; a file below a folder ``mem:`` was not opened by a handler."""
    Folder.root = tmp_path / "remote"
    Folder.root.mkdir()
    PathManager.register_handler(Folder(), allow_override=True)
    monkeypatch.chdir(tmp_path)
    yield Folder.root
    assert not Path("mem:").exists()


@pytest.fixture
def images(remote) -> str:
    """A registered set of which all is remote."""
    tiny.make_images(remote)
    yield from registered("remote", register_coco_instances, {}, "mem://set.json", "mem://set")


def registered(name: str, register, *args):
    register(name, *args)
    yield name
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(name)
    _known.pop(name, None)


@pytest.fixture
def voc(remote) -> str:
    make_voc(remote, "voc", minimal=False)
    args = ("mem://voc/", "all", 2007, tiny.CLASSES)
    yield from registered("remote_voc", register_pascal_voc, *args)


def command(images: str, *opts: str) -> list[str]:
    sets = f"DATASETS.TRAIN ('{images}',) DATASETS.TEST ('{images}',) MODEL.ROI_HEADS.NUM_CLASSES 2"
    line = tiny.arguments("fpn", "mem://run", sets, "SOLVER.MAX_ITER 2", *opts, train=None)
    config = tiny.CONFIGS / line[1]
    (Folder.root / "mine.yaml").write_bytes(config.read_bytes())
    return [line[0], "mem://mine.yaml", *line[2:]]


def test_a_run_of_which_all_is_remote(images, remote, monkeypatch):
    monkeypatch.setattr(Trainer, "build_writers", lambda self: [])  # TensorBoard's knows no handler
    line = command(images, "MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.PSKD.TEACHER memory")
    tiny.main(line)
    out = remote / "run"
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    saved = torch.load(out / "model_final.pth", weights_only=True)
    assert "memory" in saved["trainer"]["hooks"]["PSKDHook"]
    results = tiny.results(out)
    assert {"bbox", "confidence", "ground_truth_rois"} <= results.keys()
    assert (out / "inference" / "confidence.npz").is_file()
    shown = json.loads((out / "inference" / "test_images.json").read_text())
    assert len(shown) == 8  # opened through the handler

    tiny.main(["--resume", *line])  # has nothing left to train
    weights = "MODEL.WEIGHTS mem://run/model_final.pth"
    tiny.main(["--eval-only", *command(images, weights)])
    assert "bbox" in tiny.results(out, "evaluation")


def test_a_lazy_evaluation_of_which_all_is_remote(images, remote):
    config = Path(tiny.__file__).with_name("lazy_tiny.py").read_text()
    recipes = "Path(__file__).resolve().parents[2]"
    assert recipes in config
    (remote / "mine.py").write_text(config.replace(recipes, f"Path({str(tiny.ROOT)!r})"))
    cfg = LazyConfig.load("mem://mine.py")
    cfg.model.roi_heads.num_classes = 2
    torch.save({"model": instantiate(cfg.model).state_dict()}, remote / "weights.pth")
    opts = [
        f"dataloader.test.dataset.names={images}",
        "dataloader.train.dataset.names=",
        "model.roi_heads.num_classes=2",
        "train.init_checkpoint=mem://weights.pth",
        "train.output_dir=mem://run",
    ]
    tiny.main(["--eval-only", "--config-file", "mem://mine.py", *opts])
    assert "ground_truth_rois" in tiny.results(remote / "run", "evaluation")


def test_a_remote_voc_set(voc, remote):
    evaluators = [*build_evaluators(voc, "mem://run"), ConfidenceEvaluator(voc, "mem://run")]
    records = DatasetCatalog.get(voc)
    for evaluator in evaluators:
        evaluator.reset()
        evaluator.process(records, [as_detected(record) for record in records])
    ap, confidence = (evaluator.evaluate() for evaluator in evaluators)
    assert ap["voc"]["AP"] == pytest.approx(100)
    assert confidence["confidence"]["num_matched"] == 14
    assert len(json.loads((remote / "run" / "test_images.json").read_text())) == 8


def test_a_spec_with_a_remote_output_folder(remote, tmp_path):
    spec = tiny.make_images(tmp_path)
    register_spec(spec, "mem://run")
    assert len(DatasetCatalog.get(spec)) == 8


def test_names_of_configs_that_only_path_managers_handlers_know(remote):
    assert recipe_path("detectron2://configs/a.yaml") == "detectron2://configs/a.yaml"
    with pytest.raises(ValueError, match="--config-file: expected a YAML .*none.yaml"):
        load_config("mem://none.yaml")


@pytest.mark.parametrize("spec", ["coco:mem://set.json:mem://set", "voc:mem://voc:train"])
def test_a_remote_spec_is_refused(spec):
    with pytest.raises(ValueError, match="dataset: expected local paths in coco:.*:mem:"):
        load_dataset(spec)
