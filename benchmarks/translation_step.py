"""Seconds per update of PS-KD (snapshot teacher) over fairseq's own criterion, side by side.

One process, one model, one batch: the updates of the two criterions alternate, so that a machine
whose speed drifts slows both. An update is what fairseq's trainer does for one batch: forward,
backward, step of the optimizer. The arithmetic limit is 1.33: the teacher adds one forward to a
forward and a backward of twice its cost.

    python benchmarks/translation_step.py [--arch transformer_iwslt_de_en --vocabulary 10000]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from argparse import Namespace

import torch
from fairseq import models, options, tasks, utils
from fairseq.data import Dictionary
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


def training_config(args: argparse.Namespace, criterion: str):
    """Return fairseq's complete configuration of a run with ``criterion``."""
    sizes = SMALL if args.arch == "small" else {}
    arch = "transformer" if args.arch == "small" else args.arch
    flags = ["unused", "--user-dir", args.user_dir, "--arch", arch, "--share-all-embeddings"]
    flags += ["--criterion", criterion, "--label-smoothing", "0.1", "--max-epoch", "10"]
    flags += ["--optimizer", "adam", "--max-tokens", str(args.tokens), "--dropout", "0.1"]
    flags += ["--save-dir", "unused"]
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


def time_update(task, model, criterion, optimizer, batch: dict) -> float:
    """Return the seconds of one update."""
    start = time.perf_counter()
    criterion.train()
    optimizer.zero_grad()
    task.train_step(batch, model, criterion, optimizer, update_num=0)
    optimizer.step()
    if batch["target"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(args: argparse.Namespace) -> dict:
    torch.manual_seed(1)
    utils.import_user_module(Namespace(user_dir=args.user_dir))
    configs = {
        name: training_config(args, name) for name in ("label_smoothed_cross_entropy", "pskd")
    }
    words = made_dictionary(args.vocabulary)
    task = tasks.translation.TranslationTask(configs["pskd"].task, words, words)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    model = models.build_model(configs["pskd"].model, task).to(device)
    criterions = {name: task.build_criterion(cfg.criterion) for name, cfg in configs.items()}
    task.begin_epoch(2, model)  # takes the snapshot
    batch = made_batch(task, args.length, args.tokens)
    batch = utils.move_to_cuda(batch) if device.type == "cuda" else batch
    optimizer = _Adam(model.parameters(), lr=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in criterions}
    for _ in range(args.warmup + args.updates):
        for name, criterion in criterions.items():
            seconds[name].append(time_update(task, model, criterion, optimizer, batch))
    stock, pskd = (times[args.warmup :] for times in seconds.values())
    ratios = [b / a for a, b in zip(stock, pskd, strict=True)]
    return {
        "machine": f"{platform.machine()} {device}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "arch": args.arch,
        "vocabulary": len(words),
        "tokens": batch["ntokens"],
        "updates": args.updates,
        "stock_seconds": statistics.median(stock),
        "pskd_seconds": statistics.median(pskd),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


class _Adam(torch.optim.Adam):
    """torch's Adam with the one method that fairseq's task asks of an optimizer."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--arch", default="small", help="a fairseq architecture, or small (2 + 2 layers of 96)"
    )
    parser.add_argument("--vocabulary", type=int, default=6000, help="types in the dictionary")
    parser.add_argument("--tokens", type=int, default=2048, help="target tokens in a batch")
    parser.add_argument("--length", type=int, default=16, help="tokens in a sentence")
    parser.add_argument("--updates", type=int, default=30, help="timed updates of each criterion")
    parser.add_argument("--warmup", type=int, default=3, help="updates that are not counted")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--user-dir", default="translation/pskd_fairseq")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(run(args), indent=2))


if __name__ == "__main__":
    main()
