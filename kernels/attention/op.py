"""Attention: the public ops, their registration and their backends."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusewire.kernels.attention import cuda, native, prologue, reference, triton_limits
from fusewire.kernels.attention.arguments import WEIGHTS, cast, check, check_pattern, check_rest, check_streams, full_mask, joins, learns
from fusewire.kernels.attention.patterns import BlockPattern
from fusewire.kernels.autograd import fused, recomputing
from fusewire.kernels.dispatch import Backend, Table, always, launched
from fusewire.kernels.library import define
from fusewire.kernels.qk_norm_rope.forms import check_rope
from fusewire.kernels.rounding import compute_dtype
from fusewire.kernels.triton_rows import row as triton_row


def _fake_attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks=None, words=None, cos=None, sin=None):
    return q.new_empty(q.shape)


def _fake_joint(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps, cos=None, sin=None, cos2=None, sin2=None):
    return q.new_empty(q.shape), q2.new_empty(q2.shape)


_backward, _setup = recomputing(reference.attention)
_attention_op = define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? q_weight, Tensor? k_weight, bool causal, float? scale, "
                       "float eps, Tensor? blocks=None, Tensor? words=None, Tensor? cos=None, Tensor? sin=None) -> Tensor",
                       fallback=reference.attention, fake=_fake_attention, backward=_backward, setup_context=_setup)
_backward, _setup = recomputing(reference.joint_attention)
_joint_op = define("joint_attention(Tensor q, Tensor k, Tensor v, Tensor q2, Tensor k2, Tensor v2, Tensor? q_weight, Tensor? k_weight, "
                   "Tensor? q2_weight, Tensor? k2_weight, float? scale, float eps, Tensor? cos=None, Tensor? sin=None, "
                   "Tensor? cos2=None, Tensor? sin2=None) -> (Tensor, Tensor)",
                   fallback=reference.joint_attention, fake=_fake_joint, backward=_backward, setup_context=_setup)


def _fake_softmax(q, k, v, mask, causal, scale, blocks=None, words=None):
    rows = (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float64), q.new_empty(rows, dtype=torch.float64)


def _fake_gradients(grad, lse_grad, q, k, v, out, highest, total, mask, causal, scale, blocks=None, words=None):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_gradients_op = define("attention_backward(Tensor grad, Tensor? lse_grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor highest, Tensor total, "
                       "Tensor? mask, bool causal, float? scale, Tensor? blocks=None, Tensor? words=None) -> (Tensor, Tensor, Tensor)",
                       fallback=reference.attention_backward, fake=_fake_gradients)


def _cpu_gradients(grad, lse_grad, q, k, v, out, highest, total, mask, causal, scale, blocks=None, words=None):
    if mask is not None or blocks is not None or causal and k.shape[1] > q.shape[1]:
        k, v = reference.without_unused(q, k, v, mask, causal, blocks, words)
    return _gradients_op(grad, lse_grad, q, k, v, out, highest, total, mask, causal, scale, blocks, words)


_gradients = Table("attention_backward", [
    Backend("cpu", native.why_not_backward, _cpu_gradients),
    launched("cuda", _gradients_op, cuda.why_not_backward, cuda.attention_backward),
    triton_row(_gradients_op, triton_limits.why_not_backward, "attention.triton_backward.attention_backward"),
    Backend("reference", always, reference.attention_backward),
])


def gradients_by(table: Table) -> Callable:
    """The gradients of an op (q, k, v, *rest) -> (out, highest, total), by a table (grad, lse_grad, q, k, v, out, highest, total, *rest)."""
    def gradients_of(needed, grads, q, k, v, *others):
        *rest, out, highest, total = others
        grad, _, total_grad = grads
        # With the highest logit as a constant, the gradient of the total is that of the log-sum-exp over the total.
        lse_grad = None if total_grad is None else (total_grad * total).masked_fill(total == 0, 0)
        grad = torch.zeros_like(out) if grad is None else grad
        return *table(grad, lse_grad, q, k, v, out, highest, total, *rest), *(None for _ in rest)
    return gradients_of


def _recomputed(q, k, v, mask, causal, scale, blocks=None, words=None) -> bool:
    """For few queries PyTorch's float32 products are as fast, and sum in shorter chains; no kernel has the gradient of a mask."""
    return mask is not None and mask.requires_grad or q.is_cpu and q.dtype is torch.float32 and q.shape[1] < native.FEW_QUERIES


_backward, _setup = fused(reference.attention_softmax, gradients_by(_gradients), _recomputed, kept=slice(None))
_softmax_op = define("attention_softmax(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale, Tensor? blocks=None, "
                     "Tensor? words=None) -> (Tensor, Tensor, Tensor)",
                     fallback=reference.attention_softmax, fake=_fake_softmax, backward=_backward, setup_context=_setup)
_softmax = Table("attention_softmax", [
    Backend("cpu", native.why_not_softmax, _softmax_op),
    launched("cuda", _softmax_op, cuda.why_not_softmax, cuda.attention_softmax),
    triton_row(_softmax_op, triton_limits.why_not_softmax, "attention.attention_softmax"),
    Backend("reference", always, reference.attention_softmax),
])
_attention = Table("attention", [
    Backend("cpu", native.why_not_attention, _attention_op),
    launched("cuda", _attention_op, cuda.why_not_attention, cuda.attention),
    triton_row(_attention_op, triton_limits.why_not_attention, "attention.attention"),
    Backend("reference", always, reference.attention),
])
_joint = Table("joint_attention", [
    Backend("cpu", native.why_not_joint, _joint_op),
    launched("cuda", _joint_op, cuda.why_not_joint, cuda.joint_attention),
    triton_row(_joint_op, triton_limits.why_not_joint, "attention.joint_attention"),
    Backend("reference", always, reference.joint_attention),
])


def attention(q, k, v, *, mask=None, causal: bool = False, scale: float | None = None, q_weight=None, k_weight=None,
              rope=None, eps: float = 1e-6, return_lse: bool = False,
              pattern: BlockPattern | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(q k^T * scale + mask) v``, optionally with RMS norm and rotary embedding of each head of q and k on the way in.

    Args:
        q: [B, Tq, H, D], float32, bfloat16, float16 or float64, any strides: views of projections and slices of a packed QKV are read in place.
        k, v: [B, Tk, H_kv, D] in q's dtype, any strides. H_kv divides H (grouped-query attention).
        mask: None; bool (True: attend); or floating, added to the scaled logits. [B or 1, H or 1, Tq or 1, Tk] or [Tq, Tk], any strides.
            A query that no key is left for gives 0. What a key holds that is hidden from every query never matters, even if it is NaN.
        causal: query i attends to keys 0..i only (counted from the first of each, as PyTorch does).
        scale: None for 1 / sqrt(D).
        q_weight, k_weight: [D]; where given, q (k) is normalised over D with this weight, in float32 and rounded once.
        rope: None; or the tables by which token t's pairs (x[2i], x[2i+1]) of q and k are turned, after the norm: (cos, sin), each float32
            [T, D/2] or [B, T, D/2], or one complex64 tensor, as ``qk_norm_rope`` takes them. Tq and Tk are the same then.
        eps: of that norm, added to the mean square; greater than 0.
        return_lse: also return the log-sum-exp of each query's scaled and masked logits, [B, H, Tq] in float32 (float64 for float64), natural
            logarithm, -inf where no key is left. Parts of a sequence that were attended to apart can be put together with it.
        pattern: what ``block_pattern`` made of a function of places, once for many calls. Blocks of 32 queries and 32 keys that it hides are not
            computed, where a mask would only hide them. It goes together with ``mask`` and ``causal``: a key is seen that all let through.

    Returns: [B, Tq, H, D], contiguous, in q's dtype; with ``return_lse`` the pair (that, log-sum-exp).
    Never bit-equal to PyTorch's: ``numerics="close"`` in the sense of the other ops. Under autocast q, k and v are cast as for PyTorch's attention.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``scale`` or ``eps`` that is not as stated.
    Source: Dao et al. (2022), "FlashAttention"; Vaswani et al. (2017).
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v = cast((q, k, v))
    elif mask is q_weight is k_weight is pattern is None and not return_lse and (out := cuda.at_once(q, k, v, causal, scale)) is not None:
        _attention.calls["cuda"] += 1
        return out
    check(("q", "k", "v"), q, k, v)
    check_rest(q, WEIGHTS, (q_weight, k_weight), scale, eps)
    if mask is not None:
        mask = full_mask(mask, q, k)
    blocks = words = None
    if pattern is not None:
        check_pattern(pattern, q, k)
        blocks, words = pattern.blocks, pattern.words
    softmax = return_lse or learns(q, k, v, mask, q_weight, k_weight)
    if rope is not None:
        check_rope(q, k, rope)
        if not softmax and prologue.within(q, rope):
            return _attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks, words, *prologue.full(rope, q.shape[3]))
        q, k = prologue.apart(q, k, q_weight, k_weight, rope, eps)
        return attention(q, k, v, mask=mask, causal=causal, scale=scale, return_lse=return_lse, pattern=pattern)
    if softmax:
        q, k = prologue.normalised(q, q_weight, eps), prologue.normalised(k, k_weight, eps)
        out, highest, total = _softmax(q, k, v, mask, causal, scale, blocks, words)
        return (out, log_sum_exp(highest, total).to(compute_dtype(q.dtype))) if return_lse else out
    return _attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks, words)


def log_sum_exp(highest, total) -> torch.Tensor:
    empty = total == 0
    return (highest.detach() + torch.log(total.masked_fill(empty, 1))).masked_fill(empty, -torch.inf)


def joint_attention(q, k, v, q2, k2, v2, *, q_weight=None, k_weight=None, q2_weight=None, k2_weight=None, rope=None, rope2=None,
                    eps: float = 1e-6, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two streams of tokens (image and text) as over one sequence, with neither concatenated nor normalised copies.

    Args:
        q, q2: [B, T, H, D] and [B, T2, H, D], one dtype (float32, bfloat16, float16 or float64), any strides.
        k, v and k2, v2: the keys and values of each stream, [B, T or T2 (any length), H_kv, D] in that dtype, any strides.
        q_weight, k_weight, q2_weight, k2_weight: [D]; where given, that tensor is RMS-normalised over D with this weight, in float32 and
            rounded once.
        rope, rope2: None, or the tables by which the pairs of q and k (of q2 and k2) are turned after their norm, as ``attention`` takes them.
        eps: of the norms, added to the mean square; greater than 0.
        scale: None for 1 / sqrt(D).

    Returns: (out [B, T, H, D], out2 [B, T2, H, D]), contiguous, in q's dtype.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``scale`` or ``eps`` that is not as stated.
    Source: Esser et al. (2024), "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", the joint attention of MMDiT.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v, q2, k2, v2 = cast((q, k, v, q2, k2, v2))
    channels = joins(q, k, v, q2, k2, v2)
    if not channels:
        check(("q", "k", "v"), q, k, v)
        check(("q2", "k2", "v2"), q2, k2, v2)
        check_streams(q, k, q2, k2)
    if not (q_weight is k_weight is q2_weight is k2_weight is scale is None and type(eps) is float and eps > 0):
        check_rest(q, WEIGHTS, (q_weight, k_weight, q2_weight, k2_weight), scale, eps)
    learning = torch.is_grad_enabled() and learns(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight)
    if rope is not None or rope2 is not None:
        for queries, keys, tables, name in ((q, k, rope, "rope"), (q2, k2, rope2, "rope2")):
            if tables is not None:
                check_rope(queries, keys, tables, name)
        if not learning and prologue.within(q, rope, rope2):
            tables = *prologue.full(rope, q.shape[3]), *prologue.full(rope2, q.shape[3])
            return _joint(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps, *tables)
        if rope is not None:
            q, k = prologue.apart(q, k, q_weight, k_weight, rope, eps)
            q_weight = k_weight = None
        if rope2 is not None:
            q2, k2 = prologue.apart(q2, k2, q2_weight, k2_weight, rope2, eps)
            q2_weight = k2_weight = None
        learning = torch.is_grad_enabled() and learns(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight)  # a table may
    if learning:
        pairs = (((q, q_weight), (q2, q2_weight)), ((k, k_weight), (k2, k2_weight)), ((v, None), (v2, None)))
        joined = (torch.cat([prologue.normalised(x, weight, eps) for x, weight in pair], dim=1) for pair in pairs)
        out, _, _ = _softmax(*joined, None, False, scale)
        return tuple(part.contiguous() for part in out.split((q.shape[1], q2.shape[1]), dim=1))
    table = _joint.by_cpu if 0 < channels <= native.MAX_CHANNELS else _joint
    return table(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps)
