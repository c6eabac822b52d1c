"""Forward attention in plain Triton with loads by TMA from host descriptors: the cheaper candidate beside hopper.py.

Dao, "FlashAttention-2" (2023), as triton_kernel.py has it, without masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusewire.kernels.attention.triton_limits import default_scale
from fusewire.kernels.triton_base import launch

LOG2E = 1.4426950408889634


@triton.jit
def _attend(b_acc, b_max, b_sum, b_q, k, v, i_b, i_kv, i_q, start, end, scale, CHECKED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr):
    for i_n in range(start, end, BLOCK_N):
        b_k = k.load([i_b, i_kv, i_n, 0]).reshape([BLOCK_N, DIM])
        b_s = tl.dot(b_q, b_k.T)
        if CHECKED:
            o_n = i_n + tl.arange(0, BLOCK_N)
            m_qn = (o_n < end)[None, :]
            if CAUSAL:
                m_qn = m_qn & (i_q[:, None] >= o_n[None, :])
            b_s = tl.where(m_qn, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_alpha = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_v = v.load([i_b, i_kv, i_n, 0]).reshape([BLOCK_N, DIM])
        b_acc = tl.dot(b_p.to(b_q.dtype), b_v, b_acc * b_alpha[:, None])
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["tiles", "heads", "group", "k_tokens"])
def attention_kernel(q, k, v, out, tiles, heads, group, k_tokens, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, CAUSAL: tl.constexpr):
    """q, k, v, out: descriptors of [B, H, T, D]; ``scale`` is in base 2. Causal: each query sees the first key tile that is read, so no maximum stays -inf."""
    program = tl.program_id(0)
    i_tile, i_bh = program % tiles, program // tiles
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // group
    i_q = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = q.load([i_b, i_h, i_tile * BLOCK_M, 0]).reshape([BLOCK_M, DIM])
    b_acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    end = k_tokens
    whole = k_tokens // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(k_tokens, (i_tile + 1) * BLOCK_M)
        whole = tl.minimum(whole, i_tile * BLOCK_M // BLOCK_N * BLOCK_N)
    b_acc, b_max, b_sum = _attend(b_acc, b_max, b_sum, b_q, k, v, i_b, i_kv, i_q, 0, whole, scale, False, CAUSAL, BLOCK_N, DIM)
    b_acc, b_max, b_sum = _attend(b_acc, b_max, b_sum, b_q, k, v, i_b, i_kv, i_q, whole, end, scale, True, CAUSAL, BLOCK_N, DIM)
    out.store([i_b, i_h, i_tile * BLOCK_M, 0], (b_acc / b_sum[:, None]).to(b_q.dtype).reshape([1, 1, BLOCK_M, DIM]))


class TmaTile(NamedTuple):
    """``queries`` and ``keys`` of a program of ``warps`` warps, and key tiles in flight."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 3


def tma_tile(dim: int) -> TmaTile:
    return TmaTile(128, 128, 8, 3) if dim <= 64 else TmaTile(128, 128, 8, 2)


def _descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    batch, tokens, heads, dim = tensor.shape
    strides = [stride if size > 1 else dim for size, stride in zip(tensor.shape, tensor.stride())]
    return TensorDescriptor(tensor, [batch, heads, tokens, dim], [strides[0], strides[2], strides[1], 1], [1, 1, rows, dim])


def attention(q, k, v, causal: bool = False, scale: float | None = None, tile: TmaTile | None = None) -> torch.Tensor:
    """q [B, Tq, H, D], k, v [B, Tk, G, D] -> [B, Tq, H, D], contiguous; see hopper_limits.py."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, tokens, heads, dim = q.shape
    tile = tile or tma_tile(dim)
    tiles = -(-tokens // tile.queries)
    descriptors = [_descriptor(x, rows) for x, rows in zip((q, k, v, out), (tile.queries, tile.keys, tile.keys, tile.queries))]
    launch(attention_kernel, batch * heads * tiles, q, *descriptors, tiles, heads, heads // k.shape[2], k.shape[1], default_scale(scale, dim) * LOG2E,
           BLOCK_M=tile.queries, BLOCK_N=tile.keys, DIM=dim, CAUSAL=causal, num_warps=tile.warps, num_stages=tile.stages)
    return out
