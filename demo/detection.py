"""Train a detector's baseline and PS-KD side by side and print what PS-KD changed.

    python -m demo.detection                           handwritten digits on cluttered canvases
    python -m demo.detection --train SPEC --test SPEC  your own images

SPEC is coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT[:SPLIT]. Detectron2 trains where it is
installed, torchvision elsewhere. Of the digits' training boxes 40 % have a wrong class, and the
training is long enough to memorise them; test boxes are right.

The images, both models with their logs, results.json, detections.png, reliability.png and
risk_coverage.png go to runs/demo/detection.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from pskd_detection import (
    DetectionConfidence,
    DetectionDataset,
    Detections,
    add_dataset_arguments,
    load_dataset,
)

from demo.detection_picture import detections_picture
from demo.digits import write_digits
from demo.noise import with_wrong_classes
from demo.report import Report, show
from demo.steps import (
    ROOT,
    Step,
    check_folder,
    folder_of,
    fresh_folder,
    metrics,
    run_all,
)
from pskd_tools.files import write_json
from pskd_tools.plots import reliability_diagram, risk_coverage_plot

OUT = Path("runs/demo/detection")
RUNS = ("baseline", "PS-KD")
FRAMEWORKS = ("detectron2", "torchvision")
NAMES = {"detectron2": "Detectron2", "torchvision": "torchvision"}
COLUMNS = {
    "AP": ("AP", ".2f"),
    "AP50": ("AP50", ".2f"),
    "d_ece": ("D-ECE", ".4f"),
    "aurc": ("AURC", ".4f"),
    "num_detections": ("boxes", "d"),
    "seconds_per_iteration": ("s/iter", ".3f"),
}
PRINT_EVERY = 250  # iterations
WRONG = 0.4  # of the digits' training boxes
# Of the digits; your own images are trained on as the recipes say.
LONG = {
    "detectron2": ["SOLVER.MAX_ITER", "1000", "SOLVER.STEPS", "(700, 900)"],
    "torchvision": "--epochs 40 --lr-steps 28 36".split(),
}
AGAINST_NOISE = {
    "detectron2": ["MODEL.PSKD.ALPHA_FINAL", "0.8"],
    "torchvision": ["--pskd-alpha-final", "0.8"],
}


def default_framework() -> str:
    """Return the first framework that can be imported; the demo's own environment has torchvision.

    A Detectron2 that was built for another torch is found but does not load.
    """
    try:
        import torch  # noqa: F401  (whose libraries the extension needs)
        from detectron2 import _C  # noqa: F401
    except ImportError as error:
        if importlib.util.find_spec("detectron2"):
            print(f"Detectron2 is installed but cannot be imported: {error}", file=sys.stderr)
        return "torchvision"
    return "detectron2"


def command(framework: str, run: str, specs: dict[str, str], out: Path) -> list[str | Path]:
    """Return the command line that trains and evaluates one of the two runs."""
    pskd = "_pskd" if run == "PS-KD" else ""
    recipes = ROOT / "configs" / "detection"
    data = ["--train", specs["train"], "--test", specs["test"]]
    if framework == "torchvision":
        return [recipes / f"demo_torchvision{pskd}.sh", *data, "--output-dir", out]
    script = [sys.executable, "-W", "ignore", ROOT / "detection" / "train_net.py"]
    # Without --num-gpus it is one process, on the CPU as the recipe says.
    return [*script, "--config-file", recipes / f"demo{pskd}.yaml", *data, "OUTPUT_DIR", out]


def prepare(args: argparse.Namespace, out: Path) -> dict[str, str]:
    """Return the training and the test set, the user's or handwritten digits made here."""
    if args.train:
        say(1, f"data sets {args.train} and {args.test}")
        # The trainings would refuse them only after those of an earlier demo are deleted.
        classes = load_dataset(args.train, strict=args.strict_data).class_names
        load_dataset(args.test, classes, strict=args.strict_data)
        return {"train": args.train, "test": args.test}
    say(1, f"{args.num_train} + {args.num_test} images of handwritten digits in {out / 'images'}")
    files = write_digits(out / "images", num_train=args.num_train, num_test=args.num_test)
    specs = {part: f"coco:{path}:{path.with_suffix('')}" for part, path in files.items()}
    noisy = with_wrong_classes(load_dataset(specs["train"]).coco, WRONG, seed=0)
    path = write_json(out / "wrong_classes.json", noisy)
    return specs | {"train": f"coco:{path}:{files['train'].with_suffix('')}"}


class IterationPrinter:
    """Prints a line for every so many iterations that a training has logged."""

    def __init__(self) -> None:
        self._printed: dict[str, int] = {}

    def __call__(self, step: Step) -> None:
        for record in metrics(step.log.parent):
            iteration = record["iteration"] + 1
            due = self._printed.get(step.name, 0) + PRINT_EVERY
            if "total_loss" not in record or iteration < due:
                continue
            self._printed[step.name] = iteration // PRINT_EVERY * PRINT_EVERY
            alpha = f"  alpha {record['pskd/alpha']:.2f}" if "pskd/alpha" in record else ""
            print(
                f"    {step.name:<9} iteration {iteration:4d}  loss {record['total_loss']:.3f}"
                f"{alpha}",
                flush=True,
            )


def train(args: argparse.Namespace, specs: dict[str, str], out: Path) -> None:
    """Train and evaluate baseline and PS-KD side by side, from the same seed."""
    steps = []
    folders = {run: fresh_folder(folder_of(out, run)) for run in RUNS}
    for run, path in folders.items():
        line = command(args.framework, run, specs, path)
        if not args.train:
            line += LONG[args.framework]
            line += AGAINST_NOISE[args.framework] if run == "PS-KD" else []
        line += args.train_flags
        steps.append(Step(run, line, path / "train.log"))
    logs = " and ".join(str(step.log) for step in steps)
    say(2, f"training both side by side in {NAMES[args.framework]}, log files {logs}")
    run_all(steps, IterationPrinter())


def confidence_of(dataset: DetectionDataset, path: Path) -> DetectionConfidence:
    """Return the scores of the detections in a file of COCO's results format."""
    found: dict[int, list[dict]] = {image["id"]: [] for image in dataset.coco["images"]}
    for detection in json.loads(path.read_text(encoding="utf-8")):
        found[detection["image_id"]].append(detection)
    index = {key: i for i, key in enumerate(dataset.category_ids)}
    confidence = DetectionConfidence(dataset)
    for image_id, detections in found.items():
        boxes = np.array([d["bbox"] for d in detections], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = np.array([d["score"] for d in detections], dtype=float)
        labels = np.array([index[d["category_id"]] for d in detections], dtype=int)
        confidence.update(image_id, Detections(boxes, scores, labels))
    return confidence


def collect(specs: dict[str, str], out: Path) -> dict[str, dict]:
    """Read what both runs found, and draw the pictures with both runs in each."""
    classes = load_dataset(specs["train"]).class_names
    dataset = load_dataset(specs["test"], classes)
    truth = write_json(out / "test.json", dataset.coco)
    files = {run: folder_of(out, run) / "inference" / "coco_instances_results.json" for run in RUNS}
    say(3, f"pictures and {out / 'results.json'}")
    detections_picture(truth, dataset.image_dir, files, out / "detections.png")
    scores = {run: confidence_of(dataset, path) for run, path in files.items()}
    pairs = {run: (found.confidence, found.correct) for run, found in scores.items()}
    if all(len(confidence) for confidence, _ in pairs.values()):
        reliability_diagram(pairs, out / "reliability.png")
        risk_coverage_plot(pairs, out / "risk_coverage.png")
    results = {run: json.loads((folder_of(out, run) / "results.json").read_text()) for run in RUNS}
    write_json(out / "results.json", results, indent=2)
    return results


def report(results: dict[str, dict], framework: str, out: Path) -> Report:
    flat = {
        run: {**result["bbox"], **result["confidence"], **result} for run, result in results.items()
    }
    first = flat["baseline"]
    note = (
        "AP and AP50: COCO's, in percent. D-ECE (15 bins) and AURC: of all boxes with a score of "
        f"at least\n{first['score_threshold']:g}, right with an IoU of at least "
        f"{first['iou_threshold']:g}. Lower is better, except for AP and AP50."
    )
    folders = {run: folder_of(out, run) for run in RUNS}
    return Report(f"detection, {NAMES[framework]}", COLUMNS, flat, note, folders)


def say(number: int, text: str) -> None:
    print(f"[detection {number}/3] {text}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo.detection", description=__doc__.split("\n")[0]
    )
    add_dataset_arguments(parser, required=False)
    parser.add_argument(
        "--framework",
        choices=FRAMEWORKS,
        default=default_framework(),
        help="default: Detectron2 if it is installed (here: %(default)s)",
    )
    parser.add_argument(
        "--num-train", type=int, default=100, help="images of digits (default: %(default)s)"
    )
    parser.add_argument(
        "--num-test", type=int, default=200, help="images of digits (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument(
        "train_flags",
        nargs="*",
        metavar="-- FLAG ...",
        help="after --: words for both trainings, such as SOLVER.MAX_ITER 100",
    )
    args = parser.parse_args(argv)
    if bool(args.train) != bool(args.test):
        parser.error("expected --train and --test together, got one of them")
    for option in ("num_train", "num_test"):
        if (number := getattr(args, option)) < 1:
            parser.error(f"--{option.replace('_', '-')}: expected at least 1, got {number}")
    return args


def run(args: argparse.Namespace) -> Report:
    """Prepare, train, evaluate, and write all files.

    Raises:
        StepFailed: naming the step and its log.
        OSError: if the output folder cannot be made or written.
        ValueError: for a data set that cannot be used, or an output folder that holds what the demo
            would delete.
    """
    out = args.out.resolve()
    for name in RUNS:
        check_folder(folder_of(out, name))
    out.mkdir(parents=True, exist_ok=True)
    specs = prepare(args, out)
    train(args, specs, out)
    return report(collect(specs, out), args.framework, out)


def main(argv: list[str] | None = None) -> int:
    return show(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
