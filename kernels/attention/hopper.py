"""Forward attention for Hopper (sm_90a) in Gluon: loads by TMA, one warp that fetches, warpgroups that multiply.

Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (2024). A program owns a tile of 64 queries for each
consumer warpgroup. A producer warp keeps a ring of key and value tiles filled; each warpgroup starts the scores of the next keys and the product with the
values of the keys before, and turns scores into weights while the tensor cores are busy. Key tiles go from the last, which may be partly filled, to
the first; always in this order, so no result depends on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusewire.kernels.attention.hopper_limits import hopper_tile
from fusewire.kernels.attention.triton_limits import default_scale
from fusewire.kernels.plans import watching
from fusewire.kernels.triton_launch import launch_anew, relaunch

LOG2E = 1.4426950408889634
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
MULTIPROCESSORS = 132  # of an H100 or H200: assumed where there is no device


@gluon.jit
def _next(slot, parity, STAGES: gl.constexpr):
    """The slot of a ring after ``slot``, and the parity of its barriers' phase."""
    wraps = slot == STAGES - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, parity ^ 1, parity)


@gluon.jit
def _fetch(desc, i_b, i_h, first, ring, full, empty, slot, parity, STAGES: gl.constexpr):
    """Rows from ``first`` on into the ring's slot, once every consumer has left it."""
    mbarrier.wait(empty.index(slot), parity ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [i_b, i_h, first, 0], full.index(slot), ring.index(slot))
    return _next(slot, parity, STAGES)


@gluon.jit
def _tile(tile, tiles, tiles2, heads, k_tokens, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr):
    """(sample, head, tile of queries in its segment, whether that is the second segment, keys of the first segment that it may see)"""
    i_tile, i_bh = tile % (tiles + tiles2), tile // (tiles + tiles2)
    second = i_tile >= tiles
    i_tile = gl.where(second, i_tile - tiles, i_tile)
    end = k_tokens
    if CAUSAL:
        end = gl.minimum(k_tokens, (i_tile + 1) * BLOCK_M)
    return i_bh // heads, i_bh % heads, i_tile * BLOCK_M, second, end


@gluon.jit
def _producer(
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, JOINT: gl.constexpr,
    q, k, v, q2, k2, v2, s_q, s_k, s_v, q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles, tiles2, programs, heads, group, k_tokens, k2_tokens,
):
    k_slot, k_parity, v_slot, v_parity, q_parity = 0, 0, 0, 0, 0
    for tile in range(gl.program_id(0), programs, gl.num_programs(0)):
        i_b, i_h, first, second, end = _tile(tile, tiles, tiles2, heads, k_tokens, 64 * CONSUMERS, CAUSAL)
        i_kv = i_h // group
        for i in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(i), q_parity ^ 1)
            mbarrier.expect(q_full.index(i), q.block_type.nbytes)
            if JOINT and second:
                tma.async_copy_global_to_shared(q2, [i_b, i_h, first + 64 * i, 0], q_full.index(i), s_q.index(i))
            else:
                tma.async_copy_global_to_shared(q, [i_b, i_h, first + 64 * i, 0], q_full.index(i), s_q.index(i))
        q_parity ^= 1
        # The keys run one block ahead of the values, as the consumers use them
        i_n = (gl.cdiv(end, BLOCK_N) - 1) * BLOCK_N
        k_slot, k_parity = _fetch(k, i_b, i_kv, i_n, s_k, k_full, k_empty, k_slot, k_parity, STAGES)
        while i_n > 0:
            k_slot, k_parity = _fetch(k, i_b, i_kv, i_n - BLOCK_N, s_k, k_full, k_empty, k_slot, k_parity, STAGES)
            v_slot, v_parity = _fetch(v, i_b, i_kv, i_n, s_v, v_full, v_empty, v_slot, v_parity, STAGES)
            i_n -= BLOCK_N
        if JOINT:
            i_n = (gl.cdiv(k2_tokens, BLOCK_N) - 1) * BLOCK_N
            k_slot, k_parity = _fetch(k2, i_b, i_kv, i_n, s_k, k_full, k_empty, k_slot, k_parity, STAGES)
            v_slot, v_parity = _fetch(v, i_b, i_kv, 0, s_v, v_full, v_empty, v_slot, v_parity, STAGES)
            while i_n > 0:
                k_slot, k_parity = _fetch(k2, i_b, i_kv, i_n - BLOCK_N, s_k, k_full, k_empty, k_slot, k_parity, STAGES)
                v_slot, v_parity = _fetch(v2, i_b, i_kv, i_n, s_v, v_full, v_empty, v_slot, v_parity, STAGES)
                i_n -= BLOCK_N
            v_slot, v_parity = _fetch(v2, i_b, i_kv, 0, s_v, v_full, v_empty, v_slot, v_parity, STAGES)
        else:
            v_slot, v_parity = _fetch(v, i_b, i_kv, 0, s_v, v_full, v_empty, v_slot, v_parity, STAGES)


@gluon.jit
def _in_threads(b_x):
    """[64, N] -> [64, N / 8, 4, 2]: a thread has pairs of neighbouring columns, 8 apart; four threads have a row. Sums over dimensions 3 and 1 need no exchange."""
    return b_x.reshape([64, b_x.shape[1] // 8, 4, 2])


@gluon.jit
def _weights(b_s, b_max, i_q, i_n, end, scale, hides, CAUSAL: gl.constexpr):
    """(exp2(scores * scale - new maximum), new maximum, what older sums are multiplied with). ``hides``: some of the keys from i_n on may be hidden."""
    if hides:
        o_n = i_n + gl.arange(0, b_s.shape[1], gl.SliceLayout(0, b_s.type.layout))
        m_qn = (o_n < end)[None, :]
        if CAUSAL:
            m_qn = m_qn & (i_q[:, None] >= o_n[None, :])
        b_s = gl.where(m_qn, b_s, float("-inf"))
    b_high = gl.max(gl.max(gl.max(_in_threads(b_s), 3), 1), 1)  # pairs first: half as long a chain
    b_new = gl.maximum(b_max, gl.convert_layout(b_high, b_max.type.layout, assert_trivial=True) * scale)
    b_safe = b_new
    if CAUSAL:
        b_safe = gl.where(b_new == float("-inf"), 0.0, b_new)  # a query that has seen no key yet: -inf - -inf would be NaN
    b_less = gl.expand_dims(-b_safe, 1).broadcast_to(b_s.shape)
    b_p = gl.exp2(gl.fma(b_s, gl.full(b_s.shape, scale, gl.float32, b_s.type.layout), b_less))
    return b_p, b_new, gl.exp2(b_max - b_safe)


@gluon.jit
def _consumer(
    mine: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, JOINT: gl.constexpr,
    out, out2, s_q, s_k, s_v, s_out, q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles, tiles2, programs, heads, k_tokens, k2_tokens, scale,
):
    """64 queries of each tile: those from 64 * mine on."""
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    l_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    l_p: gl.constexpr = gl.DotOperandLayout(0, l_acc, 2)
    l_row: gl.constexpr = gl.SliceLayout(1, l_s)
    l_acc_row: gl.constexpr = gl.SliceLayout(1, l_acc)
    dtype: gl.constexpr = s_q.dtype
    k_slot, k_parity, v_slot, v_parity, q_parity = 0, 0, 0, 0, 0
    b_q = s_q.index(mine).reshape([64, DIM])
    for tile in range(gl.program_id(0), programs, gl.num_programs(0)):
        i_b, i_h, first, second, end = _tile(tile, tiles, tiles2, heads, k_tokens, 64 * CONSUMERS, CAUSAL)
        whole = (first + 1) // BLOCK_N * BLOCK_N  # causal: the keys before are seen by every query of the tile
        first += 64 * mine
        i_q = first + gl.arange(0, 64, l_row)
        steps = gl.cdiv(end, BLOCK_N)
        i_n = (steps - 1) * BLOCK_N
        if JOINT:
            steps += gl.cdiv(k2_tokens, BLOCK_N)
        mbarrier.wait(q_full.index(mine), q_parity)
        mbarrier.wait(k_full.index(k_slot), k_parity)
        b_s = warpgroup_mma(b_q, s_k.index(k_slot).reshape([BLOCK_N, DIM]).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, l_s), use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(k_empty.index(k_slot), count=1)
        k_slot, k_parity = _next(k_slot, k_parity, STAGES)
        b_w, b_max, b_alpha = _weights(b_s, gl.full([64], float("-inf"), gl.float32, l_row), i_q, i_n, end, scale, True, CAUSAL)
        b_sum = gl.sum(gl.sum(_in_threads(b_w), 3), 1)
        b_p = gl.convert_layout(b_w.to(dtype), l_p, assert_trivial=True)
        b_acc = gl.zeros([64, DIM], gl.float32, l_acc)
        for _ in range(1, steps):
            # The scores of one key tile, and the product of the weights of the tile before with its values
            i_n -= BLOCK_N
            hides = False
            if CAUSAL:
                hides = i_n >= whole
            if JOINT:
                hides = i_n < 0
                if hides:
                    end = k2_tokens
                    i_n = (gl.cdiv(k2_tokens, BLOCK_N) - 1) * BLOCK_N
            mbarrier.wait(k_full.index(k_slot), k_parity)
            b_s = warpgroup_mma(b_q, s_k.index(k_slot).reshape([BLOCK_N, DIM]).permute((1, 0)), gl.zeros([64, BLOCK_N], gl.float32, l_s), use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_slot), v_parity)
            b_acc = warpgroup_mma(b_p, s_v.index(v_slot).reshape([BLOCK_N, DIM]), b_acc, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=[b_s])
            mbarrier.arrive(k_empty.index(k_slot), count=1)
            if CAUSAL or JOINT:
                b_w, b_max, b_alpha = _weights(b_s, b_max, i_q, i_n, end, scale, hides, CAUSAL)
            else:
                b_w, b_max, b_alpha = _weights(b_s, b_max, i_q, i_n, end, scale, False, CAUSAL)
            b_sum = b_sum * gl.convert_layout(b_alpha, gl.SliceLayout(1, b_sum.type.layout), assert_trivial=True)[:, None] + gl.sum(gl.sum(_in_threads(b_w), 3), 1)
            mbarrier.wait(v_full.index(v_slot), v_parity)  # returns at once; without this branch ptxas moves the exponentials behind the next line
            b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
            mbarrier.arrive(v_empty.index(v_slot), count=1)
            b_acc = b_acc * gl.convert_layout(b_alpha, l_acc_row, assert_trivial=True)[:, None]
            b_p = gl.convert_layout(b_w.to(dtype), l_p, assert_trivial=True)
            k_slot, k_parity = _next(k_slot, k_parity, STAGES)
            v_slot, v_parity = _next(v_slot, v_parity, STAGES)
        mbarrier.arrive(q_empty.index(mine), count=1)
        q_parity ^= 1
        mbarrier.wait(v_full.index(v_slot), v_parity)
        b_acc = warpgroup_mma(b_p, s_v.index(v_slot).reshape([BLOCK_N, DIM]), b_acc, is_async=True)
        b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        v_slot, v_parity = _next(v_slot, v_parity, STAGES)
        b_acc = b_acc * gl.convert_layout(1.0 / gl.sum(b_sum, 1), l_acc_row, assert_trivial=True)[:, None]
        tma.store_wait(0)  # of the tile before
        b_out = s_out.index(mine)
        b_out.reshape([64, DIM]).store(b_acc.to(dtype))
        fence_async_shared()
        if JOINT and second:
            tma.async_copy_shared_to_global(out2, [i_b, i_h, first, 0], b_out)
        else:
            tma.async_copy_shared_to_global(out, [i_b, i_h, first, 0], b_out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "tiles2", "programs", "heads", "group", "k_tokens", "k2_tokens"])
def hopper_attention_kernel(
    q, k, v, out, q2, k2, v2, out2, tiles, tiles2, programs, heads, group, k_tokens, k2_tokens, scale,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):
    """softmax(q k^T * scale) v; ``scale`` is in base 2; q, k, v, out: descriptors of [B, H, T, D]. Programs take tiles of queries in turn: tiles fastest, then heads, then samples."""
    dtype: gl.constexpr = q.dtype
    s_q = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, DIM], q.layout)
    s_out = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, 64, DIM], out.layout)
    s_k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, DIM], k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    JOINT: gl.constexpr = q2 is not None
    if not JOINT:
        q2, k2, v2, out2 = q, k, v, out
    # (an assignment would make tensors of the constants)
    fetch = (q, k, v, q2, k2, v2, s_q, s_k, s_v, q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles, tiles2, programs, heads, group, k_tokens, k2_tokens)
    attend = (out, out2, s_q, s_k, s_v, s_out, q_full, q_empty, k_full, k_empty, v_full, v_empty, tiles, tiles2, programs, heads, k_tokens, k2_tokens, scale)
    # Registers of each thread: 24 of the producer, 240 of the second warpgroup; the first has the rest
    gl.warp_specialize(
        [(_consumer, (0, CONSUMERS, BLOCK_N, DIM, STAGES, CAUSAL, JOINT) + attend),
         (_consumer, (1, CONSUMERS, BLOCK_N, DIM, STAGES, CAUSAL, JOINT) + attend),
         (_producer, (CONSUMERS, BLOCK_N, STAGES, CAUSAL, JOINT) + fetch)], [4, 1], [240, 24])


class _Rows(NamedTuple):
    """Of a tensor [B, T, H, D] in tiles of some tokens of one head, as [B, H, T, D]: what Triton's launcher reads of a tensor descriptor. Triton's own
    class checks all of it again, and a launch asks anew what every argument specialises the kernel by: most of the time that a call takes the processor."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False


def _rows(x: torch.Tensor) -> _Rows:
    """x [B, T, H, D], or a copy where TMA cannot read it: from multiples of 16 bytes on, rows as far apart, in the order of memory."""
    (batch, tokens, heads, dim), (x_b, x_t, x_h, x_d) = x.shape, x.stride()
    # A stride over a single element may be anything, but not 0
    strides = [dim if batch == 1 else x_b, dim if heads == 1 else x_h, dim if tokens == 1 else x_t, 1]
    if x_d != 1 or x.data_ptr() % 16 or any(not 0 < stride < 2**39 or stride % 8 for stride in strides[:3]):
        return _rows(x.clone(memory_format=torch.contiguous_format))
    return _Rows(x, [batch, heads, tokens, dim], strides)


def _descriptor(rows: _Rows | None, tokens: int) -> TensorDescriptor | None:
    if rows is None:
        return None
    block = [1, 1, tokens, rows.shape[3]]
    return TensorDescriptor(rows.base, rows.shape, rows.strides, block, gl.NVMMASharedLayout.get_default_for(block, TYPES[rows.base.dtype]))


_started: dict[tuple, tuple] = {}  # what a launch is specialised by -> (the compiled kernel, multiprocessors of the device)


def _launch(first, second, causal: bool, scale: float | None) -> None:
    """``first``, ``second``: (q, k, v, out) of a segment, the second of None where there is one only."""
    q, k = first[:2]
    q2, k2 = second[:2]
    batch, q_tokens, heads, dim = q.shape
    tile = hopper_tile(dim)
    queries = 64 * tile.consumers
    tiles, tiles2 = -(-q_tokens // queries), 0 if q2 is None else -(-q2.shape[1] // queries)
    programs = batch * heads * (tiles + tiles2)
    rows = [None if x is None else _rows(x) for x in (*first, *second)]
    rest = (tiles, tiles2, programs, heads, heads // k.shape[2], k.shape[1], 0 if k2 is None else k2.shape[1], default_scale(scale, dim) * LOG2E,
            tile.consumers, tile.keys, dim, tile.stages, causal)
    key = (q.device, q.dtype, dim, causal, q2 is not None)
    if (known := _started.get(key)) is not None:
        relaunch(known[0], min(programs, known[1]), q, *rows, *rest)
        return
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else MULTIPROCESSORS
    descriptors = [_descriptor(x, tokens) for x, tokens in zip(rows, (64, tile.keys, tile.keys, 64) * 2)]
    if (watch := watching()) is not None:
        watch.later = True
    kernel = launch_anew(hopper_attention_kernel, min(programs, multiprocessors), q, *descriptors, *rest, num_warps=4, num_stages=tile.stages)
    if kernel is not None:
        _started[key] = kernel, multiprocessors


def attention(q, k, v, causal: bool = False, scale: float | None = None) -> torch.Tensor:
    """q [B, Tq, H, D], k, v [B, Tk, G, D] -> [B, Tq, H, D], contiguous; see hopper_limits.py. ``causal``: query i sees the keys up to i."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _launch((q, k, v, out), (None,) * 4, causal, scale)
    return out


def joint_attention(q, k, v, q2, k2, v2, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries of both segments over the keys of both, which are not concatenated."""
    out, out2 = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, q2))
    _launch((q, k, v, out), (q2, k2, v2, out2), False, scale)
    return out, out2
