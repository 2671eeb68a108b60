"""Commands of the demo: run in the background, watched, their output in log files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["ROOT", "Step", "StepFailed", "check_folder", "fresh_folder", "run_all"]

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
    """Refuse a folder whose files are not the demo's own to delete.

    Args:
        path: where a step of the demo will write; absent and empty are fine.

    Raises:
        ValueError: if it holds other files, or is none.
    """
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
    """Delete what an earlier run of the demo left in a folder, and return the folder, empty.

    Raises:
        ValueError: as `check_folder`; nothing was deleted.
    """
    check_folder(path)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


class Step:
    """One command in the background, its output in a log file."""

    def __init__(self, name: str, command: list[str | Path], log: Path) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._output = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def running(self) -> bool:
        return self._process.poll() is None

    def finish(self) -> None:
        """Wait for the end.

        Raises:
            StepFailed: if the command failed, with its last line and its log file.
        """
        code = self._process.wait()
        self._output.close()
        if code:
            lines = self.log.read_text(encoding="utf-8").strip().split("\n")
            raise StepFailed(f"{self.name} failed ({code}), see {self.log}: {lines[-1]}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def run_all(steps: list[Step], watch: Callable[[Step], None] = lambda step: None) -> None:
    """Wait for all steps, calling ``watch`` on each meanwhile; if one fails, stop the others.

    Raises:
        StepFailed: for the first that failed.
    """
    try:
        while True:
            ended = [step for step in steps if not step.running()]
            for step in steps:
                watch(step)
            for step in ended:
                step.finish()
            if len(ended) == len(steps):
                return
            time.sleep(0.5)
    finally:
        for step in steps:
            step.stop()
