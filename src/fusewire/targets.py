"""What a command works on: a diffusers folder, or a preset with random weights. Everything wrong with it is one ``BadInput``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fusewire.errors import BadInput
from fusewire.machine import DTYPES, SHORT

EMBEDDED = "digits-sd3"


@dataclass(frozen=True)
class Preset:
    """A model at its full width with random weights: arguments of ``SD3Transformer2DModel``, and the inputs of one call."""

    config: dict
    layers: int  # blocks unless told otherwise
    full_layers: int
    full_dual: int  # of the full model's blocks, how many have a second attention (they come first)
    size: int  # picture width and height, pixels
    text_tokens: int


def _sd3(heads: int, pos_embed_max_size: int, qk_norm: str | None) -> dict:
    width = 64 * heads
    return dict(sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, num_attention_heads=heads,
                joint_attention_dim=4096, caption_projection_dim=width, pooled_projection_dim=2048,
                pos_embed_max_size=pos_embed_max_size, qk_norm=qk_norm)


_TINY = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=16, num_attention_heads=2,
             joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16)

PRESETS = {
    "sd3.5-medium": Preset(_sd3(24, 384, "rms_norm"), layers=3, full_layers=24, full_dual=13, size=512, text_tokens=154),
    "sd3.5-large": Preset(_sd3(38, 192, "rms_norm"), layers=2, full_layers=38, full_dual=0, size=512, text_tokens=154),
    "sd3-medium": Preset(_sd3(24, 192, None), layers=3, full_layers=24, full_dual=0, size=512, text_tokens=154),
    "sd3.5-tiny": Preset({**_TINY, "qk_norm": "rms_norm"}, layers=2, full_layers=2, full_dual=1, size=64, text_tokens=7),
    "sd3-tiny": Preset({**_TINY, "qk_norm": None}, layers=2, full_layers=2, full_dual=0, size=64, text_tokens=7),
}
VAE_FACTOR = 8  # pixels per latent of every preset


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
        return _build(target, kind, layers, size, seed)
    if target is None or (target == EMBEDDED and not Path(target).exists()):
        folder = embedded()
        if folder is None:
            raise BadInput(f"the embedded pipeline {EMBEDDED} is not part of this installation; name a diffusers folder or a preset "
                           f"({', '.join(PRESETS)})")
    else:
        folder = Path(target)
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


def _build(name: str, dtype: torch.dtype, layers: int | None, size: int | None, seed: int) -> Target:
    from fusewire.folders import needs_diffusers, silent

    diffusers = needs_diffusers()
    preset = PRESETS[name]
    layers, size = layers or preset.layers, size or preset.size
    step = VAE_FACTOR * preset.config["patch_size"]
    largest = preset.config["pos_embed_max_size"] * step
    if size % step or size > largest:
        raise BadInput(f"--size is {size}; for {name} it should be a multiple of {step}, at most {largest}")
    if layers > preset.full_layers:
        raise BadInput(f"--layers is {layers}; {name} has {preset.full_layers}")
    dual = round(layers * preset.full_dual / preset.full_layers)
    before = torch.get_default_dtype()
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        model = diffusers.SD3Transformer2DModel(num_layers=layers, dual_attention_layers=tuple(range(dual)), **preset.config)
    finally:
        torch.set_default_dtype(before)
        torch.set_rng_state(generator_state)
    with silent():
        model = model.to(dtype).eval().requires_grad_(False)
    tokens = (size // step) ** 2
    text = f"{layers} of {preset.full_layers} blocks ({dual} with a second attention), width {model.inner_dim}, {tokens} + {preset.text_tokens} tokens"
    return Target(name, model, dtype, text, size=size, inputs=sd3_inputs(model, size=size, text_tokens=preset.text_tokens, seed=seed))


def sd3_inputs(model: nn.Module, *, size: int | None = None, text_tokens: int = 154, batch: int = 1, seed: int = 0) -> dict:
    """Random inputs of one call of an ``SD3Transformer2DModel``, in its dtype and on its device, halfway through the noise.

    Args:
        size: picture width and height in pixels, at 8 pixels a latent; the model's own sample size unless told.

    Returns: hidden_states [B, C, h, w], encoder_hidden_states [B, T, D], pooled_projections [B, P], timestep [B], return_dict False.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    latent = config.sample_size if size is None else size // VAE_FACTOR
    place = dict(dtype=model.dtype, device=model.device)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(**place)

    return dict(hidden_states=normal(batch, config.in_channels, latent, latent),
                encoder_hidden_states=normal(batch, text_tokens, config.joint_attention_dim),
                pooled_projections=normal(batch, config.pooled_projection_dim),
                timestep=torch.full((batch,), 500.0, device=model.device), return_dict=False)
