"""`pskd report`: the numbers of pskd.calibration, a page that stands alone, clear refusals."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import made_up_runs as made
import numpy as np
import pytest

from pskd_tools.cli import main
from pskd_tools.presets import measure
from pskd_tools.report import write_report

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

NASTY = '<b>&"'
FILES = ["report.csv", "report.html", "report.json"]


def expected(folder: Path, bins: int) -> dict[str, float]:
    """Measure the rows of a run as test_presets.py shows that the core does."""
    (path,) = folder.rglob("confidence.npz")
    with np.load(path) as file:
        rows = dict(file)
    more = {key: rows.get(key) for key in ("nll", "in_top5")}
    values = measure(rows["confidence"], rows["correct"], **more, bins=bins)
    if "temperature" in rows:
        nll = rows["scaled_nll"]
        scaled = measure(rows["scaled_confidence"], rows["correct"], nll=nll, bins=bins)
        values |= {f"scaled_{key}": scaled[key] for key in ("nll", "ece", "aurc")}
        values["temperature"] = float(rows["temperature"])
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


def read_json(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "report.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=[("paper", 10), ("guo", 15)], ids=lambda p: p[0])
def report(request, tmp_path_factory):
    """Runs of every task under a preset: (preset, bins, folder of runs and report)."""
    preset, bins = request.param
    root = tmp_path_factory.mktemp(preset)
    runs = [
        f"{NASTY}={made.classification(root / 'ce', 0)}",
        f"PS-KD={made.classification(root / 'pskd', 1, pskd=True)}",
        f"NMT={made.translation(root / 'nmt', 2)}",
        f"@boxes={made.detection(root / 'boxes', 3)}",
    ]
    numbers = json.loads((root / "ce" / "results.json").read_text())
    made.write(root / "ce", "results.json", numbers | {"command": ["train.py", "--note", NASTY]})
    out = root / "out"
    assert write_report(runs, out, preset=preset) == out / "report.html"
    assert sorted(path.name for path in out.iterdir()) == FILES
    return preset, bins, root


def test_numbers_are_those_of_calibration(report):
    preset, bins, root = report
    told = read_json(root / "out")
    assert (told["preset"]["name"], told["preset"]["bins"]) == (preset, bins)
    runs = {run["name"]: run["values"] for run in told["runs"]}
    for seed, (name, folder) in enumerate({NASTY: "ce", "PS-KD": "pskd"}.items()):
        want = expected(root / folder, bins) | {"epochs": 20, "seconds_per_epoch": 10 + seed}
        assert runs[name] == pytest.approx(want)
    want = expected(root / "nmt", bins) | {"bleu": 32.0, "chrf": 55, "tokenised_bleu": 31}
    assert runs["NMT"] == pytest.approx(want)
    # Of the arrays, not the 0.1 over 15 bins that the run itself tells.
    want = expected(root / "boxes", bins)
    del want["top1_error"]
    want |= {
        "AP": 43.0,
        "AP50": 60.0,
        "voc_AP50": 44.0,
        "la_ece": 0.2,
        "box_nll": 0.4,
        "iou_threshold": 0.5,
    }
    want |= {"score_threshold": 0.05, "num_detections": 300, "seconds_per_iteration": 0.1}
    assert runs["@boxes"] == pytest.approx(want)
    for task, rows in told["tables"].items():
        for row in rows:
            assert row["runs"] == 1
            assert set(row["deviation"].values()) == {None}
            shown = {key: value for key, value in row["mean"].items() if value is not None}
            assert shown == pytest.approx(runs[row["name"]])
            assert set(row["mean"]) == set(told["metrics"][task])


def test_page_shows_them_in_the_units_of_the_preset(report):
    preset, bins, root = report
    want = expected(root / "ce", bins)
    percent, area, nats, digits = {"paper": (100, 1000, 3, 2), "guo": (1, 1, 4, 4)}[preset]
    scales = {"Top-1 error": percent, "Top-5 error": percent, "NLL": 1, "ECE": percent}
    scales |= {"AURC": area, "E-AURC": area}
    names = ("top1_error", "top5_error", "nll", "ece", "aurc", "e_aurc")
    keys = dict(zip(scales, names, strict=True))

    def text(title, key):
        return f"{want[key] * scales[title]:.{nats if title == 'NLL' else digits}f}"

    shown = {title: text(title, key) for title, key in keys.items()}
    for title in ("NLL", "ECE", "AURC"):
        shown[f"{title} after scaling"] = text(title, f"scaled_{keys[title]}")
    shown |= {"epochs": "20", "time per epoch": "10.0", "T": "1.25"}
    assert Page(root / "out" / "report.html").column(NASTY) == shown


def test_csv_has_a_raw_row_for_each_run(report):
    out = report[-1] / "out"
    told, rows = read_json(out)["runs"], read_csv(out)
    assert len(rows) == 4
    for row, run in zip(rows, told, strict=True):
        assert row.pop("name") == run["name"].replace("@", "'@")  # a spreadsheet's formula
        for key in ("task", "folder", "seed"):
            assert row[key] == ("" if run[key] is None else str(run[key]))
        numbers = {key: value for key, value in list(row.items())[3:] if value}
        assert {key: float(value) for key, value in numbers.items()} == run["values"]


def test_page_is_well_formed_and_needs_nothing_else(report):
    path = report[-1] / "out" / "report.html"
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert not {"script", "link", "iframe", "object", "base"} & page.tags
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert not [word for word in ("http:", "https:", "url(", "@import") if word in source]
    for task in ("Classification", "Detection", "Translation"):
        assert f"<h2>{task}</h2>" in source


def test_names_are_text(report):
    path = report[-1] / "out" / "report.html"
    page, source = Page(path), path.read_text(encoding="utf-8")
    assert NASTY not in source and "<emu>" not in source
    assert f"Reliability of {NASTY}" in "".join(page.captions)
    assert f"--note {NASTY}" in page.text  # the command
    assert "<emu>× 0.34" in page.text  # an example's label
    assert read_csv(path.parent)[0]["name"] == NASTY


def test_hard_examples_are_drawn_against_the_baseline(report):
    page = Page(report[-1] / "out" / "report.html")
    (caption,) = [caption for caption in page.captions if caption.startswith("How ")]
    assert caption.startswith("How PS-KD rescaled") and f"hard it was for {NASTY}." in caption


@pytest.mark.parametrize("baseline", ["no examples", "other ids", "a teacher", "nothing known"])
def test_no_hard_examples_without_a_baseline(baseline, tmp_path):
    run = made.classification(tmp_path / "pskd", 1, pskd=True)
    other = made.classification(tmp_path / "other", 2, pskd=baseline == "a teacher")
    path = other / "examples.npz"
    with np.load(path) as file:
        content = dict(file)
    if baseline == "other ids":
        content["ids"] = np.char.add("elsewhere/", content["ids"])
    if baseline == "nothing known":
        content["difficulty"] = np.full(len(made.IDS), np.nan)
    np.savez(path, **content)
    if baseline == "no examples":
        path.unlink()
    page = Page(write_report([str(run), str(other)], tmp_path / "out"))
    assert not [caption for caption in page.captions if caption.startswith("How ")]
    assert [caption for caption in page.captions if caption.startswith("What PS-KD did")]


def test_runs_of_one_name_are_one_row(tmp_path):
    folders = [made.classification(tmp_path / f"s{seed}", seed) for seed in (0, 1, 2)]
    words = [f"CE={folder}" for folder in folders]
    words.append(str(made.classification(tmp_path / "one", 3)))
    page = Page(write_report(words, tmp_path / "out"))
    row, other = read_json(tmp_path / "out")["tables"]["classification"]
    assert (row["name"], row["runs"], other["name"], other["runs"]) == ("CE", 3, "one", 1)
    seeds = [expected(folder, 10) for folder in folders]
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
    plain, scaled = (made.classification(tmp_path / name) for name in ("plain", "scaled"))
    made.write(plain, "confidence.npz", made.named(made.rows(1)))
    path = write_report([str(plain)], tmp_path / "without")
    assert "after scaling" not in Page(path).text
    assert not [key for key in read_csv(path.parent)[0] if key.startswith(("scaled", "temper"))]
    page = Page(write_report([str(plain), str(scaled)], tmp_path / "with"))
    titles = ["T", *(f"{title} after scaling" for title in ("NLL", "ECE", "AURC"))]
    assert [page.column("plain")[title] for title in titles] == ["-"] * 4
    assert "-" not in page.column("scaled").values()
    assert read_csv(tmp_path / "with")[0]["scaled_ece"] == ""


def test_numbers_without_arrays(tmp_path):
    last = {"top1_error": 0.25, "nll": 1.5, "ece": 0.0625, "aurc": 0.125}
    made.write(tmp_path / "run", "results.json", {"last": last})
    for preset in ("guo", "paper"):
        write_report([str(tmp_path / "run")], tmp_path / preset, preset=preset)
    (guo,), (paper,) = (read_json(tmp_path / name)["runs"] for name in ("guo", "paper"))
    assert guo["values"] == last
    # An ECE over 15 bins is none over 10.
    assert paper["values"] == {key: value for key, value in last.items() if key != "ece"}


def test_half_a_last_line_of_a_stopped_training_is_left_out(tmp_path):
    folder = made.classification(tmp_path / "run", pskd=True)
    with (folder / "metrics.json").open("a") as file:
        file.write('{"epoch": 4, "pskd/al')
    assert main(["report", str(folder), "--out", str(tmp_path / "out")]) == 0


def test_wrong_runs_are_named_and_nothing_is_written(tmp_path):
    folder, out = made.classification(tmp_path / "run"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for runs, told in (
        ([], "at least one"),
        ([str(folder), str(tmp_path / "empty")], "empty: expected the folder of a run"),
        ([f"={folder}"], "NAME=FOLDER"),
    ):
        with pytest.raises(ValueError, match=told):
            write_report(runs, out)
    with pytest.raises(ValueError, match="'nature'"):
        write_report([str(folder)], out, preset="nature")
    assert not out.exists()


def test_command_line(tmp_path, capsys):
    folder = made.classification(tmp_path / "a=b")  # a folder that is there is no NAME=FOLDER
    out = tmp_path / "out"
    assert main(["report", str(folder), "--out", str(out), "--preset", "guo"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert read_csv(out)[0]["name"] == "a=b"


def test_names_of_classes_need_not_be_utf_8(tmp_path, monkeypatch):
    odd = np.array(["cat", "dog", "\udce9mu"])  # as Python names a byte of a folder's name
    monkeypatch.setattr(made, "CLASSES", odd)
    runs = [made.classification(tmp_path / n, pskd=n == "pskd") for n in ("ce", "pskd")]
    page = write_report([str(run) for run in runs], tmp_path / "report")
    assert "\\udce9mu" in page.read_text(encoding="utf-8")
