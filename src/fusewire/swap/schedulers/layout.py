"""Where the results of a step lie in memory: in ``exact`` where stock's sums lie, as a model rounds channels-last latents otherwise than contiguous ones.

An autoencoder may give img2img and inpainting channels-last latents, a U-Net may predict such; the kernels' results are contiguous.
"""

from __future__ import annotations

import functools

import torch


def laid(result: torch.Tensor, operands: tuple[torch.Tensor, ...], numerics: str) -> torch.Tensor:
    """``result`` laid out as a sum of ``operands`` in this order, which is stock's: PyTorch goes by the first that tells two dimensions apart."""
    if numerics != "exact" or all(operand.is_contiguous() for operand in operands):
        return result
    # The sum of tensors without values has PyTorch's own answer; each times a 0-dim one, as stock's coefficients are such.
    scale = torch.empty((), device="meta")
    shadows = (scale * torch.empty_strided(operand.shape, operand.stride(), device="meta") for operand in operands)
    strides = functools.reduce(torch.add, shadows).stride()
    return result if result.stride() == strides else torch.empty_strided(result.shape, strides, dtype=result.dtype, device=result.device).copy_(result)
