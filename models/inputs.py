"""What the models check of their inputs beside shapes: kind of dtype and device. Each error names the argument, what it is, and what it should be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusewire.kernels.checks import FLOATS
from fusewire.models.layers import untouched

_INTEGERS = (torch.int64, torch.int32)
_KINDS = {"floats": (FLOATS, "float32, bfloat16, float16 or float64"), "integers": (_INTEGERS, "int64 or int32"),
          "reals": (FLOATS + _INTEGERS, "floating, int64 or int32"), "masks": ((*FLOATS, *_INTEGERS, torch.bool), "bool, floating, int64 or int32")}


def check_inputs(entrance: nn.Module, floats: Mapping[str, torch.Tensor] = {}, integers: Mapping[str, torch.Tensor] = {},
                 reals: Mapping[str, torch.Tensor] = {}, masks: Mapping[str, torch.Tensor] = {}) -> None:
    """All are tensors of their kind, on one device: that of the weight of ``entrance``, the module that takes the first of them, unless
    a hook may move it.

    Raises: TypeError naming an argument that is no tensor or of another dtype; ValueError naming one on another device.
    """
    weight = entrance._parameters.get("weight")
    device, where = (weight.device, "the weights are") if weight is not None and untouched(entrance) else (None, "")
    for kind, tensors in (("floats", floats), ("integers", integers), ("reals", reals), ("masks", masks)):
        dtypes, wanted = _KINDS[kind]
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} is a {type(tensor).__name__}; it should be a torch.Tensor")
            if tensor.dtype not in dtypes:
                raise TypeError(f"{name} has dtype {tensor.dtype}; it should be {wanted}")
            if device is None:
                device, where = tensor.device, f"{name} is"
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}; it should be on {device}, where {where}")


def listed(name: str, tensors) -> dict[str, torch.Tensor]:
    """A list of tensors, or None, under the names of its elements."""
    return {f"{name}[{index}]": tensor for index, tensor in enumerate(() if tensors is None else tensors)}


def check_residuals(name: str, tensors, shape: tuple[int, ...]) -> None:
    """A list of tensors of this shape, at least one; or None."""
    if tensors is None:
        return
    if not len(tensors):
        raise ValueError(f"{name} is empty; it should be None or hold at least one residual")
    for index, tensor in enumerate(tensors):
        if tensor.shape != shape:
            raise ValueError(f"{name}[{index}] has shape {list(tensor.shape)}; it should be {list(shape)}")


def present(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Optional arguments: those that are given."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
