"""What the heads ask and the hook sets: alpha and the teacher."""

from __future__ import annotations

from pskd import SnapshotTeacher
from pskd_detectron2.memory import AnnotationMemory


class PSKDState:
    """Alpha and teacher of one model, shared by its heads, its predictors and `PSKDHook`.

    No `nn.Module`: it adds nothing to the model's parameters, state dict, optimizer or DDP buckets.

    Attributes:
        alpha: weight of the teacher in this epoch; 0 in the first.
        snapshot: last epoch's model, a module dict of ``backbone`` and ``roi_heads``.
        memory: last epoch's predictions by annotation, or None with the snapshot teacher.
        is_driven: whether a hook was made for the model; without one there is never a teacher.
        rows_per_stage: stage s of a cascade has its rows from ``s * rows_per_stage`` on.
    """

    def __init__(
        self, enabled: bool = True, foreground_only: bool = False, label_smoothing: float = 0.0
    ) -> None:
        self.enabled = enabled
        self.foreground_only = foreground_only
        self.label_smoothing = label_smoothing
        self.alpha = 0.0
        self.snapshot = SnapshotTeacher()
        self.memory: AnnotationMemory | None = None
        self.is_driven = False
        self.rows_per_stage = 0

    def __deepcopy__(self, memo: dict) -> PSKDState:
        # A copy of the model (the teacher's own, an average of weights) does not drag a teacher on.
        return PSKDState(self.enabled, self.foreground_only, self.label_smoothing)
