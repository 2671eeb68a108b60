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
from pskd_tools.doctor import Attempt, Environment, Probe, Report, diagnose
from pskd_tools.doctor.environment import UNSAFE_LOAD, run_probes
from pskd_tools.doctor.parts import INSTALL_FAIRSEQ, STEPS

GOOD_VERSIONS = {
    "pskd": "0.1.0",
    "torch": "2.14.1",
    "numpy": "2.4.6",
    "fairseq-fixed": "0.12.3.1",
    "torchaudio": "2.11.0",
    "sacrebleu": "2.6.0",
    "sacremoses": "0.2.0",
    "subword-nmt": "0.3.8",
    "hydra-core": "1.3.2",
    "omegaconf": "2.3.0",
    "torchvision": "0.29.1",
    "detectron2": "0.6",
    "pycocotools": "2.0.11",
    "setuptools": "81.0.0",
    "scikit-learn": "1.7.2",
    "pyyaml": "6.0.3",
    "tqdm": "4.67.1",
    "tensorboard": "2.20.0",
    "lightning": "2.6.0",
    "transformers": "4.57.1",
    "accelerate": "1.12.0",
    "matplotlib": "3.11.2",
}
FRAMEWORK_PACKAGES = {
    "fairseq": ("fairseq-fixed", "fairseq"),
    "detectron2": ("detectron2",),
    "torchvision": ("torchvision",),
    "sklearn": ("scikit-learn",),
    "lightning": ("lightning",),
    "transformers": ("transformers",),
    "matplotlib": ("matplotlib",),
}


def made(versions=None, attempts=None, failures=None, asked=(), **fields) -> Environment:
    """Return the good environment with some versions (None: not installed) and attempts changed."""
    merged = {**GOOD_VERSIONS, **(versions or {})}
    probes = {}
    for part in [p for p in doctor.PARTS if not asked or p in asked or p == "core"]:
        tried = {name: Attempt(True, f"{name} said this") for name in STEPS[part]}
        for name, became in (attempts or {}).items():
            if name in tried:  # an error, or what became of it
                tried[name] = became if isinstance(became, Attempt) else Attempt(False, became)
        probes[part] = Probe(tried, (failures or {}).get(part, ""))
    env = Environment(
        python=(3, 11, 7),
        versions={name: version for name, version in merged.items() if version is not None},
        variables={},
        probes=probes,
        asked=frozenset(asked),
    )
    return dataclasses.replace(env, **fields)


def no_module(name: str) -> str:
    return f"ModuleNotFoundError: No module named '{name}'"


def without(*modules: str, **more) -> Environment:
    """Return the good environment without some frameworks or adapters."""
    packages = [p for module in modules for p in FRAMEWORK_PACKAGES.get(module, (module,))]
    attempts = {module: no_module(module) for module in modules}
    for module in modules:  # what depends on a framework cannot load either
        for steps in STEPS.values():
            for name, step in steps.items():
                if module in (step.framework, step.needs) and name not in modules:
                    attempts[name] = no_module(module)
    return made(dict.fromkeys(packages), attempts, **more)


def found(env: Environment, text: str) -> list[doctor.Finding]:
    return [finding for finding in diagnose(env).findings if text in finding.message]


# -- Rules -----------------------------------------------------------------------------------------


def test_good_environment_has_nothing_but_the_checkpoint_note():
    report = diagnose(made())
    assert [finding.severity for finding in report.findings] == ["note"]
    assert report.ok
    assert report.parts == dict.fromkeys(doctor.PARTS, "works")


# name -> (environment, severity, part, words of the message, words of the mend)
RULE_CASES = {
    "old torch": (
        made({"torch": "2.3.1"}), "error", "core", "torch 2.3.1 is older than 2.4", "'torch>=2.4'"
    ),
    "unreadable version": (
        made({"numpy": "None"}), "warning", "core", "version 'None'", "numpy"
    ),
    "unsafe load": (
        made(variables={UNSAFE_LOAD: "True"}), "warning", "core", "whatever code",
        "unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    ),
    "python too old": (
        made(python=(3, 10, 12), attempts={"fairseq": "SyntaxError: x"}), "error", "translation",
        "Python 3.10.12", "python3.12 -m venv",
    ),
    "python too new, yet working": (
        made(python=(3, 13, 0)), "warning", "translation", "Python 3.13.0", "python3.12 -m venv"
    ),
    "old fairseq": (
        made({"fairseq": "0.12.2", "fairseq-fixed": None}), "error", "translation",
        "fairseq 0.12.2 does not run on Python 3.11",
        "pip install --no-build-isolation fairseq-fixed==0.12.3.1",
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
    assert not found(made(), words)
    report = diagnose(env)
    assert report.ok == (severity != "error")
    assert not any(f"{UNSAFE_LOAD}=" in finding.mend for finding in report.findings)


@pytest.mark.parametrize("value", ["", "0", "no", "false"])
def test_variable_that_torch_reads_as_unset_is_no_finding(value):
    env = made(variables={UNSAFE_LOAD: value})
    assert not found(env, UNSAFE_LOAD)


def test_checkpoint_note_names_the_plugin_and_never_the_unsafe_variable():
    (note,) = found(made(), "fairseq's checkpoints")
    assert note.severity == "note"
    assert "--user-dir pskd_fairseq said this" in note.mend
    assert not found(made({"torch": "2.5.1"}), "fairseq's checkpoints")
    assert not found(without("fairseq"), "fairseq's checkpoints")


@pytest.mark.parametrize("version", ["0.12.3", "1.0.0a0+abc"])
def test_newer_fairseq_is_judged_by_what_it_does(version):
    versions = {"fairseq": version, "fairseq-fixed": None}
    assert diagnose(made(versions)).ok
    broken = made(versions, {"fairseq": "ValueError: mutable default"})
    assert found(broken, "mutable default")


def test_python_outside_the_range_matters_only_where_translation_is_wanted():
    assert not found(without("fairseq", python=(3, 13, 0)), "Python 3.13")
    (finding,) = found(without("fairseq", python=(3, 13, 0), asked=["translation"]), "Python 3.13")
    assert finding.severity == "error"


def test_old_pycocotools_that_works_is_no_finding():
    assert not found(made({"pycocotools": "2.0.7"}), "pycocotools")
    assert diagnose(without("pycocotools")).ok


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


def test_omegaconf_does_not_matter_without_its_users():
    env = without("fairseq", "detectron2")
    env = dataclasses.replace(env, versions={**env.versions, "omegaconf": "2.0.6"})
    assert not found(env, "omegaconf")


STEP_NAMES = [(part, name) for part, steps in STEPS.items() for name in steps]


@pytest.mark.parametrize(("part", "name"), STEP_NAMES)
def test_every_failing_step_breaks_its_part_and_shows_its_error(part, name):
    report = diagnose(made(attempts={name: "OSError: what went wrong {here}"}))
    assert report.parts[part] == "broken"
    assert not report.ok
    assert any("what went wrong {here}" in f.message and f.part == part for f in report.findings)


def test_consequence_of_another_failure_is_not_reported_twice():
    every = {name: "ImportError: the cause" for name in STEPS["detection"]}
    hits = found(made(attempts=every), "the cause")
    assert {hit.mend for hit in hits} == {
        STEPS["detection"][name].mend for name in ("torchvision", "pycocotools")
    }


def test_findings_come_worst_first():
    env = made({"setuptools": "84", "torch": "2.0"}, failures={"plots": "ended with status 1"})
    order = [doctor.SEVERITIES.index(f.severity) for f in diagnose(env).findings]
    assert order == sorted(order) and len(set(order)) > 1


ABSENT = [
    ("translation", ["fairseq"]),
    ("translation", ["pskd_fairseq"]),
    ("detection", ["detectron2", "torchvision"]),
    ("detection", ["detectron2", "pskd_torchvision"]),
    ("detection", ["pskd_detectron2", "pskd_torchvision"]),
    ("detection", ["pskd_detectron2", "torchvision"]),
    ("classification", ["torchvision", "detectron2"]),
    ("classification", ["sklearn"]),
    ("classification", ["pskd_classification"]),
    ("integrations", ["lightning", "transformers"]),
    ("integrations", ["lightning", "pskd_transformers"]),
    ("plots", ["matplotlib"]),
    ("plots", ["pskd_tools.plots"]),
]


@pytest.mark.parametrize(("part", "modules"), ABSENT)
def test_absent_part_is_an_error_only_if_asked_for(part, modules):
    unasked, asked = diagnose(without(*modules)), diagnose(without(*modules, asked=[part]))
    assert unasked.parts[part] == asked.parts[part] == "absent"
    assert unasked.ok and not asked.ok
    assert all(finding.mend for finding in asked.findings)
    other = "plots" if part != "plots" else "translation"
    assert diagnose(without(*modules, asked=[other])).ok


def test_what_is_wrong_with_an_absent_part_is_a_warning_unless_it_was_asked_for():
    absent = ("detectron2", "pskd_torchvision")
    for asked, severity in ([], "warning"), (["detection"], "error"):
        env = without(*absent, asked=asked)
        tried = env.probes["detection"].attempts | {"pycocotools": Attempt(False, "ValueError: x")}
        env = dataclasses.replace(env, probes={**env.probes, "detection": Probe(tried)})
        assert [f.severity for f in found(env, "ValueError: x")] == [severity]
        assert diagnose(env).ok == (severity == "warning")


@pytest.mark.parametrize(
    ("part", "gone"),
    [
        ("integrations", "lightning"),
        ("integrations", "pskd_lightning"),
        ("integrations", "transformers"),
        ("detection", "detectron2"),
        ("detection", "pskd_detectron2"),
        ("detection", "pskd_torchvision"),
    ],
)
def test_one_framework_of_a_part_is_enough(part, gone):
    report = diagnose(without(gone, asked=[part]))
    assert report.parts[part] == "works" and report.ok


def test_what_other_parts_brought_makes_no_classification():
    """Detection brings torchvision, translation scikit-learn."""
    detection = diagnose(without("sklearn", "yaml", "tqdm"))
    translation = diagnose(without("torchvision", "detectron2", "yaml"))
    for report, package in (detection, "scikit-learn"), (translation, "torchvision"):
        told = [f for f in report.findings if f.part == "classification"]
        assert report.parts["classification"] == "absent" and report.ok
        assert [(f.severity, f.message) for f in told if f.severity == "note"] == [
            ("note", f"{package} is not installed.")
        ]


@pytest.mark.parametrize("module", ["yaml", "tqdm", "tensorboard"])
def test_classification_without_a_package_of_its_own_is_broken(module):
    report = diagnose(without(module, asked=["classification"]))
    assert report.parts["classification"] == "broken" and not report.ok


@pytest.mark.parametrize(
    ("step", "module", "mend"),
    [
        ("detectron2", "torchvision", "pip install torchvision"),
        ("fairseq", "sklearn.utils", "pip install scikit-learn"),
        ("fairseq", "hydra", "pip install 'hydra-core==1.3.2' 'omegaconf==2.3.0'"),
        ("fairseq", "a_stranger", STEPS["translation"]["fairseq"].mend),
        ("pskd_transformers", "accelerate", "pip install accelerate"),
        ("matplotlib", "matplotlib", STEPS["plots"]["matplotlib"].mend),
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
        attempts |= {n: "OSError: x" for n, state in chosen.items() if state == "failed"}
        gone = [n for n in attempts if attempts[n] == no_module(n) and n in FRAMEWORK_PACKAGES]
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


@pytest.mark.parametrize("part", doctor.PARTS)
def test_of_a_part_that_timed_out_nothing_is_known(part):
    report = diagnose(env := timed_out(made(), part))
    assert report.parts == dict.fromkeys(doctor.PARTS, "works") | {part: "timed out"}
    assert not report.ok and not any(f.severity == "error" for f in report.findings)
    (finding,) = found(env, "not known")
    assert finding.part == part and "did not end within 1 seconds" in finding.message
    assert finding.mend == f"pskd doctor {part} --timeout 5"


def test_what_failed_before_a_part_timed_out_is_broken():
    env = made(attempts={"fairseq": "OSError: x"}, asked=["translation"])
    report = diagnose(env := timed_out(env, "translation", tried=1))
    assert report.parts["translation"] == "broken" and found(env, "not known")


def test_an_absent_part_that_timed_out_is_absent():
    report = diagnose(timed_out(without("fairseq"), "translation", tried=1))
    assert report.parts["translation"] == "absent" and report.ok


def test_what_was_not_tried_is_not_told_to_fail():
    env = timed_out(made({"detectron2": None}), "detection", tried=3)
    failed = Attempt(False, no_module("detectron2"))
    env.probes["detection"].attempts["detectron2"] = failed
    assert found(env, "Detectron2 is absent; the torchvision adapter was not tried.")
    late = timed_out(made(python=(3, 13, 0)), "translation")
    assert diagnose(late).parts["translation"] == "timed out"


# -- Versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2", (2,)),
        ("2.14.1+cpu", (2, 14, 1)),
        ("2.4.0.dev3", (2, 4, 0)),
        ("1.0.0a0+abc", (1, 0, 0)),
        ("2.6.0rc1", (2, 6, 0)),
    ],
)
def test_release(version, numbers):
    assert doctor.release(version) == numbers


@pytest.mark.parametrize("version", ["", "None", "unknown", "1!2.0"])
def test_release_refuses_what_it_cannot_compare(version):
    with pytest.raises(ValueError, match="expected one that begins with a release"):
        doctor.release(version)


# -- Probes ----------------------------------------------------------------------------------------


def test_probes_report_values_noise_errors_and_crashes():
    steps = {
        "fine": {"a": "print('noise'); value = 6 * 7", "b": "import sys; sys.exit('enough')"},
        "wrong": {"a": "import no_such_module_of_pskd", "b": "1 / 0", "c": "pass"},
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
    assert probes["crash"].attempts == {"a": Attempt(True)}
    assert probes["crash"].failure == "was ended by SIGABRT (while trying b): last words"
    assert probes["status"].failure == "ended with status 3 (while trying a)"
    assert probes["status"].limit is None


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
    assert run_probes({"p": imports}, timeout=60)["p"] == Probe(
        {
            "module_current": Attempt(False, no_module("module_current")),
            "module_named": Attempt(True),
            "json": Attempt(True),
        }
    )
    (tmp_path / "current" / "json.py").unlink()
    monkeypatch.setenv("PYTHONPATH", ".", prepend=os.pathsep)
    tried = run_probes({"p": imports}, timeout=60)["p"].attempts
    assert all(attempt.ok for attempt in tried.values()), tried


def test_long_errors_keep_both_ends():
    code = "raise ValueError('first ' + 'x' * 5000 + '\\n last')"
    detail = run_probes({"p": {"a": code}}, timeout=60)["p"].attempts["a"].detail
    assert detail.startswith("ValueError: first") and detail.endswith("last") and len(detail) < 500


def test_gather_refuses_unknown_parts():
    with pytest.raises(ValueError, match="expected parts among core, .* got"):
        doctor.gather(["vision"])


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


def test_the_seconds_are_the_users(monkeypatch):
    given = []
    monkeypatch.setattr(doctor, "gather", lambda parts, timeout: given.append(timeout) or made())
    assert cli.main(["doctor", "--timeout", "2.5"]) == 0
    assert given == [2.5]


def test_output_is_ascii(run):
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


def test_real_run_tries_the_core_and_imports_no_framework():
    code = (
        "import sys; from pskd_tools import cli; status = cli.main(['doctor', 'core', '--json']);"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr);"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["parts"] == {"core": "works"}
    assert told["torch_build"].startswith("built ")
    assert told["packages"]["torch"]["version"]
    modules = done.stderr.strip().splitlines()[-1]
    for framework in ("torch", "fairseq", "fairseq_cli", "detectron2", "torchvision", "omegaconf"):
        assert f"'{framework}'" not in modules
    assert "'pskd_tools'" in modules


REAL = {
    "classification": ["torchvision", "sklearn", "yaml", "tqdm", "tensorboard"],
    "integrations": ["lightning", "transformers", "accelerate"],
}


@pytest.fixture(scope="module")
def real() -> Report:
    """What is found of the parts that are installed here, all tried at the same time."""
    found = [part for part, modules in REAL.items() if all(map(importlib.util.find_spec, modules))]
    return diagnose(doctor.gather(found, timeout=240.0))


@pytest.mark.parametrize("part", REAL)
def test_real_run_tries_a_part(part, real):
    for module in REAL[part]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install '.[test]'")
    assert (real.parts["core"], real.parts[part]) == ("works", "works"), real.findings


def test_torch_that_does_not_load_is_told_and_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so is gone')")
    done = subprocess.run(
        [sys.executable, "-m", "pskd_tools.cli", "doctor", "core"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "error (core): torch does not load: ImportError: libcudart.so is gone\n" in done.stdout
    assert done.stdout.count("libcudart.so is gone") == 1  # its consequences are not told
    assert "Traceback" not in done.stdout + done.stderr
