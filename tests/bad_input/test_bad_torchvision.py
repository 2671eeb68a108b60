"""Bad input to detection/train_torchvision.py, to detection data sets and convert_backbone.py."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path

import torch
from bad_input import Part, as_command, check, every_case, loaded, toys

NEEDS = ("torchvision", "pycocotools")
OPTIONS = Part(
    "torchvision: options and checkpoints",
    "`detection/train_torchvision.py`, before the first iteration; `run` holds a training of one "
    "epoch.",
    NEEDS,
)
DATA = Part(
    "Detection data sets",
    "`--train coco:set/set.json:set` or `voc:VOC:train`, of Detectron2's and torchvision's train "
    "scripts and the demo.",
    NEEDS,
)
BACKBONES = Part("`detection/convert_backbone.py`", "Nothing is written.", NEEDS)
PARTS = [OPTIONS, DATA, BACKBONES]

SET = Path("set/set.json")
SPEC = f"coco:{SET}:set"
RUN = "--model fasterrcnn_tiny_fpn --workers 0 --device cpu --output-dir run --epochs 1"


def train(line: str) -> object:
    main = loaded("detection/train_torchvision.py").main
    return as_command(main, "train_torchvision.py", *RUN.split(), *line.split())


def write_images() -> None:
    toys("detection", "torchvision_toys").write_images(Path("set"), count=4)


# ---- options and checkpoints ---------------------------------------------------------------------


def asked(tried: str, line: str, says: str, ends: int = 1) -> None:
    """Add a case of options that are refused before the data are read."""
    OPTIONS.add(tried, lambda: train(line), f"train_torchvision{says}", ends=ends)


for _line, _says in (
    ("--epochs 0", "--epochs: expected 1 or more, got 0"),
    ("--lr inf", "--lr: expected 0 or more, got inf"),
    ("--hflip 2", "--hflip: expected 0 to 1, got 2.0"),
    ("--min-size 0", "--min-size: expected 1 or more, got 0"),
    ("--pskd-alpha-final 1.5", "--pskd-alpha-final: expected 0 to 1, got 1.5"),
    ("--pskd-label-smoothing -1", "--pskd-label-smoothing: expected 0 to 1, got -1.0"),
):
    asked(f"`{_line}`", f"--train {SPEC} {_line}", f".py: error: argument {_says}", ends=2)
for _line, _says in (
    ("", "--train: expected a training set, got none"),
    ("--test-only --resume", "--test: expected a test set with --test-only, got none"),
    (f"--train {SPEC} --eval-period 1", "--test: expected a test set with --eval-period, got none"),
    (f"--test-only --test {SPEC}", "--test-only: expected --weights FILE or --resume, got neither"),
    (
        f"--test-only --test {SPEC} --resume",
        "--resume: expected a checkpoint to evaluate, got no run/checkpoint.pth",
    ),
    ("--device mps", "--device: expected cpu, cuda or cuda:NUMBER, got 'mps'"),
):
    asked(f"`{_line}`" if _line else "no options at all", _line, f": {_says}")
asked(
    "`--pskd-alpha-schedule step`",
    f"--train {SPEC} --pskd-alpha-schedule step",
    ".py: error: argument --pskd-alpha-schedule: invalid choice: 'step' (choose from ...linear..."
    "constant...cosine...)",
    ends=2,
)


def unbuilt(tried: str, line: str, says: str, spoil=lambda: None) -> None:
    """Add a case of a model, of weights or of a checkpoint that cannot be trained."""

    def run():
        write_images()
        if "--resume" in line:
            write_run()
        spoil()
        yield None
        return train(f"--train {SPEC} {line}")

    OPTIONS.add(tried, run, f"train_torchvision: {says}", ends=1)


PSKD = "--pskd-alpha-final 0.5"


@functools.cache
def _trained() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_images()
        assert train(f"--train {SPEC} {PSKD}") == 0
        return {path.name: path.read_bytes() for path in Path("run").iterdir() if path.is_file()}


def write_run() -> None:
    """Write what a training left."""
    files = _trained()
    Path("run").mkdir()
    for name, content in files.items():
        Path("run", name).write_bytes(content)


CHECKPOINT = Path("run/checkpoint.pth")


@OPTIONS.case(
    "a training over another one",
    "train_torchvision: --output-dir: expected a folder without a training, got "
    "run/checkpoint.pth (--resume goes on with it, --overwrite replaces it)",
    ends=1,
)
def _over_another():
    write_images()
    write_run()
    yield None
    return train(f"--train {SPEC}")


unbuilt(
    "`--model yolo`",
    "--model yolo",
    "--model: expected one of fasterrcnn_..., got 'yolo'",
)
unbuilt(
    "masks that the data do not have",
    "--model maskrcnn_tiny_fpn",
    "coco:set/set.json:set: annotation 1 of image 1: for a model with masks expected "
    "'segmentation' as polygons or a run-length code, got none",
    lambda: change(lambda content: content["annotations"][0].pop("segmentation")),
)
unbuilt(
    "weights that are not there",
    "--weights none.pth",
    "[Errno 2] No such file or directory: 'none.pth'",
)
unbuilt(
    "a file that holds no weights",
    "--weights set/0.png",
    "set/0.png: expected a checkpoint that torch.load reads with weights_only=True, got ...",
)
unbuilt(
    "weights of another network",
    "--weights net.pth",
    "net.pth: expected the weights of this model or of its ResNet, got a file that lacks ... of "
    "them: ...",
    lambda: torch.save(torch.nn.Linear(1, 1).state_dict(), "net.pth"),
)
unbuilt(
    "`--resume` from a checkpoint cut off",
    f"{PSKD} --resume",
    "run/checkpoint.pth: expected a checkpoint of this program, got ...",
    lambda: os.truncate(CHECKPOINT, CHECKPOINT.stat().st_size // 3),
)
unbuilt(
    "`--resume` with fewer epochs than are done",
    f"{PSKD} --resume --epochs 1",
    "--epochs: expected at least 9, as in run/checkpoint.pth, got 1",
    lambda: change_checkpoint(epoch=9),
)
unbuilt(
    "`--resume` with another alpha",
    "--pskd-alpha-final 0.3 --resume",
    "run/checkpoint.pth: alpha_final: expected 0.5, with which the checkpoint was trained, got 0.3 "
    "(--pskd-allow-schedule-change allows it)",
)
unbuilt(
    "`--resume` with another optimizer",
    f"{PSKD} --resume --opt adamw",
    "run/checkpoint.pth: opt: expected 'sgd', with which the checkpoint was trained, got 'adamw'",
)
unbuilt(
    "`--resume` with a class more",
    f"{PSKD} --resume",
    "run/checkpoint.pth: expected the classes red, green, blue, got red, green",
    lambda: change(lambda content: content["categories"].append({"id": 3, "name": "blue"})),
)
unbuilt(
    "`--resume` with other annotations",
    f"{PSKD} --resume",
    "run/checkpoint.pth: fingerprint: expected '...', with which the checkpoint was trained, "
    "got '...'",
    lambda: change(lambda content: content["annotations"].pop()),
)


def change_checkpoint(**changes) -> None:
    torch.save(torch.load(CHECKPOINT, weights_only=True) | changes, CHECKPOINT)


@OPTIONS.case(
    "`--test set.json`",
    "error: argument --test: expected coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT[:SPLIT], got "
    "'set.json'",
    ends=2,
)
def _no_spec():
    return train(f"--train {SPEC} --test set.json")


@OPTIONS.case(
    "a file that is not an image",
    "train_torchvision: set/1.png: expected an image, got cannot identify image file '...1.png'",
    ends=1,
    leaves=("run/*",),
)
def _no_image():
    write_images()
    Path("set/1.png").write_text("a picture")
    yield None
    return train(f"--train {SPEC}")


@OPTIONS.case(
    "an image of another size than annotated",
    "train_torchvision: set/1.png: expected 96 x 96 pixels as annotated, got 50 x 40",
    ends=1,
    leaves=("run/*",),
)
def _other_size():
    from PIL import Image

    write_images()
    Image.new("RGB", (50, 40)).save("set/1.png")
    yield None
    return train(f"--train {SPEC}")


# ---- data sets -----------------------------------------------------------------------------------


def change(function) -> None:
    content = json.loads(SET.read_text())
    function(content)
    SET.write_text(json.dumps(content))


def read(tried: str, says: str, spoil=lambda: None, spec: str = SPEC, **options) -> None:
    """Add a case of a COCO data set that is refused when it is read."""

    def run():
        from pskd_detection import load_dataset

        write_images()
        spoil()
        yield None
        load_dataset(spec, **options)

    DATA.add(tried, run, says)


def annotated(tried: str, says: str, strict: bool = False, **changes) -> None:
    spoil = lambda: change(lambda content: content["annotations"][1].update(changes))  # noqa: E731
    read(tried, says, spoil, strict=strict)


WHERE = f"{SET}: annotation 'number 2': "
read(
    '`pskd_detection.load_dataset("set.json")`',
    "dataset: expected coco:ANNOTATIONS.json:IMAGE_DIR or voc:ROOT[:SPLIT], got 'set.json'",
    spec="set.json",
)
read(
    "a file that is not there",
    "none.json: expected a COCO annotation file, got [Errno 2] No such file or directory: "
    "'none.json'",
    spec="coco:none.json:set",
)
read(
    "a folder that is not there",
    "none: expected the folder of the images of set/set.json, got none",
    spec=f"coco:{SET}:none",
)
read("a file cut off", f"{SET}: expected JSON, got ...", lambda: os.truncate(SET, 400))
read(
    "a list for the file",
    f"{SET}: expected a JSON object, got list",
    lambda: SET.write_text("[]"),
)
read(
    "no categories",
    f"{SET}: expected 'categories' as a list of objects, got none",
    lambda: change(lambda content: content.pop("categories")),
)
read(
    "an image file deleted",
    f"{SET}: expected every image in set, got 1 of 4 missing; the first is 2.png",
    lambda: Path("set/2.png").unlink(),
)
read(
    "an image number twice",
    f"{SET}: image number 2: expected every 'id' once, got 1 again",
    lambda: change(lambda content: content["images"][1].update(id=1)),
)
read(
    "no annotation but crowds",
    f"{SET}: expected annotations to train on, got 6 crowd or difficult ones and no other",
    lambda: change(lambda content: [a.update(iscrowd=1) for a in content["annotations"]]),
)
annotated(
    "an unknown class",
    f"{WHERE}expected 'category_id' of one in the file, got 7",
    category_id=7,
)
annotated(
    "`--strict-data`: an unknown image",
    f"{SET}: strictly read, expected nothing to mend, got 1 annotations of images that are not in "
    f"the file left out; the first is {WHERE}image_id 99",
    strict=True,
    image_id=99,
)
annotated(
    "`--strict-data`: corners for sizes",
    f"{SET}: strictly read, expected nothing to mend, got 1 boxes more than 1 pixel outside their "
    f"image clipped; the first is {WHERE}bbox [60, 60, 90, 90] in an image of 96 x 96",
    strict=True,
    bbox=[60, 60, 90, 90],
)
annotated(
    "a flag other than 0 and 1",
    f"{WHERE}expected 'iscrowd' as 0 or 1, true or false, yes or no, got 'maybe'",
    iscrowd="maybe",
)
annotated(
    "a polygon with NaN",
    f"{WHERE}segmentation: expected polygons within 960 pixels of the corner, got [1, 2, 3, 4, 5, "
    "nan]",
    segmentation=[[1, 2, 3, 4, 5, float("nan")]],
)
annotated(
    "a run-length code too short",
    f"{WHERE}segmentation: expected 'counts' of 96 x 96 = 9216 pixels, got those of 9",
    segmentation={"size": [96, 96], "counts": [4, 5]},
)
annotated(
    "a box of three numbers",
    f"{WHERE}expected bbox as four finite numbers, got [1, 2, 3]",
    bbox=[1, 2, 3],
)
read(
    "a test set with another class",
    f"{SET}: expected the classes of the training set (red, blue), got also green",
    class_names=["red", "blue"],
)

OBJECT = "<object><name>dog</name><bndbox>{}</bndbox></object>"
BOX = "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"


def voc(tried: str, says: str, xml: str | None, names: str = "a\n") -> None:
    """Add a case of a VOC data set of one image."""

    def run():
        from PIL import Image
        from pskd_detection import load_dataset

        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            Path("VOC", folder).mkdir(parents=True)
        Path("VOC/ImageSets/Main/train.txt").write_text(names)
        Image.new("RGB", (20, 20)).save("VOC/JPEGImages/a.png")
        if xml is not None:
            Path("VOC/Annotations/a.xml").write_text(f"<annotation>{xml}</annotation>")
        yield None
        load_dataset("voc:VOC:train")

    DATA.add(tried, run, says)


VOC = "VOC/Annotations/a.xml: "
voc(
    "VOC: no annotation of an image",
    f"{VOC}expected VOC annotations in XML, got [Errno 2] No such file or directory: ...",
    None,
)
voc(
    "VOC: damaged XML",
    f"{VOC}expected VOC annotations in XML, got mismatched tag: line 1, column ...",
    "<object>",
)
voc("VOC: no name", f"{VOC}object 1: expected a name, got none", "<object/>")
voc(
    "VOC: a box without corners",
    f"{VOC}object 1: expected bndbox with xmin, ymin, xmax, ymax, got [None, None, None, None]",
    OBJECT.format(""),
)
voc(
    "VOC: a list of no images",
    "VOC/ImageSets/Main/train.txt: expected at least one image, got none",
    OBJECT.format(BOX),
    names="\n",
)


# ---- convert_backbone.py -------------------------------------------------------------------------


def converted(tried: str, says: str, content: object, target: str = "out.pth") -> None:
    """Add a case of a checkpoint or a name that convert_backbone.py refuses."""

    def run():
        if isinstance(content, bytes):
            Path("in.pth").write_bytes(content)
        elif content is not None:
            torch.save(content, "in.pth")
        yield None
        main = loaded("detection/convert_backbone.py").main
        return as_command(main, "convert_backbone.py", "in.pth", target)

    BACKBONES.add(tried, run, f"convert_backbone: {says}", ends=1)


def resnet(**changes) -> dict[str, torch.Tensor]:
    """Return weights of a ResNet-18 of single numbers, as far as it is told by them."""
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    for stage in range(1, 5):
        for block in range(2):
            state[f"layer{stage}.{block}.conv1.weight"] = torch.zeros(1)
    return state | changes


converted("no file", "[Errno 2] No such file or directory: 'in.pth'", None)
converted(
    "another file",
    "in.pth: expected a checkpoint that torch.load reads with weights_only=True, got ...",
    b"notes",
)
converted(
    "a state dict of another network",
    "in.pth: expected a ResNet in torchvision's layout (conv1.weight, layer1.0.conv1.weight, ...), "
    "got weight, bias",
    dict(torch.nn.Linear(1, 1).state_dict()),
)
converted(
    "a network for CIFAR",
    "in.pth: conv1.weight: expected shape (64, 3, 7, 7), got (64, 3, 3, 3): a CIFAR network, ...",
    resnet(**{"conv1.weight": torch.zeros(64, 3, 3, 3)}),
)
converted(
    "a ResNet with weights missing",
    "in.pth: expected the 100 keys of a ResNet-18, got none for bn1.weight, ... and ... more",
    resnet(),
)
converted(
    "a name that ends in .bin",
    "out.bin: expected a name that ends in .pth or .pkl, got '.bin'",
    resnet(),
    "out.bin",
)
converted(
    "a folder that is not there",
    "none/out.pth: expected an existing folder, got none",
    resnet(),
    "none/out.pth",
)
converted(
    "the file that is read",
    "in.pth: expected another file than the one that is read, got the same",
    resnet(),
    "in.pth",
)


@every_case(*PARTS)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
