"""Whole pipelines whose text encoders are swapped along: from the prompt to the latents. Further columns of the matrix."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import fusewire
from fusewire import ops
from tests import tiny as with_text
from tests.compat.families import FAMILIES, _quiet
from tests.compat.test_matrix import BOTH, calls, column, same
from tests.compat.test_pipelines import BOUND
from tests.models.stock_text import randomise

pytestmark = pytest.mark.parametrize("family", FAMILIES)
# Component -> (class, width, width of the projection)
ENCODERS = {"SD3.5": dict(text_encoder=(CLIPTextModelWithProjection, 16, 32), text_encoder_2=(CLIPTextModelWithProjection, 16, 32),
                          text_encoder_3=(T5EncoderModel, 32, None)),
            "Flux.1": dict(text_encoder=(CLIPTextModel, 24, 24), text_encoder_2=(T5EncoderModel, 32, None)),
            "SD1.5": dict(text_encoder=(CLIPTextModel, 24, 24)),
            "SDXL": dict(text_encoder=(CLIPTextModel, 8, 8), text_encoder_2=(CLIPTextModelWithProjection, 16, 32)),
            "PixArt": dict(text_encoder=(T5EncoderModel, 12, None))}


def pipeline(family, dtype=torch.float32):
    """The family's tiny pipeline with text encoders, and tokenizers of single letters."""
    if family not in ENCODERS:
        pytest.skip("it has no text encoder")
    torch.manual_seed(6)
    pipe, parts = FAMILIES[family].pipe(dtype), {}
    source = with_text.tiny_pipeline()
    for name, (cls, width, projection) in ENCODERS[family].items():
        if cls is T5EncoderModel:
            config = T5Config(vocab_size=len(source.tokenizer), d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
        else:
            config = copy.deepcopy(source.text_encoder.config)
            config.hidden_size, config.projection_dim = width, projection
        parts[name] = randomise(cls(config)).eval().to(dtype)
        parts[name.replace("text_encoder", "tokenizer")] = source.tokenizer
    extra = dict(requires_safety_checker=False) if family == "SD1.5" else dict(add_watermarker=False) if family == "SDXL" else {}
    return _quiet(type(pipe)(**dict(pipe.components, **parts), **extra))


def encoders(pipe) -> dict:
    return {name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None}


def latents(family, pipe, prompt="a b c", kind="latent") -> torch.Tensor:
    given = dict(num_inference_steps=2, height=16, width=16 if family == "PixArt" else 24)
    if family not in ("SD1.5", "SDXL"):
        given["max_sequence_length"] = 8
    if family != "Flux.1":
        given["negative_prompt"] = "d"
    if family == "PixArt":
        given |= dict(use_resolution_binning=False, clean_caption=False)
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type=kind, return_dict=False, **given)[0]


@column("`exact`: torch.equal, from the prompt to the picture, text encoders and VAE swapped along, float32 and bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact(family, dtype):
    """(DiT, which has no prompt, is compared to its pictures in test_matrix.)"""
    pipe = pipeline(family, dtype)
    want = latents(family, pipe, kind="pt")
    assert want.shape[1] == 3 and not torch.equal(latents(family, pipe, "x y", "pt"), want)
    with fusewire.swapped(pipe) as handle:
        names = {entry.name.split(".")[0] for entry in handle.report.swapped}
        assert names >= {*encoders(pipe), "vae", "scheduler"} and torch.equal(latents(family, pipe, kind="pt"), want)
    assert torch.equal(latents(family, pipe, kind="pt"), want)


@column("text encoders in `close`, deepcopy, pickle")
def test_close_and_copies(family):
    pipe = pipeline(family)
    with fusewire.swapped(pipe, "close"):
        originals = encoders(pipe)
        stored = pickle.dumps(originals)  # transformers' hooks for hidden states, put there by the first call, cannot be pickled
        ops.reset_stats()
        got = latents(family, pipe)
        assert calls()
        for twins in (copy.deepcopy(originals), pickle.loads(stored)):
            pipe.register_modules(**twins)
            assert torch.equal(latents(family, pipe), got)
        pipe.register_modules(**originals)
    assert same(got, latents(family, pipe), "close", BOUND)


@column("text encoders: save_pretrained, from_pretrained")
def test_saved(family, tmp_path):
    pipe = pipeline(family)
    want = latents(family, pipe)
    with fusewire.swapped(pipe):
        for name, encoder in encoders(pipe).items():
            encoder.save_pretrained(tmp_path / name)
    loaded = {name: type(encoder).from_pretrained(tmp_path / name) for name, encoder in encoders(pipe).items()}
    pipe.register_modules(**loaded)
    with fusewire.swapped(pipe):
        assert torch.equal(latents(family, pipe), want)


@column("LoRA on text encoders, before and after the swap")
@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
def test_lora(family, numerics, order):
    pipe = pipeline(family)
    plain = latents(family, pipe)

    def adapt():
        torch.manual_seed(7)
        for encoder in encoders(pipe).values():
            linears = ["q", "v", "wi_0"] if isinstance(encoder, T5EncoderModel) else ["q_proj", "out_proj", "fc1"]
            encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=linears, init_lora_weights="gaussian"))
            with torch.no_grad():
                for key, parameter in encoder.named_parameters():
                    if "lora_B" in key:
                        parameter.normal_(std=0.3)

    if order == "before":
        adapt()
    with fusewire.swapped(pipe, numerics):
        if order == "after":
            adapt()
        got = latents(family, pipe)
    want = latents(family, pipe)
    assert same(got, want, numerics, BOUND) and not same(want, plain, "close", 1e-3)


@column("offload of text encoders: model, sequential")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
@BOTH
def test_offload(family, numerics, kind, order):
    pipe, cpu = pipeline(family), torch.device("cpu")
    want = latents(family, pipe)

    def offload():
        for model in pipe.components.values():  # a pipeline finds its device by what all of them say
            if kind == "model" and isinstance(model, torch.nn.Module):
                accelerate.cpu_offload_with_hook(model, cpu)
            elif isinstance(model, torch.nn.Module):
                accelerate.cpu_offload(model, execution_device=cpu, offload_buffers=True)

    if order == "before":
        offload()
    with fusewire.swapped(pipe, numerics):
        if order == "after":
            offload()
        assert same(latents(family, pipe), want, numerics, BOUND)
    assert torch.equal(latents(family, pipe), want)
