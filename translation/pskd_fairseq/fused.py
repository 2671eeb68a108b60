"""``--pskd-fused-linear``: which models allow a loss from the decoder's features.

The loss is then made of the features and the output embedding (`pskd.pskd_linear_cross_entropy`),
and the logits of a batch never exist whole.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from fairseq.models import BaseFairseqModel, FairseqLanguageModel
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

_FLAG = "--pskd-fused-linear"


class FeaturesOnly:
    """A model that stops before its output layer; what fairseq's criterion calls of one.

    Args:
        model: a Transformer, bare or in fairseq's wrappers for several processes.

    Raises:
        ValueError: if the model's distribution is not that of its features and its embedding.
    """

    def __init__(self, model) -> None:
        _check_model(model)
        self.model = model
        self.projection: nn.Linear = model.decoder.output_projection

    def __call__(self, **net_input):
        """Return features, (B, T, H), in place of logits, and what else the model returns."""
        return self.model(**net_input, features_only=True)

    def get_targets(self, sample, net_output) -> Tensor:
        return self.model.get_targets(sample, net_output)

    @torch.no_grad()
    def logits_of_first(self, net_output) -> tuple:
        """Return the output with the logits of its first position, (1, 1, V), for a check."""
        features, *others = net_output
        weight, bias = self.projection.weight, self.projection.bias
        return F.linear(features[:1, :1], weight, bias), *others

    def refused_distribution(self) -> ValueError:
        """Return the error for a model that makes its probabilities in another way."""
        return ValueError(
            f"{_FLAG}: expected a model whose distribution is the softmax of its output layer, got "
            f"{_name(self.model)} with its own"
        )


def _check_model(model) -> None:
    decoder = getattr(model, "decoder", None)
    if not _takes_features_only(_bare(model)) or decoder is None:
        raise ValueError(
            f"{_FLAG}: expected a model that takes features_only (transformer), got {_name(model)}"
        )
    if getattr(decoder, "adaptive_softmax", None) is not None:
        raise ValueError(f"{_FLAG}: expected no --adaptive-softmax-cutoff, got an adaptive softmax")
    # A decoder with an output layer of its own may do more than one product with the embedding.
    output_layer = getattr(getattr(decoder, "output_layer", None), "__func__", None)
    if output_layer is not TransformerDecoderBase.output_layer:
        raise ValueError(
            f"{_FLAG}: expected the output layer of fairseq's Transformer, got that of "
            f"{type(decoder).__name__}"
        )
    projection = decoder.output_projection
    embedding = getattr(decoder.embed_tokens, "weight", None)
    # DDP looks for the parameters that a loss reaches in the model's output: an embedding of
    # features alone would not be among them.
    if type(projection) is not nn.Linear or projection.weight is not embedding:
        raise ValueError(
            f"{_FLAG}: expected an output embedding that is the decoder's input embedding "
            "(--share-decoder-input-output-embed or --share-all-embeddings), got one of its own"
        )


def _takes_features_only(model) -> bool:
    # A language model hands every option to its decoder.
    owner = model.decoder if isinstance(model, FairseqLanguageModel) else model
    return "features_only" in inspect.signature(owner.forward).parameters


def _bare(model):
    """Return the model without the wrappers that fairseq puts around it."""
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        model = model.module
    return model


def _name(model) -> str:
    return type(_bare(model)).__name__
