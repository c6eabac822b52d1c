"""Swapping transformers' text encoders: the bits, the rule, and all that users and pipelines do to them."""

from __future__ import annotations

import copy
import importlib.util
import pickle

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection, T5Config, T5EncoderModel, T5ForConditionalGeneration)
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

import fusewire
from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap import engine, fused, text_encoders
from fusewire.swap.fused import unknown_forward
from fusewire.swap.report import SwapError
from tests import tiny as with_text
from tests.models.stock_text import CLIPS, T5, T5S, VARIANTS, in_float64, padding, randomise, stock_model, tensors, tokens
from tests.tolerance import MODEL_FLOAT32, PIPELINE_FLOAT32, assert_close

BOTH = pytest.mark.parametrize("numerics", ["exact", "close"])
SOME = pytest.mark.parametrize("variant", ["CLIP quick_gelu", "CLIP gelu", "T5 gated-gelu"])

OLD_T5 = bool(unknown_forward(text_encoders.T5_BLOCK))  # before transformers 5.15 only its norms and feed-forwards are swapped
WHOLE_T5 = pytest.mark.skipif(OLD_T5, reason="the T5 of this transformers is swapped in parts")


@pytest.fixture(autouse=True)
def what_is_swapped_of_t5(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if OLD_T5 and parameters.get("variant") in T5S and parameters.get("numerics") != "exact" and "exact" not in request.node.originalname:
        pytest.skip(WHOLE_T5.kwargs["reason"])


def calls() -> dict[str, int]:
    return {op: count for op, served in ops.stats().items() if (count := sum(served.values()))}


@torch.no_grad()
def run(model, ids=None, **more) -> list[torch.Tensor]:
    return tensors(model(tokens() if ids is None else ids, **more))


def same(got, want, numerics) -> bool:
    if numerics == "exact":
        return all(torch.equal(mine, stock) for mine, stock in zip(got, want, strict=True))
    return all((mine - stock).abs().max() <= 3e-5 * max(1.0, stock.abs().max().item()) for mine, stock in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_is_equal_to_stock(variant, dtype):
    model, ids = stock_model(variant, dtype), tokens()
    for more in ({}, dict(attention_mask=padding(ids)), dict(output_hidden_states=True)):
        want = run(model, ids, **more)
        with fusewire.swapped(model):
            ops.reset_stats()
            assert same(run(model, ids, **more), want, "exact")
            assert calls().keys() <= {"gate_residual_adaln", "rms_norm"} and sum(calls().values()) >= 3
    assert same(run(model, ids, output_hidden_states=True), want, "exact")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_close_is_within_the_rule(variant, dtype):
    model, ids = stock_model(variant, dtype), tokens()
    wide = in_float64(copy.deepcopy(model))
    for more in ({}, dict(attention_mask=padding(ids))):
        plain, want = run(model, ids, **more)[0], run(wide, ids, **more)[0]
        with fusewire.swapped(model, "close"):
            ops.reset_stats()
            got = run(model, ids, **more)[0]
            assert calls()["attention"] == 3 and calls()["linear"] >= 15
        assert_close(got, want, plain, f"{variant} {dtype}")


@pytest.mark.parametrize("variant", T5S)
def test_exact_float64_has_stocks_mean_squares(variant):
    model = stock_model(variant, torch.float64)
    want = run(model)
    with fusewire.swapped(model):
        assert same(run(model), want, "exact")


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
        assert same(run(twin), want, "exact") and calls()
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
        assert calls() or numerics == "exact" and variant in CLIPS  # there a LayerNorm is read, if no hook brings its weight
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


@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
@SOME
def test_eager_attention_and_its_weights(variant, numerics, order):
    """Who asks for attention weights sets transformers' own implementation, before the swap or after it: it stays."""
    model, twin = stock_model(variant), stock_model(variant)
    for changed in (twin, model) if order == "before" else (twin,):
        changed.set_attn_implementation("eager")
    want = run(twin, output_attentions=True)
    assert len(want) > len(run(twin))
    with fusewire.swapped(model, numerics) as handle:
        if order == "after":
            model.set_attn_implementation("eager")
        ops.reset_stats()
        assert same(run(model, output_attentions=True), want, numerics) and "attention" not in calls() and calls()
        assert same(run(model), run(twin), numerics)
    if order == "before" and numerics == "close":
        assert any("implementation 'eager' is kept" in entry.reason for entry in handle.report.left)


@SOME
def test_a_users_own_implementation(variant, monkeypatch):
    seen = []

    def doubled(module, query, key, value, mask, **keywords):
        seen.append(module)
        out, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **keywords)
        return 2 * out, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "doubled", doubled)
    model = stock_model(variant)
    model.set_attn_implementation("doubled")
    want = run(model)
    seen.clear()
    with fusewire.swapped(model, "close"):
        assert same(run(model), want, "close") and len(seen) == 3


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
        once = sum(calls().values())
        model.gradient_checkpointing_enable()
        ops.reset_stats()
        second = gradients()
        assert sum(calls().values()) > once  # recomputed by the fused forwards
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


@SOME
def test_one_sample_does_not_depend_on_its_batch(variant):
    model, ids = stock_model(variant), tokens(3)
    with fusewire.swapped(model, "close"):
        together = run(model, ids)[0]
        alone = torch.cat([run(model, ids[row:row + 1])[0] for row in range(3)])
    assert (together - alone).abs().max() <= MODEL_FLOAT32 * together.abs().max()


@BOTH
def test_float16_with_its_last_projections_in_float32(numerics):
    model = stock_model("T5 gated-gelu", torch.float16)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    want = run(model)[0]
    with fusewire.swapped(model, numerics):
        got = run(model)[0]
    assert got.dtype is want.dtype
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= 0.02 * want.abs().max()


@BOTH
def test_encoder_of_pictures(numerics):
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=4, projection_dim=16)
    torch.manual_seed(0)
    model, picture = randomise(CLIPVisionModelWithProjection(config)).eval(), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        want = tensors(model(picture, output_hidden_states=True))
        with fusewire.swapped(model, numerics):
            ops.reset_stats()
            assert same(tensors(model(picture, output_hidden_states=True)), want, numerics) and calls()


@WHOLE_T5
@BOTH
def test_a_decoder_keeps_its_blocks(numerics):
    torch.manual_seed(0)
    model = randomise(T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0, num_decoder_layers=2))).eval()
    ids = tokens(2, 12)

    def both():
        with torch.no_grad():
            return [model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits, model.generate(ids, max_new_tokens=4, do_sample=False).float()]

    want = both()
    with fusewire.swapped(model, numerics) as handle:
        assert same(both(), want, numerics)
        assert any(entry.name == "decoder.block.0" and "a decoder's" in entry.reason for entry in handle.report.left)


@pytest.mark.parametrize("only", ["attention", "linear", "gate_residual_adaln", "rms_norm"])
@SOME
def test_only(variant, only):
    model = stock_model(variant)
    if only == "rms_norm" and variant in CLIPS:
        pytest.skip("it has none")
    want = run(model)
    with fusewire.swapped(model, "close", only=only) as handle:
        ops.reset_stats()
        assert same(run(model), want, "close")
        assert {only} <= {entry.op for entry in handle.report.swapped} <= {only, "quick_gelu"}
        assert set(calls()) <= {only, "quick_gelu"} and calls()[only]


def test_a_stock_forward_that_was_never_verified(monkeypatch):
    monkeypatch.setattr(engine, "_warned", set())
    monkeypatch.setattr(text_encoders, "CLIP_LAYER", {CLIPEncoderLayer.forward: ("000000000000",)})
    model = stock_model("CLIP gelu")
    with pytest.raises(SwapError, match="CLIPEncoderLayer.forward is not one that was verified"):
        fusewire.swap(model, "close", strict=True)
    with pytest.warns(match="CLIPEncoderLayer.forward is not one that was verified"):
        fusewire.swap(model, "close")
    assert {type(layer) for layer in model.text_model.encoder.layers} == {CLIPEncoderLayer}
    assert type(model.text_model.encoder.layers[0].self_attn) is not CLIPAttention


def test_t5_blocks_that_were_never_verified(monkeypatch):
    """As an old transformers has them: norms and feed-forwards are swapped all the same, attention where it is one we know."""
    monkeypatch.setattr(text_encoders, "T5_BLOCK", {T5Block.forward: ("000000000000",)})
    model = stock_model("T5 gated-gelu")
    want = run(model)
    with fusewire.swapped(model, "close") as handle:
        ops.reset_stats()
        assert same(run(model), want, "close") and calls()["rms_norm"] == 7 and calls()["linear"] >= 9 and "gate_residual_adaln" not in calls()
    assert {entry.op for entry in handle.report.swapped} == {"rms_norm", "linear"} | ({"attention"} if not OLD_T5 else set())
    assert {type(block) for block in model.encoder.block} == {T5Block}


def test_a_transformers_without_position_biases_in_sdpa(monkeypatch):
    """Before 5.14: CLIP is swapped as ever."""
    monkeypatch.delattr(sdpa_attention, "create_position_bias_mask", raising=False)
    monkeypatch.setattr(fused, "MAKERS", dict(fused.MAKERS))
    spec = importlib.util.spec_from_file_location("text_encoders_before_5_14", text_encoders.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer = stock_model("CLIP gelu").text_model.encoder.layers[0]
    found = list(module.FAMILY.candidates("layer", layer, How.of("close")))
    assert {op for entry in found for op in entry.ops} == {"gate_residual_adaln", "attention", "linear"} and all(entry.fused for entry in found)


@WHOLE_T5
def test_restored_under_a_class_that_was_derived_from_ours():
    """As FSDP2 derives one; a checkpointed layer of transformers wraps the forward that a new class inherits."""
    model = stock_model("T5 relu")
    want = run(model)
    handle = fusewire.swap(model)
    for block in model.encoder.block:
        block.__class__ = type("Sharded", (type(block),), {})
    ops.reset_stats()
    assert same(run(model), want, "exact") and calls()["gate_residual_adaln"] == 3
    handle.restore()
    ops.reset_stats()
    assert same(run(model), want, "exact") and not calls()
    assert all(type(block).__name__ == "Sharded" and issubclass(type(block), T5Block) for block in model.encoder.block)
    assert type(model.encoder.final_layer_norm) is T5LayerNorm


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
        assert same(latents(), want, numerics) and ("quick_gelu" in calls()) == (numerics == "close")
    assert same(latents(), want, "exact")
