"""The gradients of a linear layer's bias and activation in Triton, in the rounding of ``close``: one pass over the product and the gradient.

A program has one block of columns and walks over some of the rows; what the bias gets it writes as one row of partial sums. No atomics, the same bits
every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.triton_base import as_tokens, load_rows, narrow, strided
from fusewire.kernels.triton_launch import launch
from fusewire.kernels.triton_sums import add_up, sum_of_rows
from fusewire.kernels.tuning import cdiv

PARTS = 128  # of the rows, where the bias has a gradient: one row of partial sums each
ROWS, BLOCK, WARPS = 8, 256, 8


@triton.jit
def _slope(b_y, ACTIVATION: tl.constexpr):
    """act'(y)"""
    if ACTIVATION == "gelu_tanh":
        # With s = sigmoid(u), s + y s (1 - s) du/dy; 1 - s comes from the exponential, as it would cancel where s is almost 1
        b_square = tl.minimum(b_y * b_y, 1e6)  # beyond which nothing is left of the second term; it must not be 0 * infinity
        b_small = tl.exp(-tl.abs(1.5957691216057308 * b_y * (1.0 + 0.044715 * b_square)))
        b_part = 1.0 / (1.0 + b_small)
        b_slope = b_small * b_part * b_part * (1.5957691216057308 * (1.0 + 0.134145 * b_square))
        return tl.where(b_y >= 0, b_part, b_small * b_part) + b_y * b_slope
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(b_y * 0.7071067811865476)) + b_y * tl.exp(-0.5 * b_y * b_y) * 0.3989422804014327
    b_part = tl.sigmoid(b_y)
    return b_part * (1.0 + b_y * (1.0 - b_part))


@triton.jit(do_not_specialize=["rows", "tokens", "steps"])  # no recompilation for each picture size
def bias_activation_backward_kernel(grad, g_b, g_t, g_c, y, y_b, y_t, y_c, bias, bias_c, dy, sums, rows, tokens, steps, channels, blocks,
                                    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """``steps`` tiles of rows from the program's first on. sums [parts, N]: of dy."""
    i_part, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_c = i_block * BLOCK + tl.arange(0, BLOCK)
    b_bias = tl.zeros([BLOCK], tl.float32)
    if bias is not None:
        b_bias = tl.load(bias + o_c.to(tl.int64) * bias_c, mask=o_c < channels, other=0.0).to(tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_step in range(steps):
        i_row = (i_part * steps + i_step) * ROWS + tl.arange(0, ROWS)
        mask = (i_row < rows)[:, None] & (o_c < channels)[None, :]
        i_b, i_t = i_row // tokens, i_row % tokens
        b_y = load_rows(y, i_b, i_t, o_c, y_b, y_t, y_c, mask) + b_bias[None, :]
        b_dy = load_rows(grad, i_b, i_t, o_c, g_b, g_t, g_c, mask) * _slope(b_y, ACTIVATION)
        tl.store(dy + ((i_row.to(tl.int64) * channels)[:, None] + o_c[None, :]), narrow(b_dy, dy.dtype.element_ty), mask=mask)
        if sums is not None:
            b_sum += tl.where(mask, b_dy, 0.0)
    if sums is not None:
        tl.store(sums + (i_part.to(tl.int64) * channels + o_c), sum_of_rows(b_sum, LEVELS, BLOCK), mask=o_c < channels)


def bias_activation_backward(grad, y, bias, activation: str, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of y [..., N] and of the bias, which has no elements where it is not wanted."""
    dy, of_bias = y.new_empty(y.shape), of_bias and bias is not None
    grad, y = as_tokens(grad), as_tokens(y)
    channels, rows = y.shape[2], y.shape[0] * y.shape[1]
    tiles, blocks = cdiv(rows, ROWS), cdiv(channels, BLOCK)
    steps = max(cdiv(tiles, PARTS), 1) if of_bias else 1
    parts = cdiv(tiles, steps)
    sums = y.new_empty((1, parts, channels), dtype=torch.float32) if of_bias else None
    launch(bias_activation_backward_kernel, parts * blocks, y, *strided(grad, 3), *strided(y, 3), *strided(bias, 1), dy, sums, rows, y.shape[1], steps,
           channels, blocks, ACTIVATION=activation, ROWS=ROWS, LEVELS=ROWS.bit_length() - 1, BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
           enable_fp_fusion=False)
    dbias = y.new_empty(channels if of_bias else 0)
    if of_bias:
        add_up([(sums, dbias.unsqueeze(0))])
    return dy, dbias
