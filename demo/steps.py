"""Commands of the demo: run in the background, watched, their output in log files."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class StepFailed(Exception):
    """A command of the demo ended with an error; its log is named."""


def _environment() -> dict[str, str]:
    """Return the environment of the trainings: one thread each, and freed memory kept.

    Without the two allocator settings glibc gives every large tensor back to the system and maps it
    anew, page by page, in each step; a third of a small model's time goes there.
    """
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def check_folder(path: Path) -> None:
    """Raise ValueError for a folder whose files are not the demo's own to delete, or no folder."""
    if not path.is_symlink() and not path.exists():
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"{path}: expected a folder, got something else; choose another --out")
    if any(path.iterdir()) and not (path / "train.log").is_file():
        raise ValueError(
            f"{path}: expected a folder that the demo made (with train.log), got other files, "
            "which it would delete; choose another --out"
        )


def fresh_folder(path: Path) -> Path:
    """Empty a folder of an earlier run of the demo, or make it; raises as `check_folder`."""
    check_folder(path)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def run_all(
    commands: Mapping[str, Sequence[str | Path]],
    logs: Mapping[str, Path],
    watch: Callable[[str, Path], None] = lambda name, log: None,
) -> None:
    """Run commands side by side, each with its output in its log; if one fails, stop the others.

    ``watch`` is called with name and log of each while they run, and once more at the end.

    Raises:
        StepFailed: for the first that failed, with its last line and its log file.
    """
    with contextlib.ExitStack() as at_end:
        running: dict[str, subprocess.Popen] = {}
        for name, command in commands.items():
            logs[name].parent.mkdir(parents=True, exist_ok=True)
            output = at_end.enter_context(logs[name].open("w", encoding="utf-8"))
            running[name] = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            at_end.callback(running[name].wait)
            at_end.callback(running[name].kill)
        while True:
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in running:
                watch(name, logs[name])
            for name in ended:
                if code := running[name].returncode:
                    last = logs[name].read_text(encoding="utf-8").strip().split("\n")[-1]
                    raise StepFailed(f"{name} failed ({code}), see {logs[name]}: {last}")
            if len(ended) == len(running):
                return
            time.sleep(0.5)
