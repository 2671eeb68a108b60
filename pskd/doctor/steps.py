"""What is tried for each part, what its failure means, and the commands that mend it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# pskd's own licence line needs setuptools 77; from 82 on Detectron2 misses pkg_resources.
_BUILD_TOOLS = "pip install torch numpy cython 'setuptools>=77,<82' wheel"
_FAIRSEQ = f"{_BUILD_TOOLS} && pip install --no-build-isolation fairseq-fixed==0.12.3.1"
_TOOLS = {"sacrebleu": "sacrebleu", "sacremoses": "sacremoses", "subword_nmt": "subword-nmt"}
INSTALL_FAIRSEQ = f"{_FAIRSEQ} && pip install {' '.join(_TOOLS.values())}"
REPLACE_FAIRSEQ = f"pip uninstall -y fairseq fairseq-fixed && {_FAIRSEQ}"
INSTALL_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
INSTALL_CONFIG_PAIR = "pip install 'hydra-core==1.3.2' 'omegaconf==2.3.0'"
INSTALL_SETUPTOOLS = "pip install 'setuptools<82'"
# As the extra of pyproject.toml: module -> distribution.
_CLASSIFICATION = {
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
}
INSTALL_CLASSIFICATION = f"pip install torchvision {' '.join(_CLASSIFICATION.values())}"
INSTALL_LIGHTNING = "pip install 'lightning>=2.2'"
INSTALL_TRANSFORMERS = "pip install 'transformers>=4.48' 'accelerate>=1.2'"
INSTALL_PSKD = "pip install --no-deps --force-reinstall .  # in a checkout of pskd"


def _rebuild(package: str, install: str) -> str:
    # Uninstalled first and not forced: a forced installation would replace torch and numpy, too.
    # No cache where a build is at fault, since pip keeps the wheel that it once built.
    uncached = install.replace("--no-build-isolation", "--no-build-isolation --no-cache-dir")
    return f"pip uninstall -y {package} && {uncached}"


_REBUILD_FAIRSEQ = _rebuild("fairseq-fixed", _FAIRSEQ)
_REBUILD_DETECTRON2 = _rebuild("detectron2", INSTALL_DETECTRON2)

# Modules that frameworks import -> what brings them. A list, since advice to install whatever name
# an error mentions could name a stranger's package.
_SAME_NAME = (
    "accelerate bitarray cffi cloudpickle fvcore iopath matplotlib pycocotools regex tabulate "
    "tensorboard termcolor torchaudio torchvision tqdm yacs"
)
_DEPENDENCIES: Mapping[str, str] = {name: f"pip install {name}" for name in _SAME_NAME.split()} | {
    "PIL": "pip install pillow",
    "cv2": "pip install opencv-python",
    "hydra": INSTALL_CONFIG_PAIR,
    "omegaconf": INSTALL_CONFIG_PAIR,
    "pkg_resources": INSTALL_SETUPTOOLS,
    "sklearn": "pip install scikit-learn",
    "yaml": "pip install PyYAML",
}


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
    "plots": (Way("matplotlib", ("matplotlib",), "pskd.plots", "pip install matplotlib"),),
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
        return _DEPENDENCIES.get(missing.group(1), self.mend)


_TRY_TORCH = """
import torch
cuda = torch.version.cuda or torch.version.hip
value = f"built for CUDA {cuda}" if cuda else "built without CUDA"
if torch.cuda.is_available():
    value += f", {torch.cuda.device_count()} device(s), first: {torch.cuda.get_device_name(0)}"
elif cuda:
    value += ", no device available"
"""

_TRY_NUMPY = """
import numpy, torch
if not numpy.array_equal(torch.arange(3).numpy(), torch.from_numpy(numpy.arange(3)).numpy()):
    raise RuntimeError("torch and numpy read different numbers from the same memory")
"""

_TRY_PSKD = """
import torch, pskd
logits = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
teacher_probs = torch.tensor([[0.6, 0.3, 0.1]])
loss = pskd.pskd_cross_entropy(logits, torch.tensor([0]), teacher_probs, 0.5)
loss.backward()
expected = logits.detach().softmax(1) - torch.tensor([[0.8, 0.15, 0.05]])
if not torch.allclose(logits.grad, expected, atol=1e-6):
    raise ArithmeticError(f"gradient {logits.grad.tolist()}, expected {expected.tolist()}")
from pskd.kernels import native
value = "" if native.is_built() else "not compiled"
"""

_TRY_PLUGIN = """
import argparse, importlib.util
spec = importlib.util.find_spec("pskd_fairseq")
if spec is None:
    raise ModuleNotFoundError("No module named 'pskd_fairseq'")
value = list(spec.submodule_search_locations)[0]
from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY
utils.import_user_module(argparse.Namespace(user_dir=value))
if "pskd" not in CRITERION_REGISTRY:
    raise LookupError("its import registers no criterion called pskd")
"""

_TRY_TORCHVISION = """
import torchvision, torch
boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]]), torch.tensor([0.9, 0.8])
if torchvision.ops.nms(boxes, scores, 0.5).tolist() != [0]:
    raise RuntimeError("nms kept a box that it should have dropped")
torchvision.ops.roi_align(torch.zeros(1, 1, 4, 4), [boxes], output_size=2)
import torchvision.models.detection
"""

_TRY_CLASSIFICATION = """
import torch, pskd_classification
from torch.nn.functional import cross_entropy
model = pskd_classification.build_model("preact_resnet10_tiny", 3)
loss = cross_entropy(model(torch.zeros(2, 3, 32, 32)), torch.tensor([0, 2]))
loss.backward()
if not all(p.grad is not None for p in model.parameters()):
    raise ArithmeticError("one step left parameters without a gradient")
"""

_TRY_LIGHTNING = """
import pskd_lightning
from lightning.pytorch import Trainer
Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, callbacks=[pskd_lightning.PSKDCallback(num_classes=3)])
"""

_TRY_TRANSFORMERS = """
import tempfile, torch, pskd_transformers
from transformers import Trainer, TrainingArguments
class PSKDTrainer(pskd_transformers.PSKDTrainerMixin, Trainer):
    pass
with tempfile.TemporaryDirectory() as folder:
    PSKDTrainer(torch.nn.Linear(2, 3), TrainingArguments(folder, report_to=[], use_cpu=True))
"""

_TRY_PYCOCOTOOLS = """
import pycocotools.mask, numpy
mask = numpy.asfortranarray(numpy.eye(3, dtype=numpy.uint8))
if int(pycocotools.mask.area(pycocotools.mask.encode(mask))) != 3:
    raise RuntimeError("a mask of 3 pixels was measured wrongly")
"""

_TRY_PLOT = """
import io
from matplotlib.figure import Figure
Figure().savefig(io.BytesIO(), format="png")
"""


def _on(framework: str, code: str, problem: str, mend: str = INSTALL_PSKD) -> Step:
    return Step(code, problem, mend, framework=framework, needs=framework)


#: Both detection and classification stand on it.
_TORCHVISION = Step(
    _TRY_TORCHVISION,
    "torchvision {torchvision} does not load beside torch {torch} ({build}); the two "
    "must be of one release and both CPU-only or both for CUDA",
    "pip uninstall -y torch torchvision && pip install torch torchvision",
    framework="torchvision",
)

#: Part -> name -> step, in the order of trying. A step that tries a module is called like it.
STEPS: Mapping[str, Mapping[str, Step]] = {
    "core": {
        "torch": Step(_TRY_TORCH, "torch does not load", "pip install --force-reinstall torch"),
        "numpy": Step(
            _TRY_NUMPY,
            "numpy {numpy} does not work with torch {torch} (numpy 2 needs torch 2.3)",
            "pip install --upgrade torch numpy",
            needs="torch",
        ),
        "pskd": Step(
            _TRY_PSKD, "one step of pskd_cross_entropy fails", INSTALL_PSKD, needs="torch"
        ),
    },
    "translation": {
        "fairseq": Step(
            "import fairseq", "fairseq does not load", _REBUILD_FAIRSEQ, framework="fairseq"
        ),
        "fairseq.data.data_utils_fast": _on(
            "fairseq",
            "import fairseq.data.data_utils_fast, fairseq.data.token_block_utils_fast",
            "fairseq's compiled batching does not load, as in a build without Cython or in "
            "fairseq's source folder",
            _REBUILD_FAIRSEQ,
        ),
        "fairseq.libbleu": _on(
            "fairseq",
            "import fairseq.libbleu",
            "fairseq's compiled BLEU does not load, as in a build without a C++ compiler or in "
            "fairseq's source folder",
            _REBUILD_FAIRSEQ,
        ),
        "fairseq_cli.train": _on(
            "fairseq", "import fairseq_cli.train", "fairseq-train does not load", _REBUILD_FAIRSEQ
        ),
        **{  # their failures are their own, also where fairseq itself does not load
            module: Step(
                "import subword_nmt.apply_bpe" if module == "subword_nmt" else f"import {module}",
                f"{package} does not load",
                f"pip install {package}",
                framework="fairseq",
            )
            for module, package in _TOOLS.items()
        },
        "pskd_fairseq": _on("fairseq", _TRY_PLUGIN, "fairseq cannot load pskd_fairseq"),
    },
    "detection": {
        "torchvision": _TORCHVISION,
        "pycocotools": Step(
            _TRY_PYCOCOTOOLS,
            "pycocotools {pycocotools} does not work beside numpy {numpy} (wheels before 2.0.8 "
            "were built for numpy 1)",
            "pip install --no-cache-dir --no-deps --force-reinstall 'pycocotools>=2.0.8'",
            framework="pycocotools",
        ),
        "detectron2": Step(
            "import detectron2, detectron2.engine",
            "Detectron2 does not load",
            _REBUILD_DETECTRON2,
            framework="detectron2",
            needs="torchvision",
        ),
        "detectron2._C": _on(
            "detectron2",
            "import torch, detectron2._C",
            "Detectron2's compiled operators do not load, as in its source folder or after torch "
            "was replaced",
            _REBUILD_DETECTRON2,
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
            for module, package in _CLASSIFICATION.items()
        },
        "pskd_classification": _on(
            "torchvision", _TRY_CLASSIFICATION, "one step of pskd_classification fails"
        ),
    },
    "integrations": {
        "lightning": Step(
            "import lightning.pytorch",
            "lightning does not load",
            _rebuild("lightning", INSTALL_LIGHTNING),
            framework="lightning",
        ),
        "pskd_lightning": _on(
            "lightning", _TRY_LIGHTNING, "lightning {lightning} does not take pskd_lightning"
        ),
        "transformers": Step(
            "import transformers.trainer",
            "transformers does not load",
            _rebuild("transformers", INSTALL_TRANSFORMERS),
            framework="transformers",
        ),
        "pskd_transformers": _on(
            "transformers",
            _TRY_TRANSFORMERS,
            "transformers {transformers} (accelerate {accelerate}) does not take pskd_transformers",
            INSTALL_TRANSFORMERS,
        ),
    },
    "plots": {
        "matplotlib": Step(
            _TRY_PLOT,
            "matplotlib {matplotlib} cannot draw",
            "pip install --force-reinstall matplotlib",
            framework="matplotlib",
        ),
        "pskd.plots": _on("matplotlib", "import pskd.plots", "pskd.plots does not load"),
    },
}
