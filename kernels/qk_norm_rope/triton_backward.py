"""The gradients of QK norm with rotary embedding in Triton, in the rounding of ``close``: each head's row read once.

A program walks over some rows (b, t, h) of q or of k: it turns their gradients back, recomputes the norm in registers and adds up what the weight
gets. How the rows are shared out depends on their number alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.triton_base import inner_contiguous, narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.triton_sums import add_up, sum_of_rows
from fusewire.kernels.tuning import Arch, RowTile, aligned, cdiv, row_tile

PARTS = 1024  # of the rows of q or of k where a weight is there: one program and one row of partial sums each


# Sizes that change with the resolution are not specialised on: no recompilation for each picture size
@triton.jit(do_not_specialize=["steps", "rows", "tokens", "heads", "origin"])
def qk_norm_rope_backward_kernel(
    grad, g_b, g_t, g_h, g_d, x, x_b, x_t, x_h, x_d, weight, weight_d, cos, sin, dx, sums,
    steps, rows, tokens, heads, dim, eps, origin, ROWS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Of q or of k: ``steps`` tiles of rows from the program's first on. sums [programs, D]: of the gradient turned back times xhat."""
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    if not ALIGNED:
        o_d += origin  # one element an access: fusewire.kernels.tuning.aligned says why
    o_d64 = o_d.to(tl.int64)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_step in range(steps):
        i_row = (i_program * steps + i_step) * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        mask = m_row[:, None] & (o_d < dim)[None, :]
        i_h, i_bt = (i_row % heads).to(tl.int64), i_row // heads
        i_t, i_b = (i_bt % tokens).to(tl.int64), (i_bt // tokens).to(tl.int64)

        b_x = tl.load(x + (i_b * x_b + i_t * x_t + i_h * x_h)[:, None] + o_d64[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)
        b_g = tl.load(grad + (i_b * g_b + i_t * g_t + i_h * g_h)[:, None] + o_d64[None, :] * g_d, mask=mask, other=0.0).to(tl.float32)
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / dim + eps)[:, None]
        b_xhat = tl.where(mask, b_x * b_rstd, 0.0)  # rows that are not there: 0, whatever 1 / sqrt(eps) is
        if cos is not None:
            # (even, odd) was turned to (even cos - odd sin, odd cos + even sin): its gradient is turned the other way
            o_pair = tl.arange(0, BLOCK // 2)
            m_pair = m_row[:, None] & (o_pair < dim // 2)[None, :]
            o_table = (i_t * (dim // 2))[:, None] + o_pair[None, :]
            b_cos, b_sin = tl.load(cos + o_table, mask=m_pair, other=1.0), tl.load(sin + o_table, mask=m_pair, other=0.0)
            b_even, b_odd = tl.split(tl.reshape(b_g, (ROWS, BLOCK // 2, 2)))
            b_g = tl.reshape(tl.join(b_even * b_cos + b_odd * b_sin, b_odd * b_cos - b_even * b_sin), (ROWS, BLOCK))
        if sums is not None:
            b_sum += b_g * b_xhat
        # dx = (g - xhat * mean(g * xhat)) * rstd, g = grad * weight
        if weight is not None:
            b_g *= tl.load(weight + o_d64 * weight_d, mask=o_d < dim, other=0.0).to(tl.float32)[None, :]
        b_dx = (b_g - b_xhat * (tl.sum(b_g * b_xhat, 1) / dim)[:, None]) * b_rstd
        tl.store(dx + ((i_row.to(tl.int64) * dim)[:, None] + o_d[None, :]), narrow(b_dx, dx.dtype.element_ty), mask=mask)
    if sums is not None:
        tl.store(sums + (i_program.to(tl.int64) * dim + o_d), sum_of_rows(b_sum, LEVELS, BLOCK), mask=o_d < dim)


def _tile(dim: int, itemsize: int, arch: Arch) -> RowTile:
    """One 16-byte access a thread, 4 where each element has an address of its own: gradient, row, tables and sums side by side leave no more registers."""
    block, rows, warps = row_tile(dim, arch)
    return RowTile(block, rows // 2, warps if itemsize == 2 and dim % 16 == 0 else 2 * warps)


def _table(table: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous, and where a vector may start: after the rotation the sums' order follows the tables' vectors."""
    if table is None or table.is_contiguous() and table.data_ptr() % 16 == 0:
        return table
    return table.clone(memory_format=torch.contiguous_format)


def _gradients(grad, x, weight, cos, sin, eps: float, of_x: bool, of_weight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of q or k, and of its weight; one that is not wanted has no elements."""
    dim, dtype = x.shape[3], x.dtype
    if not (of_x or of_weight):
        return x.new_empty(0), x.new_empty(0)
    tile = _tile(dim, dtype.itemsize, arch_of(x.device))
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    tiles = cdiv(rows, tile.rows)
    steps = max(cdiv(tiles, PARTS), 1) if of_weight else 1
    programs = cdiv(tiles, steps)
    dx = x.new_empty(x.shape)  # written even where it is not asked for: the order of the sums follows the widest store
    sums = x.new_empty((1, programs, dim), dtype=torch.float32) if of_weight else None
    launch(
        qk_norm_rope_backward_kernel, programs if dim else 0, x, *strided(inner_contiguous(grad), 4), *strided(inner_contiguous(x), 4),
        *strided(inner_contiguous(weight), 1), cos, sin, dx, sums, steps, rows, x.shape[1], x.shape[2], dim, eps, 0,
        ROWS=tile.rows, LEVELS=tile.rows.bit_length() - 1, BLOCK=tile.block, ALIGNED=aligned(dim, [dtype], [dtype]),
        num_warps=tile.warps, num_stages=1, enable_fp_fusion=False)
    if not of_weight:
        return dx, x.new_empty(0)
    total = x.new_empty(dim)
    add_up([(sums, total.unsqueeze(0))])
    return dx if of_x else x.new_empty(0), total


def qk_norm_rope_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps: float, wanted: int) -> tuple[torch.Tensor, ...]:
    """As the reference's, all of one dtype; bit i of ``wanted`` asks for the gradient of the i-th of q, k, q_weight and k_weight."""
    cos, sin = _table(cos), _table(sin)
    dq, dq_weight = _gradients(q_grad, q, q_weight, cos, sin, eps, bool(wanted & 1), q_weight is not None and bool(wanted & 4))
    dk, dk_weight = _gradients(k_grad, k, k_weight, cos, sin, eps, bool(wanted & 2), k_weight is not None and bool(wanted & 8))
    return dq, dk, dq_weight, dk_weight
