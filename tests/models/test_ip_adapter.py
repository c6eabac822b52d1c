"""IP-Adapters in our U-Net and Flux against diffusers' models, into which diffusers' own loader put the same official checkpoints."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.models.ip_adapter import ImageProjection, attach, detach, over_tokens, projections_of, set_scale
from fusewire.models.ip_adapter_official import from_official, load
from tests.models import stock_flux, stock_unet, test_flux, test_unet
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

TEXT = {"sd": 24, "sdxl": 24, "sd2": 24, "flux": 32}  # cross_attention_dim, joint_attention_dim
# One, two, and one of each kind; shapes of a picture's embedding
ADAPTERS = {"one": ["simple"], "two": ["simple", "plus"], "three": ["full", "plus", "simple"]}
EMBEDS = {"simple": (16,), "full": (5, 12), "plus": (7, 14)}
# SD2's without the level whose pictures attend to text alone: diffusers' forward fails there. Every kind of adapter somewhere, the cheap ones often
VARIANTS = dict(stock_unet.UNETS, sd2=dict(test_unet.VARIANTS["sd2"], only_cross_attention=False))
CASES = [("sd", "three"), ("sdxl", "two"), pytest.param("sd2", "two", marks=pytest.mark.slow)]


def layer(name: str, outputs: int, inputs: int, bias: bool = True) -> dict[str, torch.Tensor]:
    found = {f"{name}.weight": 0.3 * torch.randn(outputs, inputs)}
    return found | ({f"{name}.bias": 0.15 * torch.randn(outputs)} if bias else {})


def norm(name: str, channels: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 0.5 + torch.rand(channels), f"{name}.bias": 0.15 * torch.randn(channels)}


def official_projection(kind: str, channels: int) -> dict[str, torch.Tensor]:
    """ImageProjModel, MLPProjModel and Resampler (two heads of 64; three tokens) of tencent-ailab/IP-Adapter."""
    inputs, width = EMBEDS[kind][-1], 16
    if kind == "simple":
        return layer("proj", 4 * channels, inputs) | norm("norm", channels)
    if kind == "full":
        return layer("proj.0", inputs, inputs) | layer("proj.2", channels, inputs) | norm("proj.3", channels)
    found = {"latents": torch.randn(1, 3, width)} | layer("proj_in", width, inputs) | layer("proj_out", channels, width) | norm("norm_out", channels)
    for index in range(4):
        attention, feed_forward = f"layers.{index}.0", f"layers.{index}.1"
        found |= norm(f"{attention}.norm1", width) | norm(f"{attention}.norm2", width) | norm(f"{feed_forward}.0", width)
        for name, sizes in ((f"{attention}.to_q", (128, width)), (f"{attention}.to_kv", (256, width)), (f"{attention}.to_out", (width, 128)),
                            (f"{feed_forward}.1", (4 * width, width)), (f"{feed_forward}.3", (width, 4 * width))):
            found |= layer(name, *sizes, bias=False)
    return found


def checkpoint(kind: str, stock: nn.Module, channels: int) -> dict[str, dict[str, torch.Tensor]]:
    """An official one for this model; its keys and values are numbered as diffusers lists the processors, every second one in a U-Net."""
    flux, found = hasattr(stock, "transformer_blocks"), {}
    names = [name.removesuffix(".processor") for name in stock.attn_processors]
    for index, name in enumerate(names):
        if name.endswith(".attn2") or name.startswith("transformer_blocks"):
            for key in ("to_k_ip", "to_v_ip"):
                found |= layer(f"{index}.{key}", stock.get_submodule(name).to_k.out_features, channels, bias=flux)
    return dict(image_proj=official_projection(kind, channels), ip_adapter=found)


def scales_of(count: int) -> list[float]:
    return [0.7, 1.3, -0.4][:count]


def stock_model(variant: str, adapters: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[dict]]:
    """diffusers' model, and what its loader put into it."""
    stock = stock_flux.stock_model("dev") if variant == "flux" else stock_unet.unet(**VARIANTS[variant])
    given = [checkpoint(kind, stock, TEXT[variant]) for kind in ADAPTERS[adapters]]
    stock._load_ip_adapter_weights(given, low_cpu_mem_usage=False)
    scale_stock(stock, scales_of(len(given)))
    return stock.eval().to(dtype), given


def scale_stock(stock: nn.Module, scales: list, under: str = "") -> None:
    for name, processor in stock.attn_processors.items():
        if hasattr(processor, "to_k_ip") and name.startswith(under):
            processor.scale = list(scales)


def ours(variant: str, stock: nn.Module, numerics: str = "close") -> nn.Module:
    """Our model of the stock one's state dict."""
    bare = test_flux.Flux(test_flux.FluxConfig(**stock_flux.VARIANTS["dev"]), numerics) if variant == "flux" \
        else test_unet.UNet(test_unet.UNetConfig.from_dict(stock.config), numerics)
    model, state_dict = bare.eval().to(stock.dtype), stock.state_dict()
    attach(model, projections_of(state_dict, model.how))
    model.load_state_dict(state_dict, strict=True)
    set_scale(model, scales_of(len(model.encoder_hid_proj.image_projection_layers)))
    return model


@functools.cache
def two() -> nn.Module:
    """A U-Net with two adapters; its scales are what a test set them to."""
    return ours("sd", stock_model("sd", "two")[0])


def embeds_of(adapters: str, batch: int, pictures: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(batch, pictures, *EMBEDS[kind]).to(dtype) for kind in ADAPTERS[adapters]]


def inputs(variant: str, adapters: str, batch: int = 2, height: int = 8, width: int = 12, dtype: torch.dtype = torch.float32) -> dict:
    embeds = embeds_of(adapters, batch, dtype=dtype)
    if variant == "flux":
        return dict(stock_flux.inputs("dev", batch, height, width, dtype=dtype), ip_adapter_image_embeds=embeds)
    data = test_unet.inputs(variant, batch, height, width, dtype)
    return dict(data, added_cond_kwargs=dict(data.get("added_cond_kwargs", {}), image_embeds=embeds))


def masks_of(adapters: str, height: int, width: int, batch: int = 1) -> list[torch.Tensor]:
    """In float32 whatever the model's dtype, as diffusers' ``IPAdapterMaskProcessor`` makes them."""
    return [torch.rand(batch, 2, 4 * height, 4 * width).round() for _ in ADAPTERS[adapters]]


def run(stock: nn.Module, data: dict) -> torch.Tensor:
    data = dict(data)
    if "ip_adapter_image_embeds" in data:
        data["joint_attention_kwargs"] = dict(ip_adapter_image_embeds=data.pop("ip_adapter_image_embeds"))
    if "ip_adapter_masks" in data:
        data["cross_attention_kwargs"] = dict(ip_adapter_masks=data.pop("ip_adapter_masks"))
    return stock(**data, return_dict=False)[0]


def by_library(*served: str) -> bool:
    """Whether the compiled library ran these ops; True where there is none."""
    return not CPU.loaded or all(ops.stats()[op]["cpu"] for op in served)


def near(got: torch.Tensor, want: torch.Tensor, bound: float) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= bound * want.abs().max().clamp_min(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant, adapters", [*CASES, ("flux", "one")])
@torch.no_grad()
def test_exact_is_equal_to_diffusers(variant, adapters, dtype):
    stock, _ = stock_model(variant, adapters, dtype)
    model = ours(variant, stock, "exact")
    for batch, height, width in ((1, 16, 8), (3, 8, 12)):
        data = inputs(variant, adapters, batch, height, width, dtype)
        want = run(stock, data)
        assert torch.equal(model(**data), want)
    assert by_library("adaln_modulate" if variant == "flux" else "group_norm_silu")
    detach(model)
    data.pop("ip_adapter_image_embeds", None)
    data.get("added_cond_kwargs", {}).pop("image_embeds", None)
    assert (model(**data) - want).abs().max() > 0.05 * want.abs().max()  # pictures count


@pytest.mark.parametrize("variant, adapters", [*CASES, ("flux", "one")])
@torch.no_grad()
def test_close_is_near_diffusers(variant, adapters):
    stock, _ = stock_model(variant, adapters)
    model = ours(variant, stock)
    for batch, height, width in ((1, 8, 12), (3, 16, 4)):
        data = inputs(variant, adapters, batch, height, width)
        assert near(model(**data), run(stock, data), MODEL_FLOAT32)
    assert by_library("attention", *(("linear",) if variant == "flux" else ("group_norm_silu",)))


@pytest.mark.parametrize("variant, adapters", CASES)
@torch.no_grad()
def test_float64_against_diffusers(variant, adapters):
    stock, _ = stock_model(variant, adapters, torch.float64)
    model, stock, data = ours(variant, stock), stock_unet.in_float64(stock), inputs(variant, adapters, dtype=torch.float64)
    assert near(model(**data), run(stock, data), MODEL_FLOAT64)
    data |= dict(ip_adapter_masks=masks_of(adapters, 8, 12), encoder_attention_mask=torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]))
    assert near(model(**data), run(stock, data), MODEL_FLOAT64)


@torch.no_grad()
def test_flux_in_float64_and_two_adapters():
    """diffusers rotates in float32 whatever its dtype (test_flux.py)."""
    stock, given = stock_model("flux", "one", torch.float64)
    data = inputs("flux", "one", dtype=torch.float64)
    assert near(ours("flux", stock)(**data), run(stock_flux.in_float64(stock), data), 2e-6)
    stock = stock_flux.stock_model("dev")
    stock._load_ip_adapter_weights([*given, checkpoint("simple", stock, 32)], low_cpu_mem_usage=False)
    scale_stock(stock, [0.7, 1.3])
    data = inputs("flux", "one")
    data["ip_adapter_image_embeds"] *= 2
    want = run(stock, data)
    assert torch.equal(ours("flux", stock, "exact")(**data), want) and near(ours("flux", stock)(**data), want, MODEL_FLOAT32)


@pytest.mark.parametrize("variant, adapters, dtype", [("sd", "three", torch.float32), ("sdxl", "two", torch.bfloat16), ("sd", "two", torch.float16)], ids=str)
@torch.no_grad()
def test_masks(variant, adapters, dtype):
    """One picture of masks for the batch; one for each sample; none for an adapter; a scale for each picture."""
    stock, _ = stock_model(variant, adapters, dtype)
    exact, close = (ours(variant, stock, numerics) for numerics in ("exact", "close"))
    data, count = inputs(variant, adapters, 3, 8, 12, dtype), len(ADAPTERS[adapters])
    masks = masks_of(adapters, 8, 12)
    for given, scales in ((masks, [[0.3, 1.1]] * count), (masks_of(adapters, 8, 12, 3), scales_of(count)),
                          ([None, *masks[1:]], [0.6, *[[0.3, 0.0]] * (count - 1)]), ([*masks[:-1], None], [0.6] * (count - 1) + [[0.0, 0.0]])):
        scale_stock(stock, scales)
        set_scale(exact, scales)
        set_scale(close, scales)
        want = run(stock, dict(data, ip_adapter_masks=given))
        assert torch.equal(exact(**data, ip_adapter_masks=given), want)
        if dtype is torch.float32:
            assert near(close(**data, ip_adapter_masks=given), want, MODEL_FLOAT32)
    assert not torch.equal(exact(**data, ip_adapter_masks=[1 - mask for mask in masks]), exact(**data, ip_adapter_masks=masks))


@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")
@torch.no_grad()
def test_a_mask_over_tokens():
    """Of the picture's aspect it is the mask; of another one it lies as diffusers lays it."""
    mask = torch.zeros(1, 32, 48)
    mask[:, :16, :24] = 1
    got = over_tokens(mask, 96)[0, :, 0].view(8, 12)
    assert torch.equal(got.round(), torch.nn.functional.pad(torch.ones(4, 6), (0, 6, 0, 4)))
    stock, _ = stock_model("sd", "one")
    model, data = ours("sd", stock, "exact"), inputs("sd", "one")
    for height, width in ((32, 32), (24, 40), (5, 64)):
        given = [torch.rand(1, 2, height, width)]
        assert torch.equal(model(**data, ip_adapter_masks=given), run(stock, dict(data, ip_adapter_masks=given)))
    for height, width in ((1, 500), (500, 1)):
        assert over_tokens(torch.ones(1, height, width), 96).shape == (1, 96, 1)


@torch.no_grad()
def test_embeddings_of_another_dtype():
    """An encoder may be in float32 beside a model in 16 bits."""
    stock, _ = stock_model("sd", "one", torch.bfloat16)
    data = inputs("sd", "one", dtype=torch.bfloat16)
    data["added_cond_kwargs"]["image_embeds"] = embeds_of("one", 2)
    assert torch.equal(ours("sd", stock, "exact")(**data), run(stock, data))


@torch.no_grad()
def test_scales():
    """0 is no adapter; of some layers alone, of another number for each."""
    stock, _ = stock_model("sd", "two")
    model, data = ours("sd", stock, "exact"), inputs("sd", "two")
    set_scale(model, 0)
    text = {name: value for name, value in data.items() if name != "added_cond_kwargs"}
    bare = copy.deepcopy(model)
    detach(bare)
    assert torch.equal(model(**data), bare(**text)) and not any(key.startswith("encoder_hid_proj") or ".processor." in key for key in bare.state_dict())
    set_scale(model, (0.9, 0.2), under="up_blocks.1.attentions.0")
    scale_stock(stock, [0.0, 0.0])
    scale_stock(stock, [0.9, 0.2], under="up_blocks.1.attentions.0")
    want = run(stock, data)
    assert torch.equal(model(**data), want) and not torch.equal(bare(**text), want)


@pytest.mark.parametrize("variant, adapters", [("sd", "three"), ("sdxl", "two"), ("flux", "one")])
def test_official_names_are_diffusers_names(variant, adapters):
    stock, given = stock_model(variant, adapters)
    model, want = ours(variant, stock), stock.state_dict()
    got = from_official(given, model)
    assert set(got) == {key for key in want if key.startswith("encoder_hid_proj.") or ".processor." in key}
    assert all(torch.equal(value, want[key]) for key, value in got.items())
    flat = [{f"{part}.{key}": value for part, weights in one.items() for key, value in weights.items()} for one in given]
    if variant == "flux":
        flat = [{xlabs(key): value for key, value in one.items()} for one in flat]
    detach(model)
    load(model, flat)
    set_scale(model, scales_of(len(flat)))
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in want.items()}
    with torch.no_grad():
        data = inputs(variant, adapters)
        assert near(model(**data), run(stock, data), MODEL_FLOAT32)


@pytest.mark.parametrize("change, error", [(lambda one: one["ip_adapter"].popitem(), KeyError),
                                           (lambda one: one["ip_adapter"].update({next(iter(one["ip_adapter"])): torch.zeros(1)}), ValueError)])
@torch.no_grad()
def test_a_failed_load_changes_nothing(change, error):
    """Not the adapters that were there, nor a model without."""
    stock, given = stock_model("sd", "two")
    model, bare, data = ours("sd", stock), test_unet.ours(test_unet.stock_model("sd")), inputs("sd", "two")
    want, broken = model(**data), [{part: dict(weights) for part, weights in one.items()} for one in given]
    change(broken[-1])
    for one in (model, bare):
        keys = list(one.state_dict())
        with pytest.raises(error, match="checkpoints "):
            load(one, broken)
        assert list(one.state_dict()) == keys
    assert torch.equal(model(**data), want)


def xlabs(key: str) -> str:
    part, number, name, leaf = key.split(".") if key.startswith("ip_adapter") else (key, *[""] * 3)
    if part != "ip_adapter":
        return key.replace("image_proj.", "ip_adapter_proj_model.")
    return f"double_blocks.{number}.processor.ip_adapter_double_stream_{name[3]}_proj.{leaf}"


@pytest.mark.parametrize("variant, adapters, bound", [("sd", "three", GRADIENTS_FLOAT64), ("sdxl", "two", GRADIENTS_FLOAT64), ("flux", "one", 2e-6)])
def test_gradients_against_diffusers(variant, adapters, bound):
    """Of every parameter and of the embeddings; with masks in a U-Net. FLUX.1: diffusers rotates in float32."""
    stock, _ = stock_model(variant, adapters, torch.float64)
    model, data = ours(variant, stock), inputs(variant, adapters, dtype=torch.float64)
    stock = (stock_flux if variant == "flux" else stock_unet).in_float64(stock)
    embeds = data["ip_adapter_image_embeds"] if variant == "flux" else data["added_cond_kwargs"]["image_embeds"]
    for one in embeds:
        one.requires_grad_()
    if variant == "sd":
        data["ip_adapter_masks"] = masks_of(adapters, 8, 12)
    out = model(**data)
    direction = torch.randn_like(out)
    given = dict(model.named_parameters())
    got = torch.autograd.grad((out * direction).sum(), [*given.values(), *embeds])
    want = torch.autograd.grad((run(stock, data) * direction).sum(), [*map(dict(stock.named_parameters()).__getitem__, given), *embeds])
    for name, mine, stocks in zip([*given, *map(str, range(len(embeds)))], got, want, strict=True):
        assert mine.any() and (mine - stocks).abs().max() <= bound * stocks.abs().max().clamp_min(1), name


def test_a_new_one():
    """Random weights, on the model's dtype and with its numerics; it can be trained alone."""
    model = test_unet.ours(test_unet.stock_model("sd", torch.bfloat16))
    with torch.no_grad():
        want = model(**test_unet.inputs("sd", dtype=torch.bfloat16))
    attach(model, [ImageProjection(16, 24, 4, model.how)])
    assert all(parameter.dtype is torch.bfloat16 for parameter in model.parameters())
    data = inputs("sd", "one", dtype=torch.bfloat16)
    model(**data).float().square().mean().backward()
    new = [parameter for name, parameter in model.named_parameters() if name.startswith("encoder_hid_proj") or ".processor." in name]
    assert len(new) == 4 + 2 * 4 and all(parameter.grad.any() and parameter.grad.isfinite().all() for parameter in new)
    assert math.isfinite(want.float().sum()) and "scale=[1.0]" in repr(model)
    attach(model, [ImageProjection(16, 24, 4), ImageProjection(20, 24, 2)])
    assert len(model.encoder_hid_proj.image_projection_layers) == len(model.mid_block.attentions[0].transformer_blocks[0].attn2.processor.scale) == 2


PICTURES = r"^added_cond_kwargs\['image_embeds'\]"


@pytest.mark.parametrize("embeds, masks, message", [
    (None, None, f"{PICTURES} is None; it should be a list of 2, one for each IP-Adapter"),
    (torch.zeros(2, 16), None, f"{PICTURES} is a Tensor; it should be a list of 2"),
    ([torch.zeros(2, 1, 16)], None, f"{PICTURES} has 1 entries; it should be a list of 2"),
    ([torch.zeros(2, 16), torch.zeros(2, 1, 7, 14)], None, PICTURES + r"\[0\] has shape \[2, 16\]; it should be \[2, N, 16\]"),
    ([torch.zeros(2, 1, 17), torch.zeros(2, 1, 7, 14)], None, PICTURES + r"\[0\] has shape \[2, 1, 17\]"),
    ([torch.zeros(2, 0, 16), torch.zeros(2, 1, 7, 14)], None, PICTURES + r"\[0\] has shape \[2, 0, 16\]"),
    ([torch.zeros(2, 1, 16), torch.zeros(2, 1, 14)], None, PICTURES + r"\[1\] has shape \[2, 1, 14\]; it should be \[2, N, L, 14\]"),
    ([torch.zeros(2, 1, 16), torch.zeros(1, 1, 7, 14)], None, PICTURES + r"\[1\] has shape \[1, 1, 7, 14\]; it should be \[2, N, L, 14\]"),
    ("good", [None], "^ip_adapter_masks has 1 entries; it should be a list of 2"),
    ("good", torch.zeros(2, 1, 8, 8), "^ip_adapter_masks is a Tensor; it should be a list of 2"),
    ("good", [None, torch.zeros(1, 8, 8)], r"^ip_adapter_masks\[1\] has shape \[1, 8, 8\]; it should be \[2 or 1, 2, H, W\]"),
    ("good", [torch.zeros(1, 1, 8, 8), None], r"^ip_adapter_masks\[0\] has shape \[1, 1, 8, 8\]"),
    ("good", [torch.zeros(1, 2, 8, 8, device="meta"), None], r"^ip_adapter_masks\[0\] is on meta; it should be on cpu"),
])
def test_bad_input_is_named(embeds, masks, message):
    model, data = two(), inputs("sd", "two")
    set_scale(model, 1.0)
    if not isinstance(embeds, str):
        data["added_cond_kwargs"]["image_embeds"] = embeds
    with pytest.raises(ValueError, match=message):
        model(**data, ip_adapter_masks=masks)


def test_a_model_without_one():
    model, data = test_unet.ours(test_unet.stock_model("sd")), inputs("sd", "one")
    with pytest.raises(ValueError, match=f"{PICTURES} is given; it should be None, as the model has no IP-Adapter"):
        model(**data)
    with pytest.raises(ValueError, match="^ip_adapter_masks is given"):
        model(**test_unet.inputs("sd"), ip_adapter_masks=[None])
    flux, data = test_flux.ours("dev", stock_flux.stock_model("dev")), inputs("flux", "one")
    with pytest.raises(ValueError, match="^ip_adapter_image_embeds is given"):
        flux(**data)
    attach(flux, [ImageProjection(16, 32, 4)])
    with pytest.raises(ValueError, match="^ip_adapter_image_embeds is None; it should be a list of 1"):
        flux(**stock_flux.inputs("dev"))


@pytest.mark.parametrize("call, error, message", [
    (lambda model: set_scale(model, [1.0]), ValueError, r"^scale is \[1.0\]; it should be a number or 2 of them"),
    (lambda model: set_scale(model, None), ValueError, r"^scale is \[None, None\]"),
    (lambda model: set_scale(model, 1.0, under="up.0"), ValueError, "^under is 'up.0', with which no name begins"),
    (lambda model: attach(model, []), ValueError, "^projections is empty"),
    (lambda model: attach(test_unet.UNet(GUIDED), [ImageProjection(16, 24, 4)]), ValueError, "^model has no attention to text"),
    (lambda model: model(**scaled(model, [[0.5, 0.5], 1.0])), ValueError, r"^scale is \[0.5, 0.5\], one for each picture; it should be a number where"),
    (lambda model: model(**scaled(model, [[0.5], 1.0]), ip_adapter_masks=masks_of("two", 8, 12)), ValueError, r"^scale is \[0.5\]; .* 2 of them"),
    (lambda model: from_official([changed(image_proj={"perceiver_resampler.latents": 0})], model), KeyError, "perceiver_resampler.latents"),
    (lambda model: from_official([changed(ip_adapter={"9.to_k_ip.weight": torch.zeros(1)})], model), KeyError, "9.to_k_ip.weight"),
    (lambda model: from_official([changed(ip_adapter={"1.to_k_lora.alpha": torch.zeros(1)})], model), KeyError, "1.to_k_lora.alpha"),
    (lambda model: load(copy.deepcopy(model), [dict(image_proj=official_projection("simple", 24), ip_adapter={})]), KeyError, "lack .*attn2.processor.to_k_ip"),
    (lambda model: projections_of({"encoder_hid_proj.image_projection_layers.0.proj.weight": torch.zeros(1)}), KeyError, "a projection of .'proj.weight'"),
])
def test_bad_use_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(two())


GUIDED = test_unet.UNetConfig.from_dict(dict(test_unet.GUIDED, mid_block_type=None))


def changed(**parts) -> dict:
    official = dict(image_proj=official_projection("simple", 24), ip_adapter={})
    return {name: weights | parts.get(name, {}) for name, weights in official.items()}


def scaled(model: nn.Module, scales: list) -> dict:
    set_scale(model, scales)
    return inputs("sd", "two")
