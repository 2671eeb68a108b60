"""Seconds per update and peak memory of PS-KD, with each teacher, against fairseq's own criterion.

One process, one model, one batch: the updates of the criterions alternate, so that a machine whose
speed drifts slows all. An update is what fairseq's trainer does for one batch: forward, backward,
step of the optimizer. The arithmetic limit of the snapshot is 1.33: it adds a forward to a forward
and a backward of twice its cost. The memory adds none; its file lies in a temporary folder. Peak
memory is that of a process of its own for each criterion: on a CPU what is resident beyond the
imports (read from Linux's /proc), on a GPU what is allocated.

    python benchmarks/translation_step.py [--arch transformer_iwslt_de_en --vocabulary 10000]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from functools import partial

import torch
from _timing import at_least, machine, medians, quartiles, ratios_to, seconds
from fairseq import models, options, tasks, utils
from fairseq.data import Dictionary, FairseqDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

SMALL = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_embed_dim": 96,
    "decoder_embed_dim": 96,
    "encoder_ffn_embed_dim": 384,
    "decoder_ffn_embed_dim": 384,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


#: The flags of what is compared.
CRITERIONS = {
    "stock": ["--criterion", "label_smoothed_cross_entropy"],
    "snapshot": ["--criterion", "pskd", "--pskd-teacher", "snapshot"],
    "memory": ["--criterion", "pskd", "--pskd-teacher", "memory"],
}


class Sentences(FairseqDataset):
    """What the memory asks of a data set: the lengths of its targets."""

    def __init__(self, count: int, length: int) -> None:
        self.tgt_sizes = [length] * count


def training_config(args: argparse.Namespace, criterion: list[str], save_dir: str):
    """Return fairseq's complete configuration of a run with a criterion."""
    sizes = SMALL if args.arch == "small" else {}
    arch = "transformer" if args.arch == "small" else args.arch
    flags = ["unused", "--user-dir", args.user_dir, "--arch", arch, "--share-all-embeddings"]
    flags += [*criterion, "--label-smoothing", "0.1", "--max-epoch", "10"]
    flags += ["--optimizer", "adam", "--max-tokens", str(args.tokens), "--dropout", "0.1"]
    flags += ["--save-dir", save_dir]
    for name, value in sizes.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    parser = options.get_training_parser()
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=flags))


def made_dictionary(size: int) -> Dictionary:
    words = Dictionary()
    for index in range(size - len(words)):
        words.add_symbol(f"w{index}")
    return words


def made_batch(task, length: int, tokens: int) -> dict:
    """Return a batch of ``tokens`` target tokens in sentences of ``length``, as fairseq's own."""
    size = len(task.target_dictionary)
    lines = torch.randint(4, size, (max(1, tokens // length), length))
    lines[:, -1] = task.target_dictionary.eos()
    return {
        "id": torch.arange(len(lines)),
        "nsentences": len(lines),
        "ntokens": lines.numel(),
        "net_input": {
            "src_tokens": lines.flip(1),
            "src_lengths": torch.full((len(lines),), length),
            "prev_output_tokens": lines.roll(1, dims=1),
        },
        "target": lines,
    }


class Bench:
    """One model and batch, and a criterion with its task for each of some names.

    A criterion of PS-KD listens to its task. Each has trained an epoch, which its memory remembers.
    """

    def __init__(self, args: argparse.Namespace, names: Iterable[str], save_dir: str) -> None:
        torch.manual_seed(1)
        torch.set_num_threads(args.threads)
        utils.import_user_module(Namespace(user_dir=args.user_dir))
        configs = {name: training_config(args, CRITERIONS[name], save_dir) for name in names}
        words = made_dictionary(args.vocabulary)
        self.tasks = {
            name: tasks.translation.TranslationTask(cfg.task, words, words)
            for name, cfg in configs.items()
        }
        first = next(iter(configs))
        self.device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
        model = models.build_model(configs[first].model, self.tasks[first])
        self.model = model.to(self.device)
        batch = made_batch(self.tasks[first], args.length, args.tokens)
        self.batch = utils.move_to_cuda(batch) if self.device.type == "cuda" else batch
        self.optimizer = _Adam(self.model.parameters(), lr=1e-4)
        self.criterions = {}
        for name, task in self.tasks.items():
            task.datasets["train"] = Sentences(len(batch["id"]), args.length)
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
    imported = memory_bytes("VmRSS")
    with tempfile.TemporaryDirectory() as save_dir:
        bench = Bench(args, [name], save_dir)
        for _ in range(3):
            bench.update(name)
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return memory_bytes("VmHWM") - imported


def memory_bytes(name: str) -> int:
    """Return one of Linux's figures of this process; getrusage's would have the parent's peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def run(args: argparse.Namespace, save_dir: str) -> dict:
    bench = Bench(args, CRITERIONS, save_dir)
    found: dict[str, list[float]] = {name: [] for name in CRITERIONS}
    for _ in range(args.warmup + args.updates):
        for name, times in found.items():
            times.append(seconds(partial(bench.update, name), bench.device))
    found = {name: times[args.warmup :] for name, times in found.items()}
    result = {
        "machine": machine(bench.device),
        "torch": torch.__version__,
        "arch": args.arch,
        "vocabulary": args.vocabulary,
        "tokens": bench.batch["ntokens"],
        "updates": args.updates,
        "seconds": medians(found),
    }
    ratios = ratios_to("stock", found)
    for name in ratios:
        result[f"{name}_ratio"] = medians(ratios)[name]
        result[f"{name}_ratio_quartiles"] = quartiles(ratios)[name]
    fresh = multiprocessing.get_context("spawn")
    result["peak_mb"] = {}
    for name in CRITERIONS:
        with fresh.Pool(1) as process:
            result["peak_mb"][name] = process.apply(peak_bytes, (args, name)) // 1_000_000
    return result


class _Adam(torch.optim.Adam):
    """torch's Adam with the one method that fairseq's task asks of an optimizer."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--user-dir", default="translation/pskd_fairseq")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as save_dir:
        print(json.dumps(run(args, save_dir), indent=2))


if __name__ == "__main__":
    main()
