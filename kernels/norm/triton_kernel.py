"""RMSNorm and LayerNorm in Triton, in the rounding of ``close``: a row stays in registers from its load to its store, in float32.

The backward recomputes the statistics. Each of its programs walks over its own rows and writes one row of sums for weight and bias; PyTorch adds these
up: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.norm.reference import rms_dtype
from fusewire.kernels.norm.triton_picture import layer_norm_2d, layer_norm_2d_backward  # noqa: F401 (the rows look for their launchers here)
from fusewire.kernels.triton_base import as_tokens, inner_contiguous, load_rows, narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import aligned, all_registers, cdiv, row_tile

PROGRAMS = 512  # of the backward: one row of sums each


@triton.jit
def _normalised(b_x, mask, channels, eps, RMS: tl.constexpr):
    """(xhat, 1 / standard deviation): the mean first, then the centred squares, so that nothing cancels."""
    if not RMS:  # the mean in two steps: what rounding left of a large one would be in every element, and come back in every gradient
        b_x = tl.where(mask, b_x - (tl.sum(b_x, 1) / channels)[:, None], 0.0)
        b_x = tl.where(mask, b_x - (tl.sum(b_x, 1) / channels)[:, None], 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / channels + eps)[:, None]
    return b_x * b_rstd, b_rstd


@triton.jit
def _vector(x, o_c, x_c, channels):
    return tl.load(x + o_c.to(tl.int64) * x_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows", "tokens", "origin"])  # no recompilation for each picture size
def norm_kernel(x, x_b, x_t, x_c, weight, weight_c, bias, bias_c, out, rows, tokens, channels, eps, origin,
                RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK)
    if not ALIGNED:
        o_c += origin  # one element an access: fusewire.kernels.tuning.aligned says why
    mask = (i_row < rows)[:, None] & (o_c < channels)[None, :]
    b_x = load_rows(x, i_row // tokens, i_row % tokens, o_c, x_b, x_t, x_c, mask)
    b_y, b_rstd = _normalised(b_x, mask, channels, eps, RMS)
    if weight is not None:
        b_y *= _vector(weight, o_c, weight_c, channels)
    if bias is not None:
        b_y += _vector(bias, o_c, bias_c, channels)
    tl.store(out + ((i_row.to(tl.int64) * channels)[:, None] + o_c[None, :]), narrow(b_y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens", "steps", "origin"])
def norm_backward_kernel(grad, g_b, g_t, g_c, x, x_b, x_t, x_c, weight, weight_c, dx, sums, rows, tokens, steps, channels, eps, origin,
                         RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """``steps`` tiles of rows from the program's first on. sums [programs, 2, C]: of grad * xhat and of grad."""
    i_program = tl.program_id(0)
    o_c = tl.arange(0, BLOCK)
    if not ALIGNED:
        o_c += origin
    if sums is not None:
        b_by_xhat, b_plain = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i_step in range(steps):
        i_row = (i_program * steps + i_step) * ROWS + tl.arange(0, ROWS)
        mask = (i_row < rows)[:, None] & (o_c < channels)[None, :]
        i_b, i_t = i_row // tokens, i_row % tokens
        b_dy = load_rows(grad, i_b, i_t, o_c, g_b, g_t, g_c, mask)
        b_xhat, b_rstd = _normalised(load_rows(x, i_b, i_t, o_c, x_b, x_t, x_c, mask), mask, channels, eps, RMS)
        if sums is not None:
            b_by_xhat += tl.sum(b_dy * b_xhat, 0)
            b_plain += tl.sum(b_dy, 0)
        if dx is not None:
            # dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd, g = dy * weight
            if weight is not None:
                b_dy *= _vector(weight, o_c, weight_c, channels)
            b_dx = b_dy - b_xhat * (tl.sum(b_dy * b_xhat, 1) / channels)[:, None]
            if not RMS:
                b_dx -= (tl.sum(b_dy, 1) / channels)[:, None]
            tl.store(dx + ((i_row.to(tl.int64) * channels)[:, None] + o_c[None, :]), narrow(b_dx * b_rstd, dx.dtype.element_ty), mask=mask)
    if sums is not None:
        i_sums = i_program.to(tl.int64) * 2 * channels
        tl.store(sums + (i_sums + o_c), b_by_xhat, mask=o_c < channels)
        tl.store(sums + (i_sums + channels + o_c), b_plain, mask=o_c < channels)


def _norm(x, weight, bias, eps: float, rms: bool, out) -> torch.Tensor:
    channels = x.shape[-1]
    tile = row_tile(channels, arch_of(x.device))
    x, weight, bias = inner_contiguous(as_tokens(x)), inner_contiguous(weight), inner_contiguous(bias)
    rows = x.shape[0] * x.shape[1]
    read = [tensor.dtype for tensor in (x, weight, bias) if tensor is not None]
    vectors = aligned(channels, read, [out.dtype])
    launch(norm_kernel, cdiv(rows, tile.rows) if channels else 0, x, *strided(x, 3), *strided(weight, 1), *strided(bias, 1), out, rows, x.shape[1],
           channels, eps, 0, RMS=rms, ROWS=tile.rows, BLOCK=tile.block, ALIGNED=vectors,
           num_warps=tile.warps, num_stages=1, enable_fp_fusion=False, **(all_registers(tile.warps, arch_of(x.device)) if vectors and tile.warps == 16 else {}))
    return out


def rms_norm(x, weight, bias, eps: float, as_torch: bool, exact: bool) -> torch.Tensor:
    return _norm(x, weight, bias, eps, True, x.new_empty(x.shape, dtype=rms_dtype(x, weight, bias, as_torch)))


def layer_norm(x, weight, bias, eps: float, wide: bool, exact: bool) -> torch.Tensor:
    return _norm(x, weight, bias, eps, False, x.new_empty(x.shape))


def _backward(grad, x, weight, eps: float, rms: bool, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    channels = x.shape[-1]
    block, tile_rows, warps = row_tile(channels, arch_of(x.device))
    tile_rows = max(tile_rows // 2, 1)  # 8 elements a thread of short rows: the sums take registers
    dx = x.new_empty(x.shape) if of_x else None
    grad, x, weight = inner_contiguous(as_tokens(grad)), inner_contiguous(as_tokens(x)), inner_contiguous(weight)
    rows = x.shape[0] * x.shape[1]
    tiles = cdiv(rows, tile_rows)
    steps = max(cdiv(tiles, PROGRAMS), 1)
    programs = cdiv(tiles, steps)
    sums = x.new_empty((programs, 2, channels), dtype=torch.float32) if of_weight or of_bias else None
    written = [tensor.dtype for tensor in (dx, sums) if tensor is not None]
    read = [tensor.dtype for tensor in (grad, x, weight) if tensor is not None]
    launch(norm_backward_kernel, programs if channels else 0, grad, *strided(grad, 3), *strided(x, 3), *strided(weight, 1), dx, sums, rows, x.shape[1],
           steps, channels, eps, 0, RMS=rms, ROWS=tile_rows, BLOCK=block, ALIGNED=aligned(channels, read, written),
           num_warps=warps, num_stages=1, enable_fp_fusion=False)
    total = [] if sums is None else sums.sum(0).to(x.dtype).unbind(0)
    return (x.new_empty(0) if dx is None else dx, total[0].clone() if of_weight else x.new_empty(0), total[1].clone() if of_bias else x.new_empty(0))


def rms_norm_backward(grad, x, weight, eps: float, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(grad, x, weight, eps, True, of_x, of_weight, of_bias)


def layer_norm_backward(grad, x, weight, eps: float, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(grad, x, weight, eps, False, of_x, of_weight, of_bias)
