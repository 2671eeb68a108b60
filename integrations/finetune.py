"""Fine-tune a pretrained encoder for sentence polarity, with PS-KD or without; write results.json.

    python integrations/finetune.py --data data/text --model MODEL --label-noise 0.3 \\
        --alpha-final 0.8 --output-dir runs/polarity_pskd_1 --seed 1

The data are Pang and Lee's sentences (rt-polarity.pos and .neg, or the same with .xz): 1,000 to fit
a temperature on, 2,000 to test on, the rest to train on, by one draw for all seeds. The last epoch
counts. Without ``--alpha-final`` the Trainer is the library's own.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

import numpy as np
import torch
from pskd_transformers import PSKDTrainerMixin
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from pskd import WithRows
from pskd.calibration import ConfidenceAccumulator, fit_temperature

VALID, TEST = 1000, 2000


class PSKDTrainer(PSKDTrainerMixin, Trainer):
    """The library's Trainer with the criterion of `pskd`."""


class Sentences(Dataset):
    """Tokenised sentences with their labels."""

    def __init__(self, tokenizer, texts: list[str], labels: np.ndarray) -> None:
        self.inputs = tokenizer(texts, truncation=True, max_length=64)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict:
        sample = {name: values[row] for name, values in self.inputs.items()}
        return sample | {"labels": int(self.labels[row])}


def read_sentences(folder: Path) -> tuple[list[str], np.ndarray]:
    """Return the sentences in a fixed random order, and their labels: 1 is positive."""
    texts: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(("rt-polarity.neg", "rt-polarity.pos")):
        plain, packed = folder / name, folder / f"{name}.xz"
        if not (plain.exists() or packed.exists()):
            raise SystemExit(f"--data: expected {name} or {name}.xz in {folder}, got neither")
        open_file = open if plain.exists() else lzma.open
        with open_file(plain if plain.exists() else packed, "rt", encoding="latin-1") as file:
            lines = file.read().split("\n")
        texts += [line.strip() for line in lines if line.strip()]
        labels += [label] * (len(texts) - len(labels))
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[place] for place in order], np.array(labels)[order]


def flipped(labels: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """Return labels of which a share is the other one."""
    chosen = np.random.default_rng(seed).permutation(len(labels))[: round(rate * len(labels))]
    labels = labels.copy()
    labels[chosen] = 1 - labels[chosen]
    return labels


def metrics(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> dict[str, float]:
    """Return error, NLL, ECE and AURC of a model's softmax at a temperature."""
    found = ConfidenceAccumulator()
    found.update((logits / temperature).softmax(1), labels)
    return found.compute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the sentences")
    parser.add_argument("--model", required=True, help="name or folder of an encoder")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--train", type=int, help="sentences to train on; default: all")
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of flipped labels")
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--alpha-final", type=float, default=0.0)
    parser.add_argument("--alpha-schedule", default="linear")
    parser.add_argument("--teacher", default="memory")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--trained-layers", type=int, help="the upper ones; default: all")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(run(args), indent=2))


def run(args: argparse.Namespace) -> dict:
    texts, labels = read_sentences(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    last = len(texts) - VALID - TEST
    count = last if args.train is None else min(args.train, last)
    parts = {"train": slice(count), "valid": slice(last, last + VALID), "test": slice(-TEST, None)}
    data = {name: Sentences(tokenizer, texts[part], labels[part]) for name, part in parts.items()}
    data["train"].labels = flipped(data["train"].labels, args.label_noise, args.seed)
    trainer = make_trainer(args, tokenizer, data["train"])
    trainer.train()
    logits = {name: trainer.predict(data[name]).predictions for name in ("valid", "test")}
    valid, test = (torch.from_numpy(logits[name]) for name in ("valid", "test"))
    target = torch.from_numpy(data["test"].labels)
    temperature = fit_temperature(valid, torch.from_numpy(data["valid"].labels))
    results = vars(args) | {"data": str(args.data), "output_dir": str(args.output_dir)}
    results |= {"train": count, "temperature": temperature, "test": metrics(test, target, 1.0)}
    results["test_scaled"] = metrics(test, target, temperature)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    return results


def make_trainer(args: argparse.Namespace, tokenizer, train: Sentences) -> Trainer:
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    if args.trained_layers is not None:
        layers = model.base_model.encoder.layer
        for module in (model.base_model.embeddings, *layers[: len(layers) - args.trained_layers]):
            module.requires_grad_(False)
    options = TrainingArguments(
        output_dir=str(args.output_dir),
        seed=args.seed,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        label_smoothing_factor=args.label_smoothing,
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    common = {"model": model, "args": options, "data_collator": DataCollatorWithPadding(tokenizer)}
    if not args.alpha_final:
        return Trainer(train_dataset=train, **common)
    pskd = {"teacher": args.teacher, "alpha_final": args.alpha_final}
    pskd["alpha_schedule"] = args.alpha_schedule
    data = WithRows(train) if args.teacher == "memory" else train
    return PSKDTrainer(train_dataset=data, pskd_options=pskd, **common)


if __name__ == "__main__":
    main()
