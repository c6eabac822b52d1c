"""Swapping transformers' text encoders: the bits, the rule, and what is not known."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, T5Config, T5ForConditionalGeneration
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

import fusewire
from fusewire import ops
from fusewire.models.layers import How
from fusewire.swap import engine, fused, text_encoders
from fusewire.swap.report import SwapError
from tests.models.stock_text import CLIPS, T5, T5S, VARIANTS, in_float64, padding, randomise, stock_model, tensors, tokens
from tests.swap.encoders import BOTH, OLD_T5, SOME, WHOLE_T5, run, same, what_is_swapped_of_t5  # noqa: F401 (a fixture)
from tests.swap.whole import served
from tests.tolerance import MODEL_FLOAT32, assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_is_equal_to_stock(variant, dtype):
    model, ids = stock_model(variant, dtype), tokens()
    for more in ({}, dict(attention_mask=padding(ids)), dict(output_hidden_states=True)):
        want = run(model, ids, **more)
        with fusewire.swapped(model):
            ops.reset_stats()
            assert same(run(model, ids, **more), want, "exact")
            assert served().keys() <= {"gate_residual_adaln", "rms_norm"} and sum(served().values()) >= 3
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
            assert served()["attention"] == 3 and served()["linear"] >= 15
        assert_close(got, want, plain, f"{variant} {dtype}")


@pytest.mark.parametrize("variant", T5S)
def test_exact_float64_has_stocks_mean_squares(variant):
    model = stock_model(variant, torch.float64)
    want = run(model)
    with fusewire.swapped(model):
        assert same(run(model), want, "exact")


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
        assert same(run(model, output_attentions=True), want, numerics) and "attention" not in served() and served()
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
            assert same(tensors(model(picture, output_hidden_states=True)), want, numerics) and served()


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
        assert set(served()) <= {only, "quick_gelu", *(["bias_activation"] if only == "linear" else [])} and served()[only]


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
        assert same(run(model), want, "close") and served()["rms_norm"] == 7 and served()["linear"] >= 9 and "gate_residual_adaln" not in served()
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
    assert same(run(model), want, "exact") and served()["gate_residual_adaln"] == 3
    handle.restore()
    ops.reset_stats()
    assert same(run(model), want, "exact") and not served()
    assert all(type(block).__name__ == "Sharded" and issubclass(type(block), T5Block) for block in model.encoder.block)
    assert type(model.encoder.final_layer_norm) is T5LayerNorm
