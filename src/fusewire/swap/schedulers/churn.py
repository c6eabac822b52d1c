"""Churn: noise that raises the latents to a higher level before a step (Karras et al., 2022, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor

from fusewire import ops
from fusewire.swap.schedulers.common import Scalars, host_levels, prepared
from fusewire.swap.schedulers.layout import laid


def excess(scheduler, at: int, s_churn: float, s_tmin: float, s_tmax: float) -> float:
    """The part of sigmas[at] that churn adds to it."""
    if s_churn == 0 or not s_tmin <= host_levels(scheduler)[at] <= s_tmax:
        return 0.0
    return min(s_churn / (len(scheduler.sigmas) - 1), 2**0.5 - 1)


def churned(scheduler, model_output, sample, numerics: str, s_noise: float, generator, extra: float, level: torch.Tensor,
            columns: Callable[[Scalars], dict], key: tuple = (), **given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, x0, the latents with noise, e): a step of ``columns`` from ``level * (extra + 1)``, in two passes.

    With noise the latents are float32, the model's output is not: what comes from it alone is rounded before it meets them.
    """
    exact, index, sigmas = numerics == "exact", scheduler._step_index, (scheduler.sigmas,)
    hat = level * (extra + 1)
    noise = randn_tensor(model_output.shape, dtype=model_output.dtype, device=model_output.device, generator=generator)
    if s_noise != 1:
        noise = noise * s_noise
    first = prepared(scheduler, (*key, extra, "noise"), sigmas, sample, exact,
                     lambda scalars: dict(x0_x=1.0, x0_m=scalars.right((hat**2 - level**2) ** 0.5), noise=columns(scalars)["x0_m"]))
    part, noisy, _ = ops.solver_step(sample, noise, first.rows, index, noise=model_output, numerics=numerics)
    second = prepared(scheduler, (*key, extra, "step"), sigmas, noisy, exact, lambda scalars: dict(columns(scalars), x0_m=1.0))
    out, x0, e = ops.solver_step(noisy, part.float(), second.rows, index, reciprocal=second.reciprocal, numerics=numerics, **given)
    return out.to(sample.dtype), x0, laid(noisy, (sample, noise), numerics), e
