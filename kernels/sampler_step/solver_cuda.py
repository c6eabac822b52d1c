"""A solver's step by csrc/cuda: the predicate of the CUDA row, and what it launches. ``exact`` has the reference's bits: every operation is elementwise."""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.sampler_step.solver_reference import contiguous_operands, empty_results

op = cuda_rows.raw("cuda_solver_step(Tensor sample, Tensor cond, Tensor? uncond, Tensor? previous, Tensor? base, Tensor? noise, Tensor? mask, "
                   "Tensor? known, Tensor? known_noise, Tensor table, int step, Tensor? counter, Tensor(a!) out, Tensor(b!) x0, Tensor(c!)? slope, "
                   "bool wide_out, bool reciprocal, bool exact) -> ()")


def why_not_solver(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, *rest) -> str:
    """``previous`` and ``noise`` may also be float32, which the public op has seen to."""
    if reason := cuda_rows.why_not(sample, model_output, uncond, base, mask, known, known_noise):
        return reason
    if sample.numel() >= 2**37:
        return "sample has 2^37 elements or more"
    return ""


def solver_step(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, table, step: int, counter, wide_x0: bool, wide_out: bool,
                keep_slope: bool, reciprocal: bool, exact: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = contiguous_operands(sample, model_output, uncond, previous, base, noise, mask, known, known_noise)
    out, x0, slope = empty_results(sample, wide_x0, keep_slope)
    op(*flat, table, step, counter, out, x0, slope if keep_slope else None, wide_out, reciprocal, exact)
    return out, x0, slope
