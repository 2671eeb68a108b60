"""PSKDTrainerMixin on models with a label a token: the stock loss, a loop by hand, resumes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

pytest.importorskip("transformers", reason="needs transformers: pip install '.[transformers]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[transformers]'")

from processes import in_two_processes
from pskd_transformers import PSKDTrainerMixin
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

import pskd

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pinned memory without a GPU

M, V, C, BATCH, EPOCHS = 13, 40, 5, 2, 3  # 7 batches an epoch
PRELOADED = ["transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "pskd_transformers"]


class Sequences(Dataset):
    """Sequences of 3 to 8 words; the labels of some do not count."""

    def __init__(self, task: str) -> None:
        made = torch.Generator().manual_seed(0)
        self.samples = []
        for size in torch.randint(3, 9, (M,), generator=made).tolist():
            words = torch.randint(5, V, (size,), generator=made)
            labels = {"tagger": words % C, "gpt2": words.clone()}.get(task, words.flip(0)[1:])
            labels[0] = -100 if size % 2 else labels[0]
            sample = {"input_ids": words.tolist(), "attention_mask": [1] * size}
            if task != "masked":
                sample["labels"] = labels.tolist()
            self.samples.append(sample | {"length": size})

    def __len__(self):
        return M

    def __getitem__(self, row):
        return dict(self.samples[row])


def model_of(task: str, dropout: float = 0.0):
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}
    if task in ("tagger", "masked"):
        size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        size |= {"intermediate_size": 16, "vocab_size": V, "max_position_embeddings": 12}
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = BertConfig(**size, **rates, num_labels=C)
        return (BertForMaskedLM if task == "masked" else BertForTokenClassification)(config)
    if task == "t5":
        size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(
            T5Config(vocab_size=V, dropout_rate=dropout, **size, **ids)
        )
    if task == "marian":
        sides = {f"{s}_layers": 1 for s in ("encoder", "decoder")}
        sides |= {f"{s}_attention_heads": 2 for s in ("encoder", "decoder")}
        sides |= {f"{s}_ffn_dim": 16 for s in ("encoder", "decoder")}
        size = {"d_model": 16, "vocab_size": V, "max_position_embeddings": 12, "dropout": dropout}
        return MarianMTModel(MarianConfig(**size, **sides, **ids))
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": V, "n_positions": 12}
    return GPT2LMHeadModel(GPT2Config(**size, **rates, bos_token_id=2, eos_token_id=1))


def collator_of(task: str, model=None, side: str = "right"):
    words = {"[PAD]": 0, "[EOS]": 1, "[MASK]": 2, "[UNK]": 3, "[CLS]": 4}
    words |= {f"w{i}": i for i in range(5, V)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]", mask_token="[MASK]", padding_side=side,
    )  # fmt: skip
    if task == "masked":
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9)
    if task == "tagger":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model)


class Recorded:
    """The losses of the batches of a training, and what it saw."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.losses, self.batches, self.counts, self.alphas = [], [], [], []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if torch.is_grad_enabled():
            self.batches.append({name: value.clone() for name, value in inputs.items()})
            self.counts.append(num_items_in_batch)
            self.alphas.append(self.criterion.alpha if hasattr(self, "_batch_loss") else None)
        result = super().compute_loss(
            model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
        )
        if torch.is_grad_enabled():
            self.losses.append(result.item())
        return result


class Stock(Recorded, Trainer):
    pass


class StockSeq2Seq(Recorded, Seq2SeqTrainer):
    pass


class PSKDTrainer(Recorded, PSKDTrainerMixin, Trainer):
    pass


class PSKDSeq2SeqTrainer(Recorded, PSKDTrainerMixin, Seq2SeqTrainer):
    pass


def trainer(folder: Path, task: str, /, *, model=None, data=None, side="right", **args):
    """Return a Trainer of PS-KD, or the stock one where ``pskd_options`` is None."""
    common = {"output_dir": str(folder), "num_train_epochs": EPOCHS, "use_cpu": True}
    common |= {"per_device_train_batch_size": BATCH, "learning_rate": 0.01, "save_strategy": "no"}
    common |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "epoch"}
    common |= {"dataloader_pin_memory": False, "seed": 3}
    options = args.pop("pskd_options", {})
    model = model_of(task) if model is None else model
    data = pskd.WithRows(Sequences(task)) if data is None else data
    kinds = {"train_dataset": data, "eval_dataset": Sequences(task)}
    # T5 makes its decoder's inputs itself, but for the Trainer's label smoothing.
    is_told = task == "marian" or "label_smoothing_factor" in args
    kinds["data_collator"] = collator_of(task, model if is_told else None, side)
    made = Seq2SeqTrainingArguments(**(common | args))
    is_pair = task in ("t5", "marian")
    if options is None:
        kind = StockSeq2Seq if is_pair else Stock
        return kind(model, made, **(kinds | {"train_dataset": Sequences(task)}))
    kind = PSKDSeq2SeqTrainer if is_pair else PSKDTrainer
    return kind(model, made, **kinds, pskd_options={"alpha_final": 0.9} | options)


TASKS = pytest.mark.parametrize("task", ["tagger", "t5", "marian", "gpt2", "masked"])


# ---- the stock loss ------------------------------------------------------------------------------


def first_epoch(folder: Path, task: str, smoothing: float, options: dict | None):
    args = {"gradient_accumulation_steps": 3, "num_train_epochs": 1}
    args |= {"label_smoothing_factor": smoothing} if smoothing else {}
    model = model_of(task, dropout=0.1)
    made = trainer(folder, task, model=model, pskd_options=options, **args)
    torch.manual_seed(0)
    made.train()
    return made


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return functools.cache(lambda task, smoothing: first_epoch(folder, task, smoothing, None))


@TASKS
@pytest.mark.parametrize(
    ("options", "smoothing"), [({}, 0.0), ({}, 0.1), ({"teacher": "snapshot"}, 0.0)]
)
def test_without_a_teacher_each_batch_has_the_stock_loss(
    task, options, smoothing, stock_run, tmp_path
):
    """With dropout; of 3 accumulated batches, and of the one that is left."""
    stock = stock_run(task, smoothing)
    made = first_epoch(tmp_path, task, smoothing, options)
    assert made.losses == pytest.approx(stock.losses, rel=1e-6) and len(made.losses) == 7
    for own, expected in zip(made.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    own, expected = made.state.log_history[0], stock.state.log_history[0]
    assert own["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("task", ["t5", "gpt2"])
def test_with_alpha_0_it_is_the_stock_trainer_to_the_last_bit(task, stock_run, tmp_path):
    stock = stock_run(task, 0.0)
    made = first_epoch(tmp_path, task, 0.0, {"alpha_final": 0.0})
    assert made.losses == stock.losses
    states = made.model.state_dict(), stock.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@TASKS
def test_evaluation_is_the_stock_one(task, tmp_path):
    made = trainer(tmp_path, task)
    made.train()
    stock = trainer(tmp_path, task, model=made.model, pskd_options=None)
    kept = made.criterion.memory.state_dict()["present"]
    torch.manual_seed(0)
    expected = stock.evaluate()["eval_loss"]
    torch.manual_seed(0)
    assert made.evaluate()["eval_loss"] == expected
    assert torch.equal(kept, made.criterion.memory.state_dict()["present"])


# ---- a loop by hand ------------------------------------------------------------------------------


def by_hand(made, task: str, teacher: str) -> list[float]:
    """Return the losses of the same batches, each token's past kept in a dictionary."""
    model, optimizer = model_of(task).train(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    past, present, losses, old = {}, {}, [], None
    first, rows_of = 0, {}
    for sample, own in enumerate(Sequences(task).samples):
        counted = sum(label != -100 for label in own["labels"])
        rows_of[sample] = list(range(first, first + counted))
        first += counted
    for step, (batch, count) in enumerate(zip(made.batches, made.counts, strict=True)):
        epoch, batch = step // 7 + 1, dict(batch)
        if step % 7 == 0:
            past, present = present, {}
            if teacher == "snapshot" and epoch > 1:
                old = model_of(task)
                old.load_state_dict(model.state_dict())
                old.eval()
        ids = batch.pop("pskd_rows").tolist()
        alpha = 0.9 * epoch / EPOCHS if epoch > 1 else 0.0
        logits = model(**batch).logits
        said = None if old is None else old(**batch).logits.detach().softmax(-1)
        total, labels = [], batch["labels"]
        for b, sample in enumerate(ids):
            places = iter(rows_of[sample])
            for t, label in enumerate(labels[b].tolist()):
                if label == -100:
                    continue
                row, at = next(places), t - 1 if task == "gpt2" else t
                if at < 0:
                    continue
                target = torch.nn.functional.one_hot(torch.tensor(label), logits.size(-1)).float()
                probs = said[b, at] if said is not None else past.get(row)
                if probs is not None:
                    target = (1 - alpha) * target + alpha * probs
                total.append(-(target * logits[b, at].log_softmax(-1)).sum())
                present[row] = logits[b, at].detach().softmax(-1)
        loss = torch.stack(total).sum() / (count if task == "gpt2" else len(total))
        loss.backward()
        losses.append(loss.item())
        if step % 7 in (2, 5, 6):
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("teacher", ["memory", "snapshot"])
@pytest.mark.parametrize(
    ("task", "side"), [("tagger", "left"), ("tagger", "right"), ("t5", "right"), ("gpt2", "left")]
)
def test_it_is_the_loop_by_hand(task, teacher, side, tmp_path):
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd"}
    options = {"teacher": teacher}
    if teacher == "memory":
        options |= {"top_k": None, "dtype": torch.float32}
    made = trainer(
        tmp_path, task, side=side, gradient_accumulation_steps=3, pskd_options=options, **plain
    )
    made.train()
    assert made.losses == pytest.approx(by_hand(made, task, teacher), rel=1e-5)
    assert {batch["input_ids"][:, -1].eq(0).any().item() for batch in made.batches} >= {
        side == "right"
    }


def test_of_masked_words_those_have_a_past_that_were_masked_before(tmp_path):
    made = trainer(tmp_path, "masked", num_train_epochs=2)
    made.train()
    memory = made.criterion.memory
    assert memory.num_rows == sum(len(s["input_ids"]) for s in Sequences("masked").samples) + 1
    _, seen = memory.read(torch.arange(memory.num_rows))
    masked = sum((batch["labels"] != -100).sum() for batch in made.batches[:7])
    assert seen.sum() == masked


def test_a_sequence_that_was_cut_is_trained_without_a_past(tmp_path):
    made = trainer(tmp_path, "tagger", gradient_accumulation_steps=2)
    whole = made.data_collator

    def cut(samples):
        return {name: value[:, :4].clone() for name, value in whole(samples).items()}

    made.data_collator = cut
    made.train()
    lengths = [sum(label != -100 for label in s["labels"]) for s in Sequences("tagger").samples]
    _, seen = made.criterion.memory.read(torch.arange(sum(lengths)))
    fits = [sum(label != -100 for label in s["labels"][:4]) == size
            for s, size in zip(Sequences("tagger").samples, lengths, strict=True)]  # fmt: skip
    expected = [fit for fit, size in zip(fits, lengths, strict=True) for _ in range(size)]
    assert seen.tolist() == expected and len(set(fits)) == 2


# ---- stop and resume -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight_runs(tmp_path_factory):
    """Return a function that trains once with each set of options, with a checkpoint a step."""

    @functools.cache
    def trained(task: str, teacher: str, max_steps: int):
        folder = tmp_path_factory.mktemp(f"{task}_{teacher}_{max_steps}")
        made = trainer(folder, task, **resumable(task, teacher, max_steps, save_strategy="steps"))
        made.train()
        return made

    return trained


def resumable(task: str, teacher: str, max_steps: int, **args):
    args |= {"model": model_of(task, dropout=0.1), "save_steps": 1, "max_steps": max_steps}
    return args | {"gradient_accumulation_steps": 2, "pskd_options": {"teacher": teacher}}


# Masks that are drawn for the first batches of a resumed Trainer are others inside an epoch.
@pytest.mark.parametrize(
    ("task", "teacher", "max_steps", "stop"),
    [("t5", "memory", -1, stop) for stop in (2, 4, 7)]
    + [("gpt2", "memory", 10, stop) for stop in (4, 6, 9)]
    + [("gpt2", "snapshot", 10, 6), ("masked", "memory", -1, 8)],
)
def test_a_resumed_training_is_the_straight_one(
    task, teacher, max_steps, stop, straight_runs, tmp_path
):
    """At an epoch's end, every 4 updates of 2 batches, and inside an epoch; with dropout."""
    straight = straight_runs(task, teacher, max_steps)
    resumed = trainer(tmp_path, task, **resumable(task, teacher, max_steps))
    checkpoint = Path(straight.args.output_dir) / f"checkpoint-{stop}"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    done = 7 * (stop // 4) + 2 * (stop % 4)
    assert resumed.losses == straight.losses[done:] and resumed.losses
    assert resumed.alphas == straight.alphas[done:]
    states = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_data_of_other_lengths_are_refused_on_resume(straight_runs, tmp_path):
    straight = straight_runs("t5", "memory", -1)
    data = Sequences("t5")
    data.samples[3]["labels"] += [7]
    resumed = trainer(tmp_path, "t5", data=pskd.WithRows(data), **resumable("t5", "memory", -1))
    checkpoint = str(Path(straight.args.output_dir) / "checkpoint-4")
    with pytest.raises(ValueError, match="memory: expected rows .*, got|fingerprint"):
        resumed.train(resume_from_checkpoint=checkpoint)
    assert not resumed.losses


def test_another_number_of_updates_is_refused_on_resume(straight_runs, tmp_path):
    straight = straight_runs("gpt2", "memory", 10)
    resumed = trainer(tmp_path, "gpt2", **resumable("gpt2", "memory", 11))
    checkpoint = str(Path(straight.args.output_dir) / "checkpoint-4")
    with pytest.raises(ValueError, match="max_steps: expected 10, .* got 11"):
        resumed.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("length", [{"max_steps": 10}, {"num_train_epochs": 2.5}])
def test_alpha_follows_the_updates_where_epochs_are_not_whole(length, tmp_path):
    made = trainer(tmp_path, "tagger", gradient_accumulation_steps=2, **length)
    made.train()
    alphas = [0.0] * 7 + [0.9 * step / 10 for step in (5, 5, 6, 6, 7, 7, 8, 9, 9, 10, 10)]
    assert made.alphas == pytest.approx(alphas)


# ---- bad input -----------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Sequences("tagger").samples)


def beyond(label: int) -> pskd.WithRows:
    data = Sequences("tagger")
    data.samples[5]["labels"][1] = label
    return pskd.WithRows(data)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"data": beyond(C)}, r"labels: expected classes of 0 to 4 or -100, got 5 in sequence 5"),
        ({"data": beyond(-3)}, r"labels: expected classes .*, got -3 in sequence 5"),
        ({"data": Sequences("tagger")}, "training data: expected pskd.WithRows"),
        ({"data": Stream(), "max_steps": 9}, "training data: expected a length, got a stream"),
        (
            {"data": Stream(), "max_steps": 9, "pskd_options": {"teacher": "snapshot"}},
            "training data: expected a length, got a stream",
        ),
        ({"pskd_options": {"num_classes": 9}}, "num_classes: expected 5 as the logits, got 9"),
        ({"pskd_options": {"lengths": [3]}}, "lengths: expected 13 sequences, got 1"),
        (
            {"model": BertForSequenceClassification(model_of("tagger").config)},
            r"logits: expected shape \(2, 8, C\) as the labels, got \(2, 5\)",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_step(args, message, tmp_path):
    made = trainer(tmp_path, "tagger", **args)
    with pytest.raises(ValueError, match=message):
        made.train()
    assert not made.losses


class Weighted(BertForTokenClassification):
    """Has a loss of its own."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        outputs["loss"] = None if labels is None else 1.5 * outputs["loss"]
        return outputs


def test_a_model_with_another_loss_is_refused_before_the_first_step(tmp_path):
    made = trainer(tmp_path, "tagger", model=Weighted(model_of("tagger").config))
    with pytest.raises(ValueError, match="model: expected the cross-entropy of its labels, 1.6"):
        made.train()
    assert not made.losses


def test_lengths_may_be_given_in_place_of_a_pass_over_the_data(tmp_path):
    lengths = [sum(label != -100 for label in s["labels"]) for s in Sequences("tagger").samples]
    made, other = (
        trainer(tmp_path, "tagger", pskd_options=options) for options in ({"lengths": lengths}, {})
    )
    for one in (made, other):
        torch.manual_seed(0)
        one.train()
    assert made.losses == other.losses


# ---- processes -----------------------------------------------------------------------------------


def one_process(folder: Path) -> None:
    args = {"ddp_backend": "gloo", "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    losses = []
    for options in ({}, None):
        made = trainer(folder, "gpt2", pskd_options=options, **args)
        made.train()
        losses.append(made.losses)
    torch.save(losses, folder / f"{made.args.process_index}.pt")


def test_two_processes_average_tokens_as_the_stock_trainer_does(forkserver, tmp_path):
    in_two_processes(one_process, tmp_path)
    for rank in (0, 1):
        made, stock = torch.load(tmp_path / f"{rank}.pt")
        assert made == pytest.approx(stock, rel=1e-6) and len(made) == 4
