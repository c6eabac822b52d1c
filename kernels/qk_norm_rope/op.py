"""QK norm with rotary embedding: the public ops, their registration and their backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.autograd import fused
from fusewire.kernels.cuda_rows import row as cuda_row
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import LIBRARY, define
from fusewire.kernels.qk_norm_rope import cuda, native, reference, triton_limits
from fusewire.kernels.rounding import is_exact
from fusewire.kernels.triton_rows import row as triton_row

NORMS = {"rms": reference.RMS, "torch_rms": reference.TORCH_RMS}
_NAMES = "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
_REST = "Tensor? cos, Tensor? sin, float eps, int norm, bool exact"


def _fake_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact):
    return tuple(x.new_empty(x.shape, dtype=reference.result_dtype(x, weight, norm)) for x, weight in ((q, q_weight), (k, k_weight)))


def _fake_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact):
    return None


def _fake_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps, wanted):
    return tuple(q.new_empty(0 if x is None or not wanted >> i & 1 else x.shape) for i, x in enumerate((q, k, q_weight, k_weight)))


_backward_op = define("qk_norm_rope_backward(Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
                      "Tensor? sin, float eps, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
                      fallback=reference.qk_norm_rope_backward, fake=_fake_backward)
_gradients = Table("qk_norm_rope_backward", [Backend("cpu", native.why_not_backward, _backward_op),
                                             Backend("reference", always, reference.qk_norm_rope_backward)])


def _gradients_of(needed, grads, q, k, q_weight, k_weight, cos, sin, eps, norm, exact):
    q_grad, k_grad = (like.new_zeros(()).expand(like.shape) if grad is None else grad for grad, like in zip(grads, (q, k)))
    found = _gradients(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps, sum(1 << i for i in range(4) if needed[i]))
    return (*(gradient if asked else None for asked, gradient in zip(needed, found)), *[None] * 5)


def _recomputed(q, k, q_weight, k_weight, cos, sin, eps, norm, exact) -> bool:
    """exact: the gradients are stock's; so are those of arguments that differ in dtype. No kernel has the gradient of a table."""
    return (exact or any(weight is not None and weight.dtype is not q.dtype for weight in (q_weight, k_weight))
            or cos is not None and (cos.requires_grad or sin.requires_grad))


_backward, _setup = fused(reference.qk_norm_rope, _gradients_of, _recomputed)
_rope_op = define(f"qk_norm_rope({_NAMES}{_REST}) -> (Tensor, Tensor)",
                  fallback=reference.qk_norm_rope, fake=_fake_rope, backward=_backward, setup_context=_setup)
_into_op = define(f"qk_norm_into({_NAMES}Tensor(a!) q_out, Tensor(b!) k_out, {_REST}) -> ()",
                  fallback=reference.qk_norm_into, fake=_fake_into)


def _moving_versions(keyset, *args):
    torch.autograd.graph.increment_version(args[4:6])  # q_out, k_out
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return _into_op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)


LIBRARY.impl("qk_norm_into", _moving_versions, "ADInplaceOrView", with_keyset=True)
native.compare_with_stock(_rope_op)
_rope = Table("qk_norm_rope", [
    Backend("cpu", native.why_not_rope, _rope_op),
    cuda_row(_rope_op, cuda.op, cuda.why_not_rope, cuda.qk_norm_rope),
    triton_row(_rope_op, triton_limits.why_not_rope, "qk_norm_rope.qk_norm_rope"),
    Backend("reference", always, reference.qk_norm_rope),
])
_into = Table("qk_norm_into", [
    Backend("cpu", native.why_not_into, _into_op),
    cuda_row(_into_op, cuda.op, cuda.why_not_into, cuda.qk_norm_into),
    triton_row(_into_op, triton_limits.why_not_into, "qk_norm_rope.qk_norm_into"),
    Backend("reference", always, reference.qk_norm_into),
])


def _fits(q, k, q_weight, k_weight, rope, eps, norm) -> bool:
    """The common call, q and k alike and no rope, in few comparisons; ``_check`` looks at the rest and finds out what is wrong."""
    if rope is not None or not isinstance(q, torch.Tensor) or not isinstance(k, torch.Tensor):
        return False
    shape, dtype, device = q.shape, q.dtype, q.device
    for weight in (q_weight, k_weight):
        if weight is not None and not (weight.shape == shape[3:] and weight.dtype is dtype and weight.device == device):
            return False
    return len(shape) == 4 and dtype in checks.FLOATS and k.shape == shape and k.dtype is dtype and k.device == device and eps > 0 and norm in NORMS


def _check(q, k, q_weight, k_weight, rope, eps, norm) -> None:
    if _fits(q, k, q_weight, k_weight, rope, eps, norm):
        return
    for name, x in (("q", q), ("k", k)):
        checks.floating(name, x)
        checks.rank(name, x, 4, "[B, T, H, D]")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k has shape {list(k.shape)}; for q of shape {list(q.shape)} it should be [{q.shape[0]}, T, H, {q.shape[3]}]")
    if k.dtype is not q.dtype:
        raise TypeError(f"k has dtype {k.dtype}; it should be {q.dtype}, as q has")
    if k.device != q.device:
        raise ValueError(f"k is on {k.device}; it should be on {q.device}, where q is")
    checks.vector("q_weight", q_weight, q.shape[3], q.device)
    checks.vector("k_weight", k_weight, q.shape[3], q.device)
    checks.positive("eps", eps)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it should be one of {', '.join(map(repr, NORMS))}")
    if rope is None:
        return
    if not (isinstance(rope, (tuple, list)) and len(rope) == 2):
        raise TypeError(f"rope is a {type(rope).__name__}; it should be a pair (cos, sin)")
    if k.shape[1] != q.shape[1] or q.shape[3] % 2:
        raise ValueError(f"rope is given for q of shape {list(q.shape)} and k of shape {list(k.shape)}; T should be the same and D even")
    for name, table in zip(("rope's cos", "rope's sin"), rope):
        checks.floating(name, table)
        if table.dtype is not torch.float32:
            raise TypeError(f"{name} has dtype {table.dtype}; it should be float32")
        if table.shape != (q.shape[1], q.shape[3] // 2):
            raise ValueError(f"{name} has shape {list(table.shape)}; it should be [{q.shape[1]}, {q.shape[3] // 2}]")
        if table.device != q.device:
            raise ValueError(f"{name} is on {table.device}; it should be on {q.device}, where q is")


def _check_out(name, out, x, weight, norm) -> None:
    checks.floating(name, out)
    if out.shape != x.shape:
        raise ValueError(f"{name} has shape {list(out.shape)}; it should be {list(x.shape)}")
    dtype = x.dtype if weight is None or weight.dtype is x.dtype else reference.result_dtype(x, weight, norm)
    if out.dtype is not dtype:
        raise TypeError(f"{name} has dtype {out.dtype}; it should be {dtype}")
    if out.device != x.device:
        raise ValueError(f"{name} is on {out.device}; it should be on {x.device}, where q is")
    strides = out.stride()
    if 0 in strides and any(stride == 0 and size > 1 for stride, size in zip(strides, out.shape)):
        raise ValueError(f"{name} has strides {list(strides)}; several of its elements share one place in memory")


def qk_norm_rope(q, k, q_weight=None, k_weight=None, *, rope=None, eps: float = 1e-6, norm: str = "rms",
                 numerics: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of each head of q and k, then their rotary embedding where ``rope`` is given, in one pass.

    Args:
        q, k: [B, T, H, D] in one dtype (float32, bfloat16, float16 or float64), any strides: views of projections and slices of a packed
            QKV are read in place. k may have its own number of heads and, without ``rope``, of tokens.
        q_weight, k_weight: [D], or None for a norm without weight.
        rope: None, or (cos, sin), each [T, D/2] float32, any strides: the angle by which the pair (x[2i], x[2i+1]) of token t is turned.
            (diffusers' tables hold each value twice: pass ``cos[:, ::2], sin[:, ::2]``.)
        eps: added to the mean square; greater than 0.
        norm: whose rounding ``"exact"`` follows: ``"rms"`` diffusers' RMSNorm, ``"torch_rms"`` torch.nn.RMSNorm.
        numerics: ``"exact"`` rounds where the stock module and diffusers' apply_rotary_emb round, ``"close"`` once at the end.
            Stock sums in another order where the head dimension is not the innermost in memory; this op gives the same bits for any layout.

    Returns: (q, k), contiguous, in the dtype that the stock norm gives (that of its input, or of a 16-bit weight; float32 for a float32 weight).
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``eps``, ``norm`` or ``numerics`` that is not as stated.
    Source: Zhang and Sennrich (2019), "Root Mean Square Layer Normalization"; Su et al. (2021), "RoFormer".
    """
    _check(q, k, q_weight, k_weight, rope, eps, norm)
    cos, sin = (None, None) if rope is None else rope
    return _rope(q, k, q_weight, k_weight, cos, sin, eps, NORMS[norm], is_exact(numerics))


def qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, *, rope=None, eps: float = 1e-6, norm: str = "rms", numerics: str = "exact") -> None:
    """``qk_norm_rope`` written straight into ``q_out`` and ``k_out``: slices of a joint buffer need no concatenation afterwards.

    Args:
        q_out, k_out: of q's and k's shape, any strides, in the dtype that ``qk_norm_rope`` would return. They are changed (their version
            counters move) and must overlap neither each other nor the inputs, unless q_out is q and k_out is k.
        Everything else as in ``qk_norm_rope``.

    Where a gradient is wanted the result is copied into the outputs, so that it flows.
    Raises: as ``qk_norm_rope``; also for an output whose shape, dtype, device or strides do not fit.
    """
    _check(q, k, q_weight, k_weight, rope, eps, norm)
    code, exact = NORMS[norm], is_exact(numerics)
    cos, sin = (None, None) if rope is None else rope
    _check_out("q_out", q_out, q, q_weight, code)
    _check_out("k_out", k_out, k, k_weight, code)
    tensors = (q, k, q_weight, k_weight, q_out, k_out)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        q_new, k_new = _rope(q, k, q_weight, k_weight, cos, sin, eps, code, exact)
        q_out.copy_(q_new)
        k_out.grad_fn  # a view of the buffer that q_out is a view of learns of that copy only when it is asked
        k_out.copy_(k_new)
        return
    _into(*tensors, cos, sin, eps, code, exact)
