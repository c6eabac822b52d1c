"""Calls of ops.solver_step: every optional operand, and tables in which every column counts."""

from __future__ import annotations

import torch

from fusewire import ops
from fusewire.kernels.sampler_step.tables import SOLVER

STEPS = 3
OPERANDS = {
    "plain": (), "guided": ("uncond",), "second order": ("previous",), "heun": ("previous", "base"), "noise": ("noise",),
    "inpainting": ("mask", "known"), "all": ("uncond", "previous", "base", "noise", "mask", "known", "known_noise"),
}
WIDTHS = [dict(wide_x0=False, wide_out=False), dict(wide_x0=False, wide_out=True), dict(wide_x0=True, wide_out=True)]  # as DDIM, DPM-Solver++, Euler


def table(zeros: tuple[str, ...] = (), limit: float = 1.5) -> torch.Tensor:
    """Coefficients without pattern, rounded to bfloat16 so that every dtype gets the same ones; the divisors away from 0."""
    torch.manual_seed(7)
    columns = {name: 0.5 + torch.rand(STEPS).bfloat16().double() for name in SOLVER}
    columns |= {name: -columns[name] for name in ("x0_m", "e_x0", "e")}
    columns |= {"guidance": torch.full((STEPS,), 4.3), "x0_limit": torch.full((STEPS,), limit)}
    return ops.solver_table(STEPS, **columns | {name: 0.0 for name in zeros}).to(torch.get_default_device())


def operands(names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, wide: bool = False) -> dict:
    """``wide``: what an earlier step kept, and the noise, are float32."""
    given = {"sample": torch.randn(shape).to(dtype), "model_output": torch.randn(shape).to(dtype)}
    for name in names:
        tensor = torch.rand(1, *(1,) * (len(shape) - 2), shape[-1]).round() if name == "mask" else torch.randn(shape)
        given[name] = tensor if wide and name in ("previous", "noise") and dtype is not torch.float64 else tensor.to(dtype)
    return given


def in_float64(given: dict) -> dict:
    return {name: tensor.double() for name, tensor in given.items()}
