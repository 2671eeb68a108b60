"""The shipped LazyConfig with PS-KD, made narrow: a config that a user derives from it."""

from pathlib import Path

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet

_recipes = Path(__file__).resolve().parents[2] / "configs" / "detection"
_shipped = LazyConfig.load(str(_recipes / "mask_rcnn_R_50_FPN_1x_pskd.py"))
dataloader = _shipped.dataloader
lr_multiplier = _shipped.lr_multiplier
model = _shipped.model
optimizer = _shipped.optimizer
train = _shipped.train

_width = 16
_backbone = model.backbone.bottom_up
_backbone.freeze_at = 0
_backbone.stem.norm = "BN"  # FrozenBN diverges from random weights
_backbone.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=1,
        stride_per_block=[_stride],
        in_channels=_in,
        out_channels=_out,
        norm="BN",
    )
    for _stride, _in, _out in ((1, 64, 16), (2, 16, 24), (2, 24, 32), (2, 32, 48))
]
model.backbone.out_channels = _width
model.proposal_generator.head.in_channels = _width
model.proposal_generator.pre_nms_topk = model.proposal_generator.post_nms_topk = (50, 20)
_heads = model.roi_heads
_heads.batch_size_per_image = 16
_heads.box_head.input_shape.channels = _heads.mask_head.input_shape.channels = _width
_heads.box_head.fc_dims = [_width]
_heads.box_predictor.input_shape.channels = _width
_heads.mask_head.conv_dims = [8, 8]
model.pixel_std = [57.0, 57.0, 57.0]

for _loader in (dataloader.train, dataloader.test):
    _loader.num_workers = 0
dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
train.device = "cpu"
train.init_checkpoint = ""
train.seed = 1
