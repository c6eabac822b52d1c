"""Sums over rows for the gradients of weights and modulations, in two steps and without atomics: a program writes a row of partial sums, a second kernel
adds these up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.triton_base import narrow
from fusewire.kernels.triton_launch import launch
from fusewire.kernels.tuning import cdiv


@triton.jit
def sum_of_rows(b, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """[2**LEVELS, BLOCK] -> [BLOCK], by pairs: one order of summation whatever the layout in registers."""
    for _ in tl.static_range(LEVELS):
        b = tl.sum(tl.reshape(b, [b.shape[0] // 2, 2, BLOCK]), 1)
    return tl.sum(b, 0)


@triton.jit(do_not_specialize=["parts", "blocks", "programs"])
def column_sums_kernel(partial, out, partial1, out1, partial2, out2, partial3, out3, parts, blocks, programs, channels,
                       ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """partial [B, parts, C] -> out [B, C], up to four of them. Partial sums are fresh and contiguous: their order follows from parts and channels."""
    i_pair, i_program = tl.program_id(0) // programs, tl.program_id(0) % programs
    if partial1 is not None:
        if i_pair == 1:
            partial, out = partial1, out1
    if partial2 is not None:
        if i_pair == 2:
            partial, out = partial2, out2
    if partial3 is not None:
        if i_pair == 3:
            partial, out = partial3, out3
    i_b, o_c = i_program // blocks, i_program % blocks * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_first in range(0, parts, ROWS):
        i_part = i_first + tl.arange(0, ROWS)
        o_partial = ((i_b.to(tl.int64) * parts + i_part) * channels)[:, None] + o_c[None, :]
        b_sum += tl.load(partial + o_partial, mask=(i_part < parts)[:, None] & (o_c < channels)[None, :], other=0.0)
    tl.store(out + (i_b.to(tl.int64) * channels + o_c), narrow(sum_of_rows(b_sum, LEVELS, BLOCK), out.dtype.element_ty), mask=o_c < channels)


AT_ONCE = 4  # pairs that a launch takes


def add_up(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Pairs of one shape and dtype: ``out`` [B, C] becomes the sum of ``partial`` [B, parts, C] (float32, contiguous) over its parts, zeros where there
    are none. One launch for up to four of them: each would be too small for a GPU."""
    for i in range(0, len(pairs), AT_ONCE):
        some = pairs[i:i + AT_ONCE]
        samples, parts, channels = some[0][0].shape
        blocks = cdiv(channels, 32)
        launch(column_sums_kernel, len(some) * samples * blocks, some[0][1], *(tensor for pair in (*some, *[(None, None)] * (AT_ONCE - len(some))) for tensor in pair),
               parts, blocks, samples * blocks, channels, ROWS=64, LEVELS=6, BLOCK=32, num_warps=4, num_stages=1, enable_fp_fusion=False)
