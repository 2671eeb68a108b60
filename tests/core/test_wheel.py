"""A built wheel in an environment of its own, used from a folder that is no checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import made_up_runs
import pytest

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = sysconfig.get_path("purelib")


def run(folder: Path, *command: object) -> str:
    """Run a command in a folder; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Return the environment: this wheel, and all else from the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"  # a build leaves files beside its source
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "runs", "data", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(folder, sys.executable, "-m", "pip", "wheel", *options, "-w", folder, copy)
    (wheel,) = folder.glob("pskd-*.whl")
    run(folder, sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(folder, *pip, "install", "--no-deps", "--no-index", "--quiet", wheel)
    packages = run(folder, python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    # A path that a .pth names is no place whose own .pth files are read: pskd is the wheel's.
    (Path(packages.strip()) / "frameworks.pth").write_text(FRAMEWORKS + "\n")
    return folder / "venv" / "bin"


def test_it_has_the_core_its_types_and_the_compiled_loss(installed, tmp_path):
    code = (
        "import pskd, pathlib; from pskd.kernels import native; "
        "folder = pathlib.Path(pskd.__file__).parent; "
        "print(folder.is_relative_to(%r), (folder / 'py.typed').exists(), native.is_built())"
    )
    where = str(installed.parent)
    assert run(tmp_path, installed / "python", "-c", code % where) == "True True True\n"


def test_doctor_finds_the_core(installed, tmp_path):
    assert "0 error(s)" in run(tmp_path, installed / "pskd", "doctor", "core")


def test_report_makes_a_page(installed, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    made_up_runs.classification(tmp_path / "a")
    run(tmp_path, installed / "pskd", "report", "a", "--out", "page")
    assert (tmp_path / "page" / "report.html").stat().st_size > 10_000


@pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None,
    reason="Detectron2 is not installed: https://detectron2.readthedocs.io",
)
def test_train_net_is_there_without_a_checkout(installed, tmp_path):
    told = run(tmp_path, installed / "pskd-detect", "--help")
    assert "--config-file" in told and "--train SPEC" in told


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="torchvision is not installed: pip install torchvision",
)
@pytest.mark.parametrize(
    ("program", "flag"),
    [
        (["pskd-classify"], "--pskd-teacher"),
        (["pskd-detect-torchvision"], "--pskd-foreground-only"),
        (["python", "-m", "pskd_classification.compare"], "--seconds"),
        (["python", "-m", "pskd_torchvision.convert_backbone"], "OUT"),
    ],
)
def test_train_programs_are_there_without_a_checkout(program, flag, installed, tmp_path):
    name, *words = program
    assert flag in run(tmp_path, installed / name, *words, "--help")


@pytest.mark.skipif(
    importlib.util.find_spec("fairseq") is None,
    reason="fairseq is not installed: pip install --no-build-isolation fairseq-fixed",
)
def test_fairseq_finds_the_plugin_by_its_folder(installed, tmp_path):
    for program, flag in (("pskd-prepare", "--bpe-size"), ("pskd-evaluate", "--data")):
        assert flag in run(tmp_path, installed / program, "--help")
    code = "import importlib.util as u; print(u.find_spec('pskd_fairseq').origin)"
    plugin = Path(run(tmp_path, installed / "python", "-c", code).strip()).parent
    assert plugin.is_relative_to(installed.parent)
    program = [installed / "python", "-m", "fairseq_cli.train", "--user-dir", plugin]
    assert re.search(r"[{,]pskd[,}]", run(tmp_path, *program, "--help"))  # among the criterions
