"""The parts of pskd: what each stands on, what is tried of it, and the commands that mend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

PARTS = ("core", "translation", "detection", "classification", "integrations", "plots")

#: Distribution -> what needs it, in the order of the table.
PACKAGES: Mapping[str, str] = {
    "pskd": "every part",
    "torch": "core",
    "numpy": "core",
    "fairseq-fixed": "translation",
    "fairseq": "translation (fairseq-fixed replaces it)",
    "torchaudio": "translation (fairseq-fixed's metadata only)",
    "sacrebleu": "translation",
    "sacremoses": "translation",
    "subword-nmt": "translation",
    "hydra-core": "translation, detection",
    "omegaconf": "translation, detection",
    "torchvision": "detection, classification",
    "detectron2": "detection",
    "pycocotools": "detection (COCO data and evaluation)",
    "setuptools": "detection (pkg_resources)",
    "scikit-learn": "classification",
    "pyyaml": "classification",
    "tqdm": "classification",
    "tensorboard": "classification, detection",
    "lightning": "integrations",
    "timm": "integrations",
    "transformers": "integrations",
    "accelerate": "integrations (transformers)",
    "trl": "integrations",
    "matplotlib": "plots",
}

# ---- commands ------------------------------------------------------------------------------------

# pskd's own licence line needs setuptools 77; from 82 on Detectron2 misses pkg_resources.
_BUILD_TOOLS = "pip install torch numpy cython 'setuptools>=77,<82' wheel"
_FAIRSEQ = f"{_BUILD_TOOLS} && pip install --no-build-isolation fairseq-fixed==0.12.3.1"
_TRANSLATION = {
    "sacrebleu": "sacrebleu",
    "sacremoses": "sacremoses",
    "subword_nmt": "subword-nmt",
}
INSTALL_FAIRSEQ = f"{_FAIRSEQ} && pip install {' '.join(_TRANSLATION.values())}"
REPLACE_FAIRSEQ = f"pip uninstall -y fairseq fairseq-fixed && {_FAIRSEQ}"
INSTALL_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
INSTALL_CONFIG_PAIR = "pip install 'hydra-core==1.3.2' 'omegaconf==2.3.0'"
INSTALL_SETUPTOOLS = "pip install 'setuptools<82'"
_SKLEARN = {"sklearn": "scikit-learn"}
#: As the extra of pyproject.toml.
_CLASSIFICATION = _SKLEARN | {"yaml": "pyyaml", "tqdm": "tqdm", "tensorboard": "tensorboard"}
INSTALL_CLASSIFICATION = f"pip install torchvision {' '.join(_CLASSIFICATION.values())}"
INSTALL_LIGHTNING = "pip install 'lightning>=2.2'"
INSTALL_TIMM = "pip install 'timm>=1.0.31'"
INSTALL_TRANSFORMERS = "pip install 'transformers>=4.48' 'accelerate>=1.2'"
INSTALL_TRL = "pip install 'trl>=1.0' peft"
INSTALL_PSKD = "pip install --no-deps --force-reinstall .  # in a checkout of pskd"

# Modules that frameworks import -> what brings them. A list, since advice to install whatever name
# an error mentions could name a stranger's package.
_SAME_NAME = (
    "accelerate bitarray cffi cloudpickle fvcore iopath matplotlib pycocotools regex scipy "
    "tabulate tensorboard termcolor torchaudio torchvision tqdm yacs"
)
DEPENDENCIES: Mapping[str, str] = {name: f"pip install {name}" for name in _SAME_NAME.split()} | {
    "PIL": "pip install pillow",
    "cv2": "pip install opencv-python",
    "hydra": INSTALL_CONFIG_PAIR,
    "omegaconf": INSTALL_CONFIG_PAIR,
    "pkg_resources": INSTALL_SETUPTOOLS,
    "sklearn": "pip install scikit-learn",
    "yaml": "pip install PyYAML",
}


def _rebuild(package: str, install: str) -> str:
    """Return the command that installs a package anew."""
    # Uninstalled first and not forced: a forced installation would replace torch and numpy, too.
    # No cache where a build is at fault, since pip keeps the wheel that it once built.
    uncached = install.replace("--no-build-isolation", "--no-build-isolation --no-cache-dir")
    return f"pip uninstall -y {package} && {uncached}"


_REBUILD_FAIRSEQ = _rebuild("fairseq-fixed", _FAIRSEQ)
_REBUILD_DETECTRON2 = _rebuild("detectron2", INSTALL_DETECTRON2)

# ---- what a part stands on -----------------------------------------------------------------------


#: Framework -> its distributions, where they are not called like it.
DISTRIBUTIONS = {"fairseq": ("fairseq-fixed", "fairseq")}


@dataclass(frozen=True)
class Way:
    """A framework that a part can stand on, with pskd's adapter for it.

    ``beside`` is module -> distribution of what the part is absent without, too.
    """

    framework: str
    adapter: str
    install: str
    beside: Mapping[str, str] = field(default_factory=dict)


WAYS: Mapping[str, tuple[Way, ...]] = {
    "core": (),
    "translation": (Way("fairseq", "pskd_fairseq", INSTALL_FAIRSEQ),),
    "detection": (
        Way("detectron2", "pskd_detectron2", INSTALL_DETECTRON2),
        Way("torchvision", "pskd_torchvision", "pip install torchvision"),
    ),
    "classification": (
        Way("torchvision", "pskd_classification", INSTALL_CLASSIFICATION, _SKLEARN),
    ),
    "integrations": (
        Way("lightning", "pskd_lightning", INSTALL_LIGHTNING),
        Way("timm", "pskd_timm", INSTALL_TIMM),
        Way("transformers", "pskd_transformers", INSTALL_TRANSFORMERS),
        Way("trl", "pskd_trl", INSTALL_TRL),
    ),
    "plots": (Way("matplotlib", "pskd_tools.plots", "pip install matplotlib"),),
}

# ---- what is tried -------------------------------------------------------------------------------

# Step -> the code that is run, where it is more than the import of the module.
_CODE: Mapping[str, str] = {
    "torch": """
import torch
cuda = torch.version.cuda or torch.version.hip
value = f"built for CUDA {cuda}" if cuda else "built without CUDA"
if torch.cuda.is_available():
    value += f", {torch.cuda.device_count()} device(s), first: {torch.cuda.get_device_name(0)}"
elif cuda:
    value += ", no device available"
""",
    "numpy": "import numpy, torch; torch.from_numpy(torch.arange(3).numpy())",
    "pskd": """
import torch, pskd
logits = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
teacher_probs = torch.tensor([[0.6, 0.3, 0.1]])
pskd.pskd_cross_entropy(logits, torch.tensor([0]), teacher_probs, 0.5).backward()
expected = logits.detach().softmax(1) - torch.tensor([[0.8, 0.15, 0.05]])
if not torch.allclose(logits.grad, expected, atol=1e-6):
    raise ArithmeticError(f"gradient {logits.grad.tolist()}, expected {expected.tolist()}")
from pskd.kernels import native
value = "" if native.is_built() else "not compiled"
""",
    "fairseq.data.data_utils_fast": """
import fairseq.data.data_utils_fast, fairseq.data.token_block_utils_fast
""",
    "subword_nmt": "import subword_nmt.apply_bpe",
    "pskd_fairseq": """
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
""",
    "torchvision": """
import torch, torchvision.models.detection
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]])
if torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() != [0]:
    raise RuntimeError("nms kept a box that it should have dropped")
torchvision.ops.roi_align(torch.zeros(1, 1, 4, 4), [boxes], output_size=2)
""",
    "pycocotools": "import pycocotools.mask",
    "detectron2": "import detectron2, detectron2.engine",
    "detectron2._C": "import torch, detectron2._C",
    "sklearn": "import sklearn.datasets",
    "pskd_classification": """
import torch, pskd_classification
model = pskd_classification.build_model("preact_resnet10_tiny", 3)
loss = torch.nn.functional.cross_entropy(model(torch.zeros(2, 3, 32, 32)), torch.tensor([0, 2]))
loss.backward()
""",
    "lightning": "import lightning.pytorch",
    "pskd_lightning": """
import pskd_lightning
from lightning.pytorch import Trainer
Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, callbacks=[pskd_lightning.PSKDCallback(num_classes=3)])
""",
    "timm": "import timm.task",
    "pskd_timm": """
import torch, pskd_timm
task = pskd_timm.PSKDTask(torch.nn.Linear(2, 3), num_epochs=2, task_options={"verbose": False})
task.begin_epoch(1)
task(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))["loss"].backward()
""",
    "transformers": "import transformers.trainer",
    "pskd_transformers": """
import tempfile, torch, pskd_transformers
from transformers import Trainer, TrainingArguments
class PSKDTrainer(pskd_transformers.PSKDTrainerMixin, Trainer):
    pass
with tempfile.TemporaryDirectory() as folder:
    PSKDTrainer(torch.nn.Linear(2, 3), TrainingArguments(folder, report_to=[], use_cpu=True))
""",
    "matplotlib": """
import io
from matplotlib.figure import Figure
Figure().savefig(io.BytesIO(), format="png")
""",
}


@dataclass(frozen=True)
class Step:
    """Something that is tried, and what its failure means.

    Attributes:
        problem: shown before the error; may name any package of `PACKAGES` (with underscores) for
            its version, and torch's ``build``. Without it the step's own name "does not load".
        framework: the module without which the step is moot; its absence is judged elsewhere.
        needs: a step whose failure explains this one's.
        code: fails by raising; its ``value`` is reported.
    """

    problem: str = ""
    mend: str = INSTALL_PSKD
    framework: str = ""
    needs: str = ""
    code: str = ""


def _on(framework: str, problem: str = "", mend: str = INSTALL_PSKD) -> Step:
    return Step(problem, mend, framework, needs=framework)


def _package(name: str, framework: str) -> Step:
    # Its failure is its own, also where the framework itself does not load.
    return Step(f"{name} does not load", f"pip install {name}", framework)


# A step that tries a module is called like it.
_STEPS: Mapping[str, Step] = {
    "torch": Step(mend="pip install --force-reinstall torch"),
    "numpy": Step(
        "numpy {numpy} does not work with torch {torch} (numpy 2 needs torch 2.3)",
        "pip install --upgrade torch numpy",
        needs="torch",
    ),
    "pskd": Step("one step of pskd_cross_entropy fails", needs="torch"),
    "fairseq": Step(mend=_REBUILD_FAIRSEQ, framework="fairseq"),
    "fairseq.data.data_utils_fast": _on(
        "fairseq",
        "fairseq's compiled batching does not load, as in a build without Cython or with "
        "fairseq's source folder in PYTHONPATH",
        _REBUILD_FAIRSEQ,
    ),
    "fairseq.libbleu": _on(
        "fairseq",
        "fairseq's compiled BLEU does not load, as in a build without a C++ compiler or with "
        "fairseq's source folder in PYTHONPATH",
        _REBUILD_FAIRSEQ,
    ),
    "fairseq_cli.train": _on("fairseq", "fairseq-train does not load", _REBUILD_FAIRSEQ),
    **{module: _package(package, "fairseq") for module, package in _TRANSLATION.items()},
    "pskd_fairseq": _on("fairseq", "fairseq cannot load pskd_fairseq"),
    "torchvision": Step(
        "torchvision {torchvision} does not load beside torch {torch} ({build}); the two must be "
        "of one release and both CPU-only or both for CUDA",
        "pip uninstall -y torch torchvision && pip install torch torchvision",
        "torchvision",
    ),
    "pycocotools": Step(
        "pycocotools {pycocotools} does not work beside numpy {numpy} (wheels before 2.0.8 were "
        "built for numpy 1)",
        "pip install --no-cache-dir --no-deps --force-reinstall 'pycocotools>=2.0.8'",
        "pycocotools",
    ),
    "detectron2": Step(
        "Detectron2 does not load", _REBUILD_DETECTRON2, "detectron2", needs="torchvision"
    ),
    "detectron2._C": _on(
        "detectron2",
        "Detectron2's compiled operators do not load, as with its source folder in PYTHONPATH or "
        "after torch was replaced",
        _REBUILD_DETECTRON2,
    ),
    "pskd_torchvision": _on("torchvision"),
    "pskd_detectron2": _on("detectron2"),
    **{module: _package(package, "sklearn") for module, package in _CLASSIFICATION.items()},
    "pskd_classification": _on("torchvision", "one step of pskd_classification fails"),
    "lightning": Step(mend=_rebuild("lightning", INSTALL_LIGHTNING), framework="lightning"),
    "pskd_lightning": _on("lightning", "lightning {lightning} does not take pskd_lightning"),
    "timm": Step(mend=_rebuild("timm", INSTALL_TIMM), framework="timm"),
    "pskd_timm": _on("timm", "timm {timm} does not take pskd_timm"),
    "transformers": Step(
        mend=_rebuild("transformers", INSTALL_TRANSFORMERS), framework="transformers"
    ),
    "pskd_transformers": _on(
        "transformers",
        "transformers {transformers} (accelerate {accelerate}) does not take pskd_transformers",
        INSTALL_TRANSFORMERS,
    ),
    "trl": Step(mend=_rebuild("trl", INSTALL_TRL), framework="trl"),
    "pskd_trl": _on("trl", "trl {trl} does not take pskd_trl"),
    "matplotlib": Step(
        "matplotlib {matplotlib} cannot draw",
        "pip install --force-reinstall matplotlib",
        "matplotlib",
    ),
    "pskd_tools.plots": _on("matplotlib"),
}
_TRIED = {
    "core": "torch numpy pskd",
    "translation": "fairseq fairseq.data.data_utils_fast fairseq.libbleu fairseq_cli.train "
    "sacrebleu sacremoses subword_nmt pskd_fairseq",
    "detection": "torchvision pycocotools detectron2 detectron2._C pskd_torchvision "
    "pskd_detectron2",
    "classification": "torchvision sklearn yaml tqdm tensorboard pskd_classification",
    "integrations": "lightning pskd_lightning timm pskd_timm transformers pskd_transformers "
    "trl pskd_trl",
    "plots": "matplotlib pskd_tools.plots",
}

#: Part -> name -> step, in the order of trying.
STEPS: Mapping[str, Mapping[str, Step]] = {
    part: {
        name: replace(_STEPS[name], code=_CODE.get(name, f"import {name}"))
        for name in names.split()
    }
    for part, names in _TRIED.items()
}
