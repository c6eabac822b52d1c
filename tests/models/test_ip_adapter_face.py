"""FaceID's IP-Adapters and their LoRA in our U-Net against diffusers' models, into which diffusers' own loaders put the same official checkpoints."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from fusewire.models import lora
from fusewire.models.ip_adapter import FaceImageProjection, attach, detach, projections_of, set_scale
from fusewire.models.ip_adapter_official import face_lora, from_official, load
from fusewire.models.ip_adapter_resampler import FacePlusImageProjection
from tests.models import stock_unet, test_unet
from tests.models.test_ip_adapter import TEXT, VARIANTS, by_library, checkpoint, layer, near, norm, official_projection, scale_stock
from tests.tolerance import MODEL_FLOAT32, MODEL_FLOAT64

FACE, PICTURE, WIDTH, TOKENS, RANK = 12, 14, 16, 4, 3


def face_projection(kind: str, channels: int) -> dict[str, torch.Tensor]:
    """MLPProjModel and ProjPlusModel of tencent-ailab/IP-Adapter's FaceID (two heads of 64)."""
    if kind == "face":
        return layer("proj.0", 2 * FACE, FACE) | layer("proj.2", TOKENS * channels, 2 * FACE) | norm("norm", channels)
    resampler = {key: value for key, value in official_projection("plus", channels).items() if key != "latents"}
    found = layer("proj.0", 2 * FACE, FACE) | layer("proj.2", TOKENS * WIDTH, 2 * FACE) | norm("norm", WIDTH)
    return found | {f"perceiver_resampler.{key}": value for key, value in resampler.items()}


def face_checkpoint(kind: str, stock: nn.Module, channels: int, with_lora: bool = True) -> dict[str, dict[str, torch.Tensor]]:
    found = checkpoint("simple", stock, channels)["ip_adapter"]
    for index, name in enumerate(stock.attn_processors):
        attn = stock.get_submodule(name.removesuffix(".processor"))
        for part, linear in (("q", attn.to_q), ("k", attn.to_k), ("v", attn.to_v), ("out", attn.to_out[0])):
            if with_lora:
                found |= layer(f"{index}.to_{part}_lora.down", RANK, linear.in_features, bias=False)
                found |= layer(f"{index}.to_{part}_lora.up", linear.out_features, RANK, bias=False)
    return dict(image_proj=face_projection(kind, channels), ip_adapter=found)


def stock_model(variant: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict, dict]:
    """diffusers' model as it came, with the adapter and its LoRA; and the checkpoint."""
    bare = stock_unet.unet(**VARIANTS[variant]).eval().to(dtype)
    stock = copy.deepcopy(bare)
    given = face_checkpoint(kind, stock, TEXT[variant])
    stock._load_ip_adapter_weights([given], low_cpu_mem_usage=False)
    stock.load_lora_adapter(stock._load_ip_adapter_loras([given])[0], prefix="unet", adapter_name="faceid_0")
    scale_stock(stock, [0.7])
    return bare, stock.eval().to(dtype), given


def ours(bare: nn.Module, given: dict, numerics: str) -> nn.Module:
    model = test_unet.UNet(test_unet.UNetConfig.from_dict(bare.config), numerics).eval().to(bare.dtype)
    model.load_state_dict(bare.state_dict())
    load(model, [given])
    set_scale(model, 0.7)
    return model


def inputs(variant: str, *models: nn.Module, batch: int = 2, height: int = 8, width: int = 12, dtype: torch.dtype = torch.float32) -> dict:
    """And puts the pictures of the faces where the models want them."""
    data, pictures = test_unet.inputs(variant, batch, height, width, dtype), torch.randn(batch, 2, 5, PICTURE).to(dtype)
    for model in models:
        for projection in model.encoder_hid_proj.image_projection_layers:
            projection.clip_embeds = pictures
    return dict(data, added_cond_kwargs=dict(data.get("added_cond_kwargs", {}), image_embeds=[torch.randn(batch, 2, FACE).to(dtype)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant, kind", [("sd", "face"), ("sd", "face plus"), ("sdxl", "face plus")])
@torch.no_grad()
def test_exact_is_equal_to_diffusers(variant, kind, dtype):
    bare, stock, given = stock_model(variant, kind, dtype)
    model = ours(bare, given, "exact")
    for batch, height, width in ((1, 16, 8), (3, 8, 12)):
        data = inputs(variant, stock, model, batch=batch, height=height, width=width, dtype=dtype)
        want = stock(**data, return_dict=False)[0]
        assert torch.equal(model(**data), want)
    assert by_library("group_norm_silu")
    without = copy.deepcopy(model)
    lora.remove_lora(without, "faceid_0")
    assert (without(**data) - want).abs().max() > 0.02 * want.abs().max()  # the LoRA counts
    set_scale(model, 0)
    assert (model(**data) - want).abs().max() > 0.02 * want.abs().max()  # and the picture


@pytest.mark.parametrize("variant, kind", [("sd", "face"), ("sdxl", "face plus")])
@torch.no_grad()
def test_close_is_near_diffusers(variant, kind):
    bare, stock, given = stock_model(variant, kind)
    model = ours(bare, given, "close")
    data = inputs(variant, stock, model, batch=3)
    assert near(model(**data), stock(**data, return_dict=False)[0], MODEL_FLOAT32) and by_library("group_norm_silu", "attention")


@torch.no_grad()
def test_shortcut_in_float64():
    """The second version of FaceID Plus adds the resampler's result to what it began with."""
    channels = WIDTH
    given = face_projection("face plus", channels)
    stock = stock_unet.unet(**VARIANTS["sd"])._convert_ip_adapter_image_proj_to_diffusers(given, low_cpu_mem_usage=False).double()
    model, = projections_of({f"encoder_hid_proj.image_projection_layers.0.{key}": value for key, value in stock.state_dict().items()})
    model.double().load_state_dict(stock.state_dict())
    faces = torch.randn(6, FACE, dtype=torch.float64)
    model.clip_embeds = stock.clip_embeds = torch.randn(3, 2, 5, PICTURE, dtype=torch.float64)
    plain = model(faces)
    assert near(plain, stock(faces), MODEL_FLOAT64)
    for one in (model, stock):
        one.shortcut, one.shortcut_scale = True, 0.6
    assert near(model(faces), stock(faces), MODEL_FLOAT64) and not near(model(faces), plain, 0.1)


@pytest.mark.parametrize("kind, cls", [("face", FaceImageProjection), ("face plus", FacePlusImageProjection)])
def test_names_are_diffusers_names(kind, cls):
    """Of the projection and of peft's layers; a diffusers state dict is enough to make room for the adapter."""
    bare, stock, given = stock_model("sd", kind)
    model, want = ours(bare, given, "exact"), stock.state_dict()
    got = model.state_dict()
    assert set(got) == set(want) and all(torch.equal(got[key], want[key]) for key in want)
    projection, = projections_of(want)
    assert type(projection) is cls and set(projection.state_dict()) == set(model.encoder_hid_proj.image_projection_layers[0].state_dict())
    flat = {f"{part}.{key}": value for part, weights in given.items() for key, value in weights.items()}
    assert set(from_official([flat], model)) == set(from_official([given], model))
    assert all(torch.equal(value, face_lora(given, model)[key]) for key, value in face_lora(flat, model).items())


@torch.no_grad()
def test_loaded_again_and_beside_another():
    """A checkpoint takes the place of one that was there, LoRA and all; without a LoRA there are no layers of peft's."""
    bare, stock, given = stock_model("sd", "face")
    model = ours(bare, face_checkpoint("face plus", bare, TEXT["sd"]), "exact")
    load(model, [given])
    set_scale(model, 0.7)
    data = inputs("sd", stock)
    assert torch.equal(model(**data), stock(**data, return_dict=False)[0])
    plain = face_checkpoint("face", bare, TEXT["sd"], with_lora=False)
    assert face_lora(plain, model) == {}
    lora.remove_lora(model, "faceid_0")
    detach(model)
    assert set(model.state_dict()) == set(bare.state_dict()) and not hasattr(model, "peft_config")
    load(model, [checkpoint("simple", bare, TEXT["sd"]), given])
    assert any(".lora_A.faceid_1." in key for key in model.state_dict()) and not any("faceid_0" in key for key in model.state_dict())


def test_bad_checkpoints(monkeypatch):
    """The model is as it was."""
    bare, _, given = stock_model("sd", "face plus")
    model = test_unet.UNet(test_unet.UNetConfig.from_dict(bare.config), "exact")
    before = set(model.state_dict())
    first = next(key for key in given["ip_adapter"] if key.endswith("to_q_lora.down.weight"))

    def changed(**weights):
        return dict(given, ip_adapter={key: value for key, value in {**given["ip_adapter"], **weights}.items() if value is not None})

    for bad, error, words in ((changed(**{first: None}), KeyError, "one half of a pair"), (changed(**{first: torch.randn(RANK, 5)}), ValueError, "it should make"),
                              (changed(**{"98.to_q_lora.up.weight": torch.randn(4, RANK)}), KeyError, "no layer for"),
                              (changed(**{"1.to_q_lora.alpha": torch.ones(())}), KeyError, "alpha")):
        with pytest.raises(error, match=words):
            load(model, [bad])
        assert set(model.state_dict()) == before
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        load(model, [given])
    assert set(model.state_dict()) == before


def test_without_pictures():
    bare, _, given = stock_model("sd", "face plus")
    model = ours(bare, given, "exact")
    data = inputs("sd", model)
    for wrong in (None, torch.randn(2, 5, PICTURE), torch.randn(2, 1, 5, PICTURE), torch.randn(2, 2, 5, 3)):
        model.encoder_hid_proj.image_projection_layers[0].clip_embeds = wrong
        with pytest.raises(ValueError, match=r"clip_embeds is .* it should be \[B, N, L, 14\], with 4 pictures"):
            model(**data)


def test_random_weights():
    """``attach`` alone makes an adapter that can be trained."""
    bare, stock, _ = stock_model("sd", "face plus")
    model = test_unet.UNet(test_unet.UNetConfig.from_dict(bare.config), "close")
    attach(model, projections_of(stock.state_dict(), model.how))
    model(**inputs("sd", model)).square().mean().backward()
    projection = model.encoder_hid_proj.image_projection_layers[0]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in projection.parameters())
