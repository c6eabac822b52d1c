"""What csrc/cpu/sampler_step.cpp and solver_step.cpp serve: the predicates of the room's CPU rows."""

from __future__ import annotations

import torch

from fusewire.kernels.library import CPU
from fusewire.kernels.rounding import differs_from_stock, probe_values
from fusewire.kernels.sampler_step import reference

_differs = CPU.reason  # why the exact row stands down


def compare_with_stock(op) -> None:
    """Find out whether the kernel's exact mode and the installed torch agree."""
    global _differs
    if not CPU.loaded:
        return
    table = torch.tensor([[-0.0371234, 4.3]], dtype=torch.float64, device="cpu")
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        sample, output = (probe_values(batch, 67, dtype=dtype, seed=batch) for batch in (1, 2))
        cases += [(sample, output, None, table, 0, None, True), (sample, output[:1], None, table, 0, None, True)]
    _differs = differs_from_stock(op, reference.flow_euler_step, cases)


def why_not_flow_euler(sample, model_output, uncond, table, step, counter, exact) -> str:
    if not CPU.loaded:
        return CPU.reason
    if not sample.is_cpu:
        return f"sample is on {sample.device}"
    if exact and _differs:
        return _differs
    if sample.dtype is not model_output.dtype:
        return "sample and model_output differ in dtype"
    return ""


def why_not_solver(sample, model_output, uncond, previous, base, noise, mask, known, known_noise, table, step, counter, *rest) -> str:
    """The reference spells its roundings out, as the kernel does: there is no order of the installed torch to compare with."""
    if not CPU.loaded:
        return CPU.reason
    return "" if sample.is_cpu else f"sample is on {sample.device}"
