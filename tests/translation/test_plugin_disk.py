"""A disk that fills up: the fairseq plugin stops before a checkpoint is cut off."""

from __future__ import annotations

import errno
import shutil
import subprocess
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


def expect_whole(folder) -> list[str]:
    """Assert that every file with a final name can be read, and return the names."""
    names = sorted(path.name for path in folder.glob("*.pt"))
    for name in names:
        try:
            torch.load(folder / name, weights_only=False)
        except (RuntimeError, EOFError) as error:
            raise AssertionError(f"{name} is cut off: {error}") from error
    return names


def test_a_disk_that_fills_up_stops_training_until_it_has_more_room(fairseq, sizes):
    """It is too small for the fourth epoch."""
    folder, flags = fairseq.folder / "full", ["full", "--max-epoch", "5"]
    folder.mkdir()
    mount(folder, 5.5 * sizes.end)
    try:
        run = fairseq.train(*flags)
        assert run.code != 0
        assert "no room for the next checkpoint" in run.output and str(run.save_dir) in run.output
        assert expect_whole(folder) == [
            "checkpoint1.pt", "checkpoint2.pt", "checkpoint3.pt", "checkpoint_best.pt",
            "checkpoint_last.pt",
        ]  # fmt: skip
        mount(folder, 20 * sizes.end, "remount")
        assert fairseq.train(*flags).column("alpha") == pytest.approx([0.56, 0.7], abs=1e-4)
        assert "checkpoint5.pt" in expect_whole(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_write_that_fails_leaves_no_file_under_a_final_name(fairseq, sizes):
    """Without a file system of its own: files may grow to a size below that of the second one."""
    flags = ["limited", *TO_THE_END, "--save-interval-updates", "8"]
    run = fairseq.train(*flags, file_bytes=sizes.end + sizes.growth // 2)
    assert run.code != 0 and "Error" in run.output
    assert expect_whole(run.save_dir) == [
        "checkpoint1.pt", "checkpoint_best.pt", "checkpoint_last.pt"
    ]  # fmt: skip


OVERHEAD = 1 << 17  # of a checkpoint beside weights


@pytest.mark.parametrize(
    ("there", "options", "known", "needed"),
    [
        (True, {}, {}, 1_000),  # the next one aside; the copies take the place of their like
        (True, {"keep_best_checkpoints": 1}, {}, 2_000),
        # One inside an epoch, with its teacher, is larger than the last, and so are its copies.
        (True, {}, {"growth": 500}, 1_500 + OVERHEAD + 2 * (500 + OVERHEAD)),
        (False, {}, {"first": 700}, 3 * (700 + OVERHEAD)),  # itself and two copies
        (False, {}, {}, 0),  # nothing is known of a first one's size
    ],
)
def test_free_space_is_compared_with_the_last_checkpoint(
    tmp_path, monkeypatch, there, options, known, needed
):
    for name in ("checkpoint_last.pt", "checkpoint_best.pt") if there else ():
        (tmp_path / name).write_bytes(b"x" * 1000)
    free = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    checkpoint.check_free_space(config(tmp_path, **options), **known)
    if needed:
        free.free -= 1
        message = f"expected {needed:,} free bytes, got {needed - 1:,}"
        with pytest.raises(OSError, match=message) as raised:
            checkpoint.check_free_space(config(tmp_path, **options), **known)
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
