"""Solvers: each is a plan, a table of scalars made once in float64, that ``samplers.sample`` follows from noise to a picture.

A plan's function names its algorithm in one line. Levels are sigma, from high to low; those of a latent diffusion model are
``schedules.sigmas_at(...)``, of a flow ``schedules.flow_sigmas(...)``. Predictions are named as in ``schedules``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusewire import ops


class Plan(NamedTuple):
    """``K`` calls of the model, each with the step that follows it."""

    table: torch.Tensor  # [K, 19], of ops.solver_step
    times: torch.Tensor  # [K] what the model is told: sigma, or a timestep of training
    scales: torch.Tensor  # [K] what its input is multiplied by
    churn: torch.Tensor  # [K] how much noise is put on x before the call
    second: tuple[bool, ...]  # the call is the second of its step: it starts from where the first did
    past: tuple[tuple[float, ...], ...] = ()  # what slopes of earlier steps count for, the last one first (LMS)


def _plan(times, columns: dict, *, scales=None, churn=None, second=None, past=()) -> Plan:
    times = torch.as_tensor(times, dtype=torch.float64)
    steps = max(len(value) for value in columns.values() if isinstance(value, (torch.Tensor, list)) and torch.as_tensor(value).dim())
    if times.shape != (steps,):
        raise ValueError(f"times has shape {list(times.shape)}; for {steps} calls of the model it should be [{steps}]")
    ones = torch.ones_like(times)
    return Plan(ops.solver_table(len(times), **columns), times, ones if scales is None else scales, ones * 0 if churn is None else churn,
                tuple(second or [False] * len(times)), tuple(past))


def _x0(kind: str, alpha: torch.Tensor, sigma: torch.Tensor, limit: float | None = None) -> dict:
    """The columns of x0 from a prediction on ``alpha * x0 + sigma * eps``."""
    columns = {"x0_limit": limit or 0.0}
    if kind == "x0":
        return columns | {"x0_m": 1.0}
    if kind == "eps":
        return columns | {"x0_x": 1.0, "x0_m": -sigma, "x0_divisor": alpha}
    if kind == "v":
        return columns | {"x0_x": alpha, "x0_m": -sigma}
    if kind == "velocity":
        return columns | {"x0_x": 1.0, "x0_m": -sigma, "x0_divisor": alpha + sigma}
    raise ValueError(f"kind is {kind!r}; it should be one of 'x0', 'eps', 'v', 'velocity'")


def _denoised(kind: str, sigma: torch.Tensor) -> dict:
    """The same where x is scaled so that its alpha is 1 (Karras et al., 2022); a flow's velocity is then its slope as it is."""
    if kind == "v":
        return {"x0_x": 1.0, "x_divisor": sigma**2 + 1, "x0_m": -sigma / (sigma**2 + 1).sqrt()}
    return _x0("eps" if kind == "velocity" else kind, torch.ones_like(sigma), sigma)


def _slope(kind: str, sigma: torch.Tensor) -> dict:
    """dx/dsigma = (x - x0) / sigma; a model of eps or of a velocity gives it as it is, also at sigma 0."""
    return {"e_m": 1.0} if kind in ("eps", "velocity") else {"e_x": 1.0, "e_x0": -1.0, "e_divisor": sigma}


def _scaled(kind: str, sigma: torch.Tensor) -> torch.Tensor:
    """eps and v models see x with unit variance."""
    return 1 / (sigma**2 + 1).sqrt() if kind in ("eps", "v") else torch.ones_like(sigma)


def ddim(bar: torch.Tensor, times: Sequence[int], kind: str = "eps", *, eta: float = 0.0, limit: float | None = None, final: float = 1.0) -> Plan:
    """Denoising Diffusion Implicit Models, equation 12: Song et al. (2020).

    Args:
        bar: [T] ``schedules.alphas_cumprod``.
        times: [S] timesteps, descending: ``schedules.timesteps``.
        kind: what the model predicts.
        eta: 0 draws no noise, 1 is DDPM's.
        limit: clamps x0; eps then follows from it.
        final: the square of alpha after the last step.
    """
    times, now, after, alpha, sigma = _of_discrete(bar, times, final)
    spread = eta * ((1 - after) / (1 - now) * (1 - now / after)).sqrt()
    slope = {"e_m": 1.0} if kind == "eps" and not limit else {"e_x": 1.0, "e_x0": -alpha, "e_divisor": sigma}
    return _plan(times, _x0(kind, alpha, sigma, limit) | slope | {"x0": after.sqrt(), "e": (1 - after - spread**2).clamp(min=0).sqrt(), "noise": spread})


def ddpm(bar: torch.Tensor, times: Sequence[int], kind: str = "eps", *, limit: float | None = None, large: bool = False) -> Plan:
    """Denoising Diffusion Probabilistic Models, algorithm 2 with the posterior of equation 7: Ho et al. (2020). ``large``: variance beta."""
    times, now, after, alpha, sigma = _of_discrete(bar, times, 1.0)
    beta = 1 - now / after
    variance = beta if large else (1 - after) / (1 - now) * beta
    noise = torch.where(times > 0, variance.sqrt(), 0.0)
    return _plan(times, _x0(kind, alpha, sigma, limit)
                 | {"x0": after.sqrt() * beta / (1 - now), "x": (now / after).sqrt() * (1 - after) / (1 - now), "noise": noise})


def lcm(bar: torch.Tensor, times: Sequence[int], kind: str = "eps", *, scaling: float = 10.0, final: float = 1.0) -> Plan:
    """Multistep consistency sampling, algorithm 3 of Latent Consistency Models: Luo et al. (2023)."""
    times, now, after, alpha, sigma = _of_discrete(bar, times, final)
    scaled, data = times * scaling, 0.5
    last = torch.arange(len(times)) == len(times) - 1
    skip = {"e_x": data**2 / (scaled**2 + data**2), "e_x0": scaled / (scaled**2 + data**2).sqrt()}
    return _plan(times, _x0(kind, alpha, sigma) | skip
                 | {"e": torch.where(last, 1.0, after.sqrt()), "noise": torch.where(last, 0.0, (1 - after).sqrt())})


def _of_discrete(bar: torch.Tensor, times: Sequence[int], final: float) -> tuple[torch.Tensor, ...]:
    """(times, alpha^2 at them, alpha^2 after them, alpha, sigma)."""
    times = torch.as_tensor(times).to(torch.float64)
    if not len(times) or times.min() < 0 or times.max() >= len(bar):
        raise ValueError(f"times is {times.tolist()}; it should be timesteps from 0 to {len(bar) - 1}")
    now = bar.to(torch.float64)[times.long()]
    return times, now, torch.cat([now[1:], now.new_tensor([final])]), now.sqrt(), (1 - now).sqrt()


def euler(sigmas: torch.Tensor, kind: str = "x0", *, times: torch.Tensor | None = None, churn: float = 0.0, churn_from: float = 0.0,
          churn_to: float = float("inf"), churn_noise: float = 1.0) -> Plan:
    """Algorithm 2 without its correction, of Karras et al. (2022); without ``churn`` their algorithm 1. Of a flow (Liu et al., 2022) with kind "velocity".

    Args:
        sigmas: [S + 1], the last one 0.
        kind: "x0" for a denoiser; "eps", "v": x is scaled to unit variance for the model.
        times: [S] what the model is told; None: sigma.
        churn, churn_from, churn_to, churn_noise: S_churn, between the levels S_tmin and S_tmax, and S_noise.
    """
    level, after = _levels(sigmas)
    hat, added = _churned(kind, level, times, churn, churn_from, churn_to, churn_noise)
    return _plan(hat if times is None else times, _denoised(kind, hat) | _slope(kind, hat) | {"x": 1.0, "e": after - hat}, scales=_scaled(kind, hat),
                 churn=added)


def euler_ancestral(sigmas: torch.Tensor, kind: str = "x0", *, eta: float = 1.0, times: torch.Tensor | None = None) -> Plan:
    """Euler steps to a lower level and noise back up: Crowson (2022), k-diffusion's ``sample_euler_ancestral``."""
    level, after = _levels(sigmas)
    _draws(kind, eta, "eta")
    up = torch.minimum(after, eta * (after**2 * (level**2 - after**2) / level**2).sqrt())
    down = (after**2 - up**2).sqrt()
    return _plan(level if times is None else times, _denoised(kind, level) | _slope(kind, level) | {"x": 1.0, "e": down - level, "noise": up},
                 scales=_scaled(kind, level))


def heun(sigmas: torch.Tensor, kind: str = "x0", *, times: torch.Tensor | None = None, churn: float = 0.0, churn_from: float = 0.0,
         churn_to: float = float("inf"), churn_noise: float = 1.0, correct_last: bool = False) -> Plan:
    """Algorithm 2 of Karras et al. (2022): Heun's method with ``churn`` as ``euler`` has it; of a flow with kind "velocity".

    ``correct_last``: a step to level 0 is corrected too, as in SiT (Ma et al., 2024): for models of eps or of a velocity, whose slope is known there;
    ``times``, if given, is then [S + 1].
    """
    level, after = _levels(sigmas)
    steps = len(level)
    if correct_last and kind not in ("eps", "velocity"):
        raise ValueError(f"kind is {kind!r}; with correct_last it should be 'eps' or 'velocity', as others have no slope at sigma 0")
    if times is not None and len(times) != steps + correct_last:
        raise ValueError(f"times has {len(times)} values; it should have {steps + correct_last}")
    hat, added = _churned(kind, level, times, churn, churn_from, churn_to, churn_noise)
    told = hat if times is None else torch.as_tensor(times, dtype=torch.float64)
    again = torch.tensor([i for i in range(steps) if after[i] > 0 or correct_last], dtype=torch.long)
    order = torch.argsort(torch.cat([torch.arange(steps) * 2, again * 2 + 1]))

    def both(first, second):
        return torch.cat([first, second])[order]

    at, dt = both(hat, after[again]), both(after - hat, (after - hat)[again])
    is_second = both(torch.zeros(steps), torch.ones(len(again)))
    columns = _denoised(kind, at) | _slope(kind, at) | {"x": 1.0, "e": dt, "e_previous": is_second, "e_scale": 1 - 0.5 * is_second}
    return _plan(both(told[:steps], after[again] if times is None else told[again + 1]), columns, scales=_scaled(kind, at),
                 churn=both(added, torch.zeros(len(again), dtype=torch.float64)), second=is_second.bool().tolist())


def _churned(kind: str, level: torch.Tensor, times, churn: float, churn_from: float, churn_to: float, churn_noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels that noise takes x up to, and how much noise that is."""
    _draws(kind, churn, "churn")
    if times is not None and churn:
        raise ValueError("times is given; with churn the model is told the levels that it is given")
    more = ((churn_from <= level) & (level <= churn_to)).double() * min(churn / len(level), 2**0.5 - 1)
    hat = level * (1 + more)
    return hat, (hat**2 - level**2).sqrt() * churn_noise


def dpmpp_2m(sigmas: torch.Tensor, kind: str = "x0", *, alphas: torch.Tensor | None = None, times: torch.Tensor | None = None, order: int = 2,
             sde: float | None = None, heun: bool = False, lower_order_final: bool = True) -> Plan:
    """DPM-Solver++ 2M, algorithm 2 of Lu et al. (2022), and with ``sde`` (eta) its SDE: Lu et al. (2022), equation 18, Crowson (2023) for eta.

    ``alphas`` [S + 1] where x is ``alpha * x0 + sigma * eps``; None: alpha is 1. ``lower_order_final``: the last step has order 1, as it must to sigma 0.
    ``heun``: the other of the two forms of order 2.
    """
    level, after = _levels(sigmas)
    if order not in (1, 2):
        raise ValueError(f"order is {order}; it should be 1 or 2")
    if alphas is None:
        _draws(kind, sde or 0.0, "sde")
        alphas_of = torch.ones(len(level) + 1, dtype=torch.float64)
    else:
        alphas_of = torch.as_tensor(alphas, dtype=torch.float64)
        if len(alphas_of) != len(level) + 1:
            raise ValueError(f"alphas has {len(alphas_of)} values; it should have one for each of the {len(level) + 1} sigmas")
    alpha, alpha_after = alphas_of[:-1], alphas_of[1:]
    half = torch.log(alpha / level)
    h = torch.log(alpha_after / after) - half  # infinite in a step to 0, and from an alpha of 0
    decay = h if sde is None else h * (1 + sde)
    own = -alpha_after * torch.expm1(-decay)
    ratio = torch.cat([half.new_full((1,), float("nan")), half[1:] - half[:-1]]) / h
    second = torch.arange(len(level)) > 0 if order == 2 else torch.zeros(len(level), dtype=torch.bool)
    second &= after > 0
    if lower_order_final:
        second[-1] = False
    change = alpha_after * (torch.expm1(-decay) / decay + 1) if heun else 0.5 * own
    fades = torch.exp(-sde * h) if sde else 1.0
    columns = {"x0": own, "x": torch.where(after > 0, after / level * fades, 0.0), "e_x0": second.double(), "e_previous": -second.double(), "e_scale": torch.where(second, 1 / ratio, 1.0), "e": torch.where(second, change, 0.0)}
    if sde:
        columns["noise"] = after * (-torch.expm1(-2 * sde * h)).sqrt()
    scales = _scaled(kind, level) if alphas is None else None
    x0 = _denoised(kind, level) if alphas is None else _x0(kind, alpha, level)
    return _plan(level if times is None else times, x0 | columns, scales=scales)


def lms(sigmas: torch.Tensor, kind: str = "x0", *, order: int = 4, times: torch.Tensor | None = None) -> Plan:
    """Linear multistep (Adams-Bashforth) in sigma: Crowson (2022), k-diffusion's ``sample_lms``."""
    level, after = _levels(sigmas)
    if not 1 <= order <= 6:  # of which _integral is exact
        raise ValueError(f"order is {order}; it should be from 1 to 6")
    weights = []
    for i in range(len(level)):
        nodes = level[max(0, i - order + 1):i + 1].flip(0)  # the last one first
        weights.append([_integral(nodes, j, level[i], after[i]) for j in range(len(nodes))])
    return _plan(level if times is None else times, _denoised(kind, level) | _slope(kind, level) | {"x": 1.0, "e": [w[0] for w in weights], "noise": 1.0},
                 scales=_scaled(kind, level), past=[tuple(w[1:]) for w in weights])


def _integral(nodes: torch.Tensor, j: int, start: torch.Tensor, stop: torch.Tensor) -> float:
    """The integral of Lagrange's polynomial of node j, by Gauss and Legendre's three points: exact up to degree five."""
    points = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5], dtype=torch.float64)
    at = (start + stop) / 2 + (stop - start) / 2 * points
    value = torch.ones_like(at)
    for k, node in enumerate(nodes):
        if k != j:
            value = value * (at - node) / (nodes[j] - node)
    return ((stop - start) / 2 * (value * torch.tensor([5 / 9, 8 / 9, 5 / 9], dtype=torch.float64)).sum()).item()


def _levels(sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each step begins, and where it ends."""
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    if sigmas.dim() != 1 or len(sigmas) < 2 or not (sigmas[1:] < sigmas[:-1]).all() or sigmas[-1] < 0:
        raise ValueError(f"sigmas is {sigmas.tolist()}; it should be at least two levels, from high to low, none below 0")
    return sigmas[:-1], sigmas[1:]


def _draws(kind: str, amount: float, name: str) -> None:
    """Noise is put on x0 and eps whose weights are 1 and sigma: along a flow, where x0's falls, it would lead to another distribution."""
    if amount < 0:
        raise ValueError(f"{name} is {amount}; it should be at least 0")
    if amount and kind == "velocity":
        raise ValueError(f"{name} is {amount} and kind 'velocity'; a flow takes no noise here, but by dpmpp_2m(sde=..., alphas=1 - sigmas)")
