"""What Detectron2 itself does not keep over a stop: the place in the data, random states.

Its own sampler starts its stream anew after ``--resume``: the images at the head of the stream are
seen again and others not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase
from pskd_detection.coco_format import is_remote

from pskd_tools.files import written_aside


class ResumableTrainingSampler(TrainingSampler):
    """`TrainingSampler` that can start anywhere in its stream (``DATALOADER.SAMPLER_TRAIN``).

    Without aspect-ratio grouping the batches after a resume are those of the run that was not
    stopped, whatever the number of workers; with it, images that wait in a bucket at the stop are
    skipped.
    """

    start = 0

    def start_at(self, num_images: int) -> None:
        """Skip the first images of the stream, counted over all processes."""
        self.start = num_images

    def __iter__(self) -> Iterator[int]:
        first = self.start + self._rank
        yield from itertools.islice(self._infinite_indices(), first, None, self._world_size)


class RandomStateHook(HookBase):
    """Keeps the random states of Python, numpy and torch in the checkpoint, those of rank 0.

    With `ResumableTrainingSampler`, one process, ``NUM_WORKERS 0`` and no aspect-ratio grouping a
    resumed run equals the one that was not stopped, ROI sampling and augmentations included.
    """

    def __init__(self) -> None:
        self._loaded: dict | None = None

    def state_dict(self) -> dict:
        return _random_state()

    def load_state_dict(self, state: dict) -> None:
        self._loaded = state

    def before_step(self) -> None:
        if self._loaded is not None:
            _set_random_state(self._loaded)
            self._loaded = None


@contextlib.contextmanager
def same_random_state_after() -> Iterator[None]:
    """Leave the random states as they were: an evaluation draws numbers too.

    It follows the checkpoint of its iteration, and a run that is resumed there skips it.
    """
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)


def _random_state() -> dict:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # what legacy means
    kind, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class NamingCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that names a file that is missing or damaged in a ValueError."""

    def load(self, path: str, *args, **kwargs) -> dict:
        local = path and self.path_manager.get_local_path(path.partition("?")[0])
        if path and not os.path.isfile(local):
            raise ValueError(f"{path}: expected weights or a checkpoint, got no file")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except Exception as error:  # of pickle, zip files and torch, of many kinds
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ValueError(
                f"{filename}: expected weights or a checkpoint, got {reason}"
            ) from error


class EvaluationCheckpointer(NamingCheckpointer):
    """`NamingCheckpointer` that refuses weights of other shapes, such as of other classes.

    The stock one leaves them out, and the random weights in their place would be evaluated.
    """

    def _log_incompatible_keys(self, incompatible) -> None:
        super()._log_incompatible_keys(incompatible)
        for name, found, expected in incompatible.incorrect_shapes:
            raise ValueError(
                f"weights: expected {name} of shape {tuple(expected)}, got {tuple(found)}; if the "
                "test set lacks classes of the training set, --train names these"
            )


class AsideCheckpointer(NamingCheckpointer):
    """`NamingCheckpointer` that writes aside and renames: a stop leaves no half-written file.

    To a remote folder it writes as the stock one does.
    """

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        if is_remote(self.save_dir):  # where nothing can be renamed
            super().save(name, **kwargs)
            super().tag_last_checkpoint(f"{name}.pth")
            return
        path = Path(self.save_dir, f"{name}.pth")
        with written_aside(path) as aside:
            super().save(aside.stem, **kwargs)
        with written_aside(path.with_name("last_checkpoint")) as aside:
            aside.write_text(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Called by the stock ``save`` before the file has its name: `save` writes the tag."""
