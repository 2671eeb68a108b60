"""Train a detector's baseline and PS-KD side by side and print what PS-KD changed.

    python -m demo.detection                           handwritten digits on cluttered canvases
    python -m demo.detection --train SPEC --test SPEC  your own images

SPEC is coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT[:SPLIT]. Detectron2 trains where it is
installed, torchvision elsewhere. Of the digits' training boxes 40 % have a wrong class, and the
training is long enough to memorise them; test boxes are right.

The images, both models with their logs, results.json, reliability.png and risk_coverage.png go to
runs/demo/detection; `pskd report` of the runs shows their detections.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from pskd_detection import add_dataset_arguments, load_dataset

from demo import part
from demo.digits import write_digits
from demo.noise import with_wrong_classes
from demo.steps import ROOT
from pskd_tools.files import write_json

RUNS = ("baseline", "PS-KD")
NAMES = {"detectron2": "Detectron2", "torchvision": "torchvision"}
COLUMNS = {
    "AP": ("AP", ".2f"),
    "AP50": ("AP50", ".2f"),
    "d_ece": ("D-ECE", ".4f"),
    "aurc": ("AURC", ".4f"),
    "num_detections": ("boxes", "d"),
    "seconds_per_iteration": ("s/iter", ".3f"),
}
NOTE = (
    "AP and AP50: COCO's, in percent. D-ECE (15 bins) and AURC: of all boxes with a score of "
    "at least\n{score_threshold:g}, right with an IoU of at least {iou_threshold:g}. Lower is "
    "better, except for AP and AP50."
)
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


def prepare(args: argparse.Namespace, out: Path) -> dict[str, str]:
    """Return the training and the test set, the user's or handwritten digits made here."""
    if args.train:
        part.say("detection 1/3", f"data sets {args.train} and {args.test}")
        # The trainings would refuse them only after those of an earlier demo are deleted.
        classes = load_dataset(args.train, strict=args.strict_data).class_names
        load_dataset(args.test, classes, strict=args.strict_data)
        return {"train": args.train, "test": args.test}
    images = f"{args.num_train} + {args.num_test} images of handwritten digits"
    part.say("detection 1/3", f"{images} in {out / 'images'}")
    files = write_digits(out / "images", num_train=args.num_train, num_test=args.num_test)
    specs = {name: f"coco:{path}:{path.with_suffix('')}" for name, path in files.items()}
    noisy = with_wrong_classes(load_dataset(specs["train"]).coco, WRONG, seed=0)
    path = write_json(out / "wrong_classes.json", noisy)
    return specs | {"train": f"coco:{path}:{files['train'].with_suffix('')}"}


def training(args: argparse.Namespace, run: str, specs: dict[str, str], out: Path) -> list:
    """Return the command line that trains and evaluates one of the two runs."""
    pskd = "_pskd" if run == "PS-KD" else ""
    recipes = ROOT / "configs" / "detection"
    data = ["--train", specs["train"], "--test", specs["test"]]
    if args.framework == "torchvision":
        words = [recipes / f"demo_torchvision{pskd}.sh", *data, "--output-dir", out]
    else:
        words = [sys.executable, "-W", "ignore", ROOT / "detection" / "train_net.py"]
        # Without --num-gpus it is one process, on the CPU as the recipe says.
        words += ["--config-file", recipes / f"demo{pskd}.yaml", *data, "OUTPUT_DIR", out]
    if not args.train:
        words += LONG[args.framework] + (AGAINST_NOISE[args.framework] if pskd else [])
    return [*words, *args.train_flags]


def iteration_records(log: Path) -> list[dict]:
    return [record for record in part.read_metrics(log) if "total_loss" in record]


def progress(record: dict, last: dict) -> str | None:
    """Return a line for the first record of so many iterations."""
    iteration = record["iteration"] + 1
    if iteration // PRINT_EVERY == (last.get("iteration", -1) + 1) // PRINT_EVERY:
        return None
    alpha = f"  alpha {record['pskd/alpha']:.2f}" if "pskd/alpha" in record else ""
    return f"iteration {iteration:4d}  loss {record['total_loss']:.3f}{alpha}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    flags = "words for both trainings, such as SOLVER.MAX_ITER 100"
    parser = part.parser_of("detection", __doc__, flags)
    add_dataset_arguments(parser, required=False)
    parser.add_argument(
        "--framework",
        choices=NAMES,
        default=default_framework(),
        help="default: Detectron2 if it is installed (here: %(default)s)",
    )
    for option, number in (("--num-train", 100), ("--num-test", 200)):
        text = "images of digits (default: %(default)s)"
        parser.add_argument(option, type=int, default=number, help=text)
    return part.parse_checked(parser, argv, ("train", "test"), ("num_train", "num_test"))


def run(args: argparse.Namespace) -> part.Report:
    """Prepare, train, evaluate, and write all files."""
    out = part.output_folder(args.out, RUNS)
    specs = prepare(args, out)
    commands = {name: training(args, name, specs, part.folder_of(out, name)) for name in RUNS}
    text = f"training both side by side in {NAMES[args.framework]}"
    part.train("detection 2/3", text, out, commands, iteration_records, progress)
    part.say("detection 3/3", f"plots and {out / 'results.json'}")
    runs = part.read_results(out, RUNS)
    part.write_results(out, runs, {found.name: found.numbers for found in runs})
    flat = {
        found.name: found.numbers["bbox"] | found.numbers["confidence"] | found.numbers
        for found in runs
    }
    note = NOTE.format_map(flat["baseline"])
    return part.Report(f"detection, {NAMES[args.framework]}", COLUMNS, flat, note, runs)


def main(argv: list[str] | None = None) -> int:
    return part.show(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
