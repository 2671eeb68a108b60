"""Heads, predictors and mappers that a user derives from those of PS-KD, by YAML and lazily."""

from __future__ import annotations

from pathlib import Path

import detectron2_tiny as tiny
import pytest
from detectron2.config import LazyConfig, configurable
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNOutputLayers, StandardROIHeads
from pskd_detectron2 import (
    PSKDCascadeROIHeads,
    PSKDDatasetMapper,
    PSKDFastRCNNOutputLayers,
    PSKDRes5ROIHeads,
    PSKDROIHeads,
)

#: Two epochs, so that the second has a teacher.
SHORT = "MODEL.PSKD.EPOCH_ITERS 2 SOLVER.MAX_ITER 4"
#: Two batches are the eight images: the second epoch meets again what the first one saw.
TWICE = "dataloader.train.total_batch_size=4"


class Layers(PSKDFastRCNNOutputLayers):
    """An output layer of a user's own."""


class StockLayers(FastRCNNOutputLayers):
    """An output layer that does not know of PS-KD."""


class Heads(PSKDROIHeads):
    """Derived as by the README."""


class HeadsThatSetLayers(PSKDROIHeads):
    """A predictor that is set after `__init__`, and an option of its own."""

    @configurable
    def __init__(self, *, layers, **kwargs) -> None:
        super().__init__(**kwargs)
        self.box_predictor = layers

    @classmethod
    def from_config(cls, cfg, input_shape):
        options = super().from_config(cfg, input_shape)
        return options | {"layers": FastRCNNOutputLayers(cfg, options["box_head"].output_shape)}


class HeadsOfOldStyle(PSKDROIHeads):
    def __init__(self, cfg, input_shape) -> None:
        super().__init__(cfg, input_shape)


class Cascade(PSKDCascadeROIHeads):
    pass


class Res5(PSKDRes5ROIHeads):
    pass


class _Layers:
    """Heads with a predictor of class `layers`."""

    layers: type

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        return parts | {"box_predictor": cls.layers(cfg, parts["box_head"].output_shape)}


class HeadsWithLayers(_Layers, PSKDROIHeads):
    layers = Layers


class HeadsWithStockLayers(_Layers, PSKDROIHeads):
    layers = StockLayers


class StockHeadsWithLayers(_Layers, StandardROIHeads):
    layers = Layers


class StockHeads(_Layers, StandardROIHeads):
    layers = FastRCNNOutputLayers


class Mapper(PSKDDatasetMapper):
    """A mapper of a user's own, for the memory teacher."""


@pytest.fixture
def named(monkeypatch):
    def register(heads: type) -> str:
        monkeypatch.setitem(ROI_HEADS_REGISTRY._obj_map, heads.__name__, heads)
        return f"MODEL.ROI_HEADS.NAME {heads.__name__}"

    return register


@pytest.mark.parametrize(
    "kind, heads",
    [
        ("fpn", Heads),
        ("fpn", HeadsWithLayers),
        ("fpn", HeadsOfOldStyle),
        ("c4", Res5),
        ("cascade", Cascade),
    ],
)
def test_derived_heads_have_a_teacher(kind, heads, named, spec, tmp_path):
    out = tiny.run(kind, tmp_path, SHORT, named(heads), train=spec)
    last = tiny.metrics(out)[-1]
    assert last["stage0/pskd/teacher_nll" if kind == "cascade" else "pskd/teacher_nll"] > 0


@pytest.mark.parametrize(
    "heads, message",
    [
        (HeadsWithStockLayers, "subclass of PSKDFastRCNNOutputLayers, got StockLayers"),
        (HeadsThatSetLayers, "HeadsThatSetLayers's arguments, got FastRCNNOutputLayers, which was"),
    ],
)
def test_a_predictor_that_would_lose_its_loss_is_refused(heads, message, named, spec, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny.run("fpn", tmp_path, named(heads), train=spec)


@pytest.mark.parametrize("heads", [HeadsWithStockLayers, StockHeadsWithLayers])
def test_without_pskd_any_predictor_trains_as_the_stock_one(heads, named, spec, tmp_path):
    weights = []
    for name, head in (("own", heads), ("stock", StockHeads)):
        opts = ("MODEL.PSKD.ENABLED False", named(head), "SOLVER.MAX_ITER 2")
        weights.append(tiny.checkpoint(tiny.run("fpn", tmp_path / name, *opts, train=spec)))
    assert tiny.differing(*(state["model"] for state in weights)) == []


def test_derived_heads_layers_and_mapper_of_a_lazy_config(spec, tmp_path):
    cfg = LazyConfig.load(str(Path(__file__).with_name("lazy_tiny.py")))
    cfg.model.roi_heads._target_ = Heads
    cfg.model.roi_heads.box_predictor._target_ = Layers
    cfg.dataloader.train.mapper._target_ = Mapper
    cfg.train.pskd.update(teacher="memory", epoch_iters=2)
    config, words = tiny.lazy_file(cfg, tmp_path), ("train.max_iter=4", TWICE)
    tiny.main(tiny.lazy_arguments(tmp_path, *words, config=config, train=spec, test=spec))
    assert any(line.get("pskd/teacher_nll", 0) > 0 for line in tiny.metrics(tmp_path))
    assert "bbox" in tiny.results(tmp_path)
