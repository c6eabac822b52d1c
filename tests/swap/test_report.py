"""What ``swap`` finds where it swaps nothing: models unknown to it, somebody's own classes, quantised linears, compiled and swapped modules. All named."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DanceDiffusionPipeline, DDIMScheduler, SD3Transformer2DModel, UNet1DModel
from diffusers.models.attention import JointTransformerBlock
from torch import nn
from torch.distributed.fsdp import FSDPModule
from typer.testing import CliRunner

import fusewire
from fusewire import ops
from fusewire.cli import app
from fusewire.swap import custom, engine
from fusewire.swap.report import SwapError, SwapWarning
from tests.swap.tiny import inputs, run, stock_model, tiny_pipeline

BOTH = pytest.mark.parametrize("numerics", ["exact", "close"])


@pytest.fixture(autouse=True)
def warned_of_nothing(monkeypatch):
    monkeypatch.setattr(engine, "_warned", set())


def reasons(entries) -> dict:
    return {(entry.name, entry.op): entry.reason for entry in entries}


def dry_run(folder, *arguments) -> dict:
    result = CliRunner().invoke(app, ["swap", "--dry-run", str(folder), "--json", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_unknown_denoiser_beside_a_known_scheduler(tmp_path):
    unet = UNet1DModel(sample_size=8, block_out_channels=(8, 8, 16), norm_num_groups=4, layers_per_block=1)
    reason = "UNet1DModel is not a model that we know, nor is a block of it"
    pipe = SimpleNamespace(components=dict(unet=unet, twin=unet, other=nn.Linear(2, 2), scheduler=DDIMScheduler()))
    with pytest.warns(SwapWarning, match=f"model stays stock in 1 module: {reason}"):
        handle = fusewire.swap(pipe)
    assert [entry.op for entry in handle.report.swapped] == ["solver_step"] and f"left  model: unet ({reason})" in str(handle.report)
    assert reasons(handle.report.left) == {("unet", "model"): reason, ("other", "model"): reason.replace("UNet1DModel", "Linear")}
    handle.restore()
    with pytest.raises(SwapError, match=reason):
        fusewire.swap(pipe, strict=True)
    assert not fusewire.swap(pipe, only="solver_step").report.left
    DanceDiffusionPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    assert [(entry["name"], entry["reason"]) for entry in dry_run(tmp_path)["left"]] == [("unet", reason)]


class OwnBlock(JointTransformerBlock):
    pass


class OwnModel(SD3Transformer2DModel):
    pass


class ShardedBlock(FSDPModule, JointTransformerBlock):
    def __new__(cls, *args, **kwargs):  # torch's unwraps the class
        return object.__new__(cls)


@pytest.mark.parametrize("path, cls, op, reason", [
    ("transformer_blocks.1", OwnBlock, "gate_residual_adaln", "OwnBlock is derived from JointTransformerBlock, and its code may be another"),
    ("", OwnModel, "adaln_modulate", "OwnModel is derived from SD3Transformer2DModel, and its code may be another"),
    ("transformer_blocks.1", ShardedBlock, "gate_residual_adaln", custom.SHARDED)])
def test_a_class_of_ones_own(path, cls, op, reason):
    model = stock_model("sd3")
    module = model.get_submodule(path)
    module.__class__ = cls
    with pytest.warns(SwapWarning, match=reason):
        handle = fusewire.swap(model)
    assert type(module) is cls and reasons(handle.report.left)[path or "module", op] == reason
    assert not [entry for entry in handle.report.swapped if entry.name == (path or "norm_out")]
    handle.restore()
    with pytest.raises(SwapError, match=reason):
        fusewire.swap(model, strict=True)


def test_nothing_but_ones_own():
    block = stock_model("sd3").transformer_blocks[0]
    block.__class__ = OwnBlock
    with pytest.raises(ValueError, match="nothing to swap.*gate_residual: OwnBlock is derived from JointTransformerBlock"):
        fusewire.swap(block)


def by_call(model):
    model.compile(backend="eager")
    return model, "model"


def by_wrapper(model):
    return torch.compile(model, backend="eager"), "model"


def by_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model, "model"


def by_blocks(model):
    model._repeated_blocks = ["JointTransformerBlock"]
    model.compile_repeated_blocks(backend="eager")
    return model, "transformer_blocks.0"


@pytest.mark.parametrize("compiled", [by_call, by_wrapper, by_forward, by_blocks])
def test_a_compiled_model_is_swapped_inside_and_named(compiled):
    torch._dynamo.reset()
    model, data = stock_model("sd3", num_layers=1), inputs()
    model, name = compiled(model)
    want = run(model, data)
    handle = fusewire.swap(model)
    assert reasons(handle.report.noted) == {(name, "torch.compile"): custom.COMPILED} and "noted  torch.compile: " in str(handle.report)
    ops.reset_stats()
    assert torch.equal(run(model, data), want)  # the backend is eager
    assert ops.stats()["gate_residual_adaln"], "its next call compiles anew"
    handle.restore()
    assert torch.equal(run(model, data), want)
    torch._dynamo.reset()


def test_nothing_is_noted_of_a_model_that_is_not_compiled():
    with fusewire.swapped(stock_model("sd3")) as handle:
        assert not handle.report.noted


def test_swapped_already():
    pipe = tiny_pipeline()
    first, second, third = fusewire.swap(pipe), fusewire.swap(pipe), fusewire.swap(pipe, "close")
    assert {entry.reason for entry in first.report.swapped} == {""} and {entry.reason for entry in second.report.swapped} == {"already swapped"}
    assert [entry[:2] for entry in second.report.swapped] == [entry[:2] for entry in first.report.swapped] and second.report.left == first.report.left
    assert ("scheduler", "sampler_step") in reasons(second.report.swapped) and "(already swapped)" in str(second.report)
    assert reasons(third.report.swapped)["transformer.transformer_blocks.0", "gate_residual"] == "it was swapped with numerics='exact'"
    assert reasons(third.report.swapped)["transformer.transformer_blocks.0.ff", "linear"] == ""
    fusewire.restore(pipe)


class Quantised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / 2, self.bias)


class Packed(nn.Parameter):
    pass


@BOTH
def test_quantised_linears_are_named(numerics):
    """By their class or by that of their weight, wherever they are."""
    model = stock_model("sd3.5")
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn2.to_out.0", "transformer_blocks.1.ff.net.0.proj",
             "transformer_blocks.1.ff_context.net.2", "transformer_blocks.2.norm1.linear", "norm_out.linear", "context_embedder"]
    for name in names[1:]:
        model.get_submodule(name).__class__ = Quantised
    layer = model.get_submodule(names[0])
    layer._parameters["weight"] = Packed(layer.weight.detach())
    with fusewire.swapped(model, numerics) as handle:
        found = {name: reason for (name, op), reason in reasons(handle.report.left).items() if "is called as it is" in reason}
        assert [entry.by_choice for entry in handle.report.left] == [True] * len(handle.report.left)
    assert found == dict.fromkeys(names[1:], "tests's Quantised is called as it is") | {
        names[0]: "torch's Linear with a Packed weight is called as it is"}


def test_lora_is_named_in_exact():
    from peft import LoraConfig

    model = stock_model("sd3.5")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with fusewire.swapped(model) as handle:
        named = {entry.name for entry in handle.report.left if entry.reason == "peft's Linear is called as it is"}
    assert named == {f"transformer_blocks.{block}" for block in ("0.attn.to_q", "0.attn2.to_q", "1.attn.to_q", "2.attn.to_q")}
