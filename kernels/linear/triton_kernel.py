"""The epilogue of a linear layer in Triton, over what the GEMM library returned: bias and activation, or gate and residual, in one pass; and the
gradients of bias and activation.

The matrix product itself stays cuBLAS's (hipBLASLt's). With ``exact`` each operation rounds as eager PyTorch's does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fusewire.kernels.linear.reference import over_tokens
from fusewire.kernels.linear.triton_backward import bias_activation_backward  # noqa: F401 (the row looks for its launcher here)
from fusewire.kernels.plans import Planned
from fusewire.kernels.triton_base import TYPES, element_block, elementwise, load_elements, narrow, rounded
from fusewire.kernels.triton_launch import arch_of, launch, visible
from fusewire.kernels.tuning import cdiv, flat_tile


@triton.jit
def _activated(b_y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u) has no cancellation where u is large and negative
        return b_y * tl.sigmoid(1.5957691216057308 * (b_y + 0.044715 * b_y * b_y * b_y))
    if ACTIVATION == "gelu":
        return 0.5 * b_y * (1.0 + tl.erf(b_y * 0.7071067811865476))
    if ACTIVATION == "silu":
        return b_y * tl.sigmoid(b_y)
    return b_y


@triton.jit(do_not_specialize=["n_1", "n_2", "blocks"])
def epilogue_kernel(
    y, y_0, y_1, y_2, y_3, bias, bias_0, bias_1, bias_2, bias_3, gate, gate_0, gate_1, gate_2, gate_3,
    residual, residual_0, residual_1, residual_2, residual_3, out, out_0, out_1, out_2, out_3, n_1, n_2, n_3, blocks,
    ACTIVATION: tl.constexpr, PRODUCT: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):
    """act(y + bias), or residual + gate * (y + bias), over [n_0, n_1, n_2, n_3]. One program: a block of n_3. ``out`` may be ``y``."""
    i_0, i_1, i_2, o, mask = element_block(n_1, n_2, n_3, blocks, BLOCK)
    b_y = load_elements(y, y_0, y_1, y_2, y_3, i_0, i_1, i_2, o, mask)
    if bias is not None:
        b_y += load_elements(bias, bias_0, bias_1, bias_2, bias_3, i_0, i_1, i_2, o, mask)
    b_y = _activated(b_y, ACTIVATION)
    if gate is not None:
        b_y *= load_elements(gate, gate_0, gate_1, gate_2, gate_3, i_0, i_1, i_2, o, mask)
        if EXACT:
            b_y = rounded(b_y, PRODUCT)
    if residual is not None:
        b_y += load_elements(residual, residual_0, residual_1, residual_2, residual_3, i_0, i_1, i_2, o, mask)
    tl.store(out + i_0 * out_0 + i_1 * out_1 + i_2 * out_2 + o * out_3, narrow(b_y, out.dtype.element_ty), mask=mask)


def _write(y, bias, activation: str, gate, residual, exact: bool, out) -> None:
    """``epilogue`` into ``out``, or where that is None into y."""
    out = y if out is None else out
    tensors = (tensor if tensor is None else tensor.expand_as(y) for tensor in (bias, gate, residual))
    sizes, views = elementwise(out, y, *tensors, out)
    block, warps = flat_tile(sizes[3], arch_of(y.device))
    blocks = cdiv(sizes[3], block)
    launch(
        epilogue_kernel, math.prod(sizes[:3]) * blocks, y, *(value for view in views for value in view), *sizes[1:], blocks,
        ACTIVATION=activation, PRODUCT=gate if gate is None else TYPES[torch.promote_types(y.dtype, gate.dtype)], EXACT=exact, BLOCK=block,
        num_warps=warps, num_stages=1, enable_fp_fusion=False,
    )


_planned_write = Planned(_write, visible)


def epilogue(y, bias, activation: str, gate, residual, exact: bool, keep: bool = False) -> torch.Tensor:
    """``act(y + bias)``, or ``residual + gate * (y + bias)``: y [..., N] of at most four dimensions, written in place unless ``keep`` or the dtype forbids."""
    dtype = y.dtype
    for tensor in (gate, residual):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    out = None if dtype is y.dtype and not keep else y.new_empty(y.shape, dtype=dtype)
    _planned_write(y, bias, activation, gate, residual, exact, out)
    return y if out is None else out


def linear(x, weight, bias, activation: str, gate, residual, exact: bool) -> torch.Tensor:
    gate = None if gate is None else over_tokens(gate, x)
    if activation == "none":  # the GEMM library adds the bias to its accumulator
        return epilogue(F.linear(x, weight, bias), None, activation, gate, residual, exact)
    return epilogue(F.linear(x, weight), bias, activation, gate, residual, exact)


def bias_activation(y, bias, activation: str) -> torch.Tensor:
    return epilogue(y, bias, activation, None, None, False, keep=True)
