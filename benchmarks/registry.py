"""What is measured: op -> cases on the shapes of real models, each with the elements and the arithmetic that it cannot avoid.

Sizes are those of the models' published configurations (diffusers' classes and their folders on the hub); pictures are square, "guidance" is a batch
of two. What a benchmark of an op has recorded in ``results/`` comes first; the other cases are measured where ``--case`` asks for them.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import NamedTuple


class Case(NamedTuple):
    """``shape`` of the op's main input; ``elements`` read and written at least, counted in the dtype of the case (what is at most a hundredth of
    them is left out); ``flops`` of the matrix products. ``recorded``: in ``results/``."""

    what: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    elements: int
    flops: int = 0
    recorded: bool = False

    @property
    def kept(self) -> Case:
        """The same, as a recorded case."""
        return self._replace(recorded=True)


class Model(NamedTuple):
    """A transformer: its blocks are [batch, tokens (and, apart from these, those of the text), heads * dim]; ``hidden``: of its plain feed-forward, 0
    where that is gated or one with other linears."""

    what: str
    batch: int
    tokens: int
    text: int
    heads: int
    dim: int
    hidden: int
    rotated: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.width


BOTH, ALL = ("float32", "bfloat16"), ("float32", "bfloat16", "float16")
MEDIUM = Model("SD3.5-medium 512^2, guidance", 2, 1024, 154, 24, 64, 6144)
MODELS = (
    MEDIUM,
    Model("SD3.5-medium 1024^2, guidance", 2, 4096, 333, 24, 64, 6144),
    Model("SD3.5-large 1024^2, guidance", 2, 4096, 333, 38, 64, 9728),
    Model("Flux.1 1024^2", 1, 4096, 512, 24, 128, 12288, rotated=True),
    Model("Flux.1 1024^2, single block", 1, 4608, 0, 24, 128, 0, rotated=True),
    Model("Qwen-Image 1024^2, guidance", 2, 4096, 128, 24, 128, 12288, rotated=True),
    Model("Z-Image 1024^2", 1, 4224, 0, 30, 128, 0, rotated=True),
    Model("DiT-XL/2 256^2, guidance", 2, 256, 0, 16, 72, 4608),
    Model("DiT-XL/2 512^2, guidance", 2, 1024, 0, 16, 72, 4608),
)
# The levels of SDXL's and SD1.5's U-Nets that have attention, on one sequence (the text, 77 tokens, is attended to by itself)
LEVELS = (
    Model("SDXL 1024^2, guidance, second level", 2, 4096, 0, 10, 64, 0),
    Model("SDXL 1024^2, guidance, third level", 2, 1024, 0, 20, 64, 0),
    Model("SD1.5 512^2, guidance, first level", 2, 4096, 0, 8, 40, 0),
)
PROMPT = 77


def _alike(tensors: int, what: str, *shape: int, dtypes: tuple[str, ...] = BOTH) -> Case:
    """``tensors`` of this shape are read or written."""
    return Case(what, shape, dtypes, tensors * math.prod(shape))


def _tokens(tensors: int, *only: str) -> list[Case]:
    """On every model, or those that are named; the vectors of each sample are small beside the tokens."""
    cases = [_alike(tensors, model.what, *model.shape) for model in MODELS if not only or model.what.startswith(only)]
    return [case.kept if case.what == MEDIUM.what else case for case in cases]


def _gated(what: str, *shape: int) -> Case:
    return Case(what, shape, BOTH, math.prod(shape) * 3 // 2)  # both halves in, one out


def _linear(what: str, batch: int, tokens: int, inputs: int, outputs: int) -> Case:
    rows = batch * tokens
    return Case(what, (batch, tokens, inputs, outputs), ALL, rows * (inputs + outputs) + inputs * outputs, 2 * rows * inputs * outputs)


def _feed_forward() -> Iterator[Case]:
    for model in MODELS:
        if model.hidden:
            for which, inputs, outputs in (("first", model.width, model.hidden), ("second", model.hidden, model.width)):
                case = _linear(f"{model.what}, the feed-forward's {which}", model.batch, model.tokens, inputs, outputs)
                yield case.kept if model is MEDIUM else case


def _attention(what: str, batch: int, queries: int, keys: int, heads: int, dim: int) -> Case:
    """shape: (B, queries, keys, H, D); the softmax is not counted."""
    return Case(what, (batch, queries, keys, heads, dim), ALL, 2 * batch * heads * dim * (queries + keys), 4 * batch * heads * dim * queries * keys)


def _joint(model: Model) -> Case:
    """shape: (B, T, T of the text, H, D)"""
    tokens = model.tokens + model.text
    case = _attention(model.what, model.batch, tokens, tokens, model.heads, model.dim)
    return case._replace(shape=(model.batch, model.tokens, model.text, model.heads, model.dim))


def _of_models() -> Iterator[Case]:
    """Attention over all tokens of a block, and in U-Nets also over the prompt's."""
    for model in (*MODELS[1:], *LEVELS):
        tokens = model.tokens + model.text
        yield _attention(f"{model.what}, {'joint' if model.text else 'self'}", model.batch, tokens, tokens, model.heads, model.dim)
    for model in LEVELS:
        yield _attention(f"{model.what}, cross", model.batch, model.tokens, PROMPT, model.heads, model.dim)
    yield _attention("SD1.5 VAE 512^2, middle", 1, 4096, 4096, 1, 512)


def _heads() -> list[Case]:
    """q and k in, q and k out."""
    recorded = [_alike(4, "SD3.5-medium 512^2, guidance", 2, 1024, 24, 64), _alike(4, "SD3.5-medium 512^2", 1, 1024, 24, 64),
                _alike(4, "Flux 512^2, rotated", 1, 1024, 24, 128)]
    others = [_alike(4, f"{model.what}{', rotated' if model.rotated else ''}", model.batch, model.tokens, model.heads, model.dim)
              for model in MODELS[1:] if not model.what.startswith("DiT")]
    return [case.kept for case in recorded] + others


def _packed(what: str, heads: int, dim: int, *lengths: int) -> Case:
    """shape: (H, D, the lengths of the packed sequences)"""
    counted = [_attention(what, 1, length, length, heads, dim) for length in lengths]
    return Case(what, (heads, dim, *lengths), ALL, sum(case.elements for case in counted), sum(case.flops for case in counted))


REGISTRY: dict[str, list[Case]] = {
    "adaln_modulate": _tokens(2),  # x in, result out
    "adaln_modulate_dual": _tokens(3, "SD3.5-medium"),  # x in, two results out
    "gate_residual": _tokens(3),  # x and y in, result out
    "gate_residual_adaln": _tokens(4),  # x and y in, sum and modulated norm out
    "attention": [
        *(case.kept for case in (
            _attention("SD3.5-medium 512^2, joint", 1, 1178, 1178, 24, 64),
            _attention("SD3.5-medium 512^2, joint, guidance", 2, 1178, 1178, 24, 64),
            _attention("Flux width, half its heads", 1, 1178, 1178, 12, 128),
            _attention("SD1.5 cross attention, 64x64", 2, 4096, 77, 8, 40),
            _attention("SD1.5 self attention, 32x32", 2, 1024, 1024, 8, 80),
        )),
        *_of_models(),
    ],
    "joint_attention": [_joint(model) for model in MODELS if model.text],
    "attention_varlen": [_packed("Z-Image, pictures of 512^2, 768^2 and 1024^2 packed", 30, 128, 1024, 2304, 4096),
                         _packed("SD3.5-medium, four prompts packed", 24, 64, 31, 77, 154, 333)],
    "geglu": [_gated("SDXL 1024^2, guidance", 2, 1024, 10240).kept, _gated("SDXL 1024^2, guidance, second level", 2, 4096, 5120),
              _gated("SD1.5 512^2, guidance, first level", 2, 4096, 2560)],
    "linear": [*_feed_forward(), _linear("Flux.1 1024^2, the single block's last", 1, 4608, 15360, 3072),
               _linear("Z-Image 1024^2, the output of attention", 1, 4224, 3840, 3840)],
    "layer_norm": [*_tokens(2, "SD3.5-medium 512"), *(_alike(2, model.what, *model.shape) for model in LEVELS)],
    "layer_norm_2d": [_alike(2, "Stable Cascade's prior 1024^2, guidance", 2, 1536, 24, 24).kept],
    "global_response_norm": [_alike(2, "Stable Cascade's prior 1024^2, guidance", 2, 24, 24, 6144).kept],
    "rms_norm": [*_tokens(2, "SD3.5-medium 512"), _alike(2, "T5-XXL, 512 tokens", 1, 512, 4096).kept, *_tokens(2, "Z-Image"),
                 _alike(2, "Qwen-Image, 128 tokens of text", 1, 128, 3584)],
    "swiglu": [_gated("Z-Image 512^2", 1, 1024, 20480).kept, _gated("Z-Image 1024^2", 1, 4224, 20480)],
    "quick_gelu": [_alike(2, "CLIP-L, 77 tokens, guidance", 2, 77, 3072).kept],
    "qk_norm_rope": _heads(),
    "qk_norm_into": _heads(),
    "group_norm_silu": [
        *(case.kept for case in (
            _alike(2, "SD1.5 512^2, guidance, first block", 2, 320, 64, 64),
            _alike(2, "SDXL 512^2, guidance, second block", 2, 640, 32, 32),
            _alike(2, "VAE decoder 512^2, first block", 1, 512, 64, 64),
            _alike(2, "VAE decoder 256^2, last block", 1, 128, 256, 256),
        )),
        _alike(2, "SDXL 1024^2, guidance, first block", 2, 320, 128, 128),
        _alike(2, "SDXL 1024^2, guidance, second block", 2, 640, 64, 64),
        _alike(2, "SDXL 1024^2, guidance, third block", 2, 1280, 32, 32),
        _alike(2, "SD1.5 VAE 512^2, second block", 1, 512, 128, 128),
        _alike(2, "SD1.5 VAE 512^2, third block", 1, 256, 256, 256),
        _alike(2, "SD1.5 VAE 512^2, last block", 1, 128, 512, 512),
    ],
    "sampler_step": [  # sample, two predictions, result
        _alike(4, "SD3.5 1024^2, two pictures", 2, 16, 128, 128).kept,
        _alike(4, "Flux 1024^2, packed", 1, 4096, 64).kept,
        _alike(4, "SD1.5 512^2", 1, 4, 64, 64).kept,
        _alike(4, "Z-Image 1024^2", 1, 16, 128, 128),
        _alike(4, "Qwen-Image 1328^2, packed", 1, 6889, 64),
    ],
    "solver_step": [  # sample, prediction, result, and x0 for the next step
        _alike(4, "SD1.5 512^2", 1, 4, 64, 64).kept,
        _alike(4, "SDXL 1024^2, two pictures", 2, 4, 128, 128).kept,
        _alike(4, "DiT-XL/2 256^2", 1, 4, 32, 32),
    ],
}


def case_option(parser: ArgumentParser) -> None:
    parser.add_argument("--case", action="append", metavar="WORDS", help="measure the cases whose description has these words, of any model, instead "
                        "of the recorded ones; may be given several times, and 'all' takes every case")


def chosen(op: str, arguments: Namespace) -> list[Case]:
    """The cases of ``op`` that the command line asks for: the recorded ones, or those that ``--case`` names (for some ops perhaps none)."""
    words = [word.lower() for word in getattr(arguments, "case", None) or ()]
    if not words:
        return [case for case in REGISTRY[op] if case.recorded]
    return [case for case in REGISTRY[op] if any(word == "all" or word in case.what.lower() for word in words)]
