"""The gradients of adaLN in Triton, in the rounding of ``close``: one pass over the rows, which recomputes residual and norm in registers.

What a sample shares among its tokens gets a sum over them, in two steps and without atomics: a program walks over some tokens of one sample and
writes a row of partial sums, a second kernel adds these up. How the tokens are shared out depends on their number alone, so a sample's sums
do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.adaln.backward_calls import MODULATIONS, ROWWISE, VECTORS, calls
from fusewire.kernels.triton_base import inner_contiguous, load_rows, narrow, over_tokens, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.triton_sums import add_up, sum_of_rows
from fusewire.kernels.tuning import Arch, RowTile, aligned, all_registers, cdiv, row_tile

PARTS = 256  # of a sample's tokens: one program and one row of partial sums each


@triton.jit
def _vector(x, o_c, x_c, channels):
    return tl.load(x + o_c.to(tl.int64) * x_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _give(b_sum, b_grad, out, o_out, mask, SUMMED: tl.constexpr):
    """The sum so far and these rows of a gradient, or the sum as it was, and the rows stored: where each token has a gradient of its own."""
    if out is not None:
        if SUMMED:
            b_sum += b_grad
        else:
            tl.store(out + o_out, narrow(b_grad, out.dtype.element_ty), mask=mask)
    return b_sum


@triton.jit
def _finish(b_sum, out, i_program, o_c, channels, SUMMED: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    if out is not None:
        if SUMMED:
            tl.store(out + (i_program.to(tl.int64) * channels + o_c), sum_of_rows(b_sum, LEVELS, BLOCK), mask=o_c < channels)


@triton.jit(do_not_specialize=["tokens", "parts", "steps", "origin"])  # no recompilation for each picture size
def adaln_backward_kernel(
    grad, r_b, r_t, r_c, grad1, g1_b, g1_t, g1_c, grad2, g2_b, g2_t, g2_c,
    x, x_b, x_t, x_c,
    y, y_b, y_t, y_c, gate, gate_b, gate_t, gate_c,
    y2, y2_b, y2_t, y2_c, gate2, gate2_b, gate2_t, gate2_c,
    scale, s_b, s_t, s_c, scale2, s2_b, s2_t, s2_c, weight, weight_c, bias, bias_c,
    dx, dy, dy2, dgate, dgate2, dshift, dscale, dshift2, dscale2, dweight, dbias,
    tokens, parts, steps, channels, eps, origin,
    NORM: tl.constexpr, SUMMED: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    """``grad`` is that of the residual stream, ``grad1`` and ``grad2`` of the modulated norms. Bit i of SUMMED: the i-th gradient from dgate on is a sum."""
    i_program = tl.program_id(0)
    i_b = i_program // parts + tl.zeros([ROWS], tl.int32)
    o_c = tl.arange(0, BLOCK)
    if not ALIGNED:
        o_c += origin  # one element an access: fusewire.kernels.tuning.aligned says why
    b_zero = tl.zeros([ROWS, BLOCK], tl.float32)
    b_dgate, b_dgate2, b_dshift, b_dscale, b_dshift2, b_dscale2, b_dweight, b_dbias = b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, b_zero
    for i_step in range(steps):
        i_t = ((i_program % parts) * steps + i_step) * ROWS + tl.arange(0, ROWS)
        mask = (i_t < tokens)[:, None] & (o_c < channels)[None, :]
        o_out = ((i_b.to(tl.int64) * tokens + i_t) * channels)[:, None] + o_c[None, :]
        if NORM >= 1:
            b_x = load_rows(x, i_b, i_t, o_c, x_b, x_t, x_c, mask)
            if y is not None:
                b_x += load_rows(gate, i_b, i_t, o_c, gate_b, gate_t, gate_c, mask) * load_rows(y, i_b, i_t, o_c, y_b, y_t, y_c, mask)
            if y2 is not None:
                b_x += load_rows(gate2, i_b, i_t, o_c, gate2_b, gate2_t, gate2_c, mask) * load_rows(y2, i_b, i_t, o_c, y2_b, y2_t, y2_c, mask)
            if NORM == 1:  # the mean in two steps: what rounding left of a large one would come back in every gradient
                b_x = tl.where(mask, b_x - (tl.sum(b_x, 1) / channels)[:, None], 0.0)
                b_x = tl.where(mask, b_x - (tl.sum(b_x, 1) / channels)[:, None], 0.0)
            b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / channels + eps)[:, None]
            b_xhat = b_x * b_rstd
            b_norm = b_xhat
            if weight is not None:
                b_norm *= _vector(weight, o_c, weight_c, channels)
            if bias is not None:
                b_norm += _vector(bias, o_c, bias_c, channels)

            b_grad = load_rows(grad1, i_b, i_t, o_c, g1_b, g1_t, g1_c, mask)
            b_dshift = _give(b_dshift, b_grad, dshift, o_out, mask, SUMMED & 4)
            b_dscale = _give(b_dscale, b_grad * b_norm, dscale, o_out, mask, SUMMED & 8)
            b_up = b_grad * (1.0 + load_rows(scale, i_b, i_t, o_c, s_b, s_t, s_c, mask))
            if grad2 is not None:
                b_grad = load_rows(grad2, i_b, i_t, o_c, g2_b, g2_t, g2_c, mask)
                b_dshift2 = _give(b_dshift2, b_grad, dshift2, o_out, mask, SUMMED & 16)
                b_dscale2 = _give(b_dscale2, b_grad * b_norm, dscale2, o_out, mask, SUMMED & 32)
                b_up += b_grad * (1.0 + load_rows(scale2, i_b, i_t, o_c, s2_b, s2_t, s2_c, mask))
            b_dweight = _give(b_dweight, b_up * b_xhat, dweight, o_out, mask, SUMMED & 64)
            b_dbias = _give(b_dbias, b_up, dbias, o_out, mask, SUMMED & 128)

            # dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd, g = grad * (1 + scale) * weight; RMSNorm has no mean(g)
            if weight is not None:
                b_up *= _vector(weight, o_c, weight_c, channels)
            b_total = b_up - b_xhat * (tl.sum(b_up * b_xhat, 1) / channels)[:, None]
            if NORM == 1:
                b_total -= (tl.sum(b_up, 1) / channels)[:, None]
            b_total *= b_rstd
            if grad is not None:
                b_total += load_rows(grad, i_b, i_t, o_c, r_b, r_t, r_c, mask)
        else:
            b_total = load_rows(grad, i_b, i_t, o_c, r_b, r_t, r_c, mask)

        if dx is not None:
            tl.store(dx + o_out, narrow(b_total, dx.dtype.element_ty), mask=mask)
        # What the norm read is read again, from a cache, rather than kept: registers are for the sums
        if dgate is not None:
            b_dgate = _give(b_dgate, b_total * load_rows(y, i_b, i_t, o_c, y_b, y_t, y_c, mask), dgate, o_out, mask, SUMMED & 1)
        if dgate2 is not None:
            b_dgate2 = _give(b_dgate2, b_total * load_rows(y2, i_b, i_t, o_c, y2_b, y2_t, y2_c, mask), dgate2, o_out, mask, SUMMED & 2)
        if dy is not None:
            b_dy = b_total * load_rows(gate, i_b, i_t, o_c, gate_b, gate_t, gate_c, mask)
            tl.store(dy + o_out, narrow(b_dy, dy.dtype.element_ty), mask=mask)
        if dy2 is not None:
            b_dy = b_total * load_rows(gate2, i_b, i_t, o_c, gate2_b, gate2_t, gate2_c, mask)
            tl.store(dy2 + o_out, narrow(b_dy, dy2.dtype.element_ty), mask=mask)
    _finish(b_dgate, dgate, i_program, o_c, channels, SUMMED & 1, LEVELS, BLOCK)
    _finish(b_dgate2, dgate2, i_program, o_c, channels, SUMMED & 2, LEVELS, BLOCK)
    _finish(b_dshift, dshift, i_program, o_c, channels, SUMMED & 4, LEVELS, BLOCK)
    _finish(b_dscale, dscale, i_program, o_c, channels, SUMMED & 8, LEVELS, BLOCK)
    _finish(b_dshift2, dshift2, i_program, o_c, channels, SUMMED & 16, LEVELS, BLOCK)
    _finish(b_dscale2, dscale2, i_program, o_c, channels, SUMMED & 32, LEVELS, BLOCK)
    _finish(b_dweight, dweight, i_program, o_c, channels, SUMMED & 64, LEVELS, BLOCK)
    _finish(b_dbias, dbias, i_program, o_c, channels, SUMMED & 128, LEVELS, BLOCK)


def _tile(channels: int, sums: int, arch: Arch) -> RowTile:
    """8 elements a thread for short rows, 16 for long ones, 32 where there are at most three sums (an H200: a third of the time less with a gate), half of
    the former where each has an address of its own: the sums leave no more registers."""
    block, rows, warps = row_tile(channels, arch)
    if rows > 1:
        return RowTile(block, rows // 2, 2 * warps if channels % 16 else warps)
    return RowTile(block, rows, min(2 * warps, 16) if channels % 16 else warps if sums > 3 else max(warps // 2, 1))


def _backward(wanted: int, norm: int, eps: float, grad, grad1, grad2, arguments: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """As ``calls`` says."""
    like = next(iter(arguments.values()))
    batch, tokens, channels = like.shape
    arch = arch_of(like.device)
    tile = _tile(channels, sum(tensor is not None for name, tensor in arguments.items() if name not in ROWWISE), arch)
    registers = all_registers(tile.warps, arch) if tile.block <= 1024 else {}
    asked = {name: tensor for i, (name, tensor) in enumerate(arguments.items()) if tensor is not None and wanted >> i & 1}
    if not asked:
        return tuple(like.new_empty(0) for _ in arguments)
    found = {name: like.new_empty(tensor.shape) for name, tensor in asked.items()}
    shared = [name for name, tensor in asked.items() if name in VECTORS or name in MODULATIONS and (tensor.dim() == 2 or tensor.shape[1] == 1)]
    tiles = cdiv(tokens, tile.rows)
    steps = max(cdiv(tiles, PARTS), 1) if shared else 1
    parts = cdiv(tiles, steps)
    partial = {name: like.new_empty((batch, parts, channels), dtype=torch.float32) for name in shared}
    # The first is written even where it is not asked for: the order of the sums follows the widest store, and must not follow what is asked for
    written = {next(iter(arguments)): like.new_empty(like.shape), **found, **partial}
    grad, grad1, grad2, x, y, gate, y2, gate2, scale, scale2, weight, bias = map(inner_contiguous, (grad, grad1, grad2, *map(arguments.get, (
        "x", "y", "gate", "y2", "gate2", "scale", "scale2", "weight", "bias"))))
    launch(
        adaln_backward_kernel, batch * parts if channels else 0, like,
        *strided(grad, 3), *strided(grad1, 3), *strided(grad2, 3), *strided(x, 3),
        *strided(y, 3), *over_tokens(gate), *strided(y2, 3), *over_tokens(gate2),
        *over_tokens(scale), *over_tokens(scale2), *strided(weight, 1), *strided(bias, 1),
        *map(written.get, (*ROWWISE, *MODULATIONS, *VECTORS)), tokens, parts, steps, channels, eps, 0,
        NORM=norm, SUMMED=sum(1 << i for i, name in enumerate((*MODULATIONS, *VECTORS)) if name in partial), ROWS=tile.rows,
        LEVELS=tile.rows.bit_length() - 1, BLOCK=tile.block,
        ALIGNED=aligned(channels, [like.dtype], [like.dtype]), num_warps=tile.warps, num_stages=1, enable_fp_fusion=False, **registers)
    add_up([(sums.view(1, batch * parts, channels), found[name]) for name, sums in partial.items() if name in VECTORS])
    add_up([(sums, found[name]) for name, sums in partial.items() if name in MODULATIONS])
    return tuple(found[name] if name in found else like.new_empty(0) for name in arguments)


adaln_modulate_backward, adaln_modulate_dual_backward, gate_residual_backward, gate_residual_adaln_backward = calls(_backward)
