"""Noise schedules in float64, made once, and what a model may predict: x0, eps, v or the velocity of a flow.

A picture on its way is ``z = alpha * x0 + sigma * eps``. Variance-preserving schedules have ``alpha^2 + sigma^2 = 1``, a flow has
``alpha + sigma = 1``; samplers that follow Karras et al. (2022) scale z so that alpha is 1 and call ``sigma / alpha`` sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

PREDICTIONS = ("x0", "eps", "v", "velocity")
SPACINGS = ("leading", "linspace", "trailing")
TRAIN_STEPS = 1000


def linear_betas(steps: int = TRAIN_STEPS, start: float = 1e-4, end: float = 0.02) -> torch.Tensor:
    """[steps] of DDPM: Ho et al. (2020), "Denoising Diffusion Probabilistic Models", section 4."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int = TRAIN_STEPS, start: float = 0.00085, end: float = 0.012) -> torch.Tensor:
    """[steps], whose roots are linear, of latent diffusion (Rombach et al., 2022), whose code calls them "linear". Defaults: Stable Diffusion's."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int = TRAIN_STEPS, largest: float = 0.999) -> torch.Tensor:
    """[steps]: Nichol and Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", equation 17."""
    bar = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=largest)


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """The betas [T] rescaled so that the last step is pure noise: Lin et al. (2023), "Common Diffusion Noise Schedules and Sample Steps are Flawed"."""
    roots = alphas_cumprod(betas).sqrt()
    bar = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return 1 - torch.cat([bar[:1], bar[1:] / bar[:-1]])


def alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """[T] float64, the squares of alpha: products of ``1 - beta``."""
    return torch.cumprod(1 - betas.to(torch.float64), 0)


def sigmas_of(bar: torch.Tensor) -> torch.Tensor:
    """sigma / alpha for the squares of alpha."""
    return ((1 - bar) / bar).sqrt()


def timesteps(steps: int, spacing: str = "leading", offset: int = 0, train_steps: int = TRAIN_STEPS, whole: bool = True) -> torch.Tensor:
    """[steps] float64, descending: where a sampler of a discrete schedule evaluates the model. Lin et al. (2023), table 2.

    ``offset`` is added for "leading" alone. ``whole=False`` leaves the fractions that "linspace" has.
    """
    if steps != int(steps) or not 1 <= steps <= train_steps:
        raise ValueError(f"steps is {steps}; it should be a whole number from 1 to {train_steps}")
    if spacing == "leading":
        return (torch.arange(steps, dtype=torch.float64) * (train_steps // steps)).flip(0) + offset
    if spacing == "linspace":
        times = linspace(0, train_steps - 1, steps).flip(0)
        return times.round() if whole else times
    if spacing == "trailing":
        return (train_steps - torch.arange(steps, dtype=torch.float64) * (train_steps / steps)).round() - 1
    raise ValueError(f"spacing is {spacing!r}; it should be one of {', '.join(map(repr, SPACINGS))}")


def sigmas_at(times: torch.Tensor, bar: torch.Tensor) -> torch.Tensor:
    """[S + 1]: sigma / alpha at the (fractional) times [S], by linear interpolation in sigma / alpha, and 0."""
    table, below = sigmas_of(bar), times.floor().long().clamp(0, len(bar) - 1)
    above, part = (below + 1).clamp(max=len(bar) - 1), times - below
    return _ending_in_zero(table[below] + part * (table[above] - table[below]))


def karras_sigmas(steps: int, smallest: float, largest: float, rho: float = 7.0) -> torch.Tensor:
    """[steps + 1]: Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5."""
    _check_steps(steps)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    return _ending_in_zero((high + linspace(0, 1, steps) * (low - high)) ** rho)


def exponential_sigmas(steps: int, smallest: float, largest: float) -> torch.Tensor:
    """[steps + 1]: evenly spaced logarithms."""
    _check_steps(steps)
    return _ending_in_zero(linspace(math.log(largest), math.log(smallest), steps).exp())


def shifted(sigma, shift: float):
    """``s * sigma / (1 + (s - 1) * sigma)``: the resolution-dependent shift of noise levels, Esser et al. (2024), equation 23."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_shift(tokens: int, fewest: int = 256, most: int = 4096, low: float = 0.5, high: float = 1.15) -> float:
    """e^mu, mu linear in the number of image tokens: the dynamic shift of FLUX.1, whose defaults these are. To be used in ``shifted``."""
    slope = (high - low) / (most - fewest)
    return math.exp(tokens * slope + (low - slope * fewest))


def flow_sigmas(steps: int, shift: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise levels of diffusers' ``FlowMatchEulerDiscreteScheduler(shift=shift).set_timesteps(steps)`` and of the official SD3.5 code: [steps + 1].

    From 1 down to 0. Both shift the smallest level twice: once where the table of 1000 levels is made, and again with all the others. In float32
    the values are diffusers' bit for bit; float64 leaves out its intermediate float32 rounding.
    """
    _check_steps(steps)
    smallest = torch.tensor(1 / TRAIN_STEPS, dtype=dtype)
    largest = torch.ones((), dtype=dtype)
    ends = [shifted(end, shift).item() * TRAIN_STEPS for end in (largest, smallest)]
    return _ending_in_zero(shifted(linspace(*ends, steps) / TRAIN_STEPS, shift).to(dtype))


def flow_sigmas_shifted_once(steps: int, shift: float = 3.0, dtype: torch.dtype = torch.float32, smallest: float = 1 / TRAIN_STEPS) -> torch.Tensor:
    """As ``flow_sigmas``, with every level shifted once, as the formula says: [steps + 1]. FLUX.1 begins at ``smallest = 1 / steps``."""
    _check_steps(steps)
    return _ending_in_zero(shifted(linspace(1.0, smallest, steps), shift).to(dtype))


def linspace(start: float, stop: float, steps: int) -> torch.Tensor:
    """NumPy's linspace in float64, which rounds ``start + i * step`` where torch interpolates from both ends."""
    if steps == 1:
        return torch.tensor([start], dtype=torch.float64)
    levels = torch.arange(steps, dtype=torch.float64) * ((stop - start) / (steps - 1)) + start
    levels[-1] = stop
    return levels


def x0_and_eps(prediction: torch.Tensor, z: torch.Tensor, kind: str, alpha, sigma) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0, eps) of ``z = alpha * x0 + sigma * eps`` from what the model predicted.

    ``kind``: "x0"; "eps"; "v", which is ``alpha * eps - sigma * x0`` (Salimans and Ho, 2022); "velocity", which is ``eps - x0`` (Liu et al., 2022).
    A division by an alpha or a sigma of zero gives what it gives: at zero SNR only v, velocity and x0 can be used.
    """
    if kind == "x0":
        return prediction, (z - alpha * prediction) / sigma
    if kind == "eps":
        return (z - sigma * prediction) / alpha, prediction
    if kind == "v":
        square = alpha * alpha + sigma * sigma
        return (alpha * z - sigma * prediction) / square, (sigma * z + alpha * prediction) / square
    if kind == "velocity":
        return (z - sigma * prediction) / (alpha + sigma), (z + alpha * prediction) / (alpha + sigma)
    raise ValueError(f"kind is {kind!r}; it should be one of {', '.join(map(repr, PREDICTIONS))}")


def converted(prediction: torch.Tensor, z: torch.Tensor, kind: str, to: str, alpha, sigma) -> torch.Tensor:
    """The prediction of ``kind`` as one of the kind ``to``."""
    x0, eps = x0_and_eps(prediction, z, kind, alpha, sigma)
    if to not in PREDICTIONS:
        raise ValueError(f"to is {to!r}; it should be one of {', '.join(map(repr, PREDICTIONS))}")
    return {"x0": lambda: x0, "eps": lambda: eps, "v": lambda: alpha * eps - sigma * x0, "velocity": lambda: eps - x0}[to]()


def _ending_in_zero(levels: torch.Tensor | Sequence[float]) -> torch.Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; it should be at least 1")
