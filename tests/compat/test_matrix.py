"""Everything that users do to a pipeline, for each family: it works swapped as it does stock. Each test is a column of the compatibility matrix."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig
from torch import nn

import fusewire
from fusewire import ops
from tests.compat.families import FAMILIES, SMALL, SMALLEST, call
from tests.models import stock_sd3
from tests.tolerance import PIPELINE_FLOAT32

BOTH = pytest.mark.parametrize("numerics", ["exact", "close"])
pytestmark = pytest.mark.parametrize("family", FAMILIES)


def column(name):
    return pytest.mark.column(name)


@torch.no_grad()
def run(model, inputs):
    return call(model, inputs)


def same(got, want, numerics, bound=2e-5):
    """exact: the bits; close: within float32's rounding over a tiny model."""
    return torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= bound * max(1.0, want.abs().max().item())


def calls() -> int:
    return sum(sum(served.values()) for served in ops.stats().values())


def tiny(family, dtype=torch.float32, **changes):
    made = FAMILIES[family]
    return made.model(dtype, **changes), made.inputs(dtype=dtype)


@column("`exact`: torch.equal, one call, float32, bfloat16, float16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_denoiser(family, dtype):
    model, inputs = tiny(family, dtype)
    want = run(model, inputs)
    with fusewire.swapped(model):
        ops.reset_stats()
        assert torch.equal(run(model, inputs), want) and calls()


@column("`exact`: torch.equal, whole pipeline, float32 and bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_pipeline(family, dtype):
    made = FAMILIES[family]
    pipe = made.pipe(dtype)
    want = made.generate(pipe, batch=2)
    with fusewire.swapped(pipe):
        ops.reset_stats()
        assert torch.equal(made.generate(pipe, batch=2), want) and calls()
    assert torch.equal(made.generate(pipe, batch=2), want)


@column("restore: torch.equal")
@BOTH
def test_restore(family, numerics):
    model, inputs = tiny(family)
    want, before = run(model, inputs), [type(module) for module in model.modules()]
    handle = fusewire.swap(model, numerics)
    run(model, inputs)
    assert [type(module) for module in model.modules()] != before
    handle.restore()
    assert [type(module) for module in model.modules()] == before and torch.equal(run(model, inputs), want)
    assert not [key for module in model.modules() for key in vars(module) if "fusewire" in key]


@column("state-dict keys equal")
@BOTH
def test_state_dict_keys(family, numerics):
    model, _ = tiny(family)
    keys = list(model.state_dict())
    with fusewire.swapped(model, numerics):
        assert list(model.state_dict()) == keys


@column("deepcopy and pickle")
@BOTH
def test_copies(family, numerics):
    model, inputs = tiny(family)
    with fusewire.swapped(model, numerics):
        want = run(model, inputs)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert not torch.equal(run(model, inputs), want) or numerics == "exact"
    for twin in twins:
        ops.reset_stats()
        assert torch.equal(run(twin, inputs), want) and calls()


@column("save_pretrained, from_pretrained")
def test_saved(family, tmp_path):
    model, inputs = tiny(family)
    want = run(model, inputs)
    with fusewire.swapped(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model) and torch.equal(run(loaded, inputs), want)
    with fusewire.swapped(loaded):
        assert torch.equal(run(loaded, inputs), want)


def add_lora(model, family, name="default", seed=0):
    if not hasattr(model, "add_adapter"):
        pytest.skip("diffusers' class takes no adapters")
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(FAMILIES[family].linears), init_lora_weights="gaussian"), adapter_name=name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key and name in key:
                parameter.normal_(std=0.3)


@column("LoRA before the swap")
@BOTH
def test_lora_before(family, numerics):
    model, inputs = tiny(family)
    plain = run(model, inputs)
    add_lora(model, family)
    want = run(model, inputs)
    assert (want - plain).abs().max() > 1e-3
    with fusewire.swapped(model, numerics):
        assert same(run(model, inputs), want, numerics)


@column("LoRA after the swap")
@BOTH
def test_lora_after(family, numerics):
    model, inputs = tiny(family)
    twin = copy.deepcopy(model)
    add_lora(twin, family)
    with fusewire.swapped(model, numerics):
        add_lora(model, family)
        assert same(run(model, inputs), run(twin, inputs), numerics)


@column("LoRA fused, unfused, unloaded")
@BOTH
def test_lora_fused(family, numerics):
    model, inputs = tiny(family)
    plain = run(model, inputs)
    add_lora(model, family)
    want = run(model, inputs)
    with fusewire.swapped(model, numerics):
        model.fuse_lora()
        assert same(run(model, inputs), want, "close", 1e-4)
        model.unfuse_lora()
        model.delete_adapters("default")
        assert same(run(model, inputs), plain, "close", 1e-4)  # fusing and unfusing rounds the weights


@column("two LoRAs with weights")
@BOTH
def test_two_loras(family, numerics):
    model, inputs = tiny(family)
    add_lora(model, family, "one")
    add_lora(model, family, "two", seed=1)
    model.set_adapters(["one", "two"], [0.3, 0.8])
    want = run(model, inputs)
    with fusewire.swapped(model, numerics):
        assert same(run(model, inputs), want, numerics)
        model.set_adapters(["one", "two"], [0.8, 0.3])
        other = run(model, inputs)
    assert not same(other, want, "close") and same(run(model, inputs), other, numerics)


@column("group offload")
@BOTH
def test_group_offload(family, numerics):
    model, inputs = tiny(family)
    want = run(model, inputs)
    with fusewire.swapped(model, numerics):
        apply_group_offloading(model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
        ops.reset_stats()
        assert same(run(model, inputs), want, numerics) and calls()


@column("layerwise casting")
@BOTH
def test_layerwise_casting(family, numerics):
    model, inputs = tiny(family, torch.bfloat16)
    twin = copy.deepcopy(model)
    options = dict(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16, skip_modules_pattern=("norm", "pos_embed", "proj_out"))
    apply_layerwise_casting(twin, **options)
    want = run(twin, inputs)
    with fusewire.swapped(model, numerics):
        apply_layerwise_casting(model, **options)
        got = run(model, inputs)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).float().norm() <= 0.03 * want.float().norm()


@column("`torch.compile`, fullgraph")
@pytest.mark.parametrize("numerics", [pytest.param("exact", marks=pytest.mark.slow), "close"])  # exact: the next test, block by block
def test_compile(family, numerics):
    model, inputs = tiny(family, **SMALL[family])
    want = run(model, inputs)
    with fusewire.swapped(model, numerics):
        got = run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    assert same(got, want, "close")


@column("`compile_repeated_blocks`")
@BOTH
def test_compile_repeated_blocks(family, numerics):
    model, inputs = tiny(family)
    want = run(model, inputs)
    model._repeated_blocks = [FAMILIES[family].block]
    with fusewire.swapped(model, numerics):
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert any(module._compiled_call_impl is not None for module in model.modules())
        assert same(run(model, inputs), want, "close")


def no_recompilation(model, sizes, want) -> None:
    compiled = torch.compile(model, backend="eager", dynamic=True)
    run(compiled, sizes[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert same(run(compiled, sizes[1]), want[1], "close")


@column("two resolutions, no recompilation")
@BOTH
def test_two_resolutions(family, numerics):
    model = FAMILIES[family].model(torch.float32, **SMALLEST[family])
    sizes = [FAMILIES[family].inputs(large=large) for large in (False, True, False)]
    want = [run(model, inputs) for inputs in sizes]
    with fusewire.swapped(model, numerics):
        assert all(same(run(model, inputs), value, numerics) for inputs, value in zip(sizes, want))
        if numerics == "close":  # in exact: the next test
            no_recompilation(model, sizes, want)


@pytest.mark.slow
@column("two resolutions, no recompilation")
def test_two_resolutions_compiled_in_exact(family):
    model = FAMILIES[family].model(torch.float32, **SMALLEST[family])
    sizes = [FAMILIES[family].inputs(large=large) for large in (False, True)]
    want = [run(model, inputs) for inputs in sizes]
    with fusewire.swapped(model, "exact"):
        no_recompilation(model, sizes, want)


@column("batch 1, 2, 5")
@BOTH
def test_batches(family, numerics):
    model = FAMILIES[family].model(torch.float32)
    for batch in (1, 2, 5):
        inputs = FAMILIES[family].inputs(batch=batch)
        want = run(model, inputs)
        with fusewire.swapped(model, numerics):
            assert same(run(model, inputs), want, numerics)


@column("channels_last")
@BOTH
def test_channels_last(family, numerics):
    model, inputs = tiny(family)
    picture = next(key for key, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim() >= 3)
    if inputs[picture].dim() != 4:
        pytest.skip("its latents are tokens")
    model = model.to(memory_format=torch.channels_last)
    inputs[picture] = inputs[picture].to(memory_format=torch.channels_last)
    want = run(model, inputs)
    with fusewire.swapped(model, numerics):
        got = run(model, inputs)
    assert same(got, want, numerics) and got.stride() == want.stride()


@column("autocast")
@BOTH
def test_autocast(family, numerics):
    model, inputs = tiny(family)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model, inputs)
        with fusewire.swapped(model, numerics):
            got = run(model, inputs)
    assert got.dtype is want.dtype
    assert torch.equal(got, want) if numerics == "exact" else (got - want).float().norm() <= 0.03 * want.float().norm()


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(0)  # DiT drops class labels at random in training
    call(model, inputs).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@column("a training step")
@BOTH
def test_training(family, numerics):
    model, inputs = tiny(family)
    want = gradients(model, inputs)
    with fusewire.swapped(model, numerics):
        got = gradients(model, inputs)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= PIPELINE_FLOAT32 * want[name].abs().max() + 1e-6, name


@column("gradient checkpointing")
@BOTH
def test_checkpointing(family, numerics):
    model, inputs = tiny(family)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    want = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    with fusewire.swapped(model, numerics):
        got = gradients(model, inputs)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= PIPELINE_FLOAT32 * want[name].abs().max() + 1e-6, name


class Quantised(nn.Linear):
    """A linear whose weight must not be read as it is, as quantised ones have it."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / 2, self.bias)


@column("quantised linear subclasses left alone")
@BOTH
def test_quantised(family, numerics):
    model, inputs = tiny(family)
    plain = run(model, inputs)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Quantised
    want = run(model, inputs)
    assert (want - plain).abs().max() > 1e-3
    with fusewire.swapped(model, numerics):
        assert same(run(model, inputs), want, numerics)


@column("`fuse_qkv_projections`")
@BOTH
def test_fused_projections(family, numerics):
    model, inputs = tiny(family)
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip("diffusers' class has no such method")
    if family == "SD3.5":  # stock fails where there is a second attention
        model = stock_sd3.stock_model("sd3.5", dual_attention_layers=())
    twin = copy.deepcopy(model)
    twin.fuse_qkv_projections()
    want = run(twin, inputs)
    with fusewire.swapped(model, numerics):
        model.fuse_qkv_projections()
        assert same(run(model, inputs), want, numerics)
    with fusewire.swapped(twin, numerics):
        assert same(run(twin, inputs), want, numerics)


@column("step-end callbacks")
@BOTH
def test_callbacks(family, numerics):
    made = FAMILIES[family]
    pipe = made.pipe(torch.float32)
    known = inspect.signature(type(pipe).__call__).parameters
    if not known.keys() & {"callback_on_step_end", "callback"}:
        pytest.skip("its pipeline takes no callback")
    steps = []

    def halved(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": tensors["latents"] / 2}

    def halved_in_place(step, timestep, latents):  # PixArt's callback returns nothing
        steps.append(step)
        latents /= 2

    given = dict(callback_on_step_end=halved) if "callback_on_step_end" in known else dict(callback=halved_in_place, callback_steps=2)
    want, stock = made.generate(pipe, **given), steps.copy()
    steps.clear()
    with fusewire.swapped(pipe, numerics):
        assert same(made.generate(pipe, **given), want, numerics, 2e-4) and steps == stock != []
    assert not torch.equal(want, made.generate(pipe))


@column("VAE tiling and slicing")
@BOTH
def test_vae_tiling(family, numerics):
    pipe = FAMILIES[family].pipe(torch.float32)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
    latents = torch.randn(2, 4, 12, 10)

    def decoded():
        with torch.no_grad():
            return pipe.vae.decode(latents, return_dict=False)[0]

    want = decoded()
    with fusewire.swapped(pipe, numerics):
        ops.reset_stats()
        assert same(decoded(), want, numerics) and calls()
