"""PS-KD for torchvision's Faster and Mask R-CNN.

With two additions any training loop will do:

    model = add_pskd(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21))
    epochs = PSKDEpochs(model, num_epochs=26, alpha_final=0.7)
    for epoch in range(1, 27):
        epochs.begin_epoch(epoch)
        ...  # as before

`Trainer` and `evaluate` are those of train_torchvision.py.
"""

from pskd_torchvision.build import build_detector, load_weights, model_names
from pskd_torchvision.data import DetectionImages
from pskd_torchvision.epoch import PSKDEpochs
from pskd_torchvision.evaluation import evaluate
from pskd_torchvision.roi_heads import PSKDRoIHeads, add_pskd
from pskd_torchvision.state import PSKDState
from pskd_torchvision.training import LearningRate, Trainer

__all__ = [
    "DetectionImages",
    "LearningRate",
    "PSKDEpochs",
    "PSKDRoIHeads",
    "PSKDState",
    "Trainer",
    "add_pskd",
    "build_detector",
    "evaluate",
    "load_weights",
    "model_names",
]
