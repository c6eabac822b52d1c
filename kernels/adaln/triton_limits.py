"""What triton_kernel.py serves: the predicates of the room's Triton rows. ``exact`` keeps PyTorch's norm and fuses what is around it."""

from __future__ import annotations

from fusewire.kernels.triton_rows import why_not

MAX_CHANNELS = 16384  # a row is held in the registers of one program
MAX_ROWS = 2**31 - 2048  # rows are numbered in 32 bits; offsets have 64
MAX_BACKWARD_CHANNELS = 4096  # with up to five sums over tokens beside it
MAX_UNALIGNED_CHANNELS = 2048  # of a number that is no multiple of 16: each element has an address of its own, which takes registers
MAX_BACKWARD_ROWS = 2**30  # a sample's last program may count on beyond its tokens


def too_large(x, channels: int, rows: int) -> str:
    """Why a kernel whose rows have at most so many channels, and that counts so many rows, cannot serve x; ``""`` where it can."""
    if x.shape[2] > channels:
        return f"x has {x.shape[2]} channels, more than {channels}"
    if x.shape[0] * x.shape[1] > rows:
        return f"x has more than {rows} rows"
    return ""


def predicates(serves):
    """(why_not_modulate, why_not_modulate_dual, why_not_gate, why_not_gate_modulate) of a backend that ``serves(x, *tensors)``."""
    def why_not_modulate(x, shift, scale, weight, bias, eps, rms, exact) -> str:
        return serves(x, shift, scale, weight, bias)

    def why_not_modulate_dual(x, shift, scale, shift2, scale2, weight, bias, eps, rms, exact) -> str:
        return serves(x, shift, scale, shift2, scale2, weight, bias)

    def why_not_gate(x, y, gate, exact) -> str:
        return serves(x, y, gate)

    def why_not_gate_modulate(x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, exact) -> str:
        return serves(x, y, gate, y2, gate2, shift, scale, weight, bias)

    return why_not_modulate, why_not_modulate_dual, why_not_gate, why_not_gate_modulate


def _serves(x, *tensors) -> str:
    return why_not(x, *tensors) or too_large(x, MAX_CHANNELS, MAX_ROWS)


why_not_modulate, why_not_modulate_dual, why_not_gate, why_not_gate_modulate = predicates(_serves)


def _why_not_gradient(x, *tensors) -> str:
    """One dtype throughout: the gradients of others are left to the reference."""
    if reason := _serves(x, *tensors):
        return reason
    if x.shape[2] > MAX_BACKWARD_CHANNELS:
        return f"the gradients have {x.shape[2]} channels, more than {MAX_BACKWARD_CHANNELS}"
    if x.shape[2] > MAX_UNALIGNED_CHANNELS and x.shape[2] % 16:
        return f"the gradients have {x.shape[2]} channels, more than {MAX_UNALIGNED_CHANNELS} and no multiple of 16"
    if x.shape[0] * x.shape[1] > MAX_BACKWARD_ROWS:
        return f"the gradients have more than {MAX_BACKWARD_ROWS} rows"
    if any(tensor is not None and tensor.dtype is not x.dtype for tensor in tensors):
        return "the arguments differ in dtype"
    return ""


def why_not_modulate_backward(grad, x, shift, scale, weight, bias, eps, rms, wanted) -> str:
    return _why_not_gradient(x, grad, shift, scale, weight, bias)


def why_not_modulate_dual_backward(grad, grad2, x, shift, scale, shift2, scale2, weight, bias, eps, rms, wanted) -> str:
    if weight is not None or bias is not None:
        return "two modulations of a norm with weight or bias: the registers do not hold six sums"
    return _why_not_gradient(x, grad, grad2, shift, scale, shift2, scale2)


def why_not_gate_backward(grad, y, gate, wanted) -> str:
    return _why_not_gradient(y, grad, gate)


def why_not_gate_modulate_backward(grad, grad2, x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, wanted) -> str:
    if y2 is not None and (weight is not None or bias is not None):
        return "two gates and a norm with weight or bias: the registers do not hold six sums"
    return _why_not_gradient(x, grad, grad2, y, gate, y2, gate2, shift, scale, weight, bias)
