"""What the page of classification/ shows as Python is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

PAGE = Path(__file__).resolve().parents[2] / "classification" / "README.md"


def test_the_plot_of_the_page_is_drawn(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"^python -c '(.*?)'$", PAGE.read_text("utf-8"), flags=re.S | re.M)
    rng = np.random.default_rng(0)
    for name in ("ce", "pskd"):
        folder = tmp_path / f"runs/cifar10_{name}_1"
        folder.mkdir(parents=True)
        examples = {"difficulty": np.linspace(0, 1, 200), "rescaling": rng.uniform(0.2, 1, 200)}
        np.savez(folder / "examples.npz", **examples)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(PAGE), "exec"), {})
    hard, easy = re.findall(r"(\d+) (0\.\d\d)", capsys.readouterr().out)
    assert (hard[0], easy[0]) == ("20", "20")
    assert Path("runs/hard_examples.png").read_bytes().startswith(b"\x89PNG")
