"""Guidance: towards the prompt, a classifier's class, or by a scale that the model was trained to take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def classifier_free(uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float, rescale: float = 0.0) -> torch.Tensor:
    """``uncond + g * (cond - uncond)``: Ho and Salimans (2022), "Classifier-Free Diffusion Guidance"; g is 1 + their w.

    Without ``rescale`` ``ops.solver_step`` and ``ops.sampler_step`` do this as part of their pass. ``rescale`` is phi of Lin et al. (2023), "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", equations 14 to 16: each picture's standard deviation goes that far back to that of ``cond``.
    """
    guided = uncond + guidance_scale * (cond - uncond)
    if not rescale:
        return guided
    dims = tuple(range(1, cond.dim()))
    factor = cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return rescale * (guided * factor) + (1 - rescale) * guided


def interval(levels: Sequence[float] | torch.Tensor, guidance_scale: float, low: float, high: float) -> list[float]:
    """The scale of each step: g where ``low < level <= high``, otherwise 1. Kynkäänniemi et al. (2024), "Applying Guidance in a Limited Interval"."""
    return [guidance_scale if low < float(level) <= high else 1.0 for level in levels]


def towards_class(eps: torch.Tensor, gradient: torch.Tensor, sigma: torch.Tensor | float, scale: float = 1.0) -> torch.Tensor:
    """eps for ``gradient`` = grad log p(y | x): algorithm 2 of Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis".

    ``sigma`` is ``sqrt(1 - abar)``. CLIP guidance is the same with the gradient of the similarity of picture and text (``gradient_of``).
    """
    return _plus(eps, sigma, gradient, -scale)


def mean_towards_class(mean: torch.Tensor, variance: torch.Tensor | float, gradient: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The posterior's mean: algorithm 1 of Dhariwal and Nichol (2021)."""
    return _plus(mean, variance, gradient, scale)


def gradient_of(score: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """The gradient of ``score(z)`` [B] by the latents z [B, ...], also inside ``torch.no_grad()``: what ``towards_class`` takes.

    For CLIP guidance, Nichol et al. (2021), "GLIDE", equation 8, score is the cosine of CLIP's embeddings of the picture, decoded from the x0 that z
    stands for, and of the text, times CLIP's scale; for classifier guidance it is the class's log probability.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode() records no gradients; call gradient_of under torch.no_grad(), or under torch.inference_mode(False)")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(score(z).sum(), z)[0]


def _plus(x: torch.Tensor, factor: torch.Tensor | float, gradient: torch.Tensor, scale: float) -> torch.Tensor:
    """``x + scale * factor * gradient`` in one pass."""
    if isinstance(factor, torch.Tensor):
        if factor.dim() == 1:  # one for each sample
            factor = factor.reshape(-1, *[1] * (x.dim() - 1))
        return torch.addcmul(x, factor.to(x.device), gradient, value=scale)
    return torch.add(x, gradient, alpha=factor * scale)


def scale_embedding(guidance_scale: torch.Tensor, dim: int) -> torch.Tensor:
    """[B, dim] sinusoids of ``1000 * (g - 1)`` [B], sines first: what a distilled model takes in the place of guidance.

    Meng et al. (2022), "On Distillation of Guided Diffusion Models"; Luo et al. (2023), "Latent Consistency Models".
    """
    if dim < 4:
        raise ValueError(f"dim is {dim}; it should be at least 4")
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=guidance_scale.dtype, device=guidance_scale.device) * (-math.log(10000.0) / (half - 1)))
    angles = (guidance_scale - 1)[:, None] * 1000.0 * rates
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, dim % 2))
