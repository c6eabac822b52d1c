"""adaLN modulation: the public ops, their registration and their backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.adaln import native, reference
from fusewire.kernels.autograd import recomputing
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.library import define
from fusewire.kernels.rounding import is_exact


def _fake_modulate(x, shift, scale, weight, bias, eps, rms, exact):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_backward, _setup = recomputing(reference.adaln_modulate)
_modulate_op = define("adaln_modulate(Tensor x, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, float eps, bool rms, bool exact) -> Tensor",
                      fallback=reference.adaln_modulate, fake=_fake_modulate, backward=_backward, setup_context=_setup)
_modulate = Table("adaln_modulate", [
    Backend("cpu", native.why_not_modulate, _modulate_op),
    Backend("reference", always, reference.adaln_modulate),
])


def adaln_modulate(x, shift, scale, *, eps: float = 1e-6, norm: str = "layer", weight=None, bias=None, numerics: str = "exact") -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift``, in one pass.

    Args:
        x: [B, T, C] tokens, float32, bfloat16, float16 or float64, any strides.
        shift, scale: [B, C], [B, 1, C] or [B, T, C], any strides (the chunks of one projection are read in place).
        eps: added to the variance; greater than 0.
        norm: ``"layer"`` (LayerNorm) or ``"rms"`` (diffusers' RMSNorm).
        weight, bias: the norm's affine parameters, [C] or None.
        numerics: ``"exact"`` rounds where eager PyTorch rounds, ``"close"`` once at the end.

    Returns: [B, T, C], contiguous, in the promoted dtype of the inputs.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``eps``, ``norm`` or ``numerics`` that is not as stated.
    Source: Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", adaLN-Zero.
    """
    checks.floating("x", x)
    checks.rank("x", x, 3, "[B, T, C]")
    checks.modulation("shift", shift, x)
    checks.modulation("scale", scale, x)
    checks.vector("weight", weight, x.shape[-1], x.device)
    checks.vector("bias", bias, x.shape[-1], x.device)
    checks.positive("eps", eps)
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm is {norm!r}; it should be 'layer' or 'rms'")
    return _modulate(x, shift, scale, weight, bias, eps, norm == "rms", is_exact(numerics))
