"""Flux against diffusers' FluxTransformer2DModel and against golden tensors of the official repository."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open

from fusewire.models.flux import Flux, FluxConfig, from_official, one_stream
from tests.models.stock_flux import VARIANTS, in_float64, inputs, positions, stock_model
from tests.tolerance import MODEL_FLOAT32

GOLDEN = Path(__file__).parents[1] / "data" / "flux.safetensors"


def ours(variant: str, stock: FluxTransformer2DModel, numerics: str = "close", **changes) -> Flux:
    model = Flux(FluxConfig(**dict(VARIANTS[variant], **changes)), numerics).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_against_diffusers(variant):
    """diffusers rotates in float32 whatever its dtype, we in float64 with its float32 tables: they differ by float32's rounding and no more."""
    stock = stock_model(variant)
    model = ours(variant, stock).double()
    data = {name: value.double() for name, value in inputs(variant).items()}
    want = in_float64(stock)(**data, return_dict=False)[0]
    assert (model(**data) - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("size", [(3, 5, 7, 2), (1, 1, 1, 1), (16, 16, 77, 3)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_against_diffusers(variant, size, numerics):
    rows, columns, tokens, batch = size
    stock = stock_model(variant)
    data = inputs(variant, batch, rows, columns, tokens)
    with torch.no_grad():
        want = stock(**data, return_dict=False)[0]
        got = ours(variant, stock, numerics)(**data)
    assert got.shape == want.shape and (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max().clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_is_equal_to_diffusers(variant, dtype):
    stock = stock_model(variant, dtype)
    data = inputs(variant, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ours(variant, stock, "exact").to(dtype)(**data), stock(**data, return_dict=False)[0])


def test_float16_is_kept_finite():
    """A residual stream that float16 cannot hold: stock clips it, so do we."""
    stock = stock_model("dev", torch.float16)
    with torch.no_grad():
        for block in (stock.transformer_blocks[0].ff_context.net[2], stock.single_transformer_blocks[0].proj_out):
            block.bias.fill_(6e4)
    data = inputs(dtype=torch.float16)
    with torch.no_grad():
        want = stock(**data, return_dict=False)[0]
        assert torch.equal(ours("dev", stock, "exact").half()(**data), want)
        assert torch.isfinite(want).all() and torch.isfinite(ours("dev", stock).half()(**data)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_diffusers(variant):
    stock, model = stock_model(variant).state_dict(), Flux(FluxConfig(**VARIANTS[variant])).state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in stock.items()}


def test_config_from_a_diffusers_dictionary():
    config = FluxTransformer2DModel(**VARIANTS["fill"]).config
    assert FluxConfig.from_dict(config) == FluxConfig(**VARIANTS["fill"])
    with pytest.raises(ValueError, match="unknown entries.*num_blocks"):
        FluxConfig.from_dict(dict(config, num_blocks=3))
    with pytest.raises(ValueError, match="^axes_dims_rope is"):
        FluxConfig(attention_head_dim=64)


def test_kontext_positions():
    """A reference picture's tokens follow the picture's, with 1 on the first axis."""
    stock = stock_model("dev")
    data = inputs("dev")
    data["hidden_states"] = torch.cat([data["hidden_states"], torch.randn(2, 6, 16)], 1)
    data["img_ids"] = torch.cat([data["img_ids"], positions(2, 3, first=1)])
    with torch.no_grad():
        want = stock(**data, return_dict=False)[0]
        assert (ours("dev", stock)(**data) - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


def test_controlnet_residuals():
    stock = stock_model("dev", num_layers=2)
    model, data = ours("dev", stock), inputs("dev")
    residuals = [torch.randn(2, 15, 32) for _ in range(3)]
    with torch.no_grad():
        plain = model(**data)
        for extra in (dict(controlnet_block_samples=residuals[:1]), dict(controlnet_block_samples=residuals[:2], controlnet_single_block_samples=residuals)):
            want = stock(**data, **extra, return_dict=False)[0]
            got = model(**data, **extra)
            assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max() and (got - plain).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["dev", "schnell"])
def test_gradients_against_diffusers(variant):
    """In float32 on both sides, as diffusers rotates in float32; the bound is relative to each parameter's largest gradient."""
    stock = stock_model(variant)
    model, reference, data = ours(variant, stock), copy.deepcopy(stock), inputs(variant)
    direction = torch.randn(2, 15, 16)
    (model(**data) * direction).sum().backward()
    (reference(**data, return_dict=False)[0] * direction).sum().backward()
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and want[name].grad is not None, name
        assert (parameter.grad - want[name].grad).abs().max() <= 2e-5 * want[name].grad.abs().max() + 2e-5, name


@pytest.mark.parametrize("name, change", [
    ("hidden_states", dict(hidden_states=torch.zeros(2, 15, 17))),
    ("encoder_hidden_states", dict(encoder_hidden_states=torch.zeros(2, 7, 31))),
    ("pooled_projections", dict(pooled_projections=torch.zeros(1, 24))),
    ("timestep", dict(timestep=torch.zeros(3))),
    ("img_ids", dict(img_ids=torch.zeros(14, 3))),
    ("txt_ids", dict(txt_ids=torch.zeros(7, 2))),
    ("guidance", dict(guidance=None)),
    ("controlnet_block_samples", dict(controlnet_block_samples=[])),
    (r"controlnet_single_block_samples\[1\]", dict(controlnet_single_block_samples=[torch.zeros(2, 15, 32), torch.zeros(2, 14, 32)])),
])
def test_bad_input_is_named(name, change):
    with pytest.raises(ValueError, match=f"^{name} "):
        Flux(FluxConfig(**VARIANTS["dev"]))(**dict(inputs(), **change))


def golden() -> tuple[Flux, dict[str, torch.Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = FluxConfig(in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=2, joint_attention_dim=28,
                        pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 8, 12))
    model = Flux(config).eval()
    official = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    model.load_state_dict(from_official(official), strict=True)
    return model, tensors


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-6), (torch.float32, 5e-5)], ids=str)
def test_golden_tensors_of_the_official_repository(dtype, bound):
    """float64 is held up by the float32 tables of the rotation alone."""
    model, tensors = golden()
    model = model.to(dtype)

    def given(name, index):
        return tensors[f"in/{name}"][index:index + 1].to(dtype)

    for index in range(2):  # each sample has positions of its own
        with torch.no_grad():
            got = model(given("img", index), given("txt", index), given("y", index), given("timesteps", index), given("img_ids", index)[0],
                        given("txt_ids", index)[0], guidance=given("guidance", index))
        want = tensors["out/img"][index:index + 1]
        assert (got - want).abs().max() <= bound * want.abs().max()


def test_a_name_the_official_repository_does_not_have():
    with pytest.raises(KeyError, match="double_blocks.0.img_attn.bogus.weight"):
        from_official({"img_in.weight": torch.zeros(4, 4), "double_blocks.0.img_attn.bogus.weight": torch.zeros(1)})


@pytest.mark.parametrize("batch", (1, 3))
def test_one_stream(batch):
    """Parts of one tensor that still lie side by side are not copied; anything else is, and a graph records a copy."""
    whole = torch.randn(batch, 9, 8)
    context, x = whole[:, :4], whole[:, 4:]
    with torch.no_grad():
        assert one_stream(context, x).data_ptr() == whole.data_ptr()
        assert torch.equal(one_stream(context, x), whole)
        for first, second in ((x, context), (context, x.clone()), (context, whole[:, 5:]), (whole[:, :3], x), (context, whole.double()[:, 4:].float()),
                              (whole[..., :4][:, :4], whole[..., 4:][:, 4:]), (whole.transpose(1, 2)[:, :4], whole.transpose(1, 2)[:, 4:])):
            both = one_stream(first, second)
            assert torch.equal(both, torch.cat([first, second], dim=1))
            assert both.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        with pytest.raises(RuntimeError, match="(?i)size"):
            one_stream(context, torch.randn(batch + 1, 5, 8))
    assert one_stream(context, x).data_ptr() != whole.data_ptr()  # autograd may record
