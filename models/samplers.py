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


class FlowSteps(NamedTuple):
    """The steps of ``sample_flow_euler`` on a device: made once by ``prepare_flow``."""

    timesteps: torch.Tensor  # [S] 1000 * sigma
    table: torch.Tensor  # [S, 2] of ops.sampler_step
    guidance_scale: float


def prepare_flow(sigmas: torch.Tensor, device: torch.device | str, guidance_scale: float = 1.0) -> FlowSteps:
    """``sigmas`` [S + 1] and the guidance, for ``sample_flow_euler`` to take in their place.

    Its loop then begins without copying them to the device, and as nothing in it waits for the device either, it can be captured as one CUDA graph,
    model included (``prepare`` tells how). A graph of one step, replayed S times, takes its row of ``timesteps`` and ``table`` by a 0-dim int64
    counter on the device, which ``ops.sampler_step`` takes as its ``step``.
    """
    return FlowSteps((sigmas.to(device) * TRAIN_STEPS)[:-1], ops.flow_euler_table(sigmas, guidance_scale).to(device), guidance_scale)


def sample_flow_euler(model: Callable[..., torch.Tensor], x: torch.Tensor, sigmas: torch.Tensor | FlowSteps, positive: Conditioning,
                      negative: Conditioning | None = None, *, guidance_scale: float = 1.0, skip_layers: Iterable[int] | None = None,
                      skip_scale: float = 2.8, skip_start: float = 0.01, skip_stop: float = 0.2, numerics: str = "exact",
                      callback: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
    """Euler steps of dx/dsigma = v(x, sigma), Algorithm 1 of Karras et al. (2022) without its correction, with guidance.

    Args:
        model: called as ``model(hidden_states, encoder_hidden_states, pooled_projections, timestep)`` with ``timestep = 1000 * sigma`` [B], and
            ``skip_layers=...`` for skip-layer guidance; returns the velocity. ``MMDiT`` is one.
        x: [B, C, H, W] noise (or ``flow_interpolate`` of a picture at ``sigmas[0]``).
        sigmas: [steps + 1], decreasing, last one 0: ``flow_sigmas``. Or what ``prepare_flow`` made of them: nothing is then copied to the device.
        positive, negative: the prompt and what to steer away from. ``negative`` is needed where ``guidance_scale`` is greater than 1.
        guidance_scale: g in ``v_negative + g * (v_positive - v_negative)``; 1 switches guidance off (Ho and Salimans, 2022). Left out for what was
            prepared, which has its own.
        skip_layers, skip_scale, skip_start, skip_stop: skip-layer guidance (SD3.5): ``skip_scale * (v_positive - v_skipping)`` is added at the steps
            strictly between these fractions of the schedule.
        numerics: ``"exact"``: guidance and step round where diffusers' pipeline and scheduler do (which step in float32, for float64 too);
            ``"close"``: once a step.
        callback: called as ``callback(step, x)`` after each step.

    Returns: [B, C, H, W] in the dtype of the model's output.
    Raises: ValueError where ``negative`` is missing, or ``guidance_scale`` comes twice.
    """
    if isinstance(sigmas, FlowSteps):
        _check_guidance(guidance_scale)
        prepared = sigmas
    else:
        prepared = prepare_flow(sigmas, x.device, guidance_scale)
    timesteps, table, guidance_scale = prepared
    guided = guidance_scale > 1
    if guided and negative is None:
        raise ValueError(f"negative is None; guidance_scale {guidance_scale} needs the conditioning to steer away from")
    steps, batch = len(timesteps), x.shape[0]
    both = Conditioning(*(torch.cat(pair) for pair in zip(negative, positive))) if guided else positive
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


class Prepared(NamedTuple):
    """A plan of ``K`` calls on a device, with its guidance: made once by ``prepare``."""

    table: torch.Tensor  # [K, 19] of ops.solver_step
    times: torch.Tensor  # [K]
    scales: tuple[float, ...]
    churn: tuple[float, ...]
    noisy: tuple[bool, ...]  # the step takes noise
    looks_back: tuple[bool, ...]  # the step takes what the one before it kept
    second: tuple[bool, ...]
    past: tuple[tuple[float, ...], ...]


def prepare(plan: Plan, device: torch.device | str, guidance_scale: float | Sequence[float] = 1.0) -> Prepared:
    """A plan for ``sample`` to follow on ``device`` without copying anything to it: its scalars are put there now.

    The loop can then be captured as one CUDA graph, model included, if the model itself can be::

        steps = prepare(plan, "cuda", guidance_scale)
        x, noise = torch.empty(shape, device="cuda"), torch.empty(len(steps.times), *shape, device="cuda")
        sample(model, x, steps, noise=lambda i: noise[i])  # once before, on another stream as PyTorch asks for
        with torch.cuda.graph(graph):
            picture = sample(model, x, steps, noise=lambda i: noise[i])
        x.normal_(), noise.normal_(), graph.replay()  # as often as wanted: picture holds the new one

    What was prepared must live as long as the graph.
    """
    table = plan.table.clone()
    table[:, PLACE["guidance"]] = torch.as_tensor(guidance_scale, dtype=torch.float64)
    noisy, looks_back = (tuple((table[:, PLACE[name]] != 0).tolist()) for name in ("noise", "e_previous"))
    return Prepared(table.to(device), plan.times.to(device), tuple(plan.scales.tolist()), tuple(plan.churn.tolist()), noisy, looks_back, plan.second,
                    plan.past)


def sample(model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, plan: Plan | Prepared, *,
           noise: Callable[[int], torch.Tensor] | None = None, guidance_scale: float | Sequence[float] = 1.0, numerics: str = "close",
           callback: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
    """Follow a plan from ``x``, noise of the first level, to a picture. From the first call of the model on, nothing waits for the device.

    Args:
        model: called as ``model(x, time)`` with x [B, ...], scaled as the plan says, and a 0-dim time on its device. Returns the prediction [B, ...], or
            [2B, ...] for [uncond; cond]: guidance is then part of the step.
        x: [B, ...] float32, bfloat16, float16 or float64.
        plan: of ``solvers``: ``ddim(...)``, ``euler(...)``, ... Or what ``prepare`` made of it: nothing is then copied to the device.
        noise: called with the number of the call of the model for noise of x's shape; None: ``torch.randn_like``.
        guidance_scale: g in ``uncond + g * (cond - uncond)``: one, or one for each call (``guidance.interval``). Left out for what was prepared, which
            has its own.
        numerics: ``"close"``, or ``"exact"`` to round as a chain of PyTorch calls would.
        callback: called as ``callback(call, x)`` after each call's step.

    Returns: [B, ...]
    Raises: ValueError where ``guidance_scale`` comes twice.
    """
    if isinstance(plan, Prepared):
        _check_guidance(guidance_scale)
    else:
        plan = prepare(plan, x.device, guidance_scale)
    keeps = any(plan.second) or bool(plan.past)
    draw = noise or (lambda i: torch.randn_like(x))
    start, x0, slope, slopes = x, None, None, []
    for i in range(len(plan.times)):
        if plan.churn[i]:
            x = x + plan.churn[i] * draw(i).to(x.dtype)
        if not plan.second[i]:
            start = x
        output = model(x if plan.scales[i] == 1 else x * plan.scales[i], plan.times[i])
        if plan.past:
            extra = sum(weight * past for weight, past in zip(plan.past[i], slopes, strict=True)) if plan.past[i] else None
        else:
            extra = draw(i) if plan.noisy[i] else None
        previous = (slope if plan.second[i] else x0) if plan.looks_back[i] else None
        x, x0, slope = ops.solver_step(x, output, plan.table, i, previous=previous, base=start if plan.second[i] else None, noise=extra, keep_slope=keeps,
                                       numerics=numerics)
        if plan.past:
            slopes = [slope, *slopes][:max(map(len, plan.past))]
        if callback is not None:
            callback(i, x)
    return x


def _check_guidance(guidance_scale) -> None:
    if guidance_scale != 1.0:
        raise ValueError(f"guidance_scale is {guidance_scale}; what was prepared has its own")
