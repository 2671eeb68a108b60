"""Which tokens of the Trainer's data have rows, and what a model is called with for its logits.

Shapes: B sequences of a batch, T positions, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pskd import TokenRows
from pskd.criterion.base import IGNORED

__all__ = ["DataTokens", "classes_of", "shifts_labels", "without_labels"]

_LABELS = ("labels", "label", "label_ids")


def classes_of(model) -> int:
    """Return how many classes the model's logits have."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return model.config.num_labels if head is None else len(head.weight)


def shifts_labels(model) -> bool:
    """Return whether logits are for the next position's label; as the Trainer's smoothing finds."""
    bare = getattr(model, "get_base_model", lambda: model)()  # of peft
    return type(bare).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def without_labels(model, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what gives the logits alone; the inputs of a decoder are made of the labels."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    is_pair = getattr(model.config, "is_encoder_decoder", False) and inputs["labels"].dim() > 1
    if not is_pair or "decoder_input_ids" in rest:
        return rest
    if (make := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is None:
        return dict(inputs)  # it makes them itself, and a loss that nobody takes
    return rest | {"decoder_input_ids": make(labels=inputs["labels"])}


class DataTokens:
    """The tokens of a data set that have rows: those whose label counts.

    Where a collator makes the labels it is all tokens of the input.

    Args:
        rows: of the tokens.
        has_labels: whether the data set has them.
    """

    def __init__(self, rows: TokenRows, has_labels: bool) -> None:
        self.rows, self._has_labels = rows, has_labels

    @classmethod
    def found(cls, data, num_classes: int, lengths: Sequence[int] | None) -> "DataTokens | None":
        """Return those of a data set of mappings; None where a sample has one label.

        Args:
            data: a sample has labels, or ``input_ids`` to make them of.
            num_classes: C, below which labels are.
            lengths: how many such tokens each sequence has; None to count them.

        Raises:
            ValueError: for labels that are no classes, or lengths that do not fit.
        """
        with torch.random.fork_rng([]):  # a sample may be augmented at random
            first = data[0]
        names = (*_LABELS, "input_ids") if isinstance(first, Mapping) else ()
        key = next((name for name in names if first.get(name) is not None), None)
        if key is None or not np.ndim(first[key]):
            return None
        has_labels = key in _LABELS
        if lengths is not None:
            if len(lengths) != len(data):
                raise ValueError(f"lengths: expected {len(data)} sequences, got {len(lengths)}")
            return cls(TokenRows(lengths), has_labels)
        ignored = IGNORED
        if not has_labels and "attention_mask" in first:
            key, ignored = "attention_mask", 0
        is_table = hasattr(data, "column_names")  # of the library datasets
        values = data[key] if is_table else (data[row][key] for row in range(len(data)))
        looked_at = num_classes if has_labels else None
        return cls(TokenRows.of_labels(values, looked_at, ignored), has_labels)

    def of_batch(self, ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the (B, T) rows of a batch, and which tokens have one, as `TokenRows.rows`."""
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        if self._has_labels or mask is None or mask.shape != labels.shape:
            mask = labels != IGNORED
        return self.rows.rows(ids, mask.bool())
