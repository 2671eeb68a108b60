"""PSKDSFTTrainer: the stock loss and metrics, completions, LoRA, resumes and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install '.[trl]'")
pytest.importorskip("peft", reason="needs peft: pip install '.[trl]'")

import datasets
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from pskd_transformers import PSKDTrainerMixin
from pskd_trl import PSKDSFTTrainer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import pskd

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pinned memory without a GPU

V, M, EPOCHS = 30, 11, 3  # 6 batches an epoch


@pytest.fixture(scope="module", autouse=True)
def without_progress_bars():
    datasets.disable_progress_bars()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2} | {f"w{i}": i for i in range(3, V)}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )


def texts(count: int = M) -> Dataset:
    made = torch.Generator().manual_seed(0)

    def words(size: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(3, V, (size,), generator=made).tolist())

    sizes = torch.randint(2, 6, (count, 2), generator=made).tolist()
    return Dataset.from_list([{"prompt": words(a), "completion": words(b)} for a, b in sizes])


def gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": V, "n_positions": 16}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**size, **rates, **ids))


class Recorded:
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.losses = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if torch.is_grad_enabled():
            self.losses.append(result.item())
        return result


class Stock(Recorded, SFTTrainer):
    pass


class Taught(Recorded, PSKDSFTTrainer):
    pass


def trainer(kind, folder: Path, /, *, options=None, lora=False, data=None, **args):
    common = {"output_dir": str(folder), "num_train_epochs": EPOCHS, "use_cpu": True, "bf16": False}
    common |= {"per_device_train_batch_size": 2, "learning_rate": 0.01, "save_strategy": "no"}
    common |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "epoch", "seed": 3}
    common |= {"dataloader_pin_memory": False, "gradient_accumulation_steps": 3, "max_length": 16}
    common |= {"gradient_checkpointing": False}
    kinds = {"train_dataset": texts() if data is None else data, "eval_dataset": texts(3)}
    if lora:
        rate = args.get("dropout", 0.1)
        kinds["peft_config"] = LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=rate)
    if kind is not Stock:
        kinds["pskd_options"] = {"alpha_final": 0.9} | (options or {})
    model = gpt2(args.pop("dropout", 0.1))
    args = SFTConfig(**(common | args))
    return kind(model, args, processing_class=tokenizer(), **kinds)


def trained(made):
    torch.manual_seed(0)
    made.train()
    return made


def logged(made) -> list[dict]:
    """Return what is in the log of each epoch, without times and what PS-KD adds."""
    kept = [entry for entry in made.state.log_history if "loss" in entry or "eval_loss" in entry]
    left = [{name: entry[name] for name in entry if "second" not in name} for entry in kept]
    return [
        {k: v for k, v in e.items() if not k.startswith(("pskd/", "eval_runtime"))} for e in left
    ]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("options", "args"),
    [
        ({"alpha_final": 0.0}, {}),
        ({}, {}),
        ({}, {"completion_only_loss": False}),
        # The stock trainer's second forward, for its metrics, moves the dropout of later batches.
        ({}, {"label_smoothing_factor": 0.1, "dropout": 0.0}),
    ],
)
def test_without_a_teacher_it_is_the_stock_trainer(lora, options, args, tmp_path):
    """Loss of each batch, weights, metrics and evaluation, with dropout; in the first epoch."""
    args = {"num_train_epochs": 1, "eval_strategy": "epoch"} | args
    stock = trained(trainer(Stock, tmp_path, lora=lora, **args))
    made = trained(trainer(Taught, tmp_path, lora=lora, options=options, **args))
    assert made.losses == pytest.approx(stock.losses, rel=1e-5) and len(made.losses) == 6
    for own, expected in zip(made.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert len(logged(stock)) == 2
    for own, expected in zip(logged(made), logged(stock), strict=True):
        assert own == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_later_epochs_have_a_past_of_the_completions(lora, tmp_path):
    made = trained(trainer(Taught, tmp_path, lora=lora))
    data = made.train_dataset.dataset
    counted = sum(label != -100 for labels in data["labels"] for label in labels)
    memory = made.criterion.memory
    assert memory.num_rows == counted + 1 and memory.top_k == 16
    _, seen = memory.read(torch.arange(counted))
    assert seen.all()
    told = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["pskd/alpha"] for entry in told] == pytest.approx([0.0, 0.6, 0.9])
    assert all("mean_token_accuracy" in entry and "num_tokens" in entry for entry in told)
    stock = trained(trainer(Stock, tmp_path, lora=lora))
    assert made.losses[:6] == pytest.approx(stock.losses[:6], rel=1e-5)
    assert made.losses[12:] != pytest.approx(stock.losses[12:], rel=1e-3)


class Plain(Recorded, PSKDTrainerMixin, Trainer):
    pass


def test_in_the_plain_trainer_lora_may_have_a_snapshot(tmp_path):
    config = LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1)
    args = {"num_train_epochs": 2, "use_cpu": True, "report_to": [], "save_strategy": "no"}
    rows = [{"input_ids": [3, 4 + i, 5], "labels": [3, 4 + i, 5]} for i in range(8)]
    made = Plain(
        get_peft_model(gpt2(), config),
        TrainingArguments(str(tmp_path), **args, disable_tqdm=True, logging_strategy="epoch"),
        train_dataset=rows,
        pskd_options={"teacher": "snapshot"},
    )
    made.train()
    told = [entry for entry in made.state.log_history if "loss" in entry]
    assert told[1]["pskd/alpha"] == pytest.approx(0.8) and told[1]["pskd/teacher_nll"] > 0
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_training_is_the_straight_one(lora, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1}
    straight = trainer(Taught, tmp_path, lora=lora, **saves)
    straight.train()
    for stop, done in ((3, 9), (4, 12)):
        resumed = trainer(Taught, tmp_path, lora=lora)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert resumed.losses == straight.losses[done:]


def test_the_memory_reads_the_table_of_the_library_as_it_stands(tmp_path):
    """Rows are those of the data set that SFTTrainer prepared, whatever it dropped or shuffled."""
    made = trainer(Taught, tmp_path, shuffle_dataset=True, max_length=6)
    assert isinstance(made.train_dataset, pskd.WithRows)
    assert [made.train_dataset[row]["pskd_rows"] for row in (0, 3)] == [0, 3]
    trained(made)
    assert made.criterion.epoch == EPOCHS


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"packing": True}, "packing: expected False, its tokens have no rows, got True"),
        ({"padding_free": True, "max_length": None}, "padding_free: expected False"),
        ({"options": {"teacher": "snapshot"}}, "teacher: expected 'memory' with an SFTTrainer"),
        (
            {"data": texts().to_iterable_dataset(), "max_steps": 9},
            "dataset: expected one with indices",
        ),
    ],
)
def test_what_has_no_rows_is_refused_when_the_trainer_is_made(args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(Taught, tmp_path, **args)


def test_another_loss_is_refused_before_the_first_step(tmp_path):
    made = trainer(Taught, tmp_path, loss_type="dft")
    with pytest.raises(ValueError, match="model: expected the cross-entropy of its labels"):
        made.train()
    assert not made.losses
