"""Bad input to the report, the doctor, the demo and the benchmarks."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from bad_input import ROOT, Part, as_command, check, every_case, loaded, toys

from pskd_tools.cli import main as pskd_command

REPORT = Part(
    "`pskd report`",
    "`run` and `other` are runs of classification. Two runs under one name are no error but two "
    "seeds.",
    ("matplotlib",),
)
DOCTOR = Part("`pskd doctor`")
DEMO = Part("The demo", "An earlier demo's files stay.")
BENCHMARKS = Part("Benchmarks", "Before anything is measured.")
PARTS = [REPORT, DOCTOR, DEMO, BENCHMARKS]


# ---- pskd report ---------------------------------------------------------------------------------


def command(line: str) -> object:
    return as_command(pskd_command, "pskd", *line.split())


def reported(tried: str, line: str, says: str, spoil=lambda: None, ends: int = 2) -> None:
    """Add a case of runs that cannot be compared."""

    def run():
        made_up = toys("core", "made_up_runs")
        made_up.classification(Path("run"), pskd=True)
        made_up.classification(Path("other"))
        spoil()
        yield None
        return command(f"report {line}")

    REPORT.add(tried, run, says, ends=ends)


def spoiled(tried: str, file: str, says: str, content: str | bytes) -> None:
    """Add a case of a file of a run that is not what docs/report.md says."""
    content = content.encode() if isinstance(content, str) else content
    path = Path("run", file)
    message = f"pskd report: error: {path}: {says}"
    reported(tried, "run other", message, lambda: path.write_bytes(content))


def arrays(file: str, **changes) -> None:
    path = Path("run", file)
    with np.load(path) as found:
        kept = dict(found)
    np.savez(path, **(kept | changes))


ERROR = "pskd report: error: "
reported("no run", "", "pskd report: error: the following arguments are required: RUN")
reported(
    "a run that is not there",
    "nowhere",
    f"{ERROR}nowhere: expected the folder of a run, with confidence.npz, results.json or "
    "evaluation.json in it or in its inference or evaluation folder, got no such folder",
)
reported(
    "a folder that is no run",
    ".",
    f"{ERROR}.: expected the folder of a run, ... got none of them; of its folders these are "
    "runs: other, run",
)
reported(
    "a run twice",
    "run mine=run",
    f"{ERROR}run: expected each folder once, got it again",
)
reported(
    "a name without a folder",
    "mine=",
    f"{ERROR}'mine=': expected FOLDER, NAME=FOLDER or NAME=FOLDER,FOLDER,...",
)
reported(
    "a seed that is not there",
    "mine=run,nowhere",
    f"{ERROR}nowhere: expected the folder of a run, ... got no such folder",
)
reported(
    "runs that were tested on different examples",
    "run other",
    f"{ERROR}other: expected the test examples of run, got other labels",
    lambda: arrays("confidence.npz", label=np.zeros(300, int)),
)
reported(
    "an unknown preset",
    "run --preset mine",
    "pskd report: error: argument --preset: invalid choice: 'mine' (choose from ...paper...guo...)",
)
reported(
    "a file for `--out`",
    "run --out report",
    f"{ERROR}report: expected a folder to write to, got a file",
    lambda: Path("report").write_text("notes"),
    ends=1,
)
for _tried, _file, _says, _content in (
    ("results.json cut off", "results.json", "expected JSON, got ...", '{"task": "cl'),
    (
        "results.json of an unknown task",
        "results.json",
        "task: expected one of classification, detection, translation, got 'speech'",
        '{"task": "speech"}',
    ),
    (
        "results.json with a number for a table",
        "results.json",
        "last: expected an object, got 0.5",
        '{"last": 0.5}',
    ),
    (
        "results.json with a number for the command",
        "results.json",
        "command: expected text or a list of words, got 5",
        '{"last": {"top1_error": 0.5}, "command": 5}',
    ),
    (
        "metrics.json with a damaged line",
        "metrics.json",
        "expected the numbers of a training, got line 2: Unterminated string ...",
        '{"epoch": 1, "pskd/alpha": 0.1}\n{"epoch": 2, "pskd\n',
    ),
    (
        "metrics.json with text for a number",
        "metrics.json",
        "expected the numbers of a training, got must be real number, not str",
        '{"epoch": 1, "pskd/alpha": "high"}\n',
    ),
    (
        "a pickle for confidence.npz",
        "confidence.npz",
        "expected arrays as numpy.savez writes them: ...",
        b"\x80\x04]q\x00.",
    ),
    (
        "a script for an example's picture",
        "reweighted.json",
        "expected examples with id, label and rescaling: ...expected a data URI of an image in "
        "base64, got 'javascript:alert(1)'...",
        '{"most": [{"id": 1, "label": 2, "rescaling": 0.5, "image": "javascript:alert(1)"}]}',
    ),
    (
        "an example without its factor",
        "reweighted.json",
        "expected examples with id, label and rescaling: KeyError('rescaling')",
        '{"most": [{"id": 1, "label": 2}]}',
    ),
):
    spoiled(_tried, _file, _says, _content)
reported(
    "one array shorter than the others",
    "run other",
    f"{ERROR}run/confidence.npz: nll: expected shape (300,), got (9,)",
    lambda: arrays("confidence.npz", nll=np.zeros(9)),
)
reported(
    "confidence above 1",
    "run other",
    f"{ERROR}run: confidence.npz: confidence: expected values in [0, 1], got values in [2, 2]",
    lambda: arrays("confidence.npz", confidence=np.full(300, 2.0)),
)
reported(
    "an example twice",
    "run other",
    f"{ERROR}run/examples.npz: ids: expected each once, got one again",
    lambda: arrays("examples.npz", ids=np.array(["a"] * 60)),
)

# ---- pskd doctor ---------------------------------------------------------------------------------

DOCTOR.add(
    "an unknown part",
    lambda: command("doctor speech"),
    "pskd doctor: error: argument PART: expected one of core, ..., got 'speech'",
    ends=2,
)
for _seconds in ("0", "nan", "soon"):
    DOCTOR.add(
        f"`--timeout {_seconds}`",
        lambda seconds=_seconds: command(f"doctor --timeout {seconds}"),
        "pskd doctor: error: argument --timeout: expected a number of seconds above 0, got "
        f"'{_seconds}'",
        ends=2,
    )
DOCTOR.add(
    "an unknown command",
    lambda: command("heal"),
    "pskd: error: argument COMMAND: invalid choice: 'heal' (choose from ...doctor...report...)",
    ends=2,
)


# ---- the demo ------------------------------------------------------------------------------------


def demo(half: str, line: str) -> object:
    with mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        main = importlib.import_module(f"demo.{half}").main
    # As a module it is called with a list or with None.
    return as_command(main, f"demo.{half}", *line.split())


def shown(half: str, tried: str, line: str, says: str, ends: int = 1, spoil=lambda: None) -> None:
    """Add a case of words for a half of the demo, or of its output folder."""

    def run():
        for name in ("baseline", "pskd"):
            Path("out", name).mkdir(parents=True)
            Path("out", name, "train.log").write_text("of an earlier demo\n")
        Path("text.en").write_text("one\n")
        spoil()
        yield None
        return demo(half, f"--out out {line}")

    needs = {"translation": ("babel", "matplotlib"), "detection": ("pycocotools", "matplotlib")}
    DEMO.add(tried, run, says, ends=ends, needs=(*needs[half], "sklearn"))


shown(
    "translation",
    "`demo.translation --src text.en`",
    "--src text.en",
    "python -m demo.translation: error: expected --src and --tgt together, got one of them",
    ends=2,
)
shown(
    "translation",
    "`demo.translation --pairs 0`",
    "--pairs 0",
    "python -m demo.translation: error: --pairs: expected at least 1, got 0",
    ends=2,
)


def foreign_file() -> None:
    Path("out/pskd/train.log").rename("out/pskd/thesis.txt")


shown(
    "translation",
    "`demo.translation --out` a folder with other files",
    "",
    "demo: error: ...out/pskd: expected a folder that the demo made (with train.log), got other "
    "files, which it would delete; choose another --out",
    spoil=foreign_file,
)
for _half in ("translation", "detection"):
    shown(
        _half,
        f"`demo.{_half} --out` a file",
        "--out text.en",
        "demo: error: [Errno 17] File exists: '...text.en'",
    )
shown(
    "detection",
    "`demo.detection --train voc:VOC:train`",
    "--train voc:VOC:train",
    "python -m demo.detection: error: expected --train and --test together, got one of them",
    ends=2,
)
shown(
    "detection",
    "`demo.detection --num-test 0`",
    "--num-test 0",
    "python -m demo.detection: error: --num-test: expected at least 1, got 0",
    ends=2,
)
shown(
    "detection",
    "`demo.detection` of a data set that is not there",
    "--train coco:none.json:set --test coco:none.json:set",
    "demo: error: none.json: expected a COCO annotation file, got [Errno 2] No such file or "
    "directory: 'none.json'",
)
shown(
    "detection",
    "`demo.detection` over somebody's images",
    "--num-train 1 --num-test 1",
    "demo: error: ...out/images/train.json: expected no file or one made by demo.digits, got "
    "another, which is left alone",
    spoil=lambda: (
        Path("out/images").mkdir(),
        Path("out/images/train.json").write_text(json.dumps({"images": []})),
    ),
)


@DEMO.case(
    "`demo.digits --num-test 0`",
    "demo.digits: num_test: expected at least 1, got 0",
    ends=1,
    needs=("sklearn",),
)
def _no_digits():
    return demo("digits", "--num-test 0 --out digits")


# ---- benchmarks ----------------------------------------------------------------------------------


def measured(name: str, line: str, says: str, *needs: str) -> None:
    """Add a case of options of a benchmark, which ends before anything is measured."""

    def run():
        main = loaded(f"benchmarks/{name}.py").main
        with mock.patch.object(os, "environ", dict(os.environ)):
            return as_command(main, f"{name}.py", *line.split())

    message = f"{name}.py: error: {says}"
    BENCHMARKS.add(f"`benchmarks/{name}.py {line}`", run, message, ends=2, needs=needs)


for _given in (
    ("loss", "--shapes 256", "argument --shapes: expected ROWSxCLASSES, as 256x1000, got 256"),
    ("loss", "--rounds 2", "argument --rounds: expected an integer of at least 3, got 2"),
    (
        "loss",
        "--json none/figures.json",
        "argument --json: expected a file in a folder that is there, got none/figures.json",
    ),
    (
        "prediction_memory",
        "--rows 10",
        "argument --rows: expected an integer of at least 33, got 10",
    ),
    ("prediction_memory", "--folder none", "--folder: expected a folder that is there, got none"),
    (
        "classification_step",
        "--rows 100",
        "expected --rows 256 or more, which is a batch, and --rounds 2 or more",
        "torchvision",
    ),
    (
        "classification_step",
        "--model yolo",
        "--model: expected one of ..., got 'yolo'",
        "torchvision",
    ),
    (
        "detection_step",
        "--iterations 1",
        "argument --iterations: expected an integer of at least 2, got 1",
        "detectron2",
    ),
    (
        "detection_step",
        "--config-file none.yaml",
        "--config-file: expected a YAML or LazyConfig file, got 'none.yaml'",
        "detectron2",
    ),
    (
        "translation_step",
        "--updates two",
        "argument --updates: expected an integer of at least 2, got two",
        "fairseq",
    ),
):
    measured(*_given)


@every_case(*PARTS)
def test_what_the_user_sees(case, tmp_path):
    check(case, tmp_path)
