"""adaLN in Triton: gated sums, norm and up to two modulations of a row in one pass over memory.

``close`` computes everything in one kernel, in float32, with the row in registers: mean, then the centred squares (no cancellation). ``exact``
leaves the norm itself to PyTorch's own kernel, whose order of summation belongs to it, and fuses the elementwise parts around it, rounding
in registers where eager PyTorch rounds in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.adaln.backward_calls import LAYER, NONE, RMS
from fusewire.kernels.adaln.reference import normalise, normalised_dtype
from fusewire.kernels.adaln.triton_backward import (  # noqa: F401 (the launchers of the room's Triton rows are looked up here)
    adaln_modulate_backward,
    adaln_modulate_dual_backward,
    gate_residual_adaln_backward,
    gate_residual_backward,
)
from fusewire.kernels.rounding import promoted
from fusewire.kernels.triton_base import TYPES, inner_contiguous, load_rows, narrow, over_tokens, rounded, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import aligned, all_registers, cdiv, row_tile


@triton.jit
def _add_gated(b_x, y, i_b, i_t, o_c, y_b, y_t, y_c, gate, g_b, g_t, g_c, mask, PRODUCT: tl.constexpr, SUM: tl.constexpr, EXACT: tl.constexpr):
    """b_x + gate * y"""
    b_y = load_rows(y, i_b, i_t, o_c, y_b, y_t, y_c, mask)
    b_gate = load_rows(gate, i_b, i_t, o_c, g_b, g_t, g_c, mask)
    if EXACT:
        return rounded(b_x + rounded(b_gate * b_y, PRODUCT), SUM)
    return b_x + b_gate * b_y


@triton.jit
def _modulate(b_n, shift, h_b, h_t, h_c, scale, s_b, s_t, s_c, i_b, i_t, o_c, mask, SCALED: tl.constexpr, EXACT: tl.constexpr):
    """b_n * (1 + scale) + shift"""
    b_scale = 1.0 + load_rows(scale, i_b, i_t, o_c, s_b, s_t, s_c, mask)
    b_shift = load_rows(shift, i_b, i_t, o_c, h_b, h_t, h_c, mask)
    if EXACT:
        return rounded(b_n * rounded(b_scale, scale.dtype.element_ty), SCALED) + b_shift
    return b_n * b_scale + b_shift


@triton.jit(do_not_specialize=["rows", "tokens", "origin"])  # no recompilation for each picture size
def adaln_kernel(
    x, x_b, x_t, x_c,
    y, y_b, y_t, y_c, gate, gate_b, gate_t, gate_c,
    y2, y2_b, y2_t, y2_c, gate2, gate2_b, gate2_t, gate2_c,
    weight, weight_c, bias, bias_c,
    shift, shift_b, shift_t, shift_c, scale, scale_b, scale_t, scale_c,
    shift2, shift2_b, shift2_t, shift2_c, scale2, scale2_b, scale2_t, scale2_c,
    residual, out, out2,
    rows, tokens, channels, eps, origin,
    GATES: tl.constexpr, NORM: tl.constexpr, MODULATIONS: tl.constexpr, EXACT: tl.constexpr,
    GATED: tl.constexpr, SUM: tl.constexpr, GATED2: tl.constexpr, SCALED: tl.constexpr, SCALED2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_c = tl.arange(0, BLOCK)
    if not ALIGNED:
        # An offset of unknown alignment keeps every access one element wide. Vector widths would otherwise follow the inputs' alignment,
        # the order of the sums would follow the vector width, and equal values in another layout could give other bits.
        o_c += origin
    mask = (i_row < rows)[:, None] & (o_c < channels)[None, :]
    i_b, i_t = i_row // tokens, i_row % tokens

    b_x = load_rows(x, i_b, i_t, o_c, x_b, x_t, x_c, mask)
    if GATES >= 1:
        b_x = _add_gated(b_x, y, i_b, i_t, o_c, y_b, y_t, y_c, gate, gate_b, gate_t, gate_c, mask, GATED, SUM, EXACT)
    if GATES >= 2:
        b_x = _add_gated(b_x, y2, i_b, i_t, o_c, y2_b, y2_t, y2_c, gate2, gate2_b, gate2_t, gate2_c, mask, GATED2, residual.dtype.element_ty, EXACT)
    o_out = (i_row.to(tl.int64) * channels)[:, None] + o_c[None, :]
    if GATES >= 1:
        tl.store(residual + o_out, narrow(b_x, residual.dtype.element_ty), mask=mask)

    if NORM == 1:
        # The mean in two steps: the second finds what the first lost beside a large mean
        b_x = tl.where(mask, b_x - (tl.sum(b_x, 1) / channels)[:, None], 0.0)
        b_x = tl.where(mask, b_x - (tl.sum(b_x, 1) / channels)[:, None], 0.0)
    if NORM >= 1:
        b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / channels + eps)[:, None]
        if weight is not None:
            b_x *= tl.load(weight + o_c.to(tl.int64) * weight_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            b_x += tl.load(bias + o_c.to(tl.int64) * bias_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]

    if MODULATIONS >= 1:
        b_out = _modulate(b_x, shift, shift_b, shift_t, shift_c, scale, scale_b, scale_t, scale_c, i_b, i_t, o_c, mask, SCALED, EXACT)
        tl.store(out + o_out, narrow(b_out, out.dtype.element_ty), mask=mask)
    if MODULATIONS >= 2:
        b_out = _modulate(b_x, shift2, shift2_b, shift2_t, shift2_c, scale2, scale2_b, scale2_t, scale2_c, i_b, i_t, o_c, mask, SCALED2, EXACT)
        tl.store(out2 + o_out, narrow(b_out, out2.dtype.element_ty), mask=mask)


def _product(a: torch.dtype, *tensors):
    return TYPES[promoted(a, *tensors)]


def _launch(x, gated, norm: int, weight, bias, modulations, eps: float, exact: bool, outputs) -> None:
    """``gated``: pairs (y, gate); ``modulations``: pairs (shift, scale); ``outputs``: the residual where there is a gate, then one for each modulation."""
    batch, tokens, channels = x.shape
    rows = batch * tokens
    (y, gate), (y2, gate2) = (*gated, (None, None), (None, None))[:2]
    (shift, scale), (shift2, scale2) = (*modulations, (None, None), (None, None))[:2]
    if norm != NONE:
        x, y, gate, y2, gate2, weight, bias, shift, scale, shift2, scale2 = (
            inner_contiguous(tensor) for tensor in (x, y, gate, y2, gate2, weight, bias, shift, scale, shift2, scale2))
    residual = outputs[0] if gated else None
    out, out2 = (*outputs[len(outputs) - len(modulations):], None, None)[:2]
    dtype = x.dtype
    read = [tensor.dtype for tensor in (x, y, gate, y2, gate2, weight, bias, shift, scale, shift2, scale2) if tensor is not None]
    vectors = norm == NONE or aligned(channels, read, [output.dtype for output in outputs])
    # Measured on an H200: 16-bit rows gain 12 % from 32 elements a thread, float32 nothing. Where each has an address of its own, registers hold 16
    arch = arch_of(x.device)
    tile = row_tile(channels, arch, 64 // x.dtype.itemsize if vectors else 16)
    launch(
        adaln_kernel, cdiv(rows, tile.rows) if channels else 0, x,
        *strided(x, 3), *strided(y, 3), *over_tokens(gate), *strided(y2, 3), *over_tokens(gate2),
        *strided(weight, 1), *strided(bias, 1),
        *over_tokens(shift), *over_tokens(scale), *over_tokens(shift2), *over_tokens(scale2),
        residual, out, out2, rows, tokens, channels, eps, 0,
        GATES=len(gated), NORM=norm, MODULATIONS=len(modulations), EXACT=exact,
        GATED=y if y is None else _product(y.dtype, gate), SUM=y if y is None else _product(dtype, y, gate),
        GATED2=y2 if y2 is None else _product(y2.dtype, gate2),
        SCALED=scale if scale is None else _product(dtype, scale), SCALED2=scale2 if scale2 is None else _product(dtype, scale2),
        ROWS=tile.rows, BLOCK=tile.block, ALIGNED=vectors,
        num_warps=tile.warps, num_stages=1, enable_fp_fusion=False,  # a fused multiply-add would skip the product's rounding
        **({} if vectors or tile.block <= 8192 else all_registers(tile.warps, arch)),
    )


def adaln_modulate(x, shift, scale, weight, bias, eps: float, rms: bool, exact: bool) -> torch.Tensor:
    dtype = normalised_dtype(x.dtype, weight, bias, rms)
    out = x.new_empty(x.shape, dtype=promoted(dtype, scale, shift))
    if exact:
        _launch(normalise(x, weight, bias, eps, rms), (), NONE, None, None, ((shift, scale),), eps, True, (out,))
    else:
        _launch(x, (), RMS if rms else LAYER, weight, bias, ((shift, scale),), eps, False, (out,))
    return out


def adaln_modulate_dual(x, shift, scale, shift2, scale2, weight, bias, eps: float, rms: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, modulations = normalised_dtype(x.dtype, weight, bias, rms), ((shift, scale), (shift2, scale2))
    outputs = tuple(x.new_empty(x.shape, dtype=promoted(dtype, *modulation)) for modulation in modulations)
    if exact:
        _launch(normalise(x, weight, bias, eps, rms), (), NONE, None, None, modulations, eps, True, outputs)
    else:
        _launch(x, (), RMS if rms else LAYER, weight, bias, modulations, eps, False, outputs)
    return outputs


def gate_residual(x, y, gate, exact: bool) -> torch.Tensor:
    out = x.new_empty(x.shape, dtype=promoted(x.dtype, y, gate))
    _launch(x, ((y, gate),), NONE, None, None, (), 0.0, exact, (out,))
    return out


def gate_residual_adaln(x, y, gate, y2, gate2, shift, scale, weight, bias, eps: float, rms: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    gated = ((y, gate),) if y2 is None else ((y, gate), (y2, gate2))
    residual = x.new_empty(x.shape, dtype=promoted(x.dtype, y, gate, y2, gate2))
    if exact:
        _launch(x, gated, NONE, None, None, (), eps, True, (residual,))
        return residual, adaln_modulate(residual, shift, scale, weight, bias, eps, rms, True)
    out = x.new_empty(x.shape, dtype=promoted(normalised_dtype(residual.dtype, weight, bias, rms), scale, shift))
    _launch(x, gated, RMS if rms else LAYER, weight, bias, ((shift, scale),), eps, False, (residual, out))
    return residual, out
