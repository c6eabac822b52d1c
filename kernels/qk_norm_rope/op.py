"""QK norm with rotary embedding: the public ops, their registration and their backends."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from fusewire.kernels import checks, overlap
from fusewire.kernels.autograd import fused
from fusewire.kernels.cuda_rows import row as cuda_row
from fusewire.kernels.dispatch import Backend, LeftToReference, Table, always
from fusewire.kernels.library import LIBRARY, define
from fusewire.kernels.qk_norm_rope import cuda, cuda_backward, forms, native, reference, triton_limits
from fusewire.kernels.rounding import is_exact
from fusewire.kernels.triton_rows import row as triton_row

NORMS = {"rms": reference.RMS, "torch_rms": reference.TORCH_RMS}
_FUSED = tuple(NORMS)  # unlike a dictionary, it can be asked about anything
_NAMES = "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, "
_REST = "Tensor? cos, Tensor? sin, float eps, int form, bool exact"  # form: as reference.py numbers them


def _fake_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact):
    return tuple(x.new_empty(x.shape, dtype=reference.result_dtype(x, weight, norm)) for x, weight in ((q, q_weight), (k, k_weight)))


def _fake_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact):
    return None


def _out_of_place(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact):
    return _rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact)


def _fake_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps, wanted):
    return tuple(q.new_empty(0 if x is None or not wanted >> i & 1 else x.shape) for i, x in enumerate((q, k, q_weight, k_weight)))


_backward_op = define("qk_norm_rope_backward(Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, "
                      "Tensor? sin, float eps, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
                      fallback=reference.qk_norm_rope_backward, fake=_fake_backward)
_gradients = Table("qk_norm_rope_backward", [
    Backend("cpu", native.why_not_backward, _backward_op),
    cuda_row(_backward_op, cuda_backward.op, cuda_backward.why_not, cuda_backward.qk_norm_rope_backward),
    triton_row(_backward_op, triton_limits.why_not_backward, "qk_norm_rope.qk_norm_rope_backward"),
    Backend("reference", always, reference.qk_norm_rope_backward),
])


def _gradients_of(needed, grads, q, k, q_weight, k_weight, cos, sin, eps, norm, exact):
    q_grad, k_grad = (like.new_zeros(()).expand(like.shape) if grad is None else grad for grad, like in zip(grads, (q, k)))
    if norm >= reference.ROTATION:  # turned back
        return (*_rope(q_grad, k_grad, None, None, cos, -sin, eps, norm, False), *[None] * 7)
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
                  fallback=reference.qk_norm_into, fake=_fake_into, out_of_place=_out_of_place)


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
_by_stock = LeftToReference(_rope, forms.STOCK, forms.by_stock)
_into = Table("qk_norm_into", [
    Backend("cpu", native.why_not_into, _into_op),
    cuda_row(_into_op, cuda.op, cuda.why_not_into, cuda.qk_norm_into),
    triton_row(_into_op, triton_limits.why_not_into, "qk_norm_rope.qk_norm_into"),
    Backend("reference", always, reference.qk_norm_into),
])


def _fits(q, k, q_weight, k_weight, rope, eps, norm, others) -> bool:
    """The common call, q and k alike and no rope, in few comparisons; ``_check`` looks at the rest and finds out what is wrong."""
    if rope is not None or others != _COMMON or not isinstance(q, torch.Tensor) or not isinstance(k, torch.Tensor):
        return False
    shape, dtype = q.shape, q.dtype
    device, size = None if q.is_cpu else q.device, shape[3:]  # there is one CPU
    for weight in (q_weight, k_weight):
        if weight is not None and not (isinstance(weight, torch.Tensor) and weight.shape == size and weight.dtype is dtype and (weight.is_cpu if device is None else weight.device == device)):
            return False
    return (len(shape) == 4 and dtype in checks.FLOATS and k.shape == shape and k.dtype is dtype and (k.is_cpu if device is None else k.device == device)
            and type(eps) is float and eps > 0 and norm in _FUSED)


def _alike(q, k, q_weight, k_weight, q_out, k_out) -> bool:
    """The common call that fills outputs: on the CPU, everything of one dtype, q, k and the outputs of one shape and without elements that share a place."""
    if not (isinstance(q, torch.Tensor) and q.is_cpu):
        return False
    dtype, shape = q.dtype, q.shape
    if dtype not in checks.FLOATS or len(shape) != 4:
        return False
    for x in (k, q_out, k_out):
        if not (isinstance(x, torch.Tensor) and x.dtype is dtype and x.is_cpu and x.shape == shape):
            return False
    size = shape[3:]
    for weight in (q_weight, k_weight):
        if weight is not None and not (isinstance(weight, torch.Tensor) and weight.dtype is dtype and weight.is_cpu and weight.shape == size):
            return False
    return 0 not in q_out.stride() and 0 not in k_out.stride()


_COMMON = (None, None, None, None, False, False)  # q_bias, k_bias, q_log_scale, k_log_scale, halves, across_heads


def _check(q, k, q_weight, k_weight, rope, eps, norm, others) -> bool:
    """Raise what is wrong with a call; whether it is one of the forms, which ``forms.py`` makes of the fused op and others."""
    if _fits(q, k, q_weight, k_weight, rope, eps, norm, others):
        return False
    q_bias, k_bias, q_log_scale, k_log_scale, halves, across = others
    for name, x in (("q", q), ("k", k)):
        checks.floating(name, x)
        checks.rank(name, x, 4, "[B, T, H, D]")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k has shape {list(k.shape)}; for q of shape {list(q.shape)} it should be [{q.shape[0]}, T, H, {q.shape[3]}]")
    if k.dtype is not q.dtype:
        raise TypeError(f"k has dtype {k.dtype}; it should be {q.dtype}, as q has")
    if k.device != q.device:
        raise ValueError(f"k is on {k.device}; it should be on {q.device}, where q is")
    if not isinstance(norm, str) or norm not in forms.NORMS:
        raise ValueError(f"norm is {norm!r}; it should be one of {', '.join(map(repr, forms.NORMS))}")
    forms.check_norm("q", q, q_weight, q_bias, q_log_scale, norm, across)
    forms.check_norm("k", k, k_weight, k_bias, k_log_scale, norm, across)
    checks.positive("eps", eps)
    if rope is not None:
        forms.check_rope(q, k, rope)
    elif norm == "none":
        raise ValueError("norm is 'none' and rope is None; one of the two should be there")
    fused = norm in NORMS and not halves and not across
    return not fused or rope is not None and (isinstance(rope, torch.Tensor) or rope[0].shape != (q.shape[1], q.shape[3] // 2))


def _normed(q, k, q_weight, k_weight, eps, norm, others, exact) -> tuple[torch.Tensor, torch.Tensor]:
    q_bias, k_bias, q_log_scale, k_log_scale, _, across = others
    return (forms.normed(q, q_weight, q_bias, q_log_scale, eps, norm, across, exact),
            forms.normed(k, k_weight, k_bias, k_log_scale, eps, norm, across, exact))


def _formed(q, k, q_weight, k_weight, rope, eps, norm, others, exact) -> tuple[torch.Tensor, torch.Tensor]:
    """``qk_norm_rope`` in one of the forms."""
    halves, across = others[4:]
    as_complex = exact and isinstance(rope, torch.Tensor) and not halves
    if exact and norm in ("l2", "none") and (rope is None or as_complex):
        return _by_stock(q, k, *others[2:4], rope, eps, norm)
    # The fused op rotates float64 in float32 in exact, as stock does; what stock leaves unrotated must not pass through it
    unrotated = exact and rope is not None and q.dtype is torch.float64 and forms.tables(rope)[0].shape[-1] < q.shape[3] // 2
    if norm in NORMS and not halves and not across and not unrotated:
        if not as_complex:
            cos, sin = forms.padded(*forms.tables(rope), q.shape[3] // 2)
            return forms.by_sample(_rope, q, k, q_weight, k_weight, cos, sin, eps, NORMS[norm], exact)
        q, k = _rope(q, k, q_weight, k_weight, None, None, eps, NORMS[norm], exact)
    else:
        q, k = _normed(q, k, q_weight, k_weight, eps, norm, others, exact)
    if rope is None:
        return q, k
    if as_complex:
        return forms.turned_as_complex(q, rope), forms.turned_as_complex(k, rope)
    return forms.turned(_rope, q, k, *forms.tables(rope), eps, reference.HALVES_ROTATION if halves else reference.ROTATION, exact)


def _check_out(name, out, x, weight, log_scale, norm) -> None:
    dtype = x.dtype
    if (isinstance(out, torch.Tensor) and out.dtype is dtype and (weight is None or weight.dtype is dtype) and log_scale is None and out.shape == x.shape
            and (out.is_cpu if x.is_cpu else out.device == x.device) and 0 not in out.stride()):
        return  # the common good output: everything below holds
    checks.floating(name, out)
    if out.shape != x.shape:
        raise ValueError(f"{name} has shape {list(out.shape)}; it should be {list(x.shape)}")
    if weight is not None and weight.dtype is not dtype and norm == "rms":
        dtype = reference.result_dtype(x, weight, reference.RMS)
    elif log_scale is not None:
        dtype = torch.promote_types(dtype, log_scale.dtype)
    if out.dtype is not dtype:
        raise TypeError(f"{name} has dtype {out.dtype}; it should be {dtype}")
    if out.device != x.device:
        raise ValueError(f"{name} is on {out.device}; it should be on {x.device}, where q is")
    strides = out.stride()
    if 0 in strides and out.numel() and any(stride == 0 and size > 1 for stride, size in zip(strides, out.shape)):
        raise ValueError(f"{name} has strides {list(strides)}; several of its elements share one place in memory")


def qk_norm_rope(q, k, q_weight=None, k_weight=None, *, q_bias=None, k_bias=None, q_log_scale=None, k_log_scale=None, rope=None, halves: bool = False,
                 across_heads: bool = False, eps: float = 1e-6, norm: str = "rms", numerics: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of q and k, then their rotary embedding where ``rope`` is given: in one pass for RMS norms of each head and adjacent pairs.

    Args:
        q, k: [B, T, H, D] in one dtype (float32, bfloat16, float16 or float64), any strides: views of projections and slices of a packed
            QKV are read in place. k may have its own number of heads and, without ``rope``, of tokens.
        q_weight, k_weight: [D], or None for a norm without weight. [H * D] each where ``across_heads``.
        q_bias, k_bias: the same for a layer norm's bias.
        q_log_scale, k_log_scale: [H] or None, for ``norm="l2"``: each head is multiplied by ``exp(min(log_scale, log 100))`` (VAR: pass
            ``scale_mul_1H11.flatten()`` for q).
        rope: None; or (cos, sin), each float32, any strides: the angle by which a pair of token t is turned; or one complex64 tensor, cos + i sin.
            [T, D/2], or [B, T, D/2] where samples differ. Narrower tables, [T, R/2], turn the first R dimensions of each head.
            (diffusers' tables hold each value twice: pass ``cos[:, ::2], sin[:, ::2]``, or for ``halves`` ``cos[:, :D/2], sin[:, :D/2]``.
            HiDream's are matrices: pass ``freqs[:, :, 0, :, 0, 0], freqs[:, :, 0, :, 1, 0]``.)
        halves: the pairs are (x[i], x[i + R/2]) instead of (x[2i], x[2i+1]).
        across_heads: one norm over all heads of a token (HiDream, LTX, Lumina).
        eps: added to the mean square or to the variance; for ``"l2"`` the least length divided by (``"close"``: sqrt(|x|^2 + eps^2)); above 0.
        norm: which, and whose rounding ``"exact"`` follows: ``"rms"`` diffusers' RMSNorm, ``"torch_rms"`` torch.nn.RMSNorm, ``"layer"``
            torch.nn.LayerNorm, ``"float32_layer"`` diffusers' FP32LayerNorm, ``"l2"`` F.normalize (diffusers' LpNorm), ``"none"`` the rotation alone.
        numerics: ``"exact"`` rounds where the stock module and diffusers' apply_rotary_emb round, ``"close"`` once at the end
            (and once after a norm that is a pass of its own).
            Stock sums in another order where the head dimension is not the innermost in memory; this op gives the same bits for any layout.
            With a complex ``rope`` the rotation of ``"exact"`` is PyTorch's own product, whose last bits depend on the shape and the threads.

    Returns: (q, k), contiguous, in the dtype that the stock norm gives (that of its input, or of a 16-bit weight; float32 for a float32 weight).
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``eps``, ``norm`` or ``numerics`` that is not as stated, or for a vector that the
        norm does not have.
    Source: Zhang and Sennrich (2019), "Root Mean Square Layer Normalization"; Su et al. (2021), "RoFormer"; Tian et al. (2024), "Visual
        Autoregressive Modeling".
    """
    others = (q_bias, k_bias, q_log_scale, k_log_scale, halves, across_heads)
    formed, exact = _check(q, k, q_weight, k_weight, rope, eps, norm, others), is_exact(numerics)
    if formed:
        return _formed(q, k, q_weight, k_weight, rope, eps, norm, others, exact)
    cos, sin = (None, None) if rope is None else rope
    return _rope(q, k, q_weight, k_weight, cos, sin, eps, NORMS[norm], exact)


def qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, *, q_bias=None, k_bias=None, q_log_scale=None, k_log_scale=None, rope=None,
                 halves: bool = False, across_heads: bool = False, eps: float = 1e-6, norm: str = "rms", numerics: str = "exact") -> None:
    """``qk_norm_rope`` written straight into ``q_out`` and ``k_out``: slices of a joint buffer need no concatenation afterwards.

    Args:
        q_out, k_out: of q's and k's shape, any strides, in the dtype that ``qk_norm_rope`` would return. They are changed (their version
            counters move) and must overlap neither each other nor the inputs, unless q_out is q and k_out is k.
        Everything else as in ``qk_norm_rope``.

    Where a gradient is wanted, or forward mode is at work, the result is copied into the outputs, so that it flows. So it is without ``rope`` after a
    norm that is not an RMS norm of each head, with tables by sample or narrower than the head, and with a complex ``rope`` in ``"exact"``.
    Raises: as ``qk_norm_rope``; also for an output whose shape, dtype, device or strides do not fit, or that overlaps another tensor.
    """
    exact = is_exact(numerics)
    if (rope is q_bias is k_bias is q_log_scale is k_log_scale is None and not halves and not across_heads and type(eps) is float
            and eps > 0 and norm in _FUSED and not torch.is_grad_enabled() and forward_ad._current_level < 0 and _alike(q, k, q_weight, k_weight, q_out, k_out)):
        form = NORMS[norm]
        if not (exact and native.differs[form]):
            try:
                return _into.by_cpu(q, k, q_weight, k_weight, q_out, k_out, None, None, eps, form, exact)
            except RuntimeError:  # the kernel looked for overlaps, in a tenth of the time
                overlap.refuse({"q_out": q_out, "k_out": k_out}, {"q": q, "k": k})
                raise
    others = (q_bias, k_bias, q_log_scale, k_log_scale, halves, across_heads)
    formed = _check(q, k, q_weight, k_weight, rope, eps, norm, others)
    _check_out("q_out", q_out, q, q_weight, q_log_scale, norm)
    _check_out("k_out", k_out, k, k_weight, k_log_scale, norm)
    overlap.refuse({"q_out": q_out, "k_out": k_out}, {"q": q, "k": k})
    cos, sin = (None, None) if rope is None else forms.tables(rope)
    tensors = (q, k, q_weight, k_weight, q_out, k_out)
    recorded = forward_ad._current_level >= 0 or (
        torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (*tensors, *others[:4], cos, sin)))
    if formed and not recorded and cos is not None and cos.shape == (q.shape[1], q.shape[3] // 2) and not (exact and isinstance(rope, torch.Tensor)):
        code = NORMS.get(norm) if norm in _FUSED and others == _COMMON else reference.HALVES_ROTATION if others[4] else reference.ROTATION
        if code >= reference.ROTATION:
            q, k = _normed(q, k, q_weight, k_weight, eps, norm, others, exact)
            q_weight = k_weight = None
        _into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, code, exact)
        return
    if formed or recorded:
        q_new, k_new = (_formed(q, k, q_weight, k_weight, rope, eps, norm, others, exact) if formed else
                        _rope(q, k, q_weight, k_weight, cos, sin, eps, NORMS[norm], exact))
        q_out.copy_(q_new)
        k_out.grad_fn  # a view of the buffer that q_out is a view of learns of that copy only when it is asked
        k_out.copy_(k_new)
        return
    _into(*tensors, cos, sin, eps, NORMS[norm], exact)
