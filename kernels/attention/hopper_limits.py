"""What hopper.py serves, and in which tiles; imported without Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusewire.kernels.checks import kind_of
from fusewire.kernels.triton_rows import MISSING

VERSIONS = ("3.6", "3.7")  # of Triton: its Gluon is experimental, and others may give the same code another meaning
DIMS = (64, 128)
MAX_TOKENS = 2**31 - 256  # places are counted in 32 bits; offsets are TMA's, of 64


class HopperTile(NamedTuple):
    """``consumers`` warpgroups of 64 queries, ``keys`` in each of ``stages`` tiles in flight."""

    consumers: int
    keys: int
    stages: int


def hopper_tile(dim: int) -> HopperTile:
    """As measured on an H200 (benchmarks/results/hopper_attention.json). Three warpgroups were 3% faster for long sequences of 64, but spill."""
    return HopperTile(2, 128, 3 if dim <= 64 else 2)


def _gluon() -> str:
    """Why Triton cannot compile the kernel, or ``""``. Imports Triton, so it is asked last."""
    if MISSING:
        return MISSING
    try:
        import triton

        if ".".join(triton.__version__.split(".")[:2]) not in VERSIONS:
            return f"Triton is {triton.__version__}; Gluon's kernel is for {' and '.join(VERSIONS)}"
        from fusewire.kernels.attention import hopper  # noqa: F401
    except Exception as error:  # what an experimental interface lacks may show in any way
        return f"Gluon cannot be imported: {type(error).__name__}: {error}"
    return ""


_known: dict[int | None, str] = {}


def unavailable(index: int | None) -> str:
    """Why the kernel does not run on the CUDA device ``index``, or ``""``."""
    if index is None or index not in _known:
        if torch.version.hip is not None or torch.cuda.get_device_capability(index) != (9, 0):
            reason = "the device is not of the Hopper architecture"
        else:
            reason = _gluon()
        if index is None:
            return reason
        _known[index] = reason
    return _known[index]


unavailable._dynamo_marked_constant = True  # as triton_rows.too_old


def why_not_hopper(q, k, scale: float | None = None, *segment) -> str:
    """Why the kernel does not serve q, k [B, T, H, D] without a mask or a pattern; ``""`` where it does. ``segment``: q2 and k2. Never looks at the
    layout, which is the launcher's to deal with, nor at the number of samples (but for none), so that equal values give equal bits."""
    if (kind := kind_of(q)) != "cuda":
        return f"q is on {kind}"
    if q.dtype is not torch.bfloat16 and q.dtype is not torch.float16:
        return f"q has dtype {q.dtype}; bfloat16 and float16 are served"
    if q.shape[3] not in DIMS:
        return f"the head dimension is {q.shape[3]}; 64 and 128 are served"
    if scale is not None and scale <= 0:
        return "scale is not positive"
    for x in (q, k, *segment):
        if x.numel() == 0:
            return "a tensor is empty"
        if x.shape[1] > MAX_TOKENS:
            return f"there are {x.shape[1]} tokens; {MAX_TOKENS} are served"
    return unavailable(q.device.index)
