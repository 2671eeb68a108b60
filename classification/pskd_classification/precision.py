"""Mixed precision by the name that --amp has for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["AMP", "amp_dtype", "autocast"]

#: The types that may be asked for; a bare --amp is float16 on a GPU and bfloat16 on a CPU.
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(amp: bool | str, device: torch.device) -> torch.dtype | None:
    """Return the type of mixed precision, or None without one."""
    if isinstance(amp, str):
        return AMP[amp]
    if not amp:
        return None
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def autocast(amp: bool | str, device: torch.device) -> AbstractContextManager:
    """Return the context of a forward pass."""
    dtype = amp_dtype(amp, device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
