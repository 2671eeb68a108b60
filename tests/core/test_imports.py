"""One direction: demo, train scripts, configs, tests -> adapters -> pskd -> torch.

The imports run in a fresh interpreter and are looked at through ``sys.modules`` and through the
import statements that ran. Imports inside functions (matplotlib in `pskd.plots`) are not run here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from typing import NamedTuple

import pytest

import pskd

FRAMEWORKS = {"detectron2", "fairseq", "hydra", "matplotlib", "omegaconf", "torchvision"}
FRAMEWORKS |= {"lightning", "transformers"}
ADAPTERS = {
    "pskd_classification",
    "pskd_detection",
    "pskd_detectron2",
    "pskd_fairseq",
    "pskd_lightning",
    "pskd_torchvision",
    "pskd_transformers",
}
#: The adapters beside fairseq's, what they share, and the frameworks that each stands on.
OTHERS = {
    "pskd_classification": {"torchvision"},
    "pskd_detection": set(),
    "pskd_torchvision": {"torchvision"},
    # Its configuration is Detectron2's: omegaconf in a LazyConfig, whose overrides hydra reads.
    "pskd_detectron2": {"detectron2", "hydra", "omegaconf"},
}
#: The adapters that are one module, and the framework of each.
MODULES = {"pskd_lightning": "lightning", "pskd_transformers": "transformers"}
# The folders of the repository, importable as namespace packages from its root.
FOLDERS = {"benchmarks", "classification", "configs", "demo", "detection", "tests", "translation"}
FOLDERS |= {"integrations"}

# Imports one list of modules after the other, and after each prints what is loaded by then and who
# asked for what by then: {top-level importer: [top-level imported, ...]}.
WATCHED = """
import builtins, importlib, json, sys

asked, real = {}, builtins.__import__

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if not level:
        asked.setdefault(importer, []).append(name.partition(".")[0])
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = watched
for modules in json.loads(sys.argv[1]):
    for name in modules:
        importlib.import_module(name)
    loaded = [name.partition(".")[0] for name in list(sys.modules)]
    print("SEEN", json.dumps({"asked": asked, "loaded": loaded}), flush=True)
"""


class Seen(NamedTuple):
    """Which top-level modules a package's own import statements ask for, and what is loaded."""

    asked: dict[str, set[str]]
    loaded: set[str]


def watch(*stages: list[str]) -> tuple[list[Seen], str]:
    """Import in a fresh interpreter; return what each stage led to, and the error that ended it."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(stages)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    found = map(json.loads, lines)
    seen = [
        Seen({who: set(names) for who, names in one["asked"].items()}, set(one["loaded"]))
        for one in found
    ]
    return seen, done.stderr


#: A program, a C library that is loaded and not imported, and what only a GPU asks for.
NOT_IMPORTED = ("__main__", "_native_rows", "triton_rows")


def modules_of(package) -> list[str]:
    """Return the package and all its modules that are imported wherever it runs."""
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [package.__name__, *(m.name for m in found if not m.name.endswith(NOT_IMPORTED))]


@pytest.fixture(scope="module")
def stages() -> tuple[list[Seen], str]:
    """The core in a fresh interpreter and then, in the same one to save seconds, pskd_fairseq."""
    return watch(modules_of(pskd), ["pskd_fairseq"])


@pytest.fixture
def core(stages) -> Seen:
    seen, error = stages
    assert seen, error
    return seen[0]


def test_every_file_of_the_core_is_among_what_is_imported():
    found = set(modules_of(pskd))
    assert found >= {f"pskd.{name}" for name in ("loss", "schedule", "targets", "teacher")}
    assert found >= {f"pskd.{name}" for name in ("calibration", "cli", "doctor", "plots")}


def test_the_core_loads_no_framework_and_nothing_above_it(core):
    assert {"pskd", "torch", "numpy"} <= core.loaded
    assert not core.loaded & (FRAMEWORKS | ADAPTERS | FOLDERS)


def test_the_core_asks_for_nothing_but_torch_numpy_and_the_standard_library(core):
    assert core.asked["pskd"] - sys.stdlib_module_names == {"pskd", "torch", "numpy"}


@pytest.mark.skipif(
    importlib.util.find_spec("fairseq") is None,
    reason="fairseq is not installed (pip install --no-build-isolation fairseq-fixed)",
)
def test_the_fairseq_adapter_reaches_neither_sideways_nor_up(stages):
    seen, error = stages
    assert len(seen) == 2, f"pskd_fairseq must be installed or on the PYTHONPATH: {error}"
    asked, loaded = seen[1]
    assert {"pskd_fairseq", "fairseq", "pskd"} <= loaded
    assert not loaded & (ADAPTERS - {"pskd_fairseq"} | FOLDERS | {"detectron2"})
    # What fairseq itself loads is its own affair (some releases load torchvision). It is configured
    # by hydra and omegaconf, so its plugin may ask for these.
    assert not asked["pskd_fairseq"] & {"detectron2", "matplotlib", "torchvision"}
    assert not asked["pskd"] & (FRAMEWORKS | ADAPTERS)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_packages_reach_neither_sideways_nor_up(name):
    frameworks = OTHERS[name]
    for framework in frameworks:
        if importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed: https://detectron2.readthedocs.io")
    package = importlib.util.find_spec(name)
    assert package is not None, f"{name} must be installed or on the PYTHONPATH"
    found = pkgutil.walk_packages(package.submodule_search_locations, name + ".")
    seen, error = watch([name, *(m.name for m in found)])
    assert len(seen) == 1, error
    asked, loaded = seen[0]
    assert name in loaded and "pskd" in loaded
    shared = set() if name == "pskd_classification" else {"pskd_detection"}
    assert not loaded & (ADAPTERS - {name} - shared | FOLDERS | {"fairseq"})
    assert not asked[name] & (FRAMEWORKS - frameworks)
    if name != "pskd_detectron2":  # which itself loads torchvision and more
        assert "detectron2" not in loaded
    assert not asked["pskd"] & (FRAMEWORKS | ADAPTERS)
    assert not asked.get("pskd_detection", set()) & (FRAMEWORKS | ADAPTERS - {"pskd_detection"})


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_ask_for_the_core_and_their_framework_only(name):
    framework = MODULES[name]
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed: pip install '.[{framework}]'")
    seen, error = watch([name])
    assert len(seen) == 1, f"{name} must be installed or on the PYTHONPATH: {error}"
    asked, loaded = seen[0]
    assert asked[name] - sys.stdlib_module_names == {"pskd", "torch", framework}
    assert not loaded & (ADAPTERS - {name} | FOLDERS | {"detectron2", "fairseq"})
    assert not asked["pskd"] & (FRAMEWORKS | ADAPTERS)
