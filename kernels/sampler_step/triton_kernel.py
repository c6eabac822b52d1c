"""Guidance and one flow-matching Euler step in Triton: one pass over the latents, the step's scalars read from the table on the device.

Every operation is elementwise, so ``exact`` gives the bits of eager PyTorch on the same device: each rounding of the eager chain is done in
registers, and multiplications are not fused with additions.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fusewire.kernels.sampler_step.reference import halves
from fusewire.kernels.sampler_step.solver_triton import solver_step  # noqa: F401: the row looks for its launcher here
from fusewire.kernels.triton_base import element_block, elementwise, load_elements, narrow, rounded
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import cdiv, flat_tile


@triton.jit(do_not_specialize=["step", "steps", "n_1", "n_2", "blocks", "table_column"])
def flow_euler_kernel(
    sample, sample_0, sample_1, sample_2, sample_3, cond, cond_0, cond_1, cond_2, cond_3, uncond, uncond_0, uncond_1, uncond_2, uncond_3,
    out, out_0, out_1, out_2, out_3, table, table_row, table_column, steps, step, counter, n_1, n_2, n_3, blocks,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):
    """sample + dt * (uncond + guidance * (cond - uncond)) over [n_0, n_1, n_2, n_3]; uncond None: no guidance. One program: a block of n_3."""
    i_0, i_1, i_2, o, mask = element_block(n_1, n_2, n_3, blocks, BLOCK)
    row = step if counter is None else tl.load(counter)
    # A row outside the table gives NaN, not whatever lies beside it
    inside = (row >= 0) & (row < steps)
    p_row = table + row.to(tl.int64) * table_row
    dt = tl.load(p_row, mask=inside, other=float("nan")).to(tl.float32)

    dtype: tl.constexpr = cond.dtype.element_ty
    b_v = load_elements(cond, cond_0, cond_1, cond_2, cond_3, i_0, i_1, i_2, o, mask)
    if uncond is not None:
        guidance = tl.load(p_row + table_column.to(tl.int64), mask=inside, other=float("nan")).to(tl.float32)
        b_u = load_elements(uncond, uncond_0, uncond_1, uncond_2, uncond_3, i_0, i_1, i_2, o, mask)
        if EXACT:
            b_v = rounded(b_u + rounded(guidance * rounded(b_v - b_u, dtype), dtype), dtype)
        else:
            b_v = b_u + guidance * (b_v - b_u)
    b_x = load_elements(sample, sample_0, sample_1, sample_2, sample_3, i_0, i_1, i_2, o, mask)
    if EXACT:
        # dt is a 0-dim tensor in the eager step: promotion casts it to the output's dtype before the multiplication
        b_x += rounded(rounded(dt, dtype) * b_v, dtype)
    else:
        b_x += dt * b_v
    tl.store(out + i_0 * out_0 + i_1 * out_1 + i_2 * out_2 + o * out_3, narrow(b_x, out.dtype.element_ty), mask=mask)


def flow_euler_step(sample, model_output, uncond, table, step: int, counter, exact: bool) -> torch.Tensor:
    cond, uncond = halves(model_output, uncond, sample.shape[0])
    out = sample.new_empty(sample.shape, dtype=cond.dtype)
    sizes, (sample, cond, uncond, out_view) = elementwise(out, sample, cond, uncond, out)
    block, warps = flat_tile(sizes[3], arch_of(out.device))
    blocks = cdiv(sizes[3], block)
    launch(
        flow_euler_kernel, math.prod(sizes[:3]) * blocks, out, *sample, *cond, *uncond, *out_view,
        table, *table.stride(), table.shape[0], step, counter, *sizes[1:], blocks,
        EXACT=exact, BLOCK=block, num_warps=warps, num_stages=1, enable_fp_fusion=False,
    )
    return out
