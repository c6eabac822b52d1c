"""QK norm with rotary embedding in Triton: q and k in one launch, each head's row read once and written once, wherever it is to go.

``close`` norms, weighs and rotates in float32 registers. ``exact`` takes the reciprocal root from PyTorch's own reduction (for torch.nn.RMSNorm:
the norm itself) and fuses the rest, rounding where the stock modules round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fusewire.kernels.qk_norm_rope.reference import ROTATION, TORCH_RMS, result_dtype
from fusewire.kernels.qk_norm_rope.triton_backward import qk_norm_rope_backward  # noqa: F401 (the row looks for its launcher here)
from fusewire.kernels.triton_base import TYPES, inner_contiguous, narrow, rounded, strided, vector_aligned
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import aligned, cdiv, row_tile

NONE, GIVEN, COMPUTED = 0, 1, 2  # the reciprocal root mean square: not applied, read, computed


@triton.jit
def _norm_rope(
    i_tile, x, x_b, x_t, x_h, x_d, weight, weight_d, rstd, out, out_b, out_t, out_h, out_d,
    cos, cos_t, cos_d, sin, sin_t, sin_d, rows, tokens, heads, dim, eps, origin,
    ROOT: tl.constexpr, NORMED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    """One tile of rows (b, t, h) of q or of k. NORMED: the dtype that the stock norm rounds to before the weight."""
    i_row = i_tile * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK)
    if not ALIGNED:
        o_d += origin  # one element an access: fusewire.kernels.tuning.aligned says why
    m_row = i_row < rows
    mask = m_row[:, None] & (o_d < dim)[None, :]
    i_h, i_bt = (i_row % heads).to(tl.int64), i_row // heads
    i_t, i_b = (i_bt % tokens).to(tl.int64), (i_bt // tokens).to(tl.int64)

    b_x = tl.load(x + (i_b * x_b + i_t * x_t + i_h * x_h)[:, None] + o_d.to(tl.int64)[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)
    if ROOT == 1:
        b_x *= tl.load(rstd + i_row.to(tl.int64), mask=m_row, other=0.0)[:, None]
    if ROOT == 2:
        b_x *= tl.rsqrt(tl.sum(b_x * b_x, 1) / dim + eps)[:, None]
    if EXACT:
        b_x = rounded(b_x, NORMED)
    if weight is not None:
        b_x *= tl.load(weight + o_d.to(tl.int64) * weight_d, mask=o_d < dim, other=0.0).to(tl.float32)[None, :]
        if EXACT:
            b_x = rounded(b_x, out.dtype.element_ty)
    if cos is not None:
        o_pair = tl.arange(0, BLOCK // 2)
        m_pair = m_row[:, None] & (o_pair < dim // 2)[None, :]
        b_cos = tl.load(cos + (i_t * cos_t)[:, None] + o_pair.to(tl.int64)[None, :] * cos_d, mask=m_pair, other=1.0)
        b_sin = tl.load(sin + (i_t * sin_t)[:, None] + o_pair.to(tl.int64)[None, :] * sin_d, mask=m_pair, other=0.0)
        b_even, b_odd = tl.split(tl.reshape(b_x, (ROWS, BLOCK // 2, 2)))
        # (even, odd) -> (even cos - odd sin, odd cos + even sin)
        b_x = tl.reshape(tl.join(b_even * b_cos - b_odd * b_sin, b_odd * b_cos + b_even * b_sin), (ROWS, BLOCK))
    p_out = out + (i_b * out_b + i_t * out_t + i_h * out_h)[:, None] + o_d.to(tl.int64)[None, :] * out_d
    tl.store(p_out, narrow(b_x, out.dtype.element_ty), mask=mask)


# Sizes that change with the resolution are not specialised on: no recompilation for each picture size
@triton.jit(do_not_specialize=["origin", "q_tiles", "q_rows", "q_tokens", "q_heads", "k_rows", "k_tokens", "k_heads"])
def qk_norm_rope_kernel(
    q, q_b, q_t, q_h, q_d, q_weight, q_weight_d, q_rstd, q_out, qo_b, qo_t, qo_h, qo_d, q_rows, q_tokens, q_heads,
    k, k_b, k_t, k_h, k_d, k_weight, k_weight_d, k_rstd, k_out, ko_b, ko_t, ko_h, ko_d, k_rows, k_tokens, k_heads,
    cos, cos_t, cos_d, sin, sin_t, sin_d, dim, eps, origin, q_tiles,
    ROOT: tl.constexpr, Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    i_tile = tl.program_id(0)
    if i_tile < q_tiles:
        _norm_rope(i_tile, q, q_b, q_t, q_h, q_d, q_weight, q_weight_d, q_rstd, q_out, qo_b, qo_t, qo_h, qo_d,
                   cos, cos_t, cos_d, sin, sin_t, sin_d, q_rows, q_tokens, q_heads, dim, eps, origin, ROOT, Q_NORMED, EXACT, ROWS, BLOCK, ALIGNED)
    else:
        _norm_rope(i_tile - q_tiles, k, k_b, k_t, k_h, k_d, k_weight, k_weight_d, k_rstd, k_out, ko_b, ko_t, ko_h, ko_d,
                   cos, cos_t, cos_d, sin, sin_t, sin_d, k_rows, k_tokens, k_heads, dim, eps, origin, ROOT, K_NORMED, EXACT, ROWS, BLOCK, ALIGNED)


def _stock_root(x, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) for each row, by the calls of diffusers' RMSNorm on a contiguous x."""
    return torch.rsqrt(x.to(torch.float32, memory_format=torch.contiguous_format).pow(2).mean(-1, keepdim=True) + eps)


def _launch(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps: float, exact: bool, root: int) -> None:
    dim = q.shape[3]
    tile = row_tile(dim, arch_of(q.device))
    if root == COMPUTED:
        q, k, q_weight, k_weight, cos, sin = (inner_contiguous(tensor) for tensor in (q, k, q_weight, k_weight, cos, sin))
    roots = [_stock_root(x, eps) if root == GIVEN else None for x in (q, k)]
    q_rows, k_rows = (x.shape[0] * x.shape[1] * x.shape[2] for x in (q, k))
    q_tiles = cdiv(q_rows, tile.rows)
    read = [tensor.dtype for tensor in (q, k, q_weight, k_weight) if tensor is not None]
    # float32 weights are multiplied before any rounding; without a weight, and before a 16-bit one, the stock norm rounds
    normed = [TYPES[x.dtype if weight is None else weight.dtype] for x, weight in ((q, q_weight), (k, k_weight))]
    launch(
        qk_norm_rope_kernel, (q_tiles + cdiv(k_rows, tile.rows)) if dim else 0, q,
        *strided(q, 4), *strided(q_weight, 1), roots[0], *strided(q_out, 4), q_rows, q.shape[1], q.shape[2],
        *strided(k, 4), *strided(k_weight, 1), roots[1], *strided(k_out, 4), k_rows, k.shape[1], k.shape[2],
        *strided(cos, 2), *strided(sin, 2), dim, eps, 0, q_tiles,
        ROOT=root, Q_NORMED=normed[0], K_NORMED=normed[1], EXACT=exact, ROWS=tile.rows, BLOCK=tile.block,
        ALIGNED=root != COMPUTED or aligned(dim, read, [q_out.dtype, k_out.dtype]),
        num_warps=tile.warps, num_stages=1, enable_fp_fusion=False,
    )


def qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps: float, norm: int, exact: bool) -> None:
    if norm == ROTATION:
        _launch(q, k, None, None, q_out, k_out, cos, sin, eps, exact, NONE)
        return
    if exact and norm == TORCH_RMS:
        q, k = (F.rms_norm(x.contiguous(), x.shape[-1:], weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
        if cos is None:
            q_out.copy_(q)
            k_out.copy_(k)
        else:
            _launch(q, k, None, None, q_out, k_out, cos, sin, eps, True, NONE)
        return
    if not exact and q.shape[3] % 16 == 0 and not (vector_aligned(q_out) and vector_aligned(k_out)):
        # The outputs' vectors decide the order of the sums: results of equal bits need them, so unaligned outputs are copied to
        q_new, k_new = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact)
        q_out.copy_(q_new)
        k_out.copy_(k_new)
        return
    _launch(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, exact, GIVEN if exact else COMPUTED)


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps: float, norm: int, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = (x.new_empty(x.shape, dtype=result_dtype(x, weight, norm)) for x, weight in ((q, q_weight), (k, k_weight)))
    qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact)
    return q_out, k_out
