"""`pskd doctor`: every rule on an environment made for it, the probes, and the command itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pskd
from pskd_tools import cli, doctor
from pskd_tools.doctor import Attempt, Environment, Probe, diagnose
from pskd_tools.doctor.environment import UNSAFE_LOAD, run_probes
from pskd_tools.doctor.parts import INSTALL_FAIRSEQ, PACKAGES, STEPS

GOOD_VERSIONS = dict.fromkeys(PACKAGES, "99.0") | {
    "torch": "2.14.1",
    "numpy": "2.4.6",
    "omegaconf": "2.3.0",
    "setuptools": "81.0.0",
    "fairseq": None,
}
# Frameworks whose packages are not called like them.
PACKAGES_OF = {"fairseq": ("fairseq-fixed", "fairseq"), "sklearn": ("scikit-learn",)}


def made(versions=None, attempts=None, failures=None, asked=(), **fields) -> Environment:
    """Return the good environment with some versions (None: not installed) and attempts changed."""
    merged = GOOD_VERSIONS | (versions or {})
    probes = {}
    for part in [p for p in doctor.PARTS if not asked or p in asked or p == "core"]:
        tried = {name: Attempt(True, f"{name} said this") for name in STEPS[part]}
        for name, became in (attempts or {}).items():
            if name in tried:  # an error, or what became of it
                tried[name] = became if isinstance(became, Attempt) else Attempt(False, became)
        probes[part] = Probe(tried, (failures or {}).get(part, ""))
    versions = {name: version for name, version in merged.items() if version is not None}
    env = Environment((3, 11, 7), versions, unsafe_load="", probes=probes, asked=frozenset(asked))
    return dataclasses.replace(env, **fields)


def no_module(name: str) -> str:
    return f"ModuleNotFoundError: No module named '{name}'"


def without(*modules: str, versions=None, **more) -> Environment:
    """Return the good environment without some frameworks or adapters."""
    packages = [p for module in modules for p in PACKAGES_OF.get(module, (module,))]
    attempts = {module: no_module(module) for module in modules}
    for module in modules:  # what depends on a framework cannot load either
        for steps in STEPS.values():
            for name, step in steps.items():
                if module in (step.framework, step.needs) and name not in modules:
                    attempts[name] = no_module(module)
    return made(dict.fromkeys(packages) | (versions or {}), attempts, **more)


def found(env: Environment, text: str) -> list[doctor.Finding]:
    return [finding for finding in diagnose(env).findings if text in finding.message]


# -- Rules -----------------------------------------------------------------------------------------

# name -> (environment, severity, part, words of the message, words of the mend)
RULE_CASES = {
    "old torch": (
        made({"torch": "2.3.1"}), "error", "core", "torch 2.3.1 is older than 2.4", "'torch>=2.4'"
    ),
    "unreadable version": (
        made({"numpy": "None"}), "warning", "core", "version 'None'", "numpy"
    ),
    "unsafe load": (
        made(unsafe_load="True"), "warning", "core", "whatever code",
        "unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    ),
    "python too old": (
        made(python=(3, 10, 12), attempts={"fairseq": "SyntaxError: x"}), "error", "translation",
        "Python 3.10.12", "python3.12 -m venv",
    ),
    "python too new, yet working": (
        made(python=(3, 13, 0)), "warning", "translation", "Python 3.13.0", "python3.12 -m venv"
    ),
    "python too new for what was asked": (
        without("fairseq", python=(3, 13, 0), asked=["translation"]), "error", "translation",
        "Python 3.13.0", "python3.12 -m venv",
    ),
    "old fairseq": (
        made({"fairseq": "0.12.2", "fairseq-fixed": None}), "error", "translation",
        "fairseq 0.12.2 does not run on Python 3.11",
        "pip install --no-build-isolation fairseq-fixed==0.12.3.1",
    ),
    "newer fairseq that does not run": (
        made({"fairseq": "1.0.0a0+abc", "fairseq-fixed": None}, {"fairseq": "ValueError: mutable"}),
        "error", "translation", "ValueError: mutable", "fairseq-fixed==0.12.3.1",
    ),
    "two fairseqs": (
        made({"fairseq": "0.12.2"}), "error", "translation", "share their files",
        "pip uninstall -y fairseq fairseq-fixed && pip install",
    ),
    "no compiled batching": (
        made(attempts={"fairseq.data.data_utils_fast": "ImportError: x"}), "error", "translation",
        "compiled batching", "fairseq-fixed==0.12.3.1",
    ),
    "no compiled BLEU": (
        made(attempts={"fairseq.libbleu": "ImportError: x"}), "error", "translation",
        "compiled BLEU", "fairseq-fixed==0.12.3.1",
    ),
    "old hydra, fairseq": (
        made({"hydra-core": "1.0.7"}), "error", "translation",
        "hydra-core 1.0.7 is older than 1.1, which fairseq-fixed", "'hydra-core==1.3.2'",
    ),
    "old omegaconf, Detectron2": (
        made({"omegaconf": "2.0.6"}), "error", "detection",
        "omegaconf 2.0.6 is older than 2.1, which detectron2", "'omegaconf==2.3.0'",
    ),
    "new omegaconf": (
        made({"omegaconf": "2.4.0.dev3"}), "warning", "detection", "omegaconf 2.4.0.dev3 is newer",
        "'omegaconf==2.3.0'",
    ),
    "new setuptools": (
        made({"setuptools": "84.2.1"}), "warning", "detection", "no pkg_resources",
        "pip install 'setuptools<82'",
    ),
    "no setuptools": (
        made({"setuptools": None}), "warning", "detection", "(not installed) brings no pkg",
        "pip install 'setuptools<82'",
    ),
    "torchvision of another build": (
        made(
            {"torch": "2.14.1+cpu"},
            {"torchvision": "RuntimeError: operator torchvision::nms does not exist"},
        ),
        "error", "detection", "2.14.1+cpu", "&& pip install torch torchvision",
    ),
    "pycocotools for numpy 1": (
        made({"pycocotools": "2.0.7"}, {"pycocotools": "ValueError: numpy.dtype size changed"}),
        "error", "detection", "pycocotools 2.0.7 does not work beside numpy 2.4.6",
        "'pycocotools>=2.0.8'",
    ),
    "Detectron2 without operators": (
        made(attempts={"detectron2._C": "ImportError: undefined symbol"}), "error", "detection",
        "undefined symbol", "--no-build-isolation",
    ),
    "no Detectron2": (
        without("detectron2"), "warning", "detection",
        "Detectron2 is absent; the torchvision adapter works",
        "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'",
    ),
    "crashed": (
        made(failures={"plots": "was ended by SIGSEGV"}), "error", "plots",
        "was ended by SIGSEGV", "pskd doctor plots",
    ),
    "loss not compiled": (
        made(attempts={"pskd": Attempt(True, "not compiled")}), "note", "core",
        "was not compiled", "pip install --no-deps --force-reinstall .",
    ),
    "numpy 2 under an old torch": (
        made(attempts={"numpy": "RuntimeError: Numpy is not available"}), "error", "core",
        "Numpy is not available", "pip install --upgrade torch numpy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULE_CASES)
def test_rule_fires_on_its_environment_only(name):
    env, severity, part, words, mend = RULE_CASES[name]
    hits = [f for f in found(env, words) if f.part == part]
    assert [finding.severity for finding in hits] == [severity]
    assert mend in hits[0].mend
    report = diagnose(env)
    assert report.ok == (severity != "error")
    assert not any(f"{UNSAFE_LOAD}=" in finding.mend for finding in report.findings)
    order = [doctor.SEVERITIES.index(f.severity) for f in report.findings]
    assert order == sorted(order)


def test_good_environment_has_nothing_but_the_checkpoint_note():
    report = diagnose(made())
    (note,) = report.findings
    assert note.severity == "note" and "fairseq's checkpoints" in note.message
    assert "--user-dir pskd_fairseq said this" in note.mend
    assert report.ok and report.parts == dict.fromkeys(doctor.PARTS, "works")


NO_FINDINGS = {
    "note, old torch": (made({"torch": "2.5.1"}), "fairseq's checkpoints"),
    "note, no fairseq": (without("fairseq"), "fairseq's checkpoints"),
    **{f"unsafe load {v}": (made(unsafe_load=v), UNSAFE_LOAD) for v in ("0", "no", "false")},
    "python without fairseq": (without("fairseq", python=(3, 13, 0)), "Python 3.13"),
    "newer fairseq": (made({"fairseq": "0.12.3", "fairseq-fixed": None}), "0.12.3"),
    "old pycocotools": (made({"pycocotools": "2.0.7"}), "pycocotools"),
    "no pycocotools": (without("pycocotools"), "pycocotools does not work"),
    "old omegaconf without its users": (
        without("fairseq", "detectron2", versions={"omegaconf": "2.0.6"}),
        "omegaconf",
    ),
}


@pytest.mark.parametrize("name", NO_FINDINGS)
def test_what_does_no_harm_is_no_finding(name):
    env, words = NO_FINDINGS[name]
    assert not found(env, words) and diagnose(env).ok


def test_the_build_tools_it_names_build_pskd_itself():
    """README.md follows them with an installation of pskd without build isolation."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("needs a checkout of pskd")
    asked = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]
    # An older one refuses the licence as an SPDX expression.
    assert asked == ["setuptools>=77"]
    for text in (INSTALL_FAIRSEQ, (root / "README.md").read_text()):
        assert "pip install torch numpy cython 'setuptools>=77,<82' wheel" in text


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part, steps in STEPS.items() for name in steps]
)
def test_every_failing_step_breaks_its_part_and_shows_its_error(part, name):
    report = diagnose(made(attempts={name: "OSError: what went wrong {here}"}))
    assert report.parts[part] == "broken" and not report.ok
    assert any("what went wrong {here}" in f.message and f.part == part for f in report.findings)


def test_consequence_of_another_failure_is_not_reported_twice():
    every = {name: "ImportError: the cause" for name in STEPS["detection"]}
    hits = found(made(attempts=every), "the cause")
    expected = {STEPS["detection"][name].mend for name in ("torchvision", "pycocotools")}
    assert {hit.mend for hit in hits} == expected


# part -> frameworks, adapters and packages without which it is absent, and of these one alone
# without which it works.
ABSENT = [
    ("translation", ["fairseq"], False),
    ("translation", ["pskd_fairseq"], False),
    ("detection", ["detectron2", "torchvision"], True),
    ("detection", ["detectron2", "pskd_torchvision"], True),
    ("detection", ["pskd_detectron2", "pskd_torchvision"], True),
    ("detection", ["pskd_detectron2", "torchvision"], True),
    ("classification", ["torchvision", "detectron2"], False),
    ("classification", ["sklearn"], False),
    ("classification", ["pskd_classification"], False),
    ("integrations", ["lightning", "timm", "transformers", "trl"], True),
    ("integrations", ["pskd_lightning", "timm", "transformers", "trl"], True),
    ("plots", ["matplotlib"], False),
    ("plots", ["pskd_tools.plots"], False),
]


@pytest.mark.parametrize(("part", "modules", "one_is_enough"), ABSENT)
def test_absent_part_is_an_error_only_if_asked_for(part, modules, one_is_enough):
    unasked, asked = diagnose(without(*modules)), diagnose(without(*modules, asked=[part]))
    assert unasked.parts[part] == asked.parts[part] == "absent"
    assert unasked.ok and not asked.ok
    assert all(finding.mend for finding in asked.findings)
    other = "plots" if part != "plots" else "translation"
    assert diagnose(without(*modules, asked=[other])).ok
    if one_is_enough:
        report = diagnose(without(modules[0], asked=[part]))
        assert report.parts[part] == "works" and report.ok


def test_what_is_wrong_with_an_absent_part_is_a_warning_unless_it_was_asked_for():
    for asked, severity in ([], "warning"), (["detection"], "error"):
        env = without("detectron2", "pskd_torchvision", asked=asked)
        env.probes["detection"].attempts["pycocotools"] = Attempt(False, "ValueError: x")
        assert [f.severity for f in found(env, "ValueError: x")] == [severity]
        assert diagnose(env).ok == (severity == "warning")


def test_what_other_parts_brought_makes_no_classification():
    """Detection brings torchvision, translation scikit-learn."""
    detection = diagnose(without("sklearn", "yaml", "tqdm"))
    translation = diagnose(without("torchvision", "detectron2", "yaml"))
    for report, package in (detection, "scikit-learn"), (translation, "torchvision"):
        told = [f for f in report.findings if f.part == "classification"]
        assert report.parts["classification"] == "absent" and report.ok
        assert [f.message for f in told if f.severity == "note"] == [f"{package} is not installed."]


@pytest.mark.parametrize(
    ("step", "module", "mend"),
    [
        ("detectron2", "torchvision", "pip install torchvision"),
        ("fairseq", "sklearn.utils", "pip install scikit-learn"),
        ("fairseq", "hydra", "pip install 'hydra-core==1.3.2' 'omegaconf==2.3.0'"),
        ("fairseq", "a_stranger", STEPS["translation"]["fairseq"].mend),
        ("pskd_transformers", "accelerate", "pip install accelerate"),
        ("matplotlib", "matplotlib", STEPS["plots"]["matplotlib"].mend),
        ("yaml", "yaml", "pip install PyYAML"),
    ],
)
def test_missing_dependency_is_what_gets_installed(step, module, mend):
    (finding,) = found(made(attempts={step: no_module(module)}), f"'{module}'")
    assert (finding.severity, finding.mend) == ("error", mend)


def test_detectron2_without_torchvision_is_broken():
    report = diagnose(without("torchvision", asked=["detection"]))
    assert report.parts["detection"] == "broken"
    assert {f.mend for f in report.findings if f.severity == "error"} == {"pip install torchvision"}


def test_asked_parts_work_exactly_if_there_is_no_error():
    names = ["detectron2", "torchvision", "pskd_detectron2", "pskd_torchvision"]
    for states in itertools.product(["ok", "missing", "failed"], repeat=len(names)):
        chosen = dict(zip(names, states, strict=True))
        attempts = {n: no_module(n) for n, state in chosen.items() if state == "missing"}
        gone = [name for name in names[:2] if name in attempts]
        attempts |= {n: "OSError: x" for n, state in chosen.items() if state == "failed"}
        report = diagnose(made(dict.fromkeys(gone), attempts, asked=["detection"]))
        works = any(
            chosen[framework] == chosen[f"pskd_{framework}"] == "ok" for framework in names[:2]
        )
        assert report.ok == (report.parts["detection"] == "works"), chosen
        assert works or not report.ok, chosen


# -- Parts that timed out --------------------------------------------------------------------------


def timed_out(env: Environment, part: str, tried: int = 0) -> Environment:
    """Return an environment in which a part was stopped after one second and some attempts."""
    attempts = dict(itertools.islice(env.probes[part].attempts.items(), tried))
    probe = Probe(attempts, "did not end within 1 seconds (while trying it)", 1.0)
    return dataclasses.replace(env, probes={**env.probes, part: probe})


def test_of_a_part_that_timed_out_nothing_is_known():
    report = diagnose(env := timed_out(made(python=(3, 13, 0)), "translation"))
    assert report.parts == dict.fromkeys(doctor.PARTS, "works") | {"translation": "timed out"}
    assert not report.ok and not any(f.severity == "error" for f in report.findings)
    (finding,) = found(env, "not known")
    assert finding.part == "translation" and "did not end within 1 seconds" in finding.message
    assert finding.mend == "pskd doctor translation --timeout 5"


def test_what_was_found_before_a_part_timed_out_counts():
    env = made(attempts={"fairseq": "OSError: x"}, asked=["translation"])
    assert diagnose(timed_out(env, "translation", tried=1)).parts["translation"] == "broken"
    report = diagnose(timed_out(without("fairseq"), "translation", tried=1))
    assert report.parts["translation"] == "absent" and report.ok
    env = timed_out(without("detectron2"), "detection", tried=3)
    assert found(env, "Detectron2 is absent; the torchvision adapter was not tried.")


# -- Probes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2", (2,)),
        ("2.14.1+cpu", (2, 14, 1)),
        ("2.4.0.dev3", (2, 4, 0)),
        ("1.0.0a0+abc", (1, 0, 0)),
        *((unreadable, ()) for unreadable in ("", "None", "1!2.0", "10!2")),
    ],
)
def test_release(version, numbers):
    assert doctor.release(version) == numbers


def test_probes_report_values_noise_errors_and_crashes():
    steps = {
        "fine": {"a": "print('noise'); value = 6 * 7", "b": "import sys; sys.exit('enough')"},
        "wrong": {"a": "import no_such_module_of_pskd", "b": "1 / 0", "c": "pass"},
        "long": {"a": "raise ValueError('first ' + 'x' * 5000 + '\\n last')"},
        "crash": {"a": "pass", "b": "import os; print('last words', flush=True); os.abort()"},
        "status": {"a": "import os; os._exit(3)"},
    }
    probes = run_probes(steps, timeout=60.0)
    assert probes["fine"] == Probe(
        {"a": Attempt(True, "42"), "b": Attempt(False, "SystemExit: enough")}
    )
    assert probes["wrong"].attempts == {
        "a": Attempt(False, no_module("no_such_module_of_pskd")),
        "b": Attempt(False, "ZeroDivisionError: division by zero"),
        "c": Attempt(True),
    }
    detail = probes["long"].attempts["a"].detail
    assert detail.startswith("ValueError: first") and detail.endswith("last") and len(detail) < 500
    assert probes["crash"].attempts == {"a": Attempt(True)}
    assert probes["crash"].failure == "was ended by SIGABRT (while trying b): last words"
    assert probes["status"] == Probe({}, "ended with status 3 (while trying a)")


def test_probe_that_takes_too_long_is_a_failure():
    probe = run_probes({"p": {"a": "import time; time.sleep(60)"}}, timeout=0.5)["p"]
    assert probe.failure.startswith("did not end within 0.5 seconds")
    assert probe.limit == 0.5 and not probe.attempts


def test_probes_find_modules_as_an_installed_command_does(tmp_path, monkeypatch):
    """Not in the current folder, which may be a checkout, but wherever PYTHONPATH says."""
    for folder in ("current", "named"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"module_{folder}.py").touch()
    (tmp_path / "current" / "json.py").write_text("raise ImportError('of the current folder')")
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "named"), prepend=os.pathsep)
    imports = {name: f"import {name}" for name in ("module_current", "module_named", "json")}
    assert run_probes({"p": imports}, timeout=60)["p"].attempts == {
        "module_current": Attempt(False, no_module("module_current")),
        "module_named": Attempt(True),
        "json": Attempt(True),
    }
    (tmp_path / "current" / "json.py").unlink()
    monkeypatch.setenv("PYTHONPATH", ".", prepend=os.pathsep)
    tried = run_probes({"p": imports}, timeout=60)["p"].attempts
    assert all(attempt.ok for attempt in tried.values()), tried


# -- The command -----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command on a made environment: ``run(env, *arguments) -> (status, output)``."""

    def on(env: Environment, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(doctor, "gather", lambda parts, timeout: env)
        status = cli.main(["doctor", *arguments])
        return status, capsys.readouterr().out

    return on


def test_status_and_text(run):
    status, text = run(made({"setuptools": "84"}))
    assert status == 0
    assert "0 error(s), 1 warning(s), 1 note(s)" in text
    assert "mend: pip install 'setuptools<82'" in text
    status, text = run(without("fairseq", asked=["translation"]), "translation")
    assert status == 1
    assert "error (translation): fairseq-fixed is not installed." in text
    assert "fairseq-fixed  not installed  translation\n" in text
    _, text = run(made(attempts={"fairseq": "OSError: Datei \u00fcberschrieben \U0001f4a5"}))
    assert text.isascii() and "\\xfcberschrieben" in text


def test_json(run):
    status, text = run(made(attempts={"pskd": "OSError: \u00fc"}), "--json")
    told = json.loads(text)
    assert status == 1 and told["ok"] is False
    assert told["packages"]["fairseq"]["version"] is None
    assert told["parts"]["core"] == "broken"
    assert {"severity", "part", "message", "mend"} == set(told["findings"][0])
    assert told["probes"]["core"]["attempts"]["pskd"] == {"ok": False, "detail": "OSError: \u00fc"}


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr() == (f"pskd {pskd.__version__}\n", "")


def test_real_run_that_times_out_calls_nothing_broken(capsys):
    assert cli.main(["doctor", "core", "--timeout", "0.01"]) == 1
    told = capsys.readouterr().out
    assert "core  timed out\n" in told and "broken" not in told
    assert "0 error(s), 1 warning(s)" in told and "--timeout 0.05" in told


def command(code: list[str], **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, timeout=120, env=os.environ | env
    )


def test_real_run_tries_the_core_and_imports_no_framework():
    code = (
        "import sys; from pskd_tools import cli; status = cli.main(['doctor', 'core', '--json']);"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr);"
        "sys.exit(status)"
    )
    done = command(["-c", code])
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["parts"] == {"core": "works"}
    assert told["torch_build"].startswith("built ")
    assert told["packages"]["torch"]["version"]
    modules = set(done.stderr.strip().splitlines()[-1].split())
    assert "pskd_tools" in modules
    assert not modules & {"torch", "fairseq", "fairseq_cli", "detectron2", "torchvision"}


def test_real_run_tries_the_parts_that_are_installed():
    needed = {
        "classification": ["torchvision", "sklearn", "yaml", "tqdm", "tensorboard"],
        "integrations": ["lightning", "timm", "transformers", "accelerate", "trl"],
    }
    found = [part for part, names in needed.items() if all(map(importlib.util.find_spec, names))]
    if not found:
        pytest.skip("needs classification's or the integrations' packages: pip install '.[test]'")
    report = diagnose(doctor.gather(found, timeout=240.0))
    assert report.parts == dict.fromkeys(["core", *found], "works"), report.findings


def test_torch_that_does_not_load_is_told_and_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so is gone')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = command(["-m", "pskd_tools.cli", "doctor", "core"], PYTHONPATH=path)
    assert done.returncode == 1
    assert "error (core): torch does not load: ImportError: libcudart.so is gone\n" in done.stdout
    assert done.stdout.count("libcudart.so is gone") == 1  # its consequences are not told
    assert "Traceback" not in done.stdout + done.stderr
