"""The compiled form of the loss; everything else of the package stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

# Errors and traps of floating point are not looked at; NaN and infinities are kept.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# Apple's compiler knows OpenMP's vectors only; threads need a library that it does not bring.
OPENMP = ["-fopenmp"] if sys.platform.startswith("linux") else ["-fopenmp-simd"]

setup(
    ext_modules=[
        Extension(
            "pskd.kernels._native_rows",
            ["pskd/kernels/native_rows.cpp"],
            extra_compile_args=[] if sys.platform == "win32" else FLAGS + OPENMP,
            extra_link_args=OPENMP if sys.platform.startswith("linux") else [],
            optional=True,  # without a compiler the loss runs on torch's operators
        )
    ]
)
