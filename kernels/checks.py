"""Checks that the public ops make before any launch. Each error names the argument, what it is, and what it should be."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it should be a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it should be float32, bfloat16, float16 or float64")


def rank(name: str, tensor: torch.Tensor, dims: int, meaning: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it should be {meaning}")


def same_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it should be on {device}, where x is")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it should be greater than 0")


def modulation(name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """``tensor`` modulates ``x`` [B, T, C]: [B, C], [B, 1, C] or [B, T, C] on the same device."""
    floating(name, tensor)
    batch, tokens, channels = x.shape
    shape = tensor.shape
    if not (shape[-1:] == (channels,) and (shape[:-1] == (batch,) or shape[:-1] == (batch, 1) or shape[:-1] == (batch, tokens))):
        raise ValueError(f"{name} has shape {list(shape)}; for x of shape {list(x.shape)} it should be "
                         f"[{batch}, {channels}], [{batch}, 1, {channels}] or [{batch}, {tokens}, {channels}]")
    same_device(name, tensor, x.device)


def vector(name: str, tensor: torch.Tensor | None, channels: int, device: torch.device) -> None:
    """``tensor`` is None or a vector of ``channels`` elements."""
    if tensor is None:
        return
    floating(name, tensor)
    if tensor.shape != (channels,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it should be [{channels}]")
    same_device(name, tensor, device)
