"""Forms of modulation that are others, seen otherwise: one row per frame of a video, no shift, a gate through tanh (Z-Image).

They are made of views and of vectors as small as a modulation, so that every backend and every gradient serves them.
"""

from __future__ import annotations

import torch


def no_shift(scale: torch.Tensor) -> torch.Tensor:
    """A shift of zeros that takes no memory, and that changes neither a value nor the result's dtype."""
    return scale.new_zeros(()).expand(scale.shape)


def through_tanh(gate: torch.Tensor, exact: bool) -> torch.Tensor:
    """PyTorch's tanh: for ``exact`` on the tensor as it lies, as stock calls it; its last bits can depend on the strides, so not for ``close``."""
    return torch.tanh(gate if exact else gate.contiguous())


def by_frames(frames: int, shape: torch.Size, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Tokens and modulations of x of ``shape`` [B, T, C] as those of B * F samples of T / F tokens, which frames are to an op; None stays None.

    Tokens are copied where one sample does not begin where the frames of the one before it end (a slice of a batch of longer sequences).
    """
    batch, length, channels = shape

    def folded(tensor):
        if tensor is None:
            return None
        if tensor.shape == shape:
            return tensor.unflatten(1, (frames, length // frames)).flatten(0, 1)
        per_frame = tensor.unsqueeze(1) if tensor.dim() == 2 else tensor
        return per_frame.expand(batch, frames, channels).flatten(0, 1)

    return [folded(tensor) for tensor in tensors]
