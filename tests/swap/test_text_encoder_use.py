"""Swapped text encoders: all that users and pipelines do to them."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import nn

import fusewire
from fusewire import ops
from fusewire.swap import fused
from tests import tiny as with_text
from tests.models.stock_text import CLIPS, T5, T5S, randomise, stock_model, tokens
from tests.swap.encoders import BOTH, SOME, WHOLE_T5, run, same, what_is_swapped_of_t5  # noqa: F401 (a fixture)
from tests.swap.whole import served
from tests.tolerance import PIPELINE_FLOAT32


@WHOLE_T5
def test_report():
    model = stock_model("CLIP gelu")
    with fusewire.swapped(model) as handle:
        assert {entry.op for entry in handle.report.swapped} == {"gate_residual_adaln"} and len(handle.report.swapped) == 3
        assert {entry.op for entry in handle.report.left} == {"attention", "linear"} and all(entry.by_choice for entry in handle.report.left)
    with fusewire.swapped(model, "close", strict=True) as handle:
        assert {entry.op for entry in handle.report.swapped} == {"gate_residual_adaln", "attention", "linear"} and not handle.report.left
    with fusewire.swapped(stock_model("CLIP quick_gelu"), "close") as handle:
        assert "text_model" not in str(handle.report) and "quick_gelu: encoder.layers.0.mlp and 2 more" in str(handle.report)
    with fusewire.swapped(stock_model("T5 relu")) as handle:
        assert {("encoder.block.0", "gate_residual_adaln"), ("encoder.final_layer_norm", "rms_norm")} <= {entry[:2] for entry in handle.report.swapped}
    pipe = with_text.tiny_pipeline()
    with fusewire.swapped(pipe) as handle:
        names = {entry.name for entry in handle.report.swapped}
        assert {"text_encoder.text_model.encoder.layers.0", "text_encoder_2.text_model.encoder.layers.1", "transformer.norm_out"} <= names


@BOTH
@SOME
def test_classes_and_keys_and_restore(variant, numerics):
    model = stock_model(variant)
    before, keys = [type(module) for module in model.modules()], list(model.state_dict())
    want = run(model)
    handle = fusewire.swap(model, numerics)
    assert list(model.state_dict()) == keys and [type(m).__name__ for m in model.modules()] == [cls.__name__ for cls in before]
    again = fusewire.swap(model, numerics).report.swapped
    assert [entry[:2] for entry in again] == [entry[:2] for entry in handle.report.swapped] and {entry.reason for entry in again} == {"already swapped"}
    handle.restore()
    assert [type(module) for module in model.modules()] == before and same(run(model), want, "exact")


@BOTH
@SOME
def test_copies(variant, numerics, tmp_path):
    model = stock_model(variant)
    plain = run(model)
    with fusewire.swapped(model, numerics):
        want = run(model)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.save_pretrained(tmp_path)
    for twin in twins:
        ops.reset_stats()
        assert same(run(twin), want, "exact") and served()
        assert fusewire.restore(twin) and same(run(twin), plain, "exact")
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model) and same(run(loaded), plain, "exact")


@BOTH
@SOME
def test_lora(variant, numerics):
    """transformers wraps the linears in place: before the swap, and after it."""
    linears = ["q", "v", "o", "wi_0", "wo"] if variant in T5S else ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]

    def adapt(model):
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=linears, init_lora_weights="gaussian"))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.3)

    model, twin = stock_model(variant), stock_model(variant)
    plain = run(model)
    adapt(twin)
    want = run(twin)
    assert not same(want, plain, "close")
    with fusewire.swapped(twin, numerics) as handle:
        assert same(run(twin), want, numerics)
    if numerics == "close":
        assert any("is called as it is" in entry.reason for entry in handle.report.left)
    with fusewire.swapped(model, numerics):
        adapt(model)
        assert same(run(model), want, numerics)


@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
@SOME
def test_offload(variant, numerics, order):
    model = stock_model(variant)
    want = run(model)
    if order == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    with fusewire.swapped(model, numerics):
        if order == "after":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        ops.reset_stats()
        assert same(run(model), want, numerics)
        assert served() or numerics == "exact" and variant in CLIPS  # there a LayerNorm is read, if no hook brings its weight
    assert same(run(model), want, "exact")


@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
@SOME
def test_a_hook_anywhere_runs(variant, numerics, order):
    model = stock_model(variant)
    block = "encoder.block.1" if variant in T5S else "encoder.layers.1"
    block = f"text_model.{block}" if hasattr(model, "text_model") else block
    names = [name for name, _ in model.named_modules() if name.startswith(block)]
    assert len(names) > 8
    for name in names:
        module, seen = model.get_submodule(name), []

        def hook(module, arguments, output):
            seen.append(module)
            return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

        if isinstance(module, nn.ModuleList):
            continue
        handle = module.register_forward_hook(hook)
        want = run(model)
        if order == "after":
            handle.remove()
        with fusewire.swapped(model, numerics):
            if order == "after":
                handle = module.register_forward_hook(hook)
            seen.clear()
            assert same(run(model), want, numerics) and len(seen) == 1, name
        handle.remove()


@BOTH
@SOME
def test_gradients_and_checkpointing(variant, numerics):
    model = stock_model(variant)

    def gradients():
        model.zero_grad()
        model(tokens()).last_hidden_state.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    for module in model.modules():  # dropouts draw numbers: not here
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    want = gradients()
    with fusewire.swapped(model, numerics):
        ops.reset_stats()
        first = gradients()
        once = sum(served().values())
        model.gradient_checkpointing_enable()
        ops.reset_stats()
        second = gradients()
        assert sum(served().values()) > once  # recomputed by the fused forwards
    for got in (first, second):
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            assert (gradient - want[name]).abs().max() <= PIPELINE_FLOAT32 * want[name].abs().max() + 1e-6, name


@BOTH
def test_dropout_in_training_is_stocks(numerics):
    model = stock_model("T5 gated-gelu").train()
    torch.manual_seed(0)
    want = run(model)
    with fusewire.swapped(model, numerics):
        torch.manual_seed(0)
        assert same(run(model), want, numerics)
        assert not same(run(model), want, numerics)


@BOTH
@SOME
def test_autocast(variant, numerics):
    model = stock_model(variant)
    with torch.autocast("cpu", torch.bfloat16):
        want = run(model)[0]
        with fusewire.swapped(model, numerics):
            got = run(model)[0]
    assert got.dtype is want.dtype
    assert torch.equal(got, want) if numerics == "exact" else (got - want).float().norm() <= 0.03 * want.float().norm()


@BOTH
@SOME
def test_compile(variant, numerics):
    torch._dynamo.reset()
    model = stock_model(variant)
    want = run(model)
    with fusewire.swapped(model, numerics):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert same(run(compiled), want, "close")


@BOTH
def test_pipeline_with_text_encoders(numerics):
    """Both encoders, the denoiser and the scheduler: what ``swap(pipe)`` covers."""
    pipe = with_text.tiny_pipeline()
    randomise(pipe.text_encoder), randomise(pipe.text_encoder_2)

    def latents():
        return [pipe("a b", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False, **with_text.CALL)[0]]

    want = latents()
    with fusewire.swapped(pipe, numerics):
        ops.reset_stats()
        assert same(latents(), want, numerics) and ("quick_gelu" in served()) == (numerics == "close")
    assert same(latents(), want, "exact")
