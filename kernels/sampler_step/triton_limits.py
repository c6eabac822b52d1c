"""What triton_kernel.py serves: the predicates of the room's Triton rows."""

from __future__ import annotations

from fusewire.kernels.triton_rows import why_not


def why_not_flow_euler(sample, model_output, uncond, table, step, counter, exact) -> str:
    if reason := why_not(sample, model_output, uncond):
        return reason
    if sample.dim() > 4:
        return f"sample has {sample.dim()} dimensions, more than 4"
    if sample.numel() >= 2**31 * 64:
        return "sample has 2^37 elements or more"
    return ""


def why_not_solver(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, *rest) -> str:
    if reason := why_not(sample, model_output, uncond, previous, base, noise, mask, known, known_noise):
        return reason
    if sample.numel() >= 2**31 * 64:
        return "sample has 2^37 elements or more"
    return ""
