"""--pskd-fused-linear through fairseq-train: the same training, without the logits of a batch."""

from __future__ import annotations

import shutil
from argparse import Namespace
from copy import deepcopy

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fairseq.distributed import (  # noqa: E402
    LegacyDistributedDataParallel,
    ModuleProxyWrapper,
)
from fairseq.models.transformer_lm import (  # noqa: E402
    TransformerLanguageModel,
    base_lm_architecture,
)
from fairseq_toys import batch, build_criterion, continued_from, same, step  # noqa: E402
from pskd_fairseq.criterion import PSKDCriterion  # noqa: E402  with torch's allow-list
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import pskd.kernels.linear_chunks  # noqa: E402

FUSED = "--pskd-fused-linear"
TO_THE_END = ["--max-epoch", "3"]
TEACHERS = {
    "snapshot": [*TO_THE_END, "--save-interval-updates", "4"],
    "memory": [
        *TO_THE_END, "--save-interval-updates", "4", "--pskd-teacher", "memory", "--pskd-top-k", "5"
    ],
}  # fmt: skip
CUT = "checkpoint_3_16.pt"
LSTM = (
    "--arch lstm --encoder-embed-dim 32 --encoder-hidden-size 32 --decoder-embed-dim 32 "
    "--decoder-hidden-size 32 --decoder-out-embed-dim 32"
).split()


@pytest.fixture(scope="module")
def runs(fairseq):
    """A training with each teacher, from logits and from features."""
    started = {
        (name, flag): fairseq.start(f"fused_{of}_{name}", *flags, *([flag] if flag else []))
        for flag, of in ((FUSED, "features"), ("", "logits"))
        for name, flags in TEACHERS.items()
    }
    return {key: run.result().expect_success() for key, run in started.items()}


@pytest.fixture(scope="module")
def resumed(fairseq, runs):
    """Fused trainings cut in the last epoch, and one that began without the flag."""
    started = {}
    for name, teacher, flag in (
        ("snapshot", "snapshot", FUSED), ("memory", "memory", FUSED), ("begun_plain", "memory", "")
    ):  # fmt: skip
        source = runs[teacher, flag].save_dir
        folder = continued_from(source / CUT, fairseq.folder / f"fused_{name}_on")
        if teacher == "memory":
            shutil.copytree(source / "pskd_memory", folder / "pskd_memory")
        started[name] = fairseq.start(folder.name, *TEACHERS[teacher], FUSED)
    return started


def both(task, folder, **options) -> list[PSKDCriterion]:
    """Return the criterion that makes logits and the fused one."""
    return [build_criterion(task, folder, pskd_fused_linear=f, **options) for f in (False, True)]


def meters(run, epoch: int) -> dict[str, float]:
    """Return the means of an epoch's training as a checkpoint keeps them, before they are rounded.

    Those of time say nothing.
    """
    kept = run.checkpoint(f"checkpoint{epoch}.pt")["extra_state"]["metrics"]["train"]
    means = {key: state for _, key, kind, state in kept if kind == "AverageMeter"}
    return {
        key: float(state["sum"]) / float(state["count"])
        for key, state in means.items()
        if float(state["count"]) and key not in ("train_wall", "clip", "gb_free")
    }


# --- whole trainings --------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_fused_training_logs_what_one_from_logits_logs(runs, name, epoch):
    """To within what another order of sums does in 18 updates; the dropout is the same."""
    fused, plain = (meters(runs[name, flag], epoch) for flag in (FUSED, ""))
    assert fused == pytest.approx(plain, rel=1e-4)
    values = [runs[name, flag].column("nll_loss", "valid") for flag in (FUSED, "")]
    assert values[0] == pytest.approx(values[1], abs=2e-3)
    names = {"loss", "nll_loss", "alpha"}
    if epoch > 1:
        names |= {"teacher_nll_loss", "teacher_agreement", "teacher_coverage", "gradient_rescaling"}
        names |= {"gradient_rescaling_hard"} | ({"top_k_mass"} if name == "memory" else set())
    assert names <= fused.keys()
    assert [key.removeprefix("train_") for key in runs[name, FUSED].log("train")[epoch - 1]] == [
        key.removeprefix("train_") for key in runs[name, ""].log("train")[epoch - 1]
    ]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_resumed_run_ends_as_the_straight_run(runs, resumed, name):
    run = resumed[name].result().expect_success()
    assert same(run.model(), runs[name, FUSED].model())
    assert run.column("teacher_nll_loss")[-1] == runs[name, FUSED].column("teacher_nll_loss")[-1]


def test_the_flag_may_be_taken_up_at_a_resume(runs, resumed):
    run, whole = resumed["begun_plain"].result().expect_success(), runs["memory", ""]
    assert meters(run, 3) == pytest.approx(meters(whole, 3), rel=1e-4)


# --- one step, in this process ----------------------------------------------------------------


@pytest.mark.parametrize("rows_at_a_time", ["all", "some"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("epoch", [1, 3])
def test_loss_log_and_gradients_are_those_from_logits(
    task, models, tmp_path, monkeypatch, epoch, smoothing, prefix, rows_at_a_time
):
    if rows_at_a_time == "some":
        monkeypatch.setattr(pskd.kernels.linear_chunks, "_CHUNK_ELEMENTS", 1)
    teacher, student = models
    options = {"label_smoothing": smoothing, "ignore_prefix_size": prefix, "sentence_avg": True}
    plain, fused = both(task, tmp_path, **options)
    sample = batch(task)
    assert (sample["target"] == task.target_dictionary.pad()).any()
    task.begin_epoch(epoch, teacher)
    expected, ours = step(plain, student, sample), step(fused, student, sample)
    assert ours.values == pytest.approx(expected.values, rel=1e-5)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(ours.grads[name], grad, rtol=1e-4, atol=1e-4)


def language_model(task):
    args = Namespace(
        decoder_embed_dim=32, decoder_ffn_embed_dim=64, decoder_layers=1, decoder_attention_heads=2,
        share_decoder_input_output_embed=True, tokens_per_sample=64,
    )  # fmt: skip
    base_lm_architecture(args)
    return TransformerLanguageModel.build_model(args, task).train()


def test_a_language_model_has_the_same_loss_and_gradients(task, tmp_path):
    model, sample = language_model(task), batch(task)
    sample["net_input"]["src_tokens"] = sample["net_input"].pop("prev_output_tokens")
    plain, fused = both(task, tmp_path)
    task.begin_epoch(3, model)
    expected, ours = step(plain, model, sample), step(fused, model, sample)
    assert ours.values == pytest.approx(expected.values, rel=1e-5)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(ours.grads[name], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["half", "bfloat16", "autocast"])
def test_in_half_precision(task, models, tmp_path, kind):
    teacher, student = (deepcopy(model) for model in models)
    if kind != "autocast":
        teacher, student = (model.to(getattr(torch, kind)) for model in (teacher, student))
    plain, fused = both(task, tmp_path)
    sample = batch(task)
    task.begin_epoch(3, teacher)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected, ours = step(plain, student, sample), step(fused, student, sample)
    for name in ("loss", "nll_loss", "pskd_teacher_nll", "pskd_error"):
        assert ours.values[name] == pytest.approx(expected.values[name], rel=1e-2), name
    for name, grad in expected.grads.items():
        assert ours.grads[name].dtype == grad.dtype
        difference = (ours.grads[name] - grad).float().norm()
        assert difference <= 0.05 * grad.float().norm() + 1e-2, name


@pytest.mark.parametrize("epoch", [1, 3])
def test_the_output_layer_is_not_run_in_training(task, models, tmp_path, epoch):
    teacher, student = (deepcopy(model) for model in models)
    _, fused = both(task, tmp_path)
    sample, calls = batch(task), []
    task.begin_epoch(epoch, teacher)
    asked = [student] + ([fused.epoch_state.teacher.model] if epoch > 1 else [])
    for model in asked:
        model.decoder.output_projection.register_forward_hook(lambda *_: calls.append(1))
    fused(student, sample)[0].backward()
    assert calls == []
    fused.eval()(student.eval(), sample)
    assert calls == [1]


def test_a_loss_a_token_is_made_of_logits(task, models, tmp_path):
    teacher, student = models
    plain, fused = both(task, tmp_path)
    sample = batch(task)
    task.begin_epoch(3, teacher)
    torch.manual_seed(7)
    each = fused(student, sample, reduce=False)[0]
    assert each.shape == (sample["target"].numel(), 1)
    torch.manual_seed(7)
    torch.testing.assert_close(each.sum(), plain(student, sample)[0])


def test_a_batch_that_stands_in_for_none_adds_nothing(task, models, tmp_path):
    """fairseq multiplies the loss of a process that has no batch left with 0, in its place."""
    teacher, student = models
    _, fused = both(task, tmp_path)
    task.begin_epoch(3, teacher)
    student.zero_grad()
    loss = fused(student, batch(task))[0]
    loss *= 0
    loss.backward()
    assert all((weight.grad == 0).all() for weight in student.parameters())


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


WRAPPERS = {
    "pytorch_ddp": lambda model, _: DistributedDataParallel(model),
    "find_unused": lambda model, _: DistributedDataParallel(model, find_unused_parameters=True),
    "legacy_ddp": LegacyDistributedDataParallel,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_has_the_gradients_of_the_bare_one(task, models, tmp_path, one_rank, name):
    """In one process, where pytorch_ddp, which fairseq runs on a GPU only, works as well."""
    teacher, student = (deepcopy(model) for model in models)
    _, fused = both(task, tmp_path)
    sample = batch(task)
    task.begin_epoch(3, teacher)
    expected = step(fused, student, sample).grads
    wrapped = ModuleProxyWrapper(WRAPPERS[name](student, one_rank))
    for _ in range(2):  # torch counts what a step has used in the next one
        grads = step(fused, wrapped, sample).grads
    grads = {name.removeprefix("module.module."): grad for name, grad in grads.items()}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad)


# --- what is refused --------------------------------------------------------------------------


def test_what_it_cannot_serve_ends_before_the_first_update(fairseq):
    run = fairseq.train("fused_lstm", *LSTM, *TO_THE_END, FUSED)
    run.expect_refusal(FUSED, "expected a model that takes features_only", "got LSTMModel")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pskd_skip_wrong_teacher": True}, "expected no --pskd-skip-wrong-teacher, got both"),
        ({"report_accuracy": True}, "expected no --report-accuracy, got both"),
        ({"ddp_backend": "fully_sharded"}, "legacy_ddp or pytorch_ddp, got fully_sharded"),
    ],
)
def test_options_that_need_logits_or_a_sharded_model(task, tmp_path, options, message):
    build_criterion(task, tmp_path, pskd_teacher="memory", **options)  # without the flag
    with pytest.raises(ValueError, match=message):
        build_criterion(task, tmp_path, pskd_teacher="memory", pskd_fused_linear=True, **options)


def sharpened(model) -> None:
    model.get_normalized_probs = lambda output, log_probs, sample=None: (
        2.0 * output[0]
    ).log_softmax(-1)


def with_adaptive_softmax(model) -> None:
    model.decoder.adaptive_softmax = torch.nn.Identity()


def with_its_own_output(model) -> None:
    model.decoder.output_layer = lambda features: features.tanh()


def untied(model) -> None:
    embedding = model.decoder.output_projection
    model.decoder.output_projection = torch.nn.Linear(*embedding.weight.T.shape, bias=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (untied, "--share-decoder-input-output-embed.*got one of its own"),
        (sharpened, "is the softmax of its output layer, got Transf"),
        (with_adaptive_softmax, "expected no --adaptive-softmax-cutoff, got"),
        (with_its_own_output, "output layer of fairseq's Transformer, got that of Tr"),
    ],
)
def test_a_distribution_that_is_not_of_features_and_embedding_is_refused(
    task, models, tmp_path, change, message
):
    student = deepcopy(models[1])
    change(student)
    _, fused = both(task, tmp_path)
    task.begin_epoch(1, student)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            fused(student, batch(task))
