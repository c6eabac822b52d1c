"""Flash attention in Triton over a sequence given in one or two segments (image and text), which are never concatenated.

Dao et al., "FlashAttention" (2022) and Dao, "FlashAttention-2" (2023): blocks of keys in turn, a running maximum and sum for each query,
scores in base 2. One program owns a block of queries of one head and reads the keys of both segments, always in the same order: no atomics,
and no result depends on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fusewire.kernels.attention.hopper_limits import why_not_hopper
from fusewire.kernels.attention.triton_blocks import LN2, LOG2E, dot, in_units, load_block, mask_of, masked, place_among_packed, shown, slots, store_block, tiles_seen, unit_of
from fusewire.kernels.attention.triton_limits import default_scale
from fusewire.kernels.qk_norm_rope import op as qk_norm_op
from fusewire.kernels.qk_norm_rope import triton_kernel as qk_norm
from fusewire.kernels.qk_norm_rope.reference import RMS
from fusewire.kernels.triton_base import fused, inner_contiguous, narrow, strided
from fusewire.kernels.triton_launch import arch_of, launch
from fusewire.kernels.tuning import attention_tile, cdiv


@triton.jit
def _queries(q, q_t, q_d, weight, weight_d, i_tile, tokens, eps, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(a block of queries [BLOCK_M, BLOCK_D], their numbers in the segment); RMS-normalised over the head dimension where there is a weight."""
    i_q = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = load_block(q, i_q, q_t, q_d, tokens, DIM, BLOCK_D)
    if weight is not None:
        o_d = tl.arange(0, BLOCK_D)
        b_x = b_q.to(tl.float32)
        b_w = tl.load(weight + o_d.to(tl.int64) * weight_d, mask=o_d < DIM, other=0.0).to(tl.float32)
        b_q = narrow(b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / DIM + eps)[:, None] * b_w[None, :], q.dtype.element_ty)
    return b_q, i_q


@triton.jit
def _attend(
    b_acc, b_max, b_sum, b_q, i_q, q_tokens, k, k_t, k_d, v, v_t, v_d, start, end, p_mask, mask_k, tiles, p_blocks, words, k_tokens, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CHECKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The keys [start, end) of one segment. CHECKED: they may fill less than whole blocks. Where there are tiles, those blocks of the k_tokens
    keys that they list, under a pattern: see pattern_tiles_kernel."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DIM
    o_start = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
    p_k = k + o_start[None, :] * k_t + o_d.to(tl.int64)[:, None] * k_d
    p_v = v + o_start[:, None] * v_t + o_d.to(tl.int64)[None, :] * v_d
    step_k, step_v = tl.full([], BLOCK_N, tl.int64) * k_t, tl.full([], BLOCK_N, tl.int64) * v_t
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        if tiles is not None:
            first = tl.load(tiles + (i_n // BLOCK_N + tl.full([], 1, tl.int64))) * BLOCK_N
            o_n = first + tl.arange(0, BLOCK_N)
            m_n = o_n < k_tokens
            p_k = k + o_n.to(tl.int64)[None, :] * k_t + o_d.to(tl.int64)[:, None] * k_d
            p_v = v + o_n.to(tl.int64)[:, None] * v_t + o_d.to(tl.int64)[None, :] * v_d
        if CHECKED and DIM != BLOCK_D:
            b_k = tl.load(p_k, mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_v = tl.load(p_v, mask=m_n[:, None] & m_d[None, :], other=0.0)
        elif CHECKED:
            b_k = tl.load(p_k, mask=m_n[None, :], other=0.0)
            b_v = tl.load(p_v, mask=m_n[:, None], other=0.0)
        elif DIM != BLOCK_D:
            b_k = tl.load(p_k, mask=m_d[:, None], other=0.0)
            b_v = tl.load(p_v, mask=m_d[None, :], other=0.0)
        else:
            b_k = tl.load(p_k)
            b_v = tl.load(p_v)
        b_s = dot(b_q, b_k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        m_qn = (i_q < q_tokens)[:, None] & m_n[None, :]
        if CAUSAL:
            m_qn = m_qn & (i_q[:, None] >= o_n[None, :])
        if tiles is not None:
            m_qn = m_qn & shown(p_blocks, words, i_q, first, q_tokens, k_tokens, BLOCK_M, BLOCK_N, False)
        p_tile = p_mask
        if MASK:
            p_tile = p_mask + o_n.to(tl.int64)[None, :] * mask_k
        b_s, m_qn = masked(b_s, m_qn, p_tile, scale, MASK)
        if MASK or CAUSAL or CHECKED:  # (a pattern is CHECKED)
            b_s = tl.where(m_qn, b_s, float("-inf"))
        if MASK or CAUSAL or tiles is not None:
            # 0 * NaN is NaN: the values of keys that no query of the block sees do not enter the product
            b_v = tl.where((tl.max(b_s, 0) != float("-inf"))[:, None], b_v, 0.0)
        unit = 1.0 if MASK == 2 else scale
        b_max_new = tl.maximum(b_max, tl.max(b_s, 1) * unit)
        b_safe = b_max_new
        if MASK or CAUSAL or CHECKED:
            b_safe = tl.where(b_max_new == float("-inf"), 0.0, b_max_new)  # a query that has seen no key yet: -inf - -inf would be NaN
        # One rounding of s * scale - max, which is near zero for the keys that count
        b_s = fused(b_s, tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32) * unit, tl.broadcast_to(-b_safe[:, None], [BLOCK_M, BLOCK_N]))
        b_p = tl.exp2(b_s)
        b_alpha = tl.exp2(b_max - b_safe)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_acc = dot(narrow(b_p, v.dtype.element_ty), b_v, b_acc * b_alpha[:, None], PRECISION)
        b_max = b_max_new
        p_k += step_k
        p_v += step_v
    return b_acc, b_max, b_sum


@triton.jit
def _attend_segment(
    b_acc, b_max, b_sum, b_q, i_q, q_tokens, k, k_t, k_d, v, v_t, v_d, end, p_mask, mask_k, tiles, p_blocks, words, k_tokens, scale,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """The keys [0, end) of one segment: whole blocks without bounds checks, then the rest."""
    if tiles is not None:
        return _attend(
            b_acc, b_max, b_sum, b_q, i_q, q_tokens, k, k_t, k_d, v, v_t, v_d, 0, end, p_mask, mask_k, tiles, p_blocks, words, k_tokens, scale,
            MASK, CAUSAL, True, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)
    whole = end // BLOCK_N * BLOCK_N
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, i_q, q_tokens, k, k_t, k_d, v, v_t, v_d, 0, whole, p_mask, mask_k, None, None, None, end, scale,
        MASK, CAUSAL, False, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)
    return _attend(
        b_acc, b_max, b_sum, b_q, i_q, q_tokens, k, k_t, k_d, v, v_t, v_d, whole, end, p_mask, mask_k, None, None, None, end, scale,
        MASK, CAUSAL, True, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)


@triton.jit
def _finish(out, highest, total, o_row, b_acc, b_max, b_sum, i_q, i_b, i_h, tokens, heads, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A query that saw no key gives 0, and a total of 0. ``out``: contiguous [B, T, H, D]; ``highest``, in natural units, and ``total`` [B, H, T]."""
    store_block(out, b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None], i_q, i_b, i_h, tokens, heads, DIM, BLOCK_D)
    if total is not None:
        # float64, so that the gradients' kernels get back what was subtracted here, to the last bit
        b_highest = b_max.to(tl.float64) * tl.full(b_max.shape, LN2, tl.float64)
        tl.store(highest + (o_row + i_q), b_highest, mask=i_q < tokens)
        tl.store(total + (o_row + i_q), b_sum.to(tl.float64), mask=i_q < tokens)


# Numbers of tokens are not specialised on: no recompilation for each picture size
@triton.jit(do_not_specialize=["tiles", "tiles2", "q_tokens", "q2_tokens", "k_tokens", "k2_tokens", "heads", "group", "sequences"])
def attention_kernel(
    q, q_b, q_t, q_h, q_d, q_weight, q_weight_d, k, k_b, k_t, k_h, k_d, v, v_b, v_t, v_h, v_d, out,
    q2, q2_b, q2_t, q2_h, q2_d, q2_weight, q2_weight_d, k2, k2_b, k2_t, k2_h, k2_d, v2, v2_b, v2_t, v2_h, v2_d, out2,
    mask, mask_b, mask_h, mask_q, mask_k, highest, total, tiles, tiles2, q_tokens, q2_tokens, k_tokens, k2_tokens, heads, group, scale, eps, cu_seqlens_q, cu_seqlens_k, sequences,
    blocks, blocks_b, blocks_h, blocks_q, blocks_k, words, seen, seen_b, seen_h, seen_t, seen_n,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr,
):
    """softmax(q k^T * scale + mask) v; ``scale`` is in base 2, strides of q, k and v other than the last are in UNIT elements. Programs: blocks of queries fastest, then heads, then samples.

    The second segment (q2, ...) is None where there is one only; mask and causal go with one segment. Where there is cu_seqlens_q, that segment is
    packed sequences: a program then sees one of them, as if it were all. blocks, words: a pattern; seen: of pattern_tiles_kernel.
    """
    program = tl.program_id(0)
    i_tile, i_bh = program % (tiles + tiles2), (program // (tiles + tiles2)).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // group
    o_row = i_bh * (q_tokens + q2_tokens)
    if cu_seqlens_q is not None:
        i_tile, q_start, q_tokens, k_start, k_tokens = place_among_packed(i_tile, cu_seqlens_q, cu_seqlens_k, sequences, BLOCK_M)
        o_row += q_start
        q += q_start * q_t * UNIT
        k += k_start * k_t * UNIT
        v += k_start * v_t * UNIT
        out += q_start * heads * DIM
    if q2 is None:
        tokens = q_tokens
        b_q, i_q = _queries(q + (i_b * q_b + i_h * q_h) * UNIT, q_t * UNIT, q_d, q_weight, q_weight_d, i_tile, q_tokens, eps, DIM, BLOCK_M, BLOCK_D)
    else:
        second = i_tile >= tiles
        tokens = tl.where(second, q2_tokens, q_tokens)
        if second:
            b_q, i_q = _queries(q2 + (i_b * q2_b + i_h * q2_h) * UNIT, q2_t * UNIT, q2_d, q2_weight, q2_weight_d, i_tile - tiles, q2_tokens, eps, DIM, BLOCK_M, BLOCK_D)
        else:
            b_q, i_q = _queries(q + (i_b * q_b + i_h * q_h) * UNIT, q_t * UNIT, q_d, q_weight, q_weight_d, i_tile, q_tokens, eps, DIM, BLOCK_M, BLOCK_D)

    end = k_tokens
    if CAUSAL:
        end = tl.minimum(k_tokens, (i_tile + 1) * BLOCK_M)
    p_seen, p_blocks = seen, blocks
    if blocks is not None:
        p_blocks = blocks + (i_b * blocks_b + i_h * blocks_h + (i_q // 32).to(tl.int64)[:, None] * blocks_q)
        p_seen = seen + (i_b * seen_b + i_h * seen_h + i_tile.to(tl.int64) * seen_t)
        end = tl.load(p_seen) * BLOCK_N
    p_mask = mask
    if MASK:
        p_mask = mask + i_b * mask_b + i_h * mask_h + i_q.to(tl.int64)[:, None] * mask_q
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc, b_max, b_sum = _attend_segment(
        b_acc, b_max, b_sum, b_q, i_q, tokens, k + (i_b * k_b + i_kv * k_h) * UNIT, k_t * UNIT, k_d, v + (i_b * v_b + i_kv * v_h) * UNIT, v_t * UNIT, v_d, end,
        p_mask, mask_k, p_seen, p_blocks, words, k_tokens, scale, MASK, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)
    if k2 is not None:
        b_acc, b_max, b_sum = _attend_segment(
            b_acc, b_max, b_sum, b_q, i_q, tokens, k2 + (i_b * k2_b + i_kv * k2_h) * UNIT, k2_t * UNIT, k2_d, v2 + (i_b * v2_b + i_kv * v2_h) * UNIT, v2_t * UNIT, v2_d, k2_tokens,
            p_mask, mask_k, None, None, None, k2_tokens, scale, MASK, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, DIM, BLOCK_D)

    if q2 is None:
        _finish(out, highest, total, o_row, b_acc, b_max, b_sum, i_q, i_b, i_h, q_tokens, heads, DIM, BLOCK_D)
    else:
        if second:
            _finish(out2, highest, total, o_row + q_tokens, b_acc, b_max, b_sum, i_q, i_b, i_h, q2_tokens, heads, DIM, BLOCK_D)
        else:
            _finish(out, highest, total, o_row, b_acc, b_max, b_sum, i_q, i_b, i_h, q_tokens, heads, DIM, BLOCK_D)


def _launch(first, second, mask, weights, softmax, causal: bool, scale: float | None, eps: float, cu_seqlens=(None, None),
            pattern=(None, None)) -> None:
    """``first``, ``second``: (q, k, v, out) of a segment, the second of None where there is one only; ``weights``: those of q and q2;
    ``softmax``: None twice, or float64 [B, H, T] for each query's highest logit and total; ``cu_seqlens``: of packed sequences, q's and k's;
    ``pattern``: its blocks and words."""
    # The norm sums over the head dimension of the queries
    first, second = ((q if weight is None else inner_contiguous(q), *rest) for (q, *rest), weight in zip((first, second), weights))
    q, k = first[:2]
    q2, k2 = second[:2]
    batch, q_tokens, heads, dim = q.shape
    q2_tokens, k2_tokens = (0 if x is None else x.shape[1] for x in (q2, k2))
    tile = attention_tile(dim, q.dtype.itemsize, mask is not None or pattern[0] is not None, causal, arch_of(q.device))
    (tiles, sequences), tiles2 = slots(q_tokens, tile.queries, cu_seqlens[0]), cdiv(q2_tokens, tile.queries)
    cu_seqlens = tuple(x if x is None else x.contiguous() for x in cu_seqlens)
    seen = tiles_seen(pattern[0], (tiles, tile.queries), (cdiv(k.shape[1], tile.keys), tile.keys))
    kind, masks = mask_of(mask)
    segments = []
    unit = unit_of(*first[:3], *second[:3])
    for (queries, keys, values, out), weight in zip((first, second), weights):
        segments += [*in_units(queries, unit), *strided(weight, 1), *in_units(keys, unit), *in_units(values, unit), out]
    launch(
        attention_kernel, batch * heads * (tiles + tiles2), q, *segments,
        *masks, *softmax, tiles, tiles2, q_tokens, q2_tokens, k.shape[1], k2_tokens,
        heads, heads // max(k.shape[2], 1), default_scale(scale, dim) * LOG2E.value, eps, *cu_seqlens, sequences, *strided(pattern[0], 4), pattern[1], *strided(seen, 4),
        MASK=kind, CAUSAL=causal, PRECISION=tile.precision, BLOCK_M=tile.queries, BLOCK_N=tile.keys, DIM=dim, BLOCK_D=tile.dim, UNIT=unit,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,  # fused where the code says so: equal bits for any layout
    )


def _normalised(tensors, weights, eps: float, into=qk_norm.qk_norm_into) -> list:
    """The two tensors, those with a weight RMS-normalised into fresh ones by one launch (keys: every block of queries reads them again, so once is best)."""
    wanted = [i for i, weight in enumerate(weights) if weight is not None]
    if not wanted:
        return list(tensors)
    fresh = {i: torch.empty_like(tensors[i], memory_format=torch.contiguous_format) for i in wanted}
    one, other = wanted[0], wanted[-1]
    if one == other:  # the second tensor of the launch has no tokens
        into(tensors[one], tensors[one][:, :0], weights[one], None, fresh[one], fresh[one][:, :0], None, None, eps, RMS, False)
    else:
        into(tensors[one], tensors[other], weights[one], weights[other], fresh[one], fresh[other], None, None, eps, RMS, False)
    return [fresh.get(i, x) for i, x in enumerate(tensors)]


def attention(q, k, v, mask, q_weight, k_weight, causal: bool, scale: float | None, eps: float, blocks=None, words=None, softmax=(None, None)) -> torch.Tensor:
    """``softmax``: None twice, or float64 [B, H, Tq] for each query's highest logit, and for the sum of exp(logit - highest)."""
    if mask is None and blocks is None and softmax[0] is None and not why_not_hopper(q, k, scale):
        from fusewire.kernels.attention import hopper

        return hopper.attention(*_normalised((q, k), (q_weight, k_weight), eps, qk_norm_op._into), v, causal, scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    (k,) = _normalised((k,), (k_weight,), eps)
    _launch((q, k, v, out), (None,) * 4, mask, (q_weight, None), softmax, causal, scale, eps, pattern=(blocks, words))
    return out


def attention_softmax(q, k, v, mask, causal: bool, scale: float | None, blocks=None, words=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    softmax = tuple(torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float64, device=q.device) for _ in range(2))
    return attention(q, k, v, mask, None, None, causal, scale, 1.0, blocks, words, softmax), *softmax


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal: bool, scale: float | None, softmax=(None, None)) -> torch.Tensor:
    """``softmax``: None twice, or float64 [H, Tq], as ``attention`` has it."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    segment = tuple(x.unsqueeze(0) for x in (q, k, v, out))
    _launch(segment, (None,) * 4, None, (None, None), softmax, causal, scale, 1.0, (cu_seqlens_q, cu_seqlens_k))
    return out


def attention_varlen_softmax(q, k, v, cu_seqlens_q, cu_seqlens_k, causal: bool,
                             scale: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    softmax = tuple(torch.empty((q.shape[1], q.shape[0]), dtype=torch.float64, device=q.device) for _ in range(2))
    return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, softmax), *softmax


def joint_attention(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale: float | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    if not why_not_hopper(q, k, scale, q2, k2):
        from fusewire.kernels.attention import hopper

        (q, k), (q2, k2) = (_normalised(pair, weights, eps, qk_norm_op._into)
                            for pair, weights in (((q, k), (q_weight, k_weight)), ((q2, k2), (q2_weight, k2_weight))))
        return hopper.joint_attention(q, k, v, q2, k2, v2, scale)
    out, out2 = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, q2))
    k, k2 = _normalised((k, k2), (k_weight, k2_weight), eps)
    _launch((q, k, v, out), (q2, k2, v2, out2), None, (q_weight, q2_weight), (None, None), False, scale, eps)
    return out, out2
