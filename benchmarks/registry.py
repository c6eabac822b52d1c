"""What is measured: op -> cases on the shapes of real models, each with the bytes that it cannot avoid moving."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """``shape`` of the op's main input; ``elements`` read and written at least, counted in the dtype of the case."""

    what: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    elements: int


def _qk(what: str, *shape: int) -> Case:
    return Case(what, shape, ("float32", "bfloat16"), 4 * shape[0] * shape[1] * shape[2] * shape[3])  # q and k in, q and k out


def _picture(what: str, *shape: int) -> Case:
    return Case(what, shape, ("float32", "bfloat16"), 2 * shape[0] * shape[1] * shape[2] * shape[3])  # picture in, picture out


def _latents(what: str, *shape: int) -> Case:
    count = 1
    for size in shape:
        count *= size
    return Case(what, shape, ("float32", "bfloat16"), 4 * count)  # sample, two predictions, result


def _tokens(tensors: int) -> list[Case]:
    """SD3.5-medium 512^2 with guidance; ``tensors`` of [B, T, C] are read or written (the vectors per sample are small beside them)."""
    shape = (2, 1024, 1536)
    return [Case("SD3.5-medium 512^2, guidance", shape, ("float32", "bfloat16"), tensors * shape[0] * shape[1] * shape[2])]


def _alike(what: str, *shape: int) -> Case:
    count = 1
    for size in shape:
        count *= size
    return Case(what, shape, ("float32", "bfloat16"), 2 * count)  # x in, a result of its size out


def _gated(what: str, *shape: int) -> Case:
    return Case(what, shape, ("float32", "bfloat16"), shape[0] * shape[1] * shape[2] * 3 // 2)  # both halves in, one out


def _linear(what: str, batch: int, tokens: int, inputs: int, outputs: int) -> Case:
    return Case(what, (batch, tokens, inputs, outputs), ("float32", "bfloat16", "float16"), batch * tokens * (inputs + outputs) + inputs * outputs)


REGISTRY = {
    "adaln_modulate": _tokens(2),  # x in, result out
    "adaln_modulate_dual": _tokens(3),  # x in, two results out
    "gate_residual": _tokens(3),  # x and y in, result out
    "gate_residual_adaln": _tokens(4),  # x and y in, sum and modulated norm out
    "geglu": [_gated("SDXL 1024^2, guidance", 2, 1024, 10240)],
    "linear": [_linear("SD3.5-medium 512^2, guidance, the feed-forward's first", 2, 1024, 1536, 6144),
               _linear("SD3.5-medium 512^2, guidance, the feed-forward's second", 2, 1024, 6144, 1536)],
    "layer_norm": [_alike("SD3.5-medium 512^2, guidance", 2, 1024, 1536)],
    "layer_norm_2d": [_alike("Stable Cascade's prior 1024^2, guidance", 2, 1536, 24, 24)],
    "global_response_norm": [_alike("Stable Cascade's prior 1024^2, guidance", 2, 24, 24, 6144)],
    "rms_norm": [_alike("SD3.5-medium 512^2, guidance", 2, 1024, 1536), _alike("T5-XXL, 512 tokens", 1, 512, 4096)],
    "swiglu": [_gated("Z-Image 512^2", 1, 1024, 20480)],
    "quick_gelu": [_alike("CLIP-L, 77 tokens, guidance", 2, 77, 3072)],
    "qk_norm_rope": [
        _qk("SD3.5-medium 512^2, guidance", 2, 1024, 24, 64),
        _qk("SD3.5-medium 512^2", 1, 1024, 24, 64),
        _qk("Flux 512^2, rotated", 1, 1024, 24, 128),
    ],
    "group_norm_silu": [
        _picture("SD1.5 512^2, guidance, first block", 2, 320, 64, 64),
        _picture("SDXL 512^2, guidance, second block", 2, 640, 32, 32),
        _picture("VAE decoder 512^2, first block", 1, 512, 64, 64),
        _picture("VAE decoder 256^2, last block", 1, 128, 256, 256),
    ],
    "sampler_step": [
        _latents("SD3.5 1024^2, two pictures", 2, 16, 128, 128),
        _latents("Flux 1024^2, packed", 1, 4096, 64),
        _latents("SD1.5 512^2", 1, 4, 64, 64),
    ],
}
