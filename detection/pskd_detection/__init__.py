"""What the detection adapters share: data sets, AP, confidence of detections, results.

Needs numpy, pycocotools, Pillow, for plots matplotlib, and the core; neither torchvision nor
Detectron2.
"""

from pskd_detection.confidence import DetectionConfidence
from pskd_detection.datasets import DetectionDataset, add_dataset_arguments, load_dataset
from pskd_detection.detections import Detections
from pskd_detection.evaluation import average_precision
from pskd_detection.results import write_detections, write_results
from pskd_detection.voc_format import write_voc

__all__ = [
    "DetectionConfidence",
    "DetectionDataset",
    "Detections",
    "add_dataset_arguments",
    "average_precision",
    "load_dataset",
    "write_detections",
    "write_results",
    "write_voc",
]
