"""The gradients of adaLN by csrc/cuda, in the rounding of ``close``: the predicates of the CUDA rows, and what they launch.

One pass over the rows recomputes residual and norm in registers. What a sample shares among its tokens gets a sum over them, in two steps and without
atomics: parts of the tokens, whose size follows from their number alone, then the sum of the parts. So a sample's sums do not depend on the batch.
"""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.adaln import triton_limits
from fusewire.kernels.adaln.backward_calls import MODULATIONS, ROWWISE, VECTORS, calls
from fusewire.kernels.adaln.cuda import MAX_ROWS

MAX_CHANNELS = 4096  # a row and up to six sums over rows are held in the registers of one block
PARTS, LONGEST = 256, 64  # a sample's tokens are cut into so many parts, of at most so many tokens each

op = cuda_rows.raw(
    "cuda_adaln_backward(Tensor? grad, Tensor? grad1, Tensor? grad2, Tensor? x, Tensor? y, Tensor? gate, Tensor? y2, Tensor? gate2, Tensor? scale, "
    "Tensor? scale2, Tensor? weight, Tensor? bias, Tensor(a!)? dx, Tensor(b!)? dy, Tensor(c!)? dy2, Tensor(d!)? dgate, Tensor(e!)? dgate2, "
    "Tensor(f!)? dshift, Tensor(g!)? dscale, Tensor(h!)? dshift2, Tensor(i!)? dscale2, Tensor(j!)? dweight, Tensor(k!)? dbias, Tensor(l!)? sums, "
    "float eps, int norm) -> ()")


def _serves(triton_why_not, args, x, *tensors) -> str:
    if reason := cuda_rows.why_not(x, *tensors) or triton_limits.too_large(x, MAX_CHANNELS, MAX_ROWS):
        return reason
    # Without a norm, in float32, both are as fast
    if x.dtype.itemsize == 2 or triton_why_not is not triton_limits.why_not_gate_backward:
        if (reason := cuda_rows.better_by_triton(x)) and not triton_why_not(*args):
            return reason
    return ""


def why_not_modulate_backward(*args) -> str:
    grad, x, shift, scale, weight, bias = args[:6]
    return _serves(triton_limits.why_not_modulate_backward, args, x, grad, shift, scale, weight, bias)


def why_not_modulate_dual_backward(*args) -> str:
    grad, grad2, x, shift, scale, shift2, scale2, weight, bias = args[:9]
    if x.dtype is torch.float32 and (weight is not None or bias is not None):
        return "two modulations of a norm with weight or bias in float32: the registers do not hold six sums and what is read"
    return _serves(triton_limits.why_not_modulate_dual_backward, args, x, grad, grad2, shift, scale, shift2, scale2, weight, bias)


def why_not_gate_backward(*args) -> str:
    grad, y, gate = args[:3]
    return _serves(triton_limits.why_not_gate_backward, args, y, grad, gate)


def why_not_gate_modulate_backward(*args) -> str:
    grad, grad2, x, y, gate, y2, gate2, shift, scale, weight, bias = args[:11]
    return _serves(triton_limits.why_not_gate_modulate_backward, args, x, grad, grad2, y, gate, y2, gate2, shift, scale, weight, bias)


def parts_of(tokens: int) -> int:
    """Into how many parts a sample's tokens are cut."""
    steps = min(max(-(-tokens // PARTS), 1), LONGEST)
    return -(-tokens // steps)


def _backward(wanted: int, norm: int, eps: float, grad, grad1, grad2, arguments: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """As ``calls`` says."""
    like = next(iter(arguments.values()))
    batch, tokens, channels = like.shape
    found = {name: like.new_empty(tensor.shape) for i, (name, tensor) in enumerate(arguments.items()) if tensor is not None and wanted >> i & 1}
    summed = sum(1 for name, tensor in found.items() if name not in ROWWISE and (tensor.dim() < 3 or tensor.shape[1] == 1))
    if found:
        sums = like.new_empty((summed, batch, parts_of(tokens), channels), dtype=torch.float32) if summed else None
        op(grad, grad1, grad2, *map(arguments.get, ("x", "y", "gate", "y2", "gate2", "scale", "scale2", "weight", "bias")),
           *map(found.get, (*ROWWISE, *MODULATIONS, *VECTORS)), sums, eps, norm)
    return tuple(found[name] if name in found else like.new_empty(0) for name in arguments)


adaln_modulate_backward, adaln_modulate_dual_backward, gate_residual_backward, gate_residual_adaln_backward = calls(_backward)
