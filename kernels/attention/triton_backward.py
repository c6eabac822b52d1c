"""The gradients of attention in Triton: each weight is made again from its logit and what the softmax left behind, nothing of T x T is stored.

Dao (2023), "FlashAttention-2", whose log-sum-exp is two numbers here, the highest logit and the total. Three launches: a small one takes for each query
delta = sum(grad * out); then one program owns a block of queries and goes over the keys for dq, another a block of keys (of all the queries' heads that
share it) and goes over the queries for dk and dv. Every sum has one owner and one order: no atomics, and no result depends on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.attention.triton_blocks import LOG2E, LOWEST, dot, in_units, load_block, mask_of, masked, place_among_packed, shown, slots, store_block, tiles_seen, unit_of
from fusewire.kernels.attention.triton_limits import default_scale
from fusewire.kernels.triton_base import fused, narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import attention_backward_tile, cdiv


@triton.jit(do_not_specialize=["tiles", "tokens", "heads"])
def delta_kernel(
    grad, g_b, g_t, g_h, g_d, out, o_b, o_t, o_h, o_d, highest, h_b, h_h, h_t, total, t_b, t_h, t_t, lse_grad, l_b, l_h, l_t, base, inverse, delta,
    tiles, tokens, heads, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):
    """For each query, contiguous [B, H, T] in float32: its highest logit in base 2, one over its total (0 for 0), and sum(grad * out) less the gradient of
    the log-sum-exp. highest and total are float64: the product with log2(e), rounded once, is again what the forward kernel subtracted."""
    program = tl.program_id(0)
    i_tile, i_bh = program % tiles, (program // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_t = (i_tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    m_t = i_t < tokens
    b_grad = load_block(grad + (i_b * g_b + i_h * g_h) * UNIT, i_t, g_t * UNIT, g_d, tokens, DIM, BLOCK_D).to(tl.float32)
    b_out = load_block(out + (i_b * o_b + i_h * o_h) * UNIT, i_t, o_t * UNIT, o_d, tokens, DIM, BLOCK_D).to(tl.float32)
    b_delta = tl.sum(b_grad * b_out, 1)
    if lse_grad is not None:
        b_delta -= tl.load(lse_grad + (i_b * l_b + i_h * l_h + i_t * l_t), mask=m_t, other=0.0).to(tl.float32)
    b_total = tl.load(total + (i_b * t_b + i_h * t_h + i_t * t_t), mask=m_t, other=0.0).to(tl.float64)
    b_highest = tl.load(highest + (i_b * h_b + i_h * h_h + i_t * h_t), mask=m_t, other=0.0).to(tl.float64)
    empty = b_total == 0.0
    b_base = tl.where(empty, 0.0, b_highest) * tl.full([ROWS], LOG2E, tl.float64)
    lowest = tl.full([ROWS], LOWEST, tl.float64)
    b_base = tl.where(b_base < lowest, lowest, b_base)  # as the forward kernel keeps a finite mask finite
    o_row = i_bh * tokens + i_t
    tl.store(base + o_row, b_base.to(tl.float32), mask=m_t)
    tl.store(inverse + o_row, tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, b_total)).to(tl.float32), mask=m_t)
    tl.store(delta + o_row, b_delta, mask=m_t)


@triton.jit
def _weights(b_s, b_base, b_inverse, m_seen, p_mask, scale, MASK: tl.constexpr, HIDING: tl.constexpr):
    """(the weights that logits had, in whichever order, 0 where hidden; which are not). b_base, b_inverse: one of a row or of a column."""
    b_s, m_seen = masked(b_s, m_seen, p_mask, scale, MASK)
    if MASK == 2:
        b_s = b_s - b_base
        b_s = tl.where(b_s > 0.0, 0.0, b_s)  # no logit is above the highest: one that another kernel rounded, where both are huge
    else:
        b_s = fused(b_s, tl.full(b_s.shape, 1.0, tl.float32) * scale, tl.broadcast_to(-b_base, b_s.shape))
    b_p = tl.exp2(b_s) * b_inverse
    if HIDING:
        b_p = tl.where(m_seen, b_p, 0.0)
    return b_p, m_seen


@triton.jit
def _over_keys(
    b_dq, b_q, b_grad, b_base, b_inverse, b_delta, i_q, q_tokens, k, k_t, k_d, v, v_t, v_d, start, end, p_mask, mask_k, tiles, p_blocks, words, k_tokens, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CHECKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """dq / scale of a block of queries over the keys [start, end). CHECKED: they may fill less than whole blocks. Where there are tiles, over those blocks
    of the k_tokens keys that they list, under a pattern: see pattern_tiles_kernel."""
    HIDING: tl.constexpr = MASK != 0 or CAUSAL or CHECKED
    o_d = tl.arange(0, BLOCK_D)
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        if tiles is not None:
            first = tl.load(tiles + (i_n // BLOCK_N + tl.full([], 1, tl.int64))) * BLOCK_N
            o_n = first + tl.arange(0, BLOCK_N)
            m_n = o_n < k_tokens
        p_k = k + o_n.to(tl.int64)[None, :] * k_t + o_d.to(tl.int64)[:, None] * k_d
        p_v = v + o_n.to(tl.int64)[None, :] * v_t + o_d.to(tl.int64)[:, None] * v_d
        if CHECKED or DIM != BLOCK_D:
            b_k = tl.load(p_k, mask=m_n[None, :] & (o_d < DIM)[:, None], other=0.0)
            b_v = tl.load(p_v, mask=m_n[None, :] & (o_d < DIM)[:, None], other=0.0)
        else:
            b_k = tl.load(p_k)
            b_v = tl.load(p_v)
        b_s = dot(b_q, b_k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        m_seen = (i_q < q_tokens)[:, None] & m_n[None, :]
        if CAUSAL:
            m_seen = m_seen & (i_q[:, None] >= o_n[None, :])
        if tiles is not None:
            m_seen = m_seen & shown(p_blocks, words, i_q, first, q_tokens, k_tokens, BLOCK_M, BLOCK_N, False)
        p_tile = p_mask
        if MASK:
            p_tile = p_mask + o_n.to(tl.int64)[None, :] * mask_k
        b_p, m_seen = _weights(b_s, b_base[:, None], b_inverse[:, None], m_seen, p_tile, scale, MASK, HIDING)
        b_dp = dot(b_grad, b_v, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if HIDING:
            b_ds = tl.where(m_seen, b_ds, 0.0)
        if MASK != 0 or CAUSAL or tiles is not None:
            # 0 * NaN is NaN: keys that no query of the block sees do not enter the product
            b_k = tl.where((tl.max(m_seen.to(tl.int32), 0) != 0)[None, :], b_k, 0.0)
        b_dq = dot(narrow(b_ds, k.dtype.element_ty), tl.trans(b_k), b_dq, PRECISION)
    return b_dq


@triton.jit(do_not_specialize=["tiles", "q_tokens", "k_tokens", "heads", "group", "sequences"])
def dq_kernel(
    q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, grad, g_b, g_t, g_h, g_d, base, inverse, delta, dq,
    mask, mask_b, mask_h, mask_q, mask_k, tiles, q_tokens, k_tokens, heads, group, scale, slope, cu_seqlens_q, cu_seqlens_k, sequences,
    blocks, blocks_b, blocks_h, blocks_q, blocks_k, words, seen, seen_b, seen_h, seen_t, seen_n,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):
    """dq [B, Tq, H, D]; ``scale`` is in base 2, ``slope`` the same in natural units. Programs: blocks of queries fastest, then heads, then samples.
    blocks, words: a pattern; seen: of pattern_tiles_kernel."""
    program = tl.program_id(0)
    i_tile, i_bh = program % tiles, (program // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // group
    o_row = i_bh * q_tokens
    if cu_seqlens_q is not None:
        i_tile, q_start, q_tokens, k_start, k_tokens = place_among_packed(i_tile, cu_seqlens_q, cu_seqlens_k, sequences, BLOCK_M)
        o_row += q_start
        q += q_start * q_t * UNIT
        grad += q_start * g_t * UNIT
        k += k_start * k_t * UNIT
        v += k_start * v_t * UNIT
        dq += q_start * heads * DIM
    i_q = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_q = i_q < q_tokens
    b_q = load_block(q + (i_b * q_b + i_h * q_h) * UNIT, i_q, q_t * UNIT, q_d, q_tokens, DIM, BLOCK_D)
    b_grad = load_block(grad + (i_b * g_b + i_h * g_h) * UNIT, i_q, g_t * UNIT, g_d, q_tokens, DIM, BLOCK_D)
    b_base = tl.load(base + (o_row + i_q), mask=m_q, other=0.0)
    b_inverse = tl.load(inverse + (o_row + i_q), mask=m_q, other=0.0)
    b_delta = tl.load(delta + (o_row + i_q), mask=m_q, other=0.0)
    end = k_tokens
    if CAUSAL:
        end = tl.minimum(k_tokens, (i_tile + 1) * BLOCK_M)
    p_mask = mask
    if MASK:
        p_mask = mask + i_b * mask_b + i_h * mask_h + i_q.to(tl.int64)[:, None] * mask_q
    k += (i_b * k_b + i_kv * k_h) * UNIT
    v += (i_b * v_b + i_kv * v_h) * UNIT
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if blocks is not None:
        p_blocks = blocks + (i_b * blocks_b + i_h * blocks_h + (i_q // 32).to(tl.int64)[:, None] * blocks_q)
        p_seen = seen + (i_b * seen_b + i_h * seen_h + i_tile.to(tl.int64) * seen_t)
        b_dq = _over_keys(
            b_dq, b_q, b_grad, b_base, b_inverse, b_delta, i_q, q_tokens, k, k_t * UNIT, k_d, v, v_t * UNIT, v_d,
            0, tl.load(p_seen) * BLOCK_N, p_mask, mask_k, p_seen, p_blocks, words, k_tokens, scale, MASK, CAUSAL, True, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)
    else:
        whole = end // BLOCK_N * BLOCK_N
        b_dq = _over_keys(
            b_dq, b_q, b_grad, b_base, b_inverse, b_delta, i_q, q_tokens, k, k_t * UNIT, k_d, v, v_t * UNIT, v_d,
            0, whole, p_mask, mask_k, None, None, None, end, scale, MASK, CAUSAL, False, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)
        b_dq = _over_keys(
            b_dq, b_q, b_grad, b_base, b_inverse, b_delta, i_q, q_tokens, k, k_t * UNIT, k_d, v, v_t * UNIT, v_d,
            whole, end, p_mask, mask_k, None, None, None, end, scale, MASK, CAUSAL, True, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)
    store_block(dq, b_dq * slope, i_q, i_b, i_h, q_tokens, heads, DIM, BLOCK_D)


@triton.jit(do_not_specialize=["tiles", "q_tokens", "k_tokens", "heads", "group", "sequences"])
def dkdv_kernel(
    q, q_b, q_t, q_h, q_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, grad, g_b, g_t, g_h, g_d, base, inverse, delta, dk, dv,
    mask, mask_b, mask_h, mask_q, mask_k, tiles, q_tokens, k_tokens, heads, group, scale, slope, cu_seqlens_q, cu_seqlens_k, sequences,
    blocks, blocks_b, blocks_h, blocks_q, blocks_k, words, seen, seen_b, seen_h, seen_t, seen_n,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):
    """dk, dv [B, Tk, heads // group, D]. Programs: blocks of keys fastest, then the keys' heads, then samples. Logits and weights lie here as [keys, queries].
    blocks, words: a pattern; seen: of pattern_tiles_kernel, turned."""
    HIDING: tl.constexpr = MASK != 0 or CAUSAL or blocks is not None
    program = tl.program_id(0)
    i_tile, i_bkv = program % tiles, (program // tiles).to(tl.int64)
    kv_heads = heads // group
    i_b, i_kv = i_bkv // kv_heads, i_bkv % kv_heads
    o_rows = i_b * heads * q_tokens
    rows = q_tokens.to(tl.int64)  # of a head, in base, inverse and delta
    if cu_seqlens_k is not None:
        i_tile, k_start, k_tokens, q_start, q_tokens = place_among_packed(i_tile, cu_seqlens_k, cu_seqlens_q, sequences, BLOCK_N)
        o_rows += q_start
        q += q_start * q_t * UNIT
        grad += q_start * g_t * UNIT
        k += k_start * k_t * UNIT
        v += k_start * v_t * UNIT
        dk += k_start * kv_heads * DIM
        dv += k_start * kv_heads * DIM
    i_k = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = load_block(k + (i_b * k_b + i_kv * k_h) * UNIT, i_k, k_t * UNIT, k_d, k_tokens, DIM, BLOCK_D)
    b_v = load_block(v + (i_b * v_b + i_kv * v_h) * UNIT, i_k, v_t * UNIT, v_d, k_tokens, DIM, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = 0
    if CAUSAL:
        start = i_tile * BLOCK_N // BLOCK_M * BLOCK_M
    for i in range(0, group):
        i_h = i_kv * group + i
        p_q, p_grad = q + (i_b * q_b + i_h * q_h) * UNIT, grad + (i_b * g_b + i_h * g_h) * UNIT
        o_row = o_rows + i_h * rows
        begin, end = start, q_tokens
        if blocks is not None:
            p_seen = seen + (i_b * seen_b + i_h * seen_h + i_tile.to(tl.int64) * seen_t)
            begin, end = 0, tl.load(p_seen) * BLOCK_M
        for i_m in range(begin, end, BLOCK_M):
            first = i_m
            if blocks is not None:
                first = tl.load(p_seen + (i_m // BLOCK_M + tl.full([], 1, tl.int64))) * BLOCK_M
            i_q = first + tl.arange(0, BLOCK_M)
            m_q = i_q < q_tokens
            b_q = load_block(p_q, i_q, q_t * UNIT, q_d, q_tokens, DIM, BLOCK_D)
            b_grad = load_block(p_grad, i_q, g_t * UNIT, g_d, q_tokens, DIM, BLOCK_D)
            b_base = tl.load(base + (o_row + i_q), mask=m_q, other=0.0)
            b_inverse = tl.load(inverse + (o_row + i_q), mask=m_q, other=0.0)
            b_delta = tl.load(delta + (o_row + i_q), mask=m_q, other=0.0)
            b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            m_seen = (i_k < k_tokens)[:, None] & m_q[None, :]
            if CAUSAL:
                m_seen = m_seen & (i_q[None, :] >= i_k[:, None])
            if blocks is not None:
                p_blocks = blocks + (i_b * blocks_b + i_h * blocks_h + (i_q // 32).to(tl.int64)[None, :] * blocks_q)
                m_seen = m_seen & shown(p_blocks, words, i_q, i_tile * BLOCK_N, q_tokens, k_tokens, BLOCK_M, BLOCK_N, True)
            p_tile = mask
            if MASK:
                p_tile = mask + i_b * mask_b + i_h * mask_h + i_q.to(tl.int64)[None, :] * mask_q + i_k.to(tl.int64)[:, None] * mask_k
            b_p, m_seen = _weights(b_s, b_base[None, :], b_inverse[None, :], m_seen, p_tile, scale, MASK, HIDING)
            b_dv = dot(narrow(b_p, v.dtype.element_ty), b_grad, b_dv, PRECISION)
            b_dp = dot(b_v, tl.trans(b_grad), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            if HIDING:
                b_ds = tl.where(m_seen, b_ds, 0.0)
            b_dk = dot(narrow(b_ds, q.dtype.element_ty), b_q, b_dk, PRECISION)
    store_block(dk, b_dk * slope, i_k, i_b, i_kv, k_tokens, kv_heads, DIM, BLOCK_D)
    store_block(dv, b_dv, i_k, i_b, i_kv, k_tokens, kv_heads, DIM, BLOCK_D)


def _launch(grad, lse_grad, q, k, v, out, highest, total, mask, causal: bool, scale: float | None, cu_seqlens=(None, None),
            pattern=(None, None)) -> tuple[torch.Tensor, ...]:
    """``cu_seqlens``: of packed sequences, q's and k's, which are then one sample; ``pattern``: its blocks and words."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    batch, q_tokens, heads, dim = q.shape
    k_tokens, kv_heads = k.shape[1:3]
    tile = attention_backward_tile(dim, q.dtype.itemsize, mask is not None or causal or pattern[0] is not None, arch_of(q.device))
    base, inverse, delta = torch.empty((3, batch, heads, q_tokens), dtype=torch.float32, device=q.device).unbind(0)
    unit = unit_of(q, k, v, grad)
    rows, rows_unit = max(4096 // tile.dim, 16), unit_of(grad, out)
    tiles = cdiv(q_tokens, rows)
    launch(delta_kernel, batch * heads * tiles, q, *in_units(grad, rows_unit), *in_units(out, rows_unit), *strided(highest, 3), *strided(total, 3),
           *strided(lse_grad, 3), base, inverse, delta, tiles, q_tokens, heads, ROWS=rows, DIM=dim, BLOCK_D=tile.dim, UNIT=rows_unit,
           num_warps=4, num_stages=1, enable_fp_fusion=False)
    kind, masks = mask_of(mask)
    factor = default_scale(scale, dim)
    q_tiles, sequences = slots(q_tokens, tile.dq.queries, cu_seqlens[0])
    k_tiles, _ = slots(k_tokens, tile.dkdv.keys, cu_seqlens[1])
    cu_seqlens = tuple(x if x is None else x.contiguous() for x in cu_seqlens)
    inputs = (*(x for tensor in (q, k, v, grad) for x in in_units(tensor, unit)), base, inverse, delta)
    numbers = (q_tokens, k_tokens, heads, heads // max(kv_heads, 1), factor * LOG2E.value, factor, *cu_seqlens, sequences)
    for kernel, part, programs, tiles, results in ((dq_kernel, tile.dq, batch * heads, q_tiles, (dq,)), (dkdv_kernel, tile.dkdv, batch * kv_heads, k_tiles, (dk, dv))):
        seen = tiles_seen(pattern[0], (cdiv(q_tokens, part.queries), part.queries), (cdiv(k_tokens, part.keys), part.keys), kernel is dkdv_kernel)
        launch(kernel, programs * tiles, q, *inputs, *results, *masks, tiles, *numbers, *strided(pattern[0], 4), pattern[1], *strided(seen, 4), MASK=kind, CAUSAL=causal, PRECISION=tile.precision,
               BLOCK_M=part.queries, BLOCK_N=part.keys, DIM=dim, BLOCK_D=tile.dim, UNIT=unit, num_warps=part.warps, num_stages=part.stages,
               enable_fp_fusion=False, **({"maxnreg": part.registers} if part.registers else {}))
    return dq, dk, dv


def attention_backward(grad, lse_grad, q, k, v, out, highest, total, mask, causal: bool, scale: float | None, blocks=None,
                       words=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _launch(grad, lse_grad, q, k, v, out, highest, total, mask, causal, scale, pattern=(blocks, words))


def attention_varlen_backward(grad, lse_grad, q, k, v, out, highest, total, cu_seqlens_q, cu_seqlens_k, causal: bool,
                              scale: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (None if x is None else x.unsqueeze(0) for x in (grad, lse_grad, q, k, v, out, highest, total))
    return tuple(x.squeeze(0) for x in _launch(*tensors, None, causal, scale, (cu_seqlens_q, cu_seqlens_k)))
