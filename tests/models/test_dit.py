"""DiT against diffusers' DiTTransformer2DModel and against golden tensors of the official repository."""

from __future__ import annotations

import copy

import pytest
import torch

from fusewire.models.dit import DiT, DiTConfig, from_official
from fusewire.models.patches import unpatchify
from tests.models import stock_unet
from tests.models.golden import golden
from tests.models.stock_unet import DIT, dit_inputs, in_float64
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64


def ours(stock, numerics: str = "close") -> DiT:
    model = DiT(DiTConfig.from_dict(stock.config), numerics).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    return model


def test_float64_against_diffusers():
    stock = stock_unet.dit()
    model, data = ours(stock).double(), dit_inputs(dtype=torch.float64)
    want = in_float64(stock)(**data, return_dict=False)[0]
    assert (model(**data) - want).abs().max() <= MODEL_FLOAT64


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("batch, size", [(1, 8), (3, 8), (2, 12), (3, 2)])
def test_float32_against_diffusers(batch, size, numerics):
    """8 is the size that the stored positions are of; for others they are made anew."""
    stock, data = stock_unet.dit(), dit_inputs(batch, size=size)
    with torch.no_grad():
        want = stock(**data, return_dict=False)[0]
        got = ours(stock, numerics)(**data)
    assert got.shape == want.shape and (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch, size", [(1, 8), (3, 12)])
def test_exact_is_equal_to_diffusers(batch, size, dtype):
    stock, data = stock_unet.dit(dtype), dit_inputs(batch, dtype, size)
    with torch.no_grad():
        assert torch.equal(ours(stock, "exact").to(dtype)(**data), stock(**data, return_dict=False)[0])


def test_pictures_that_are_not_square():
    """Stock takes every picture for a square when it puts the patches together again; its parts do not."""
    stock, data = stock_unet.dit(), dit_inputs()
    data["hidden_states"] = torch.randn(2, 4, 6, 10)
    with torch.no_grad():
        x = stock.pos_embed(data["hidden_states"])
        for block in stock.transformer_blocks:
            x = block(x, timestep=data["timestep"], class_labels=data["class_labels"])
        emb = stock.transformer_blocks[0].norm1.emb(data["timestep"], data["class_labels"], hidden_dtype=x.dtype)
        shift, scale = stock.proj_out_1(torch.nn.functional.silu(emb)).chunk(2, dim=1)
        want = unpatchify(stock.proj_out_2(stock.norm_out(x) * (1 + scale[:, None]) + shift[:, None]), 3, 5, 2)
        got = ours(stock)(**data)
    assert got.shape == (2, 8, 6, 10) and (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


def test_state_dict_is_diffusers():
    stock, model = stock_unet.dit().state_dict(), DiT(DiTConfig.from_dict(DIT)).state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in stock.items()}


def test_gradients_against_diffusers():
    stock = stock_unet.dit()
    model, reference, data = ours(stock).double(), in_float64(copy.deepcopy(stock)), dit_inputs(dtype=torch.float64)
    direction = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    (model(**data) * direction).sum().backward()
    (reference(**data, return_dict=False)[0] * direction).sum().backward()
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64, name


@pytest.mark.parametrize("change, message", [
    (dict(norm_type="ada_norm_single"), "^norm_type is 'ada_norm_single'; it should be 'ada_norm_zero'"),
    (dict(dropout=0.1), "^dropout is 0.1"),
    (dict(num_blocks=3), "unknown entries.*num_blocks"),
    (dict(sample_size=9), "^sample_size is 9"),
])
def test_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig.from_dict(dict(DIT, **change))


@pytest.mark.parametrize("name, change", [
    ("hidden_states", dict(hidden_states=torch.zeros(2, 3, 8, 8))),
    ("hidden_states", dict(hidden_states=torch.zeros(2, 4, 7, 8))),
    ("timestep", dict(timestep=torch.zeros(1))),
    ("class_labels", dict(class_labels=torch.zeros(2, 1, dtype=torch.long))),
])
def test_bad_input_is_named(name, change):
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        DiT(DiTConfig.from_dict(DIT))(**dict(dit_inputs(), **change))


def test_guidance_wants_two_halves():
    with pytest.raises(ValueError, match="^hidden_states has shape .* half"):
        DiT(DiTConfig.from_dict(DIT)).forward_with_cfg(**dit_inputs(3), cfg_scale=4.0)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, MODEL_FLOAT64), (torch.float32, 1.4e-5)], ids=str)
def test_golden_tensors_of_the_official_repository(dtype, bound):
    """Learned variance, the null class, and guidance of three channels. The positions were random there, as all weights."""
    tensors, official = golden("dit")
    config = DiTConfig(sample_size=8, out_channels=8, num_layers=3, attention_head_dim=12, num_attention_heads=3, num_embeds_ada_norm=7,
                       norm_eps=1e-6, freq_shift=0)
    model = DiT(config).eval()
    model.load_state_dict(from_official(official), strict=True)
    model.pos_embed.pos_embed = official["pos_embed"]
    model = model.to(dtype)
    assert config.null_class in tensors["in/y"] and config.null_class in tensors["in/y_cfg"]
    with torch.no_grad():
        got = model(tensors["in/x"].to(dtype), tensors["in/t"], tensors["in/y"])
        guided = model.forward_with_cfg(tensors["in/x_cfg"].to(dtype), tensors["in/t_cfg"], tensors["in/y_cfg"], cfg_scale=4.0)
    for name, value in (("out/x", got), ("out/x_cfg", guided)):
        assert (value - tensors[name]).abs().max() <= bound * tensors[name].abs().max(), name


def test_a_name_the_official_repository_does_not_have():
    with pytest.raises(KeyError, match="blocks.0.attn.bogus.weight"):
        from_official({"blocks.0.attn.bogus.weight": torch.zeros(1)})
