"""PixArt against diffusers' PixArtTransformer2DModel."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from fusewire.models.pixart import PixArt, PixArtConfig, from_official
from tests.models.stock_sd3 import randomise
from tests.models.stock_unet import PIXART, in_float64
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

# sigma; alpha at 1024 pixels, which is told the size (channels a multiple of 3, positions scaled); captions that are not projected
VARIANTS = {"sigma": PIXART,
            "alpha": dict(PIXART, attention_head_dim=12, cross_attention_dim=24, use_additional_conditions=True, interpolation_scale=2,
                          norm_eps=1e-5),
            "unprojected": dict(PIXART, caption_channels=None, cross_attention_dim=12, attention_bias=False, out_channels=4),
            "no text": dict(PIXART, caption_channels=None, cross_attention_dim=None)}


def stock_model(variant: str, dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    return randomise(PixArtTransformer2DModel(**VARIANTS[variant])).eval().to(dtype)


def ours(stock, numerics: str = "close") -> PixArt:
    model = PixArt(PixArtConfig.from_dict(stock.config), numerics).eval().to(stock.dtype)
    model.load_state_dict(stock.state_dict(), strict=True)
    return model


def inputs(variant: str, batch: int = 2, height: int = 8, width: int = 8, dtype: torch.dtype = torch.float32) -> dict:
    """The first caption is shorter than the others."""
    mask = torch.ones(batch, 5)
    mask[0, 3:] = 0
    text = None if variant == "no text" else torch.randn(batch, 5, 12).to(dtype)
    sizes = dict(resolution=torch.tensor([[1024.0, 768.0]]).repeat(batch, 1).to(dtype), aspect_ratio=torch.rand(batch, 1).to(dtype) + 0.5)
    return dict(hidden_states=torch.randn(batch, 4, height, width).to(dtype), timestep=torch.randint(0, 1000, (batch,)), encoder_hidden_states=text,
                encoder_attention_mask=mask, added_cond_kwargs=sizes if variant == "alpha" else None)


def run(stock, data: dict) -> torch.Tensor:
    return stock(**data, return_dict=False)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_against_diffusers(variant):
    stock, data = stock_model(variant, torch.float64), inputs(variant, dtype=torch.float64)
    with torch.no_grad():
        got, want = ours(stock)(**data), run(in_float64(stock), data)
    assert (got - want).abs().max() <= MODEL_FLOAT64 * want.abs().max().clamp_min(1)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("batch, height, width", [(1, 8, 8), (3, 6, 10), (2, 2, 16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_against_diffusers(variant, batch, height, width, numerics):
    """8 x 8 has the stored positions; others are made anew, and need not be squares."""
    stock, data = stock_model(variant), inputs(variant, batch, height, width)
    with torch.no_grad():
        got, want = ours(stock, numerics)(**data), run(stock, data)
    assert got.shape == want.shape and (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch, height, width", [(1, 8, 8), (3, 6, 10)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_is_equal_to_diffusers(variant, batch, height, width, dtype):
    stock, data = stock_model(variant, dtype), inputs(variant, batch, height, width, dtype)
    with torch.no_grad():
        assert torch.equal(ours(stock, "exact")(**data), run(stock, data))


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_masks(numerics):
    """Of text and of pictures, as 1 and 0 or as what is added to the logits: hidden tokens do not count, seen ones do."""
    stock, data = stock_model("sigma"), inputs("sigma")
    model, mask = ours(stock, numerics), torch.ones(2, 16)
    mask[1, 9:] = 0
    data["attention_mask"] = mask
    with torch.no_grad():
        got, want = model(**data), run(stock, data)
        assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()
        added = {name: ((1 - data[name]) * -10000.0)[:, None] for name in ("attention_mask", "encoder_attention_mask")}
        assert torch.equal(model(**dict(data, **added)), got)
        other = data["encoder_hidden_states"].clone()
        other[0, 3:] += 1
        assert torch.equal(model(**dict(data, encoder_hidden_states=other)), got)
        other[0, 0] += 1
        assert not torch.equal(model(**dict(data, encoder_hidden_states=other)), got)
        assert not torch.equal(model(**dict(data, attention_mask=None)), got)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_diffusers(variant):
    stock, model = stock_model(variant).state_dict(), PixArt(PixArtConfig.from_dict(VARIANTS[variant])).state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in stock.items()}


@pytest.mark.parametrize("variant", ["sigma", "alpha"])
def test_gradients_against_diffusers(variant):
    stock = stock_model(variant, torch.float64)
    model, reference, data = ours(stock), in_float64(copy.deepcopy(stock)), inputs(variant, dtype=torch.float64)
    out = model(**data)
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (run(reference, data) * direction).sum().backward()
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64 * want[name].grad.abs().max().clamp_min(1), name


def test_defaults_follow_the_sample_size():
    assert PixArtConfig().use_additional_conditions and PixArtConfig().interpolation_scale == 2
    smaller = PixArtConfig(sample_size=64)
    assert not smaller.use_additional_conditions and smaller.interpolation_scale == 1


@pytest.mark.parametrize("change, message", [
    (dict(norm_type="ada_norm_zero"), "^norm_type is 'ada_norm_zero'"),
    (dict(cross_attention_dim=17), "^cross_attention_dim is 17; it should be 16"),
    (dict(sample_size=9), "^sample_size is 9"),
    (dict(num_blocks=3), "unknown entries.*num_blocks"),
])
def test_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        PixArtConfig.from_dict(dict(PIXART, **change))


@pytest.mark.parametrize("variant, name, change", [
    ("sigma", "hidden_states", dict(hidden_states=torch.zeros(2, 4, 8, 7))),
    ("sigma", "encoder_hidden_states", dict(encoder_hidden_states=None)),
    ("sigma", "encoder_hidden_states", dict(encoder_hidden_states=torch.zeros(2, 5, 16))),
    ("sigma", "timestep", dict(timestep=torch.zeros(3))),
    ("alpha", "added_cond_kwargs", dict(added_cond_kwargs=dict(resolution=torch.zeros(2, 2)))),
])
def test_bad_input_is_named(variant, name, change):
    with pytest.raises(ValueError, match=f"^{name} (has|is) "):
        PixArt(PixArtConfig.from_dict(VARIANTS[variant]))(**dict(inputs(variant), **change))


def official_names(key: str) -> str | None:
    """What the official repository calls one of our parameters that it does not pack with others."""
    renamed = [("pos_embed.proj.", "x_embedder.proj."), ("adaln_single.linear.", "t_block.1."), ("proj_out.", "final_layer.linear."),
               ("caption_projection.linear_", "y_embedder.y_proj.fc"), ("adaln_single.emb.timestep_embedder.linear_1.", "t_embedder.mlp.0."),
               ("adaln_single.emb.timestep_embedder.linear_2.", "t_embedder.mlp.2."),
               ("adaln_single.emb.resolution_embedder.linear_1.", "csize_embedder.mlp.0."),
               ("adaln_single.emb.resolution_embedder.linear_2.", "csize_embedder.mlp.2."),
               ("adaln_single.emb.aspect_ratio_embedder.linear_1.", "ar_embedder.mlp.0."),
               ("adaln_single.emb.aspect_ratio_embedder.linear_2.", "ar_embedder.mlp.2.")]
    for ours_, theirs in renamed:
        if key.startswith(ours_):
            return theirs + key.removeprefix(ours_)
    if key == "scale_shift_table":
        return "final_layer.scale_shift_table"
    for ours_, theirs in (("attn1.to_out.0", "attn.proj"), ("attn2.to_out.0", "cross_attn.proj"), ("attn2.to_q", "cross_attn.q_linear"),
                          ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2"), ("scale_shift_table", "scale_shift_table")):
        if ours_ in key:
            return key.replace("transformer_blocks", "blocks").replace(ours_, theirs)
    return None


def test_the_names_of_the_official_repository():
    """There are no golden tensors of PixArt: this holds the names and the packing against a second list of them."""
    ours_ = stock_model("alpha").state_dict()
    official = {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    official |= {name: value for key, value in ours_.items() if (name := official_names(key))}
    for index in range(2):
        for leaf in ("weight", "bias"):
            part = {name: ours_[f"transformer_blocks.{index}.{name}.{leaf}"]
                    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "attn2.to_v")}
            official[f"blocks.{index}.attn.qkv.{leaf}"] = torch.cat([part["attn1.to_q"], part["attn1.to_k"], part["attn1.to_v"]])
            official[f"blocks.{index}.cross_attn.kv_linear.{leaf}"] = torch.cat([part["attn2.to_k"], part["attn2.to_v"]])
    got = from_official(official)
    assert set(got) == set(ours_) and all(torch.equal(got[key], ours_[key]) for key in ours_)
    with pytest.raises(KeyError, match="blocks.0.attn.q_norm.weight"):
        from_official({"blocks.0.attn.q_norm.weight": torch.zeros(1)})
