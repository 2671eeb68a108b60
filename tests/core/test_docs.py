"""The pages on method, adapters and files are run as they stand, and links lead somewhere."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pskd

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("docs/method.md", "docs/adapter.md", "docs/memory_format.md")
LINKED = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/README.md")])
RESULT = re.compile(r"^print\(.*\)  # (.+)$", flags=re.MULTILINE)  # what a page says is printed
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py"))


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


# ---- what is shown is run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Callable[[str], dict]:
    """Return a function that runs a page's blocks, one after the other, in a folder of its own.

    It returns what they leave behind, and fails where a block prints something else than the page
    says it does.
    """

    @functools.cache
    def left_by(page: str) -> dict:
        left = {}
        with contextlib.chdir(tmp_path_factory.mktemp(Path(page).stem)):
            for code in re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL):
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, page, "exec"), left)
                assert printed.getvalue().splitlines() == RESULT.findall(code), code
            return left | {"folder": Path.cwd()}

    return left_by


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_code_and_says_what_comes_of_it(page, names):
    assert names(page)["pskd"] is pskd
    assert len(RESULT.findall(text_of(page))) >= 4


def test_the_tagger_that_is_shown_learns_from_its_past(names):
    left = names("docs/adapter.md")
    log, criterion = left["log"], left["adapter"].criterion
    assert [line["pskd/gradient_rescaling"] < 1 for line in log[1:]] == [True] * 3
    assert log[-1]["pskd/teacher_nll"] < log[1]["pskd/teacher_nll"]
    # A row is a token: each has a past, and no padding has one; the last row takes what has none.
    criterion.memory.next_epoch()
    _, seen = criterion.memory.read(torch.arange(criterion.num_rows))
    assert seen[:-1].all() and not seen[-1]
    assert criterion.num_rows == sum(len(tags) for _, tags in left["data"]) + 1


def test_the_tagger_refuses_another_alpha_and_other_data(names):
    left = names("docs/adapter.md")
    state = torch.load(left["folder"] / "straight/checkpoint.pt", weights_only=True)["pskd"]
    lengths = [len(tags) for _, tags in left["data"]]
    with pytest.raises(ValueError, match="alpha_final: expected 0.8"):
        left["TaggingPSKD"](lengths, 5, 4, alpha_final=0.5).criterion.load_state_dict(state)
    lengths[0], lengths[1] = lengths[0] + 1, lengths[1] - 1
    with pytest.raises(ValueError, match="memory: expected fingerprint"):
        left["TaggingPSKD"](lengths, 5, 4).criterion.load_state_dict(state)


def test_the_teacher_of_two_heads_is_the_model_that_ended_the_last_epoch(names):
    left = names("docs/adapter.md")
    pairs = zip(left["teacher"].model.parameters(), left["model"].parameters(), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs)
    assert not left["teacher"].model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("classes", "k"), [(7, None), (7, 7), (7, 3), (70_000, 2)])
def test_the_reader_that_is_shown_reads_what_the_memory_does(classes, k, dtype, names, tmp_path):
    left = names("docs/memory_format.md")
    memory = pskd.PredictionMemory(4, classes, top_k=k, dtype=dtype, path=tmp_path)
    torch.manual_seed(0)
    rows = torch.tensor([2, 0])
    memory.next_epoch()
    memory.write(rows, (3 * torch.randn(2, classes)).softmax(dim=1))
    memory.next_epoch()
    header, records = left["open_memory"](tmp_path / "epoch_00001.pskd")
    assert records.dtype.itemsize == memory.bytes_per_row
    assert records["written"].tolist() == [1, 0, 1, 0]
    past, _ = memory.read(rows)
    for row, expected in zip(rows, past if k is None else past.dense(classes), strict=True):
        found = left["distribution"](header, records[row])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        assert found.sum() == pytest.approx(1.0, abs=1e-3)


def test_the_reader_that_is_shown_refuses_a_damaged_file(names, tmp_path):
    left = names("docs/memory_format.md")
    content = bytearray((left["folder"] / "memory/epoch_00001.pskd").read_bytes())
    content[-1] ^= 1
    path = tmp_path / "damaged.pskd"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        left["open_memory"](path)


def test_the_headers_keys_are_those_of_the_page(names):
    table = text_of("docs/memory_format.md").partition("| key | value |")[2].partition("\n\n")[0]
    keys = re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)
    assert keys == list(names("docs/memory_format.md")["header"])
    part = names("docs/memory_format.md")["folder"] / "memory/epoch_00002.pskd.part"
    assert b"crc32" not in part.read_bytes()[:4096] and part.stat().st_size == 4096 + 5 * 13


def test_the_sizes_of_records_are_those_of_the_page():
    row = r"^\| (all|\d+) \| (float\d+) \| (\d+) \| (\d+) \|$"
    table = re.findall(row, text_of("docs/memory_format.md"), flags=re.MULTILINE)
    assert len(table) == 7
    for kept, dtype, classes, size in table:
        k = None if kept == "all" else int(kept)
        memory = pskd.PredictionMemory(1, int(classes), top_k=k, dtype=getattr(torch, dtype))
        assert memory.bytes_per_row == int(size)


def test_the_tests_that_an_adapter_is_sent_to_exist():
    named = re.findall(r"`(test_\w+)`", text_of("docs/adapter.md"))
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in TESTS] == []


# ---- links ---------------------------------------------------------------------------------------


def links(path: Path) -> list[str]:
    """Return the targets of a page's links and pictures within the project."""
    text = without_code(path.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(path: Path) -> list[str]:
    """Return the names that GitHub gives a page's headings."""
    text = without_code(path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    # Of a link or code in a heading its text is left, of punctuation nothing.
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain]


def test_there_are_pages_and_links_to_follow():
    assert {ROOT / page for page in PAGES} <= set(LINKED) and len(LINKED) >= 10
    assert all(links(path) for path in LINKED if path.name == "README.md")


@pytest.mark.parametrize("path", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    broken = []
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
