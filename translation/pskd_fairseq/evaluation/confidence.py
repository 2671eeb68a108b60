"""Scores the reference tokens under teacher forcing: how sure a model is, and how rightly."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
from fairseq import utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from omegaconf import DictConfig
from torch import Tensor

from pskd.calibration import ConfidenceAccumulator
from pskd.calibration.temperature import fit_temperature

# Of a vocabulary of 32,000 types these are 0.5 GB of log-probabilities.
_TEMPERATURE_TOKENS = 4096
_LEAST_LPROB = -1e4


@torch.no_grad()
def scored_tokens(
    args: argparse.Namespace,
    split: str,
    model: BaseFairseqModel,
    config: DictConfig,
    task: FairseqTask,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give each batch's log-probabilities (n, V), labels (n,) and sentences' numbers (n,)."""
    use_cuda = torch.cuda.is_available() and not args.cpu
    model = model.cuda() if use_cuda else model
    task.load_dataset(split, task_cfg=config.task)
    batches = task.get_batch_iterator(
        task.dataset(split), max_tokens=args.max_tokens, required_batch_size_multiple=1
    ).next_epoch_itr(shuffle=False)
    for sample in batches:
        sample = utils.move_to_cuda(sample) if use_cuda else sample
        net_output = model(**sample["net_input"])
        lprobs = model.get_normalized_probs(net_output, log_probs=True, sample=sample)
        target = model.get_targets(sample, net_output)
        keep = target != task.target_dictionary.pad()
        yield lprobs[keep], target[keep], sample["id"][:, None].expand_as(target)[keep]


def fit_temperature_on_valid(
    args: argparse.Namespace, model: BaseFairseqModel, config: DictConfig, task: FairseqTask
) -> float:
    """Return the temperature that fits tokens of the validation split best."""
    kept_lprobs, kept_target, seen = [], [], 0
    task.load_dataset("valid", task_cfg=config.task)
    step = math.ceil(np.sum(task.dataset("valid").tgt_sizes) / _TEMPERATURE_TOKENS)
    for lprobs, target, _ in scored_tokens(args, "valid", model, config, task):
        # Evenly over all batches: these come in order of their sentences' lengths.
        chosen = slice(-seen % step, None, step)
        # A model may forbid a word by minus infinity.
        kept_lprobs.append(lprobs[chosen].clamp(min=_LEAST_LPROB).cpu())
        kept_target.append(target[chosen].cpu())
        seen += len(target)
    return fit_temperature(torch.cat(kept_lprobs), torch.cat(kept_target))


def measure_confidence(
    args: argparse.Namespace,
    model: BaseFairseqModel,
    config: DictConfig,
    task: FairseqTask,
    temperature: float | None = None,
) -> dict[str, np.ndarray]:
    """Score every reference token of ``args.split``; the arrays of confidence.npz.

    ``confidence``, ``correct``, ``nll`` in nats and ``ids``, the token's sentence, (N,) each; with
    a temperature also it, ``scaled_confidence`` and ``scaled_nll``.
    """
    parts = []
    for lprobs, target, sentence in scored_tokens(args, args.split, model, config, task):
        part = _confidence(lprobs, target)
        part["correct"] = (lprobs.argmax(dim=-1) == target).cpu().numpy()
        part["ids"] = sentence.cpu().numpy()
        if temperature is not None:
            scaled = _confidence(torch.log_softmax(lprobs / temperature, dim=-1), target)
            part |= {f"scaled_{name}": values for name, values in scaled.items()}
        parts.append(part)
    tokens = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return tokens if temperature is None else tokens | {"temperature": np.array(temperature)}


def _confidence(lprobs: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    confidence = lprobs.amax(dim=-1).exp().clamp(max=1.0)
    nll = -lprobs.gather(1, target[:, None]).squeeze(1)
    # Rounding may leave the log-probability of a certain token a little above 0.
    return {"confidence": confidence.cpu().numpy(), "nll": nll.clamp(min=0.0).cpu().numpy()}


def summary(tokens: dict[str, np.ndarray], prefix: str = "") -> dict[str, float]:
    """Return NLL, ECE, AURC, E-AURC and accuracy of tokens, those of scaled ones by a prefix."""
    rows = ConfidenceAccumulator()
    rows.update_from(tokens[f"{prefix}confidence"], tokens["correct"], tokens[f"{prefix}nll"])
    return rows.compute()
