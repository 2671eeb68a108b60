"""What the pages show as Python is run as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "classification" / "README.md"
RESULTS = ROOT / "docs" / "results.md"


def code_of(page: Path) -> str:
    (code,) = re.findall(r"^python -c '(.*?)'$", page.read_text("utf-8"), flags=re.S | re.M)
    return code


def test_the_plot_of_the_page_is_drawn(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for name in ("ce", "pskd"):
        folder = tmp_path / f"runs/cifar10_{name}_1"
        folder.mkdir(parents=True)
        examples = {"difficulty": np.linspace(0, 1, 200), "rescaling": rng.uniform(0.2, 1, 200)}
        np.savez(folder / "examples.npz", **examples)
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(PAGE), str(PAGE), "exec"), {})
    hard, easy = re.findall(r"(\d+) (0\.\d\d)", capsys.readouterr().out)
    assert (hard[0], easy[0]) == ("20", "20")
    assert Path("runs/hard_examples.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_of_alpha_is_drawn(tmp_path, monkeypatch, capsys):
    parts = [f"{schedule}_{alpha}" for schedule in ("constant", "linear")
             for alpha in (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)]  # fmt: skip
    for noise in ("0.4", "0"):
        for part in (*parts, "ce"):
            for seed in (1, 2, 3):
                folder = tmp_path / f"runs/alpha/{noise}_{part}_{seed}"
                folder.mkdir(parents=True)
                found = {"last": {"top1_error": 0.1 * seed}}
                (folder / "results.json").write_text(json.dumps(found))
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(RESULTS), str(RESULTS), "exec"), {})
    assert "right labels linear 20.0 20.0" in capsys.readouterr().out
    assert Path("runs/alpha.png").read_bytes().startswith(b"\x89PNG")
