"""The scalars of each step of a schedule, computed once: float64 tables [S, K] whose rows the sampler step reads on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

COLUMNS = {"flow_euler": ("dt", "guidance")}


def flow_euler_table(sigmas: torch.Tensor, guidance_scale: float | Sequence[float] = 1.0) -> torch.Tensor:
    """The table of flow-matching Euler: row i holds ``sigmas[i + 1] - sigmas[i]`` and the guidance scale of step i.

    Args:
        sigmas: [S + 1], the noise levels with the final 0, as a scheduler holds them. Differences are taken in their own dtype, as schedulers do.
        guidance_scale: one number for all steps, or S of them (guidance in an interval: 1 outside it).

    Returns: [S, 2] float64 on sigmas' device.
    Raises: ValueError for sigmas of another rank, or fewer than two, or a number of guidance scales that is not S.
    """
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas has shape {list(sigmas.shape)}; it should be [S + 1] with S of at least 1")
    steps = len(sigmas) - 1
    scales = torch.as_tensor(guidance_scale, dtype=torch.float64, device=sigmas.device)
    if scales.shape not in ((), (steps,)):
        raise ValueError(f"guidance_scale has shape {list(scales.shape)}; it should be a number or {steps} numbers")
    return torch.stack(((sigmas[1:] - sigmas[:-1]).to(torch.float64), scales.expand(steps)), dim=1)
