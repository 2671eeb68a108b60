"""The benchmark of the loss: its forms agree, its figures are there, and its limits are kept."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
OURS = ["pskd dense", "pskd logits", "pskd top-k"]
IN_PLACE = [f"{name} in place" for name in OURS]
NAMES = {"cross-entropy", "mixed target", "published", *OURS, *IN_PLACE}


@pytest.fixture(scope="module")
def benchmark():
    threads = torch.get_num_threads()
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("loss")
    finally:
        sys.path.remove(str(FOLDER))
        torch.set_num_threads(threads)  # which a run has set


def test_tells_all_figures(benchmark, monkeypatch, capsys, tmp_path):
    """The memory of the second shape is made up; half of the logits is too much for in place."""

    def alone(threads, device, function, *given):
        *shape, names = given
        assert (threads, device, shape) == (2, "cpu", [60, 1500, "float32", "cpu"])
        return dict.fromkeys(names, 0.5)

    monkeypatch.setattr(benchmark, "alone", alone)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(benchmark, "MEASURABLE_BYTES", 100_000)
    files = tmp_path / "a.json", tmp_path / "a.png"
    flags = "--shapes 16x10 60x1500 --threads 1 2 --rounds 3 --without-compile".split()
    assert benchmark.main([*flags, "--json", str(files[0]), "--plot", str(files[1])]) == 1
    result = json.loads(files[0].read_text())
    assert result["backend"] in ("native", "triton", "torch")
    assert (result["dtype"], result["device"], result["rounds"]) == ("float32", "cpu", 3)
    small, large = result["shapes"]
    assert (small["rows"], small["classes"], small["logits_bytes"]) == (16, 10, 640)
    for found in (times for shape in (small, large) for times in shape["threads"].values()):
        assert found["seconds"].keys() == NAMES
        assert found["ratio_median"].keys() == NAMES - {"cross-entropy"}
        for name, ratio in found["ratio_median"].items():
            low, high = found["ratio_quartiles"][name]
            assert 0 < low <= ratio <= high
    assert small["threads"].keys() == {"1", "2"}
    assert (small["memory"], large["memory"]) == (None, dict.fromkeys(NAMES, 0.5))
    assert sum("in place, 60x1500: 0.50 of the logits'" in line for line in result["missed"]) == 3
    assert files[1].read_bytes().startswith(b"\x89PNG")

    printed = capsys.readouterr().out.splitlines()
    assert printed.count("| rows x classes | 16 x 10 | 60 x 1,500 |") == 3
    assert "| published | - | 0.50 |" in printed and printed[-1] == result["missed"][-1]
    for shape in result["shapes"]:
        shape["of_copy"] = {"pskd dense": 0.875}
        del shape["threads"]["1"]["ratio_median"]["published"]
    told = benchmark.told(result | {"copy_bandwidth": 3e12})
    assert "copy (3.00 TB/s)" in told and "| pskd dense | 0.88 | 0.88 |" in told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_forms_agree_in_value_and_gradient(benchmark, dtype):
    torch.manual_seed(0)
    case = benchmark.Case.made_up(8, 700, dtype, "cpu")
    forms = benchmark.forms_of(case, compiled=False)
    assert forms.keys() == NAMES
    benchmark.check(case, forms)
    with pytest.raises(AssertionError, match="loss of double"):
        benchmark.check(case, {"double": lambda logits: 2.0 * forms["published"](logits)})


def test_a_compiler_that_does_not_work_is_left_out(benchmark, monkeypatch, capsys):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)  # saves seconds of imports
    assert not benchmark.checked(benchmark.Case.made_up(8, 20, "float32", "cpu"), compiled=True)
    assert "no compiler" in capsys.readouterr().err


def test_memory_is_that_of_the_tensors_that_are_alive_at_once(benchmark):
    names = ["cross-entropy", "pskd dense", "pskd dense in place"]
    found = benchmark.alone(1, "cpu", benchmark.memory, 2000, 3000, "float32", "cpu", names)
    if found is None:
        pytest.skip("this system does not tell the peak memory of a process (Linux does)")
    # Its log-probabilities and the gradients on them and on the logits.
    assert found["cross-entropy"] == pytest.approx(3.0, abs=0.1)
    assert 0.9 < found["pskd dense"] < 2.0
    assert found["pskd dense in place"] == pytest.approx(found["pskd dense"] - 1.0, abs=0.1)


def test_the_share_of_the_bandwidth_counts_what_has_to_be_moved(benchmark):
    case = benchmark.Case.made_up(8, 20, "bfloat16", "cpu")
    logits, kept = 8 * 20 * 2, 8 * 16
    assert case.least_bytes("pskd dense") == 2 * logits + 8 * 20 * 4
    assert case.least_bytes("pskd logits in place") == 3 * logits
    assert case.least_bytes("pskd top-k") == 2 * logits + kept * (8 + 4)


def figures(classes: int, ratio: float, memory: float, in_place: float, **others) -> dict:
    """Return figures of all of pskd's forms, and of another that may cost anything."""
    ratios = {"published": 9.0, **dict.fromkeys(OURS + IN_PLACE, ratio)}
    of_memory = {"published": 9.0, **dict.fromkeys(OURS, memory)}
    of_memory |= dict.fromkeys(IN_PLACE, in_place)
    found = {"rows": 4, "classes": classes, "logits_bytes": 1 << 30, "of_copy": None}
    return found | {"threads": {"1": {"ratio_median": ratios}}, "memory": of_memory} | others


def of_a_gpu(share: float, **others) -> dict:
    """Return figures of a GPU, where forms may take any time."""
    return figures(1000, 3.0, 1.0, 0.0, of_copy=dict.fromkeys(OURS, share), **others)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (figures(1000, 1.0, 1.05, 0.05), ""),
        (figures(999, 1.5, 1.0, 0.0) | {"memory": None}, ""),
        (figures(1000, 1.01, 1.0, 0.0), "4x1000, 1 thread(s): 1.01 of cross-entropy's time"),
        (figures(999, 1.51, 1.0, 0.0), "4x999, 1 thread(s): 1.51 of cross-entropy's time"),
        (figures(1000, 1.0, 1.06, 0.0), "4x1000: 1.06 of the logits' memory, limit 1.05"),
        (figures(1000, 1.0, 1.0, 0.06), "4x1000: 0.06 of the logits' memory, limit 0.05"),
        (figures(1000, float("nan"), 1.0, 0.0), "nan of cross-entropy's time"),
        (of_a_gpu(0.8), ""),
        (of_a_gpu(0.79), "dense, 4x1000: 0.79 of the copy bandwidth, at least 0.8"),
        (of_a_gpu(float("nan")), "nan of the copy bandwidth"),
        (of_a_gpu(0.1, logits_bytes=1 << 20), ""),  # a cache may hold them
    ],
)
def test_a_figure_over_its_limit_is_told(benchmark, found, wanted):
    told = "\n".join(benchmark.missed(found))
    assert wanted in told and bool(wanted) == bool(told)
    assert "published" not in told


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
    count = len(figures["shapes"][0]["threads"]) + 1  # of a GPU the bandwidth, else the memory
    page = (docs / "loss.md").read_text(encoding="utf-8").partition(start)[2]
    shown, printed = (
        [numbers(table) for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)[:count]]
        for text in (page, benchmark.told(figures))
    )
    assert shown == printed and all(map(any, shown))
