"""Seconds per update and peak memory of PS-KD, with each teacher, against fairseq's own criterion.

One process, one model, one batch: the updates of the criterions alternate, so that a machine whose
speed drifts slows all. An update is what fairseq's trainer does for one batch: forward, backward,
step of the optimizer. The arithmetic limit of the snapshot is 1.33: it adds a forward to a forward
and a backward of twice its cost. The memory adds none; its file is in a temporary folder. Peak
memory is that of a process of its own for each criterion: on a CPU what is resident beyond the
imports (read from Linux's /proc), on a GPU what is allocated.

    python benchmarks/translation_step.py [--arch transformer_iwslt_de_en --vocabulary 10000]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from functools import partial

import torch
from _measuring import at_least, conditions, in_fresh_process, measure, options, resident_bytes
from fairseq import models, utils
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.options import get_training_parser, parse_args_and_arch
from fairseq.tasks.translation import TranslationTask

#: The flags of --arch small.
SMALL = "--arch transformer".split()
for side in ("encoder", "decoder"):
    SMALL += f"--{side}-layers 2 --{side}-embed-dim 96 --{side}-ffn-embed-dim 384".split()
    SMALL += f"--{side}-attention-heads 4".split()
#: The flags of what is compared.
CRITERIONS = {
    "stock": ["--criterion", "label_smoothed_cross_entropy"],
    "snapshot": ["--criterion", "pskd", "--pskd-teacher", "snapshot"],
    "memory": ["--criterion", "pskd", "--pskd-teacher", "memory"],
}


def training_config(args: argparse.Namespace, criterion: list[str], save_dir: str):
    """Return fairseq's complete configuration of a run with a criterion."""
    flags = ["unused", "--user-dir", args.user_dir, "--share-all-embeddings"]
    flags += SMALL if args.arch == "small" else ["--arch", args.arch]
    flags += [*criterion, "--label-smoothing", "0.1", "--max-epoch", "10"]
    flags += ["--optimizer", "adam", "--max-tokens", str(args.tokens), "--dropout", "0.1"]
    flags += ["--save-dir", save_dir]
    given = parse_args_and_arch(get_training_parser(), input_args=flags)
    return convert_namespace_to_omegaconf(given)


def made_up(args: argparse.Namespace) -> LanguagePairDataset:
    """Return ``--tokens`` target tokens in sentences of ``--length``, each its own translation."""
    words = Dictionary()
    for index in range(args.vocabulary - len(words)):
        words.add_symbol(f"w{index}")
    lines = torch.randint(
        words.nspecial, len(words), (args.tokens // args.length or 1, args.length)
    )
    lines[:, -1] = words.eos()
    sizes = [args.length] * len(lines)
    return LanguagePairDataset(lines, sizes, words, lines, sizes, words, shuffle=False)


class Bench:
    """One model and batch, and a criterion with its task for each of some names.

    A criterion of PS-KD listens to its task. Each has trained an epoch, which its memory remembers.
    """

    def __init__(self, args: argparse.Namespace, names: Iterable[str], save_dir: str) -> None:
        torch.manual_seed(1)
        torch.set_num_threads(args.threads)
        utils.import_user_module(Namespace(user_dir=args.user_dir))
        configs = {name: training_config(args, CRITERIONS[name], save_dir) for name in names}
        data = made_up(args)
        self.tasks = {
            name: TranslationTask(cfg.task, data.src_dict, data.tgt_dict)
            for name, cfg in configs.items()
        }
        first = next(iter(configs))
        self.device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
        self.model = models.build_model(configs[first].model, self.tasks[first]).to(self.device)
        batch = data.collater(list(data))
        self.batch = utils.move_to_cuda(batch) if self.device.type == "cuda" else batch
        self.optimizer = _Adam(self.model.parameters(), lr=1e-4)
        self.criterions = {}
        for name, task in self.tasks.items():
            task.datasets["train"] = data
            self.criterions[name] = task.build_criterion(configs[name].criterion)
            task.begin_epoch(1, self.model)
            self.update(name)
            task.begin_epoch(2, self.model)

    def update(self, name: str) -> None:
        criterion = self.criterions[name].train()
        self.optimizer.zero_grad()
        self.tasks[name].train_step(self.batch, self.model, criterion, self.optimizer, update_num=0)
        self.optimizer.step()


def peak_bytes(args: argparse.Namespace, name: str) -> int:
    """Return the peak memory that this process adds to its imports in updates with a criterion."""
    imported = resident_bytes()
    with tempfile.TemporaryDirectory() as save_dir:
        bench = Bench(args, [name], save_dir)
        for _ in range(3):
            bench.update(name)
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM") - imported


def run(args: argparse.Namespace, save_dir: str) -> dict:
    bench = Bench(args, CRITERIONS, save_dir)
    steps = {name: partial(bench.update, name) for name in CRITERIONS}
    found = measure(steps, "stock", args.updates, bench.device, warmup=args.warmup)
    result = conditions(args, bench.device, "arch", "vocabulary", "updates")
    result |= {"tokens": bench.batch["ntokens"], "seconds": found["seconds"]}
    for name, ratio in found["ratio_median"].items():
        result[f"{name}_ratio"] = ratio
        result[f"{name}_ratio_quartiles"] = found["ratio_quartiles"][name]
    peaks = {name: in_fresh_process(peak_bytes, args, name) for name in CRITERIONS}
    return result | {"peak_mb": {name: peak // 1_000_000 for name, peak in peaks.items()}}


class _Adam(torch.optim.Adam):
    """torch's Adam with the one method more that fairseq's task calls."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def main() -> None:
    parser = options(__doc__, "threads")
    parser.add_argument(
        "--arch", default="small", help="a fairseq architecture, or small (2 + 2 layers of 96)"
    )
    parser.add_argument(
        "--vocabulary", type=at_least(16), default=6000, help="types in the dictionary"
    )
    parser.add_argument("--tokens", type=at_least(1), default=2048, help="of targets in a batch")
    parser.add_argument("--length", type=at_least(1), default=16, help="tokens in a sentence")
    parser.add_argument("--updates", type=at_least(2), default=30, help="timed, of each criterion")
    parser.add_argument("--warmup", type=at_least(0), default=3, help="that are not counted")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--user-dir", default="translation/pskd_fairseq")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as save_dir:
        print(json.dumps(run(args, save_dir), indent=2))


if __name__ == "__main__":
    main()
