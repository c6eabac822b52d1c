"""Copies that share their weights with the original: several variants of one model side by side, in the memory of one."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fusewire.errors import BadInput
from fusewire.targets import modules_of


def shared_copy(value):
    """A deep copy of a module or pipeline whose parameters and buffers are the original's own tensors.

    What is swapped, compiled or hooked in the copy leaves the original as it is. Raises BadInput for a target with offload hooks (they
    move weights that the copy shares) or with Fusewire's modules already in it.
    """
    for prefix, module in modules_of(value):
        for name, part in module.named_modules():
            if hasattr(part, "_hf_hook"):
                raise BadInput(f"{prefix}{name or 'module'} carries an offload hook; measure the pipeline before enabling offload")
            if hasattr(type(part), "fusewire_stock"):
                raise BadInput(f"{prefix}{name or 'module'} is swapped already; restore it first, so that there is a stock side to compare with")
    if isinstance(value, nn.Module):
        return _copy_module(value)
    twin = copy.copy(value)  # not made by its class, which would forget its options, and whatever the user set since
    for name, part in value.components.items():
        vars(twin)[name] = _copy_module(part) if isinstance(part, nn.Module) else copy.deepcopy(part)
    return twin


def _copy_module(module: nn.Module) -> nn.Module:
    module = module._modules.get("_orig_mod", module)  # what torch.compile wraps: a copy of the wrapper would run graphs that were made of the original
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def denoiser_of(value) -> tuple[str, nn.Module]:
    """(component name, module) of what a pipeline calls at every step; ("", module) for a module. BadInput where there is none."""
    if isinstance(value, nn.Module):
        return "", value
    for name in ("transformer", "unet", "prior", "transformer_2"):
        part = getattr(value, name, None)
        if isinstance(part, nn.Module):
            return name, part
    raise BadInput(f"{type(value).__name__} has no transformer, unet or prior: it is not a pipeline that Fusewire knows")


def check_target(value) -> None:
    """Raise BadInput unless ``value`` is a module or a pipeline."""
    if isinstance(value, type):
        raise BadInput(f"pipe_or_module is the class {value.__name__}; it should be a pipeline or a module made of it")
    if not isinstance(value, nn.Module) and not hasattr(value, "components"):
        raise BadInput(f"pipe_or_module is a {type(value).__name__}; it should be a diffusers pipeline or a torch.nn.Module")


def detached(value):
    """A copy of nested arguments with every tensor cloned; None, numbers and strings stay."""
    return mapped(value, lambda t: t.detach().clone())


def mapped(value, change):
    """``change`` applied to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, change) for part in value)
    return value


def tensors_in(value) -> list[torch.Tensor]:
    """Every tensor of a module's output, in order: tuples, lists, dicts (diffusers' output classes are dicts)."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def place_of(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """(device, dtype) of a module's first floating-point parameter; the CPU and float32 for a module without any."""
    found = next((p for p in module.parameters() if p.is_floating_point()), None)
    return (torch.device("cpu"), torch.float32) if found is None else (found.device, found.dtype)
