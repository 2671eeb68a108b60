"""PS-KD in Detectron2: importing it registers the ROI heads.

`add_pskd_config` adds the keys, `PSKDHook` drives alpha and the teacher, `Trainer` has it all.
"""

from pskd_detectron2.config import add_pskd_config, check_pskd_config, load_config
from pskd_detectron2.data import PSKDDatasetMapper
from pskd_detectron2.evaluation import ConfidenceEvaluator
from pskd_detectron2.fast_rcnn import PSKDFastRCNNOutputLayers
from pskd_detectron2.hooks import PSKDHook
from pskd_detectron2.registered import register_spec
from pskd_detectron2.resume import AsideCheckpointer, RandomStateHook, ResumableTrainingSampler
from pskd_detectron2.roi_heads import PSKDCascadeROIHeads, PSKDRes5ROIHeads, PSKDROIHeads
from pskd_detectron2.trainer import Trainer

__all__ = [
    "AsideCheckpointer",
    "ConfidenceEvaluator",
    "PSKDCascadeROIHeads",
    "PSKDDatasetMapper",
    "PSKDFastRCNNOutputLayers",
    "PSKDHook",
    "PSKDROIHeads",
    "PSKDRes5ROIHeads",
    "RandomStateHook",
    "ResumableTrainingSampler",
    "Trainer",
    "add_pskd_config",
    "check_pskd_config",
    "load_config",
    "register_spec",
]
