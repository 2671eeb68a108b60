"""fairseq plugin: ``fairseq-train DATA --user-dir translation/pskd_fairseq --criterion pskd``."""

from pskd_fairseq import checkpoint
from pskd_fairseq.criterion import PSKDCriterion

checkpoint.allow_fairseq_types()

__all__ = ["PSKDCriterion"]
