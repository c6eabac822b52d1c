"""What hopper.py serves, and in which tiles; imported without Triton."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class HopperTile(NamedTuple):
    """``consumers`` warpgroups of 64 queries, ``keys`` in each of ``stages`` tiles in flight. ``ordered``: the warpgroups start their products in turn.
    ``persistent``: one program for each multiprocessor. Registers for each thread: of the producer, and of each consumer but the first, which has the rest."""

    consumers: int
    keys: int
    stages: int
    ordered: bool = False
    persistent: bool = True
    producer_registers: int = 24
    registers: int = 240


def hopper_tile(dim: int) -> HopperTile:
    return HopperTile(2, 128, 3) if dim <= 64 else HopperTile(2, 128, 2)


def why_not_hopper(q, k, v, *more) -> str:
    """Why the kernel does not serve q, k, v [B, T, H, D] (and those of a second segment); "" where it does. Checks what TMA asks for."""
    if os.environ.get("FUSEWIRE_HOPPER", "1") == "0":
        return "FUSEWIRE_HOPPER is 0"
    if not q.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "the device is not of the Hopper architecture"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"the head dimension is {q.shape[-1]}; 64 and 128 are served"
    for tensor in (q, k, v, *more):
        if 0 in tensor.shape:
            return "a tensor is empty"
        unit = 16 // tensor.dtype.itemsize
        if tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
            return "a row is not contiguous, or a tensor does not start at a multiple of 16 bytes"
        if any(size > 1 and (stride <= 0 or stride % unit or stride * tensor.dtype.itemsize >= 2**40) for size, stride in zip(tensor.shape[:-1], tensor.stride())):
            return "a stride is 0, not a multiple of 16 bytes, or too large"
    return ""
