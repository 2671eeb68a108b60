"""Folders of runs that nobody trained, with every file that docs/report.md names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

#: The smallest PNG: one pixel.
IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNgAAAAAgAB"
    "c3UBGAAAAABJRU5ErkJggg=="
)
CLASSES = np.array(["cat", "dog", "emu"])
IDS = np.array([f"train/{i:03d}.png" for i in range(60)])


def rows(seed: int, count: int = 300) -> dict[str, np.ndarray]:
    """What confidence.npz holds, without temperature scaling."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 0.999, count)
    correct = rng.uniform(size=count) < confidence**1.5
    return {
        "confidence": confidence.astype(np.float32),
        "correct": correct,
        "nll": np.where(correct, -np.log(confidence), 3.0),
        "in_top5": correct | (rng.uniform(size=count) < 0.5),
    }


def scaled(arrays: dict[str, np.ndarray], temperature: float = 1.25) -> dict[str, np.ndarray]:
    return arrays | {
        "scaled_confidence": arrays["confidence"] ** temperature,
        "scaled_nll": arrays["nll"] / temperature,
        "temperature": np.float64(temperature),
    }


def named(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add labels, the same in every run, and predictions and names of test examples."""
    label = np.random.default_rng(0).integers(0, len(CLASSES), len(arrays["correct"]))
    return arrays | {
        "label": label,
        "predicted": np.where(arrays["correct"], label, (label + 1) % len(CLASSES)),
        "ids": np.array([f"test/{i:03d}" for i in range(len(label))]),
        "class_names": CLASSES,
    }


def sentences(seed: int, count: int = 30) -> dict[str, list]:
    """What sentences.json holds."""
    rng = np.random.default_rng(seed)
    total = np.array([8, 7, 6, 5])
    matches = rng.integers(1, total + 1, (count, 4))
    bleu = np.c_[np.full((count, 2), 8), matches, np.tile(total, (count, 1))]
    both = rng.integers(1, 21, (count, 6))
    chrf = np.stack([np.full_like(both, 20), np.full_like(both, 20), both], axis=2)
    return {
        "source": [f"Satz {i}" for i in range(count)],
        "reference": [f"sentence {i}" for i in range(count)],
        "translation": [f"sentence {i} <{seed}>" for i in range(count)],
        "bleu": bleu.tolist(),
        "chrf": chrf.reshape(count, 18).tolist(),
    }


def boxes(seed: int) -> dict[str, dict]:
    """What test_images.json holds: of image 3 the detector of seed 2 finds both objects."""
    truth = [{"box": [1, 2, 10, 12], "label": "<cat>"}, {"box": [20, 2, 9, 9], "label": "dog"}]
    seen = [truth[0] | {"score": 0.875, "correct": True}, truth[1] | {"score": 0.25}]
    seen += [truth[1] | {"score": 0.75, "correct": True}] if seed == 2 else []
    entry = {"width": 40, "height": 30, "image": IMAGE, "objects": truth}
    return {"3": entry | {"detections": seen}, "4": entry | {"detections": []}}


def write(folder: Path, name: str, value: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npz"):
        np.savez(folder / name, **value)
    elif name == "metrics.json":
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def teacher(epoch: int, epochs: int) -> dict[str, float]:
    alpha = 0.8 * epoch / epochs
    return {"pskd/alpha": alpha, "pskd/gradient_rescaling": 1.0 - 0.9 * alpha}


def classification(folder: Path, seed: int = 1, *, pskd: bool = False) -> Path:
    write(folder, "confidence.npz", named(scaled(rows(seed))))
    write(folder, "test_pictures.json", {f"test/{i:03d}": IMAGE for i in range(300)})
    numbers = {
        "task": "classification",
        "command": ["classification/train.py", "--seed", str(seed)],
        "seed": seed,
        "dataset": "cifar10",
        "model": "resnet18",
        "seconds_per_epoch": 10.0 + seed,
        "last": {"epoch": 20, "top1_error": 0.5},
    }
    write(folder, "results.json", numbers)
    told = teacher if pskd else lambda *_: {}
    lines = [{"epoch": e, "iteration": 9 * e, "val/nll": 1 / e, **told(e, 4)} for e in range(1, 5)]
    write(folder, "metrics.json", lines)
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(size=len(IDS))
    rescaling = 1.0 - 0.5 * rng.uniform(size=len(IDS)) if pskd else np.full(len(IDS), np.nan)
    order = np.arange(len(IDS))[:: -1 if pskd else 1]
    examples = {
        "label": rng.integers(0, 3, len(IDS)),
        "class_names": CLASSES,
    }
    examples |= {"difficulty": difficulty, "rescaling": rescaling}
    write(folder, "examples.npz", examples | {"ids": IDS[order]})
    if pskd:
        example = {"id": "train/001.png", "label": "<emu>", "difficulty": 0.7, "image": IMAGE}
        least = {"id": "train/002.png", "label": "dog", "rescaling": 0.98}
        write(
            folder, "reweighted.json", {"most": [example | {"rescaling": 0.34}], "least": [least]}
        )
    return folder


def detection(folder: Path, seed: int = 1, *, pskd: bool = False, epochs: bool = True) -> Path:
    arrays = {name: rows(seed)[name] for name in ("confidence", "correct")}
    arrays["ids"] = np.array([str(i // 10) for i in range(len(arrays["correct"]))])
    write(folder / "inference", "confidence.npz", arrays)
    write(folder / "inference", "test_images.json", boxes(seed))
    confidence = {"d_ece": 0.1, "la_ece": 0.2, "aurc": 0.3, "e_aurc": 0.1, "bins": 15}
    confidence |= {"num_detections": 300, "iou_threshold": 0.5, "score_threshold": 0.05}
    numbers = {
        "command": ["train_torchvision.py"],
        "seed": seed,
        "seconds_per_iteration": 0.1,
        "bbox": {"AP": 40.0 + seed, "AP50": 60.0, "AP75": None, "AP-car": 41.0},
        "voc": {"AP50": 44.0},
        "confidence": confidence,
        "ground_truth_rois": {"nll": 0.4, "accuracy": 0.9, "num_rois": 20},
    }
    write(folder, "results.json", numbers)
    lines = []
    for iteration in range(8):
        line = {"iteration": iteration, "total_loss": 1.0}
        line |= {"epoch": 1 + iteration // 4} if epochs else {}
        line |= teacher(1 + iteration // 4, 2) if pskd else {}
        lines.append(line)
    write(folder, "metrics.json", lines)
    return folder


def translation(folder: Path, seed: int = 1, *, pskd: bool = False) -> Path:
    arrays = rows(seed)
    del arrays["in_top5"]
    arrays["ids"] = np.arange(300) // 10
    write(folder / "evaluation", "confidence.npz", scaled(arrays))
    write(folder / "evaluation", "sentences.json", sentences(seed))
    numbers = {
        "checkpoint": str(folder / "checkpoint_last.pt"),
        "split": "test",
        "bleu": 30.0 + seed,
        "bleu_signature": "nrefs:1",
        "chrf": 55.0,
        "tokenised_bleu": 31.0,
        "tokens": 300,
        "nll": 1.5,
        "ece": 0.04,
    }
    write(folder / "evaluation", "evaluation.json", numbers)
    log = []
    for epoch in range(1, 4):
        told = {"epoch": epoch, "train_loss": "2.1", "train_nll_loss": "1.9"}
        for name, value in teacher(epoch, 3).items() if pskd else ():
            told[name.replace("pskd/", "train_")] = f"{value:.4f}"
        log.append(f"2026-01-01 00:00:00 | INFO | train | {json.dumps(told)}\n")
    write(folder, "train.log", "".join(log))
    return folder
