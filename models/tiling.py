"""A large picture through a network in overlapping tiles, so that memory does not grow with the picture."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusewire.kernels.rounding import compute_dtype


def tiled(x: torch.Tensor, way: Callable[[torch.Tensor], torch.Tensor], tile: int, result: int, overlap: float) -> torch.Tensor:
    """``way`` of tiles of ``tile`` x ``tile`` positions, which it makes ``result`` x ``result`` of; x [B, C, H, W] -> [B, C', H * r, W * r].

    Neighbours share the fraction ``overlap``, in which the one fades into the other: first from above, then from the left, as diffusers blends.
    """
    step, extent = int(tile * (1 - overlap)), int(result * overlap)
    kept = result - extent
    rows: list[list[torch.Tensor]] = []
    for top in range(0, x.shape[2], step):
        row: list[torch.Tensor] = []
        for left in range(0, x.shape[3], step):
            part = way(x[:, :, top:top + tile, left:left + tile])
            if rows:
                part = _faded(rows[-1][len(row)], part, extent, 2)
            if row:
                part = _faded(row[-1], part, extent, 3)
            row.append(part)
        rows.append(row)
    return torch.cat([torch.cat([part[:, :, :kept, :kept] for part in row], dim=3) for row in rows], dim=2)


def _faded(before: torch.Tensor, part: torch.Tensor, extent: int, dim: int) -> torch.Tensor:
    """``part`` whose first ``extent`` positions along ``dim`` fade in over the last ones of ``before``; each product and the sum rounded."""
    extent = min(before.shape[dim], part.shape[dim], extent)
    wide = compute_dtype(part.dtype)
    weight = (torch.arange(extent, dtype=torch.float64, device=part.device) / extent)
    shape = [-1 if index == dim else 1 for index in range(4)]
    new, old = weight.to(wide).view(shape), (1 - weight).to(wide).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    begin, rest = part.split([extent, part.shape[dim] - extent], dim)
    return torch.cat([(end.to(wide) * old).to(part.dtype) + (begin.to(wide) * new).to(part.dtype), rest], dim)
