"""Sampling loops: noise to picture, given a model. The algorithms are in ``solvers``, the noise levels in ``schedules``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from fusewire import ops
from fusewire.kernels.sampler_step.tables import PLACE
from fusewire.models.schedules import TRAIN_STEPS
from fusewire.models.solvers import Plan



class Conditioning(NamedTuple):
    """What an MMDiT is conditioned on: text states [B, L, J] and pooled text [B, P]."""

    encoder_hidden_states: torch.Tensor
    pooled_projections: torch.Tensor


def flow_interpolate(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """The rectified-flow path ``(1 - sigma) * x0 + sigma * noise``: the start of sampling from a picture, and the training input."""
    return sigma * noise + (1.0 - sigma) * x0


def sample_flow_euler(model: Callable[..., torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor, positive: Conditioning, negative: Conditioning | None = None,
                      *, guidance_scale: float = 1.0, skip_layers: Iterable[int] | None = None, skip_scale: float = 2.8, skip_start: float = 0.01,
                      skip_stop: float = 0.2, numerics: str = "exact", callback: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
    """Euler steps of dx/dsigma = v(x, sigma), Algorithm 1 of Karras et al. (2022) without its correction, with guidance.

    Args:
        model: called as ``model(hidden_states, encoder_hidden_states, pooled_projections, timestep)`` with ``timestep = 1000 * sigma`` [B], and
            ``skip_layers=...`` for skip-layer guidance; returns the velocity. ``MMDiT`` is one.
        x: [B, C, H, W] noise (or ``flow_interpolate`` of a picture at ``sigmas[0]``).
        sigmas: [steps + 1], decreasing, last one 0: ``flow_sigmas``.
        positive, negative: the prompt and what to steer away from. ``negative`` is needed where ``guidance_scale`` is greater than 1.
        guidance_scale: g in ``v_negative + g * (v_positive - v_negative)``; 1 switches guidance off (Ho and Salimans, 2022).
        skip_layers, skip_scale, skip_start, skip_stop: skip-layer guidance (SD3.5): ``skip_scale * (v_positive - v_skipping)`` is added at the steps
            strictly between these fractions of the schedule.
        numerics: ``"exact"``: guidance and step round where diffusers' pipeline and scheduler do (which step in float32, for float64 too);
            ``"close"``: once a step.
        callback: called as ``callback(step, x)`` after each step.

    Returns: [B, C, H, W] in the dtype of the model's output.
    Raises: ValueError where ``negative`` is missing.
    """
    guided = guidance_scale > 1
    if guided and negative is None:
        raise ValueError(f"negative is None; guidance_scale {guidance_scale} needs the conditioning to steer away from")
    steps, batch = len(sigmas) - 1, x.shape[0]
    both = Conditioning(*(torch.cat(pair) for pair in zip(negative, positive))) if guided else positive
    timesteps = sigmas.to(x.device) * TRAIN_STEPS
    table = ops.flow_euler_table(sigmas, guidance_scale).to(x.device)
    for i in range(steps):
        if guided:
            v = model(torch.cat([x, x]), *both, timesteps[i].expand(2 * batch))
            if skip_layers is not None and steps * skip_start < i < steps * skip_stop:
                v_negative, v_positive = v.chunk(2)
                v = v_negative + guidance_scale * (v_positive - v_negative)
                v = v + (v_positive - model(x, *positive, timesteps[i].expand(batch), skip_layers=skip_layers)) * skip_scale
        else:
            v = model(x, *both, timesteps[i].expand(batch))
        x = ops.sampler_step(x, v, table, i, numerics=numerics)
        if callback is not None:
            callback(i, x)
    return x


def sample(model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, plan: Plan, *,
           noise: Callable[[int], torch.Tensor] | None = None, guidance_scale: float | Sequence[float] = 1.0, numerics: str = "close",
           callback: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
    """Follow a plan from ``x``, noise of the first level, to a picture.

    Args:
        model: called as ``model(x, time)`` with x [B, ...], scaled as the plan says, and a 0-dim time on its device. Returns the prediction [B, ...], or
            [2B, ...] for [uncond; cond]: guidance is then part of the step.
        x: [B, ...] float32, bfloat16, float16 or float64.
        plan: of ``solvers``: ``ddim(...)``, ``euler(...)``, ...
        noise: called with the number of the call of the model for noise of x's shape; None: ``torch.randn_like``.
        guidance_scale: g in ``uncond + g * (cond - uncond)``: one, or one for each call (``guidance.interval``).
        numerics: ``"close"``, or ``"exact"`` to round as a chain of PyTorch calls would.
        callback: called as ``callback(call, x)`` after each call's step.

    Returns: [B, ...]
    """
    table = plan.table.clone()
    table[:, PLACE["guidance"]] = torch.as_tensor(guidance_scale, dtype=torch.float64)
    noisy, looks_back = ((table[:, PLACE[name]] != 0).tolist() for name in ("noise", "e_previous"))
    keeps = any(plan.second) or bool(plan.past)
    table, times, churn, scales = table.to(x.device), plan.times.to(x.device), plan.churn.tolist(), plan.scales.tolist()
    draw = noise or (lambda i: torch.randn_like(x))
    start, x0, slope, slopes = x, None, None, []
    for i in range(len(times)):
        if churn[i]:
            x = x + churn[i] * draw(i)
        if not plan.second[i]:
            start = x
        output = model(x if scales[i] == 1 else x * scales[i], times[i])
        if plan.past:
            extra = sum(weight * past for weight, past in zip(plan.past[i], slopes)) if slopes else None
        else:
            extra = draw(i) if noisy[i] else None
        previous = (slope if plan.second[i] else x0) if looks_back[i] else None
        x, x0, slope = ops.solver_step(x, output, table, i, previous=previous, base=start if plan.second[i] else None, noise=extra, keep_slope=keeps,
                                       numerics=numerics)
        if plan.past:
            slopes = [slope, *slopes][:3]
        if callback is not None:
            callback(i, x)
    return x
