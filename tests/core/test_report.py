"""`pskd report`: the numbers of pskd.calibration, a page that stands alone, clear refusals."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import made_up_runs
import numpy as np
import pytest

from pskd.calibration import aurc, excess_aurc, reliability_bins
from pskd_tools.cli import main
from pskd_tools.report import write_report

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

ROWS, EXAMPLES = 300, 60
NASTY = '<b>&"'
FILES = ["report.csv", "report.html", "report.json"]


def arrays(seed: int, *, scaled: bool = True, nll: bool = True, top5: bool = True) -> dict:
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1.0, ROWS)
    correct = rng.uniform(size=ROWS) < confidence**2
    found = {"confidence": confidence.astype(np.float32), "correct": correct}
    if nll:
        found["nll"] = rng.uniform(0.0, 2.0, ROWS)
    if top5:
        found["in_top5"] = correct | (rng.uniform(size=ROWS) < 0.5)
    if scaled:
        found["scaled_confidence"] = (confidence**1.3).astype(np.float32)
        found["scaled_nll"] = rng.uniform(0.0, 1.5, ROWS)
        found["temperature"] = np.float64(1.25 + seed)
    return found


def write(folder: Path, name: str, content) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npz"):
        np.savez_compressed(folder / name, **content)
    else:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def write_examples(folder: Path, factors: np.ndarray, *, prefix: str = "train/") -> Path:
    ids = np.array([f"{prefix}{i:03d}" for i in range(EXAMPLES)])
    difficulty = np.linspace(0.0, 1.0, EXAMPLES, dtype=np.float32)
    found = {"ids": ids, "difficulty": difficulty, "rescaling": factors.astype(np.float32)}
    return write(folder, "examples.npz", found)


def classification(folder: Path, seed: int, *, pskd: bool = False, scaled: bool = True) -> Path:
    """Write a run; with ``pskd`` its epochs and examples are those of a teacher."""
    numbers = {
        "task": "classification",
        "seed": seed,
        "command": ["train.py", "--note", NASTY],
        "seconds_per_epoch": 2.0 + seed,
        "last": {"epoch": 3},
    }
    write(folder, "results.json", numbers)
    write(folder, "confidence.npz", arrays(seed, scaled=scaled))
    lines = [{"epoch": epoch, "train/loss": 1.0 / epoch} for epoch in (1, 2, 3)]
    if pskd:
        for line in lines:
            line |= {"pskd/alpha": 0.2 * line["epoch"], "pskd/gradient_rescaling": 0.9}
        image = "data:image/png;base64,iVBORw0KGgo="
        example = {"id": "train/000", "label": NASTY, "rescaling": 0.25, "image": image}
        content = {"most": [example], "least": [example | {"difficulty": 0.5}]}
        write(folder, "reweighted.json", content)
    write(folder, "metrics.json", "".join(json.dumps(line) + "\n" for line in lines))
    factors = np.linspace(0.2, 1.0, EXAMPLES) if pskd else np.full(EXAMPLES, np.nan)
    return write_examples(folder, factors)


def translation(folder: Path, seed: int) -> Path:
    numbers = {"task": "translation", "bleu": 31.5 + seed, "chrf": 55.0, "tokenised_bleu": 32.0}
    write(folder / "evaluation", "evaluation.json", numbers)
    write(folder / "evaluation", "confidence.npz", arrays(seed, top5=False))
    return folder


def detection(folder: Path, seed: int) -> Path:
    numbers = {
        "bbox": {"AP": 21.5, "AP50": 40.25, "AP75": None},
        "voc": {"AP50": 44.0},
        "confidence": {
            "d_ece": 0.9,
            "la_ece": 0.125,
            "bins": 15,
            "iou_threshold": 0.5,
            "score_threshold": 0.3,
            "num_detections": ROWS,
        },
        "ground_truth_rois": {"nll": 0.75},
        "seconds_per_iteration": 0.5,
    }
    write(folder, "results.json", numbers)
    content = arrays(seed, scaled=False, nll=False, top5=False)
    write(folder / "inference", "confidence.npz", content)
    return folder


def expected(content: dict, bins: int) -> dict[str, float]:
    confidence, correct = content["confidence"], content["correct"]
    values = {
        "top1_error": 1.0 - correct.mean(),
        "ece": reliability_bins(confidence, correct, bins=bins).expected_calibration_error,
        "aurc": aurc(confidence, correct),
        "e_aurc": excess_aurc(confidence, correct),
    }
    if "in_top5" in content:
        values["top5_error"] = 1.0 - content["in_top5"].mean()
    if "nll" in content:
        values["nll"] = content["nll"].mean()
    if "temperature" in content:
        scaled = content["scaled_confidence"]
        ece = reliability_bins(scaled, correct, bins=bins).expected_calibration_error
        values |= {"temperature": float(content["temperature"]), "scaled_ece": ece}
        values |= {
            "scaled_nll": content["scaled_nll"].mean(),
            "scaled_aurc": aurc(scaled, correct),
        }
    return values


class Page(HTMLParser):
    """The text of a page's tables and captions; fails where tags are not balanced."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.text = [], set(), [], ""
        self.tables: list[list[list[str]]] = []  # without what is written small
        self.captions: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.add(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if ("td" in self.open or "th" in self.open) and "small" not in self.open:
            self.tables[-1][-1][-1] += data
        elif "figcaption" in self.open:
            self.captions[-1] += data

    def column(self, name: str) -> dict[str, str]:
        """Return what the first table says of a method, by metric."""
        head, *lines = self.tables[0]
        return {line[0].strip(): line[head.index(name)] for line in lines}


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "report.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=[("paper", 10), ("guo", 15)], ids=lambda p: p[0])
def report(request, tmp_path_factory):
    """Runs of every task under a preset: (preset, bins, folder of the report)."""
    preset, bins = request.param
    root = tmp_path_factory.mktemp(preset)
    runs = [
        f"{NASTY}={classification(root / 'ce', 0)}",
        f"PS-KD={classification(root / 'pskd', 1, pskd=True)}",
        f"NMT={translation(root / 'nmt', 2)}",
        f"boxes={detection(root / 'boxes', 3)}",
    ]
    assert write_report(runs, root / "out", preset=preset) == root / "out" / "report.html"
    assert sorted(path.name for path in (root / "out").iterdir()) == FILES
    return preset, bins, root / "out"


def test_numbers_are_those_of_calibration(report):
    preset, bins, out = report
    told = json.loads((out / "report.json").read_text())
    assert (told["preset"]["name"], told["preset"]["bins"]) == (preset, bins)
    runs = {run["name"]: run["values"] for run in told["runs"]}
    for seed, name in enumerate((NASTY, "PS-KD")):
        want = expected(arrays(seed), bins) | {"epochs": 3, "seconds_per_epoch": 2 + seed}
        assert runs[name] == pytest.approx(want)
    want = expected(arrays(2, top5=False), bins)
    assert runs["NMT"] == pytest.approx(want | {"bleu": 33.5, "chrf": 55, "tokenised_bleu": 32})
    # Of the arrays, not the 0.9 over 15 bins that the run itself tells.
    want = expected(arrays(3, scaled=False, nll=False, top5=False), bins)
    del want["top1_error"]
    want |= {"AP": 21.5, "AP50": 40.25, "voc_AP50": 44, "la_ece": 0.125, "box_nll": 0.75}
    want |= {"iou_threshold": 0.5, "score_threshold": 0.3, "num_detections": ROWS}
    assert runs["boxes"] == pytest.approx(want | {"seconds_per_iteration": 0.5})
    for task, rows in told["tables"].items():
        for row in rows:
            assert row["runs"] == 1
            assert set(row["deviation"].values()) == {None}
            shown = {key: value for key, value in row["mean"].items() if value is not None}
            assert shown == pytest.approx(runs[row["name"]])
            assert set(row["mean"]) == set(told["metrics"][task])


def test_page_shows_them_in_the_units_of_the_preset(report):
    preset, bins, out = report
    want = expected(arrays(0), bins)
    percent, area, nats = (100.0, 1000.0, 3) if preset == "paper" else (1.0, 1.0, 4)
    digits = 2 if preset == "paper" else 4
    scales = {"top1_error": percent, "top5_error": percent, "nll": None, "ece": percent}
    scales |= {"aurc": area, "e_aurc": area}
    titles = {"top1_error": "Top-1 error", "top5_error": "Top-5 error", "nll": "NLL", "ece": "ECE"}
    titles |= {"aurc": "AURC", "e_aurc": "E-AURC"}
    shown = {
        titles[key]: f"{want[key]:.{nats}f}" if scale is None else f"{want[key] * scale:.{digits}f}"
        for key, scale in scales.items()
    }
    shown |= {
        "epochs": "3",
        "time per epoch": "2.0",
        "T": "1.25",
        "NLL after scaling": f"{want['scaled_nll']:.{nats}f}",
        "ECE after scaling": f"{want['scaled_ece'] * percent:.{digits}f}",
        "AURC after scaling": f"{want['scaled_aurc'] * area:.{digits}f}",
    }
    assert Page(out / "report.html").column(NASTY) == shown


def test_csv_has_a_raw_row_for_each_run(report):
    _, _, out = report
    told = json.loads((out / "report.json").read_text())["runs"]
    rows = read_csv(out)
    assert len(rows) == 4
    for row, run in zip(rows, told, strict=True):
        assert {key: row[key] for key in ("name", "task", "folder")} == {
            key: run[key] for key in ("name", "task", "folder")
        }
        assert row["seed"] == ("" if run["seed"] is None else str(run["seed"]))
        numbers = {key: value for key, value in list(row.items())[4:] if value}
        assert {key: float(value) for key, value in numbers.items()} == run["values"]


def test_page_is_well_formed_and_needs_nothing_else(report):
    _, _, out = report
    page = Page(out / "report.html")
    assert not {"script", "link", "iframe", "object", "base"} & page.tags
    assert page.links
    assert "details" in page.tags
    assert all(link.startswith("data:image/") for link in page.links)
    source = (out / "report.html").read_text(encoding="utf-8")
    assert not [word for word in ("http:", "https:", "url(", "@import") if word in source]
    for task in ("Classification", "Detection", "Translation"):
        assert f"<h2>{task}</h2>" in source


def test_names_are_text(report):
    _, _, out = report
    page = Page(out / "report.html")
    source = (out / "report.html").read_text(encoding="utf-8")
    assert NASTY not in source
    assert f"Reliability of {NASTY}" in "".join(page.captions)
    assert f"--note {NASTY}" in page.text  # the command
    assert f"{NASTY}× 0.25" in page.text  # an example's label
    assert read_csv(out)[0]["name"] == NASTY


def test_hard_examples_are_drawn_against_the_baseline(report):
    _, _, out = report
    captions = [c for c in Page(out / "report.html").captions if c.startswith("How ")]
    assert len(captions) == 1
    assert captions[0].startswith("How PS-KD rescaled")
    assert f"hard it was for {NASTY}." in captions[0]


@pytest.mark.parametrize(
    "baseline", ["none", "no examples", "other ids", "of another teacher", "nothing known"]
)
def test_no_hard_examples_without_a_baseline(baseline, tmp_path):
    runs = [str(classification(tmp_path / "pskd", 1, pskd=True))]
    if baseline != "none":
        taught = baseline == "of another teacher"
        other = classification(tmp_path / "other", 2, pskd=taught)
        if baseline == "no examples":
            (other / "examples.npz").unlink()
        if baseline == "other ids":
            write_examples(other, np.full(EXAMPLES, np.nan), prefix="elsewhere/")
        if baseline == "nothing known":
            with np.load(other / "examples.npz") as file:
                content = dict(file) | {"difficulty": np.full(EXAMPLES, np.nan)}
            write(other, "examples.npz", content)
        runs.append(str(other))
    page = Page(write_report(runs, tmp_path / "out"))
    assert not [caption for caption in page.captions if caption.startswith("How ")]
    assert [caption for caption in page.captions if caption.startswith("What PS-KD did")]


def test_runs_of_one_name_are_one_row(tmp_path):
    runs = [f"CE={classification(tmp_path / f's{seed}', seed)}" for seed in (0, 1, 2)]
    page = Page(write_report([*runs, str(classification(tmp_path / "one", 3))], tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    row, other = told["tables"]["classification"]
    assert (row["name"], row["runs"], other["name"], other["runs"]) == ("CE", 3, "one", 1)
    seeds = [expected(arrays(seed), 10) for seed in (0, 1, 2)]
    for key in seeds[0]:
        values = np.array([seed[key] for seed in seeds])
        assert row["mean"][key] == pytest.approx(values.mean())
        deviation = np.sqrt(np.square(values - values.mean()).sum() / 2)
        assert row["deviation"][key] == pytest.approx(deviation)
        assert other["deviation"][key] is None
    mean, deviation = row["mean"]["top1_error"], row["deviation"]["top1_error"]
    assert page.column("CE")["Top-1 error"] == f"{100 * mean:.2f} ± {100 * deviation:.2f}"
    assert [line["name"] for line in read_csv(tmp_path / "out")] == ["CE"] * 3 + ["one"]


def test_temperature_columns_only_where_a_run_has_them(tmp_path):
    plain = classification(tmp_path / "plain", 0, scaled=False)
    scaled = classification(tmp_path / "scaled", 1)
    path = write_report([str(plain)], tmp_path / "without")
    assert "after scaling" not in Page(path).text
    assert not [key for key in read_csv(path.parent)[0] if key.startswith(("scaled", "temper"))]
    page = Page(write_report([str(plain), str(scaled)], tmp_path / "with"))
    scaled = ["T", *(f"{title} after scaling" for title in ("NLL", "ECE", "AURC"))]
    assert [page.column("plain")[title] for title in scaled] == ["-"] * 4
    assert "-" not in page.column("scaled").values()
    assert read_csv(tmp_path / "with")[0]["scaled_ece"] == ""


def test_numbers_without_arrays(tmp_path):
    last = {"top1_error": 0.25, "nll": 1.5, "ece": 0.0625, "aurc": 0.125}
    folder = write(tmp_path / "run", "results.json", {"last": last})
    write_report([str(folder)], tmp_path / "guo", preset="guo")
    write_report([str(folder)], tmp_path / "paper")
    (guo,), (paper,) = (
        json.loads((tmp_path / name / "report.json").read_text())["runs"]
        for name in ("guo", "paper")
    )
    assert guo["values"] == last
    # An ECE over 15 bins is none over 10.
    assert paper["values"] == {key: value for key, value in last.items() if key != "ece"}


def test_half_a_last_line_of_a_stopped_training_is_left_out(tmp_path):
    folder = classification(tmp_path / "run", 0, pskd=True)
    with (folder / "metrics.json").open("a") as file:
        file.write('{"epoch": 4, "pskd/al')
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0


def spoil_nothing_there(folder):
    for path in folder.iterdir():
        path.unlink()


def spoil_bytes(folder):
    path = folder / "confidence.npz"
    content = bytearray(path.read_bytes())
    content[60:200] = b"\xff" * 140
    path.write_bytes(content)


def spoiled(name: str, change: dict):
    def spoil(folder):
        with np.load(folder / name) as file:
            content = dict(file) | change
        write(folder, name, {key: value for key, value in content.items() if value is not None})

    return spoil


def written(name: str, content):
    return lambda folder: write(folder, name, content)


short = np.zeros(ROWS - 1)
SPOILED = {
    "empty folder": spoil_nothing_there,
    "half a results.json": written("results.json", '{"task": "classif'),
    "no object": written("results.json", [1]),
    "unknown task": written("results.json", {"task": "poetry"}),
    "last is no object": written("results.json", {"last": 3}),
    "command is a number": written("results.json", {"command": 5}),
    "half a metrics.json": written("metrics.json", '{"epoch": 1, "tr\n{"epoch": 2}\n'),
    "metrics of something else": written("metrics.json", "[1, 2]\n3\n"),
    "half a reweighted.json": written("reweighted.json", '{"most": ['),
    "no factor": written("reweighted.json", {"most": [{"id": "a", "label": "b"}]}),
    "image from elsewhere": written(
        "reweighted.json",
        {"most": [{"id": "a", "label": "b", "rescaling": 1, "image": "https://example.org/a.png"}]},
    ),
    "no arrays": written("confidence.npz", {}),
    "half an archive": lambda folder: (folder / "confidence.npz").write_bytes(b"PK\x03\x04half"),
    "broken archive": spoil_bytes,
    "no correct": spoiled("confidence.npz", {"correct": None}),
    "lengths of correct": spoiled("confidence.npz", {"correct": short}),
    "lengths of nll": spoiled("confidence.npz", {"nll": short}),
    "matrix": spoiled("confidence.npz", {"confidence": np.zeros((ROWS, 2))}),
    "confidence in percent": spoiled("confidence.npz", {"confidence": np.full(ROWS, 50.0)}),
    "negative nll": spoiled("confidence.npz", {"nll": np.full(ROWS, -1.0)}),
    "several temperatures": spoiled("confidence.npz", {"temperature": np.ones(2)}),
    "lengths of examples": spoiled("examples.npz", {"rescaling": np.ones(EXAMPLES + 1)}),
    "an id twice": spoiled("examples.npz", {"ids": np.zeros(EXAMPLES, int)}),
    "difficulty in percent": spoiled("examples.npz", {"difficulty": np.full(EXAMPLES, 50.0)}),
    "factors as words": spoiled("examples.npz", {"rescaling": np.array(["x"] * EXAMPLES)}),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_refuses_what_is_no_run_and_writes_nothing(kind, tmp_path, capsys):
    good = classification(tmp_path / "good", 0)
    folder = classification(tmp_path / "spoiled_run", 1, pskd=True)
    SPOILED[kind](folder)
    runs = [str(good), str(folder)]
    with pytest.raises(ValueError, match="spoiled_run"):
        write_report(runs, tmp_path / "out")
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "spoiled_run" in printed.err
    assert not (tmp_path / "out").exists()


def test_refuses_wrong_runs_and_presets(tmp_path):
    folder = classification(tmp_path / "run", 0)
    out = tmp_path / "out"
    for runs, told in (
        ([], "at least one"),
        ([str(tmp_path / "missing")], "missing"),
        ([str(folder), f"again={folder}"], "run"),
        ([f"={folder}"], "NAME=FOLDER"),
    ):
        with pytest.raises(ValueError, match=told):
            write_report(runs, out)
    with pytest.raises(ValueError, match="'nature'"):
        write_report([str(folder)], out, preset="nature")
    assert not out.exists()


def test_command_line(tmp_path, capsys):
    folder = classification(tmp_path / "a=b", 0)  # a folder that is there is no NAME=FOLDER
    out = tmp_path / "out"
    assert main(["report", str(folder), "--out", str(out), "--preset", "guo"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert read_csv(out)[0]["name"] == "a=b"
    assert main(["report", str(tmp_path / "missing"), "--out", str(tmp_path / "none")]) == 2
    assert "missing" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(folder), "--out", str(tmp_path / "file")]) == 1
    for words in (["report"], ["report", str(folder), "--preset", "nature"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
    assert not (tmp_path / "none").exists()


def test_names_of_classes_need_not_be_utf_8(tmp_path, monkeypatch):
    odd = np.array(["cat", "dog", "\udce9mu"])  # as Python names a byte of a folder's name
    monkeypatch.setattr(made_up_runs, "CLASSES", odd)
    runs = [made_up_runs.classification(tmp_path / n, pskd=n == "pskd") for n in ("ce", "pskd")]
    page = write_report([str(run) for run in runs], tmp_path / "report")
    assert "\\udce9mu" in page.read_text(encoding="utf-8")
