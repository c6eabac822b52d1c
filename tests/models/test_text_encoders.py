"""CLIP's text encoder and T5's encoder against those of transformers."""

from __future__ import annotations

import copy

import pytest
import torch

from fusewire import ops
from fusewire.models.clip import CLIPText, CLIPTextConfig, CLIPTextWithProjection
from fusewire.models.t5 import T5Config, T5Encoder, relative_buckets
from fusewire.models.text_layers import activation_of
from tests.models import stock_text
from tests.models.stock_text import CLIPS, T5S, VARIANTS, in_float64, padding, stock_model, tokens
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ours(stock, numerics="close"):
    """Our model with the weights of a stock one, its config read from stock's."""
    config, dtype = stock.config.to_dict(), next(stock.parameters()).dtype
    if stock.config.model_type == "t5":
        model = T5Encoder(T5Config.from_dict(config), numerics)
    else:
        model = (CLIPTextWithProjection if hasattr(stock, "text_projection") else CLIPText)(CLIPTextConfig.from_dict(config), numerics)
    model = model.eval().to(dtype)
    model.load_state_dict(stock.state_dict())
    return model


def outputs(stock, ids, mask=None) -> list[torch.Tensor]:
    """What a stock model gives, in the order in which ours gives it."""
    if stock.config.model_type == "t5":
        return [stock(ids, attention_mask=mask).last_hidden_state]
    found = stock(ids, attention_mask=mask, output_hidden_states=True)
    pooled = found.text_embeds if hasattr(stock, "text_projection") else found.pooler_output
    return [found.last_hidden_state, pooled, *found.hidden_states]


def our_outputs(model, ids, mask=None) -> list[torch.Tensor]:
    found = model(ids, mask)
    if isinstance(found, torch.Tensor):
        return [found]
    return [found.last_hidden_state, found.pooler_output if found.text_embeds is None else found.text_embeds, *found.hidden_states]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_float64_and_float32(variant, numerics, masked):
    stock = stock_model(variant)
    ids = tokens(3, 19)
    mask = padding(ids) if masked else None
    wide = copy.deepcopy(stock)
    wide = wide.double() if numerics == "exact" else in_float64(wide)  # exact has float32's mean squares, as stock has
    true = outputs(wide, ids, mask)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, MODEL_FLOAT32)):
        got = our_outputs(ours(stock.to(dtype), numerics), ids, mask)
        assert len(got) == len(true)
        for mine, want in zip(got, true):
            assert (mine - want).abs().max() <= bound * max(1.0, want.abs().max().item()), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_exact_is_equal_to_transformers(variant, dtype):
    stock = stock_model(variant, dtype)
    model, ids = ours(stock, "exact"), tokens()
    for mask in (None, padding(ids)):
        ops.reset_stats()
        assert all(torch.equal(mine, want) for mine, want in zip(our_outputs(model, ids, mask), outputs(stock, ids, mask), strict=True))
        fused = "rms_norm" if variant in T5S else "gate_residual_adaln"
        assert sum(ops.stats()[fused].values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_close_is_within_the_rule(variant, dtype):
    stock = stock_model(variant, dtype)
    wide, ids = in_float64(copy.deepcopy(stock)), tokens()
    model = ours(stock)
    for mask in (None, padding(ids)):
        got, plain, want = our_outputs(model, ids, mask), outputs(stock, ids, mask), outputs(wide, ids, mask)
        for index in (0, 1) if variant in CLIPS else (0,):
            assert_close(got[index], want[index], plain[index], f"{variant} {dtype} output {index}")


@pytest.mark.parametrize("variant", ["CLIP quick_gelu", "CLIP gelu", "T5 gated-gelu", "T5 relu"])
@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_gradients(variant, numerics):
    stock = stock_model(variant, torch.float64)
    reference = copy.deepcopy(stock) if numerics == "exact" else in_float64(copy.deepcopy(stock))
    model, ids = ours(stock, numerics), tokens(2, 9)
    direction = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (our_outputs(model, ids)[0] * direction).sum().backward()
    (outputs(reference, ids)[0] * direction).sum().backward()
    want, count = dict(reference.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if want[name].grad is not None:
            count += 1
            assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64 * want[name].grad.abs().max().clamp_min(1), name
    assert count >= len(want) - 1  # all but a projection


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20), (6, 9), (32, 256)])
def test_buckets_of_distances(buckets, furthest):
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(700)
    want = T5Attention._relative_position_bucket(places[None] - places[:, None], True, buckets, furthest)
    assert torch.equal(relative_buckets(700, buckets, furthest), want) and want.max() == buckets - 1


@pytest.mark.parametrize("scale", [1e3, 5e4])
@torch.no_grad()
def test_float16_is_clamped_as_stock_clamps_it(scale):
    """With the larger scale a sum overflows, and all that lies near the largest number is brought below it."""
    stock = stock_model("T5 relu", torch.float16)
    stock.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(scale)
    model, ids, seen = ours(stock, "exact"), tokens(), []
    stock.encoder.block[0].register_forward_hook(lambda module, args, out: seen.append(out[0].abs().max().item()))
    want = outputs(stock, ids)[0]
    assert torch.isfinite(want).all() and torch.equal(our_outputs(model, ids)[0], want)
    assert seen[0] == 64512 if scale == 5e4 else seen[0] < 6e4


@torch.no_grad()
def test_float16_with_its_last_projections_in_float32():
    """As ``from_pretrained`` keeps them: the states are then float32."""
    stock = stock_model("T5 gated-gelu", torch.float16)
    for block in stock.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    ids = tokens()
    want = outputs(stock, ids)[0]
    for numerics in ("exact", "close"):
        model = ours(stock, numerics)
        for block, theirs in zip(model.encoder.block, stock.encoder.block):
            block.layer[1].DenseReluDense.wo.float().weight.copy_(theirs.layer[1].DenseReluDense.wo.weight)
        got = our_outputs(model, ids)[0]
        assert got.dtype is want.dtype
        assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= 0.02 * want.abs().max()


def test_dropout_acts_in_training():
    model, ids = ours(stock_model("T5 gated-gelu")), tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids)) and not torch.equal(model.train()(ids), model(ids))


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("variant", ["CLIP quick_gelu", "T5 gated-gelu"])
@torch.no_grad()
def test_compiles_without_a_graph_break(variant, numerics):
    torch._dynamo.reset()
    model, ids = ours(stock_model(variant), numerics), tokens(2, 20)
    want = our_outputs(model, ids)[0]
    got = our_outputs(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)[0]
    assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("call, message", [
    (lambda: CLIPTextConfig(hidden_size=30, num_attention_heads=4), "^hidden_size is 30"),
    (lambda: CLIPTextConfig.from_dict(dict(stock_text.CLIP, attention_dropout=0.1)), "^attention_dropout is 0.1"),
    (lambda: T5Config.from_dict(dict(stock_text.T5, is_decoder=True)), "^is_decoder is True"),
    (lambda: activation_of("mish"), "^activation is 'mish'"),
    (lambda: ours(stock_model("CLIP gelu"))(torch.zeros(2, 61, dtype=torch.long)), r"^input_ids has shape \[2, 61\].*at most 60"),
    (lambda: ours(stock_model("CLIP gelu"))(torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 5)), r"^attention_mask has shape \[2, 5\]"),
    (lambda: ours(stock_model("T5 relu"))(torch.zeros(6, dtype=torch.long)), r"^input_ids has shape \[6\]"),
    (lambda: ours(stock_model("T5 relu"))(torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 5)), r"^attention_mask has shape \[2, 5\]"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


FULL = {"CLIP ViT-L/14": ("CLIPTextModel", CLIPText, dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        "OpenCLIP ViT-bigG/14": ("CLIPTextModelWithProjection", CLIPTextWithProjection,
                                 dict(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280,
                                      hidden_act="gelu")),
        "T5 v1.1 XXL": ("T5EncoderModel", T5Encoder, dict(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"))}


@pytest.mark.parametrize("name", FULL)
def test_full_size_has_the_parameters_of_transformers(name):
    import transformers

    stock_class, model_class, config = FULL[name]
    with torch.device("meta"):
        stock = getattr(transformers, stock_class)((transformers.T5Config if "T5" in name else transformers.CLIPTextConfig)(**config))
        model = model_class((T5Config if "T5" in name else CLIPTextConfig).from_dict(stock.config.to_dict()))
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in stock.state_dict().items()}
