"""Attention: the public ops, their registration and their backends."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusewire.kernels import checks
from fusewire.kernels.attention import cuda, native, reference, triton_limits
from fusewire.kernels.attention.patterns import BlockPattern
from fusewire.kernels.autograd import fused, recomputing
from fusewire.kernels.dispatch import Backend, Table, always, launched
from fusewire.kernels.library import define
from fusewire.kernels.norm.op import rms_norm
from fusewire.kernels.rounding import compute_dtype
from fusewire.kernels.triton_rows import row as triton_row


def _fake_attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks=None, words=None):
    return q.new_empty(q.shape)


def _fake_joint(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps):
    return q.new_empty(q.shape), q2.new_empty(q2.shape)


_backward, _setup = recomputing(reference.attention)
_attention_op = define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? q_weight, Tensor? k_weight, bool causal, float? scale, "
                       "float eps, Tensor? blocks=None, Tensor? words=None) -> Tensor",
                       fallback=reference.attention, fake=_fake_attention, backward=_backward, setup_context=_setup)
_backward, _setup = recomputing(reference.joint_attention)
_joint_op = define("joint_attention(Tensor q, Tensor k, Tensor v, Tensor q2, Tensor k2, Tensor v2, Tensor? q_weight, Tensor? k_weight, "
                   "Tensor? q2_weight, Tensor? k2_weight, float? scale, float eps) -> (Tensor, Tensor)",
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


_WEIGHTS = ("q_weight", "k_weight", "q2_weight", "k2_weight")


def _check(names: tuple[str, str, str], q, k, v) -> None:
    """q [B, Tq, H, D], k and v [B, Tk, H_kv, D], one dtype, one device."""
    if isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor):
        dtype, shape, key_shape = q.dtype, q.shape, k.shape
        if (k.dtype is dtype and v.dtype is dtype and dtype in checks.FLOATS and len(shape) == 4 and v.shape == key_shape
                and (key_shape == shape or key_shape[::2] == shape[::2] and key_shape[3:] == shape[3:])
                and (k.is_cpu and v.is_cpu if q.is_cpu else k.device == q.device == v.device)):
            return  # the common good input: everything below holds
    for name, x in zip(names, (q, k, v)):
        checks.floating(name, x)
        checks.rank(name, x, 4, "[B, T, H, D]")
    (batch, _, heads, channels), shape = q.shape, k.shape
    if shape[0] != batch or shape[3] != channels or (shape[2] != heads and (shape[2] == 0 or heads % shape[2])):
        raise ValueError(f"{names[1]} has shape {list(shape)}; for {names[0]} of shape {list(q.shape)} it should be [{batch}, T, H, {channels}] "
                         f"with H a divisor of {heads}")
    if v.shape != shape:
        raise ValueError(f"{names[2]} has shape {list(v.shape)}; it should be {list(shape)}, as {names[1]} has")
    for name, x in ((names[1], k), (names[2], v)):
        if x.dtype is not q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; it should be {q.dtype}, as {names[0]} has")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it should be on {q.device}, where {names[0]} is")


def _joins(q, k, v, q2, k2, v2) -> int:
    """The head dimension of the common joint attention, in few comparisons: on the CPU, each stream's q, k and v of one shape. 0: others, which
    take the checks below."""
    kind = torch.Tensor
    if not (isinstance(q, kind) and isinstance(k, kind) and isinstance(v, kind) and isinstance(q2, kind) and isinstance(k2, kind) and isinstance(v2, kind)):
        return 0
    dtype, shape, shape2 = q.dtype, k.shape, k2.shape
    if (k.dtype is dtype and v.dtype is dtype and q2.dtype is dtype and k2.dtype is dtype and v2.dtype is dtype and dtype in checks.FLOATS
            and q.is_cpu and k.is_cpu and v.is_cpu and q2.is_cpu and k2.is_cpu and v2.is_cpu
            and len(shape) == 4 == len(shape2) and q.shape == shape == v.shape and q2.shape == shape2 == v2.shape
            and shape[0] == shape2[0] and shape[2] == shape2[2] and shape[3] == shape2[3]):
        return shape[3]
    return 0


def _check_streams(q, k, q2, k2) -> None:
    """The second stream differs from the first in its tokens only."""
    for name, other, x in (("q", q, q2), ("k", k, k2)):
        shape, wanted = x.shape, other.shape
        if shape[0] != wanted[0] or shape[2:] != wanted[2:]:
            raise ValueError(f"{name}2 has shape {list(shape)}; it should be [{wanted[0]}, T, {wanted[2]}, {wanted[3]}], as {name} has")
    if q2.dtype is not q.dtype:
        raise TypeError(f"q2 has dtype {q2.dtype}; it should be {q.dtype}, as q has")
    if q2.device != q.device:
        raise ValueError(f"q2 is on {q2.device}; it should be on {q.device}, where q is")


def _check_rest(q, names: tuple[str, ...], weights: tuple, scale, eps) -> None:
    for name, weight in zip(names, weights):
        if weight is not None:
            checks.vector(name, weight, q.shape[3], q.device)
    if type(eps) is not float or not eps > 0:
        checks.positive("eps", eps)
    if scale is not None:
        checks.number("scale", scale)


def _full_mask(mask, q, k) -> torch.Tensor:
    """The mask as [B or 1, H or 1, Tq or 1, Tk]."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}; it should be a torch.Tensor or None")
    if mask.dtype is not torch.bool and mask.dtype not in checks.FLOATS:
        raise TypeError(f"mask has dtype {mask.dtype}; it should be bool (True: attend) or floating (added to the logits)")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}; it should be on {q.device}, where q is")
    shape = tuple(mask.shape)
    if len(shape) == 2:
        mask, shape = mask[None, None], (1, 1, *shape)
    batch, queries, heads, _ = q.shape
    if not (len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] in (1, queries) and shape[3] == k.shape[1]):
        raise ValueError(f"mask has shape {list(mask.shape)}; it should be [{batch} or 1, {heads} or 1, {queries} or 1, {k.shape[1]}] "
                         f"or [{queries}, {k.shape[1]}]")
    return mask


def _check_pattern(pattern, q, k) -> None:
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern is a {type(pattern).__name__}; it should be what fusewire.ops.block_pattern(function, {q.shape[1]}, {k.shape[1]}) "
                        "gives")
    if (pattern.q_len, pattern.k_len) != (q.shape[1], k.shape[1]):
        raise ValueError(f"pattern is for {pattern.q_len} queries and {pattern.k_len} keys; it should be for {q.shape[1]} and {k.shape[1]}")
    batch, heads = pattern.blocks.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        raise ValueError(f"pattern has batch={batch} and heads={heads}; for q of shape {list(q.shape)} they should be 1 or {q.shape[0]}, "
                         f"and 1 or {q.shape[2]}")
    if pattern.device != q.device:
        raise ValueError(f"pattern is on {pattern.device}; it should be on {q.device}, where q is: pattern.to({str(q.device)!r})")


def cast(tensors: tuple) -> tuple:
    """What autocast makes of the arguments of PyTorch's attention: all in its dtype (float64 stays)."""
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        return tensors  # for _check to refuse
    kind = checks.kind_of(tensors[0])
    if not checks.autocasts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x for x in tensors)


def learns(*tensors) -> bool:
    """Whether a gradient of any of them is wanted."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def attention(q, k, v, *, mask=None, causal: bool = False, scale: float | None = None, q_weight=None, k_weight=None,
              eps: float = 1e-6, return_lse: bool = False, pattern: BlockPattern | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``softmax(q k^T * scale + mask) v``, optionally with RMS norm of each head of q and k on the way in.

    Args:
        q: [B, Tq, H, D], float32, bfloat16, float16 or float64, any strides: views of projections and slices of a packed QKV are read in place.
        k, v: [B, Tk, H_kv, D] in q's dtype, any strides. H_kv divides H (grouped-query attention).
        mask: None; bool (True: attend); or floating, added to the scaled logits. [B or 1, H or 1, Tq or 1, Tk] or [Tq, Tk], any strides.
            A query that no key is left for gives 0. What a key holds that is hidden from every query never matters, even if it is NaN.
        causal: query i attends to keys 0..i only (counted from the first of each, as PyTorch does).
        scale: None for 1 / sqrt(D).
        q_weight, k_weight: [D]; where given, q (k) is normalised over D with this weight, in float32 and rounded once.
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
    _check(("q", "k", "v"), q, k, v)
    _check_rest(q, _WEIGHTS, (q_weight, k_weight), scale, eps)
    if mask is not None:
        mask = _full_mask(mask, q, k)
    blocks = words = None
    if pattern is not None:
        _check_pattern(pattern, q, k)
        blocks, words = pattern.blocks, pattern.words
    if return_lse or learns(q, k, v, mask, q_weight, k_weight):
        out, highest, total = _softmax(_normalised(q, q_weight, eps), _normalised(k, k_weight, eps), v, mask, causal, scale, blocks, words)
        return (out, log_sum_exp(highest, total).to(compute_dtype(q.dtype))) if return_lse else out
    return _attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks, words)


def log_sum_exp(highest, total) -> torch.Tensor:
    empty = total == 0
    return (highest.detach() + torch.log(total.masked_fill(empty, 1))).masked_fill(empty, -torch.inf)


def _normalised(x, weight, eps: float) -> torch.Tensor:
    return x if weight is None else rms_norm(x, weight, eps=eps, numerics="close").to(x.dtype)


def joint_attention(q, k, v, q2, k2, v2, *, q_weight=None, k_weight=None, q2_weight=None, k2_weight=None, eps: float = 1e-6,
                    scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two streams of tokens (image and text) as over one sequence, with neither concatenated nor normalised copies.

    Args:
        q, q2: [B, T, H, D] and [B, T2, H, D], one dtype (float32, bfloat16, float16 or float64), any strides.
        k, v and k2, v2: the keys and values of each stream, [B, T or T2 (any length), H_kv, D] in that dtype, any strides.
        q_weight, k_weight, q2_weight, k2_weight: [D]; where given, that tensor is RMS-normalised over D with this weight, in float32 and
            rounded once.
        eps: of the norms, added to the mean square; greater than 0.
        scale: None for 1 / sqrt(D).

    Returns: (out [B, T, H, D], out2 [B, T2, H, D]), contiguous, in q's dtype.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``scale`` or ``eps`` that is not as stated.
    Source: Esser et al. (2024), "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", the joint attention of MMDiT.
    """
    if torch._C._is_any_autocast_enabled():
        q, k, v, q2, k2, v2 = cast((q, k, v, q2, k2, v2))
    channels = _joins(q, k, v, q2, k2, v2)
    if not channels:
        _check(("q", "k", "v"), q, k, v)
        _check(("q2", "k2", "v2"), q2, k2, v2)
        _check_streams(q, k, q2, k2)
    if not (q_weight is k_weight is q2_weight is k2_weight is scale is None and type(eps) is float and eps > 0):
        _check_rest(q, _WEIGHTS, (q_weight, k_weight, q2_weight, k2_weight), scale, eps)
    if torch.is_grad_enabled() and learns(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight):
        pairs = ((_normalised(q, q_weight, eps), _normalised(q2, q2_weight, eps)), (_normalised(k, k_weight, eps), _normalised(k2, k2_weight, eps)), (v, v2))
        out, _, _ = _softmax(*(torch.cat(pair, dim=1) for pair in pairs), None, False, scale)
        return tuple(part.contiguous() for part in out.split((q.shape[1], q2.shape[1]), dim=1))
    table = _joint.by_cpu if 0 < channels <= native.MAX_CHANNELS else _joint
    return table(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps)
