"""What triton_kernel.py serves: the predicates of the room's Triton rows. ``exact`` is PyTorch's own norm, whose order of summation belongs to it."""

from __future__ import annotations

from fusewire.kernels.triton_rows import why_not

MAX_CHANNELS = 16384  # a row is held in the registers of one program
MAX_BACKWARD_CHANNELS = 8192  # with the sums of weight's and bias's gradients beside it
MAX_ROWS = 2**31 - 2048  # rows are numbered in 32 bits; offsets have 64
MAX_BACKWARD_ROWS = 2**30  # the last program may count on beyond the rows


def _why_not(most: int, rows: int, x, *tensors) -> str:
    if reason := why_not(x, *tensors):
        return reason
    channels = x.shape[-1]
    if channels > most:
        return f"x has {channels} channels, more than {most}"
    if channels and x.numel() // channels > rows:
        return f"x has more than {rows} rows"
    return ""


def why_not_norm(x, weight, bias, eps, switch, exact) -> str:
    return "numerics='exact' keeps PyTorch's own norm" if exact else _why_not(MAX_CHANNELS, MAX_ROWS, x, weight, bias)


def why_not_backward(grad, x, weight, eps, of_x, of_weight, of_bias) -> str:
    return _why_not(MAX_BACKWARD_CHANNELS, MAX_BACKWARD_ROWS, x, grad, weight)


def _why_not_picture(x, *tensors) -> str:
    if reason := why_not(x, *tensors):
        return reason
    if x.shape[1] > MAX_ROWS or x.shape[0] * x.shape[2] * x.shape[3] > MAX_ROWS:
        return f"x has more than {MAX_ROWS} channels or pixels"
    return ""


def why_not_picture(x, weight, bias, eps, exact) -> str:
    return "numerics='exact' keeps PyTorch's own norm" if exact else _why_not_picture(x, weight, bias)


def why_not_picture_backward(grad, x, weight, eps, of_x, of_weight, of_bias) -> str:
    return _why_not_picture(x, grad, weight)


def why_not_response(x, weight, bias, eps, exact) -> str:
    return "numerics='exact' keeps PyTorch's own norm" if exact else _why_not(MAX_ROWS, MAX_BACKWARD_ROWS, x, weight, bias)


def why_not_response_backward(grad, x, weight, eps, of_x) -> str:
    return _why_not(MAX_ROWS, MAX_BACKWARD_ROWS, x, grad, weight)
