"""One direction: demo, train scripts, configs, tests -> adapters -> pskd_tools -> pskd -> torch.

The imports run in a fresh interpreter, which is copied for each adapter, and are looked at through
``sys.modules`` and through the import statements that ran. Imports inside functions (matplotlib in
`pskd_tools.plots`) are not run here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import pytest

import pskd

FRAMEWORKS = {"detectron2", "fairseq", "hydra", "matplotlib", "omegaconf", "torchvision"}
FRAMEWORKS |= {"lightning", "timm", "torchmetrics", "transformers", "trl"}
ADAPTERS = {
    "pskd_classification",
    "pskd_detection",
    "pskd_detectron2",
    "pskd_fairseq",
    "pskd_lightning",
    "pskd_timm",
    "pskd_torchmetrics",
    "pskd_torchvision",
    "pskd_transformers",
    "pskd_trl",
}
#: The tools, and the adapters beside fairseq's, with what they share; and each one's frameworks.
OTHERS = {
    "pskd_tools": set(),
    "pskd_classification": {"torchvision"},
    "pskd_detection": {"torchmetrics"},  # one metric, in whose absence the rest works
    "pskd_torchvision": {"torchvision"},
    # Its configuration is Detectron2's: omegaconf in a LazyConfig, whose overrides hydra reads.
    "pskd_detectron2": {"detectron2", "hydra", "omegaconf"},
}
#: The adapters of one framework, and that of each.
MODULES = {
    "pskd_lightning": "lightning",
    "pskd_timm": "timm",
    "pskd_torchmetrics": "torchmetrics",
    "pskd_transformers": "transformers",
    "pskd_trl": "trl",
}
#: What an adapter may ask for too: trl's trainers are those of transformers.
BESIDE = {"pskd_transformers": {"numpy"}, "pskd_trl": {"pskd_transformers"}}
FRAMEWORKS_OF = (
    {"pskd_fairseq": {"fairseq", "sacremoses"}} | OTHERS | {n: {f} for n, f in MODULES.items()}
)
#: How to get a framework, where pip does not know it by its name.
INSTALL = {
    "detectron2": "https://detectron2.readthedocs.io",
    "fairseq": "pip install --no-build-isolation fairseq-fixed",
}
# The folders of the repository, importable as namespace packages from its root.
FOLDERS = {"benchmarks", "classification", "configs", "demo", "detection", "tests", "translation"}
FOLDERS |= {"integrations"}
TOOLS = {"pskd_tools"}

# Imports the core and, in a copy of the process for each, the modules of a package on top. Each
# prints what is loaded by then and who asked for what: {top-level importer: [top-level imported]}.
WATCHED = """
import builtins, importlib, json, os, sys, traceback

asked, real = {}, builtins.__import__

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if not level:
        asked.setdefault(importer, []).append(name.partition(".")[0])
    return real(name, globals, locals, fromlist, level)

def load(package, modules):
    seen = {"package": package, "error": ""}
    try:
        for name in modules:
            importlib.import_module(name)
    except Exception:
        seen["error"] = traceback.format_exc()
    loaded = [name.partition(".")[0] for name in list(sys.modules)]
    print("SEEN", json.dumps(seen | {"asked": asked, "loaded": loaded}), flush=True)

builtins.__import__ = watched
packages = json.loads(sys.argv[1])
load("pskd", packages.pop("pskd"))
for package, modules in packages.items():
    if not os.fork():
        load(package, modules)
        os._exit(0)
    os.wait()
"""


class Seen(NamedTuple):
    """Which top-level modules a package's own import statements ask for, and what is loaded."""

    asked: dict[str, set[str]]
    loaded: set[str]
    error: str


def watch(packages: dict[str, list[str]]) -> dict[str, Seen]:
    """Import the core in a fresh interpreter, and each of the packages on top of it alone."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(packages)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert len(found) == len(packages), done.stderr
    return {
        one["package"]: Seen(
            {who: set(names) for who, names in one["asked"].items()},
            set(one["loaded"]),
            one["error"],
        )
        for one in found
    }


#: A program, a C library that is loaded and not imported, and what only a GPU asks for.
NOT_IMPORTED = ("__main__", "_native_rows", "triton_kernels", "triton_rows")


def modules_of(name: str) -> list[str]:
    """Return a package and all its modules that are imported wherever it runs."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} must be installed or on the PYTHONPATH"
    found = pkgutil.walk_packages(spec.submodule_search_locations or [], name + ".")
    return [name, *(m.name for m in found if not m.name.endswith(NOT_IMPORTED))]


def missing(name: str) -> str:
    """Return a framework that an adapter stands on and that is not installed, if there is one."""
    return next((f for f in sorted(FRAMEWORKS_OF[name]) if not importlib.util.find_spec(f)), "")


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    packages = ["pskd", *(name for name in FRAMEWORKS_OF if not missing(name))]
    return watch({name: modules_of(name) for name in packages})


@pytest.fixture
def core(seen) -> Seen:
    assert not seen["pskd"].error
    return seen["pskd"]


@pytest.fixture
def of_package(seen) -> Callable[[str], Seen]:
    def of(name: str) -> Seen:
        if framework := missing(name):
            pytest.skip(f"{framework} is not installed: {INSTALL.get(framework, framework)}")
        assert not seen[name].error
        return seen[name]

    return of


def test_the_core_gives_its_names_and_no_others():
    public = {name for name in vars(pskd) if not name.startswith("_")}
    modules = {name for name in public if isinstance(vars(pskd)[name], types.ModuleType)}
    assert public - modules == set(pskd.__all__)
    assert "calibration" in modules


def test_every_file_of_the_core_is_among_what_is_imported():
    found = set(modules_of("pskd"))
    assert found >= {f"pskd.{name}" for name in ("loss", "schedule", "targets", "teachers")}
    assert found >= {f"pskd.{name}" for name in ("calibration", "criterion", "memory.table")}


def test_the_core_loads_no_framework_and_nothing_above_it(core):
    assert {"pskd", "torch", "numpy"} <= core.loaded
    assert not core.loaded & (FRAMEWORKS | ADAPTERS | TOOLS | FOLDERS)


def test_the_core_asks_for_nothing_but_torch_numpy_and_the_standard_library(core):
    assert core.asked["pskd"] - sys.stdlib_module_names == {"pskd", "torch", "numpy"}


def test_the_fairseq_adapter_reaches_neither_sideways_nor_up(of_package):
    asked, loaded, _ = of_package("pskd_fairseq")
    assert {"pskd_fairseq", "fairseq", "pskd"} <= loaded
    assert not loaded & (ADAPTERS - {"pskd_fairseq"} | FOLDERS | {"detectron2"})
    # What fairseq itself loads is its own affair (some releases load torchvision). It is configured
    # by hydra and omegaconf, so its plugin may ask for these.
    assert not asked["pskd_fairseq"] & {"detectron2", "matplotlib", "torchvision"}
    assert not asked["pskd"] & (FRAMEWORKS | ADAPTERS | TOOLS)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_packages_reach_neither_sideways_nor_up(name, of_package):
    asked, loaded, _ = of_package(name)
    assert {name, "pskd"} <= loaded
    shared = set() if name in ("pskd_classification", "pskd_tools") else {"pskd_detection"}
    assert not loaded & (ADAPTERS - {name} - shared | FOLDERS | {"fairseq"})
    assert not asked[name] & (FRAMEWORKS - OTHERS[name])
    if name != "pskd_detectron2":  # which itself loads torchvision and more
        assert "detectron2" not in loaded
    assert not asked["pskd"] & (FRAMEWORKS | ADAPTERS | TOOLS)
    others = FRAMEWORKS - OTHERS["pskd_detection"] | ADAPTERS - {"pskd_detection"}
    assert not asked.get("pskd_detection", set()) & others


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_ask_for_the_core_and_their_framework_only(name, of_package):
    asked, loaded, _ = of_package(name)
    allowed = {name, "torch"} | BESIDE.get(name, set())
    assert asked[name] - sys.stdlib_module_names - allowed - TOOLS == {"pskd", MODULES[name]}
    assert not loaded & (ADAPTERS - allowed | FOLDERS | {"detectron2", "fairseq"})
    assert not asked["pskd"] & (FRAMEWORKS | ADAPTERS | TOOLS)
