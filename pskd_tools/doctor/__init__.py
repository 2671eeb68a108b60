"""What `pskd doctor` knows: what is installed, what really loads, what does not fit together.

Gathering and judging are apart. `gather` reads versions through `importlib.metadata` and tries each
part in a Python process of its own, since importing a framework takes seconds and can crash the
interpreter; `diagnose` is a pure function from that `Environment` to a `Report`. So nothing here
may import torch: a torch that does not load is one of the findings.

A part is *present* where its framework and pskd's adapter for it are both found; for detection
Detectron2 or torchvision is enough, for the integrations Lightning, timm, transformers or trl.
Classification needs torchvision and scikit-learn: what has only one of them was installed for
another part.
"""

from pskd_tools.doctor.environment import Attempt, Environment, Probe, gather, release
from pskd_tools.doctor.parts import PARTS
from pskd_tools.doctor.rules import SEVERITIES, Finding, Report, diagnose

__all__ = [
    "PARTS",
    "SEVERITIES",
    "Attempt",
    "Environment",
    "Finding",
    "Probe",
    "Report",
    "diagnose",
    "gather",
    "release",
]
