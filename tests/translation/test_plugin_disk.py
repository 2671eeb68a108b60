"""A disk that fills up: the fairseq plugin stops before a checkpoint is cut off."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from concurrent.futures import wait
from types import SimpleNamespace

import pytest

pytest.importorskip("fairseq", reason="needs fairseq: pip install '.[translation]'")

import torch  # noqa: E402
from fairseq_toys import EPOCHS, config  # noqa: E402
from pskd_fairseq import checkpoint  # noqa: E402

TO_THE_END = ["--max-epoch", str(EPOCHS)]

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


@pytest.mark.parametrize(
    ("name", "left"),
    [
        # There is room for checkpoint1, checkpoint_best and half of checkpoint_last.
        ("first_epoch", set()),
        # A checkpoint inside an epoch is larger than the last, and so are the copies of it.
        ("copy_to_last", {"checkpoint_best.pt", "checkpoint_last.pt"}),
    ],
)
def test_a_disk_too_small_for_a_copy_leaves_no_checkpoint_cut_off(full_disks, name, left):
    run = full_disks[name].result()
    assert run.code != 0 and left <= set(expect_whole(run.save_dir))


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
    flags = ["limited", *TO_THE_END, "--save-interval-updates", "8"]
    run = fairseq.train(*flags, file_bytes=sizes.end + sizes.growth // 2)
    assert run.code != 0 and "Error" in run.output
    assert expect_whole(run.save_dir) == [
        "checkpoint1.pt", "checkpoint_best.pt", "checkpoint_last.pt"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, 1_000),  # the next one aside; the copies take the place of their like
        ({"keep_best_checkpoints": 1}, 2_000),
        ({"checkpoint_suffix": "_a"}, 0),  # nothing is known of a first one's size
    ],
)
def test_free_space_is_compared_with_the_last_checkpoint(tmp_path, monkeypatch, options, needed):
    for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    free = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    checkpoint.check_free_space(config(tmp_path, **options))
    if needed:
        free.free -= 1
        message = f"expected {needed:,} free bytes, got {needed - 1:,}"
        with pytest.raises(OSError, match=message) as raised:
            checkpoint.check_free_space(config(tmp_path, **options))
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(tmp_path)
