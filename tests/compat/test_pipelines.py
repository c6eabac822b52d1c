"""The other pipelines of a family, and what guides, moves or conditions them: each gives swapped what it gives stock. Further columns of the matrix."""

from __future__ import annotations

import inspect

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from tests.compat.families import FAMILIES, _quiet, _vae
from tests.compat.test_matrix import BOTH, calls, column, run, same
from tests.models import stock_sd3
from tests.models.stock_sd3 import randomise

pytestmark = pytest.mark.parametrize("family", FAMILIES)
SIZE = dict(height=16, width=24)
BOUND = 2e-4  # `close`: three steps and guidance


class Accepting:
    """A pipeline that is given only those of the family's keywords that its call knows."""

    def __init__(self, pipe):
        self._pipe = pipe

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def __call__(self, **keywords):
        known = inspect.signature(type(self._pipe).__call__).parameters
        return self._pipe(**{key: value for key, value in keywords.items() if key in known})


def generate(family, pipe, **more):
    torch.manual_seed(0)  # for what a pipeline draws without the caller's generator (the latents of a control picture)
    return FAMILIES[family].generate(Accepting(pipe), **more)


def check(family, pipe, numerics, **more):
    """Swapped as stock, and stock again; returns the report and what stock gives."""
    want = generate(family, pipe, **more)
    with fusewire.swapped(pipe, numerics) as handle:
        ops.reset_stats()
        assert same(generate(family, pipe, **more), want, numerics, BOUND) and calls()
    assert torch.equal(generate(family, pipe, **more), want)
    return handle.report, want


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def become(family, names: dict, what: str, **more):
    """The family's tiny pipeline as another class of diffusers; ``names``: that class, for each family that has one."""
    if family not in names:
        pytest.skip(f"diffusers has no {what} pipeline of it")
    pipe = FAMILIES[family].pipe(torch.float32)
    cls = getattr(diffusers, names[family])
    known = inspect.signature(cls.__init__).parameters
    given = dict(pipe.components, requires_safety_checker=False, add_watermarker=False) | more
    return _quiet(cls(**{key: value for key, value in given.items() if key in known}))


def picture(channels=3):
    return torch.rand(1, channels, SIZE["height"], SIZE["width"], generator=torch.Generator().manual_seed(1))


CONTROLNETS = {"SD3.5": "StableDiffusion3ControlNetPipeline", "Flux.1": "FluxControlNetPipeline", "SD1.5": "StableDiffusionControlNetPipeline",
               "SDXL": "StableDiffusionXLControlNetPipeline"}


def controlnet(family):
    torch.manual_seed(2)
    model = FAMILIES[family].model(torch.float32)
    if family == "SD3.5":
        made = diffusers.SD3ControlNetModel.from_transformer(model, num_layers=1, num_extra_conditioning_channels=0)
    elif family == "Flux.1":
        made = diffusers.FluxControlNetModel.from_transformer(model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    else:
        made = diffusers.ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(4, 8))  # two levels, as the autoencoder has
    return randomise(made).eval()  # all that it adds starts at zero


@column("ControlNet")
@BOTH
def test_controlnet(family, numerics):
    if family not in CONTROLNETS:
        pytest.skip("diffusers has no ControlNet of it")
    pipe = become(family, CONTROLNETS, "ControlNet", controlnet=controlnet(family))
    image = {"image" if family.startswith("SD") and family != "SD3.5" else "control_image": picture()}
    report, want = check(family, pipe, numerics, **image, controlnet_conditioning_scale=0.7)
    assert any(entry.name.startswith("controlnet.") for entry in report.swapped)
    assert not same(generate(family, pipe, **image, controlnet_conditioning_scale=0.3), want, "close", 1e-2)


T2I_ADAPTERS = {"SD1.5": "StableDiffusionAdapterPipeline", "SDXL": "StableDiffusionXLAdapterPipeline"}


def t2i_adapter(family, seed=0):
    torch.manual_seed(seed)
    form = dict(adapter_type="full_adapter_xl", downscale_factor=4) if family == "SDXL" else dict(downscale_factor=2)
    return randomise(diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, **form)).eval()


@column("T2I-Adapter")
@pytest.mark.parametrize("count", [1, 2])
@BOTH
def test_t2i_adapter(family, numerics, count):
    adapters = [t2i_adapter(family, seed) for seed in range(count)]
    pipe = become(family, T2I_ADAPTERS, "T2I-Adapter", adapter=adapters[0] if count == 1 else diffusers.MultiAdapter(adapters))
    given = dict(image=picture() if count == 1 else [picture(), 1 - picture()])
    scales = [0.7, 0.3] if count == 1 else [[0.7, 0.2], [0.2, 0.7]]
    report, want = check(family, pipe, numerics, **given, adapter_conditioning_scale=scales[0])
    assert [entry.name.startswith("adapter") and "nothing to fuse" in entry.reason for entry in report.left].count(True) == count
    assert not same(generate(family, pipe, **given, adapter_conditioning_scale=scales[1]), want, "close", 1e-2)


IMG2IMG = {"SD3.5": "StableDiffusion3Img2ImgPipeline", "Flux.1": "FluxImg2ImgPipeline", "SD1.5": "StableDiffusionImg2ImgPipeline",
           "SDXL": "StableDiffusionXLImg2ImgPipeline"}


@column("img2img")
@BOTH
def test_img2img(family, numerics):
    pipe = become(family, IMG2IMG, "img2img", requires_aesthetics_score=False)
    given = dict(strength=0.7, num_inference_steps=4)
    _, want = check(family, pipe, numerics, image=picture(), **given)
    assert not same(generate(family, pipe, image=1 - picture(), **given), want, "close", 1e-2)


INPAINTING = {"SD3.5": "StableDiffusion3InpaintPipeline", "Flux.1": "FluxInpaintPipeline", "SD1.5": "StableDiffusionInpaintPipeline",
              "SDXL": "StableDiffusionXLInpaintPipeline"}


def inpainting(family):
    """The parts that an inpainting pipeline wants beside the family's."""
    parts = dict(requires_aesthetics_score=False)
    if family == "SD3.5":  # this pipeline insists on 16 channels
        parts |= dict(transformer=stock_sd3.stock_model("sd3.5", in_channels=16, out_channels=16), vae=_vae(torch.float32, 16, shift_factor=0.1))
    return parts


@column("inpainting")
@BOTH
def test_inpainting(family, numerics):
    pipe = become(family, INPAINTING, "inpainting", **inpainting(family))
    mask = torch.zeros(1, 1, *SIZE.values())
    mask[..., :12] = 1
    given = dict(image=picture(), strength=0.7, num_inference_steps=4)
    _, want = check(family, pipe, numerics, mask_image=mask, **given)
    assert not same(generate(family, pipe, mask_image=1 - mask, **given), want, "close", 1e-2)


CONDITIONED = {
    "ControlNet": (CONTROLNETS, lambda family: dict(controlnet=controlnet(family)),
                   lambda family: {"image" if family in ("SD1.5", "SDXL") else "control_image": picture(), "controlnet_conditioning_scale": 0.7}),
    "T2I-Adapter": (T2I_ADAPTERS, lambda family: dict(adapter=t2i_adapter(family)), lambda family: dict(image=picture())),
    "img2img": (IMG2IMG, lambda family: dict(requires_aesthetics_score=False), lambda family: dict(image=picture(), strength=0.7, num_inference_steps=4)),
    "inpainting": (INPAINTING, inpainting,
                   lambda family: dict(image=picture(), mask_image=(picture(1) > 0.5).float(), strength=0.7, num_inference_steps=4)),
}


@pytest.mark.parametrize("what", CONDITIONED)
def test_exact_in_bfloat16(family, what):
    """The bits of stock there too; the columns of these are in float32."""
    names, parts, given = CONDITIONED[what]
    pipe = become(family, names, what, **parts(family) if family in names else {}).to(torch.bfloat16)
    _, want = check(family, pipe, "exact", **given(family))
    assert want.isfinite().all() and (not CPU.loaded or any(counts["cpu"] for counts in ops.stats().values()))


@column("model offload")
@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
def test_model_offload(family, numerics, order):
    """accelerate's hooks as ``enable_model_cpu_offload`` puts them there, which itself refuses a machine without an accelerator."""
    pipe = FAMILIES[family].pipe(torch.float32)
    want = generate(family, pipe)

    def offload():
        hook = None
        for name in ("transformer", "unet", "vae"):
            if getattr(pipe, name, None) is not None:
                _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, name), torch.device("cpu"), prev_module_hook=hook)

    if order == "before":
        offload()
    with fusewire.swapped(pipe, numerics):
        if order == "after":
            offload()
        ops.reset_stats()
        assert same(generate(family, pipe), want, numerics, BOUND) and calls()
    assert torch.equal(generate(family, pipe), want) and hasattr(denoiser(pipe), "_hf_hook")


@column("sequential offload")
@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
def test_sequential_offload(family, numerics, order):
    pipe = FAMILIES[family].pipe(torch.float32)
    want = generate(family, pipe)

    def offload():
        for model in (denoiser(pipe), pipe.vae):
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        assert next(denoiser(pipe).parameters()).is_meta

    if order == "before":
        offload()
    with fusewire.swapped(pipe, numerics):
        if order == "after":
            offload()
        ops.reset_stats()
        assert same(generate(family, pipe), want, numerics, BOUND) and calls()
    assert torch.equal(generate(family, pipe), want)


PAG = {"SD3.5": "StableDiffusion3PAGPipeline", "SD1.5": "StableDiffusionPAGPipeline", "SDXL": "StableDiffusionXLPAGPipeline",
       "PixArt": "PixArtSigmaPAGPipeline"}


@column("perturbed attention guidance (PAG)")
@BOTH
def test_pag(family, numerics):
    layers = "mid" if family in ("SD1.5", "SDXL") else "blocks.1"
    pipe = become(family, PAG, "PAG", pag_applied_layers=[layers])
    square = dict(height=32, width=32)  # the joint attention of SD3 wants a square grid of tokens
    _, want = check(family, pipe, numerics, pag_scale=2.0, **square)
    assert not same(generate(family, pipe, pag_scale=0.0, **square), want, "close", 1e-3)


STACKS = {"SD1.5": "mid_block.attentions.0.transformer_blocks", "SDXL": "mid_block.attentions.0.transformer_blocks"}


@column("skip-layer guidance")
@BOTH
def test_skip_layer_guidance(family, numerics):
    """As SD3's pipeline does it, and as diffusers' guiders do it in any model: by hooks on a block."""
    made = FAMILIES[family]
    if family == "SD3.5":
        pipe = made.pipe(torch.float32)
        given = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
        _, want = check(family, pipe, numerics, **given)
        assert not same(generate(family, pipe), want, "close", 1e-3)
    model, inputs = made.model(torch.float32), made.inputs()
    plain = run(model, inputs)
    skips = [dict(skip_attention=False)]
    if family not in ("SD3.5", "Flux.1"):  # stock's hooks on an attention fail there
        skips += [dict(skip_ff=False), dict(skip_attention=False, skip_ff=False, skip_attention_scores=True)]
    for skip in skips:
        config = LayerSkipConfig(indices=[0], fqn=STACKS.get(family, "transformer_blocks"), **skip)
        with fusewire.swapped(model, numerics):
            apply_layer_skip(model, config)
            ops.reset_stats()
            got = run(model, inputs)
            assert calls()
        want = run(model, inputs)
        assert same(got, want, numerics) and not same(want, plain, "close", 1e-4), skip
        with fusewire.swapped(model, numerics):
            assert same(run(model, inputs), want, numerics), skip
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("layer_skip_hook")
        assert torch.equal(run(model, inputs), plain)
