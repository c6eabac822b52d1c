"""A solver's step by csrc/cuda: the predicate of the CUDA row, and what it launches. ``exact`` has the reference's bits: every operation is elementwise."""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.rounding import compute_dtype
from fusewire.kernels.sampler_step.reference import halves

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
    cond, uncond = halves(model_output, uncond, sample.shape[0])
    # Latents are small and nearly always contiguous; what is not is copied
    flat = [None if x is None else x.contiguous() for x in (sample, cond, uncond, previous, base, noise, mask, known, known_noise)]
    out = sample.new_empty(sample.shape)
    x0 = sample.new_empty(sample.shape, dtype=compute_dtype(sample.dtype) if wide_x0 else sample.dtype)
    slope = torch.empty_like(x0) if keep_slope else x0.new_empty(0)
    op(*flat, table, step, counter, out, x0, slope if keep_slope else None, wide_out, reciprocal, exact)
    return out, x0, slope
