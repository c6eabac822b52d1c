"""Sums over rows for the gradients of weights and modulations, in two steps and without atomics: a program writes a row of partial sums, a second kernel
adds these up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.triton_base import launch, narrow


@triton.jit
def sum_of_rows(b, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """[2**LEVELS, BLOCK] -> [BLOCK], by pairs: one order of summation whatever the layout in registers."""
    for _ in tl.static_range(LEVELS):
        b = tl.sum(tl.reshape(b, [b.shape[0] // 2, 2, BLOCK]), 1)
    return tl.sum(b, 0)


@triton.jit(do_not_specialize=["parts", "blocks"])
def column_sums_kernel(partial, out, parts, blocks, channels, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """partial [B, parts, C] -> out [B, C]. Partial sums are fresh and contiguous: their order follows from parts and channels."""
    i_b, o_c = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_first in range(0, parts, ROWS):
        i_part = i_first + tl.arange(0, ROWS)
        o_partial = ((i_b.to(tl.int64) * parts + i_part) * channels)[:, None] + o_c[None, :]
        b_sum += tl.load(partial + o_partial, mask=(i_part < parts)[:, None] & (o_c < channels)[None, :], other=0.0)
    tl.store(out + (i_b.to(tl.int64) * channels + o_c), narrow(sum_of_rows(b_sum, LEVELS, BLOCK), out.dtype.element_ty), mask=o_c < channels)


def add_up(partial: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` [B, C] becomes the sum of ``partial`` [B, parts, C] (float32, contiguous) over its parts: zeros where there are none."""
    samples, parts, channels = partial.shape
    blocks = triton.cdiv(channels, 64)
    launch(column_sums_kernel, samples * blocks, out, partial, out, parts, blocks, channels, ROWS=32, LEVELS=5, BLOCK=64, num_warps=4, num_stages=1,
           enable_fp_fusion=False)
