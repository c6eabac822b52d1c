"""MMDiT against diffusers' SD3Transformer2DModel and against golden tensors of the official repository."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open

from fusewire.models.mmdit import MMDiT, MMDiTConfig, from_official
from tests.models.stock_sd3 import VARIANTS, in_float64, inputs, stock_model
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

GOLDEN = Path(__file__).parents[1] / "data" / "sd35_mmditx.safetensors"


def ours(variant: str, stock: SD3Transformer2DModel, numerics: str = "close", **changes) -> MMDiT:
    model = MMDiT(MMDiTConfig(**dict(VARIANTS[variant], **changes)), numerics).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_against_diffusers(variant):
    stock = stock_model(variant)
    model = ours(variant, stock).double()
    data = {name: value.double() for name, value in inputs().items()}
    want = in_float64(stock)(**data, return_dict=False)[0]
    assert (model(**data) - want).abs().max() <= MODEL_FLOAT64


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("size", [(8, 12, 5, 2), (4, 2, 1, 1), (32, 32, 77, 3)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_against_diffusers(variant, size, numerics):
    height, width, tokens, batch = size
    stock = stock_model(variant)
    data = inputs(batch, height, width, tokens)
    with torch.no_grad():
        want = stock(**data, return_dict=False)[0]
        got = ours(variant, stock, numerics)(**data)
    assert got.shape == want.shape and (got - want).abs().max() <= MODEL_FLOAT32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_is_equal_to_diffusers(variant, dtype):
    stock = stock_model(variant, dtype)
    data = inputs(dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ours(variant, stock, "exact").to(dtype)(**data), stock(**data, return_dict=False)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_diffusers(variant):
    stock = stock_model(variant).state_dict()
    model = MMDiT(MMDiTConfig(**VARIANTS[variant])).state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in stock.items()}
    assert torch.equal(model["pos_embed.pos_embed"], stock["pos_embed.pos_embed"])


def test_config_from_a_diffusers_dictionary():
    config = SD3Transformer2DModel(**VARIANTS["sd3.5"]).config
    assert MMDiTConfig.from_dict(config) == MMDiTConfig(**VARIANTS["sd3.5"])
    with pytest.raises(ValueError, match="unknown entries.*num_blocks"):
        MMDiTConfig.from_dict(dict(config, num_blocks=3))


def test_controlnet_residuals_and_skipped_layers():
    stock = stock_model("sd3.5", num_layers=5)
    model = ours("sd3.5", stock, num_layers=5)
    data = inputs()
    residuals = [torch.randn(2, 24, 32) for _ in range(2)]
    with torch.no_grad():
        plain = model(**data)
        for extra in (dict(block_controlnet_hidden_states=residuals), dict(skip_layers=[1, 3]),
                      dict(block_controlnet_hidden_states=residuals, skip_layers=[0])):
            want = stock(**data, **extra, return_dict=False)[0]
            got = model(**data, **extra)
            assert (got - want).abs().max() <= MODEL_FLOAT32 and (got - plain).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_against_diffusers(variant):
    stock = stock_model(variant)
    model = ours(variant, stock).double()
    reference = in_float64(copy.deepcopy(stock))
    data = {name: value.double() for name, value in inputs().items()}
    direction = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    (model(**data) * direction).sum().backward()
    (reference(**data, return_dict=False)[0] * direction).sum().backward()
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if want[name].grad is None:  # the text query of the last block: its attention output is dropped
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None and (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64, name


def test_bf16_autocast_trains():
    model = ours("sd3.5", stock_model("sd3.5")).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs()).square().mean()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is None or (grad.dtype is torch.float32 and torch.isfinite(grad).all()) for grad in grads.values())
    # The last block's text queries act on nothing but a discarded output.
    unused = {"transformer_blocks.2.attn.add_q_proj.weight", "transformer_blocks.2.attn.add_q_proj.bias", "transformer_blocks.2.attn.norm_added_q.weight"}
    assert {name for name, grad in grads.items() if grad is None or not grad.any()} <= unused


def test_zero_initialisation():
    model = MMDiT(MMDiTConfig(**VARIANTS["sd3.5"]))
    model.init_weights()
    assert not model(**inputs()).any()


@pytest.mark.parametrize("name, change", [
    ("hidden_states", dict(hidden_states=torch.zeros(2, 3, 8, 12))),
    ("hidden_states", dict(hidden_states=torch.zeros(2, 4, 7, 12))),
    ("hidden_states", dict(hidden_states=torch.zeros(2, 4, 34, 12))),
    ("encoder_hidden_states", dict(encoder_hidden_states=torch.zeros(2, 5, 31))),
    ("pooled_projections", dict(pooled_projections=torch.zeros(1, 64))),
    ("timestep", dict(timestep=torch.zeros(3))),
])
def test_bad_input_is_named(name, change):
    model = MMDiT(MMDiTConfig(**VARIANTS["sd3"]))
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        model(**dict(inputs(), **change))


@pytest.mark.parametrize("residuals, message", [([], "is empty"), ([torch.zeros(2, 24, 31)], r"\[0\] has shape")])
def test_bad_residuals_are_named(residuals, message):
    with pytest.raises(ValueError, match=f"^block_controlnet_hidden_states{' ' * (not residuals)}{message}"):
        MMDiT(MMDiTConfig(**VARIANTS["sd3"]))(**inputs(), block_controlnet_hidden_states=residuals)


@pytest.mark.parametrize("change, name", [(dict(qk_norm="layer_norm"), "qk_norm"), (dict(caption_projection_dim=31), "caption_projection_dim"),
                                          (dict(num_layers=0), "num_layers")])
def test_bad_config_is_named(change, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        MMDiTConfig(**dict(VARIANTS["sd3"], **change))


def golden() -> tuple[MMDiT, dict[str, torch.Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = MMDiTConfig(sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=36,
                         caption_projection_dim=128, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,),
                         qk_norm="rms_norm", mlp_ratio=2.0)
    model = MMDiT(config).eval()
    official = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    model.load_state_dict(from_official({"model.diffusion_model." + key: value for key, value in official.items()}), strict=True)
    return model, tensors


@pytest.mark.parametrize("dtype, bound", [(torch.float64, MODEL_FLOAT64), (torch.float32, 1.3e-5)], ids=str)
def test_golden_tensors_of_the_official_repository(dtype, bound):
    model, tensors = golden()
    model = model.to(dtype)
    data = dict(hidden_states=tensors["in/x"].to(dtype), encoder_hidden_states=tensors["in/context"].to(dtype),
                pooled_projections=tensors["in/y"].to(dtype), timestep=tensors["in/t"].to(dtype))
    with torch.no_grad():
        for name, extra in (("out/x", {}), ("out/x_skip_layer0", dict(skip_layers=[0]))):
            want = tensors[name]
            assert (model(**data, **extra) - want).abs().max() <= bound * want.abs().max(), name


def test_a_name_the_official_repository_does_not_have():
    with pytest.raises(KeyError, match="joint_blocks.0.x_block.attn.bogus.weight"):
        from_official({"joint_blocks.0.x_block.attn.bogus.weight": torch.zeros(1)})
    for nothing in ({}, {"foo.weight": torch.zeros(1)}):
        with pytest.raises(KeyError, match="joint_blocks.0"):
            from_official(nothing)
