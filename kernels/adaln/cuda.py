"""adaLN by csrc/cuda: the predicates of the room's CUDA rows, and what they launch.

``close`` is one kernel for a whole op. ``exact`` leaves the norm to PyTorch's own kernel, whose order of summation belongs to it, and fuses the
elementwise parts around it, rounding in registers where eager PyTorch rounds in memory. All tensors of a call have one dtype.
"""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.adaln.backward_calls import LAYER, NONE, RMS
from fusewire.kernels.adaln.reference import normalise
from fusewire.kernels.adaln.triton_limits import predicates, too_large

MAX_CHANNELS = 16384  # a row is held in the registers of one block
MAX_ROWS = 2**31 - 1  # a block has a row; blocks are numbered along x

op = cuda_rows.raw(
    "cuda_adaln(Tensor x, Tensor? y, Tensor? gate, Tensor? y2, Tensor? gate2, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, "
    "Tensor? shift2, Tensor? scale2, Tensor(a!)? residual, Tensor(b!)? out, Tensor(c!)? out2, float eps, int norm, bool exact) -> ()")


def _serves(x, *tensors) -> str:
    if reason := cuda_rows.why_not(x, *tensors) or too_large(x, MAX_CHANNELS, MAX_ROWS):
        return reason
    return cuda_rows.better_by_triton(x) if x.dtype.itemsize == 2 else ""  # in float32 both are as fast


why_not_modulate, why_not_modulate_dual, why_not_gate, why_not_gate_modulate = predicates(_serves)


def adaln_modulate(x, shift, scale, weight, bias, eps: float, rms: bool, exact: bool) -> torch.Tensor:
    out = x.new_empty(x.shape)
    if exact:
        op(normalise(x, weight, bias, eps, rms), None, None, None, None, None, None, shift, scale, None, None, None, out, None, eps, NONE, True)
    else:
        op(x, None, None, None, None, weight, bias, shift, scale, None, None, None, out, None, eps, RMS if rms else LAYER, False)
    return out


def adaln_modulate_dual(x, shift, scale, shift2, scale2, weight, bias, eps: float, rms: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, out2 = x.new_empty(x.shape), x.new_empty(x.shape)
    modulations = shift, scale, shift2, scale2, None, out, out2, eps
    if exact:
        op(normalise(x, weight, bias, eps, rms), None, None, None, None, None, None, *modulations, NONE, True)
    else:
        op(x, None, None, None, None, weight, bias, *modulations, RMS if rms else LAYER, False)
    return out, out2


def gate_residual(x, y, gate, exact: bool) -> torch.Tensor:
    residual = x.new_empty(x.shape)
    op(x, y, gate, None, None, None, None, None, None, None, None, residual, None, None, 0.0, NONE, exact)
    return residual


def gate_residual_adaln(x, y, gate, y2, gate2, shift, scale, weight, bias, eps: float, rms: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    residual = x.new_empty(x.shape)
    if exact:
        op(x, y, gate, y2, gate2, None, None, None, None, None, None, residual, None, None, eps, NONE, True)
        return residual, adaln_modulate(residual, shift, scale, weight, bias, eps, rms, True)
    out = x.new_empty(x.shape)
    op(x, y, gate, y2, gate2, weight, bias, shift, scale, None, None, residual, out, None, eps, RMS if rms else LAYER, False)
    return residual, out
