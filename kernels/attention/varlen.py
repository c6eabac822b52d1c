"""Attention over sequences of different lengths, packed one after another: the public op, its registration and its backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.attention import native, reference, triton_limits
from fusewire.kernels.attention.arguments import cast, learns
from fusewire.kernels.attention.op import gradients_by, log_sum_exp
from fusewire.kernels.autograd import fused, recomputing
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.rounding import compute_dtype
from fusewire.kernels.triton_rows import row as triton_row


def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale):
    return q.new_empty(q.shape)


def _fake_softmax(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale):
    rows = (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(rows, dtype=torch.float64), q.new_empty(rows, dtype=torch.float64)


def _fake_gradients(grad, lse_grad, q, k, v, out, highest, total, cu_seqlens_q, cu_seqlens_k, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_backward, _setup = recomputing(reference.attention_varlen)
_attention_op = define("attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float? scale) "
                       "-> Tensor",
                       fallback=reference.attention_varlen, fake=_fake, backward=_backward, setup_context=_setup)
_gradients_op = define("attention_varlen_backward(Tensor grad, Tensor? lse_grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor highest, "
                       "Tensor total, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float? scale) -> (Tensor, Tensor, Tensor)",
                       fallback=reference.attention_varlen_backward, fake=_fake_gradients)
_gradients = Table("attention_varlen_backward", [
    Backend("cpu", native.why_not_varlen_backward, _gradients_op),
    triton_row(_gradients_op, triton_limits.why_not_varlen_backward, "attention.triton_backward.attention_varlen_backward"),
    Backend("reference", always, reference.attention_varlen_backward),
])


def _recomputed(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale) -> bool:
    """As for ``attention``, by the sequences' average number of queries."""
    return q.is_cpu and q.dtype is torch.float32 and q.shape[0] < native.FEW_QUERIES * (cu_seqlens_q.shape[0] - 1)


_backward, _setup = fused(reference.attention_varlen_softmax, gradients_by(_gradients), _recomputed, kept=slice(None))
_softmax_op = define("attention_varlen_softmax(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float? scale) "
                     "-> (Tensor, Tensor, Tensor)",
                     fallback=reference.attention_varlen_softmax, fake=_fake_softmax, backward=_backward, setup_context=_setup)
_softmax = Table("attention_varlen_softmax", [
    Backend("cpu", native.why_not_varlen, _softmax_op),
    triton_row(_softmax_op, triton_limits.why_not_varlen, "attention.attention_varlen_softmax"),
    Backend("reference", always, reference.attention_varlen_softmax),
])
_attention = Table("attention_varlen", [
    Backend("cpu", native.why_not_varlen, _attention_op),
    triton_row(_attention_op, triton_limits.why_not_varlen, "attention.attention_varlen"),
    Backend("reference", always, reference.attention_varlen),
])


def _fits(q, k, v) -> bool:
    """The common call in few comparisons, on the CPU; ``_check`` looks at the rest and finds out what is wrong."""
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        return False
    dtype, shape, keys = q.dtype, q.shape, k.shape
    return (dtype in checks.FLOATS and k.dtype is dtype and v.dtype is dtype and len(shape) == 3 and v.shape == keys and keys[1:] == shape[1:]
            and q.is_cpu and k.is_cpu and v.is_cpu)


def _check(q, k, v) -> None:
    """q [Tq, H, D], k and v [Tk, H_kv, D], one dtype, one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        checks.rank(name, x, 3, "[total, H, D]: all sequences, one after another")
    (_, heads, channels), shape = q.shape, k.shape
    if shape[2] != channels or (shape[1] != heads and (shape[1] == 0 or heads % shape[1])):
        raise ValueError(f"k has shape {list(shape)}; for q of shape {list(q.shape)} it should be [total, H, {channels}] with H a divisor of {heads}")
    if v.shape != shape:
        raise ValueError(f"v has shape {list(v.shape)}; it should be {list(shape)}, as k has")
    for name, x in (("k", k), ("v", v)):
        if x.dtype is not q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; it should be {q.dtype}, as q has")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it should be on {q.device}, where q is")


def _check_cu_seqlens(name: str, cu_seqlens, x: str, tokens: int, q: torch.Tensor, count: int | None) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name} is a {type(cu_seqlens).__name__}; it should be a torch.Tensor of int32")
    if cu_seqlens.dtype is not torch.int32:
        raise TypeError(f"{name} has dtype {cu_seqlens.dtype}; it should be torch.int32: {name}.to(torch.int32)")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} has shape {list(cu_seqlens.shape)}; it should be [sequences + 1]")
    if count is not None and cu_seqlens.shape[0] != count:
        raise ValueError(f"{name} has {cu_seqlens.shape[0]} elements; it should have {count}, as cu_seqlens_q has: one more than there are sequences")
    here = cu_seqlens.is_cpu and q.is_cpu
    if not here and cu_seqlens.device != q.device:
        raise ValueError(f"{name} is on {cu_seqlens.device}; it should be on {q.device}, where q is")
    # Values are looked at where that waits for no device; the CPU kernels look again, as these may be traced
    if not here or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return
    values = cu_seqlens.tolist()
    if values[0] == 0 and values[-1] == tokens and values == sorted(values):
        return
    if values[0] != 0:
        raise ValueError(f"{name} begins with {values[0]}; it should begin with 0, the first token of the first sequence")
    if values[-1] != tokens:
        raise ValueError(f"{name} ends with {values[-1]}; it should end with {tokens}, the number of tokens of {x}")
    at = next(i for i, (a, b) in enumerate(zip(values, values[1:])) if a > b)
    raise ValueError(f"{name} decreases from {values[at]} to {values[at + 1]} at index {at + 1}; it should be the cumulative sum of the lengths, "
                     "after a 0: torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)")


def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k=None, *, causal: bool = False, scale: float | None = None,
                     return_lse: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``attention`` within each of several sequences of different lengths, packed one after another, without padding.

    Args:
        q: [Tq, H, D], the queries of all sequences: float32, bfloat16, float16 or float64, any strides.
        k, v: [Tk, H_kv, D] in q's dtype, any strides. H_kv divides H (grouped-query attention).
        cu_seqlens_q: [sequences + 1], int32, on q's device: sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] - 1. It begins with 0,
            never decreases, and ends with Tq.
        cu_seqlens_k: the same for k and v, ending with Tk; None for cu_seqlens_q. A sequence may be empty: queries without a key give 0 (and a
            log-sum-exp of -inf), keys without a query the gradient 0.
        causal: query i of a sequence attends to its keys 0..i only: both are counted from the sequence's first, as ``attention`` does.
            (FlashAttention counts from the last, which is another thing where a sequence has more keys than queries.)
        scale: None for 1 / sqrt(D).
        return_lse: also return the log-sum-exp of each query's scaled logits, [H, Tq] in float32 (float64 for float64), natural logarithm.

    Returns: [Tq, H, D], contiguous, in q's dtype; with ``return_lse`` the pair (that, log-sum-exp).
    On a GPU nothing waits for the device, so the values in cu_seqlens are not checked there. On the kernels a sequence's result has the same bits
    in any company. Under autocast q, k and v are cast as for PyTorch's attention.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``scale``, or a cu_seqlens on the CPU that is not as stated.
    Source: Dao (2023), "FlashAttention-2", whose varlen functions take the same arguments.
    """
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        q, k, v = cast((q, k, v))
    if not _fits(q, k, v):
        _check(q, k, v)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q.shape[0], q, None)
    if cu_seqlens_k is not cu_seqlens_q or k.shape[0] != q.shape[0]:
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k.shape[0], q, cu_seqlens_q.shape[0])
    if scale is not None:
        checks.number("scale", scale)
    if return_lse or learns(q, k, v):
        out, highest, total = _softmax(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
        return (out, log_sum_exp(highest, total).to(compute_dtype(q.dtype))) if return_lse else out
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
