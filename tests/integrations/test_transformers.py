"""PSKDTrainerMixin in Hugging Face's own Trainer: a loop by hand, resumes, evaluation."""

from __future__ import annotations

import operator
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

pytest.importorskip("transformers", reason="needs transformers: pip install '.[transformers]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install '.[transformers]'")

from processes import in_two_processes
from pskd_transformers import PSKDTrainerMixin
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import pskd

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pinned memory without a GPU

M, C, BATCH, EPOCHS = 22, 4, 6, 3  # 4 batches an epoch
_made = torch.Generator().manual_seed(0)
WORDS = torch.randint(30, (M, 6), generator=_made)
IMAGES = torch.randn(M, 3, 8, 8, generator=_made)
LABELS = torch.randint(C, (M,), generator=_made)

PRELOADED = ["transformers.trainer", "transformers.models.bert.modeling_bert", "pskd_transformers"]
FORMS = pytest.mark.parametrize("teacher", ["memory", "snapshot", "ema"])


class Sentences(Dataset):
    """Samples with a column that the model does not take."""

    def __len__(self):
        return M

    def __getitem__(self, row):
        return {"input_ids": WORDS[row], "labels": int(LABELS[row]), "length": 6}


class Pictures(Sentences):
    def __getitem__(self, row):
        return {"pixel_values": IMAGES[row], "labels": int(LABELS[row])}


def bert(dropout: float = 0.1):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 16, "vocab_size": 30, "max_position_embeddings": 8}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**size, **rates, num_labels=C))


def vit():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 16, "image_size": 8, "patch_size": 4}
    return ViTForImageClassification(ViTConfig(**size, num_labels=C))


class PSKDTrainer(PSKDTrainerMixin, Trainer):
    """What a user has, with the order of the samples and the losses recorded."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.orders, self.losses = [], []

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        rows = inputs.get("pskd_rows")
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if torch.is_grad_enabled():
            self.orders.append(rows)
            self.losses.append(result.item())
        return result


def trainer(folder: Path, teacher: str, /, *, model=None, data=None, pskd_options=None, **args):
    common = {"output_dir": str(folder), "num_train_epochs": EPOCHS, "use_cpu": True}
    common |= {"per_device_train_batch_size": BATCH, "learning_rate": 0.01, "save_strategy": "no"}
    common |= {"per_device_eval_batch_size": M, "report_to": [], "disable_tqdm": True}
    common |= {"logging_strategy": "epoch", "dataloader_pin_memory": False}
    return PSKDTrainer(
        bert() if model is None else model,
        TrainingArguments(**(common | args)),
        train_dataset=pskd.WithRows(Sentences()) if data is None else data,
        eval_dataset=Sentences(),
        pskd_options={"teacher": teacher, "alpha_final": 0.9} | (pskd_options or {}),
    )


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@FORMS
@pytest.mark.parametrize(("accumulated", "smoothing"), [(1, 0.1), (2, 0.0)])
def test_it_is_the_loop_by_hand(teacher, accumulated, smoothing, tmp_path):
    """Though the Trainer drops the columns that the model does not take."""
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd"}
    made = trainer(
        tmp_path,
        teacher,
        model=bert(dropout=0.0),
        gradient_accumulation_steps=accumulated,
        label_smoothing_factor=smoothing,
        **plain,
    )
    made.train()

    model, losses, told = bert(dropout=0.0).train(), [], []
    options = {"num_epochs": EPOCHS, "alpha_final": 0.9, "label_smoothing": smoothing}
    if teacher == "memory":
        criterion = pskd.MemoryCriterion(M, C, **options)
    else:
        criterion = pskd.SnapshotCriterion(model, teacher=teacher, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, rows in enumerate(made.orders):
        if step % 4 == 0:
            criterion.begin_epoch(step // 4 + 1)
        logits = model(input_ids=WORDS[rows]).logits
        if teacher == "memory":
            loss = criterion(logits, LABELS[rows], rows)
        else:
            loss = criterion(logits, LABELS[rows], input_ids=WORDS[rows])
        loss.backward()  # whole: BERT ignores the count of items that the Trainer gives it
        losses.append(loss.item())
        if (step + 1) % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
        if step % 4 == 3:
            told.append(criterion.take_means())
    assert made.losses == pytest.approx(losses, rel=1e-6)
    for own, expected in zip(made.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    for entry, expected in zip(logged, told, strict=True):
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        # Of accumulated batches it is their sum; some releases round it.
        assert entry["loss"] == pytest.approx(accumulated * sum(losses[:4]) / 4, abs=1e-4)
        del losses[:4]


@FORMS
def test_images_train_too(teacher, tmp_path):
    data = pskd.WithRows(Pictures()) if teacher == "memory" else Pictures()
    made = trainer(tmp_path, teacher, model=vit(), data=data)
    made.train()
    assert made.criterion.epoch == EPOCHS
    assert made.state.log_history[-2]["pskd/alpha"] == pytest.approx(0.9)


@FORMS
def test_a_model_that_returns_tuples_trains_as_with_names(teacher, tmp_path):
    model = bert()
    model.config.return_dict = False
    made = trainer(tmp_path, teacher, model=model)
    made.train()
    named = trainer(tmp_path, teacher)
    named.train()
    assert made.losses == named.losses
    model = bert()
    model.config.return_dict = False  # its outputs are tuples
    bare = trainer(tmp_path, teacher, model=model)
    bare.train()
    assert bare.losses == named.losses


class Second(BertForSequenceClassification):
    """Returns its logits after something else of their shape."""

    def forward(self, input_ids, labels=None, **kwargs):
        logits = super().forward(input_ids, **kwargs).logits
        return logits.relu(), logits


@pytest.mark.parametrize("teacher", ["snapshot", "ema"])
def test_the_students_logits_are_taken_as_the_teachers(teacher, tmp_path):
    model = Second(bert().config)
    model.load_state_dict(bert().state_dict())
    options = {"logits_of": operator.itemgetter(1)}
    made = trainer(tmp_path, teacher, model=model, pskd_options=options)
    made.train()
    named = trainer(tmp_path, teacher)
    named.train()
    assert made.losses == named.losses
    model = bert()
    model.config.return_dict = False  # its outputs are tuples
    bare = trainer(tmp_path, teacher, model=model)
    bare.train()
    assert bare.losses == named.losses


@pytest.mark.parametrize("with_rows", [False, True])
def test_evaluation_is_plain_cross_entropy(with_rows, tmp_path):
    made = trainer(tmp_path, "memory", eval_strategy="epoch")
    before = made.evaluate()["eval_loss"]
    made.train()
    kept = made.criterion.memory.state_dict()
    data = pskd.WithRows(Sentences()) if with_rows else Sentences()
    after = made.evaluate(data)["eval_loss"]
    with torch.no_grad():
        logits = made.model.eval()(input_ids=WORDS).logits
    expected = F.cross_entropy(logits, LABELS).item()
    assert after == pytest.approx(expected, rel=1e-6) and after != before
    evaluated = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == EPOCHS + 1  # the Trainer forgets the first when it trains
    assert not any(name.startswith("pskd/") for entry in evaluated for name in entry)
    assert torch.equal(kept["present"], made.criterion.memory.state_dict()["present"])


# ---- stop and resume -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight_runs(tmp_path_factory) -> dict[str, PSKDTrainer]:
    """A training with each teacher, with a checkpoint at every step."""
    runs = {}
    for teacher in ("memory", "snapshot", "ema"):
        saves = {"save_strategy": "steps", "save_steps": 1}
        runs[teacher] = trainer(tmp_path_factory.mktemp(teacher), teacher, **saves)
        runs[teacher].train()
    return runs


@FORMS
@pytest.mark.parametrize("stop", [3, 4, 8])
def test_a_resumed_training_is_the_straight_one(teacher, stop, straight_runs, tmp_path):
    """At an epoch's end, every 4 steps, and inside an epoch; with dropout."""
    straight = straight_runs[teacher]
    resumed = trainer(tmp_path, teacher)
    checkpoint = Path(straight.args.output_dir) / f"checkpoint-{stop}"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.losses == straight.losses[stop:]
    assert same_weights(resumed.model, straight.model)
    assert resumed.criterion.epoch == EPOCHS


def test_it_goes_on_from_the_last_checkpoint_of_its_folder(tmp_path):
    straight = trainer(tmp_path, "memory", save_strategy="epoch")
    straight.train()
    for file in (tmp_path / "checkpoint-12").iterdir():
        file.unlink()
    (tmp_path / "checkpoint-12").rmdir()
    assert not list(tmp_path.glob("**/*.part*"))
    resumed = trainer(tmp_path, "memory", save_strategy="epoch")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.losses == straight.losses[8:]
    assert same_weights(resumed.model, straight.model)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    trainer(tmp_path, "memory", save_strategy="epoch").train()
    other = trainer(tmp_path, "memory", pskd_options={"alpha_final": 0.5})
    folder = tmp_path / "checkpoint-4"
    with pytest.raises(ValueError, match="alpha_final: expected 0.9, .* got 0.5"):
        other.train(resume_from_checkpoint=str(folder))
    (folder / "pskd.pt").unlink()
    again = trainer(tmp_path, "memory")
    with pytest.raises(ValueError, match="checkpoint-4/pskd.pt: expected a checkpoint"):
        again.train(resume_from_checkpoint=str(folder))
    assert not other.losses + again.losses


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "args", "message"),
    [
        ({"teacher": "both"}, {}, "teacher: expected 'memory' or 'snapshot'.*, got 'both'"),
        ({"alpha_final": 2.0}, {}, r"alpha_final: expected a number in \[0, 1\], got 2.0"),
    ],
)
def test_what_cannot_be_trained_by_is_refused_before_the_first_step(
    options, args, message, tmp_path
):
    made = trainer(tmp_path, "memory", pskd_options=options, **args)
    with pytest.raises(ValueError, match=message):
        made.train()
    assert not made.losses


def test_a_loss_of_the_users_own_is_refused_before_the_first_step(tmp_path):
    made = trainer(tmp_path, "memory")
    made.compute_loss_func = F.cross_entropy  # as the Trainer keeps its argument
    with pytest.raises(
        ValueError, match="compute_loss_func: expected none, .* got <function cross_"
    ):
        made.train()
    assert not made.losses


def test_a_model_that_cannot_be_copied_is_refused_before_the_first_step(tmp_path):
    model = bert()
    model.bert.lock = threading.Lock()
    made = trainer(tmp_path, "snapshot", model=model)
    with pytest.raises(ValueError, match="got BertModel 'bert' with the attribute 'lock': .*lock"):
        made.train()
    assert not made.losses


def test_data_without_row_numbers_are_refused_before_the_first_step(tmp_path):
    made = trainer(tmp_path, "memory", data=Sentences())
    message = r"training data: expected pskd.WithRows\(dataset\), got Sentences"
    with pytest.raises(ValueError, match=message):
        made.train()
    assert not made.losses


# ---- processes -----------------------------------------------------------------------------------


def one_process(folder: Path) -> None:
    """Train, and again from the first epoch's end."""
    options = {"per_device_train_batch_size": 4, "save_strategy": "epoch", "ddp_backend": "gloo"}
    straight, resumed = (trainer(folder, "memory", **options) for _ in range(2))
    straight.train()
    read = straight.criterion.memory.read(torch.arange(M))
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert resumed.losses == straight.losses[3:]
    assert same_weights(resumed.model, straight.model)
    told = straight.state.log_history[-2]["pskd/teacher_nll"]
    torch.save((read, told, straight.orders), folder / f"{straight.args.process_index}.pt")


def test_each_of_two_processes_reads_what_the_other_wrote(forkserver, tmp_path):
    in_two_processes(one_process, tmp_path)
    (past, seen), told, orders = torch.load(tmp_path / "0.pt")
    (other, other_seen), other_told, other_orders = torch.load(tmp_path / "1.pt")
    assert torch.equal(past, other) and torch.equal(seen, other_seen) and told == other_told
    assert seen.all() and len(set(torch.cat(orders[3:6]).tolist())) < M
    assert set(torch.cat(orders[3:6] + other_orders[3:6]).tolist()) == set(range(M))
