"""Pictures as tokens, one for each patch, and back; the table of their positions."""

from __future__ import annotations

import torch
from torch import nn


def sincos_table(channels: int, rows: int, columns: int, base: int, scale: float = 1.0, device: torch.device | None = None) -> torch.Tensor:
    """2D sinusoidal position table [1, rows * columns, channels], float32, in raster order.

    The first half of the channels encodes the column, the second the row; in each half sines come first. Positions are scaled so that
    ``base`` steps span the grid (``base``: patches along the side of the training resolution), and divided by ``scale``.
    Source: Vaswani et al. (2017) in two dimensions, as in MAE and DiT; computed in float64.
    """
    if channels % 4:
        raise ValueError(f"channels is {channels}; it should be a multiple of 4")
    omega = 1.0 / 10000.0 ** (torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels / 4.0))

    def wave(steps: int) -> torch.Tensor:
        position = torch.arange(steps, dtype=torch.float32, device=device) / (steps / base) / scale
        angle = position.to(torch.float64)[:, None] * omega  # [steps, channels / 4]
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    table = torch.cat([wave(columns)[None, :, :].expand(rows, columns, -1), wave(rows)[:, None, :].expand(rows, columns, -1)], dim=-1)
    return table.reshape(1, rows * columns, channels).float()


class Patches(nn.Module):
    """[B, C, H, W] -> [B, H/p * W/p, channels]: a strided convolution. The result lies in memory as the convolution's does."""

    pos_embed_max_size: int | None = None

    def __init__(self, patch_size: int, in_channels: int, channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"


class PatchEmbed(Patches):
    """[B, C, H, W] -> [B, H/p * W/p, channels]: patches plus positions, lying in memory as the patches do.

    Positions are the centre crop of a stored table of ``table_size``; without one, a table for the size at hand (kept for ``base_size``).
    """

    def __init__(self, patch_size: int, in_channels: int, channels: int, table_size: int | None, base_size: int, scale: float = 1.0):
        super().__init__(patch_size, in_channels, channels)
        self.pos_embed_max_size, self.base_size, self.scale = table_size, base_size, scale
        side = table_size or base_size
        self.register_buffer("pos_embed", sincos_table(channels, side, side, base_size, scale), persistent=table_size is not None)

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """[1, rows * columns, channels]"""
        size = self.pos_embed_max_size
        if size is not None:
            top, left = (size - rows) // 2, (size - columns) // 2
            return self.pos_embed.view(1, size, size, -1)[:, top:top + rows, left:left + columns].reshape(1, rows * columns, -1)
        if rows == columns == self.base_size:
            return self.pos_embed
        return sincos_table(self.pos_embed.shape[-1], rows, columns, self.base_size, self.scale, self.pos_embed.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        x = super().forward(x)
        return (x + self.positions(rows, columns)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pos_embed_max_size={self.pos_embed_max_size}"


def patchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """b c (h p) (w q) -> b (h w) (c p q)"""
    x = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size)).permute(0, 2, 4, 1, 3, 5)
    return x.flatten(3).flatten(1, 2)


def unpatchify(x: torch.Tensor, rows: int, columns: int, patch_size: int) -> torch.Tensor:
    """b (h w) (p q c) -> b c (h p) (w q)"""
    x = x.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x.shape[0], -1, rows * patch_size, columns * patch_size)
