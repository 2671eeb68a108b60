"""The loops that README.md and docs/own_loop.md begin with are run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import pskd

ROOT = Path(__file__).resolve().parents[2]


def snippets(page: str, language: str) -> list[str]:
    text, _, _ = (ROOT / page).read_text(encoding="utf-8").partition("\n## ")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def applied(diff: str) -> str:
    """Return a loop as it is after a diff, with the step that its dots stand for."""
    kept = [line[2:] for line in diff.splitlines() if line[:1] != "-"]
    step = "optimizer.zero_grad(); loss.backward(); optimizer.step()"
    return "\n".join(kept).replace("...", step)


def run(code: str) -> dict:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    dataset = TensorDataset(torch.randn(40, 5), torch.randint(3, (40,)))
    names = {
        "DataLoader": DataLoader, "F": F, "dataset": dataset, "model": model, "num_classes": 3,
        "num_epochs": 3, "pskd": pskd, "torch": torch, "loader": DataLoader(dataset, 8),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }  # fmt: skip
    exec(compile(code, "snippet", "exec"), names)
    return names


LOOPS = [applied(d) for d in snippets("docs/own_loop.md", "diff")]
LOOPS += snippets("docs/own_loop.md", "python")
LOOPS += [applied(d) for d in snippets("README.md", "diff") if "loader" in d]


def test_there_are_loops_to_run():
    assert len(LOOPS) == 3


@pytest.mark.parametrize("code", LOOPS)
def test_a_loop_that_is_shown_trains_with_a_teacher(code):
    names = run(code)
    criterion = names["criterion"]
    assert criterion.epoch == 3 and criterion.alpha == pytest.approx(0.8)
    told = criterion.take_means()
    assert told["pskd/gradient_rescaling"] < 1 and names["loss"].isfinite()
