"""The Triton rows of the dispatch tables: whether Triton can serve a call, decided without importing it.

Triton is imported when the first call is served, so that importing Fusewire costs nothing where it is missing or not needed, and never
touches a GPU. Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, slowly, where the backend is forced to "triton".
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from fusewire.kernels.checks import kind_of
from fusewire.kernels.dispatch import Backend, forced_backend, launched
from fusewire.kernels.plans import Planned

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")  # as Triton reads it when it is imported
MISSING = "" if importlib.util.find_spec("triton") else "triton is not installed"


_capabilities: dict[int, tuple[int, int]] = {}


def capability(index: int | None) -> tuple[int, int]:
    """The compute capability of the CUDA device ``index``. PyTorch is asked once: it takes several microseconds, and every predicate wants to know."""
    if index is None:
        index = torch.cuda.current_device()
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


def too_old(index: int | None) -> str:
    """Why the CUDA device ``index`` is too old for Triton, or ``""``."""
    if torch.version.hip is not None or capability(index) >= (8, 0):
        return ""
    return "the GPU's compute capability is below 8.0"


too_old._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import torch._dynamo and with it Triton


def why_not(x: torch.Tensor, *tensors: torch.Tensor | None) -> str:
    """Why Triton cannot serve a call of these tensors; ``""`` where it can."""
    if MISSING:
        return MISSING
    if INTERPRETED:
        if not x.is_cpu or forced_backend() != "triton":
            return "Triton interprets (TRITON_INTERPRET=1): only for CPU tensors, and only where the backend is forced"
    elif not x.is_cuda:
        return f"x is on {kind_of(x)}"
    elif reason := too_old(x.device.index):
        return reason
    for tensor in (x, *tensors):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"an argument has dtype {tensor.dtype}"
    return ""


def row(op: torch._ops.OpOverload, why_not: Callable[..., str], launcher: str) -> Backend:
    """The Triton row of ``op``. ``launcher``: "<room>.<function>", the function of the room's triton_kernel.py that takes the op's arguments, or
    "<room>.<file>.<function>"."""
    room, *file, function = launcher.split(".")
    found: list[Callable] = []

    def launch(*args):
        if not found:
            launcher = getattr(importlib.import_module(f"fusewire.kernels.{room}.{file[0] if file else 'triton_kernel'}"), function)
            found.append(Planned(launcher, importlib.import_module("fusewire.kernels.triton_launch").visible))
        return found[0](*args)

    return launched("triton", op, why_not, launch)
