"""LoRA (peft), IP-Adapter and PAG processors, quantised weights: kept working, whichever came first."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0, PAGJointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.nn.utils import parametrize

import fusewire
from fusewire import ops
from tests.models import stock_unet
from tests.models.stock_sd3 import randomise
from tests.swap.tiny import generate, inputs, run, stock_model, tiny_pipeline
from tests.tolerance import MODEL_FLOAT32, PIPELINE_FLOAT32

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm1.linear", "norm1_context.linear", "net.0.proj", "net.2"]


def add_lora(model, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(order, numerics):
    model = stock_model("sd3.5")
    data = inputs()
    # What stock gives in each state (disabled and deleted adapters leave peft's wrappers, and last bits other than those without them).
    plain = run(model, data)
    add_lora(model)
    want, scaled = run(model, data), run(model, data, joint_attention_kwargs={"scale": 0.5})
    assert (want - plain).abs().max() > 1e-2 and (scaled - want).abs().max() > 1e-2
    model.disable_lora()
    disabled = run(model, data)
    model.enable_lora()

    def same(got, wanted):
        return torch.equal(got, wanted) if numerics == "exact" else (got - wanted).abs().max() <= MODEL_FLOAT32

    if order == "after":
        model.delete_adapters("default")
        plain = run(model, data)
    handle = fusewire.swap(model, numerics)
    if order == "after":
        assert same(run(model, data), plain)
        add_lora(model)
    ops.reset_stats()
    assert same(run(model, data), want) and same(run(model, data, joint_attention_kwargs={"scale": 0.5}), scaled)
    assert sum(ops.stats()["gate_residual_adaln"].values())
    model.disable_lora()
    assert same(run(model, data), disabled)
    model.enable_lora()
    handle.restore()
    assert torch.equal(run(model, data), want)
    with fusewire.swapped(model, numerics):
        model.fuse_lora()
        assert (run(model, data) - want).abs().max() <= MODEL_FLOAT32
        model.unfuse_lora()


def test_lora_in_the_report_of_close():
    model = stock_model("sd3.5")
    add_lora(model)
    with fusewire.swapped(model, "close", strict=True) as handle:
        left = {entry.name: entry.reason for entry in handle.report.left}
    assert left["transformer_blocks.0.attn.to_q"] == "peft's Linear is called as it is" and left["transformer_blocks.1.ff.net.2"]


def test_lora_trains_through_the_swap():
    model = stock_model("sd3.5")
    add_lora(model)
    data = inputs()

    def gradients():
        model.zero_grad()
        model(**data, return_dict=False)[0].square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    want = gradients()
    assert want and all("lora" in name for name in want)
    for numerics in ("exact", "close"):
        with fusewire.swapped(model, numerics):
            got = gradients()
        assert got.keys() == want.keys()
        assert all((got[name] - want[name]).abs().max() <= MODEL_FLOAT32 * want[name].abs().max() + 1e-7 for name in want)


def test_load_lora_weights_into_a_swapped_pipeline():
    pipe = tiny_pipeline()
    add_lora(pipe.transformer)
    state = {f"transformer.{key}": value for key, value in get_peft_model_state_dict(pipe.transformer).items()}
    want = generate(pipe)
    pipe.unload_lora_weights()
    plain = generate(pipe)
    with fusewire.swapped(pipe):
        pipe.load_lora_weights(state)
        assert torch.equal(generate(pipe), want) and not torch.equal(want, plain)
        pipe.unload_lora_weights()
        assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_ip_adapter_processors_are_never_replaced(order, numerics):
    model = stock_model("sd3")
    data = inputs()
    torch.manual_seed(1)
    processors = {name: randomise(SD3IPAdapterJointAttnProcessor2_0(hidden_size=32, ip_hidden_states_dim=24, head_dim=16, timesteps_emb_dim=32, scale=0.7))
                  for name in model.attn_processors}
    image = dict(joint_attention_kwargs={"ip_hidden_states": torch.randn(2, 3, 24), "temb": torch.randn(2, 32)})
    plain = run(model, data)
    model.set_attn_processor(dict(processors))
    want = run(model, data, **image)
    assert (want - plain).abs().max() > 1e-3
    if order == "after":
        model.set_attn_processor(JointAttnProcessor2_0())
    handle = fusewire.swap(model, numerics)
    if order == "after":
        model.set_attn_processor(dict(processors))
    got = run(model, data, **image)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= MODEL_FLOAT32
    handle.restore()
    assert model.attn_processors == processors and torch.equal(run(model, data, **image), want)


def test_pag_processor_set_after_the_swap():
    model = stock_model("sd3")
    data = inputs(4, 8, 8)  # PAG wants a square grid of tokens, and half of the batch perturbed
    with fusewire.swapped(model):
        model.transformer_blocks[0].attn.set_processor(PAGJointAttnProcessor2_0())
        got = run(model, data)
    assert torch.equal(got, run(model, data))
    model.set_attn_processor(JointAttnProcessor2_0())
    assert not torch.equal(got, run(model, data))


class HalfWeight(torch.Tensor):
    """A weight that is stored in another form than it is used in, as quantised weights are: only the layer's own call knows how to use it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *rest = args
            return function(x, 2 * weight.as_subclass(torch.Tensor), *rest, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_a_weight_of_a_tensor_subclass_is_not_read(numerics):
    model = stock_model("sd3.5")
    data = inputs(2, 16, 16, 40)  # enough rows for the fused linear
    want = run(model, data)
    for block in model.transformer_blocks:
        for layer in (block.attn.to_k, block.ff.net[0].proj, block.ff.net[2]):
            layer.weight = nn.Parameter((layer.weight.data / 2).as_subclass(HalfWeight), requires_grad=False)
    assert torch.equal(run(model, data), want)
    with fusewire.swapped(model, numerics) as handle:
        got = run(model, data)
        assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= MODEL_FLOAT32
    if numerics == "close":
        assert any("HalfWeight weight is called as it is" in entry.reason for entry in handle.report.left)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_a_parametrisation_put_there_after_the_swap_outlives_it(numerics):
    """torch derives a class from that of the module, ours, to hold the weight as a property."""
    model, data = stock_unet.unet(), stock_unet.unet_inputs()
    plain = run(model, data)
    parts = [model.conv_norm_out, model.conv_in]
    stock = [type(part) for part in parts]
    for part in parts:
        parametrize.register_parametrization(part, "weight", Doubled())
    want = run(model, data)
    for part in parts:
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
    assert torch.equal(run(model, data), plain) and not torch.equal(plain, want)

    handle = fusewire.swap(model, numerics)
    for part in parts:
        parametrize.register_parametrization(part, "weight", Doubled())
    got = run(model, data)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= PIPELINE_FLOAT32 * want.abs().max()
    with fusewire.swapped(model, numerics):
        assert torch.equal(run(model, data), got)
    assert torch.equal(run(model, data), got)
    handle.restore()
    assert torch.equal(run(model, data), want) and all(parametrize.is_parametrized(part, "weight") for part in parts)
    for part in parts:
        parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
    assert torch.equal(run(model, data), plain) and [type(part) for part in parts] == stock
