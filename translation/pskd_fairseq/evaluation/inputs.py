"""Reads what is evaluated: a data folder, and a checkpoint that fits it."""

from __future__ import annotations

import argparse
from pathlib import Path

from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig

from pskd.files import shown
from pskd_fairseq.evaluated import UnsafeArgumentError, check_arguments
from pskd_fairseq.programs import UserError
from pskd_tools.files import read_json

# What is read of prepare.json.
_PREPARED = {"source_lang", "target_lang", "lowercase"}


def read_preparation(data: Path) -> dict | None:
    """Return what prepare.py wrote of its steps, or None for data that another program prepared."""
    path = data / "prepare.json"
    if not path.is_file():
        if not any(data.glob("dict.*.txt")):
            raise UserError(
                f"{data}: expected a folder that translation/prepare.py or fairseq-preprocess "
                f"made, got no {path.name} and no dict.*.txt"
            )
        return None
    try:
        preparation = read_json(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not preparation.keys() >= _PREPARED:
        got = sorted(preparation)
        raise UserError(f"{path}: expected an object with {sorted(_PREPARED)}, got {shown(got)}")
    return preparation


def load(args: argparse.Namespace) -> tuple[BaseFairseqModel, DictConfig, FairseqTask]:
    """Return the checkpoint's model, configuration and task, with the dictionaries of the data."""
    path = str(args.checkpoint)
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path, {"data": str(args.data)})
        check_arguments(state.get("cfg"))  # torch's allow-list sees command lines, not dictionaries
        models, config, task = checkpoint_utils.load_model_ensemble_and_task([path], state=state)
    except OSError:
        raise
    except UnsafeArgumentError as error:
        raise UserError(f"{args.checkpoint}: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{args.checkpoint}: expected a whole fairseq checkpoint that fits {args.data}, got "
            f"{type(error).__name__}: {reason}"
        ) from error
    return models[0].eval(), config, task


def languages(args: argparse.Namespace, config: DictConfig, task: FairseqTask) -> tuple[str, str]:
    """Return source and target language, as the task found them in the data's names."""
    own = getattr(task, "cfg", None) or config.task
    source, target = getattr(own, "source_lang", None), getattr(own, "target_lang", None)
    if not source or not target:
        raise UserError(
            f"{args.checkpoint}: expected a model of one source and one target language, got the "
            f"task {type(task).__name__}"
        )
    return source, target


def subwords_of(dictionary: Dictionary) -> str | None:
    """Return fairseq's name of how a dictionary's words are cut; None where they are whole."""
    types = dictionary.symbols[dictionary.nspecial :]
    if any(word.endswith("@@") for word in types):
        return "subword_nmt"
    return "sentencepiece" if any(word.startswith("\u2581") for word in types) else None
