"""The networks of the PS-KD paper's CIFAR table, as the authors' code builds them.

They differ from the pre-activation ResNets of He et al.: batch norm and ReLU follow the stem and do
not precede the pooling, every shortcut starts at the activated input, and weights have torch's
default initialisation. What the table calls PreAct ResNet-101 has its activations *after* the
convolutions.

Shapes: N images, C classes; images are (N, 3, H, W) with H and W of 32 pixels or so.

Source: github.com/lgcnsai/PS-KD-Pytorch, models/preact_resnet.py at 9aa0828, read for its
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pskd_classification.preact_resnet import Block, PreActBlock, build_stages

__all__ = ["PublishedResNet", "preact_resnet18_published", "preact_resnet101_published"]


class ActivatedShortcutBlock(PreActBlock):
    """A pre-activation block whose identity, too, carries the activated input."""

    activates_identity = True


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norm after each, as in the ResNets of 2015."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + self.shortcut(x))


class PublishedResNet(nn.Module):
    """Four stages of blocks after a 3x3 stem with batch norm and ReLU.

    Args:
        block: of this module.
        blocks: of each stage.
        num_classes: C.
        dropout: probability before the classifier; the paper has none.
    """

    def __init__(
        self, block: Block, blocks: Sequence[int], num_classes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        stages, channels = build_stages(block, blocks, 64)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # of 32 pixels 4x4 are left
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def preact_resnet18_published(num_classes: int, dropout: float = 0.0) -> PublishedResNet:
    """What the paper's table calls PreAct ResNet-18, 11.2 million weights."""
    return PublishedResNet(ActivatedShortcutBlock, (2, 2, 2, 2), num_classes, dropout=dropout)


def preact_resnet101_published(num_classes: int, dropout: float = 0.0) -> PublishedResNet:
    """What the paper's table calls PreAct ResNet-101, 42.7 million weights."""
    return PublishedResNet(BottleneckBlock, (3, 4, 23, 3), num_classes, dropout=dropout)
