"""What a command works on: a diffusers folder, or a preset with random weights. Everything wrong with it is one ``BadInput``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fusewire.errors import BadInput
from fusewire.machine import DTYPES, SHORT
from fusewire.presets import PRESETS, build

EMBEDDED = "digits-sd3"


@dataclass
class Target:
    """A loaded target. ``value`` is a pipeline or a denoiser; ``inputs`` are the keyword arguments of one call of a denoiser."""

    name: str
    value: object
    dtype: torch.dtype
    description: str
    size: int | None = None
    inputs: dict | None = None


def parse_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` or ``"bf16"`` -> ``torch.bfloat16``; ``BadInput`` for anything else."""
    dtype = DTYPES.get(SHORT.get(name, name))
    if dtype is None:
        raise BadInput(f"dtype is {name!r}; it should be one of {', '.join(DTYPES)}")
    return dtype


def embedded() -> Path | None:
    """The folder of the embedded pipeline in a checkout, or None where this installation has none."""
    import fusewire

    for root in fusewire.__path__:
        folder = Path(root) / "assets" / EMBEDDED
        if (folder / "model_index.json").is_file():
            return folder
    return None


def load(target: str | None = None, *, dtype: str = "float32", layers: int | None = None, size: int | None = None, seed: int = 0) -> Target:
    """Load a diffusers folder or build a preset, on the CPU and in evaluation mode.

    Args:
        target: a folder, the name of a preset, or None for the embedded pipeline.
        dtype: of weights and inputs, e.g. ``"bfloat16"``.
        layers: number of blocks; presets only.
        size: picture width and height in pixels.
        seed: of a preset's weights and inputs.

    Raises: BadInput, with one line that says what is wrong.
    """
    kind = parse_dtype(dtype)
    for name, value in (("layers", layers), ("size", size)):
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}; it should be at least 1")
    if target in PRESETS:
        model, inputs, text, size = build(target, kind, layers, size, seed)
        return Target(target, model, kind, text, size=size, inputs=inputs)
    if target is None or (target == EMBEDDED and not Path(target).exists()):
        folder = embedded()
        if folder is None:
            raise BadInput(f"the embedded pipeline {EMBEDDED} is not part of this installation; name a diffusers folder or a preset "
                           f"({', '.join(PRESETS)})")
    else:
        folder = Path(target)
        if folder.is_dir() and folder.name in ("", ".."):  # "." and the like have no name
            folder = folder.resolve()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise BadInput(f"TARGET {target!r} {what}; it should be a diffusers folder or one of {', '.join(PRESETS)}")
    if layers is not None:
        raise BadInput(f"--layers is {layers}, but {folder.name} is a folder; the number of blocks can be set for presets only")
    from fusewire.folders import open_folder

    value = open_folder(folder, kind)
    check_finite(value)
    size_checked(value, size)
    return Target(folder.name, value, kind, describe(value), size=size)


def size_checked(value: object, size: int | None) -> None:
    """Refuse a picture size that the pipeline's patches do not divide."""
    if size is None or not hasattr(value, "vae_scale_factor"):
        return
    step = value.vae_scale_factor * getattr(value, "patch_size", 1)
    if size % step:
        raise BadInput(f"--size is {size}; for this pipeline it should be a multiple of {step}")


def check_finite(value: object) -> None:
    """Raise ``BadInput`` naming the first weight that holds NaN or infinity."""
    for prefix, module in modules_of(value):
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                bad = (~torch.isfinite(parameter)).sum().item()
                raise BadInput(f"weight {prefix}{name} holds {bad} values that are NaN or infinite")


def modules_of(value: object) -> list[tuple[str, nn.Module]]:
    """[(prefix, module)]: the module itself, or each module of a pipeline with its component's name."""
    if isinstance(value, nn.Module):
        return [("", value)]
    return [(f"{name}.", part) for name, part in value.components.items() if isinstance(part, nn.Module)]


def describe(value: object) -> str:
    """Class and number of parameters, in one phrase."""
    count = sum(p.numel() for _, module in modules_of(value) for p in module.parameters())
    return f"{type(value).__name__}, {count / 1e6:.1f} M parameters"
