"""GroupNorm with SiLU: the public op, its registration and its backends."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.autograd import fused
from fusewire.kernels.checks import FLOATS
from fusewire.kernels.cuda_rows import row as cuda_row
from fusewire.kernels.dispatch import Backend, Table, always
from fusewire.kernels.group_norm_silu import cuda, cuda_backward, native, reference, triton_limits
from fusewire.kernels.library import define
from fusewire.kernels.rounding import is_exact, promoted
from fusewire.kernels.triton_rows import row as triton_row

_Tensor = torch.Tensor


def _fake(x, groups, weight, bias, eps, shift, scale, add, silu, exact):
    return torch.empty_like(x, dtype=promoted(x.dtype, add, scale, shift), memory_format=reference.suggest_memory_format(x))


def _fake_backward(grad, x, groups, weight, bias, eps, shift, scale, add, silu, of_x):
    dx = torch.empty_like(x, memory_format=reference.suggest_memory_format(x)) if of_x else x.new_empty(0)
    vectors = (x.new_empty(0) if t is None else t.new_empty(x.shape[1:2] if t.dim() == 1 else x.shape[:2]) for t in (weight, bias, shift, scale, add))
    return dx, *vectors


_backward_op = define("group_norm_silu_backward(Tensor grad, Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? shift, "
                      "Tensor? scale, Tensor? add, bool silu, bool of_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                      fallback=reference.group_norm_silu_backward, fake=_fake_backward)
_backward_table = Table("group_norm_silu_backward", [
    Backend("cpu", native.why_not_backward, _backward_op),
    cuda_row(_backward_op, cuda_backward.op, cuda_backward.why_not, cuda_backward.group_norm_silu_backward),
    triton_row(_backward_op, triton_limits.why_not_backward, "group_norm_silu.group_norm_silu_backward"),
    Backend("reference", always, reference.group_norm_silu_backward),
])


def _gradients(needed, grads, x, groups, weight, bias, eps, shift, scale, add, silu, exact):
    found = _backward_table(grads[0], x, groups, weight, bias, eps, shift, scale, add, silu, needed[0])
    dx, dweight, dbias, dshift, dscale, dadd = (
        gradient.view(tensor.shape) if wanted and tensor is not x else gradient if wanted else None
        for gradient, tensor, wanted in zip(found, (x, weight, bias, shift, scale, add), (*needed[:1], *needed[2:4], *needed[5:8])))
    return dx, None, dweight, dbias, None, dshift, dscale, dadd, None, None


_backward, _setup_context = fused(reference.group_norm_silu, _gradients, lambda *args: args[-1])
_op = define("group_norm_silu(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, Tensor? shift, Tensor? scale, Tensor? add, bool silu, "
             "bool exact) -> Tensor", fallback=reference.group_norm_silu, fake=_fake, backward=_backward, setup_context=_setup_context)
_table = Table("group_norm_silu", [
    Backend("cpu", native.why_not, _op),
    cuda_row(_op, cuda.op, cuda.why_not, cuda.group_norm_silu),
    triton_row(_op, triton_limits.why_not_forward, "group_norm_silu.group_norm_silu"),
    Backend("reference", always, reference.group_norm_silu),
])
native.compare_with_stock(_op)


def _check(x, groups, weight, bias, modulations) -> None:
    """One comparison of values that are fetched once where all is well; the reason otherwise."""
    if isinstance(x, _Tensor) and x.dtype in FLOATS and type(groups) is int:
        shape, device = x.shape, x.device
        if 3 <= len(shape) <= 5 and groups > 0 and shape[1] % groups == 0:
            for parameter in (weight, bias):
                if parameter is not None and not (isinstance(parameter, _Tensor) and parameter.dtype is x.dtype and parameter.shape == shape[1:2]
                                                  and parameter.device == device):
                    return _explain(x, groups, weight, bias, modulations)
            for modulation in modulations:
                if modulation is not None and not (isinstance(modulation, _Tensor) and modulation.dtype in FLOATS and modulation.shape == shape[:2]
                                                   and modulation.device == device):
                    return _explain(x, groups, weight, bias, modulations)
            return
    _explain(x, groups, weight, bias, modulations)


def _explain(x, groups, weight, bias, modulations) -> None:
    """Raise what is wrong with the arguments, if anything is: rarer forms of good ones come here too."""
    checks.floating("x", x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(f"x has shape {list(x.shape)}; it should be [B, C, L], [B, C, H, W] or [B, C, D, H, W]")
    if not isinstance(groups, (int, torch.SymInt)) or isinstance(groups, bool):
        raise TypeError(f"groups is a {type(groups).__name__}; it should be an int")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; it should be a divisor of x's {channels} channels")
    checks.vector("weight", weight, channels, x.device)
    checks.vector("bias", bias, channels, x.device)
    shapes = (x.shape[:2], x.shape[:2] + (1,) * (x.dim() - 2))
    for name, tensor in zip(("shift", "scale", "add"), modulations):
        if tensor is not None:
            checks.floating(name, tensor)
            if tensor.shape not in shapes:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; for x of shape {list(x.shape)} it should be {list(shapes[0])} or "
                                 f"{list(shapes[1])}")
            checks.same_device(name, tensor, x.device)


def group_norm_silu(x, groups: int, weight=None, bias=None, *, eps: float = 1e-5, shift=None, scale=None, add=None, silu: bool = True,
                    numerics: str = "exact") -> torch.Tensor:
    """``silu(group_norm(x + add) * (1 + scale) + shift)``, in one pass over memory where a group fits the cache.

    Args:
        x: [B, C, H, W], [B, C, D, H, W] or [B, C, L], float32, bfloat16, float16 or float64. Pictures whose samples are dense, contiguous or
            channels-last, are read in place; any other strides are right, at the price of a copy.
        groups: divides C.
        weight, bias: the norm's affine parameters, [C] or None.
        eps: added to the variance; greater than 0.
        shift, scale: [B, C] or [B, C, 1, ...], any strides, or None: a modulation of the norm by the time embedding (AdaGN).
        add: [B, C] or [B, C, 1, ...], any strides, or None: added to x before the norm, as ResnetBlock2D adds its time embedding.
        silu: whether SiLU follows.
        numerics: ``"exact"`` rounds, sums and exponentiates as eager PyTorch does for x's memory format, ``"close"`` rounds once at the end.

    Returns: x's shape, in x's memory format (as ``torch.nn.functional.group_norm`` sees it), in the dtype that eager PyTorch gives.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``groups``, ``eps`` or ``numerics`` that is not as stated.
    Source: Wu and He (2018), "Group Normalization"; Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis", AdaGN.
    """
    _check(x, groups, weight, bias, (shift, scale, add))
    checks.positive("eps", eps)
    if silu is not True and silu is not False:
        raise TypeError(f"silu is {silu!r}; it should be True or False")
    return _table(x, groups, weight, bias, eps, shift, scale, add, silu, is_exact(numerics))
