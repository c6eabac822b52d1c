"""The other pipelines of FLUX.1 from the prompt to the picture: schnell (no guidance, no dynamic shift), Kontext (a picture's tokens behind those
that are made), Fill (a masked picture's latents and the mask beside the latents' channels)."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxKontextPipeline, FluxPipeline

import fusewire
from tests.models import stock_flux
from tests.swap.whole import CASES, check, clip, counts, quiet, t5, vae
from tests.tiny import letters
from tests.tolerance import PIPELINE_FLOAT32

# 60 tokens of 24 x 40 pixels: fewer than 32 rows of a linear stay PyTorch's, in close too
SIZE = dict(height=24, width=40)
# What a mask of 2 x 2 pixels a latent, packed 2 x 2 as the latents are, adds to their channels and those of the masked picture
FILL_CHANNELS = 16 + 16 + 2 * 2 * 4
KINDS = {"schnell": (FluxPipeline, {}, FlowMatchEulerDiscreteScheduler(shift=1.0)),
         "kontext": (FluxKontextPipeline, {}, FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)),
         "fill": (FluxFillPipeline, dict(in_channels=FILL_CHANNELS), FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))}
BOTH = {"adaln_modulate", "gate_residual_adaln", "group_norm_silu", "rms_norm", "flow_euler_step"}
# close: the gates of FLUX.1 go into its linears, the norms and rotations of q and k into its attention
EXACT, CLOSE = {"gate_residual", "qk_norm_rope"}, {"joint_attention", "attention", "linear"}


def pipeline(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(3)
    cls, changes, scheduler = KINDS[kind]
    tokenizer = letters()
    transformer = stock_flux.stock_model("dev" if kind == "kontext" else kind, dtype, **changes)
    return quiet(cls(transformer=transformer, scheduler=scheduler.from_config(scheduler.config), vae=vae(dtype, shift_factor=0.1, scaling_factor=1.3),
                     text_encoder=clip(dtype, 24, tokenizer), tokenizer=tokenizer, text_encoder_2=t5(dtype, 32, tokenizer), tokenizer_2=tokenizer))


def picture(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(1, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


def given(kind: str) -> dict:
    """What a call of this pipeline takes beside a prompt."""
    if kind == "schnell":
        return dict(SIZE, num_inference_steps=4, guidance_scale=0.0)
    if kind == "kontext":  # a reference of another size than the picture's
        return dict(SIZE, num_inference_steps=3, image=picture(16, 32), max_area=24 * 40, _auto_resize=False)
    mask = torch.zeros(1, 1, *SIZE.values())
    mask[..., 4:20, 10:] = 1
    return dict(SIZE, num_inference_steps=3, image=picture(*SIZE.values()), mask_image=mask)


def generate(pipe, prompt="a b c", **more) -> torch.Tensor:
    kind = next(kind for kind, (cls, *_) in KINDS.items() if type(pipe) is cls)
    call = dict(given(kind), generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False, max_sequence_length=8) | more
    return pipe(prompt=prompt, **call)[0]


@CASES
@pytest.mark.parametrize("kind", KINDS)
def test_from_the_prompt_to_the_picture(kind, numerics, dtype):
    pipe = pipeline(kind, dtype)
    report, ran, want = check(pipe, generate, numerics)
    assert want.shape == (1, 3, *SIZE.values())
    assert {entry.name.split(".")[0] for entry in report.swapped} == {"transformer", "vae", "scheduler", "text_encoder", "text_encoder_2"}
    assert BOTH | (CLOSE if numerics == "close" else EXACT) <= ran and (numerics == "close" or not ran & CLOSE)
    assert counts(generate(pipe, "x y z"), want)


@CASES
@pytest.mark.parametrize("kind", KINDS)
def test_from_embeddings_to_latents(kind, numerics, dtype):
    draw = torch.Generator().manual_seed(4)
    embeddings = dict(prompt_embeds=torch.randn(2, 7, 32, generator=draw).to(dtype), pooled_prompt_embeds=torch.randn(2, 24, generator=draw).to(dtype))
    pipe = pipeline(kind, dtype)
    _, _, want = check(pipe, lambda pipe: generate(pipe, None, **embeddings, output_type="latent"), numerics)
    assert want.shape == (2, 60, 16) and not torch.equal(want[0], want[1])


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("kind, change", [("kontext", dict(image=picture(16, 32, seed=2))), ("kontext", dict(image=None)),
                                          ("fill", dict(image=picture(*SIZE.values(), seed=2))), ("fill", dict(mask_image=torch.ones(1, 1, *SIZE.values())))],
                         ids=["kontext: another reference", "kontext: none", "fill: another picture", "fill: all masked"])
def test_what_conditions_it_counts(kind, change, numerics):
    """Another picture, mask or none in the same swapped pipeline, and back: each is stock's."""
    pipe = pipeline(kind)
    want, other = generate(pipe, output_type="latent"), generate(pipe, output_type="latent", **change)
    assert counts(other, want)
    with fusewire.swapped(pipe, numerics):
        for changed, stock in ((change, other), ({}, want), (change, other)):
            difference = (generate(pipe, output_type="latent", **changed) - stock).abs().max()
            assert difference == 0 if numerics == "exact" else difference <= PIPELINE_FLOAT32 * stock.abs().max()


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_kontext_with_a_negative_prompt(numerics):
    """True guidance: two calls a step, over the tokens of both pictures."""
    check(pipeline("kontext"), lambda pipe: generate(pipe, negative_prompt="d e", true_cfg_scale=3.0), numerics)


def test_schnell_knows_no_guidance():
    pipe = pipeline("schnell")
    assert pipe.transformer.time_text_embed.__class__.__name__ == "CombinedTimestepTextProjEmbeddings"
    with fusewire.swapped(pipe):
        assert torch.equal(generate(pipe, guidance_scale=7.0), generate(pipe))
