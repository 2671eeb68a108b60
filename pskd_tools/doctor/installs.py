"""The commands that install what a part needs."""

from __future__ import annotations

from collections.abc import Mapping

# pskd's own licence line needs setuptools 77; from 82 on Detectron2 misses pkg_resources.
_BUILD_TOOLS = "pip install torch numpy cython 'setuptools>=77,<82' wheel"
_FAIRSEQ = f"{_BUILD_TOOLS} && pip install --no-build-isolation fairseq-fixed==0.12.3.1"
TRANSLATION_TOOLS = {
    "sacrebleu": "sacrebleu",
    "sacremoses": "sacremoses",
    "subword_nmt": "subword-nmt",
}
INSTALL_FAIRSEQ = f"{_FAIRSEQ} && pip install {' '.join(TRANSLATION_TOOLS.values())}"
REPLACE_FAIRSEQ = f"pip uninstall -y fairseq fairseq-fixed && {_FAIRSEQ}"
INSTALL_DETECTRON2 = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
INSTALL_CONFIG_PAIR = "pip install 'hydra-core==1.3.2' 'omegaconf==2.3.0'"
INSTALL_SETUPTOOLS = "pip install 'setuptools<82'"
# As the extra of pyproject.toml: module -> distribution.
CLASSIFICATION_PACKAGES = {
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
}
INSTALL_CLASSIFICATION = f"pip install torchvision {' '.join(CLASSIFICATION_PACKAGES.values())}"
INSTALL_LIGHTNING = "pip install 'lightning>=2.2'"
INSTALL_TRANSFORMERS = "pip install 'transformers>=4.48' 'accelerate>=1.2'"
INSTALL_PSKD = "pip install --no-deps --force-reinstall .  # in a checkout of pskd"


def rebuild(package: str, install: str) -> str:
    """Return the command that installs a package anew."""
    # Uninstalled first and not forced: a forced installation would replace torch and numpy, too.
    # No cache where a build is at fault, since pip keeps the wheel that it once built.
    uncached = install.replace("--no-build-isolation", "--no-build-isolation --no-cache-dir")
    return f"pip uninstall -y {package} && {uncached}"


REBUILD_FAIRSEQ = rebuild("fairseq-fixed", _FAIRSEQ)
REBUILD_DETECTRON2 = rebuild("detectron2", INSTALL_DETECTRON2)

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
