"""Checks that the public ops make before any launch. Each error names the argument, what it is, and what it should be.

They run at every call, and a call may cost 5 us beside its kernel: a good input passes a few comparisons of values that are fetched once
(``x.shape`` costs 70 ns, as much again to compare it; ``x.device`` 40 and 15; ``x.is_cpu`` and ``x.dtype`` 30; ``x.device.type`` 500); only
another goes on, to find out what is wrong.
"""

from __future__ import annotations

import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Tensor = torch.Tensor


def floating(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it should be a torch.Tensor")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it should be float32, bfloat16, float16 or float64")


def kind_of(x: torch.Tensor) -> str:
    """``x.device.type``, in a fifth of its time where that is "cpu" or "cuda"."""
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


def autocasts(kind: str) -> bool:
    """Whether autocast is on for this type of device; never for "meta", of which PyTorch refuses to tell."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def rank(name: str, tensor: torch.Tensor, dims: int, meaning: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it should be {meaning}")


def same_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it should be on {device}, where x is")


def number(name: str, value: float) -> None:
    try:
        finite = math.isfinite(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it should be a number") from None
    if not finite:
        raise ValueError(f"{name} is {value}; it should be a finite number")


def positive(name: str, value: float) -> None:
    if type(value) is float and value > 0:
        return
    try:
        above = value > 0
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it should be a number greater than 0") from None
    if not above:
        raise ValueError(f"{name} is {value}; it should be greater than 0")


def alike(x: torch.Tensor, rows: tuple[torch.Tensor, ...], like: torch.Tensor | None = None) -> bool:
    """The common call in few comparisons: ``x`` and ``like`` [B, T, C], each of ``rows`` [B, C] or [B, 1, C], all of one floating dtype and on the CPU."""
    if not (isinstance(x, _Tensor) and x.is_cpu):
        return False
    dtype, shape = x.dtype, x.shape
    if len(shape) != 3 or dtype not in FLOATS:
        return False
    if like is not None and not (isinstance(like, _Tensor) and like.dtype is dtype and like.shape == shape and like.is_cpu):
        return False
    batch, _, channels = shape
    shapes = ((batch, channels), (batch, 1, channels))
    for row in rows:
        if not (isinstance(row, _Tensor) and row.dtype is dtype and row.shape in shapes and row.is_cpu):
            return False
    return True


def modulated(x: torch.Tensor, names: tuple[str, ...], modulations: tuple[torch.Tensor, ...], like_names: tuple[str, ...] = (),
              likes: tuple[torch.Tensor, ...] = ()) -> int:
    """``x`` is a floating [B, T, C]; each of ``modulations`` modulates it ([B, C], [B, 1, C], [B, T, C], or [B, F, C] for F frames of T / F tokens); each
    of ``likes`` has its shape. All are floating and on one device. Returns F, 1 where nothing is modulated by frames.
    """
    if isinstance(x, _Tensor) and x.dtype in FLOATS and x.dim() == 3:
        dtype, shape = x.dtype, x.shape
        device = None if x.is_cpu else x.device  # there is one CPU
        batch, length, channels = shape
        shapes = ((batch, channels), (batch, 1, channels), shape)
        for tensor in modulations:
            if not (isinstance(tensor, _Tensor) and (tensor.dtype is dtype or tensor.dtype in FLOATS) and tensor.shape in shapes
                    and (tensor.is_cpu if device is None else tensor.device == device)):
                break
        else:
            for tensor in likes:
                if not (isinstance(tensor, _Tensor) and (tensor.dtype is dtype or tensor.dtype in FLOATS) and tensor.shape == shape
                        and (tensor.is_cpu if device is None else tensor.device == device)):
                    break
            else:
                return 1
    return _explain(x, names, modulations, like_names, likes)


def _explain(x, names, modulations, like_names, likes) -> int:
    """Raise what is wrong with the arguments of ``modulated``, or return the number of frames."""
    floating("x", x)
    rank("x", x, 3, "[B, T, C]")
    batch, length, channels = x.shape
    for name, tensor in zip(like_names, likes):
        floating(name, tensor)
        if tensor.shape != x.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; it should be {list(x.shape)}, as x")
        same_device(name, tensor, x.device)
    frames = 1
    for name, tensor in zip(names, modulations):
        floating(name, tensor)
        if not any(_equal(tensor.shape, known) for known in ((batch, channels), (batch, 1, channels), x.shape)):
            of_frames = tensor.shape[1] if tensor.dim() == 3 and _equal(tensor.shape[::2], (batch, channels)) else 0
            if of_frames < 1 or length % of_frames:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; for x of shape {list(x.shape)} it should be [{batch}, {channels}], "
                                 f"[{batch}, 1, {channels}], [{batch}, {length}, {channels}], or [{batch}, F, {channels}] for a divisor F of {length}")
            if frames not in (1, of_frames):
                raise ValueError(f"{name} has shape {list(tensor.shape)}, for {of_frames} frames; it should be for {frames}, as another argument is")
            frames = of_frames
        same_device(name, tensor, x.device)
    return frames


def _equal(shape, known) -> bool:
    """Element by element: torch.compile does not find a shape with symbols in a tuple of shapes."""
    return len(shape) == len(known) and all(have == want for have, want in zip(shape, known))


def vector(name: str, tensor: torch.Tensor | None, channels: int, device: torch.device) -> None:
    """``tensor`` is None or a vector of ``channels`` elements."""
    if tensor is None:
        return
    floating(name, tensor)
    if tensor.shape != (channels,):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it should be [{channels}]")
    same_device(name, tensor, device)


def affine(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, dim: int = -1, rank_of_x: int = 0, meaning: str = "[..., C]") -> None:
    """``x`` is floating and has a dimension ``dim`` (and ``rank_of_x`` dimensions, unless 0); ``weight`` and ``bias`` are None or vectors over it."""
    if isinstance(x, _Tensor) and x.dtype in FLOATS:
        shape = x.shape
        if len(shape) == rank_of_x if rank_of_x else shape:
            size, device = (shape[dim],), x.device
            for tensor in (weight, bias):
                if tensor is not None and not (isinstance(tensor, _Tensor) and tensor.dtype in FLOATS and tensor.shape == size and tensor.device == device):
                    break
            else:
                return
    floating("x", x)
    if not x.dim() or (rank_of_x and x.dim() != rank_of_x):
        raise ValueError(f"x has shape {list(x.shape)}; it should be {meaning}")
    vector("weight", weight, x.shape[dim], x.device)
    vector("bias", bias, x.shape[dim], x.device)
