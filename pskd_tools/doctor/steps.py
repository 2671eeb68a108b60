"""What is tried for each part, what its failure means, and the command that mends it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pskd_tools.doctor.installs import (
    CLASSIFICATION_PACKAGES,
    DEPENDENCIES,
    INSTALL_CLASSIFICATION,
    INSTALL_DETECTRON2,
    INSTALL_FAIRSEQ,
    INSTALL_LIGHTNING,
    INSTALL_PSKD,
    INSTALL_TRANSFORMERS,
    REBUILD_DETECTRON2,
    REBUILD_FAIRSEQ,
    TRANSLATION_TOOLS,
    rebuild,
)
from pskd_tools.doctor.trials import (
    TRY_CLASSIFICATION,
    TRY_LIGHTNING,
    TRY_NUMPY,
    TRY_PLOT,
    TRY_PLUGIN,
    TRY_PSKD,
    TRY_PYCOCOTOOLS,
    TRY_TORCH,
    TRY_TORCHVISION,
    TRY_TRANSFORMERS,
)


@dataclass(frozen=True)
class Way:
    """A framework that a part can stand on, with pskd's adapter for it.

    ``beside`` is module -> distribution of what the part is absent without, too.
    """

    framework: str
    packages: tuple[str, ...]
    adapter: str
    install: str
    beside: Mapping[str, str] = field(default_factory=dict)


WAYS: Mapping[str, tuple[Way, ...]] = {
    "core": (),
    "translation": (Way("fairseq", ("fairseq-fixed", "fairseq"), "pskd_fairseq", INSTALL_FAIRSEQ),),
    "detection": (
        Way("detectron2", ("detectron2",), "pskd_detectron2", INSTALL_DETECTRON2),
        Way("torchvision", ("torchvision",), "pskd_torchvision", "pip install torchvision"),
    ),
    "classification": (
        Way(
            "torchvision",
            ("torchvision",),
            "pskd_classification",
            INSTALL_CLASSIFICATION,
            {"sklearn": "scikit-learn"},
        ),
    ),
    "integrations": (
        Way("lightning", ("lightning",), "pskd_lightning", INSTALL_LIGHTNING),
        Way("transformers", ("transformers",), "pskd_transformers", INSTALL_TRANSFORMERS),
    ),
    "plots": (Way("matplotlib", ("matplotlib",), "pskd_tools.plots", "pip install matplotlib"),),
}


@dataclass(frozen=True)
class Step:
    """Code that is run, and what its failure means.

    ``problem`` is told before the error, and may name any package of `PACKAGES` (with underscores)
    for its version, and torch's ``build``. ``framework`` is the module without which the step is
    moot (its absence is judged elsewhere); ``needs`` is a step whose failure explains this one's.
    """

    code: str
    problem: str
    mend: str
    framework: str = ""
    needs: str = ""

    def mend_of(self, error: str) -> str:
        """Return the command that mends a failure: for a dependency known by name, its own."""
        missing = re.search(r"No module named '(\w+)", error)
        if missing is None or missing.group(1) == self.framework:
            return self.mend
        return DEPENDENCIES.get(missing.group(1), self.mend)


def _on(framework: str, code: str, problem: str, mend: str = INSTALL_PSKD) -> Step:
    return Step(code, problem, mend, framework=framework, needs=framework)


#: Both detection and classification stand on it.
_TORCHVISION = Step(
    TRY_TORCHVISION,
    "torchvision {torchvision} does not load beside torch {torch} ({build}); the two "
    "must be of one release and both CPU-only or both for CUDA",
    "pip uninstall -y torch torchvision && pip install torch torchvision",
    framework="torchvision",
)

#: Part -> name -> step, in the order of trying. A step that tries a module is called like it.
STEPS: Mapping[str, Mapping[str, Step]] = {
    "core": {
        "torch": Step(TRY_TORCH, "torch does not load", "pip install --force-reinstall torch"),
        "numpy": Step(
            TRY_NUMPY,
            "numpy {numpy} does not work with torch {torch} (numpy 2 needs torch 2.3)",
            "pip install --upgrade torch numpy",
            needs="torch",
        ),
        "pskd": Step(TRY_PSKD, "one step of pskd_cross_entropy fails", INSTALL_PSKD, needs="torch"),
    },
    "translation": {
        "fairseq": Step(
            "import fairseq", "fairseq does not load", REBUILD_FAIRSEQ, framework="fairseq"
        ),
        "fairseq.data.data_utils_fast": _on(
            "fairseq",
            "import fairseq.data.data_utils_fast, fairseq.data.token_block_utils_fast",
            "fairseq's compiled batching does not load, as in a build without Cython or with "
            "fairseq's source folder in PYTHONPATH",
            REBUILD_FAIRSEQ,
        ),
        "fairseq.libbleu": _on(
            "fairseq",
            "import fairseq.libbleu",
            "fairseq's compiled BLEU does not load, as in a build without a C++ compiler or with "
            "fairseq's source folder in PYTHONPATH",
            REBUILD_FAIRSEQ,
        ),
        "fairseq_cli.train": _on(
            "fairseq", "import fairseq_cli.train", "fairseq-train does not load", REBUILD_FAIRSEQ
        ),
        **{  # their failures are their own, also where fairseq itself does not load
            module: Step(
                "import subword_nmt.apply_bpe" if module == "subword_nmt" else f"import {module}",
                f"{package} does not load",
                f"pip install {package}",
                framework="fairseq",
            )
            for module, package in TRANSLATION_TOOLS.items()
        },
        "pskd_fairseq": _on("fairseq", TRY_PLUGIN, "fairseq cannot load pskd_fairseq"),
    },
    "detection": {
        "torchvision": _TORCHVISION,
        "pycocotools": Step(
            TRY_PYCOCOTOOLS,
            "pycocotools {pycocotools} does not work beside numpy {numpy} (wheels before 2.0.8 "
            "were built for numpy 1)",
            "pip install --no-cache-dir --no-deps --force-reinstall 'pycocotools>=2.0.8'",
            framework="pycocotools",
        ),
        "detectron2": Step(
            "import detectron2, detectron2.engine",
            "Detectron2 does not load",
            REBUILD_DETECTRON2,
            framework="detectron2",
            needs="torchvision",
        ),
        "detectron2._C": _on(
            "detectron2",
            "import torch, detectron2._C",
            "Detectron2's compiled operators do not load, as with its source folder in PYTHONPATH "
            "or after torch was replaced",
            REBUILD_DETECTRON2,
        ),
        "pskd_torchvision": _on(
            "torchvision", "import pskd_torchvision", "pskd_torchvision does not load"
        ),
        "pskd_detectron2": _on(
            "detectron2", "import pskd_detectron2", "pskd_detectron2 does not load"
        ),
    },
    "classification": {
        "torchvision": _TORCHVISION,
        **{
            module: Step(
                "import sklearn.datasets" if module == "sklearn" else f"import {module}",
                f"{package} does not load",
                f"pip install {package}",
                framework="sklearn",
            )
            for module, package in CLASSIFICATION_PACKAGES.items()
        },
        "pskd_classification": _on(
            "torchvision", TRY_CLASSIFICATION, "one step of pskd_classification fails"
        ),
    },
    "integrations": {
        "lightning": Step(
            "import lightning.pytorch",
            "lightning does not load",
            rebuild("lightning", INSTALL_LIGHTNING),
            framework="lightning",
        ),
        "pskd_lightning": _on(
            "lightning", TRY_LIGHTNING, "lightning {lightning} does not take pskd_lightning"
        ),
        "transformers": Step(
            "import transformers.trainer",
            "transformers does not load",
            rebuild("transformers", INSTALL_TRANSFORMERS),
            framework="transformers",
        ),
        "pskd_transformers": _on(
            "transformers",
            TRY_TRANSFORMERS,
            "transformers {transformers} (accelerate {accelerate}) does not take pskd_transformers",
            INSTALL_TRANSFORMERS,
        ),
    },
    "plots": {
        "matplotlib": Step(
            TRY_PLOT,
            "matplotlib {matplotlib} cannot draw",
            "pip install --force-reinstall matplotlib",
            framework="matplotlib",
        ),
        "pskd_tools.plots": _on(
            "matplotlib", "import pskd_tools.plots", "pskd_tools.plots does not load"
        ),
    },
}
