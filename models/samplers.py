"""Sampling loops: noise to picture, given a model of the velocity field."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from fusewire import ops
from fusewire.models.schedules import TRAIN_STEPS



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
