"""TorchScript of PSKD models, wherever Detectron2 exports the stock one."""

from __future__ import annotations

import copy

import detectron2_tiny as tiny
import pytest
import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes
from detectron2.utils.testing import assert_instances_allclose
from pskd_detectron2 import PSKDHook, PSKDROIHeads, Trainer
from torch import Tensor

FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": Tensor,
    "pred_boxes": Boxes,
    "scores": Tensor,
    "pred_classes": Tensor,
    "pred_masks": Tensor,
}
IMAGES = [{"image": torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(i)) * 255}
          for i in range(2)]  # fmt: skip


class HeadsOfAUser(PSKDROIHeads):
    """Heads that are derived, as the README says."""


@pytest.fixture
def built(tmp_path_factory):
    def build(kind: str, *opts: object):
        spec = tiny.make_images(tmp_path_factory.mktemp("images"))
        cfg = tiny.config(kind, tmp_path_factory.mktemp("run"), *opts, train=spec)
        model = Trainer.build_model(cfg).eval()
        if cfg.MODEL.PSKD.ENABLED:  # as after a training in this process
            PSKDHook(model, epoch_iters=3)
        return model

    return build


@pytest.mark.parametrize(
    "kind, opts",
    [
        ("fpn", ""),
        ("fpn", "MODEL.PSKD.ENABLED False"),
        ("fpn", "MODEL.ROI_HEADS.NAME HeadsOfAUser"),
        ("mask", ""),
        ("c4", "MODEL.MASK_ON True"),  # without a mask head Detectron2 cannot script C4's heads
    ],
)
@torch.no_grad()
def test_a_scripted_model_detects_as_the_eager_one(kind, opts, built, monkeypatch):
    monkeypatch.setitem(ROI_HEADS_REGISTRY._obj_map, "HeadsOfAUser", HeadsOfAUser)
    model = built(kind, opts)
    assert (type(model.roi_heads) is HeadsOfAUser) == opts.endswith("OfAUser")
    expected = model.inference(IMAGES, do_postprocess=False)[0]
    assert len(expected)
    scripted = scripting_with_instances(copy.deepcopy(model), FIELDS)
    assert_instances_allclose(expected, scripted.inference(IMAGES, do_postprocess=False)[0])


@pytest.mark.parametrize("kind", ["mask", "c4", "cascade"])
@torch.no_grad()
def test_a_traced_model_detects_as_the_eager_one(kind, built):
    model = built(kind)

    def inference(model, image):
        return model.inference([{"image": image}], do_postprocess=False)[0]

    wrapper = TracingAdapter(model, IMAGES[0]["image"], inference)
    with patch_builtin_len():
        traced = torch.jit.trace(wrapper, wrapper.flattened_inputs)
    image = IMAGES[1]["image"]
    expected = inference(model, image)
    assert len(expected)
    found = wrapper.outputs_schema(traced(image))
    assert_instances_allclose(expected, found, size_as_tensor=True)
