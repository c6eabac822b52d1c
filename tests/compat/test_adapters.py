"""IP-Adapter and textual inversion, loaded before the swap and after it. Further columns of the matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import fusewire
from fusewire import ops
from tests import tiny as with_text
from tests.compat.families import FAMILIES
from tests.compat.test_matrix import BOTH, calls, column, same
from tests.compat.test_pipelines import BOUND, denoiser, generate
from tests.models.stock_sd3 import randomise

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def ip_adapter(family, model):
    """Puts a random image projection into a denoiser; returns its processors, and the embeddings of a picture for the pipeline's call."""
    torch.manual_seed(3)
    normal = torch.Generator().manual_seed(4)
    if family == "SD3.5":
        model.image_proj = randomise(IPAdapterTimeImageProjection(embed_dim=16, output_dim=32, hidden_dim=64, depth=1, heads=1, num_queries=3,
                                                                  timestep_in_dim=32))
        made = {name: SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=32, head_dim=16, timesteps_emb_dim=64, scale=0.7)
                for name in model.attn_processors}
        image = dict(ip_adapter_image_embeds=torch.randn(2, 5, 16, generator=normal))
    else:
        width = 32 if family == "Flux.1" else 24
        model.encoder_hid_proj = randomise(MultiIPAdapterImageProjection([ImageProjection(image_embed_dim=16, cross_attention_dim=width,
                                                                                         num_image_text_embeds=4)]))
        model.config.encoder_hid_dim_type = "ip_image_proj"
        made = dict(model.attn_processors)
        for name in made:
            if family == "Flux.1" and not name.startswith("single_"):
                made[name] = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=width, scale=0.7)
            elif family != "Flux.1" and "attn2" in name:
                inner = model.get_submodule(name.removesuffix(".processor")).inner_dim
                made[name] = IPAdapterAttnProcessor2_0(hidden_size=inner, cross_attention_dim=width, scale=0.7)
        image = dict(ip_adapter_image_embeds=[torch.randn(1 if family == "Flux.1" else 2, 1, 16, generator=normal)])
        if family == "Flux.1":
            image["negative_ip_adapter_image_embeds"] = [torch.zeros(1, 1, 16)]
    for processor in made.values():
        if isinstance(processor, torch.nn.Module):
            randomise(processor)
    return made, image


@column("IP-Adapter")
@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
def test_ip_adapter(family, numerics, order):
    if family in ("DiT", "PixArt"):
        pytest.skip("diffusers has no IP-Adapter of it")
    pipe = FAMILIES[family].pipe(torch.float32)
    model = denoiser(pipe)
    processors, image = ip_adapter(family, model)
    before = dict(model.attn_processors)
    model.set_attn_processor(dict(processors))
    want = generate(family, pipe, **image)
    model.set_attn_processor({name: copy.deepcopy(processor) for name, processor in processors.items()})
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.0] if isinstance(processor.scale, list) else 0.0
    assert not same(generate(family, pipe, **image), want, "close", 1e-3)
    model.set_attn_processor(dict(processors))
    if order == "after":
        model.set_attn_processor(dict(before))
    with fusewire.swapped(pipe, numerics) as handle:
        if order == "after":
            model.set_attn_processor(dict(processors))
        ops.reset_stats()
        assert same(generate(family, pipe, **image), want, numerics, BOUND) and calls()
        assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    if order == "before":
        assert any("IPAdapter" in entry.reason and "is kept" in entry.reason for entry in handle.report.left)
    assert torch.equal(generate(family, pipe, **image), want)


def text_encoder(cls, width: int, projection: int = 16):
    """A tiny CLIP and its tokenizer of single letters."""
    parts = with_text.tiny_pipeline()
    config = parts.text_encoder.config
    config.hidden_size, config.projection_dim = width, projection
    return randomise(cls(config)).eval(), parts.tokenizer


@column("textual inversion")
@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
def test_textual_inversion(family, numerics, order):
    if family not in ("SD1.5", "SDXL", "Flux.1"):
        pytest.skip("diffusers' pipeline of it loads no textual inversion")
    torch.manual_seed(5)
    pipe = FAMILIES[family].pipe(torch.float32)
    if family == "SDXL":
        widths = (8, 16)
        pairs = [text_encoder(CLIPTextModel, 8), text_encoder(CLIPTextModelWithProjection, 16, 32)]
        pipe.register_modules(text_encoder=pairs[0][0], tokenizer=pairs[0][1], text_encoder_2=pairs[1][0], tokenizer_2=pairs[1][1])
    else:
        widths = (24,)
        pairs = [text_encoder(CLIPTextModel, 24)]
        pipe.register_modules(text_encoder=pairs[0][0], tokenizer=pairs[0][1])
        pipe.tokenizer_max_length = pairs[0][1].model_max_length
    learned = [torch.randn(width) for width in widths]

    def load():
        for (encoder, tokenizer), vector in zip(pairs, learned):
            pipe.load_textual_inversion({"<x>": vector}, text_encoder=encoder, tokenizer=tokenizer)

    def latents():
        if family == "Flux.1":  # its other text comes of T5, which learns no words here
            return generate(family, pipe, pooled_prompt_embeds=pipe._get_clip_prompt_embeds("a <x>"))
        embeddings = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"))
        return generate(family, pipe, prompt="a <x>", negative_prompt="b", **embeddings)

    plain = latents()
    if order == "before":
        load()
        want = latents()
        assert not same(want, plain, "close", 1e-3)
    with fusewire.swapped(pipe, numerics):
        if order == "after":
            load()
        ops.reset_stats()
        got = latents()
        assert calls()
    if order == "after":
        want = latents()
        assert not same(want, plain, "close", 1e-3)
    assert same(got, want, numerics, BOUND) and torch.equal(latents(), want)
