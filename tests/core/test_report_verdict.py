"""What a report says first: what changed against the baseline, beyond noise or not, and where."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import made_up_runs as made
import numpy as np
import pytest

from pskd.calibration import reliability_bins
from pskd_tools.presets import PRESETS
from pskd_tools.report import figures, write_report
from pskd_tools.report.changed import changed_examples
from pskd_tools.report.compare import Difference, compare
from pskd_tools.report.runs import TASKS, read_runs
from pskd_tools.report.shared import shared_test_set
from pskd_tools.report.tables import make_tables
from pskd_tools.report.verdict import sentences
from pskd_tools.report.where import by_class, by_confidence, most_changed

PRESET = PRESETS["paper"]
FILES = ("test_pictures.json", "test_images.json", "sentences.json")


def pair_of(*words, preset=PRESET):
    """Compare two methods; return the comparison and its table."""
    (table,) = make_tables(read_runs([str(word) for word in words]), preset)
    (pair,) = compare(table, preset)
    return pair, table


def made_pair(folder: Path, task: str = "classification"):
    maker = getattr(made, task)
    return maker(folder / "a", 1), maker(folder / "b", 2)


def change(folder: Path, drop: tuple[str, ...] = (), **changes) -> Path:
    """Change arrays of a run's confidence.npz."""
    (path,) = folder.rglob("confidence.npz")
    with np.load(path) as found:
        arrays = dict(found) | changes
    np.savez(path, **{key: value for key, value in arrays.items() if key not in drop})
    return folder


def make_old(folder: Path) -> Path:
    """Take away what runs did not always write."""
    for name in FILES:
        for path in folder.rglob(name):
            path.unlink()
    return change(folder, drop=("ids", "label", "predicted", "class_names"))


def page(*words, out: Path, preset: str = "paper") -> str:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    path = write_report([str(word) for word in words], out, preset=preset)
    return path.read_text(encoding="utf-8")


def plain(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html))


# ---- differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_run_does_not_differ_from_its_copy(task, tmp_path):
    first = getattr(made, task)(tmp_path / "a")
    pair, table = pair_of(first, shutil.copytree(first, tmp_path / "b"))
    assert pair.differences
    for difference in pair.differences.values():
        assert difference.value == 0.0 and difference.interval in (None, (0.0, 0.0))
    known = {"nll", "top1_error", "top5_error", "ece", "aurc", "e_aurc", "bleu", "chrf"}
    for key in known & pair.differences.keys():
        has_interval = task != "detection" or key != "nll"
        assert (pair.differences[key].interval is not None) == has_interval, key
    assert not {"better", "worse"} & sentences(pair, table.columns).keys()


def test_a_difference_is_that_of_the_table(tmp_path):
    pair, table = pair_of(*made_pair(tmp_path))
    before, after = (row.values[0] for row in table.rows)
    for key, difference in pair.differences.items():
        assert difference.value == after[key] - before[key]
        low, high = difference.interval
        assert low <= difference.value <= high
    assert "time per epoch" not in {c.metric.title for c in table.columns if c.metric.better}


def test_only_a_difference_beyond_noise_is_coloured(tmp_path, monkeypatch):
    changes = {
        "top1_error": (Difference(-0.01, (-0.02, -0.005)), "better", "−1.00 [−2.00, −0.50]"),
        "nll": (Difference(0.01, (0.005, 0.02)), "worse", "+0.010 [+0.005, +0.020]"),
        "ece": (Difference(-0.01, (-0.02, 0.0)), "", "−1.00 [−2.00, 0.00]"),
        "aurc": (Difference(-0.01, (-0.02, 0.01)), "", "−10.00 [−20.00, +10.00]"),
        "e_aurc": (Difference(-0.01, None), "", "−10.00"),
    }
    differences = {key: difference for key, (difference, _, _) in changes.items()}
    monkeypatch.setattr(
        "pskd_tools.report.compare",
        lambda table, preset: [replace(compare(table, preset)[0], differences=differences)],
    )
    html = page(*made_pair(tmp_path), out=tmp_path / "out")
    first = html.partition("<tbody>")[2].partition("</tbody>")[0]
    shown = re.findall(r'<td>[\d.]+<small(?: class="(\w+)")?>(.+?)</small></td>', first)
    assert [(effect, plain(text)) for effect, text in shown] == [c[1:] for c in changes.values()]


def test_the_verdict_is_a_sentence_for_each_effect(tmp_path):
    pair, table = pair_of(*made_pair(tmp_path))
    changes = {
        "top1_error": Difference(0.001, (-0.01, 0.012)),
        "nll": Difference(-0.12, (-0.16, -0.08)),
        "ece": Difference(-0.021, (-0.03, -0.012)),
        "aurc": Difference(0.0041, (0.001, 0.007)),
        "scaled_aurc": Difference(0.001, (-0.001, 0.002)),
        "e_aurc": Difference(0.0041, None),
    }
    told = sentences(replace(pair, differences=changes), table.columns)
    assert told == {
        "better": "b lowers NLL by 0.120 nats [0.080, 0.160] and ECE by 2.10 percentage points "
        "[1.20, 3.00].",
        "worse": "b raises AURC x 1000 by 4.10 [1.00, 7.00].",
        "unclear": "top-1 error, AURC x 1000 after scaling.",
        "unknown": "E-AURC x 1000.",
    }


def test_a_higher_bleu_is_better(tmp_path):
    pair, table = pair_of(*made_pair(tmp_path, "translation"))
    changes = {"bleu": Difference(1.5, (0.5, 2.5)), "nll": Difference(-0.1, (-0.2, -0.05))}
    told = sentences(replace(pair, differences=changes), table.columns)
    assert told == {
        "better": "b raises BLEU by 1.50 points [0.50, 2.50] and lowers NLL by 0.100 nats "
        "[0.050, 0.200]."
    }


# ---- seeds ---------------------------------------------------------------------------------------


def seeds(folder: Path, *numbers: int) -> str:
    return ",".join(str(made.classification(folder / str(n), n)) for n in numbers)


def test_runs_after_one_name_are_seeds(tmp_path):
    names = [run.name for run in read_runs([f"CE={seeds(tmp_path, 1, 2, 3)}"])]
    assert names == ["CE"] * 3
    (tmp_path / "with,comma").mkdir()
    made.classification(tmp_path / "with,comma")
    (run,) = read_runs([f"CE={tmp_path / 'with,comma'}"])
    assert run.folder == tmp_path / "with,comma"


@pytest.mark.parametrize(
    ("second", "basis"),
    [
        ((1, 2, 3), "Student's t over 3 seeds, paired by seed"),
        ((4, 5), "Welch's t over 3 and 2 runs, not paired by seed"),
    ],
)
def test_intervals_of_several_seeds_are_over_seeds(second, basis, tmp_path):
    words = f"CE={seeds(tmp_path / 'ce', 1, 2, 3)}", f"PS-KD={seeds(tmp_path / 'kd', *second)}"
    pair, _ = pair_of(*words)
    assert basis in pair.basis
    if len(second) == 3:  # the same runs
        assert {d.interval for d in pair.differences.values()} == {(0.0, 0.0)}
    else:
        difference = pair.differences["nll"]
        assert difference.interval[0] < difference.value < difference.interval[1]


def test_several_seeds_against_one_run_are_compared_on_the_test_set(tmp_path):
    words = f"CE={seeds(tmp_path / 'ce', 1, 2)}", f"PS-KD={seeds(tmp_path / 'kd', 3)}"
    pair, table = pair_of(*words)
    assert pair.basis.startswith("95 % intervals: paired bootstrap over the 300 test examples")
    assert pair.differences["nll"].value == table.rows[1].mean("nll") - table.rows[0].mean("nll")
    assert pair.differences["nll"].interval is not None


# ---- what the runs share -------------------------------------------------------------------------


def test_rows_are_matched_by_id_whatever_their_order(tmp_path):
    first, second = made_pair(tmp_path)
    straight, _ = pair_of(first, second)
    with np.load(second / "confidence.npz") as found:
        arrays = {k: v[::-1] if v.shape == (300,) else v for k, v in found.items()}
    change(second, **arrays)
    turned, _ = pair_of(first, second)
    for key, difference in straight.differences.items():
        assert turned.differences[key].interval == pytest.approx(difference.interval, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"ids": np.array([f"other/{i}" for i in range(300)])}, "other ids"),
        ({"label": np.zeros(300, int)}, "other labels"),
        ({}, "299 rows instead of 300"),
    ],
)
def test_another_test_set_is_refused(changes, got, tmp_path):
    first, second = made_pair(tmp_path)
    if changes:
        change(second, **changes)
    else:
        make_old(first)
        made.write(second, "confidence.npz", made.rows(2, 299))
    message = f"^{second}: expected the test examples of {first}, got {got}$"
    with pytest.raises(ValueError, match=message):
        pair_of(first, second)
    with pytest.raises(ValueError, match=message):  # also as a seed
        compare(make_tables(read_runs([f"CE={first},{second}"]), PRESET)[0], PRESET)


def test_tokens_are_drawn_by_sentence_and_old_ones_one_by_one(tmp_path):
    first, second = made_pair(tmp_path, "translation")
    pair, _ = pair_of(first, second)
    assert (pair.tests.name, pair.tests.units) == ("sentences", [30, 30])
    assert pair.differences["bleu"].interval is not None
    old, _ = pair_of(make_old(first), make_old(second))
    assert (old.tests.name, old.tests.units) == ("tokens", [300, 300])
    assert "too narrow" in old.basis
    assert old.differences["bleu"].interval is None
    assert old.differences["nll"].interval is not None


def test_tokens_that_do_not_match_have_no_interval(tmp_path):
    first, second = made_pair(tmp_path, "translation")
    change(second, ids=np.r_[0, np.arange(299) // 10])
    pair, _ = pair_of(first, second)
    assert "cut their sentences into different tokens" in pair.basis
    assert pair.differences["nll"].interval is None
    assert pair.differences["bleu"].interval is not None
    for folder in (make_old(first), make_old(second)):
        (folder / "evaluation" / "sentences.json").unlink(missing_ok=True)
    made.write(second / "evaluation", "confidence.npz", made.rows(2, 250))
    pair, _ = pair_of(first, second)
    assert pair.tests is None and "different numbers of tokens" in pair.basis
    assert pair.differences["nll"].interval is None


def test_detections_are_drawn_by_image_or_else_apart(tmp_path):
    first, second = made_pair(tmp_path, "detection")
    pair, _ = pair_of(first, second)
    assert (pair.tests.name, pair.tests.units, pair.tests.joint) == (
        "images with detections",
        [30, 30],
        True,
    )
    assert pair.differences["AP"].interval is None and pair.differences["ece"].interval is not None
    old, _ = pair_of(make_old(first), make_old(second))
    assert not old.tests.joint and "not paired" in old.basis
    joint, apart = (p.differences["ece"].interval for p in (pair, old))
    assert joint != apart is not None


def test_few_examples_and_numbers_alone_have_no_interval(tmp_path):
    for name in "ab":
        made.write(tmp_path / name, "confidence.npz", made.rows(1, 8))
    pair, _ = pair_of(tmp_path / "a", tmp_path / "b")
    assert pair.basis == "No 95 % intervals: 8 test examples are too few for a bootstrap."
    assert {d.interval for d in pair.differences.values()} == {None}
    made.write(tmp_path / "c", "results.json", {"last": {"nll": 0.5}})
    pair, _ = pair_of(tmp_path / "a", tmp_path / "c")
    assert f"no confidence.npz with rows in {tmp_path / 'c'}" in pair.basis.replace("there is ", "")
    assert shared_test_set(read_runs([str(tmp_path / "c")])) is None


# ---- where ---------------------------------------------------------------------------------------


def test_groups_by_confidence_and_by_class_are_those_of_their_rows(tmp_path):
    pair, table = pair_of(*made_pair(tmp_path))
    before, after = (row.runs[0].rows for row in table.rows)
    classes = by_class(pair, PRESET)
    assert [group.name for group in classes.groups] == ["cat", "dog", "emu"]
    for label, group in enumerate(classes.groups):
        own = before["label"] == label
        error, nll = group.differences
        assert group.count == own.sum()
        assert group.baseline == pytest.approx(
            [1 - before["correct"][own].mean(), before["nll"][own].mean()]
        )
        change = after["nll"][own].mean() - before["nll"][own].mean()
        assert nll.value == pytest.approx(change)
        assert nll.interval[0] < change < nll.interval[1]
        assert error.interval[0] <= error.value <= error.interval[1]
    fifths = by_confidence(pair, PRESET)
    assert [group.count for group in fifths.groups] == [60] * 5
    least = np.argsort(before["confidence"])[:60]
    assert fifths.groups[0].baseline[0] == pytest.approx(1 - before["correct"][least].mean())
    ordered = most_changed(classes)
    assert [g.differences[0].value for g in ordered] == sorted(
        g.differences[0].value for g in classes.groups
    )


def test_of_many_classes_the_ends_are_shown(tmp_path):
    first, second = made_pair(tmp_path)
    for folder in (first, second):
        change(folder, label=np.arange(300) // 5, class_names=np.arange(60).astype(str))
    pair, _ = pair_of(first, second)
    classes = by_class(pair, PRESET)
    shown = most_changed(classes)
    values = sorted(group.differences[0].value for group in classes.groups)
    assert [group.differences[0].value for group in shown] == values[:10] + values[-10:]
    html = page(first, second, out=tmp_path / "out")
    assert "40 between those that gained and lost most are left out" in html


def test_a_detector_s_classes_are_told_by_ap(tmp_path):
    first, second = made_pair(tmp_path, "detection")
    numbers = json.loads((second / "results.json").read_text())
    numbers["bbox"] |= {"AP-car": 44.5, "AP-bus": 3.0}
    made.write(second, "results.json", numbers)
    pair, _ = pair_of(first, second)
    (group,) = by_class(pair, PRESET).groups
    assert (group.name, group.count, group.baseline) == ("car", None, [41.0])
    assert group.differences == [Difference(3.5, None)]
    assert by_confidence(pair, PRESET) is None


def test_changed_predictions_are_counted_and_shown(tmp_path):
    first, second = made_pair(tmp_path)
    label = np.zeros(300, int)
    guesses = [np.zeros(300, int), np.zeros(300, int)]
    guesses[0][:3], guesses[1][2:7] = 1, 2  # rows 0 and 1 are corrected, 2 is wrong in both
    for folder, guess in zip((first, second), guesses, strict=True):
        nll = np.where(guess == 0, 0.1, 2.0 + np.arange(300) / 100)
        change(folder, label=label, predicted=guess, correct=guess == 0, nll=nll)
    pair, _ = pair_of(first, second)
    changed = changed_examples(pair)
    won, lost = changed.better, changed.worse
    assert changed.counts == [2, 4, 1]
    assert [example.id for example in won] == ["test/001", "test/000"]
    assert [example.id for example in lost] == ["test/006", "test/005", "test/004", "test/003"]
    assert (won[0].label, won[0].predicted, won[0].image) == ("cat", ("dog", "cat"), made.IMAGE)
    html = page(f"CE={first}", f"PS-KD={second}", out=tmp_path / "out")
    assert "PS-KD corrects 2 and newly mistakes 4; 1 more are still wrong" in html
    assert html.count(f'<img src="{made.IMAGE}"') == 6


def test_changed_translations_are_those_of_other_chrf(tmp_path):
    first, second = made_pair(tmp_path, "translation")
    pair, table = pair_of(first, second)
    changed = changed_examples(pair)
    (up, down, same), won, lost = changed.counts, changed.better, changed.worse
    assert (up + down <= 30) and same == 0 and len(won) == len(lost) == 6
    gains = [example.scores[1] - example.scores[0] for example in won]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert won[0].source.startswith("Satz") and won[0].translations[0].endswith("<1>")
    html = page(first, second, out=tmp_path / "out")
    assert "&lt;1&gt;" in html and "<1>" not in html
    assert changed_examples(pair_of(first, make_old(second))[0]) is None


def test_changed_images_show_both_runs_boxes(tmp_path):
    first, second = made_pair(tmp_path, "detection")
    pair, _ = pair_of(first, second)
    changed = changed_examples(pair)
    assert changed.counts == [2] and not changed.worse
    (image,) = changed.better
    assert (image.id, [boxes.errors for boxes in image.seen]) == ("3", [1, 0])
    html = page(f"CE={first}", f"PS-KD={second}", out=tmp_path / "out")
    assert html.count("<svg") == 2 and html.count('<rect class="object"') == 4
    assert html.count('<rect class="right"') == 3 and '<rect class="wrong"' not in html
    assert "&lt;cat&gt; 0.88" in html and "<cat>" not in html


@pytest.mark.parametrize("task", TASKS)
def test_old_runs_are_reported_without_what_they_lack(task, tmp_path):
    first, second = (make_old(folder) for folder in made_pair(tmp_path, task))
    html = page(first, second, out=tmp_path / "out")
    (line,) = [line for line in plain(html).splitlines() if "left out: they need" in line]
    needed = {
        "classification": "ids, label and predicted in confidence.npz",
        "translation": "sentences.json",
        "detection": "test_images.json",
    }[task]
    assert f"they need {needed} of the same test set in both {first}, {second}." in line
    assert "95 % intervals: " in html


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_begins_with_the_verdict(tmp_path):
    html = page(*made_pair(tmp_path), out=tmp_path / "out")
    told = plain(html.partition("<body>")[2])
    order = ["pskd report", "b against a", "95 % intervals", "metric", "Where b differs from a"]
    places = [told.index(part) for part in [*order, "Reliability of a", "Where the numbers"]]
    assert places == sorted(places)
    inside = html.partition("<details>")[2].partition("</details>")[0]
    assert "Expected calibration error" in inside
    assert "<details open" not in html


def test_one_run_has_no_verdict(tmp_path):
    html = page(made.classification(tmp_path / "a"), out=tmp_path / "out")
    assert "against" not in plain(html.partition("<details>")[0]).partition("pskd report")[2]
    assert "Where a differs" not in html
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["verdict"] == {"classification": []}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_a_run_has_one_ece_on_the_page(preset, tmp_path, monkeypatch):
    drawn = []
    real = figures.reliability_diagram

    def watched(runs, path, *, bins, text):
        ((name, pair),) = runs.items()
        ece = reliability_bins(*pair, bins=bins).expected_calibration_error
        drawn.append((name, text(ece)))
        return real(runs, path, bins=bins, text=text)

    monkeypatch.setattr(figures, "reliability_diagram", watched)
    words = [f"CE={seeds(tmp_path / 'ce', 1, 2)}", f"boxes={made.detection(tmp_path / 'boxes', 4)}"]
    page(*words, out=tmp_path / "out", preset=preset.name)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    metric = preset.metrics["ece"]
    unit = " %" if metric.unit == "%" else ""
    first, _, boxes = (metric.text(run["values"]["ece"]) + unit for run in told["runs"])
    assert drawn == [("CE, seed 1", first), ("boxes", boxes)]


def test_the_verdict_is_in_the_json(tmp_path):
    first, second = made_pair(tmp_path)
    page(first, second, out=tmp_path / "out")
    ((told,),) = json.loads((tmp_path / "out" / "report.json").read_text())["verdict"].values()
    pair, table = pair_of(first, second)
    assert (told["name"], told["baseline"], told["basis"]) == ("b", "a", pair.basis)
    better = {column.key: column.metric.better for column in table.columns}
    assert told["differences"] == {
        key: {
            "difference": difference.value,
            "interval": list(difference.interval),
            "effect": difference.effect(better[key]) or None,
        }
        for key, difference in pair.differences.items()
    }


def test_all_files_are_written_or_none(tmp_path, monkeypatch):
    first, second = (str(folder) for folder in made_pair(tmp_path))
    out = tmp_path / "out"
    page(first, out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write = Path.write_text

    def fills_up(path, *words, **more):
        if path.name.startswith("report.") and path.suffix == ".html":
            write(path, "half")
            raise OSError("disk full")
        return write(path, *words, **more)

    monkeypatch.setattr(Path, "write_text", fills_up)
    for folder in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            write_report([first, second], folder)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    (out / "report.csv").unlink()
    (out / "report.csv").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*report.csv"):
        write_report([first, second], out)
    assert (out / "report.html").read_bytes() == before["report.html"]


def test_scores_of_other_tokens_are_not_compared(tmp_path):
    """Such as BLEU of Chinese words in one run and characters in the other."""
    folders = [made.translation(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    for folder, tokens in zip(folders, ("13a", "zh"), strict=True):
        path = folder / "evaluation" / "evaluation.json"
        numbers = json.loads(path.read_text())
        numbers["bleu_signature"] = f"nrefs:1|tok:{tokens}|version:2.6.0"
        numbers["chrf_signature"] = f"nrefs:1|version:2.{tokens}"
        path.write_text(json.dumps(numbers))
    (table,) = make_tables(read_runs([str(folder) for folder in folders]), PRESET)
    (pair,) = compare(table, PRESET)
    assert "bleu" not in pair.differences and "chrf" in pair.differences
    assert pair.basis.endswith(
        "BLEU is not compared: it was computed in different ways, nrefs:1|tok:13a and "
        "nrefs:1|tok:zh."
    )
