"""PS-KD for image classification: data, models, mixing, the training loop of train.py."""

from pskd_classification.data import Images, Splits, load_splits
from pskd_classification.evaluation import measure, predict, rows_of
from pskd_classification.mixing import Mixer
from pskd_classification.models import build_model
from pskd_classification.objective import Objective, VirtualTeacher
from pskd_classification.training import Trainer

__all__ = [
    "Images",
    "Mixer",
    "Objective",
    "Splits",
    "Trainer",
    "VirtualTeacher",
    "build_model",
    "load_splits",
    "measure",
    "predict",
    "rows_of",
]
