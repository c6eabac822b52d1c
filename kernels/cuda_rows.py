"""The CUDA rows of the dispatch tables: what the compiled library of csrc/cuda serves, decided without touching a GPU.

csrc/cuda registers one op of its own for each room (``fusewire::cuda_adaln``, ...), which writes into tensors that it is given. A room's cuda.py
makes the public ops of it. Where a graph is recorded the call is the registered op ``<op>_cuda``, with the schema, fake kernel and gradient of ``<op>``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusewire.kernels.checks import kind_of
from fusewire.kernels.dispatch import Backend, forced_backend, launched
from fusewire.kernels.library import CUDA, declare
from fusewire.kernels.triton_rows import FLOATS, INTERPRETED, MISSING, too_old

DEVICE = "cuda"  # the tests' library for the CPU (tests/kernels/cuda_on_cpu) makes it "cpu"


def raw(schema: str) -> Callable:
    """Declare an op that csrc/cuda implements; the overload."""
    declare(schema)
    return getattr(torch.ops.fusewire, schema.split("(", 1)[0]).default


def why_not(x: torch.Tensor, *tensors: torch.Tensor | None) -> str:
    """Why the CUDA library cannot serve a call of these tensors, all of one dtype; ``""`` where it can."""
    if not CUDA.loaded:
        return CUDA.reason
    if (kind := kind_of(x)) != DEVICE:
        return f"x is on {kind}"
    dtype = x.dtype
    if dtype not in FLOATS:
        return f"x has dtype {dtype}"
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not dtype:
            return f"an argument has dtype {tensor.dtype}, x has {dtype}"
    return too_old(x.device.index) if DEVICE == "cuda" else ""


LARGE = 2**22  # elements of a sample


def better_by_triton(x: torch.Tensor) -> str:
    """Why Triton's kernel is preferred to CUDA's, or ``""``: it takes less time on the device, but 60 us more to launch, which large tensors hide. By the
    size of a sample: the batch around it must not choose its kernel. Measured in benchmarks/results/gpu.json."""
    if x.shape[0] and x.numel() // x.shape[0] >= LARGE and not MISSING and not INTERPRETED and forced_backend() != "cuda":
        return f"for samples of {LARGE} elements and more Triton's kernel is faster"
    return ""


def row(op: torch._ops.OpOverload, needs: torch._ops.OpOverload, why_not: Callable[..., str], launch: Callable) -> Backend:
    """The CUDA row of ``op``: ``launch`` takes the op's arguments and calls ``needs``, the op of csrc/cuda."""
    if reason := CUDA.why_not(needs._schema.name.split("::")[1]):
        CUDA.stale[op._schema.name.split("::")[1]] = reason
        why_not = lambda *args: reason  # noqa: E731
    return launched("cuda", op, why_not, launch)
