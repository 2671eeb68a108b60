"""Arguments of a checkpoint that fairseq gives to ``eval``: recipes load, code is refused."""

from __future__ import annotations

import ast
import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import fairseq as package  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.models import ARCH_CONFIG_REGISTRY, MODEL_DATACLASS_REGISTRY  # noqa: E402
from fairseq.registry import REGISTRIES  # noqa: E402
from fairseq.tasks import TASK_DATACLASS_REGISTRY  # noqa: E402
from fairseq_toys import PLUGIN, STOCK, continued_from  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from pskd_fairseq import evaluate  # noqa: E402
from pskd_fairseq.evaluated import EVALUATED, UnsafeArgumentError, check_arguments  # noqa: E402
from pskd_fairseq.evaluation.inputs import load  # noqa: E402
from pskd_fairseq.programs import UserError  # noqa: E402

# --- What is a literal ------------------------------------------------------------------------

LITERALS = [
    "(0.9, 0.98)", "[(512, 3)] * 20", " 3 * [(512,3)] + [(1024, 3, 0)]*2\n", "-1", "True", "None",
    "20000,60000", '{"name": "scaled_dot_product"}', "((256, 4, 1024, True, 0.2),) * 2", "()",
    None, True, 6, 0.5, [1, 2], (3, 4), {"name": "scaled_dot_product"},
]  # fmt: skip


@pytest.mark.parametrize("value", LITERALS)
def test_a_literal_is_accepted(value):
    check_arguments(Namespace(encoder_layers=value))


CODE = "__import__('os').system('true')"
UNSAFE = [
    CODE, f"[{CODE}] * 2", f"{{'a': {CODE}}}", f"{{**{CODE}}}", f"[*{CODE}]", f"-{CODE}",
    f"lambda: {CODE}", f"[{CODE} for _ in (1,)]", f"f'{{{CODE}}}'", f"1 if {CODE} else 2",
    f"(x := {CODE})", "args", "args.data", "(1)[0]", "1\n__import__", "(1", "", "[0] * n",
    "'${model.code}'", f"# coding: utf-7\n{CODE}",
    "[0] * 99999", "[[0] * 999] * 999", "'text' * 9999", "[" * 9000 + "]" * 9000, "1" + "+1" * 9000,
    CODE.encode(), bytearray(CODE, "ascii"), np.frombuffer(CODE.encode(), np.uint8),
    compile("1", "text", "eval"),
]  # fmt: skip


@pytest.mark.parametrize("value", UNSAFE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("where", [Namespace, dict])
def test_anything_else_is_refused_and_named(where, value):
    with pytest.raises(
        UnsafeArgumentError, match="^encoder_layers: expected a literal such as .* got"
    ):
        check_arguments(where(arch="fconv", encoder_layers=value))


def hidden_in_a_tensor():
    tensor = torch.zeros(1)
    tensor.encoder_layers = CODE
    return tensor


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"w2v_args": Namespace(model={"encoder_layers": CODE})}},
        {"model": [Namespace(encoder_layers=CODE)]},
        {"model": hidden_in_a_tensor()},
        OmegaConf.create({"encoder_layers": "${text}", "text": CODE}),
        OmegaConf.create({"model": "${oc.create:${text}}", "text": f'encoder_layers: "{CODE}"'}),
        OmegaConf.create({"model": Namespace(encoder_layers=CODE)}, flags={"allow_objects": True}),
    ],
)
def test_code_is_found_however_deep(config):
    with pytest.raises(UnsafeArgumentError, match="^encoder_layers: "):
        check_arguments(config)


def test_other_arguments_may_hold_any_text():
    check_arguments(Namespace(data="runs(1)/__import__", arch="fconv", lr=[0.1], seed=None))


@pytest.mark.parametrize("arch", ARCH_CONFIG_REGISTRY)
def test_every_architecture_of_fairseq_is_accepted(arch):
    args = Namespace(attention_dropout=0.0, dropout=0.0)  # lightconv_lm reads the first
    ARCH_CONFIG_REGISTRY[arch](args)
    check_arguments(args)


def test_every_default_of_fairseq_is_accepted():
    registries = [registry["dataclass_registry"] for registry in REGISTRIES.values()]
    for registry in [MODEL_DATACLASS_REGISTRY, TASK_DATACLASS_REGISTRY, *registries]:
        for dataclass in registry.values():
            check_arguments(dataclass())


def test_the_list_holds_every_argument_that_the_installed_fairseq_evaluates():
    evaluators = {"eval", "eval_bool", "eval_str_list", "eval_str_dict"}
    found = set()
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func).rpartition(".")[2]
                given = re.fullmatch(
                    r"(?:self\.)?\w*(?:args|cfg)\.(\w+)", ast.unparse(node.args[0])
                )
                found |= {given[1]} if given and called in evaluators else set()
    assert {"encoder_layers", "adam_betas", "left_pad_source", "pipeline_balance"} <= found
    assert found <= EVALUATED


# --- Checkpoints ------------------------------------------------------------------------------


def checkpoint(form: str, marker: Path, state: dict, data: Path) -> dict:
    """Return tensors and a configuration that makes a file where fairseq reads it."""
    code = f"__import__('os').system('touch {marker}') or [(8, 3)]"
    model = {"_name": "fconv", "arch": "fconv", "encoder_layers": code}
    if form == "args":  # as fairseq before 0.10
        languages = {"source_lang": "de", "target_lang": "en", "data": str(data)}
        return {**state, "args": Namespace(task="translation", **languages, **model), "cfg": None}
    if form == "nested":
        model = {"_name": "fconv", "w2v_args": Namespace(**model)}
    as_it_is = dict if form == "dictionary" else Namespace
    return {**state, "cfg": {**state["cfg"], "model": as_it_is(**model)}}


@pytest.fixture(scope="module")
def made(fairseq, straight):
    """Checkpoints with code, by form, and the file that it makes."""
    paths = {}
    for form in ("args", "namespace", "nested", "dictionary"):
        marker = fairseq.folder / f"code_of_{form}"
        path = fairseq.folder / f"{form}_with_code.pt"
        torch.save(
            checkpoint(form, marker, straight.checkpoint("checkpoint2.pt"), fairseq.data), path
        )
        paths[form] = path, marker
    return paths


COMMAND_LINES = pytest.mark.parametrize("form", ["args", "namespace", "nested"])
REFUSED = "encoder_layers: expected a literal"


@COMMAND_LINES
def test_the_allow_list_refuses_code(made, form):
    path, marker = made[form]
    with pytest.raises(UnsafeArgumentError, match=REFUSED):
        torch.load(path, weights_only=True)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["args", "namespace", "dictionary"])
def test_evaluate_refuses_code(made, form, fairseq, tmp_path, capsys):
    path, marker = made[form]
    words = [str(path), "--data", str(fairseq.data), "--out", str(tmp_path / "out"), "--cpu"]
    assert evaluate.main(words) == 2
    assert f"evaluate.py: error: {path}: {REFUSED}" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def refusals(fairseq, made):
    """Commands of fairseq that read a checkpoint, on one with code."""
    path, marker = made["namespace"]
    plugin = ["--user-dir", str(PLUGIN), "--cpu", "--batch-size", "1"]
    common = [str(fairseq.data), "--path", str(path), *plugin]
    resumed = continued_from(path, fairseq.folder / "resumed_with_code")
    runs = {
        "generate": partial(fairseq.forked, "generate", *common, name="generate_code"),
        "train": partial(fairseq.train, resumed.name, "--max-epoch", "4"),
    }
    return marker, {name: fairseq.submit(run) for name, run in runs.items()}


@pytest.mark.parametrize("command", ["generate", "train"])
def test_fairseq_refuses_code(refusals, command):
    marker, runs = refusals
    run = runs[command].result()
    run.expect_refusal(REFUSED)
    if command == "train":
        run.expect_refusal(f"{run.save_dir}/checkpoint_last.pt: {REFUSED}")
    assert not marker.exists()


@pytest.mark.parametrize("form", ["args", "namespace", "dictionary"])
def test_the_code_is_real(fairseq, straight, tmp_path, monkeypatch, form):
    """Without the plugin's checks fairseq runs it; a dictionary needs no trust in pickles."""
    if form != "dictionary":
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "was_run", tmp_path / "checkpoint.pt"
    state = straight.checkpoint("checkpoint2.pt")
    torch.save(checkpoint(form, marker, state, fairseq.data), path)
    with pytest.raises(AttributeError, match="max_source_positions"):  # what it reads next
        checkpoint_utils.load_model_ensemble_and_task([str(path)], {"data": str(fairseq.data)})
    assert marker.exists()


@pytest.fixture(scope="module")
def convolutions(fairseq):
    """A training of fconv, whose layers are text that fairseq evaluates, and its resume."""
    layers = ["--encoder-layers", "[(32, 3)] * 2", "--decoder-layers", "[(32, 3)] * 1 + [(32, 3)]"]
    sizes = "--encoder-embed-dim 32 --decoder-embed-dim 32 --decoder-out-embed-dim 32".split()
    betas = ["--adam-betas", "(0.9, 0.98)"]
    flags = ["--arch", "fconv_iwslt_de_en", *layers, *sizes, *betas, "--max-epoch", "2"]
    flags += [*STOCK, "--user-dir", str(PLUGIN)]
    fairseq.train("fconv", *flags, "--max-update", "9").expect_success()
    return fairseq.train("fconv", *flags).expect_success()


def test_a_convolutional_model_resumes_and_is_read(fairseq, convolutions):
    model = convolutions.checkpoint()["cfg"]["model"]
    assert type(model) is Namespace and model.encoder_layers == "[(32, 3)] * 2"
    checkpoint = convolutions.save_dir / "checkpoint_last.pt"
    flags = [str(fairseq.data), "--path", str(checkpoint), "--user-dir", str(PLUGIN), "--cpu"]
    run = fairseq.forked("generate", *flags, "--batch-size", "8", name="fconv_test")
    assert "BLEU4 = " in run.expect_success().output
    model, *_ = load(Namespace(checkpoint=checkpoint, data=fairseq.data))
    assert type(model).__name__ == "FConvModel"


def test_a_command_line_that_was_read_is_saved_as_it_was(tmp_path):
    path = tmp_path / "read.pt"
    torch.save(Namespace(arch="fconv", encoder_layers="[(8, 3)]"), path)
    read = torch.load(path, weights_only=True)
    assert type(read) is Namespace and read == Namespace(arch="fconv", encoder_layers="[(8, 3)]")
    torch.save(read, path)
    assert torch.load(path, weights_only=True) == read


def test_evaluate_names_a_checkpoint_without_configuration(fairseq, straight, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({**straight.checkpoint("checkpoint2.pt"), "cfg": None}, path)
    with pytest.raises(UserError, match="expected a whole fairseq checkpoint .*Neither args nor"):
        load(Namespace(checkpoint=path, data=fairseq.data))
