"""fairseq plugin: ``fairseq-train DATA --user-dir translation/pskd_fairseq --criterion pskd``."""

from pskd_fairseq.criterion import PSKDCriterion
from pskd_fairseq.safe_types import allow_fairseq_types

allow_fairseq_types()

__all__ = ["PSKDCriterion"]
