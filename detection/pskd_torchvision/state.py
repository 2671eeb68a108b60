"""What the heads ask and `PSKDEpochs` sets: alpha and the teacher."""

from __future__ import annotations

from torch import Tensor, nn

from pskd import SnapshotTeacher
from pskd.stats import TeacherMeans


class PSKDState:
    """Alpha and teacher of one model.

    No `nn.Module`: it adds nothing to the model's parameters, state dict, optimizer or DDP buckets.

    Attributes:
        foreground_only: background ROIs keep their hard target.
        label_smoothing: torch's, of the hard part, over all K + 1 classes.
        alpha: weight of the teacher in this epoch; 0 in the first.
        snapshot: last epoch's model, a module dict of ``backbone`` and ``roi_heads``.
        images: (N, 3, H, W) the batch as the student's backbone sees it, between transform and
            heads of a training step that has a teacher; else None.
        means: what the teacher did since they were last taken, under names ``pskd/...``.
    """

    def __init__(self, foreground_only: bool = False, label_smoothing: float = 0.0) -> None:
        self.foreground_only = foreground_only
        self.label_smoothing = label_smoothing
        self.alpha = 0.0
        self.snapshot = SnapshotTeacher()
        self.images: Tensor | None = None
        self.means = TeacherMeans()

    def __reduce__(self) -> tuple:
        # A copy of the model (the teacher's own, an average of weights, a pickle) does not drag a
        # teacher on.
        return PSKDState, (self.foreground_only, self.label_smoothing)

    @property
    def active(self) -> bool:
        """Whether this step has a teacher to learn from."""
        return self.alpha > 0.0 and self.snapshot.available

    def keep_images(self, transform: nn.Module, args: tuple, output: tuple) -> None:
        """Forward hook of the model's transform, which resizes at random and so runs only once.

        A bound method: in a copy of the model it belongs to the copy's state.
        """
        if transform.training and self.active:
            self.images = output[0].tensors
