"""Detectron2's Mask R-CNN R50-FPN 1x on COCO as a LazyConfig, with PS-KD."""

from pskd_detectron2 import PSKDROIHeads
from pskd_detectron2.lazy import load_recipe

_recipe = load_recipe("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader = _recipe.dataloader
lr_multiplier = _recipe.lr_multiplier
model = _recipe.model
optimizer = _recipe.optimizer
train = _recipe.train

model.roi_heads._target_ = PSKDROIHeads
train.pskd = dict(alpha_final=0.7, alpha_schedule="linear")
