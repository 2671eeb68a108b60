"""The pictures: whole files under their final name, the right numbers in the legend, no display."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from pskd.calibration import aurc, excess_aurc, reliability_bins
from pskd_tools.plots import epoch_plot, reliability_diagram, risk_coverage_plot

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

each_plot = pytest.mark.parametrize("plot", [reliability_diagram, risk_coverage_plot])


def run(seed: int, rows: int = 400):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1.0, rows)
    return confidence, rng.uniform(size=rows) < confidence**2


@pytest.fixture
def texts(monkeypatch):
    """Every text of the figure that was saved last."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found = []
    save = Figure.savefig

    def spy(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        found[:] = [text.get_text() for text in figure.findobj(Text)]

    monkeypatch.setattr(Figure, "savefig", spy)
    return found


@each_plot
def test_writes_one_whole_png_without_pyplot(plot, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    path = tmp_path / "plot.png"
    assert plot({"baseline": run(0), "PS-KD": run(1)}, str(path)) == path
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert all(500 <= side <= 4000 for side in image.size)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


@each_plot
@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_format_follows_the_suffix(plot, suffix, start, tmp_path):
    path = plot({"run": run(0, 50)}, tmp_path / f"plot{suffix}")
    assert path.read_bytes().startswith(start)


def test_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def half(figure, target, **kwargs):
        target.write_bytes(b"half a picture")
        raise OSError("disk full")

    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        reliability_diagram({"run": run(0)}, path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_each_run_is_named_with_its_numbers(tmp_path, texts):
    runs = {"baseline": run(0), "PS-KD": run(1)}
    reliability_diagram(runs, tmp_path / "plot.png", bins=10)
    for name, pair in runs.items():
        ece = reliability_bins(*pair, bins=10).expected_calibration_error
        assert f"{name}\nECE {ece:.4f}" in texts
    risk_coverage_plot(runs, tmp_path / "plot.png")
    for name, pair in runs.items():
        assert f"{name}: AURC {aurc(*pair):.4f}, E-AURC {excess_aurc(*pair):.4f}" in texts
    assert "optimal ranking" in texts


@each_plot
def test_awkward_names_are_shown_as_they_are(plot, tmp_path, texts):
    plot({"_$\\alpha_T$ 100%": run(0, 50), "x" * 200: run(1, 50)}, tmp_path / "plot.png")
    assert any("_$\\alpha_T$ 100%" in text for text in texts)
    assert any("xxx…" in text for text in texts)


@each_plot
@pytest.mark.parametrize(
    "pair",
    [([1.0, 1.0], [1, 1]), ([0.5, 0.6], [0, 0]), ([0.7], [True]), ([0.0, 1.0], [False, True])],
)
def test_extreme_runs_are_drawn(plot, pair, tmp_path):
    assert plot({"run": pair}, tmp_path / "plot.png").stat().st_size > 1000


def test_a_long_run_does_not_make_a_large_file(tmp_path):
    path = risk_coverage_plot({"run": run(0, 200_000)}, tmp_path / "plot.svg")
    assert path.stat().st_size < 1_000_000


@each_plot
@pytest.mark.parametrize(
    ("runs", "name", "message"),
    [
        ({}, "plot.png", "runs: expected at least one name"),
        ({"a": ([], [])}, "plot.png", "zero examples"),
        ({"a": ([0.5, 0.6], [True])}, "plot.png", "correct: expected shape"),
        ({"a": run(0)}, "plot", "path: expected a name that ends in one of .*png.*, got"),
        ({"a": run(0)}, "plot.txt", "path: expected a name that ends in one of .*png.*, got"),
    ],
)
def test_bad_runs_and_names_are_refused(plot, runs, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot(runs, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_matplotlib_is_imported_to_draw_and_its_absence_says_how_to_get_it(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.find_spec("pskd_tools.plots")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    with pytest.raises(ImportError, match="pip install matplotlib"):
        risk_coverage_plot({"run": run(0)}, tmp_path / "plot.png")


def test_epochs_are_drawn_as_far_as_they_have_a_teacher(texts, tmp_path):
    records = [
        {"epoch": 1, "alpha": 0.0},
        {"epoch": 2, "alpha": 0.35, "teacher_agreement": 0.6, "gradient_rescaling": 0.7},
        {"epoch": 3, "alpha": 0.7, "teacher_agreement": 0.8, "gradient_rescaling": -0.2},
    ]
    assert epoch_plot(records, tmp_path / "epochs.svg").exists()
    assert {"epoch", "teacher agreement", "gradient rescaling, all rows"} <= set(texts)
    assert not any("had wrong" in text for text in texts)
    for nothing in ([], [{"epoch": 1, "loss": 2.0}]):
        with pytest.raises(ValueError, match="expected an epoch with one of .*'alpha'"):
            epoch_plot(nothing, tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["epochs.svg"]
