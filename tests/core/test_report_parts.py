"""What `pskd report` is made of: folders and logs that are read, names, marks, pictures."""

from __future__ import annotations

import json

import made_up_runs as made
import numpy as np
import pytest

from pskd_tools.cli import main
from pskd_tools.presets import PRESETS
from pskd_tools.report import figures
from pskd_tools.report.epochs import fairseq_epochs, read_epochs
from pskd_tools.report.figures import hard_example_figures, teacher_figures
from pskd_tools.report.plots import grouped_quartiles, hard_example_plot, teacher_plot
from pskd_tools.report.runs import TASKS, read_run, read_runs
from pskd_tools.report.tables import columns_of, make_tables

NEEDS_MATPLOTLIB = "needs matplotlib: pip install matplotlib"
MAKERS = {task: getattr(made, task) for task in TASKS}


def tables(*words, preset="guo"):
    return make_tables(read_runs([str(word) for word in words]), PRESETS[preset])


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_of_each_task_is_read(task, tmp_path):
    run = read_run(MAKERS[task](tmp_path / "run", pskd=True), "name")
    assert (run.name, run.task, run.has_teacher) == ("name", task, True)
    assert len(run.rows["confidence"]) == 300
    alphas = [record["alpha"] for record in run.epochs]
    assert alphas == sorted(alphas) and alphas[-1] == pytest.approx(0.8)
    assert [record["epoch"] for record in run.epochs] == list(range(1, len(alphas) + 1))
    plain = read_run(MAKERS[task](tmp_path / "plain"), "plain")
    assert not plain.has_teacher and plain.epochs == []


def test_translation_is_read_from_its_evaluation_as_from_its_training(tmp_path):
    whole = read_run(made.translation(tmp_path / "run", pskd=True), "run")
    part = read_run(tmp_path / "run" / "evaluation", "run")
    assert part.epochs == whole.epochs != []
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run" / "evaluation").rename(elsewhere)
    assert read_run(elsewhere, "run").epochs == whole.epochs


def test_a_trainings_folder_names_the_runs_in_it(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(ValueError, match="got none of them$"):
        read_run(folder, "mine")
    (folder / "checkpoint_best.pt").touch()
    with pytest.raises(ValueError, match=r"got none of them; .* by translation/evaluate.py, in"):
        read_run(folder, "mine")
    for name in ("test", "best"):
        (made.translation(tmp_path / name) / "evaluation").rename(folder / name)
    with pytest.raises(ValueError, match=f"these are runs: {folder}/best, {folder}/test$"):
        read_run(folder, "mine")


def test_a_log_without_epochs_is_told_by_iteration(tmp_path):
    run = read_run(made.detection(tmp_path / "run", pskd=True, epochs=False), "run")
    assert [record["iteration"] for record in run.epochs] == list(range(8))
    assert "epoch" not in run.epochs[0]


def test_a_cascades_stages_are_averaged_and_nan_is_left_out(tmp_path):
    lines = [
        {
            "iteration": 19,
            "stage0/pskd/gradient_rescaling": 0.25,
            "stage1/pskd/gradient_rescaling": 0.75,
            "pskd/teacher_nll": 1.0,  # not drawn
        },
        {"iteration": 39, "pskd/alpha": None, "stage0/pskd/gradient_rescaling": float("nan")},
    ]
    made.write(tmp_path, "metrics.json", lines)
    epochs = read_epochs(tmp_path / "metrics.json", None)
    assert epochs == [{"iteration": 19, "gradient_rescaling": 0.5}]


@pytest.mark.parametrize(
    "line",
    [
        '| INFO | train | {"epoch": 2, "train_loss": "3.5", "train_alpha": "0.4"}',
        '[2026-01-01 00:00:00,000][train][INFO] - {"epoch": 2, "train_loss": "3.5", '
        '"train_alpha": "0.4"}',
        "| INFO | train | epoch 002 | loss 3.5 | alpha 0.4",
        '{"epoch": 2, "train_loss": "3.5", "train_alpha": "0.4"}',
        "epoch 002 | loss 3.5 | alpha 0.4",
    ],
)
def test_every_form_of_fairseqs_log_is_read(line):
    log = "\n".join([line.replace("3.5", "9"), "| INFO | train_inner | {}", line, "other"])
    assert fairseq_epochs(log) == [{"epoch": 2, "loss": 3.5, "alpha": 0.4}]


@pytest.mark.parametrize("task", TASKS)
def test_confidence_and_a_task_are_a_run(task, tmp_path):
    made.write(tmp_path, "confidence.npz", made.rows(1))
    made.write(tmp_path, "results.json", {"task": task})
    (table,) = tables(tmp_path)
    assert table.task == task and {"ece", "aurc", "e_aurc"} <= table.rows[0].values[0].keys()


def test_an_evaluation_without_a_row_is_read_by_its_numbers(tmp_path):
    made.detection(tmp_path)
    nothing = {"confidence": np.empty(0), "correct": np.empty(0, bool)}
    made.write(tmp_path / "inference", "confidence.npz", nothing)
    (table,) = tables(tmp_path)
    values = table.rows[0].values[0]
    assert (values["ece"], values["e_aurc"], values["voc_AP50"]) == (0.1, 0.1, 44.0)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("confidence.npz", {"correct": None}, "expected an array correct, got class_names, conf"),
        ("confidence.npz", {"confidence": np.zeros((300, 2))}, r"confidence: expected a vector"),
        ("confidence.npz", {"temperature": np.ones(2)}, "temperature: expected a single number"),
        ("confidence.npz", {"label": np.zeros(300)}, "label: expected integers, got dtype float"),
        ("examples.npz", {"difficulty": np.full(60, 50.0)}, r"difficulty: expected values in \[0"),
        ("examples.npz", {"rescaling": np.array(["x"] * 60)}, "rescaling: expected real numbers"),
    ],
)
def test_a_damaged_array_is_named(file, changes, says, tmp_path):
    path = made.classification(tmp_path) / file
    with np.load(path) as found:
        arrays = dict(found) | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=f"^{path}: {says}"):
        read_run(tmp_path, "run")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("test_pictures.json", {"a": "https://example.org"}, "images by id"),
        ("sentences.json", {"translation": ["a"]}, "source, reference, translation"),
        ("test_images.json", {"3": {"width": 3}}, "images with objects and detections"),
    ],
)
def test_a_damaged_file_is_named(file, content, says, tmp_path):
    made.write(made.classification(tmp_path), file, content)
    with pytest.raises(ValueError, match=f"^{tmp_path / file}: expected {says}"):
        read_run(tmp_path, "run")


def test_numbers_that_no_column_knows_are_no_run(tmp_path):
    made.write(tmp_path, "results.json", {"baseline": {"bleu": 30.0}})
    with pytest.raises(ValueError, match="expected numbers of a classification run, got none"):
        tables(tmp_path)


# ---- names ---------------------------------------------------------------------------------------


def test_names_are_folders_and_made_distinct(tmp_path):
    words = [made.classification(tmp_path / name, 1) for name in ("a/run", "b/run", "other")]
    names = [run.name for run in read_runs([str(word) for word in words])]
    assert names == ["a/run", "b/run", "other"]
    names = [run.name for run in read_runs([f"other={words[0]}", str(words[2])])]
    assert names[0] == "other" and names[1].endswith("/other")


def test_a_folder_is_the_same_by_every_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made.classification(tmp_path / "here")
    with pytest.raises(ValueError, match="expected each folder once"):
        read_runs(["here", "a=./here"])


# ---- tables --------------------------------------------------------------------------------------


def test_a_quantity_that_one_seed_lacks_is_no_mean(tmp_path):
    first, second = (made.classification(tmp_path / str(seed), seed) for seed in (1, 2))
    made.write(second, "confidence.npz", made.rows(2))
    (table,) = tables(f"a={first}", f"a={second}")
    assert table.rows[0].mean("temperature") is None
    assert table.rows[0].mean("nll") is not None


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
@pytest.mark.parametrize("task", TASKS)
def test_every_column_says_what_it_is(task, preset):
    columns = columns_of(task, preset)
    assert len({column.key for column in columns}) == len(columns)
    for column in columns:
        assert column.metric.title and column.metric.meaning.endswith(".")
        assert column.metric.better in ("lower", "higher", "")
        assert column.raw_unit != "x 1000"


def test_an_infinite_nll_is_null_in_json(tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    arrays = made.rows(1)
    arrays["nll"][0] = np.inf
    made.write(tmp_path / "run", "confidence.npz", arrays)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.json").read_text()
    told = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["runs"][0]["values"]["nll"] is None


# ---- figures -------------------------------------------------------------------------------------


def test_iterations_are_not_drawn_over_epochs(tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    words = [made.detection(tmp_path / name, pskd=True, epochs=name == "a") for name in "ab"]
    (table,) = tables(*words)
    assert len(teacher_figures(table)) == 2


def test_hard_examples_are_matched_by_id(tmp_path, monkeypatch):
    drawn = []

    def draw(difficulty, rescaling, path):
        drawn.append((difficulty, rescaling))
        path.touch()

    monkeypatch.setattr(figures, "hard_example_plot", draw)
    words = [made.classification(tmp_path / name, pskd=name == "pskd") for name in ("ce", "pskd")]
    (table,) = tables(*words)
    hard_example_figures(table)
    ((difficulty, rescaling),) = drawn
    baseline, pskd = (row.runs[0].examples for row in table.rows)
    assert list(baseline["ids"]) != list(pskd["ids"])
    factor = dict(zip(pskd["ids"], pskd["rescaling"], strict=True))
    hardness = dict(zip(baseline["ids"], baseline["difficulty"], strict=True))
    expected = {(hardness[key], factor[key]) for key in made.IDS}
    assert set(zip(difficulty, rescaling, strict=True)) == expected


def test_quartiles_are_those_of_like_examples():
    difficulty = np.r_[np.full(5, 0.05), np.full(3, 0.55), np.full(4, 1.0)]
    rescaling = np.r_[np.arange(5.0), np.zeros(3), np.full(4, -1.0)]
    center, quartiles = grouped_quartiles(difficulty, rescaling)
    assert center.tolist() == [0.05, 1.0]  # three examples are no group
    assert quartiles.T.tolist() == [[1.0, 2.0, 3.0], [-1.0, -1.0, -1.0]]
    center, quartiles = grouped_quartiles(np.zeros(0), np.zeros(0))
    assert center.shape == (0,) and quartiles.shape == (3, 0)


@pytest.mark.parametrize(
    ("difficulty", "rescaling"),
    [
        ([0.5], [0.5]),
        ([0.0, 1.0], [1.0, 1.0]),
        (np.linspace(0, 1, 9000), np.linspace(1, -50, 9000)),
    ],
)
def test_extreme_examples_are_drawn(difficulty, rescaling, tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    path = hard_example_plot(difficulty, rescaling, tmp_path / "hard.svg")
    assert 1000 < path.stat().st_size < 1_000_000


@pytest.mark.parametrize(
    ("difficulty", "rescaling", "message"),
    [
        ([0.5], [np.nan], "expected an example with a difficulty and a factor, got none"),
        ([1.5], [0.5], r"difficulty: expected values in \[0, 1\]"),
    ],
)
def test_bad_examples_are_refused(difficulty, rescaling, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        hard_example_plot(difficulty, rescaling, tmp_path / "hard.png")
    assert not list(tmp_path.iterdir())


def test_curves_of_no_teacher_are_refused(tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    with pytest.raises(ValueError, match="expected one with alpha or gradient_rescaling, got none"):
        teacher_plot({"a": [{"epoch": 1, "teacher_nll": 1.0}]}, tmp_path / "teacher.png")
