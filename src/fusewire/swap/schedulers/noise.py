"""``add_noise`` of the swapped schedulers, which inpainting calls after every step: stock's operations, with nothing asked of the device or copied there.

Pipelines give one timestep in a tensor on the CPU; stock moves it, and the noise levels, to the latents' device each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fusewire.swap.fused import fingerprint
from fusewire.swap.schedulers.common import host_times, kept, stamp


def of_alphas(stock: type) -> dict:
    """For DDIM, DDPM and LCM: stock's own function, told the timestep by a tensor that is on the device already."""

    @functools.wraps(stock.add_noise)
    def add_noise(self, original_samples, noise, timesteps):
        before = self.alphas_cumprod
        noisy = stock.add_noise(self, original_samples, noise, _on_device(self, timesteps, original_samples.device))
        if self.alphas_cumprod is not before and before.is_cpu:  # stock has moved them; the next step's scalars are computed on the host
            self._fusewire_host = (self.alphas_cumprod, stamp(self.alphas_cumprod), before)
        return noisy

    return {"add_noise": add_noise}


def _on_device(scheduler, timesteps, device: torch.device):
    if not isinstance(timesteps, torch.Tensor) or timesteps.dtype is not torch.int64 or timesteps.shape != (1,) or not timesteps.is_cpu or device.type == "cpu":
        return timesteps
    numbers = scheduler.__dict__.setdefault("_fusewire_numbers", {})
    if device not in numbers:
        with kept():
            numbers[device] = torch.arange(len(scheduler.alphas_cumprod), device=device)
    value = int(timesteps)
    return numbers[device][value:value + 1] if 0 <= value < len(numbers[device]) else timesteps


def of_sigmas(stock: type, name: str, verified: tuple[str, ...], noisy: Callable) -> dict:
    """For schedulers with noise levels: ``noisy(scheduler, sample, noise, sigma)`` is what stock computes. Empty where stock's source is another one."""
    function = getattr(stock, name)
    if fingerprint(function) not in verified:
        return {}

    def fused(self, sample, noise, timesteps):
        index = _index(self, timesteps) if isinstance(sample, torch.Tensor) and sample.dim() and isinstance(noise, torch.Tensor) else None
        if index is None or not 0 <= index < len(self.sigmas):
            return None
        return noisy(self, sample, noise, _levels(self, sample)[index:index + 1].view((1,) * sample.dim()))

    @functools.wraps(function)
    def add_noise(self, original_samples, noise, timesteps):
        found = fused(self, original_samples, noise, timesteps)
        return function(self, original_samples, noise, timesteps) if found is None else found

    @functools.wraps(function)
    def scale_noise(self, sample, timestep, noise=None):
        found = fused(self, sample, noise, timestep)
        return function(self, sample, timestep, noise) if found is None else found

    return {name: add_noise if name == "add_noise" else scale_noise}


def _index(scheduler, timesteps) -> int | None:
    """Which level stock takes; None where it alone can tell."""
    if not isinstance(timesteps, torch.Tensor) or timesteps.shape != (1,):
        return None
    if scheduler._begin_index is not None:
        return scheduler._begin_index if scheduler._step_index is None else scheduler._step_index
    return scheduler.index_for_timestep(timesteps[0], host_times(scheduler)) if timesteps.is_cpu else None


def _levels(scheduler, sample: torch.Tensor) -> torch.Tensor:
    """The noise levels in the sample's dtype, on its device."""
    levels, sigmas, key = scheduler.__dict__.setdefault("_fusewire_levels", {}), scheduler.sigmas, (sample.dtype, sample.device)
    known = levels.get(key)
    if known is None or known[0] is not sigmas or known[1] != stamp(sigmas):
        with kept():
            known = levels[key] = (sigmas, stamp(sigmas), sigmas.to(device=sample.device, dtype=sample.dtype))
    return known[2]
