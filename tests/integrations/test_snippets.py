"""What docs/own_loop.md and the modules' docstrings show is run as it stands there."""

from __future__ import annotations

import functools
import importlib
import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pskd

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of few workers, of no GPU

PAGE = (Path(__file__).resolve().parents[2] / "docs/own_loop.md").read_text(encoding="utf-8")
M, C, EPOCHS = 40, 5, 3


def shown(section: str, language: str) -> list[str]:
    """Return the blocks of one section of the page."""
    text = PAGE.split(f"\n## {section}\n")[1].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def of_docstring(module: str) -> str:
    """Return the lines of a module's docstring that are a diff, without their indent."""
    text = importlib.import_module(module).__doc__.split("\n\n", 1)[1]
    lines = [line for line in text.splitlines() if line.startswith("    ") or not line]
    return textwrap.dedent("\n".join(lines)).strip("\n")


def after(diff: str) -> str:
    """Return the code after a diff, with sizes for which there is time."""
    code = "\n".join(line[2:] for line in diff.splitlines() if line[:1] != "-")
    sizes = {"max_epochs=300": f"max_epochs={EPOCHS}", "num_classes=100": f"num_classes={C}"}
    for large, small in sizes.items():
        code = code.replace(large, small)
    return code


def before(diff: str) -> str:
    return "\n".join(line[2:] for line in diff.splitlines() if line[:1] != "+")


def samples() -> TensorDataset:
    made = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(M, 3, generator=made), torch.randint(C, (M,), generator=made))


# ---- a loop of one's own -------------------------------------------------------------------------


class Loop:
    """The names that the page's snippets use, and an epoch of the loop before them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, C)
        self.names = {
            "criterion": pskd.MemoryCriterion(M, C, num_epochs=EPOCHS),
            "lam": 0.3,
            "model": model,
            "num_epochs": EPOCHS,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
            "torch": torch,
            "train": self.train,
        }

    def train(self) -> None:
        for rows, inputs, target in DataLoader(pskd.WithRows(samples()), batch_size=8):
            loss = self.names["criterion"](self.names["model"](inputs), target, rows)
            self.names["optimizer"].zero_grad()
            loss.backward()
            self.names["optimizer"].step()

    def run(self, code: str) -> None:
        exec(compile(code.replace("...", "train()"), "docs/own_loop.md", "exec"), self.names)


def test_the_checkpoint_that_is_shown_resumes_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save, resume = shown("Checkpoints", "python")
    straight, resumed = Loop(), Loop()
    for epoch in range(1, EPOCHS + 1):
        straight.names["criterion"].begin_epoch(epoch)
        straight.train()
        if epoch == 2:
            straight.run(save)
    resumed.run(resume)
    weights = (loop.names["model"].parameters() for loop in (straight, resumed))
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)
    assert resumed.names["criterion"].epoch == EPOCHS


def test_the_loss_of_mixed_images_that_is_shown(tmp_path):
    (code,) = shown("Mixed images", "python")
    loop, rows = Loop(), torch.arange(8)
    criterion, (inputs, target) = loop.names["criterion"], samples()[:8]
    criterion.begin_epoch(1)
    loop.train()
    criterion.begin_epoch(2)
    loop.names |= {"rows": rows, "inputs": inputs, "target": target}
    loop.run(code)
    partner = loop.names["partner"]
    past, alpha = criterion.memory.read(rows)[0], criterion.alpha
    soft = 0.3 * pskd.mix_targets(target, past, alpha)
    soft = soft + 0.7 * pskd.mix_targets(target[partner], past[partner], alpha)
    torch.testing.assert_close(loop.names["loss"], F.cross_entropy(loop.names["logits"], soft))
    criterion.begin_epoch(3)
    assert torch.equal(criterion.memory.read(rows)[0], past)


# ---- frameworks ----------------------------------------------------------------------------------


def test_lightning_before_and_after(tmp_path):
    pytest.importorskip("lightning", reason="needs lightning: pip install '.[lightning]'")
    from lightning.pytorch import LightningModule, Trainer
    from pskd_lightning import PSKDCallback

    class Base(LightningModule):
        """What the dots stand for."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, C)

        def forward(self, inputs):
            return self.net(inputs)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    (diff,) = shown("Lightning", "diff")
    assert diff.strip("\n") == of_docstring("pskd_lightning")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "default_root_dir": tmp_path}
    names = {"DataLoader": DataLoader, "F": F, "LightningModule": Base, "pskd": pskd}
    names |= {"PSKDCallback": PSKDCallback, "Trainer": functools.partial(Trainer, **options)}
    names["dataset"] = samples()
    for code in (before(diff).replace("300", "1"), after(diff)):
        exec(compile(code, "docs/own_loop.md", "exec"), names)
        names["trainer"].fit(names["Classifier"](), names["loader"])
    assert names["trainer"].callback_metrics["pskd/alpha"] == pytest.approx(0.8)


class Mappings(Dataset):
    def __len__(self) -> int:
        return M

    def __getitem__(self, row):
        pixels, label = samples()[row]
        return {"pixel_values": pixels.expand(4, 4, 3).permute(2, 0, 1), "labels": int(label)}


def test_transformers_before_and_after(tmp_path):
    for library in ("transformers", "accelerate"):
        reason = f"needs {library}: pip install '.[transformers]'"
        pytest.importorskip(library, reason=reason)
    from pskd_transformers import PSKDTrainerMixin
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    size |= {"intermediate_size": 8, "image_size": 4, "patch_size": 4, "num_labels": C}
    options = {"num_train_epochs": EPOCHS, "use_cpu": True, "save_strategy": "no"}
    options |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "epoch"}
    (diff,) = shown("Transformers", "diff")
    assert diff.strip("\n") == of_docstring("pskd_transformers")
    names = {"PSKDTrainerMixin": PSKDTrainerMixin, "Trainer": Trainer, "pskd": pskd}
    names |= {"args": TrainingArguments(str(tmp_path), **options), "dataset": Mappings()}
    for code in (before(diff), after(diff)):
        names["model"] = ViTForImageClassification(ViTConfig(**size))
        exec(compile(code, "docs/own_loop.md", "exec"), names)
        names["trainer"].train()
    assert names["trainer"].state.log_history[-2]["pskd/alpha"] == pytest.approx(0.8)


HUGGING_FACE = Path(__file__).resolve().parents[2] / "docs/huggingface.md"


@pytest.mark.parametrize("at", [0, 1, 2], ids=["tagger", "pairs", "sft"])
def test_the_lines_for_tokens_run_as_they_stand(at, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[transformers]'")
    if at == 2:
        pytest.importorskip("trl", reason="needs trl: pip install '.[trl]'")
    import test_transformers_tokens as tokens

    monkeypatch.chdir(tmp_path)
    task = ("tagger", "t5", "gpt2")[at]
    code = re.findall(r"```python\n(.*?)```", HUGGING_FACE.read_text("utf-8"), flags=re.DOTALL)[at]
    model = tokens.model_of(task)
    options = {"num_train_epochs": 2, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    options |= {"logging_strategy": "epoch", "disable_tqdm": True}
    names = {"model": model, "dataset": tokens.Sequences(task)}
    names["tokenizer"] = tokens.collator_of("tagger").tokenizer
    if at == 2:
        from datasets import Dataset as Table
        from trl import SFTConfig

        names["args"] = SFTConfig(str(tmp_path), max_length=12, bf16=False, **options)
        kept = [{k: s[k] for k in ("input_ids", "labels")} for s in names["dataset"].samples]
        names["dataset"] = Table.from_list(kept)
    else:
        from transformers import Seq2SeqTrainingArguments

        names["args"] = Seq2SeqTrainingArguments(str(tmp_path), **options)
    exec(compile(code, "docs/huggingface.md", "exec"), names)
    log = names["trainer"].state.log_history
    assert log[-2]["pskd/alpha"] == pytest.approx(0.8) and log[-2]["pskd/teacher_nll"] > 0
