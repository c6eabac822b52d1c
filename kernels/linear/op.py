"""Linear layers with an epilogue: the public op, its registration and its backends."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels import checks
from fusewire.kernels.adaln.op import gate_residual
from fusewire.kernels.autograd import fused
from fusewire.kernels.dispatch import Backend, Table, always, recording, unrecorded
from fusewire.kernels.gated_mlp.op import geglu, swiglu
from fusewire.kernels.library import define
from fusewire.kernels.linear import gradients, native, reference, triton_limits
from fusewire.kernels.rounding import is_exact, promoted
from fusewire.kernels.triton_rows import row as triton_row


def _fake_linear(x, weight, bias, activation, gate, residual, exact):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=promoted(x.dtype, gate, residual))


_backward, _setup = fused(reference.linear, gradients.of_linear, gradients.recomputed)
_linear_op = define("linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? gate, Tensor? residual, bool exact) -> Tensor",
                    fallback=reference.linear, fake=_fake_linear, backward=_backward, setup_context=_setup)


_library = unrecorded(_linear_op)


def _activated(x, weight, bias, activation):
    return reference.linear(x, weight, bias, activation, None, None, False)


_backward_act, _setup_act = fused(_activated,
                                  lambda needed, grads, *args: gradients.of_linear(needed, grads, *args, None, None, False)[:4],
                                  lambda *args: gradients.recomputed(*args, None, None, False))
_onednn_op = define("linear_onednn(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
                    fallback=native.onednn, fake=lambda *args: _fake_linear(*args, None, None, False), backward=_backward_act, setup_context=_setup_act,
                    meaning=_activated)


def _cpu(x, weight, bias, activation, gate, residual, exact) -> torch.Tensor:
    if activation != "none" and native.recorded(x, weight, bias):
        return gradients.activated(x, weight, bias, activation)[0]
    if (activation != "none" or gate is not None) and x.dtype is not torch.bfloat16 and native.product_is_pytorchs(x, weight):
        if gate is not None:
            return gate_residual(residual, F.linear(x, weight, bias), gate, numerics="close")
        return gradients.bias_activation.by_cpu(F.linear(x, weight), bias, activation)
    if native.onednn_serves(x, weight, activation, gate, residual):
        # Where the call may be differentiated or traced the registered op, which has a formula; the bare call elsewhere.
        y = (_onednn_op if recording() else native.onednn)(x, weight, bias, activation)
        if residual is None:
            return y
        return residual + y if gate is None else gate_residual(residual, y, gate, numerics="close")
    if gate is not None:
        gate = reference.over_tokens(gate, x)
    if native.apart(residual, gate) and native.recorded(x, weight, bias, gate, residual):
        y = _library(x, weight, bias, "none", None, None, False)
        return residual + y if gate is None else gate_residual(residual, y, gate, numerics="close")
    return _library(x, weight, bias, activation, gate, residual, exact)


_epilogue = triton_row(_linear_op, triton_limits.why_not_epilogue, "linear.linear")


def _triton(x, weight, bias, activation, gate, residual, exact) -> torch.Tensor:
    if not exact and triton_limits.trained(x, weight, bias, activation):
        return gradients.activated(x, weight, bias, activation)[0]
    if not exact and residual is not None and native.recorded(x, weight, bias, gate, residual):
        over_tokens = None if gate is None else reference.over_tokens(gate, x)
        if native.apart(residual, over_tokens):  # the pass of their own has gradients, and the product is not done again for them
            y = F.linear(x, weight, bias)
            return residual + y if gate is None else gate_residual(residual, y, over_tokens, numerics="close")
    return _epilogue.run(x, weight, bias, activation, gate, residual, exact)


_linear = Table("linear", [
    Backend("cpu", native.why_not_cpu, _cpu),
    Backend("cuda", triton_limits.why_not_cublaslt, triton_limits.cublaslt),
    _epilogue._replace(run=_triton),
    Backend("reference", always, reference.linear),
])


_GATED = {"geglu": geglu, "swiglu": swiglu}  # which halve the product


def linear(x, weight, bias=None, *, activation: str | None = None, gate=None, residual=None, numerics: str = "exact") -> torch.Tensor:
    """``act(x @ weight.T + bias)``, or ``residual + gate * (x @ weight.T + bias)``.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64, any strides.
        weight, bias: the parameters of an ``nn.Linear``, [N, K] and [N] or None; [2N, K] and [2N] for a gated activation.
        activation: None, ``"gelu_tanh"``, ``"gelu"`` (erf) or ``"silu"``; or gated, ``"geglu"`` or ``"swiglu"``: ``hidden * gelu(gate)`` or
            ``hidden * silu(gate)`` of the product's halves (hidden, gate), as diffusers' GEGLU and SwiGLU have them. These are two calls, both counted:
            the product, and ``ops.geglu`` or ``ops.swiglu`` on it, which in ``"close"`` adds the bias too. Not together with ``residual``.
        gate: broadcastable to [..., N]; for x [B, T, K] also [B, N]. Needs ``residual``.
        residual: [..., N].
        numerics: ``"exact"`` makes the stock calls, each rounding; ``"close"`` may use another GEMM library and rounds the epilogue once.

    Returns: [..., N] in the promoted dtype of the inputs. Where PyTorch's own product serves (``"exact"``, float64, and MKL's in ``"close"``), its last
        bits depend on the layout of x and on the number of rows, so on the batch too.
    Raises: TypeError for a dtype, ValueError for a shape, a device, ``activation`` or ``numerics`` that is not as stated.
    Source: Shazeer (2020), "GLU Variants Improve Transformer", for the gated activations.
    """
    if activation == "geglu" or activation == "swiglu":
        return _gated(x, weight, bias, activation, gate, residual, numerics)
    if not _fits(x, weight, bias, activation, gate, residual):
        _check(x, weight, bias, activation, gate, residual)
    return _linear(x, weight, bias, activation or "none", gate, residual, is_exact(numerics))


def _gated(x, weight, bias, activation: str, gate, residual, numerics: str) -> torch.Tensor:
    _check(x, weight, bias, activation, gate, residual)
    if weight.shape[0] % 2:
        raise ValueError(f"weight has shape {list(weight.shape)}; for activation {activation!r} it should be [2N, K]")
    exact = is_exact(numerics)
    # exact rounds the product with its bias, as an nn.Linear does; autocast casts a bias with the product alone
    later = None if exact or bias is None or bias.dtype is not x.dtype or checks.autocasts(checks.kind_of(x)) else bias
    y = _linear(x, weight, None if later is bias else bias, "none", None, None, exact)
    return _GATED[activation](y, bias=later, numerics=numerics)


def _fits(x, weight, bias, activation, gate, residual) -> bool:
    """The common call in few comparisons; ``_check`` looks at the rest and finds out what is wrong."""
    if not isinstance(x, torch.Tensor) or not isinstance(weight, torch.Tensor):
        return False
    dtype, shape, given = x.dtype, weight.shape, x.shape
    device = None if x.is_cpu else x.device  # there is one CPU
    if residual is not None:
        if activation is not None or len(shape) != 2 or not _fits_epilogue(gate, residual, dtype, (*given[:-1], shape[0]), x.device):
            return False
    elif gate is not None:
        return False
    return (len(shape) == 2 and len(given) > 0 and given[-1] == shape[1] and dtype in checks.FLOATS and weight.dtype is dtype
            and (weight.is_cpu if device is None else weight.device == device) and (activation is None or type(activation) is str and activation in reference.ACTIVATIONS)
            and (bias is None or isinstance(bias, torch.Tensor) and bias.dtype is dtype and bias.shape == shape[:1]
                 and (bias.is_cpu if device is None else bias.device == device)))


def _fits_epilogue(gate, residual, dtype, shape: tuple, device) -> bool:
    """residual of the result's shape; no gate, or [B, N] or [B, 1, N] beside [B, T, N]."""
    if not (isinstance(residual, torch.Tensor) and residual.dtype is dtype and residual.shape == shape and residual.device == device):
        return False
    if gate is None:
        return True
    return (isinstance(gate, torch.Tensor) and gate.dtype is dtype and len(shape) == 3 and gate.device == device
            and (gate.shape == (shape[0], shape[2]) or gate.shape == (shape[0], 1, shape[2])))


def _check(x, weight, bias, activation, gate, residual) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("gate", gate), ("residual", residual)):
        if tensor is not None or name in ("x", "weight"):
            checks.floating(name, tensor)
            checks.same_device(name, tensor, x.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not x.dtype and not checks.autocasts(checks.kind_of(x)):
            raise TypeError(f"{name} has dtype {tensor.dtype}; it should be {x.dtype}, as x has")
    checks.rank("weight", weight, 2, "[N, K]")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {list(x.shape)}; for weight of shape {list(weight.shape)} it should be [..., {weight.shape[1]}]")
    checks.vector("bias", bias, weight.shape[0], x.device)
    if activation is not None and not (isinstance(activation, str) and (activation in reference.ACTIVATIONS or activation in _GATED)):
        raise ValueError(f"activation is {activation!r}; it should be None, 'gelu_tanh', 'gelu', 'silu', 'geglu' or 'swiglu'")
    if residual is not None:
        _check_epilogue(x, weight, activation, gate, residual)
    elif gate is not None:
        raise ValueError("gate is given without residual; it should be given with it")


def _check_epilogue(x, weight, activation, gate, residual) -> None:
    shape = (*x.shape[:-1], weight.shape[0])
    if activation is not None:
        raise ValueError(f"activation is {activation!r}; it should be None where residual is given")
    if residual.shape != shape:
        raise ValueError(f"residual has shape {list(residual.shape)}; it should be {list(shape)}")
    if gate is not None:
        gated = reference.over_tokens(gate, x).shape
        if len(gated) > len(shape) or any(have not in (1, want) for have, want in zip(gated[::-1], shape[::-1])):
            raise ValueError(f"gate has shape {list(gate.shape)}; it should be broadcastable to {list(shape)}")
