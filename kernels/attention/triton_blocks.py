"""What attention's Triton kernels share, forwards and backwards: a program's place in packed sequences, blocks of heads, masks, products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.triton_base import INTERPRETED, narrow, strided

NO_MASK, BOOL, ADDITIVE = 0, 1, 2
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234e38)  # just above float32's lowest


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_block(x, i_t, x_t, x_d, tokens, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[i_t] of one head, [BLOCK, BLOCK_D], zeros beyond its tokens and its dimensions."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = x + i_t.to(tl.int64)[:, None] * x_t + o_d.to(tl.int64)[None, :] * x_d
    if DIM == BLOCK_D:
        return tl.load(p_x, mask=(i_t < tokens)[:, None], other=0.0)
    return tl.load(p_x, mask=(i_t < tokens)[:, None] & (o_d < DIM)[None, :], other=0.0)


@triton.jit
def store_block(out, x, i_t, i_b, i_h, tokens, heads, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Into contiguous [B, tokens, heads, DIM]."""
    o_d = tl.arange(0, BLOCK_D)
    o_out = (((i_b * tokens + i_t) * heads + i_h) * DIM)[:, None] + o_d[None, :]
    tl.store(out + o_out, narrow(x, out.dtype.element_ty), mask=(i_t < tokens)[:, None] & (o_d < DIM)[None, :])


@triton.jit
def masked(b_s, m_seen, p_mask, scale, MASK: tl.constexpr):
    """(logits, which of them are seen); those of an additive mask are in base 2, scale and mask included, others stay as they are."""
    if MASK:
        b_m = tl.load(p_mask, mask=m_seen, other=0)
    if MASK == 1:
        m_seen = m_seen & (b_m != 0)
    if MASK == 2:
        m_seen = m_seen & (b_m != float("-inf"))
        # A finite mask stays finite in base 2: a row of float32's lowest counts all its keys alike
        b_s = b_s * scale + tl.maximum(b_m.to(tl.float32) * LOG2E, LOWEST)
    return b_s, m_seen


@triton.jit
def _sequence_at(slot, cu_seqlens, sequences, BLOCK: tl.constexpr):
    """The packed sequence that a program's block belongs to, and the block's number in it, perhaps beyond its last.

    Sequence i has the slots from cu_seqlens[i] // BLOCK + i on: at least as many as it has blocks, and known without a pass over the lengths
    before it.
    """
    low, high = tl.full([], 0, tl.int64), sequences.to(tl.int64) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) // BLOCK + middle <= slot:
            low = middle
        else:
            high = middle - 1
    return low, slot - tl.load(cu_seqlens + low) // BLOCK - low.to(tl.int32)


@triton.jit
def place_among_packed(slot, cu_seqlens, others, sequences, BLOCK: tl.constexpr):
    """(the number of a program's block in its sequence, the sequence's first token on the block's side, its tokens there, its first token on the other side,
    its tokens there). ``cu_seqlens``: of the block's side, queries or keys; ``others``: of the side that the block goes over, 0 tokens for a slot without
    a block."""
    i_s, i_tile = _sequence_at(slot, cu_seqlens, sequences, BLOCK)
    start, other_start = tl.load(cu_seqlens + i_s).to(tl.int64), tl.load(others + i_s).to(tl.int64)
    tokens, other_tokens = tl.load(cu_seqlens + (i_s + 1)) - start.to(tl.int32), tl.load(others + (i_s + 1)) - other_start.to(tl.int32)
    return i_tile, start, tokens, other_start, tl.where(i_tile * BLOCK < tokens, other_tokens, 0)


def slots(tokens: int, block: int, cu_seqlens: torch.Tensor | None) -> tuple[int, int]:
    """(programs for the blocks of one head, number of packed sequences: 0 where they are not packed)"""
    if cu_seqlens is None:
        return triton.cdiv(tokens, block), 0
    sequences = cu_seqlens.shape[0] - 1  # see _sequence_at
    return tokens // block + sequences if tokens else 0, sequences


def mask_of(mask: torch.Tensor | None) -> tuple[int, tuple]:
    """(its kind, the tensor and its strides as kernels take them)"""
    kind = NO_MASK if mask is None else BOOL if mask.dtype is torch.bool else ADDITIVE
    return kind, strided(mask.view(torch.uint8) if kind == BOOL else mask, 4)


def unit_of(*tensors: torch.Tensor | None) -> int:
    """The elements in 16 bytes where every row (head dimension) of the tensors starts at a multiple of 16 bytes, otherwise 1.

    Triton sees by itself that a stride is a multiple of 16 elements; rows of 40 or 72 would be loaded one element at a time.
    """
    unit = 16 // tensors[0].dtype.itemsize
    return unit if all(stride % unit == 0 for tensor in tensors if tensor is not None for stride in strided(tensor, 4)[1:4]) else 1


def in_units(tensor: torch.Tensor | None, unit: int) -> tuple:
    pointer, *strides, last = strided(tensor, 4)
    return (pointer, *(stride // unit for stride in strides), last)
