"""The benchmark of the loss: its forms agree, its figures are there, and its limits are kept."""

from __future__ import annotations

import copy
import importlib
import json
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
OURS = ["pskd dense", "pskd logits", "pskd top-k"]
IN_PLACE = [f"{name} in place" for name in OURS]
OTHERS = ["mixed target", "published"]
NAMES = {"cross-entropy", *OTHERS, *OURS, *IN_PLACE}


@pytest.fixture(scope="module")
def benchmark():
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("loss")
    finally:
        sys.path.remove(str(FOLDER))
        torch.set_num_threads(threads)  # which a run has set


def case(benchmark, rows=8, classes=20, dtype=torch.float32):
    torch.manual_seed(0)
    return benchmark.Case.made_up(rows, classes, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [3, 700])
def test_forms_agree_in_value_and_gradient(benchmark, dtype, classes):
    made = case(benchmark, classes=classes, dtype=dtype)
    forms = benchmark.forms_of(made, compiled=False)
    assert forms.keys() == NAMES
    benchmark.check(made, forms)


def test_a_form_that_computes_something_else_is_named(benchmark):
    made = case(benchmark)
    forms = {
        "double": benchmark.Form(lambda logits: 2.0 * logits.logsumexp(1).mean()),
        **benchmark.forms_of(made, compiled=False),
    }
    with pytest.raises(AssertionError, match="loss of double"):
        benchmark.check(made, forms)


def test_only_forms_in_place_write_into_their_logits(benchmark):
    made = case(benchmark)
    before = made.values.clone()
    steps = benchmark.steps_of(made, benchmark.forms_of(made, compiled=False))
    storage = {name: step()[1].untyped_storage().data_ptr() for name, step in steps.items()}
    assert torch.equal(made.values, before)
    for name, step in steps.items():
        written = storage[name] == step.args[1].untyped_storage().data_ptr()
        assert written == (name in IN_PLACE), name
    # All others have the same logits, which no form may change.
    assert torch.equal(steps["cross-entropy"].args[1], before)


def test_a_compiler_that_does_not_work_is_left_out(benchmark, monkeypatch, capsys):
    def broken(function, **_):
        def call(*_args, **_kwargs):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # saves seconds of imports
    forms = benchmark.checked_forms(case(benchmark), compiled=True)
    assert forms.keys() == NAMES
    assert "no compiler" in capsys.readouterr().err


SIZE = 4 << 23  # bytes


def peak_of_two_tensors() -> int | None:
    """Return what `extra_peak` says of a step that holds two tensors of `SIZE` at once."""
    kept = torch.ones(SIZE // 4)

    def step():
        first = kept + 1.0
        second = first + 1.0
        del first
        return second * 2.0, second

    return importlib.import_module("_loss_memory").extra_peak(step, "cpu")


def test_extra_peak_is_what_a_step_allocates(benchmark):
    # In a process of its own, as the benchmark measures: in this one freed blocks lie about.
    start = partial(importlib.import_module("_loss_memory").start_measuring, 1)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, initializer=start) as process:
        found = process.submit(peak_of_two_tensors).result()
    if found is None:
        pytest.skip("this system does not tell the peak memory of a process (Linux does)")
    assert found == pytest.approx(2 * SIZE, rel=0.05)


def test_memory_is_that_of_the_tensors_that_are_alive_at_once(benchmark):
    names = ["cross-entropy", "pskd dense", "pskd dense in place"]
    (found,) = benchmark.memory([benchmark.Wanted(2000, 3000, "float32", names)], 1, "cpu")
    if found is None:
        pytest.skip("this system does not tell the peak memory of a process (Linux does)")
    # Its log-probabilities and the gradients on them and on the logits.
    assert found["cross-entropy"] == pytest.approx(3.0, abs=0.1)
    assert 0.9 < found["pskd dense"] < 2.0
    assert found["pskd dense in place"] == pytest.approx(found["pskd dense"] - 1.0, abs=0.1)


@pytest.fixture(scope="module")
def tiny_run(benchmark, tmp_path_factory):
    """The status, the figures and the folder of a run with made-up memory of its second shape."""
    folder = tmp_path_factory.mktemp("tiny")
    flags = ["--shapes", "16x10", "60x1500", "--threads", "1", "2", "--rounds", "3"]
    flags += [
        "--without-compile",
        "--json",
        str(folder / "a.json"),
        "--plot",
        str(folder / "a.png"),
    ]

    def memory(wanted, threads, device):
        ((rows, classes, dtype, names),) = wanted
        assert (rows, classes, dtype, threads, device) == (60, 1500, "float32", 2, "cpu")
        return [dict.fromkeys(names, 0.5)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "memory", memory)
        patch.setattr(benchmark, "SAMPLE_SECONDS", 1e-3)
        patch.setattr(benchmark, "MEASURABLE_BYTES", 100_000)
        status = benchmark.main(flags)
    return status, json.loads((folder / "a.json").read_text()), folder


def test_tells_all_figures(tiny_run):
    _, result, _ = tiny_run
    assert result["torch"] == torch.__version__
    assert result["backend"] in ("native", "triton", "torch")
    assert (result["dtype"], result["device"], result["rounds"]) == ("float32", "cpu", 3)
    small, large = result["shapes"]
    assert (small["rows"], small["classes"], small["logits_bytes"]) == (16, 10, 640)
    for shape in (small, large):
        assert shape["threads"].keys() == {"1", "2"}
        for found in shape["threads"].values():
            assert found["seconds"].keys() == NAMES
            assert all(value > 0 for value in found["seconds"].values())
            assert found["ratio_median"].keys() == NAMES - {"cross-entropy"}
            for name, ratio in found["ratio_median"].items():
                low, high = found["ratio_quartiles"][name]
                assert low <= ratio <= high and ratio > 0
    assert small["memory"] is None
    assert large["memory"] == dict.fromkeys(NAMES, 0.5)


def test_ends_with_the_limits(tiny_run, benchmark):
    status, result, _ = tiny_run
    assert result["missed"] == benchmark.missed(result["shapes"])
    # Half of the logits is too much for each of the forms in place.
    assert [line for line in result["missed"] if "0.50 of the logits' memory" in line]
    assert status == 1


def test_the_picture_is_written(tiny_run):
    *_, folder = tiny_run
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in folder.iterdir()) == ["a.json", "a.png"]


def test_the_bandwidth_has_a_table_on_a_gpu(tiny_run, benchmark):
    report = importlib.import_module("_loss_report")
    shapes = [shape | {"of_copy": {"pskd dense": 0.875}} for shape in tiny_run[1]["shapes"]]
    assert report.bandwidth_table(shapes).splitlines()[2:] == ["| pskd dense | 0.88 | 0.88 |"]
    told = benchmark.told(tiny_run[1] | {"shapes": shapes, "copy_bandwidth": 3e12})
    assert "copy (3.00 TB/s)" in told and "| pskd dense | 0.88 | 0.88 |" in told


def test_tables_have_a_line_a_form_and_a_dash_for_what_is_missing(tiny_run):
    report = importlib.import_module("_loss_report")
    shapes = copy.deepcopy(tiny_run[1]["shapes"])
    del shapes[1]["threads"]["1"]["ratio_median"]["published"]
    times = report.time_table(shapes, "1").splitlines()
    assert times[0] == "| rows x classes | 16 x 10 | 60 x 1,500 |"
    assert len(times) == 2 + len(NAMES)
    assert next(line for line in times if "published" in line).endswith("| - |")
    memory = report.memory_table(shapes).splitlines()
    assert len(memory) == 2 + len(NAMES)
    assert all(line.endswith("| - | 0.50 |") for line in memory[2:])


def test_the_share_of_the_bandwidth_counts_what_has_to_be_moved(benchmark):
    made = case(benchmark, rows=8, classes=20, dtype=torch.bfloat16)
    taken = {
        "cross-entropy": 1.0,
        "pskd dense": 0.5,
        "pskd logits in place": 1.0,
        "pskd top-k": 1.0,
    }
    logits, kept = 8 * 20 * 2, 8 * 16
    bytes_of = {
        "pskd dense": 2 * (2 * logits + 8 * 20 * 4),
        "pskd logits in place": 3 * logits,
        "pskd top-k": 2 * logits + kept * (8 + 4),
    }
    shares = importlib.import_module("_loss_bandwidth").shares(made, taken, 1000.0)
    assert shares == {name: pytest.approx(moved / 1000) for name, moved in bytes_of.items()}


def figures(classes: int, ratio: float, memory: float, in_place: float) -> dict:
    """Return figures of all of pskd's forms, and of another that may cost anything."""
    ratios = {"published": 9.0, **dict.fromkeys(OURS + IN_PLACE, ratio)}
    of_memory = {"published": 9.0, **dict.fromkeys(OURS, memory)}
    of_memory |= dict.fromkeys(IN_PLACE, in_place)
    found = {"rows": 4, "classes": classes, "logits_bytes": 1 << 30, "of_copy": None}
    return found | {"threads": {"1": {"ratio_median": ratios}}, "memory": of_memory}


def figures_of_a_gpu(share: float, **others) -> dict:
    """Return figures of a GPU, where forms may take any time."""
    of_copy = dict.fromkeys(OURS, share)
    return figures(1000, 3.0, 1.0, 0.0) | {"of_copy": of_copy} | others


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (figures(1000, 1.0, 1.05, 0.05), []),
        (figures(999, 1.5, 1.0, 0.0), []),
        (figures(1000, 1.01, 1.0, 0.0), ["4x1000, 1 thread(s): 1.01 of cross-entropy's time"]),
        (figures(999, 1.51, 1.0, 0.0), ["4x999, 1 thread(s): 1.51 of cross-entropy's time"]),
        (figures(1000, 1.0, 1.06, 0.0), ["4x1000: 1.06 of the logits' memory, limit 1.05"]),
        (figures(1000, 1.0, 1.0, 0.06), ["4x1000: 0.06 of the logits' memory, limit 0.05"]),
        (figures(1000, float("nan"), 1.0, 0.0), ["nan of cross-entropy's time"]),
        (figures_of_a_gpu(0.8), []),
        (figures_of_a_gpu(0.79), ["dense, 4x1000: 0.79 of the copy bandwidth, at least 0.8"]),
        (figures_of_a_gpu(float("nan")), ["nan of the copy bandwidth"]),
        (figures_of_a_gpu(0.1, logits_bytes=1 << 20), []),  # a cache may hold them
    ],
)
def test_a_figure_over_its_limit_is_told(benchmark, found, wanted):
    lines = benchmark.missed([found])
    for text in wanted:
        assert any(text in line for line in lines)
    assert bool(lines) == bool(wanted)
    assert not any("published" in line for line in lines)


def test_memory_that_was_not_measured_misses_no_limit(benchmark):
    assert benchmark.missed([figures(1000, 0.5, 1.0, 0.0) | {"memory": None}]) == []


@pytest.mark.parametrize(
    "flags", [["--shapes", "256"], ["--shapes", "0x5"], ["--rounds", "2"], ["--threads", "0"]]
)
def test_refuses_what_it_cannot_measure(benchmark, flags):
    with pytest.raises(SystemExit):
        benchmark.main(flags)


# -- The page --------------------------------------------------------------------------------------


def numbers(table: str) -> list[list[str]]:
    """Return the numbers of each line of a table, but for the head and the first column."""
    lines = [line.strip("| ").split("|")[1:] for line in table.strip().splitlines()[2:]]
    return [re.findall(r"[\d,]+\.\d+", " ".join(line)) for line in lines]


@pytest.mark.parametrize(
    ("start", "name"),
    [
        ("**One thread.**", "loss.json"),
        ("**float32.**", "loss_gpu_float32.json"),
        ("**bfloat16.**", "loss_gpu_bfloat16.json"),
    ],
)
def test_the_tables_of_the_page_are_those_of_its_file(benchmark, start, name):
    docs = FOLDER.parent / "docs"
    figures = json.loads((docs / name).read_text(encoding="utf-8"))
    shapes = figures["shapes"]
    expected = [benchmark.time_table(shapes, threads) for threads in shapes[0]["threads"]]
    on_gpu = figures["device"] == "cuda"
    expected += [benchmark.bandwidth_table(shapes) if on_gpu else benchmark.memory_table(shapes)]
    text = (docs / "loss.md").read_text(encoding="utf-8").partition(start)[2]
    shown = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[: len(expected)]
    assert [numbers(table) for table in shown] == [numbers(table) for table in expected]
