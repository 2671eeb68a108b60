"""Residual networks for small images: pre-activation ResNets, and those of the PS-KD paper.

The published networks differ from the pre-activation ResNets of He et al.: batch norm and ReLU
follow the stem and do not precede the pooling, every shortcut starts at the activated input, and
weights have torch's default initialisation. What the paper's table calls PreAct ResNet-101 has its
activations *after* the convolutions.

Shapes: N images, C classes; images are (N, 3, H, W) with H and W of 32 pixels or so.

Source of the published networks: github.com/lgcnsai/PS-KD-Pytorch, models/preact_resnet.py at
9aa0828, read for its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

__all__ = ["NETWORKS", "BottleneckBlock", "SmallResNet"]


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after its batch norm and ReLU, beside a shortcut."""

    expansion = 1
    activates_identity = False  # He et al.'s carries what came in

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        if self.shortcut is not None:
            identity = self.shortcut(activated)
        else:
            identity = activated if self.activates_identity else x
        return self.conv2(self.relu(self.bn2(self.conv1(activated)))) + identity


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


class SmallResNet(nn.Module):
    """Four stages of residual blocks after a 3x3 stem; each but the first halves the resolution.

    Args:
        block: of which the stages are.
        blocks: of each stage.
        num_classes: C.
        width: channels of the first stage; each further stage has twice as many.
        stem_stride: 1 keeps the resolution, 2 halves it.
        published: batch norm and ReLU after the stem, and not before the pooling; torch's
            initialisation.
        dropout: probability before the classifier.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks".
    """

    def __init__(
        self,
        block: type[PreActBlock] | type[BottleneckBlock],
        blocks: Sequence[int],
        num_classes: int,
        *,
        width: int = 64,
        stem_stride: int = 1,
        published: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False)
        if published:
            self.bn1 = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            layers = []
            for number in range(count):
                layers.append(block(channels, width * 2**stage, 2 if stage and not number else 1))
                channels = width * 2**stage * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        if not published:
            self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        self._published = published
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not published:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        x = self.relu(self.bn1(x)) if self._published else x
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x if self._published else self.relu(self.bn(x))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


#: By name, called with C and ``dropout``.
NETWORKS = {
    # 11.2 million weights.
    "preact_resnet18": partial(SmallResNet, PreActBlock, (2, 2, 2, 2)),
    # Half the blocks and resolution, 0.7 million weights: for a CPU core.
    "preact_resnet10_tiny": partial(
        SmallResNet, PreActBlock, (1, 1, 1, 1), width=24, stem_stride=2
    ),
    # What the paper's table calls PreAct ResNet-18 and ResNet-101, 11.2 and 42.7 million weights.
    "preact_resnet18_published": partial(
        SmallResNet, ActivatedShortcutBlock, (2, 2, 2, 2), published=True
    ),
    "preact_resnet101_published": partial(
        SmallResNet, BottleneckBlock, (3, 4, 23, 3), published=True
    ),
}
