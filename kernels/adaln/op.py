"""adaLN: the public ops, their registration and their backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.adaln import cuda, forms, gradients, native, reference, triton_limits
from fusewire.kernels.adaln.reference import normalised_dtype
from fusewire.kernels.autograd import fused
from fusewire.kernels.cuda_rows import row as cuda_row
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.rounding import is_exact, promoted
from fusewire.kernels.triton_rows import row as triton_row


def _fake_modulate(x, shift, scale, weight, bias, eps, rms, exact):
    return x.new_empty(x.shape, dtype=promoted(normalised_dtype(x.dtype, weight, bias, rms), scale, shift))


def _fake_modulate_dual(x, shift, scale, shift2, scale2, weight, bias, eps, rms, exact):
    dtype = normalised_dtype(x.dtype, weight, bias, rms)
    return x.new_empty(x.shape, dtype=promoted(dtype, scale, shift)), x.new_empty(x.shape, dtype=promoted(dtype, scale2, shift2))


def _fake_gate(x, y, gate, exact):
    return x.new_empty(x.shape, dtype=promoted(x.dtype, y, gate))


def _fake_gate_modulate(x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, exact):
    dtype = promoted(x.dtype, y, gate, y2, gate2)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=promoted(normalised_dtype(dtype, weight, bias, rms), scale, shift))


def _register(schema: str, meaning, fake, its_gradients):
    backward, setup_context = fused(meaning, its_gradients, gradients.recomputed)
    return define(schema, fallback=meaning, fake=fake, backward=backward, setup_context=setup_context)


_modulate_op = _register(
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps, bool rms, bool exact) -> Tensor",
    reference.adaln_modulate, _fake_modulate, gradients.of_modulate)
_modulate_dual_op = _register(
    "adaln_modulate_dual(Tensor x, Tensor shift, Tensor scale, Tensor shift2, Tensor scale2, Tensor? weight, Tensor? bias, float eps, bool rms, "
    "bool exact) -> (Tensor, Tensor)",
    reference.adaln_modulate_dual, _fake_modulate_dual, gradients.of_modulate_dual)
_gate_op = _register("gate_residual(Tensor x, Tensor y, Tensor gate, bool exact) -> Tensor", reference.gate_residual, _fake_gate, gradients.of_gate)
_gate_modulate_op = _register(
    "gate_residual_adaln(Tensor x, Tensor y, Tensor gate, Tensor? y2, Tensor? gate2, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, "
    "float eps, bool rms, bool exact) -> (Tensor, Tensor)", reference.gate_residual_adaln, _fake_gate_modulate, gradients.of_gate_modulate)

_modulate = Table("adaln_modulate", [
    Backend("cpu", native.why_not_modulate, _modulate_op),
    cuda_row(_modulate_op, cuda.op, cuda.why_not_modulate, cuda.adaln_modulate),
    triton_row(_modulate_op, triton_limits.why_not_modulate, "adaln.adaln_modulate"),
    Backend("reference", always, reference.adaln_modulate),
])
_modulate_dual = Table("adaln_modulate_dual", [
    Backend("cpu", native.why_not_modulate_dual, _modulate_dual_op),
    cuda_row(_modulate_dual_op, cuda.op, cuda.why_not_modulate_dual, cuda.adaln_modulate_dual),
    triton_row(_modulate_dual_op, triton_limits.why_not_modulate_dual, "adaln.adaln_modulate_dual"),
    Backend("reference", always, reference.adaln_modulate_dual),
])
_gate = Table("gate_residual", [
    Backend("cpu", native.why_not_gate, _gate_op),
    cuda_row(_gate_op, cuda.op, cuda.why_not_gate, cuda.gate_residual),
    triton_row(_gate_op, triton_limits.why_not_gate, "adaln.gate_residual"),
    Backend("reference", always, reference.gate_residual),
])
_gate_modulate = Table("gate_residual_adaln", [
    Backend("cpu", native.why_not_gate_modulate, _gate_modulate_op),
    cuda_row(_gate_modulate_op, cuda.op, cuda.why_not_gate_modulate, cuda.gate_residual_adaln),
    triton_row(_gate_modulate_op, triton_limits.why_not_gate_modulate, "adaln.gate_residual_adaln"),
    Backend("reference", always, reference.gate_residual_adaln),
])
native.compare_with_stock(_modulate_op)


def _is_rms(norm: str) -> bool:
    if norm == "layer":
        return False
    if norm == "rms":
        return True
    raise ValueError(f"norm is {norm!r}; it should be 'layer' or 'rms'")


def _options(x, weight, bias, eps, norm, numerics) -> tuple:
    """What every op with a norm takes last, checked: weight, bias, eps, rms, exact."""
    if weight is not None or bias is not None:
        checks.vector("weight", weight, x.shape[-1], x.device)
        checks.vector("bias", bias, x.shape[-1], x.device)
    if type(eps) is not float or not eps > 0:
        checks.positive("eps", eps)
    return weight, bias, eps, _is_rms(norm), is_exact(numerics)


def adaln_modulate(x, shift, scale, *, eps: float = 1e-6, norm: str = "layer", weight=None, bias=None, numerics: str = "exact") -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift``, in one pass; without a shift where it is None.

    Args:
        x: [B, T, C] tokens, float32, bfloat16, float16 or float64, any strides.
        shift, scale: [B, C], [B, 1, C] or [B, T, C], any strides (the chunks of one projection are read in place); or [B, F, C], a row for each of F
            frames of T / F tokens, for which x is copied where its samples do not follow each other in memory. ``shift`` may be None.
        eps: added to the variance; greater than 0.
        norm: ``"layer"`` (LayerNorm) or ``"rms"`` (diffusers' RMSNorm).
        weight, bias: the norm's affine parameters, [C] or None.
        numerics: ``"exact"`` rounds where eager PyTorch rounds, ``"close"`` once at the end.

    Returns: [B, T, C], contiguous, in the dtype that eager PyTorch gives.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``eps``, ``norm`` or ``numerics`` that is not as stated.
    Source: Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", adaLN-Zero.
    """
    if shift is None:
        frames = checks.modulated(x, ("scale",), (scale,))
        shift = forms.no_shift(scale)
    else:
        frames = checks.modulated(x, ("shift", "scale"), (shift, scale))
    options = _options(x, weight, bias, eps, norm, numerics)
    if frames > 1:
        return _modulate(*forms.by_frames(frames, x.shape, x, shift, scale), *options).view(x.shape)
    return _modulate(x, shift, scale, *options)


def adaln_modulate_dual(x, shift, scale, shift2, scale2, *, eps: float = 1e-6, norm: str = "layer", weight=None, bias=None,
                        numerics: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
    """``(n * (1 + scale) + shift, n * (1 + scale2) + shift2)`` with one ``n = norm(x)``, in one pass.

    Args:
        x: [B, T, C] tokens, float32, bfloat16, float16 or float64, any strides.
        shift, scale, shift2, scale2: as ``shift`` and ``scale`` in ``adaln_modulate``. ``shift`` and ``shift2`` may each be None.
        eps, norm, weight, bias: as in ``adaln_modulate``.
        numerics: ``"exact"`` rounds where eager PyTorch rounds, ``"close"`` once at the end.

    Returns: two tensors [B, T, C], contiguous, in the dtype that eager PyTorch gives.
    Raises: as ``adaln_modulate``.
    Source: Stable Diffusion 3.5 medium (MMDiT-X), whose first blocks feed a joint and a self-attention from one norm.
    """
    if weight is bias is None and norm == "layer" and type(eps) is float and eps > 0 and not native.stands_down and checks.alike(x, (shift, scale, shift2, scale2)):
        return _modulate_dual.by_cpu(x, shift, scale, shift2, scale2, None, None, eps, False, is_exact(numerics))
    if shift is None or shift2 is None:
        checks.modulated(x, ("scale", "scale2"), (scale, scale2))  # named before a shift is made of them
        shift, shift2 = (forms.no_shift(of) if given is None else given for given, of in ((shift, scale), (shift2, scale2)))
    frames = checks.modulated(x, ("shift", "scale", "shift2", "scale2"), (shift, scale, shift2, scale2))
    options = _options(x, weight, bias, eps, norm, numerics)
    if frames > 1:
        outputs = _modulate_dual(*forms.by_frames(frames, x.shape, x, shift, scale, shift2, scale2), *options)
        return outputs[0].view(x.shape), outputs[1].view(x.shape)
    return _modulate_dual(x, shift, scale, shift2, scale2, *options)


def gate_residual(x, y, gate, *, gate_tanh: bool = False, numerics: str = "exact") -> torch.Tensor:
    """``x + gate * y``, or ``x + tanh(gate) * y``, in one pass over x and y.

    Args:
        x: [B, T, C] the residual stream, float32, bfloat16, float16 or float64, any strides.
        y: [B, T, C] what is added to it.
        gate: [B, C], [B, 1, C], [B, T, C] or [B, F, C], as ``scale`` in ``adaln_modulate``.
        gate_tanh: the gate is tanh(gate), as in Z-Image; PyTorch computes it beforehand.
        numerics: ``"exact"`` rounds the product and the sum, ``"close"`` the sum only.

    Returns: [B, T, C], contiguous, in the dtype that eager PyTorch gives.
    Raises: TypeError for a dtype, ValueError for a shape, a device or ``numerics`` that is not as stated.
    Source: Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", adaLN-Zero.
    """
    frames, exact = checks.modulated(x, ("gate",), (gate,), ("y",), (y,)), is_exact(numerics)
    if gate_tanh:
        gate = forms.through_tanh(gate, exact)
    if frames > 1:
        return _gate(*forms.by_frames(frames, x.shape, x, y, gate), exact).view(x.shape)
    return _gate(x, y, gate, exact)


def gate_residual_adaln(x, y, gate, shift, scale, *, y2=None, gate2=None, gate_tanh: bool = False, eps: float = 1e-6, norm: str = "layer",
                        weight=None, bias=None, numerics: str = "exact") -> tuple[torch.Tensor, torch.Tensor]:
    """``r = x + gate * y`` (``+ gate2 * y2``) and ``norm(r) * (1 + scale) + shift``, both in one pass.

    Args:
        x: [B, T, C] the residual stream, float32, bfloat16, float16 or float64, any strides.
        y, y2: [B, T, C] what is added to it; ``y2`` together with ``gate2``, or neither (SD3.5's second attention).
        gate, gate2, shift, scale: [B, C], [B, 1, C], [B, T, C] or [B, F, C], as in ``adaln_modulate``. ``shift`` may be None.
        gate_tanh: the gates are tanh(gate) and tanh(gate2), as in ``gate_residual``.
        eps, norm, weight, bias: as in ``adaln_modulate``.
        numerics: ``"exact"`` rounds where eager PyTorch rounds, ``"close"`` each output once.

    Returns: (r, modulated), each [B, T, C], contiguous, in the dtype that eager PyTorch gives.
    Raises: as ``adaln_modulate``, and ValueError where only one of ``y2`` and ``gate2`` is given.
    Source: the adaLN-Zero block of Peebles and Xie (2023), between its attention and its MLP.
    """
    if (y2 is gate2 is weight is bias is None and not gate_tanh and norm == "layer" and type(eps) is float and eps > 0 and not native.stands_down
            and checks.alike(x, (gate, shift, scale), y)):
        return _gate_modulate.by_cpu(x, y, gate, None, None, shift, scale, None, None, eps, False, is_exact(numerics))
    if shift is None:
        checks.modulated(x, ("scale",), (scale,))  # named before a shift is made of it
        shift = forms.no_shift(scale)
    frames = checks.modulated(x, ("gate", "shift", "scale"), (gate, shift, scale), ("y",), (y,))
    if y2 is not None or gate2 is not None:
        if y2 is None or gate2 is None:
            raise ValueError(f"{'y2' if y2 is None else 'gate2'} is None; y2 and gate2 should be given together")
        frames = checks.modulated(x, ("gate", "shift", "scale", "gate2"), (gate, shift, scale, gate2), ("y2",), (y2,))
    options = _options(x, weight, bias, eps, norm, numerics)
    exact = options[-1]
    if gate_tanh:
        gate, gate2 = (None if tensor is None else forms.through_tanh(tensor, exact) for tensor in (gate, gate2))
    if frames > 1:
        residual, out = _gate_modulate(*forms.by_frames(frames, x.shape, x, y, gate, y2, gate2, shift, scale), *options)
        return residual.view(x.shape), out.view(x.shape)
    return _gate_modulate(x, y, gate, y2, gate2, shift, scale, *options)
