"""Arguments in a checkpoint that fairseq gives to Python's ``eval``: they must be literals."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from enum import Enum

from omegaconf import OmegaConf

#: Every argument that fairseq 0.12 evaluates, in whatever model, task, criterion or optimizer.
EVALUATED = frozenset(
    """
    adafactor_eps adam_betas adamax_betas lamb_betas
    adaptive_input_cutoff adaptive_softmax_cutoff character_filters
    conv_aggregator_layers conv_dec_config conv_enc_config conv_feature_layers feature_encoder_spec
    decoder_attention decoder_layers decoder_zero_init encoder_attention encoder_layers
    downsample gated_attention pretrained project_input self_attention
    xformers_att_config encoder_xformers_att_config decoder_xformers_att_config
    left_pad_source left_pad_target model_overrides wer_args
    pipeline_balance pipeline_decoder_balance pipeline_encoder_balance
    pipeline_devices pipeline_decoder_devices pipeline_encoder_devices
    transformer_context transformer_dec_config transformer_enc_config transformer_sampling
    vggblock_enc_config
    """.split()
)
_LONGEST = 10_000  # characters, and elements that they make


class UnsafeArgumentError(ValueError):
    """An argument that fairseq would evaluate is more than a literal."""


def check_arguments(config: object) -> None:
    """Refuse a configuration with an argument of `EVALUATED`, however deep, that may run code.

    A literal is what fairseq's recipes hold: numbers, strings, True, False, None, tuples, lists and
    dictionaries of them, sums and whole multiples such as ``[(512, 3)] * 20 + [(1024, 3)]``.

    Args:
        config: a command line (`argparse.Namespace`), a dictionary or an omegaconf configuration.

    Raises:
        UnsafeArgumentError: naming the argument and what came.
        OmegaConfBaseException: if an interpolation of the configuration cannot be resolved.
    """
    for name, value in _parts(config):
        if name in EVALUATED and not _is_harmless(value):
            raise UnsafeArgumentError(
                f"{name}: expected a literal such as '[(512, 3)] * 20', since fairseq evaluates "
                f"it, got {repr(value):.80}"
            )
        check_arguments(value)


def _parts(config: object) -> Iterator[tuple[object, object]]:
    """Give name and value of whatever fairseq could read of an object as an argument."""
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    if isinstance(config, (list, tuple)):
        yield from enumerate(config)
    if isinstance(config, Mapping):
        yield from config.items()
    if not isinstance(config, (type, Enum)):  # theirs lead to the whole interpreter
        yield from getattr(config, "__dict__", {}).items()


def _is_harmless(value: object) -> bool:
    """Whether ``eval`` of a value is an error or a literal; it takes any buffer for text, too."""
    if not isinstance(value, str):
        return value is None or isinstance(value, (bool, int, float, list, tuple, dict))
    if len(value) > _LONGEST or "${" in value:  # omegaconf would put other text in its place
        return False
    try:
        return _size(ast.parse(value.strip(" \t"), mode="eval").body) <= _LONGEST
    except (MemoryError, RecursionError, SyntaxError, ValueError):
        return False


def _size(node: ast.expr | None) -> int:
    """Return how many elements a literal makes.

    Raises:
        ValueError: if it is none.
    """
    match node:
        case ast.Constant(value=str(text)):
            return len(text)
        case ast.Constant() | ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            return 1
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return 1 + sum(map(_size, parts))
        case ast.Dict(keys=keys, values=values):
            return 1 + sum(map(_size, [*keys, *values]))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _size(left) + _size(right)
        case (
            ast.BinOp(left=part, op=ast.Mult(), right=ast.Constant(value=int(times)))
            | ast.BinOp(left=ast.Constant(value=int(times)), op=ast.Mult(), right=part)
        ):
            return _size(part) * max(1, times)
    raise ValueError(f"expected a literal, got {type(node).__name__}")
