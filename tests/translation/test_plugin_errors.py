"""What the fairseq plugin refuses: before the first update, by name, and leaving files alone."""

from __future__ import annotations

import errno
import fractions
import os
import resource
import shutil
import subprocess
from collections import namedtuple
from concurrent.futures import wait
from types import SimpleNamespace

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from conftest import (  # noqa: E402
    ALPHA_FINAL,
    EPOCHS,
    Payload,
    build_criterion,
    continued_from,
    digests,
    entry,
    same,
)
from fairseq import checkpoint_utils  # noqa: E402
from fairseq.dataclass.configs import CheckpointConfig  # noqa: E402
from pskd_fairseq import checkpoint  # noqa: E402

TO_THE_END = ["--max-epoch", str(EPOCHS)]
SCHEDULE = {
    "name": "linear", "alpha_final": ALPHA_FINAL, "unit": "epoch", "total": EPOCHS, "start_epoch": 1
}  # fmt: skip

OPTIONS = {
    "--label-smoothing": 0.1, "--pskd-teacher": "snapshot", "--pskd-skip-wrong-teacher": False
}  # fmt: skip

#: By name: the flags, and what the error must say (the flag or file, what it expected, what came).
WRONG_OPTIONS = {
    "no_end": ([], ["--max-epoch", "--max-update", "(no end)"]),
    "alpha_above_1": (
        [*TO_THE_END, "--pskd-alpha-final", "1.2"], ["--pskd-alpha-final", "[0, 1]", "1.2"]
    ),
    "unknown_schedule": (
        [*TO_THE_END, "--pskd-alpha-schedule", "cubic"],
        ["--pskd-alpha-schedule", "'cubic'", "'linear', 'constant', 'cosine'"],
    ),
    "unknown_teacher": (
        [*TO_THE_END, "--pskd-teacher", "oracle"], ["--pskd-teacher", "'oracle'", "'snapshot'"]
    ),
    "label_smoothing_2": (
        [*TO_THE_END, "--label-smoothing", "2"], ["--label-smoothing", "[0, 1", "2.0"]
    ),
    "ignore_prefix_-1": (
        [*TO_THE_END, "--ignore-prefix-size", "-1"], ["--ignore-prefix-size", "at least 0", "-1"]
    ),
    "no_restore_file": (
        [*TO_THE_END, "--restore-file", "nowhere.pt"], ["--restore-file", "nowhere.pt", "got none"]
    ),
    "no_suffixed_restore_file": (
        [*TO_THE_END, "--restore-file", "nowhere.pt", "--checkpoint-suffix", "_a"],
        ["--restore-file", "--checkpoint-suffix", "nowhere_a.pt", "got none"],
    ),
}  # fmt: skip

WRONG_CHECKPOINTS = {
    "cut_off": (TO_THE_END, ["checkpoint_last.pt", "complete", "damaged", "--restore-file"]),
    "flipped_teacher": (TO_THE_END, ["checkpoint_last.pt", "teacher", "damaged", "SHA-256"]),
    "payload": (TO_THE_END, ["checkpoint_last.pt", "types of a fairseq checkpoint", "system"]),
    "other_dictionary": (
        ["larger_data", *TO_THE_END], ["checkpoint_last.pt", "dictionaries", "'source': 56"]
    ),
    "other_length": (
        ["--max-epoch", "9"],
        ["checkpoint_last.pt", "'4 epochs'", "'9 epochs'", "--pskd-allow-schedule-change"],
    ),
    "no_teacher": (
        [*TO_THE_END, "--reset-optimizer"],
        ["checkpoint_last.pt", "middle of epoch 3", "teacher", "got none", "--reset-dataloader"],
    ),
    "suffix": (
        [*TO_THE_END, "--reset-optimizer", "--checkpoint-suffix", "_a"],
        ["checkpoint_last_a.pt", "middle of epoch 3", "teacher", "got none", "--reset-dataloader"],
    ),
    "suffix_and_file": (
        [
            "--max-epoch", "9", "--checkpoint-suffix", "_a",
            "--restore-file", "wrong_suffix_and_file/older.pt",
        ],
        ["older_a.pt", "'4 epochs'", "'9 epochs'", "--pskd-allow-schedule-change"],
    ),
}  # fmt: skip
#: The checkpoint's name where it is not checkpoint_last.pt.
NAMES = {"suffix": "checkpoint_last_a.pt", "suffix_and_file": "older_a.pt"}


def flip_teacher(path) -> None:
    """Flip one bit of the teacher's weights in a checkpoint's file."""
    state = torch.load(path, weights_only=False)
    data = bytearray(path.read_bytes())
    weight = max(entry(state)["teacher"]["model"].values(), key=torch.Tensor.numel)
    start = data.find(weight.numpy().tobytes())
    assert start > 0
    data[start + 101] ^= 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def wrong_checkpoints(fairseq, straight, stock):
    """Save folders that no training may continue from, by name."""
    source = straight.save_dir / "checkpoint_3_16.pt"
    foreign = dict.fromkeys(["no_teacher", "suffix"], stock.save_dir / "checkpoint_3_16.pt")
    folders = {
        name: continued_from(foreign.get(name, source), fairseq.folder / f"wrong_{name}")
        for name in WRONG_CHECKPOINTS
    }
    last = {name: folder / "checkpoint_last.pt" for name, folder in folders.items()}
    for name, file in NAMES.items():
        last[name].rename(folders[name] / file)
    os.truncate(last["cut_off"], source.stat().st_size // 2)
    shutil.copyfile(source, folders["cut_off"] / "checkpoint_3_16.pt")
    flip_teacher(last["flipped_teacher"])
    state = torch.load(source, weights_only=False)
    state["extra_state"]["metrics"] = Payload(fairseq.folder / "resume_was_run")
    torch.save(state, last["payload"])
    larger = shutil.copytree(fairseq.data, fairseq.folder / "larger_data")
    with open(larger / "dict.de.txt", "a", encoding="utf-8") as words:
        words.writelines(f"more{number} 1\n" for number in range(8))
    return folders


@pytest.fixture(scope="module")
def refusals(fairseq, wrong_checkpoints):
    """Every wrong command, two at a time, with the folder's contents before it."""
    started = {
        name: ({}, fairseq.start(f"wrong_{name}", *flags))
        for name, (flags, _) in WRONG_OPTIONS.items()
    }
    other = str(wrong_checkpoints["other_length"] / "checkpoint_last.pt")
    once = fairseq.start("wrong_continue_once", "--max-epoch", "9", "--continue-once", other)
    started["continue_once"] = {}, once
    for name, (flags, _) in WRONG_CHECKPOINTS.items():
        started[name] = digests(wrong_checkpoints[name]), fairseq.start(f"wrong_{name}", *flags)
    return started


@pytest.fixture(scope="module")
def ways_out(fairseq, straight, wrong_checkpoints, refusals):
    """What the errors advise."""
    continued_from(straight.save_dir / "checkpoint2.pt", fairseq.folder / "shorter")
    refusals["cut_off"][1].result()
    older = str(wrong_checkpoints["cut_off"] / "checkpoint_3_16.pt")
    return {
        "older": fairseq.start("wrong_cut_off", *TO_THE_END, "--restore-file", older),
        "change": fairseq.start("shorter", "--max-epoch", "3", "--pskd-allow-schedule-change"),
    }


@pytest.mark.parametrize("name", [*WRONG_OPTIONS, *WRONG_CHECKPOINTS])
def test_a_wrong_command_ends_before_the_first_update(refusals, name):
    before, future = refusals[name]
    run = future.result()
    run.expect_refusal(*({**WRONG_OPTIONS, **WRONG_CHECKPOINTS}[name][1]))
    if run.save_dir.exists():
        assert digests(run.save_dir) == before


def test_a_checkpoint_to_continue_once_is_checked_as_the_last_one(refusals):
    _, future = refusals["continue_once"]
    future.result().expect_refusal("checkpoint_last.pt", "'4 epochs'", "'9 epochs'")


def test_a_foreign_object_is_not_run_on_resume(fairseq, refusals):
    refusals["payload"][1].result()
    assert not (fairseq.folder / "resume_was_run").exists()


def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(ways_out, straight):
    run = ways_out["older"].result().expect_success()
    assert same(run.model(), straight.model())


def test_an_allowed_schedule_change_takes_the_new_schedule(ways_out):
    run = ways_out["change"].result().expect_success()
    assert run.column("alpha") == pytest.approx([ALPHA_FINAL], abs=1e-4)
    assert "the schedule changes" in run.output


# --- options, in this process -----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.1, 1.0001, float("nan"), float("inf")])
def test_alpha_must_be_a_weight(task, tmp_path, alpha):
    with pytest.raises(ValueError, match=r"--pskd-alpha-final: expected a number in \[0, 1\]"):
        build_criterion(task, tmp_path, pskd_alpha_final=alpha)


def test_a_prefix_must_not_be_negative(task, tmp_path):
    with pytest.raises(ValueError, match="--ignore-prefix-size: expected .* at least 0, got -1"):
        build_criterion(task, tmp_path, ignore_prefix_size=-1)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_label_smoothing_must_be_a_weight(task, tmp_path, smoothing):
    with pytest.raises(ValueError, match=r"--label-smoothing: expected a number in \[0, 1"):
        build_criterion(task, tmp_path, label_smoothing=smoothing)


def test_sharded_models_are_refused_by_name(task, tmp_path):
    """fairseq itself stops sooner where fairscale is not installed."""
    with pytest.raises(ValueError, match="--ddp-backend legacy_ddp or pytorch_ddp, got fully_shar"):
        build_criterion(task, tmp_path, ddp_backend="fully_sharded")


# --- checkpoints, in this process -------------------------------------------------------------


@pytest.fixture
def check(task, tmp_path):
    """Check a resume from the checkpoint in ``tmp_path``, as a new criterion does."""

    def check_resume(allow_change=False, reset_dataloader=False, options=OPTIONS, **schedule):
        plan = checkpoint.ResumePlan(str(tmp_path), "checkpoint_last.pt", reset_dataloader)
        checkpoint.check_resume(plan, task, {**SCHEDULE, **schedule}, allow_change, options)

    return check_resume


@pytest.fixture
def last(tmp_path, straight):
    """A whole checkpoint of the middle of epoch 3."""
    path = tmp_path / "checkpoint_last.pt"
    shutil.copyfile(straight.save_dir / "checkpoint_3_16.pt", path)
    return path


def change(path, function) -> None:
    """Change a checkpoint's content and save it again."""
    state = torch.load(path, weights_only=False)
    function(state)
    torch.save(state, path)


def test_a_whole_checkpoint_is_accepted(check, last):
    check()


def test_a_first_run_has_nothing_to_check(check, tmp_path):
    check()


@pytest.mark.parametrize("part", [0.0, 1e-5, 1e-4, 0.01, 0.3, 0.9, 0.99999])
def test_a_checkpoint_cut_off_anywhere_is_damaged(check, last, part):
    os.truncate(last, int(part * last.stat().st_size))
    with pytest.raises(ValueError, match="checkpoint_last.pt: expected a complete .* damaged"):
        check()


@pytest.mark.parametrize("content", [b"no checkpoint\n" * 99, b"\x80\x02]q\x00.", b"PK\x03\x04"])
def test_another_file_is_no_checkpoint(check, last, content):
    last.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint_last.pt: expected"):
        check()


@pytest.mark.parametrize("content", [[1, 2], 7, torch.zeros(3)])
def test_another_torch_file_is_no_checkpoint(check, last, content):
    torch.save(content, last)
    with pytest.raises(ValueError, match="checkpoint_last.pt: expected"):
        check()


def test_a_bit_flipped_in_the_pickle_is_named_or_harmless(check, last):
    """Never an error without the file's name, whichever byte is hit."""
    data = last.read_bytes()
    start = data.find(b"data.pkl") + 64
    for position in range(start, start + 24_000, 47):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        last.write_bytes(damaged)
        try:
            check(allow_change=True)
        except ValueError as error:
            assert "checkpoint_last.pt" in str(error), position


def test_flipped_teacher_weights_are_found(check, last):
    flip_teacher(last)
    with pytest.raises(ValueError, match="teacher's weights are damaged: expected SHA-256"):
        check()


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize("foreign", [fractions.Fraction(1, 3), Point(1, 2), SimpleNamespace(a=1)])
def test_an_object_that_fairseq_does_not_write_is_refused(check, last, foreign):
    change(last, lambda state: state["extra_state"].update(metrics=foreign))
    expected = f"checkpoint_last.pt: expected the types of a fairseq.*{type(foreign).__name__}"
    with pytest.raises(ValueError, match=expected):
        check()


def test_the_allow_list_lets_no_payload_run(last, tmp_path):
    marker = tmp_path / "was_run"
    checkpoint.allow_fairseq_types()
    change(last, lambda state: state.update(args=Payload(marker)))
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(last)
    assert not marker.exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"alpha_final": 0.6}, f"--pskd-alpha-final: expected {ALPHA_FINAL}, .*got 0.6"),
        ({"name": "cosine"}, "--pskd-alpha-schedule: expected 'linear', .*got 'cosine'"),
        ({"unit": "update"}, f"length of .*: expected '{EPOCHS} epochs', .*got '{EPOCHS} updates'"),
        ({"total": 5}, f"length of the training: expected '{EPOCHS} epochs', .*got '5 epochs'"),
        ({"start_epoch": 2}, "--pskd-start-epoch: expected 1, .*got 2"),
    ],
)
def test_another_schedule_is_refused_unless_it_is_allowed(check, last, changed, message):
    expected = rf"checkpoint_last.pt: {message} \(--pskd-allow-schedule-change allows it\)$"
    with pytest.raises(ValueError, match=expected):
        check(**changed)
    check(allow_change=True, **changed)


CHANGED_OPTIONS = pytest.mark.parametrize(
    "flag, value",
    [("--label-smoothing", 0.2), ("--pskd-teacher", "memory"), ("--pskd-skip-wrong-teacher", True)],
)


@CHANGED_OPTIONS
def test_another_loss_or_teacher_is_refused(check, last, flag, value):
    """A change of schedule that is allowed allows no other."""
    expected = f"checkpoint_last.pt: {flag}: expected {OPTIONS[flag]!r}, with which .*got {value!r}"
    for allowed in (False, True):
        with pytest.raises(ValueError, match=f"{expected}$"):
            check(allow_change=allowed, options=OPTIONS | {flag: value})
    check(reset_dataloader=True, options=OPTIONS | {flag: value})


@CHANGED_OPTIONS
def test_an_older_checkpoint_tells_its_teacher_only(check, last, flag, value):
    change(last, lambda state: entry(state).pop("options"))
    check()
    if flag != "--pskd-teacher":
        check(options=OPTIONS | {flag: value})
        return
    with pytest.raises(ValueError, match="--pskd-teacher: expected 'snapshot', .*got 'memory'"):
        check(options=OPTIONS | {flag: value})
    change(last, lambda state: entry(state).update(memory={"0": {}}))
    check(options=OPTIONS | {flag: value})


def test_what_is_refused_is_what_the_criterion_was_told(task, last, tmp_path):
    build_criterion(task, tmp_path)
    build_criterion(task, tmp_path, pskd_allow_schedule_change=True, max_epoch=9)
    for changed, flag in (
        ({"pskd_teacher": "memory"}, "--pskd-teacher"),
        ({"label_smoothing": 0.2}, "--label-smoothing"),
        ({"pskd_skip_wrong_teacher": True}, "--pskd-skip-wrong-teacher"),
    ):
        with pytest.raises(ValueError, match=f"{flag}: expected .* with which the checkpoint"):
            build_criterion(task, tmp_path, **changed)


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_dictionary_of_another_size_is_refused(check, last, side):
    change(last, lambda state: entry(state)["vocabulary"].update({side: 11}))
    with pytest.raises(ValueError, match=rf"dictionaries .*'{side}': 11.* got"):
        check(allow_change=True)


def test_state_of_a_later_format_is_refused(check, last):
    change(last, lambda state: entry(state).update(format=2))
    with pytest.raises(ValueError, match="expected PS-KD state 1, got 2"):
        check()


def drop_entry(state) -> None:
    del state["extra_state"]["TranslationTask"]


def test_the_middle_of_an_epoch_needs_its_teacher(check, last):
    change(last, drop_entry)
    with pytest.raises(ValueError, match="checkpoint_last.pt.* epoch 3.* teacher"):
        check()
    check(alpha_final=0.0)  # needs none
    check(reset_dataloader=True)  # begins anew with epoch 1


def test_a_run_with_alpha_0_leaves_no_teacher_to_go_on_with(check, last):
    """As another criterion's checkpoint: the rest of the epoch would train without a teacher."""

    def of_alpha_0(state):
        kept = entry(state)
        kept["schedule"]["alpha_final"] = 0.0
        kept["teacher"] = {"model": None}
        kept["teacher_sha256"] = checkpoint.make_entry(
            epoch=3, schedule={}, vocabulary={}, teacher=kept["teacher"]
        )["teacher_sha256"]

    change(last, of_alpha_0)
    with pytest.raises(ValueError, match="checkpoint_last.pt.* epoch 3.* teacher"):
        check(allow_change=True)


@pytest.mark.parametrize("position", [{"epoch": 1}, {"iterations_in_epoch": 0}])
def test_the_first_epoch_and_an_epochs_end_need_no_teacher(check, last, position):
    def move(state):
        drop_entry(state)
        state["extra_state"]["train_iterator"].update(position)

    change(last, move)
    check()


@pytest.mark.parametrize("suffix", ["", "_a", "-rank-0"])
@pytest.mark.parametrize("restore_file", ["checkpoint_last.pt", "a.pt.folder/older.pt"])
def test_the_file_that_is_checked_is_the_one_that_fairseq_reads(
    tmp_path, monkeypatch, restore_file, suffix
):
    class Asked(Exception):
        """Ends fairseq's reading before it begins."""

    def asked(path, *_, **__):
        raise Asked(path)

    monkeypatch.chdir(tmp_path)
    config = CheckpointConfig(save_dir=str(tmp_path), restore_file=restore_file)
    trainer = SimpleNamespace(
        cfg=SimpleNamespace(checkpoint=config), checkpoint_suffix=suffix, load_checkpoint=asked,
        data_parallel_rank=0, data_parallel_process_group=None,
    )  # fmt: skip
    with pytest.raises(Asked) as read:
        checkpoint_utils.load_checkpoint(config, trainer)
    (path,) = read.value.args
    os.makedirs(os.path.dirname(path), exist_ok=True)
    (tmp_path / path).touch()
    plan = checkpoint.ResumePlan(str(tmp_path), restore_file, False, suffix=suffix)
    assert plan.path() == path


def begin(task, model, epoch: int, batches: int) -> None:
    """Begin an epoch as fairseq's trainer does where its iterator stands after some batches."""
    task.load_dataset("train")
    iterator = SimpleNamespace(iterations_in_epoch=batches)
    task.dataset_to_epoch_iter[task.dataset("train")] = iterator
    task.begin_epoch(epoch, model)


def test_whatever_was_read_the_middle_of_an_epoch_needs_its_teacher(task, tmp_path):
    """The model of the middle would be another teacher, in silence."""
    model = torch.nn.Linear(2, 2)
    criterion = build_criterion(task, tmp_path)
    with pytest.raises(ValueError, match=r"after 4 batches of epoch 3: expected the teacher .* no"):
        begin(task, model, epoch=3, batches=4)
    assert not criterion.epoch_state.teacher.available

    no_teacher = checkpoint.make_entry(epoch=3, schedule={}, vocabulary={}, teacher={"model": None})
    task.set_checkpoint_dict({checkpoint.ENTRY: no_teacher})
    with pytest.raises(ValueError, match="after 4 batches of epoch 3"):
        begin(task, model, epoch=3, batches=4)

    task.set_checkpoint_dict(
        {checkpoint.ENTRY: {**no_teacher, "teacher": {"model": model.state_dict()}}}
    )
    begin(task, model, epoch=3, batches=4)
    assert criterion.epoch_state.teacher.available


@pytest.mark.parametrize("epoch, batches, alpha", [(1, 4, 0.7), (3, 0, 0.7), (3, 4, 0.0)])
def test_elsewhere_an_epoch_begins_with_what_there_is(task, tmp_path, epoch, batches, alpha):
    build_criterion(task, tmp_path, pskd_alpha_final=alpha)
    begin(task, torch.nn.Linear(2, 2), epoch, batches)


# --- a full disk ------------------------------------------------------------------------------

#: Bytes a file system keeps for folders and rounds files up by.
SLACK = 40_000


@pytest.fixture(scope="module")
def sizes(straight):
    """Bytes of a checkpoint of an epoch's end and of one inside an epoch, with its teacher."""
    names = ("checkpoint4.pt", "checkpoint_3_16.pt")
    end, inside = ((straight.save_dir / name).stat().st_size for name in names)
    assert inside > end + 2 * SLACK
    return SimpleNamespace(end=end, inside=inside, growth=inside - end)


def mount(folder, size: float, *options: str) -> None:
    """Put a file system of a size in bytes on a folder."""
    flags = ",".join([f"size={int(size) + SLACK}", *options])
    command = ["mount", "-t", "tmpfs", "-o", flags, "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small file system needs the mount command")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a small file system needs the right to mount one: {error.stderr.strip()}")


@pytest.fixture(scope="module")
def full_disks(fairseq, sizes):
    """Trainings on file systems that are too small, by what has no room."""
    inside = ["--no-epoch-checkpoints", "--save-interval-updates", "8"]
    with_teacher = 2 * sizes.end + sizes.inside  # the last and the best, and one with its teacher
    plans = {
        "fourth_epoch": (5.5 * sizes.end, ["--max-epoch", "5"]),
        "first_epoch": (2.5 * sizes.end, TO_THE_END),
        "copy_to_best": (with_teacher + 0.5 * sizes.growth, [*TO_THE_END, *inside]),
        "copy_to_last": (with_teacher + 1.5 * sizes.growth, [*TO_THE_END, *inside]),
        # Two epochs leave six files, the third adds its own and half of one more of the best.
        "one_of_the_best": (7.5 * sizes.end, [*TO_THE_END, "--keep-best-checkpoints", "2"]),
    }
    folders = [fairseq.folder / f"disk_{name}" for name in plans]
    try:
        for folder, (size, _) in zip(folders, plans.values(), strict=True):
            folder.mkdir()
            mount(folder, size)
        runs = {name: fairseq.start(f"disk_{name}", *flags) for name, (_, flags) in plans.items()}
        yield runs
        wait(runs.values())
    finally:
        for folder in folders:
            if os.path.ismount(folder):
                subprocess.run(["umount", str(folder)], check=True)


def expect_whole(folder) -> list[str]:
    """Assert that every file with a final name can be read, and return the names."""
    names = sorted(path.name for path in folder.glob("*.pt"))
    for name in names:
        try:
            torch.load(folder / name, weights_only=False)
        except (RuntimeError, EOFError) as error:
            raise AssertionError(f"{name} is cut off: {error}") from error
    return names


def test_a_disk_that_fills_up_stops_training_and_spares_the_checkpoints(full_disks):
    run = full_disks["fourth_epoch"].result()
    assert run.code != 0
    assert "no room for the next checkpoint" in run.output and str(run.save_dir) in run.output
    assert expect_whole(run.save_dir) == [
        "checkpoint1.pt", "checkpoint2.pt", "checkpoint3.pt", "checkpoint_best.pt",
        "checkpoint_last.pt",
    ]  # fmt: skip


def test_with_more_room_training_goes_on(fairseq, full_disks, sizes):
    folder = full_disks["fourth_epoch"].result().save_dir
    mount(folder, 20 * sizes.end, "remount")
    resumed = fairseq.train(folder.name, "--max-epoch", "5").expect_success()
    assert resumed.column("alpha") == pytest.approx([0.56, 0.7], abs=1e-4)
    assert "checkpoint5.pt" in expect_whole(folder)


def test_a_disk_too_small_for_the_first_checkpoints_leaves_none_cut_off(full_disks):
    """There is room for checkpoint1, checkpoint_best and half of checkpoint_last."""
    run = full_disks["first_epoch"].result()
    assert run.code != 0
    expect_whole(run.save_dir)


@pytest.mark.parametrize("copy", ["copy_to_best", "copy_to_last"])
def test_a_disk_too_small_for_the_teacher_leaves_no_checkpoint_cut_off(full_disks, copy):
    """A checkpoint inside an epoch is larger than the last, and so are the copies of it."""
    run = full_disks[copy].result()
    assert run.code != 0
    assert {"checkpoint_best.pt", "checkpoint_last.pt"} <= set(expect_whole(run.save_dir))


def test_a_disk_too_small_for_one_more_of_the_best_leaves_none_cut_off(full_disks):
    """--keep-best-checkpoints copies the whole file once more, under a name of its own."""
    run = full_disks["one_of_the_best"].result()
    assert run.code != 0
    best, others = [], []
    for name in expect_whole(run.save_dir):
        (best if name.startswith("checkpoint.best_loss_") else others).append(name)
    assert len(best) == 2
    assert others == [
        "checkpoint1.pt", "checkpoint2.pt", "checkpoint_best.pt", "checkpoint_last.pt"
    ]  # fmt: skip
    assert "no room for the next checkpoint" in run.output and str(run.save_dir) in run.output


def test_a_write_that_fails_leaves_no_file_under_a_final_name(fairseq, sizes):
    """Without a file system of its own: files may grow to a size below that of the second one."""
    limit = (sizes.end + sizes.growth // 2,) * 2
    flags = fairseq.train_flags("limited", *TO_THE_END, "--save-interval-updates", "8")
    run = fairseq.command(
        "train", *flags, name="limited",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )  # fmt: skip
    assert run.code != 0 and "Error" in run.output
    assert expect_whole(run.save_dir) == [
        "checkpoint1.pt", "checkpoint_best.pt", "checkpoint_last.pt"
    ]  # fmt: skip


def test_free_space_is_compared_with_the_last_checkpoint(tmp_path, monkeypatch):
    plan = checkpoint.SavePlan(str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=999))
    checkpoint.check_free_space(plan)  # nothing is known of a first one's size
    (tmp_path / "checkpoint_last.pt").write_bytes(b"x" * 1000)
    (tmp_path / "checkpoint_best.pt").write_bytes(b"x" * 1000)
    with pytest.raises(OSError, match="expected 1,000 free bytes, got 999") as raised:
        checkpoint.check_free_space(plan)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(tmp_path)


def test_free_space_is_that_for_one_more_of_the_best_too(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1999))
    for name in ("checkpoint_last_a.pt", "checkpoint_best_a.pt"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    checkpoint.check_free_space(checkpoint.SavePlan(str(tmp_path), "_a"))
    checkpoint.check_free_space(checkpoint.SavePlan(str(tmp_path), keep_best=1))  # none to go by
    with pytest.raises(OSError, match="expected 2,000 free bytes, got 1,999"):
        checkpoint.check_free_space(checkpoint.SavePlan(str(tmp_path), "_a", keep_best=1))


def test_enough_space_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    checkpoint.check_free_space(checkpoint.SavePlan(str(tmp_path)))
