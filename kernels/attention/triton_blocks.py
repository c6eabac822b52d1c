"""What attention's Triton kernels share, forwards and backwards: a program's place in packed sequences, blocks of heads, masks, products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.attention.reference import EMPTY as _EMPTY
from fusewire.kernels.attention.reference import FULL as _FULL
from fusewire.kernels.triton_base import INTERPRETED, narrow, strided
from fusewire.kernels.triton_launch import launch
from fusewire.kernels.tuning import cdiv, power_of_2

NO_MASK, BOOL, ADDITIVE = 0, 1, 2
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234e38)  # just above float32's lowest
EMPTY, FULL = tl.constexpr(_EMPTY), tl.constexpr(_FULL)  # blocks of a pattern


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
def shown(p_blocks, words, i_q, first, q_tokens, k_tokens, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TURNED: tl.constexpr):
    """Which of BLOCK_N keys from ``first`` on each query i_q sees under a pattern: [BLOCK_M, BLOCK_N], or TURNED. p_blocks: the queries' rows of blocks,
    [BLOCK_M, 1] or [1, BLOCK_M].

    A word holds the bits of 32 keys: loaded once, spread over them in registers.
    """
    WIDTH: tl.constexpr = 32 if BLOCK_N > 32 else BLOCK_N
    o_block = first // 32 + tl.arange(0, BLOCK_N // WIDTH)
    o_bit = first % 32 + tl.arange(0, WIDTH)
    if TURNED:
        o_block, i_q = o_block[:, None], i_q[None, :]
    else:
        o_block, i_q = o_block[None, :], i_q[:, None]
    b_block = tl.load(p_blocks + o_block.to(tl.int64), mask=(i_q < q_tokens) & (o_block * 32 < k_tokens), other=EMPTY)
    b_word = tl.load(words + (b_block.to(tl.int64) * 32 + i_q % 32), mask=b_block >= 0, other=0)
    b_word = tl.where(b_block == FULL, -1, b_word)
    if TURNED:
        b_bits = tl.reshape((b_word[:, None, :] >> o_bit[None, :, None]) & 1, [BLOCK_N, BLOCK_M])
    else:
        b_bits = tl.reshape((b_word[:, :, None] >> o_bit[None, None, :]) & 1, [BLOCK_M, BLOCK_N])
    return b_bits != 0


@triton.jit(do_not_specialize=["rows", "columns", "row_step", "column_step", "row_tiles", "column_tiles"])
def pattern_tiles_kernel(blocks, seen, rows, columns, row_step, column_step, row_tiles, column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                         TILES: tl.constexpr):
    """Which tiles of COLUMNS (keys) some of ROWS (queries) may see, or the other way round, from a pattern's blocks [.., rows, columns] of 32 x 32:
    seen [.., row_tiles, 1 + column_tiles], their number, then theirs in order."""
    program = tl.program_id(0).to(tl.int64)
    i_row = (program % row_tiles).to(tl.int32) * ROWS // 32
    o_tile = tl.arange(0, TILES)
    b_any = tl.full([TILES], EMPTY, tl.int32)
    for i in range((ROWS + 31) // 32):
        for j in range((COLUMNS + 31) // 32):
            o_column = o_tile * COLUMNS // 32 + j
            o_block = program // row_tiles * rows * columns + (i_row + i).to(tl.int64) * row_step + o_column.to(tl.int64) * column_step
            m_block = (o_tile < column_tiles) & (o_column < columns) & (i_row + i < rows)
            b_any = tl.maximum(b_any, tl.load(blocks + o_block, mask=m_block, other=EMPTY))
    b_seen = (b_any != EMPTY).to(tl.int32)
    p_seen = seen + program * (column_tiles + 1)
    tl.store(p_seen, tl.sum(b_seen, 0))
    tl.store(p_seen + tl.cumsum(b_seen, 0).to(tl.int64), o_tile, mask=b_seen != 0)


def tiles_seen(blocks: torch.Tensor | None, queries: tuple[int, int], keys: tuple[int, int], turned: bool = False) -> torch.Tensor | None:
    """[B or 1, H or 1, tiles of queries, 1 + tiles of keys], as ``pattern_tiles_kernel`` makes it; ``turned``: for each tile of keys the queries that see
    some of it. ``queries``, ``keys``: how many tiles, and of how many. Its own launch: a list lets the other side be fetched ahead."""
    if blocks is None:
        return None
    batch, heads, rows, columns = blocks.shape
    row_step, column_step = columns, 1
    if turned:
        queries, keys, rows, columns, row_step, column_step = keys, queries, columns, rows, column_step, row_step
    seen = torch.empty((batch, heads, queries[0], 1 + keys[0]), dtype=torch.int32, device=blocks.device)
    launch(pattern_tiles_kernel, batch * heads * queries[0], blocks, blocks.contiguous(), seen, rows, columns, row_step, column_step, queries[0], keys[0],
           ROWS=queries[1], COLUMNS=keys[1], TILES=power_of_2(max(keys[0], 1)), num_warps=4, num_stages=1)
    return seen


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
        return cdiv(tokens, block), 0
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
