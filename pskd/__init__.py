"""Progressive self-knowledge distillation: a model's targets softened by its own past predictions.

The core needs torch and numpy only. The adapters are packages of their own: ``pskd_fairseq``
(machine translation).
"""

from pskd.loss import PSKDStats, gradient_rescaling, pskd_cross_entropy
from pskd.schedule import constant_alpha, cosine_alpha, linear_alpha
from pskd.targets import TopK, mix_targets
from pskd.teacher import SnapshotTeacher

from pskd.version import __version__

__all__ = [
    "PSKDStats",
    "SnapshotTeacher",
    "TopK",
    "constant_alpha",
    "cosine_alpha",
    "gradient_rescaling",
    "linear_alpha",
    "mix_targets",
    "pskd_cross_entropy",
]
