"""What is asked of every whole pipeline: swapped it gives what it gives stock, and nothing of it is left for another reason than numerics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import fusewire
from fusewire import ops
from fusewire.swap.report import Report
from tests.models import stock_unet
from tests.models.stock_sd3 import randomise
from tests.models.stock_text import randomise as randomise_text
from tests.tolerance import PIPELINE_FLOAT32

CASES = pytest.mark.parametrize("numerics, dtype", [("exact", torch.float32), ("exact", torch.bfloat16), ("close", torch.float32)], ids=str)


def served() -> dict[str, int]:
    """How often each op was called since the counts were set to zero, as far as it was."""
    return {op: count for op, calls in ops.stats().items() if (count := sum(calls.values()))}


def check(pipe, generate: Callable[[object], torch.Tensor], numerics: str) -> tuple[Report, set[str], torch.Tensor]:
    """-> (the report, the ops that ran, what stock gives). exact: the same bits; close: within float32's rounding over some steps. Nothing is left
    but by numerics."""
    want = generate(pipe)
    assert want.isfinite().all() and want.std() > 0
    with fusewire.swapped(pipe, numerics, strict=True) as handle:
        assert all(entry.by_choice for entry in handle.report.left)
        ops.reset_stats()
        got = generate(pipe)
        ran = set(served())
    assert got.dtype is want.dtype and got.shape == want.shape
    if numerics == "exact":
        assert torch.equal(got, want)
    else:
        assert 0 < (got - want).abs().max() <= PIPELINE_FLOAT32 * want.abs().max()
    assert torch.equal(generate(pipe), want)
    return handle.report, ran, want


def counts(other: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether what was changed shows, beyond rounding: a prompt or a picture that does not count would hide every fault in what sees it."""
    return bool((other - want).abs().max() > 10 * PIPELINE_FLOAT32 * want.abs().max())


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vae(dtype: torch.dtype, **changes) -> AutoencoderKL:
    """Halves the size once."""
    config = dict(stock_unet.VAE, block_out_channels=(8, 8), **changes)
    return randomise(AutoencoderKL(**config)).eval().to(dtype)


def clip(dtype: torch.dtype, width: int, tokenizer, **changes) -> CLIPTextModel:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=tokenizer.model_max_length, **ids)
    return randomise_text(CLIPTextModel(CLIPTextConfig(**config | changes))).eval().to(dtype)


def t5(dtype: torch.dtype, width: int, tokenizer) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return randomise_text(T5EncoderModel(config)).eval().to(dtype)
