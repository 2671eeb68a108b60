"""fairseq's own evaluation of checkpoints of the plugin: validate, generate and interactive."""

from __future__ import annotations

import re
from argparse import Namespace
from functools import partial

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq_toys import LENGTHS, PLUGIN, Payload  # noqa: E402
from pskd_fairseq.evaluation.translations import generate  # noqa: E402

# --- fairseq-validate -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validations(fairseq, straight):
    """fairseq-validate on the teacher of epoch 3: with the plugin, and with fairseq's criterion.

    What that training was resumed from is long gone, and nothing that evaluation needs.
    """
    teacher, stock = fairseq.folder / "teacher.pt", fairseq.folder / "relabelled.pt"
    state = straight.checkpoint("checkpoint2.pt")
    state["cfg"]["criterion"]["restore_file"] = "gone.pt"
    torch.save(state, teacher)
    state["cfg"]["criterion"] = {
        "_name": "label_smoothed_cross_entropy", "label_smoothing": 0.1, "report_accuracy": False,
        "ignore_prefix_size": 0, "sentence_avg": False,
    }  # fmt: skip
    torch.save(state, stock)
    flags = (
        "--task translation --valid-subset train,valid --batch-size 4 "
        "--required-batch-size-multiple 1 --num-workers 0 --cpu --log-format json"
    ).split() + ["--user-dir", str(PLUGIN)]

    def validate(path):
        return fairseq.forked(
            "validate", str(fairseq.data), "--path", str(path), *flags, name=path.stem
        )

    return {"pskd": fairseq.submit(validate, teacher), "stock": fairseq.submit(validate, stock)}


def test_the_logged_teacher_is_last_epochs_model_without_dropout(straight, validations):
    """fairseq-validate scores the training set with the model that ended epoch 2."""
    run = validations["pskd"].result().expect_success()
    (scored,) = run.log("train")
    third_epoch = straight.log("train")[2]
    assert third_epoch["train_teacher_nll_loss"] == scored["train_nll_loss"]


def test_validation_is_that_of_label_smoothed_cross_entropy(straight, validations):
    ours, theirs = (validations[name].result().expect_success() for name in ("pskd", "stock"))
    assert ours.log("valid") == theirs.log("valid")
    in_training = [line for line in straight.log("valid") if line["epoch"] == 2][-1]
    assert in_training["valid_loss"] == ours.log("valid")[0]["valid_loss"]
    assert in_training["valid_nll_loss"] == ours.log("valid")[0]["valid_nll_loss"]


# --- fairseq-generate and fairseq-interactive -------------------------------------------------


@pytest.fixture(scope="module")
def translations(fairseq, straight):
    """fairseq-generate and fairseq-interactive on the same sentences, and a load it must refuse."""
    marker = fairseq.folder / "generate_was_run"
    refused = straight.checkpoint("checkpoint2.pt")
    refused["extra_state"]["metrics"] = Payload(marker)
    torch.save(refused, fairseq.folder / "payload.pt")
    plugin = ["--user-dir", str(PLUGIN)]
    common = "--beam 2 --max-len-a 0 --max-len-b 12 --num-workers 0 --cpu".split()
    common += ["--batch-size", "1"]  # a batch's padding moves scores in the last digits

    def flags(path, *more):
        multiple = ["--required-batch-size-multiple", "1"]
        return [str(fairseq.data), "--path", str(path), *common, *multiple, *more]

    whole = straight.save_dir / "checkpoint_3_16.pt"
    text = ["--input", str(fairseq.folder / "test.de")]
    runs = {
        "generated": ["generate", *flags(whole, *plugin)],
        "typed": ["interactive", *flags(whole, *plugin, *text)],
        "no_plugin": ["generate", *flags(whole)],
        "payload": ["generate", *flags(fairseq.folder / "payload.pt", *plugin)],
    }
    started = {
        name: fairseq.submit(partial(fairseq.forked, *words, name=name))
        for name, words in runs.items()
    }
    return {"marker": marker, **started}


def hypotheses(run) -> dict[str, str]:
    found = re.findall(r"^H-(\d+)\t\S+\t(.*)$", run.output, re.M)
    return dict(found)


def test_generate_and_interactive_read_a_checkpoint_and_agree(translations):
    generated = hypotheses(translations["generated"].result().expect_success())
    typed = hypotheses(translations["typed"].result().expect_success())
    assert len(generated) == len(LENGTHS["test"])
    assert generated == typed


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="torch < 2.6 trusts pickles"
)
def test_without_the_plugin_fairseq_cannot_read_its_own_checkpoint(translations):
    """Why the allow-list exists: fairseq pickles its command line as argparse.Namespace."""
    run = translations["no_plugin"].result()
    assert run.code != 0
    assert "argparse.Namespace was not an allowed global" in run.output


def test_generate_refuses_a_foreign_object_and_does_not_run_it(fairseq, translations):
    run = translations["payload"].result()
    assert run.code != 0 and "Weights only load failed" in run.output
    assert "system" in run.output and not hypotheses(run)
    assert not translations["marker"].exists()
    # The payload is a real one.
    torch.load(fairseq.folder / "payload.pt", weights_only=False)
    assert translations["marker"].exists()


def test_evaluate_translates_whatever_modules_the_current_folder_has(
    fairseq, straight, tmp_path, monkeypatch
):
    """As fairseq-generate itself; a clone of fairseq would take the place of the installed one."""
    for name in ("fairseq", "fairseq_cli", "pskd_fairseq", "json"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('of the current folder')")
    monkeypatch.chdir(tmp_path)
    args = Namespace(
        data=fairseq.data, checkpoint=straight.save_dir / "checkpoint_last.pt", out=tmp_path,
        split="test", beam=1, lenpen=1.0, max_tokens=4000, user_dir=None, cpu=True,
    )  # fmt: skip
    sentences, bleu_line = generate(args, ("de", "en"), None)
    assert len(sentences) == len(LENGTHS["test"]) and "BLEU4 = " in bleu_line
