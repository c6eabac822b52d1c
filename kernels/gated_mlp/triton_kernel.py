"""Gated activations in Triton, in the rounding of ``close``: both halves are read in place, at any strides, and the product is written once.

A program has one block of columns. In the backward it walks over its own rows, and writes one row of sums for the bias, which PyTorch adds up:
no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.rounding import promoted
from fusewire.kernels.triton_base import as_tokens, narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import cdiv, flat_tile

GELU, SILU, QUICK = 0, 1, 2
CHUNKS = 256  # of rows, where the backward sums over them


@triton.jit
def _activation(b_g, ACT: tl.constexpr):
    """(act(g), act'(g))"""
    if ACT == 0:
        b_below = 0.5 * (1.0 + tl.erf(b_g * 0.7071067811865476))  # the standard normal's weight below g
        return b_g * b_below, b_below + b_g * tl.exp(-0.5 * b_g * b_g) * 0.3989422804014327
    b_z = b_g
    if ACT == 2:
        b_z = 1.702 * b_g
    b_part = 1.0 / (1.0 + tl.exp(-b_z))
    return b_g * b_part, b_part * (1.0 + b_z * (1.0 - b_part))


@triton.jit
def _read(x, i_b, i_t, x_b, x_t, x_c, bias, bias_c, o_c, mask):
    """A block of row (i_b, i_t), its bias added, in float32."""
    o_c = o_c.to(tl.int64)
    b_x = tl.load(x + (i_b.to(tl.int64) * x_b + i_t.to(tl.int64) * x_t) + o_c * x_c, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        b_x += tl.load(bias + o_c * bias_c, mask=mask, other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["tokens"])
def gated_kernel(hidden, h_b, h_t, h_c, gate, g_b, g_t, g_c, hidden_bias, hb_c, gate_bias, gb_c, out, tokens, width, blocks,
                 ACT: tl.constexpr, BLOCK: tl.constexpr):
    i_row, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_c = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o_c < width
    i_b, i_t = i_row // tokens, i_row % tokens
    b_y, b_slope = _activation(_read(gate, i_b, i_t, g_b, g_t, g_c, gate_bias, gb_c, o_c, mask), ACT)
    if hidden is not None:
        b_y *= _read(hidden, i_b, i_t, h_b, h_t, h_c, hidden_bias, hb_c, o_c, mask)
    tl.store(out + (i_row.to(tl.int64) * width + o_c), narrow(b_y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens", "steps"])
def gated_backward_kernel(grad, d_b, d_t, d_c, hidden, h_b, h_t, h_c, gate, g_b, g_t, g_c, hidden_bias, hb_c, gate_bias, gb_c,
                          dhidden, dgate, stride, sums, hidden_at, gate_at, rows, tokens, steps, width, blocks,
                          ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [chunk * steps, ...) of one block of columns. sums [chunks, 2F]: of dhidden and dgate, each at its half of the bias;
    [chunks, F] without a hidden."""
    i_chunk, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_c = i_block * BLOCK + tl.arange(0, BLOCK)
    mask = o_c < width
    if sums is not None:
        b_hidden_sum, b_gate_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for i_step in range(steps):
        i_row = i_chunk * steps + i_step
        m_row = mask & (i_row < rows)
        i_b, i_t = i_row // tokens, i_row % tokens
        b_dy = _read(grad, i_b, i_t, d_b, d_t, d_c, None, 0, o_c, m_row)
        b_y, b_slope = _activation(_read(gate, i_b, i_t, g_b, g_t, g_c, gate_bias, gb_c, o_c, m_row), ACT)
        b_dgate = b_dy * b_slope
        o_row = i_row.to(tl.int64) * stride + o_c
        if hidden is not None:
            b_dhidden = b_dy * b_y
            b_dgate *= _read(hidden, i_b, i_t, h_b, h_t, h_c, hidden_bias, hb_c, o_c, m_row)
            tl.store(dhidden + o_row, narrow(b_dhidden, dhidden.dtype.element_ty), mask=m_row)
            if sums is not None:
                b_hidden_sum += b_dhidden
        if sums is not None:
            b_gate_sum += b_dgate
        tl.store(dgate + o_row, narrow(b_dgate, dgate.dtype.element_ty), mask=m_row)
    if sums is not None:
        i_sums = i_chunk.to(tl.int64) * width
        if hidden is not None:
            i_sums *= 2
            tl.store(sums + (i_sums + hidden_at + o_c), b_hidden_sum, mask=mask)
        tl.store(sums + (i_sums + gate_at + o_c), b_gate_sum, mask=mask)


def _halves(x, gate, bias, gate_first: bool):
    """(hidden, gate, hidden bias, gate bias), views of [B, T, F] and [F]."""
    first, second = as_tokens(x).chunk(2, -1) if gate is None else (as_tokens(x), as_tokens(gate))
    first_bias, second_bias = (None, None) if bias is None else bias.chunk(2)
    return (second, first, second_bias, first_bias) if gate_first else (first, second, first_bias, second_bias)


def _forward(activation: int, x, gate, bias, gate_first: bool) -> torch.Tensor:
    hidden, gate_rows, *biases = (None, as_tokens(x), None, bias) if activation == QUICK else _halves(x, gate, bias, gate_first)
    dtype = promoted(x.dtype, gate, bias)
    width, tokens = gate_rows.shape[2], gate_rows.shape[1]
    out = x.new_empty((*x.shape[:-1], width), dtype=dtype)
    block, warps = flat_tile(width, arch_of(x.device))
    blocks = cdiv(width, block)
    launch(gated_kernel, gate_rows.shape[0] * tokens * blocks, x, *strided(hidden, 3), *strided(gate_rows, 3), *strided(biases[0], 1), *strided(biases[1], 1),
           out, tokens, width, blocks, ACT=activation, BLOCK=block, num_warps=warps, num_stages=1, enable_fp_fusion=False)
    return out


def geglu(x, gate, bias, exact: bool) -> torch.Tensor:
    return _forward(GELU, x, gate, bias, False)


def swiglu(x, gate, bias, gate_first: bool, exact: bool) -> torch.Tensor:
    return _forward(SILU, x, gate, bias, gate_first)


def quick_gelu(x, bias, exact: bool) -> torch.Tensor:
    return _forward(QUICK, x, None, bias, False)


def _backward(activation: int, grad, x, gate, bias, gate_first: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dgate = x.new_empty(x.shape), x.new_empty(0 if gate is None else x.shape)
    hidden, gate_rows, *biases = (None, as_tokens(x), None, bias) if activation == QUICK else _halves(x, gate, bias, gate_first)
    width, tokens = gate_rows.shape[2], gate_rows.shape[1]
    hidden_at, gate_at = (width, 0) if gate_first or hidden is None else (0, width)
    if hidden is None:
        stride, of_hidden, of_gate = width, None, dx
    elif gate is None:
        flat = dx.view(-1)
        stride, of_hidden, of_gate = 2 * width, flat[hidden_at:], flat[gate_at:]
    else:
        stride, of_hidden, of_gate = width, dx, dgate
    rows = gate_rows.shape[0] * tokens
    steps = max(cdiv(rows, CHUNKS), 1) if of_bias else 1
    chunks = cdiv(rows, steps)
    sums = x.new_empty((chunks, width if hidden is None else 2 * width), dtype=torch.float32) if of_bias else None
    block, warps = flat_tile(width, arch_of(x.device))
    if of_bias and (hidden is None or width % 16):
        warps *= 2  # with 8 elements a thread ptxas spills 8 bytes of a float32 row for sm_100, of 40 registers, and of one that is read element by element
    blocks = cdiv(width, block)
    grad = as_tokens(grad)
    launch(gated_backward_kernel, chunks * blocks, x, *strided(grad, 3), *strided(hidden, 3), *strided(gate_rows, 3), *strided(biases[0], 1),
           *strided(biases[1], 1), of_hidden, of_gate, stride, sums, hidden_at, gate_at, rows, tokens, steps, width, blocks,
           ACT=activation, BLOCK=block, num_warps=warps, num_stages=1, enable_fp_fusion=False)
    return dx, dgate, sums.sum(0).to(x.dtype) if of_bias else x.new_empty(0)


def geglu_backward(grad, x, gate, bias, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(GELU, grad, x, gate, bias, False, of_bias)


def swiglu_backward(grad, x, gate, bias, gate_first: bool, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(SILU, grad, x, gate, bias, gate_first, of_bias)


def quick_gelu_backward(grad, x, bias, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dx, _, dbias = _backward(QUICK, grad, x, None, bias, False, of_bias and bias is not None)
    return dx, dbias
