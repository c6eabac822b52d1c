"""GroupNorm with SiLU by csrc/cuda, forward and in ``close``: the predicate of the CUDA row, and what it launches.

Contiguous and channels-last pictures with dense samples are read in place, at any alignment and batch stride; others are copied. A group is cut into
parts by its own size alone, so that a sample's result does not depend on its batch; the parts' statistics, and the groups' behind them, are the one tensor beside the output.
"""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.group_norm_silu.reference import suggest_memory_format

MAX_GROUP = 2**31 - 2**20  # elements of a group are numbered in 32 bits; offsets have 64
MAX_BYTES_LAST = 8192  # a block of 512 threads holds all channels of a pixel
BLOCK, STEPS = 256, 4  # threads and, of each, the 16-byte chunks that it holds at a time: a tile, as csrc/cuda/group_norm_rows.h has it
FEW, MOST = (64, 256), (8, 16)  # contiguous and channels-last: from how many tiles a part has more than one, and how many at most

op = cuda_rows.raw("cuda_group_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, Tensor? add, Tensor(a!) out, Tensor(b!) room, "
                   "int groups, float eps, bool channels_last, bool silu) -> ()")


def beyond(x, groups, *tensors) -> str:
    """Why csrc/cuda cannot serve x and these, in either direction; ``""`` where it can."""
    if reason := cuda_rows.why_not(x, *tensors):
        return reason
    if x.numel() // max(x.shape[0] * groups, 1) > MAX_GROUP:
        return f"x has groups of more than {MAX_GROUP} elements"
    if x.shape[1] * x.element_size() > MAX_BYTES_LAST and suggest_memory_format(x) is not torch.contiguous_format:
        return f"x is channels-last and has {x.shape[1]} channels, more than {MAX_BYTES_LAST // x.element_size()}"
    return ""


def better_by_triton(x) -> str:
    """Of large pictures in float32, contiguous, alone: in 16 bits Triton's takes half as long again."""
    return cuda_rows.better_by_triton(x) if x.dtype.itemsize == 4 and suggest_memory_format(x) is torch.contiguous_format else ""


def why_not(x, groups, weight, bias, eps, shift, scale, add, silu, exact) -> str:
    if exact:
        return "numerics='exact' keeps PyTorch's own norm"
    return beyond(x, groups, weight, bias, shift, scale, add) or better_by_triton(x)


def parts_of(channels: int, groups: int, pixels: int, channels_last: bool, itemsize: int) -> int:
    """Parts of a group: a tile each, 16 KiB of a contiguous picture or some pixels of a channels-last one, as long as they are few; then several."""
    chunk = 16 // itemsize
    if channels_last:
        across = -(-channels // chunk)
        tiles = -(-pixels // (STEPS * ((BLOCK if across <= BLOCK else 2 * BLOCK) // across)))
    else:
        tiles = -(-(channels // groups * pixels) // (STEPS * BLOCK * chunk))
    return -(-tiles // min(-(-tiles // FEW[channels_last]), MOST[channels_last]))


def group_norm_silu(x, groups: int, weight, bias, eps: float, shift, scale, add, silu: bool, exact: bool) -> torch.Tensor:
    if plain := x.is_contiguous() and x.stride(1) != 1:  # in no two formats at once: known without the questions below, which take 7 us on a GPU's machine
        memory_format, out = torch.contiguous_format, torch.empty_like(x)
    else:
        memory_format = suggest_memory_format(x)
        out = torch.empty_like(x, memory_format=memory_format)
    last = memory_format is not torch.contiguous_format
    if not out.numel():
        return out
    if not plain and not x[:1].is_contiguous(memory_format=memory_format):
        x = x.clone(memory_format=memory_format)
    shift, scale, add = (tensor if tensor is None or tensor.dim() == 2 else tensor.flatten(1) for tensor in (shift, scale, add))
    batch, channels = x.shape[:2]
    parts = parts_of(channels, groups, out.numel() // (batch * channels), last, x.element_size())
    op(x, weight, bias, shift, scale, add, out, x.new_empty(((parts + 1) * batch * groups, 4), dtype=torch.float32), groups, eps, last, silu)
    return out
