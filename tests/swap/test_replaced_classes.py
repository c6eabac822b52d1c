"""What users put in the place of a method for all of a class of diffusers', of its functions, or of PyTorch's attention: it is what runs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformerBlock
from torch import nn
from torch.overrides import TorchFunctionMode

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.swap.fused import stock_of
from tests.compat.families import FAMILIES, call
from tests.models import stock_unet
from tests.swap.test_replaced import trajectory

METHODS = [("SD3.5", JointTransformerBlock, "forward"), ("SD3.5", JointAttnProcessor2_0, "__call__"), ("SD1.5", BasicTransformerBlock, "forward"),
           ("SD1.5", ResnetBlock2D, "forward"), ("SD1.5", Attention, "forward"), ("SD1.5", AttnProcessor2_0, "__call__"), ("SD1.5", FeedForward, "forward"),
           ("Flux.1", FluxTransformerBlock, "forward"), ("Flux.1", FluxAttnProcessor, "__call__")]
both = pytest.mark.parametrize("numerics", ("exact", "close"))


def scaled(result):
    return tuple(scaled(part) for part in result) if isinstance(result, tuple) else result if result is None else result * 1.25


def near(got, want, numerics: str) -> bool:
    return torch.equal(got, want) if numerics == "exact" else torch.allclose(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


@both
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
@pytest.mark.parametrize("family, cls, name", METHODS, ids=lambda value: getattr(value, "__name__", value))
@torch.no_grad()
def test_a_method_of_a_class(family, cls, name, first, numerics, monkeypatch):
    model, given = FAMILIES[family].model(torch.float32).eval(), FAMILIES[family].inputs()
    plain, original = call(model, given), getattr(cls, name)
    fusewire.swap(model, numerics).restore()  # the families are loaded: they have seen what was there
    if not first:
        fusewire.swap(model, numerics)
        ops.reset_stats()
        assert near(call(model, given), plain, numerics)
        assert not CPU.loaded or any(counts["cpu"] for counts in ops.stats().values())
    monkeypatch.setattr(cls, name, lambda self, *args, **kwargs: scaled(original(self, *args, **kwargs)))
    with fusewire.swapped(copy.deepcopy(model), numerics) as handle:
        reasons = {entry.reason for entry in handle.report.left}
    assert f"{cls.__name__}.{name} was replaced" in reasons or numerics == "exact" and cls in (Attention, AttnProcessor2_0, FeedForward)
    if first:
        fusewire.swap(model, numerics)
    got = call(model, given)
    fusewire.restore(model)
    want = call(model, given)
    assert near(got, want, numerics) and not torch.allclose(want, plain, rtol=1e-3)


@both
@pytest.mark.parametrize("cls", (DDIMScheduler, EulerDiscreteScheduler))
def test_the_step_of_a_scheduler(cls, numerics, monkeypatch):
    scheduler, original = cls(), cls.step
    plain = trajectory(scheduler)
    fusewire.swap(scheduler, numerics)

    def step(self, model_output, *args, **kwargs):
        return original(self, model_output * 0.5, *args, **kwargs)

    monkeypatch.setattr(cls, "step", step)
    want = trajectory(cls())
    assert torch.equal(trajectory(scheduler), want) and not torch.equal(want, plain)
    with pytest.raises(ValueError, match="step was replaced"):
        fusewire.swap(cls(), numerics)


@both
@pytest.mark.parametrize("name", ("apply_rotary_emb", "dispatch_attention_fn"))
@torch.no_grad()
def test_a_function_of_flux(name, numerics, monkeypatch):
    model, given = FAMILIES["Flux.1"].model(torch.float32).eval(), FAMILIES["Flux.1"].inputs()
    fusewire.swap(model, numerics)
    call(model, given)
    original = getattr(transformer_flux, name)
    monkeypatch.setattr(transformer_flux, name, lambda *args, **kwargs: original(*args, **kwargs) * 1.25)
    got = call(model, given)
    fusewire.restore(model)
    assert near(got, call(model, given), numerics)


class Stronger(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch._C._nn.scaled_dot_product_attention:
            self.calls += 1
            result = result * 1.5
        return result


@both
@pytest.mark.parametrize("by", ("mode", "function"))
@pytest.mark.parametrize("family", ("SD3.5", "Flux.1", "SD1.5"))
@torch.no_grad()
def test_pytorchs_attention(family, by, numerics, monkeypatch):
    """As attention recorders and drop-in attention libraries take it over."""
    model, given = FAMILIES[family].model(torch.float32).eval(), FAMILIES[family].inputs()
    original, calls = F.scaled_dot_product_attention, []

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * 1.5

    def output() -> tuple[torch.Tensor, int]:
        calls.clear()
        if by == "mode":
            with Stronger() as mode:
                return call(model, given), mode.calls
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", mine)
            return call(model, given), len(calls)

    want, asked = output()
    fusewire.swap(model, numerics)
    got, asked_of_ours = output()
    assert asked_of_ours == asked > 0 and near(got, want, numerics)
    if numerics == "close":
        ops.reset_stats()
        with torch.device("cpu"):  # a function mode, too
            call(model, given)
        assert not CPU.loaded or any(counts["cpu"] for name, counts in ops.stats().items() if "attention" in name)


@both
def test_replicas(numerics):
    """As ``DataParallel`` makes them, and inductor's freezing: a new object of the class, and the old one's attributes."""
    model, given = FAMILIES["SD1.5"].model(torch.float32).eval(), FAMILIES["SD1.5"].inputs()
    fusewire.swap(model, numerics)
    for part in model.modules():
        replica = part._replicate_for_data_parallel()
        assert type(replica) is type(part)
    block = next(part for part in model.modules() if isinstance(part, ResnetBlock2D))
    x, time = torch.randn(1, block.in_channels, 8, 8), torch.randn(1, block.time_emb_proj.in_features)
    with torch.no_grad():
        replica = type(block).__new__(type(block))
        replica.__dict__ = block.__dict__.copy()
        assert torch.equal(replica(x, time), block(x, time))


@both
def test_a_model_in_a_pipeline_that_became_a_copy(numerics):
    """``pipe.unet = quantize_dynamic(pipe.unet, ...)`` copies it."""
    pipe = StableDiffusionPipeline(vae=stock_unet.vae(torch.float32), text_encoder=None, tokenizer=None, unet=stock_unet.unet("sd", torch.float32),
                                   scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    handle = fusewire.swap(pipe, numerics)
    pipe.unet = copy.deepcopy(pipe.unet)
    assert any(stock_of(part) for part in pipe.unet.modules())
    handle.restore()
    assert not any(stock_of(part) for model in (pipe.unet, pipe.vae) for part in model.modules()) and stock_of(pipe.scheduler) is None


@both
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
@pytest.mark.parametrize("change", (lambda block: block.ff.net.append(nn.Dropout(0.0)), lambda block: block.ff.net.__delitem__(1),
                                    lambda block: block.attn1.to_out.append(nn.Identity())), ids=("more", "fewer", "out"))
@torch.no_grad()
def test_layers_added_and_taken_away(change, first, numerics):
    model, given = FAMILIES["SD1.5"].model(torch.float32).eval(), FAMILIES["SD1.5"].inputs()
    if not first:
        fusewire.swap(model, numerics)
    for block in model.modules():
        if isinstance(block, BasicTransformerBlock):
            change(block)
    if first:
        fusewire.swap(model, numerics)
    ops.reset_stats()
    got = call(model, given)
    assert not CPU.loaded or ops.stats()["group_norm_silu"]["cpu"]
    fusewire.restore(model)
    assert near(got, call(model, given), numerics)
