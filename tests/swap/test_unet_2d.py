"""diffusers' unconditional ``UNet2DModel``: DDPM and DDIM pipelines from noise to the picture, as DDPM and Guided Diffusion (ADM) have it, and the
blocks that only this model is built of."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import fusewire
from fusewire import ops
from fusewire.swap import engine
from fusewire.swap.report import SwapError, SwapWarning
from tests.models.stock_sd3 import randomise
from tests.models.test_unet import GUIDED
from tests.swap.whole import check, quiet, served
from tests.tolerance import MODEL_FLOAT32

CASES = pytest.mark.parametrize("numerics, dtype", [("exact", torch.float32), ("exact", torch.bfloat16), ("close", torch.float32)], ids=str)
BOTH = pytest.mark.parametrize("numerics", ["exact", "close"])
SIZE = (16, 24)
# google/ddpm-cat-256 and its kin: attention on one level, resampled by convolutions that pad at the bottom and at the right
DDPM = dict(sample_size=SIZE, block_out_channels=(16, 16, 32), layers_per_block=2, norm_num_groups=4, norm_eps=1e-6, downsample_padding=0, freq_shift=1,
            flip_sin_to_cos=False, attention_head_dim=None, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
# ADM: the embedding as scale and shift, resampled inside residual blocks, several heads; the same with the noise's variance learned
ADM = dict(GUIDED, sample_size=SIZE, in_channels=3, out_channels=3, num_class_embeds=None, downsample_type="resnet", upsample_type="resnet")
# NCSN++ (score SDE): pictures at every level go beside the features, filtered
SKIP = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=None, attention_head_dim=8, mid_block_scale_factor=2**0.5,
            time_embedding_type="fourier", down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"))
MODELS = {"ddpm": DDPM, "adm": ADM, "adm, learned variance": dict(ADM, out_channels=6), "ncsn++": SKIP,
          "ncsn++, attention outside": dict(SKIP, down_block_types=SKIP["down_block_types"][::-1], up_block_types=SKIP["up_block_types"][::-1]),
          "classes": dict(ADM, num_class_embeds=6), "no attention": dict(DDPM, add_attention=False, down_block_types=("DownBlock2D",) * 3,
                                                                         up_block_types=("UpBlock2D",) * 3)}


def model(kind: str, dtype: torch.dtype = torch.float32) -> UNet2DModel:
    torch.manual_seed(8)
    return randomise(UNet2DModel(**MODELS[kind])).eval().to(dtype)


def inputs(kind: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict:
    size, draw = MODELS[kind]["sample_size"], torch.Generator().manual_seed(9)
    sample = torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size), generator=draw).to(dtype)
    given = dict(sample=sample, timestep=torch.tensor([17.0, 500.0][:batch]))
    return dict(given, class_labels=torch.tensor([1, 4][:batch])) if kind == "classes" else given


@torch.no_grad()
def run(unet, data: dict) -> torch.Tensor:
    return unet(**data).sample


PIPELINES = {"DDPM": (DDPMPipeline, DDPMScheduler(), "ddpm", {}), "DDPM of ADM": (DDPMPipeline, DDPMScheduler(beta_schedule="squaredcos_cap_v2"), "adm", {}),
             "DDPM, learned variance": (DDPMPipeline, DDPMScheduler(variance_type="learned_range"), "adm, learned variance", {}),
             "DDIM": (DDIMPipeline, DDIMScheduler(), "ddpm", {}),
             "DDIM of ADM, noise added": (DDIMPipeline, DDIMScheduler(), "adm", dict(eta=0.7, use_clipped_model_output=True))}


def generate(pipe, **more) -> torch.Tensor:
    return pipe(**dict(batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt") | more).images


@CASES
@pytest.mark.filterwarnings("ignore::fusewire.swap.report.SwapWarning")
@pytest.mark.parametrize("name", PIPELINES)
def test_from_noise_to_the_picture(name, numerics, dtype):
    cls, scheduler, kind, more = PIPELINES[name]
    pipe = quiet(cls(unet=model(kind, dtype), scheduler=type(scheduler).from_config(scheduler.config)))
    report, ran, want = check(pipe, lambda pipe: generate(pipe, **more), numerics)
    assert want.shape == (2, 3, *SIZE) and not torch.equal(want[0], want[1])
    assert {entry.name.split(".")[0] for entry in report.swapped} == {"unet", "scheduler"} and {"group_norm_silu", "solver_step"} <= ran
    assert {"attention", "linear"} <= ran if numerics == "close" else not {"attention", "linear"} & ran
    assert not torch.equal(generate(pipe, **more, generator=torch.Generator().manual_seed(1)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_exact_is_equal_to_stock(kind, dtype):
    unet, data = model(kind, dtype), inputs(kind, dtype)
    want = run(unet, data)
    with fusewire.swapped(unet, strict=True):
        ops.reset_stats()
        assert torch.equal(run(unet, data), want) and set(served()) == {"group_norm_silu"}
    assert torch.equal(run(unet, data), want)


@pytest.mark.parametrize("kind", MODELS)
def test_close_is_close_to_stock(kind):
    unet, data = model(kind), inputs(kind)
    want = run(unet, data)
    with fusewire.swapped(unet, "close", strict=True) as handle:
        ops.reset_stats()
        got = run(unet, data)
        assert set(served()) == {"group_norm_silu"} | ({"attention", "linear"} if kind != "no attention" else set())
        assert {"convolution", "group_norm_silu"} <= {entry.op for entry in handle.report.swapped} and not handle.report.left
    assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@BOTH
@pytest.mark.parametrize("kind", MODELS)
def test_every_norm_and_attention_is_in_the_report(kind, numerics):
    unet = model(kind)
    norms = {name for name, module in unet.named_modules() if isinstance(module, torch.nn.GroupNorm) and "attentions" not in name}
    attentions = {name for name, module in unet.named_modules() if type(module).__name__ == "Attention"}
    with fusewire.swapped(unet, numerics) as handle:
        carried = {entry.name for entry in handle.report.swapped if entry.op == "group_norm_silu"}
        named = {entry.name for entry in (handle.report.left if numerics == "exact" else handle.report.swapped) if entry.op == "attention"}
    assert {name.removesuffix(".norm1").removesuffix(".norm2") for name in norms} == carried and named == attentions


def test_residual_blocks_with_conditioned_norms_are_named(monkeypatch):
    monkeypatch.setattr(engine, "_warned", set())
    unet = randomise(UNet2DModel(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, down_block_types=("KDownBlock2D",) * 2,
                                 up_block_types=("KUpBlock2D",) * 2)).eval()
    reason = "ResnetBlockCondNorm2D is not a block that we know"
    data = inputs("ncsn++")
    want = run(unet, data)
    with pytest.warns(SwapWarning, match=f"group_norm_silu stays stock in 4 modules: {reason}"):
        handle = fusewire.swap(unet)
    assert torch.equal(run(unet, data), want)
    handle.restore()
    with pytest.raises(SwapError, match=reason):
        fusewire.swap(unet, strict=True)
