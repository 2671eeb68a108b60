"""Progressive self-knowledge distillation: a model's targets softened by its own past predictions.

The core needs torch and numpy only. Tools for train scripts and the ``pskd`` command are in
``pskd_tools``; each framework has a package of its own, such as ``pskd_detectron2``.
"""

from pskd import calibration as calibration
from pskd.criterion import MemoryCriterion, SnapshotCriterion
from pskd.linear import LinearStats, LinearTeacher, pskd_linear_cross_entropy
from pskd.loss import PSKDStats, pskd_cross_entropy
from pskd.memory import PredictionMemory
from pskd.rows import WithRows
from pskd.schedule import constant_alpha, cosine_alpha, linear_alpha
from pskd.stats import ExampleStats, gradient_rescaling
from pskd.targets import TopK, mix_targets
from pskd.teachers import SnapshotTeacher
from pskd.token_rows import TokenRows
from pskd.version import __version__ as __version__

__all__ = [
    "ExampleStats",
    "LinearStats",
    "LinearTeacher",
    "MemoryCriterion",
    "PSKDStats",
    "PredictionMemory",
    "SnapshotCriterion",
    "SnapshotTeacher",
    "TokenRows",
    "TopK",
    "WithRows",
    "constant_alpha",
    "cosine_alpha",
    "gradient_rescaling",
    "linear_alpha",
    "mix_targets",
    "pskd_cross_entropy",
    "pskd_linear_cross_entropy",
]
