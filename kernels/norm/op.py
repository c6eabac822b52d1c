"""RMSNorm, LayerNorm and global response normalisation: the public ops, their registration, their gradients and their backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.autograd import fused
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.norm import cuda, native, reference, triton_limits
from fusewire.kernels.rounding import is_exact, promoted
from fusewire.kernels.triton_rows import row as triton_row

RMS_ROUNDINGS = {"diffusers": False, "torch": True}
LAYER_ROUNDINGS = {"torch": False, "float32": True}


def _fake_rms(x, weight, bias, eps, as_torch, exact):
    return x.new_empty(x.shape, dtype=reference.rms_dtype(x, weight, bias, as_torch))


def _fake_layer(x, weight, bias, eps, wide, exact):
    return x.new_empty(x.shape)


def _fake_layer_2d(x, weight, bias, eps, exact):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=reference.picture_layout(x))


def _fake_response(x, weight, bias, eps):
    return x.new_empty(x.shape, dtype=promoted(x.dtype, weight, bias))


def _fake_response_backward(grad, x, weight, eps, of_x):
    return x.new_empty(x.shape if of_x else 0), x.new_empty(x.shape[-1]), x.new_empty(x.shape[-1])


def _fake_backward(grad, x, weight, eps, of_x, of_weight, of_bias):
    channels = x.shape[-1]
    return x.new_empty(x.shape if of_x else 0), x.new_empty(channels if of_weight else 0), x.new_empty(channels if of_bias else 0)


_BACKWARD = "(Tensor grad, Tensor x, Tensor? weight, float eps, bool of_x, bool of_weight, bool of_bias) -> (Tensor, Tensor, Tensor)"


def _backward_table(name: str, meaning) -> Table:
    op = define(f"{name}{_BACKWARD}", fallback=meaning, fake=_fake_backward)
    return Table(name, [Backend("cpu", native.why_not_backward, op), triton_row(op, triton_limits.why_not_backward, f"norm.{name}"),
                        Backend("reference", always, meaning)])


def _fake_backward_2d(grad, x, weight, eps, of_x, of_weight, of_bias):
    channels = x.shape[1]
    return (_fake_layer_2d(x, None, None, eps, False) if of_x else x.new_empty(0), x.new_empty(channels if of_weight else 0),
            x.new_empty(channels if of_bias else 0))


_layer_2d_backward_op = define(f"layer_norm_2d_backward{_BACKWARD}", fallback=reference.layer_norm_2d_backward, fake=_fake_backward_2d)
_layer_2d_backward = Table("layer_norm_2d_backward", [
    Backend("cpu", native.why_not_backward, _layer_2d_backward_op),
    triton_row(_layer_2d_backward_op, triton_limits.why_not_picture_backward, "norm.layer_norm_2d_backward"),
    Backend("reference", always, reference.layer_norm_2d_backward),
])
_rms_backward = _backward_table("rms_norm_backward", reference.rms_norm_backward)
_layer_backward = _backward_table("layer_norm_backward", reference.layer_norm_backward)


_response_backward_op = define("global_response_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, bool of_x) -> "
                               "(Tensor, Tensor, Tensor)", fallback=reference.global_response_norm_backward, fake=_fake_response_backward)
_response_backward = Table("global_response_norm_backward", [
    Backend("cpu", native.why_not_response_backward, _response_backward_op),
    triton_row(_response_backward_op, triton_limits.why_not_response_backward, "norm.triton_response.global_response_norm_backward"),
    Backend("reference", always, reference.global_response_norm_backward),
])


def _wanted(needed, *found):
    """The gradients that were asked for, None for the others and for the op's remaining arguments."""
    return (*(gradient if asked else None for asked, gradient in zip(needed, found)), *[None] * (len(needed) - len(found)))


def _gradients(table: Table):
    return lambda needed, grads, x, weight, bias, eps, *rest: _wanted(needed, *table(grads[0], x, weight, eps, *needed[:3]))


def _response_close(x, weight, bias, eps):
    return reference.global_response_norm(x, weight, bias, eps, False)


def _gradients_response(needed, grads, x, weight, bias, eps):
    return _wanted(needed, *_response_backward(grads[0], x, weight, eps, needed[0]))


def _recomputed(x, weight, bias, *rest) -> bool:
    """exact: the gradients are stock's; so are those of arguments that differ in dtype."""
    return rest[-1] or any(tensor is not None and tensor.dtype is not x.dtype for tensor in (weight, bias))


def _register(schema: str, meaning, fake, gradients):
    backward, setup_context = fused(meaning, gradients, _recomputed)
    return define(schema, fallback=meaning, fake=fake, backward=backward, setup_context=setup_context)


_ARGUMENTS = "Tensor x, Tensor? weight, Tensor? bias, float eps"
_rms_op = _register(f"rms_norm({_ARGUMENTS}, bool as_torch, bool exact) -> Tensor", reference.rms_norm, _fake_rms, _gradients(_rms_backward))
_layer_op = _register(f"layer_norm({_ARGUMENTS}, bool wide, bool exact) -> Tensor", reference.layer_norm, _fake_layer, _gradients(_layer_backward))
_layer_2d_op = _register(f"layer_norm_2d({_ARGUMENTS}, bool exact) -> Tensor", reference.layer_norm_2d, _fake_layer_2d, _gradients(_layer_2d_backward))

# No kernel has torch.norm's order of summation: the op is close alone
_response_parts = fused(_response_close, _gradients_response, lambda x, weight, bias, eps: len({x.dtype, weight.dtype, bias.dtype}) > 1)
_response_op = define("global_response_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", fallback=_response_close,
                      fake=_fake_response, backward=_response_parts[0], setup_context=_response_parts[1])

_rms = Table("rms_norm", [Backend("cpu", native.why_not_rms, _rms_op), triton_row(_rms_op, triton_limits.why_not_norm, "norm.rms_norm"),
                          Backend("reference", always, reference.rms_norm)])
_layer = Table("layer_norm", [Backend("cpu", native.why_not_layer, _layer_op), Backend("cuda", cuda.why_not_layer, cuda.layer_norm),
                              triton_row(_layer_op, triton_limits.why_not_norm, "norm.layer_norm"),
                              Backend("reference", always, reference.layer_norm)])
_layer_2d = Table("layer_norm_2d", [Backend("cpu", native.why_not_layer_2d, _layer_2d_op),
                                    triton_row(_layer_2d_op, triton_limits.why_not_picture, "norm.layer_norm_2d"),
                                    Backend("reference", always, reference.layer_norm_2d)])
_response_triton = triton_row(_response_op, triton_limits.why_not_response, "norm.triton_response.global_response_norm")
_response = Table("global_response_norm", [Backend("cpu", native.why_not_response, lambda *args: _response_op(*args[:4])),
                                           _response_triton._replace(run=lambda *args: _response_triton.run(*args[:4])),
                                           Backend("reference", always, reference.global_response_norm)])
native.compare_with_stock(_rms_op, _layer_op)


def _rounding(rounding: str, known: dict[str, bool]) -> bool:
    try:
        return known[rounding]
    except (KeyError, TypeError):
        raise ValueError(f"rounding is {rounding!r}; it should be one of {', '.join(map(repr, known))}") from None


def _stock_dtypes(x, weight, bias) -> None:
    """torch's layer norm takes no other dtypes."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype is x.dtype:
            continue
        if x.dtype not in reference.HALVES or tensor.dtype is not torch.float32:
            raise TypeError(f"{name} has dtype {tensor.dtype}; for x of {x.dtype} and torch's exact rounding it should be {x.dtype}"
                            f"{' or torch.float32' if x.dtype in reference.HALVES else ''}")
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise TypeError(f"bias has dtype {bias.dtype}; with torch's exact rounding it should be {weight.dtype}, as weight has")


def rms_norm(x, weight=None, bias=None, *, eps: float = 1e-6, rounding: str = "diffusers", numerics: str = "exact") -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight + bias`` over the last dimension.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, any strides.
        weight, bias: [C] or None.
        eps: added to the mean square; greater than 0.
        rounding: whose rounding ``"exact"`` follows, and whose dtype the result has. ``"diffusers"``: diffusers' RMSNorm and transformers'
            T5LayerNorm, which round before a 16-bit weight and return float32 for a float32 one. ``"torch"``: torch.nn.RMSNorm and diffusers'
            MochiRMSNorm, which round once and return x's dtype.
        numerics: ``"exact"`` rounds where the stock module rounds, ``"close"`` once at the end.

    Returns: [..., C], contiguous.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``eps``, ``rounding`` or ``numerics`` that is not as stated.
    Source: Zhang and Sennrich (2019), "Root Mean Square Layer Normalization".
    """
    checks.affine(x, weight, bias)
    checks.positive("eps", eps)
    return _rms(x, weight, bias, eps, _rounding(rounding, RMS_ROUNDINGS), is_exact(numerics))


def layer_norm(x, weight=None, bias=None, *, eps: float = 1e-5, rounding: str = "torch", numerics: str = "exact") -> torch.Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last dimension.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, any strides.
        weight, bias: [C] or None.
        eps: added to the variance; greater than 0.
        rounding: whose rounding ``"exact"`` follows: ``"torch"`` torch.nn.LayerNorm, ``"float32"`` diffusers' FP32LayerNorm.
        numerics: ``"exact"`` rounds where the stock module rounds, ``"close"`` once at the end.

    Returns: [..., C], contiguous, in x's dtype.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``eps``, ``rounding`` or ``numerics`` that is not as stated.
    Source: Ba, Kiros and Hinton (2016), "Layer Normalization".
    """
    checks.affine(x, weight, bias)
    checks.positive("eps", eps)
    wide, exact = _rounding(rounding, LAYER_ROUNDINGS), is_exact(numerics)
    if exact and not wide:
        _stock_dtypes(x, weight, bias)
    return _layer(x, weight, bias, eps, wide, exact)


def layer_norm_2d(x, weight=None, bias=None, *, eps: float = 1e-6, numerics: str = "exact") -> torch.Tensor:
    """``layer_norm`` over the channels of pictures, with no transposed copy.

    Args:
        x: [B, C, H, W], float32, bfloat16, float16 or float64, any strides.
        weight, bias, eps, numerics: as in ``layer_norm``, with torch's rounding.

    Returns: [B, C, H, W], channels last in memory where x's channels lie side by side, otherwise contiguous.
    Raises: as ``layer_norm``.
    Source: the LayerNorm of Pernias et al. (2023), "Würstchen" (diffusers' WuerstchenLayerNorm and SDCascadeLayerNorm).
    """
    checks.affine(x, weight, bias, 1, 4, "[B, C, H, W]")
    checks.positive("eps", eps)
    exact = is_exact(numerics)
    if exact:
        _stock_dtypes(x, weight, bias)
    return _layer_2d(x, weight, bias, eps, exact)


def global_response_norm(x, weight, bias, *, eps: float = 1e-6, numerics: str = "exact") -> torch.Tensor:
    """``x + weight * (x * n) + bias``, where ``n = g / (mean(g) + eps)`` and g is the norm of each channel over its picture.

    Args:
        x: [B, H, W, C], channels last as the linears around it have them, float32, bfloat16, float16 or float64, any strides.
        weight, bias: [C] (diffusers' gamma and beta are [1, 1, 1, C]: pass ``gamma.flatten()``).
        eps: added to the mean of the norms; greater than 0.
        numerics: ``"exact"`` gives the bits of diffusers' GlobalResponseNorm for contiguous pictures, by PyTorch's own calls, which may depend on
            the batch and the number of threads as the module's do; ``"close"`` is fused, in float32 with one rounding at the end.

    Returns: [B, H, W, C], contiguous, in the dtype that x, weight and bias promote to.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``eps`` or ``numerics`` that is not as stated.
    Source: Woo et al. (2023), "ConvNeXt V2"; diffusers' GlobalResponseNorm (Würstchen, Stable Cascade, aMUSEd).
    """
    checks.affine(x, weight, bias, -1, 4, "[B, H, W, C]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            checks.floating(name, tensor)
    checks.positive("eps", eps)
    return _response(x, weight, bias, eps, is_exact(numerics))
