"""A step of a solver in Triton: one pass over the latents, the step's scalars read from the table on the device.

Each rounding of the eager chain is done in registers, and multiplications are not fused with additions: ``exact`` gives the reference's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.sampler_step.solver_reference import contiguous_operands, empty_results
from fusewire.kernels.sampler_step.tables import PLACE
from fusewire.kernels.triton_base import narrow, rounded
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import flat_tile

(GUIDANCE, X0_X, X_DIVISOR, X0_M, X0_DIVISOR, X0_LIMIT, E_X, E_M, E_X0, E_DIVISOR, E_PREVIOUS, E_SCALE, X, X0, E, SCALE, NOISE, KNOWN,
 KNOWN_NOISE) = (tl.constexpr(place) for place in PLACE.values())


@triton.jit
def _scalar(p_row, table_column, inside, COLUMN: tl.constexpr):
    # A row outside the table gives NaN, not whatever lies beside it
    return tl.load(p_row + COLUMN * table_column.to(tl.int64), mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _as_stored(b, dtype: tl.constexpr, ROUND: tl.constexpr):
    if ROUND:
        b = rounded(b, dtype)
    return b


@triton.jit
def _term(coefficient, b, dtype: tl.constexpr, ROUND: tl.constexpr):
    return tl.where(coefficient != 0, _as_stored(coefficient * b, dtype, ROUND), 0.0)


@triton.jit
def _divided(b, divisor, RECIPROCAL: tl.constexpr):
    if RECIPROCAL:
        b = b * tl.div_rn(1.0, divisor)
    else:
        b = tl.div_rn(b, tl.zeros_like(b) + divisor)
    return b


@triton.jit
def _load(x, o, mask):
    return tl.load(x + o, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["step", "steps", "table_column"])
def solver_kernel(
    sample, cond, uncond, previous, base, noise, mask, known, known_noise, out, x0, slope, table, table_row, table_column, steps, step, counter, n,
    WIDE_X0: tl.constexpr, WIDE_OUT: tl.constexpr, RECIPROCAL: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):
    """All operands are contiguous, of n elements. One program: a block of them."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o < n
    row = step if counter is None else tl.load(counter)
    inside = (row >= 0) & (row < steps)
    p = table + row.to(tl.int64) * table_row
    dtype: tl.constexpr = cond.dtype.element_ty
    OF_X0: tl.constexpr = EXACT and not WIDE_X0
    OF_OUT: tl.constexpr = EXACT and not WIDE_OUT

    b_x, b_m = _load(sample, o, m_n), _load(cond, o, m_n)
    if uncond is not None:
        b_u = _load(uncond, o, m_n)
        guidance = _scalar(p, table_column, inside, GUIDANCE)
        b_m = _as_stored(b_u + _as_stored(guidance * _as_stored(b_m - b_u, dtype, EXACT), dtype, EXACT), dtype, EXACT)

    b_x0 = _term(_scalar(p, table_column, inside, X0_X), b_x, dtype, OF_X0)
    b_x0 = _as_stored(_divided(b_x0, _scalar(p, table_column, inside, X_DIVISOR), RECIPROCAL), dtype, OF_X0)
    b_x0 = _as_stored(b_x0 + _term(_scalar(p, table_column, inside, X0_M), b_m, dtype, EXACT), dtype, OF_X0)
    b_x0 = _as_stored(_divided(b_x0, _scalar(p, table_column, inside, X0_DIVISOR), RECIPROCAL), dtype, OF_X0)
    limit = _scalar(p, table_column, inside, X0_LIMIT)
    limit = tl.where(limit > 0, limit, float("inf"))
    b_x0 = tl.where(b_x0 > limit, limit, b_x0)  # a NaN passes
    b_x0 = tl.where(b_x0 < -limit, -limit, b_x0)

    b_e = _term(_scalar(p, table_column, inside, E_X), b_x, dtype, OF_X0)
    b_e = _as_stored(b_e + _term(_scalar(p, table_column, inside, E_M), b_m, dtype, EXACT), dtype, OF_X0)
    b_e = _as_stored(b_e + _term(_scalar(p, table_column, inside, E_X0), b_x0, dtype, OF_X0), dtype, OF_X0)
    b_e = _as_stored(_divided(b_e, _scalar(p, table_column, inside, E_DIVISOR), RECIPROCAL), dtype, OF_X0)
    if previous is not None:
        b_e = _as_stored(b_e + _term(_scalar(p, table_column, inside, E_PREVIOUS), _load(previous, o, m_n), dtype, OF_X0), dtype, OF_X0)
    b_e = _as_stored(b_e * _scalar(p, table_column, inside, E_SCALE), dtype, OF_X0)

    if base is not None:
        b_x = _load(base, o, m_n)
    b_out = _term(_scalar(p, table_column, inside, X), b_x, dtype, OF_OUT)
    b_out = _as_stored(b_out + _term(_scalar(p, table_column, inside, X0), b_x0, dtype, OF_X0), dtype, OF_OUT)
    b_out = _as_stored(b_out + _term(_scalar(p, table_column, inside, E), b_e, dtype, OF_X0), dtype, OF_OUT)
    b_out = _as_stored(b_out * _scalar(p, table_column, inside, SCALE), dtype, OF_OUT)
    if noise is not None:
        OF_NOISE: tl.constexpr = EXACT and noise.dtype.element_ty == dtype
        b_out = _as_stored(b_out + _term(_scalar(p, table_column, inside, NOISE), _load(noise, o, m_n), dtype, OF_NOISE), dtype, OF_OUT)
    if mask is not None:
        b_mask, b_known = _load(mask, o, m_n), _load(known, o, m_n)
        if known_noise is not None:
            b_known = _as_stored(_scalar(p, table_column, inside, KNOWN) * b_known, dtype, EXACT)
            b_noise = _as_stored(_scalar(p, table_column, inside, KNOWN_NOISE) * _load(known_noise, o, m_n), dtype, EXACT)
            b_known = _as_stored(b_known + b_noise, dtype, EXACT)
        b_known = _as_stored(_as_stored(1 - b_mask, dtype, EXACT) * b_known, dtype, EXACT)
        b_out = b_known + _as_stored(b_mask * _as_stored(b_out, dtype, EXACT), dtype, EXACT)
    tl.store(out + o, narrow(b_out, out.dtype.element_ty), mask=m_n)
    tl.store(x0 + o, narrow(b_x0, x0.dtype.element_ty), mask=m_n)
    if slope is not None:
        tl.store(slope + o, narrow(b_e, slope.dtype.element_ty), mask=m_n)


def solver_step(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, table, step: int, counter, wide_x0: bool, wide_out: bool,
                keep_slope: bool, reciprocal: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = contiguous_operands(sample, model_output, uncond, previous, base, noise, mask, known, known_noise)
    out, x0, slope = empty_results(sample, wide_x0, keep_slope)
    block, warps = flat_tile(sample.numel(), arch_of(sample.device))
    launch(
        solver_kernel, triton.cdiv(sample.numel(), block), out, *flat, out, x0, slope if keep_slope else None,
        table, *table.stride(), table.shape[0], step, counter, sample.numel(),
        WIDE_X0=wide_x0, WIDE_OUT=wide_out, RECIPROCAL=reciprocal, EXACT=exact, BLOCK=block, num_warps=warps, num_stages=1, enable_fp_fusion=False,
    )
    return out, x0, slope
