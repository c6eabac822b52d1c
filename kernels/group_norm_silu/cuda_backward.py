"""The gradients of GroupNorm with SiLU by csrc/cuda, in the rounding of ``close``: the predicate of the CUDA row, and what it launches.

Statistics as in the forward pass, then one pass over picture and gradient for sums over each channel's pixels, in parts and without atomics, and one
for dx. A channel is cut by the picture's size alone, so that a sample's gradients do not depend on its batch. Formats are those of cuda.py.
"""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.group_norm_silu import cuda
from fusewire.kernels.group_norm_silu.reference import suggest_memory_format

PLANE = 2**13  # pixels of a channel of a contiguous picture that are summed together
PARTS, SMALLEST, LARGEST = 256, 2**14, 2**16  # of a channels-last picture: so many, of so many elements each

op = cuda_rows.raw(
    "cuda_group_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, Tensor? add, Tensor(a!)? dx, "
    "Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dshift, Tensor(e!)? dscale, Tensor(f!)? dadd, Tensor(g!) room, "
    "Tensor(h!) sums, Tensor(i!)? coefficients, Tensor(j!)? products, int groups, float eps, bool channels_last, bool silu) -> ()")


def why_not(grad, x, groups, weight, bias, eps, shift, scale, add, silu, of_x) -> str:
    return cuda.beyond(x, groups, grad, weight, bias, shift, scale, add)


def parts_of(channels: int, pixels: int, channels_last: bool) -> int:
    """Into how many parts the sum over a channel's pixels is cut."""
    if not channels_last:
        return -(-pixels // PLANE)
    size = channels * pixels
    return -(-size // min(max(size // PARTS, SMALLEST), LARGEST))


def group_norm_silu_backward(grad, x, groups: int, weight, bias, eps: float, shift, scale, add, silu: bool, of_x: bool) -> tuple[torch.Tensor, ...]:
    """As the reference's, all of one dtype."""
    memory_format = suggest_memory_format(x)
    last = memory_format is not torch.contiguous_format
    dx = torch.empty_like(x, memory_format=memory_format) if of_x else None
    new = x.new_empty if x.numel() else x.new_zeros  # sums over no pixels
    found = [dx, *(None if t is None else new(x.shape[1:2] if t.dim() == 1 else x.shape[:2]) for t in (weight, bias, shift, scale, add))]
    if x.numel():
        x, grad = (t if t[:1].is_contiguous(memory_format=memory_format) else t.clone(memory_format=memory_format) for t in (x, grad))
        shift, scale, add = (t if t is None or t.dim() == 2 else t.flatten(1) for t in (shift, scale, add))
        batch, channels = x.shape[:2]
        pixels = x.numel() // (batch * channels)
        parts = parts_of(channels, pixels, last)

        def room(*shape):
            return x.new_empty(shape, dtype=torch.float32)

        of_groups = cuda.parts_of(channels, groups, pixels, last, x.element_size())
        op(grad, x, weight, bias, shift, scale, add, *found, room((of_groups + 1) * batch * groups, 4),
           room(batch * (parts + 1 if parts > 1 else 1), 3, channels), room(batch, channels, 8) if of_x else None,
           None if weight is None and bias is None else room(2, batch, channels), groups, eps, last, silu)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)
