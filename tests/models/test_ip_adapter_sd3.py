"""The IP-Adapter of SD3 in our MMDiT against diffusers' model, into which diffusers' own loader put the same official checkpoint."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from torch import nn

from fusewire.models.ip_adapter import ImageProjection, attach, detach, projections_of, set_scale
from fusewire.models.ip_adapter_official import from_official, load
from fusewire.models.ip_adapter_sd3 import TimeImageProjection
from fusewire.models.mmdit import MMDiT, MMDiTConfig
from tests.models import stock_flux, stock_sd3, test_flux
from tests.models.stock_sd3 import VARIANTS, Waves64
from tests.models.test_ip_adapter import by_library, layer, near, norm, official_projection
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64, assert_close

IMAGE, WIDTH, WAVES, HEADS, TOKENS = 12, 16, 20, 2, 3  # of the resampler; its heads are of 64 channels
CHANNELS, HEAD_DIM = 32, 16  # of the tiny transformers
SCALE = 0.7


def checkpoint(count: int) -> dict[str, dict[str, torch.Tensor]]:
    """InstantX's names, for so many attentions; depth and ratio of the resampler are those that diffusers' loader takes for granted."""
    projection = {"latents": torch.randn(1, TOKENS, WIDTH)} | layer("proj_in", WIDTH, IMAGE) | layer("proj_out", CHANNELS, WIDTH) | norm("norm_out", CHANNELS)
    projection |= layer("time_embedding.linear_1", WIDTH, WAVES) | layer("time_embedding.linear_2", WIDTH, WIDTH)
    for index in range(4):
        one = f"layers.{index}"
        projection |= norm(f"{one}.0.norm1", WIDTH) | norm(f"{one}.0.norm2", WIDTH) | norm(f"{one}.1.0", WIDTH) | layer(f"{one}.2.1", 4 * WIDTH, WIDTH)
        for name, sizes in (("0.to_q", (64 * HEADS, WIDTH)), ("0.to_kv", (128 * HEADS, WIDTH)), ("0.to_out", (WIDTH, 64 * HEADS)),
                            ("1.1", (4 * WIDTH, WIDTH)), ("1.3", (WIDTH, 4 * WIDTH))):
            projection |= layer(f"{one}.{name}", *sizes, bias=False)
    adapter = {}
    for index in range(count):
        adapter |= layer(f"{index}.norm_ip.linear", 2 * CHANNELS, WIDTH)
        adapter |= layer(f"{index}.to_k_ip", CHANNELS, CHANNELS, bias=False) | layer(f"{index}.to_v_ip", CHANNELS, CHANNELS, bias=False)
        adapter |= {f"{index}.{name}.weight": 0.5 + torch.rand(HEAD_DIM) for name in ("norm_q", "norm_k", "norm_ip_k")}
    return dict(image_proj=projection, ip_adapter=adapter)


def stock_model(variant: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict]:
    """diffusers' model, and what its loader put into it."""
    stock = stock_sd3.stock_model(variant)
    given = checkpoint(len(stock.attn_processors))
    stock._load_ip_adapter_weights(given, low_cpu_mem_usage=False)
    scale_stock(stock, SCALE)
    return stock.eval().to(dtype), given


def scale_stock(stock: nn.Module, scale: float, under: str = "transformer_blocks") -> None:
    for name, processor in stock.attn_processors.items():
        if name.startswith(under):
            processor.scale = scale


def bare(variant: str, numerics: str = "close") -> MMDiT:
    return MMDiT(MMDiTConfig(**VARIANTS[variant]), numerics).eval()


def ours(variant: str, stock: nn.Module, numerics: str = "close") -> MMDiT:
    model, state_dict = bare(variant, numerics).to(stock.dtype), stock.state_dict()
    attach(model, projections_of(state_dict, model.how))
    model.load_state_dict(state_dict, strict=True)
    set_scale(model, SCALE)
    return model


@functools.cache
def one() -> MMDiT:
    return ours("sd3.5", stock_model("sd3.5")[0])


def inputs(batch: int = 2, height: int = 8, width: int = 12, length: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(stock_sd3.inputs(batch, height, width, dtype=dtype), ip_adapter_image_embeds=torch.randn(batch, length, IMAGE).to(dtype))


def run(stock: nn.Module, data: dict) -> torch.Tensor:
    return stock(**text_alone(data), joint_attention_kwargs=dict(ip_adapter_image_embeds=data["ip_adapter_image_embeds"]), return_dict=False)[0]


def text_alone(data: dict) -> dict:
    return {name: value for name, value in data.items() if name != "ip_adapter_image_embeds"}


def in_float64(stock: nn.Module, monkeypatch) -> nn.Module:
    """The stock model in float64, the resampler's sinusoids and its softmax, for which diffusers calls ``float``, too."""
    stock = stock_sd3.in_float64(copy.deepcopy(stock))
    stock.image_proj.time_proj = Waves64(WAVES)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_exact_is_equal_to_diffusers(variant, dtype):
    """One state of a picture, and those of several in a row."""
    stock, _ = stock_model(variant, dtype)
    model = ours(variant, stock, "exact")
    for batch, height, width, length in ((1, 16, 8, 1), (3, 8, 12, 14)):
        data = inputs(batch, height, width, length, dtype)
        want = run(stock, data)
        assert torch.equal(model(**data), want)
    assert by_library("adaln_modulate", "qk_norm_rope", "rms_norm")
    detach(model)
    assert (model(**text_alone(data)) - want).abs().max() > 0.05 * want.abs().max()  # pictures count


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_close_is_near_diffusers(variant):
    stock, _ = stock_model(variant)
    model = ours(variant, stock)
    for batch, height, width, length in ((1, 8, 12, 1), (3, 16, 4, 14)):
        data = inputs(batch, height, width, length)
        assert near(model(**data), run(stock, data), MODEL_FLOAT32)
    assert by_library("attention", "joint_attention", "linear", "adaln_modulate")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_close_in_bfloat16_errs_as_diffusers(variant, monkeypatch):
    stock, _ = stock_model(variant, torch.bfloat16)
    data = inputs(4, dtype=torch.bfloat16)
    got, plain = ours(variant, stock)(**data), run(stock, data)
    assert by_library("attention", "joint_attention", "linear", "adaln_modulate")
    assert_close(got, run(in_float64(stock, monkeypatch), {name: value.double() for name, value in data.items()}), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_and_gradients_against_diffusers(variant, monkeypatch):
    """The output; the gradients of every parameter and of the states of the pictures."""
    stock, _ = stock_model(variant, torch.float64)
    model, data = ours(variant, stock), inputs(dtype=torch.float64)
    stock = in_float64(stock, monkeypatch)
    embeds = data["ip_adapter_image_embeds"].requires_grad_()
    out, stocks = model(**data), run(stock, data)
    assert near(out, stocks, MODEL_FLOAT64)
    direction = torch.randn_like(out)
    given, theirs = dict(model.named_parameters()), dict(stock.named_parameters())
    assert given.keys() == theirs.keys()
    got = torch.autograd.grad((out * direction).sum(), [*given.values(), embeds], allow_unused=True)
    want = torch.autograd.grad((stocks * direction).sum(), [*map(theirs.__getitem__, given), embeds], allow_unused=True)
    for name, mine, other in zip([*given, "pictures"], got, want, strict=True):
        mine, other = (torch.zeros(()) if one is None else one for one in (mine, other))
        assert mine.any() == other.any() and (mine - other).abs().max() <= GRADIENTS_FLOAT64 * other.abs().max().clamp_min(1), name
        assert other.any() or ".add_q_proj." in name or ".norm_added_q." in name  # of the last block, whose text goes nowhere


@torch.no_grad()
def test_guidance():
    """Both halves in one batch, as the pipeline puts them: no picture is zeros. What a sample sees is its own picture and its own timestep."""
    stock, _ = stock_model("sd3.5")
    exact, close, data = ours("sd3.5", stock, "exact"), ours("sd3.5", stock), inputs(4)
    data["ip_adapter_image_embeds"][:2] = 0
    want = run(stock, data)
    assert torch.equal(exact(**data), want) and near(close(**data), want, MODEL_FLOAT32)
    for index in (0, 3):
        alone = {name: value[index:index + 1] for name, value in data.items()}
        assert near(close(**alone), want[index:index + 1], MODEL_FLOAT32)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_scales(variant):
    """0 is no adapter; of the last block alone, of SD3.5's second attention alone, less than 0; as diffusers has it before anybody sets it."""
    stock, _ = stock_model(variant)
    model, data = ours(variant, stock, "exact"), inputs()
    set_scale(model, 0)
    without = copy.deepcopy(model)
    detach(without)
    assert without.state_dict().keys() == bare(variant).state_dict().keys()
    scale_stock(stock, 0.0)
    unseen = dict(data, ip_adapter_image_embeds=torch.full((2, 7, IMAGE), torch.nan))
    for given in (data, unseen):
        assert torch.equal(model(**given), without(**text_alone(data))) and torch.equal(model(**given), run(stock, given))
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
    for under, scale in ((last, 1.3), *([("transformer_blocks.0.attn2", -0.4)] if variant == "sd3.5" else [])):
        before = model(**data)
        set_scale(model, [scale], under=under)
        scale_stock(stock, scale, under=under)
        want = run(stock, data)
        assert torch.equal(model(**data), want) and not near(want, before, 1e-3)
    state_dict = stock.state_dict()
    attach(model, projections_of(state_dict, model.how))
    model.load_state_dict(state_dict)
    scale_stock(stock, 0.5)
    assert torch.equal(model(**data), run(stock, data)) and "scale=[0.5]" in repr(model)


@torch.no_grad()
def test_skipped_layers_and_controlnet_residuals():
    stock, _ = stock_model("sd3.5")
    model, data = ours("sd3.5", stock, "exact"), inputs()
    data |= dict(skip_layers=[1], block_controlnet_hidden_states=[torch.randn(2, 24, CHANNELS)])
    assert torch.equal(model(**data), run(stock, data))


@torch.no_grad()
def test_an_observed_norm_is_called():
    stock, _ = stock_model("sd3")
    data, seen = inputs(), []
    want = run(stock, data)
    for numerics in ("exact", "close"):
        model = ours("sd3", stock, numerics)
        model.transformer_blocks[1].attn.processor.norm_ip_k.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model.image_proj.layers[0].ln1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        assert near(model(**data), want, MODEL_FLOAT32)
    assert seen == [(2, TOKENS, WIDTH), (2, TOKENS, 2, HEAD_DIM)] * 2


def test_autocast():
    """exact: diffusers' bits; both train."""
    stock, _ = stock_model("sd3.5")
    exact, close, data = ours("sd3.5", stock, "exact"), ours("sd3.5", stock), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            assert torch.equal(exact(**data), run(stock, data))
        for model in (exact, close):
            model(**data).float().square().mean().backward()
            assert all(parameter.grad.any() and parameter.grad.isfinite().all() for name, parameter in model.named_parameters()
                       if name.startswith("image_proj") or ".processor." in name)


def test_state_dict_is_diffusers():
    """Of another depth and ratio of the resampler, which the shapes tell."""
    stock, _ = stock_model("sd3.5")
    stock.image_proj = IPAdapterTimeImageProjection(embed_dim=IMAGE, output_dim=CHANNELS, hidden_dim=WIDTH, depth=1, heads=1, num_queries=2, ffn_ratio=2,
                                                    timestep_in_dim=WAVES)
    model, data = ours("sd3.5", stock), inputs()
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in stock.state_dict().items()}
    with torch.no_grad():
        assert near(model(**data), run(stock, data), MODEL_FLOAT32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_names_are_diffusers_names(variant):
    stock, given = stock_model(variant)
    model, want = bare(variant), stock.state_dict()
    got = from_official([given], model)
    assert set(got) == {key for key in want if key.startswith("image_proj.") or ".processor." in key}
    assert all(torch.equal(value, want[key]) for key, value in got.items())
    model.load_state_dict({key: value for key, value in want.items() if key not in got})
    load(model, [{f"{part}.{key}": value for part, weights in given.items() for key, value in weights.items()}])
    set_scale(model, SCALE)
    with torch.no_grad():
        data = inputs()
        assert near(model(**data), run(stock, data), MODEL_FLOAT32)


@pytest.mark.parametrize("change, error", [(lambda one: one["ip_adapter"].pop("1.norm_q.weight"), KeyError),
                                           (lambda one: one["ip_adapter"].update({"1.to_k_ip.weight": torch.zeros(1)}), ValueError)])
@torch.no_grad()
def test_a_failed_load_changes_nothing(change, error):
    """Not the adapter that was there, nor a model without."""
    stock, given = stock_model("sd3")
    model, without, data = ours("sd3", stock), bare("sd3"), inputs()
    want, broken = model(**data), {part: dict(weights) for part, weights in given.items()}
    change(broken)
    for changed in (model, without):
        keys = list(changed.state_dict())
        with pytest.raises(error, match="checkpoints "):
            load(changed, [broken])
        assert list(changed.state_dict()) == keys
    assert torch.equal(model(**data), want)


def test_a_new_one():
    """Random weights, on the model's dtype; it can be trained alone. The transformer's initialisation passes it by."""
    model = bare("sd3.5").to(torch.bfloat16)
    attach(model, [TimeImageProjection(IMAGE, CHANNELS, WIDTH, depth=1, heads=1, tokens=2, waves=WAVES, how=model.how)])
    data = inputs(dtype=torch.bfloat16)
    model(**data).float().square().mean().backward()
    new = [parameter for name, parameter in model.named_parameters() if name.startswith("image_proj") or ".processor." in name]
    assert len(new) == 24 + 4 * 7 and all(parameter.dtype is torch.bfloat16 and parameter.grad.any() for parameter in new)
    model.init_weights()
    assert not model(**data).any()


EMBEDS = "^ip_adapter_image_embeds "


@pytest.mark.parametrize("embeds, error, message", [
    (None, ValueError, EMBEDS + r"is None; it should be \[2, L, 12\], as the model has an IP-Adapter"),
    ([torch.zeros(2, 7, 12)], TypeError, EMBEDS + "is a list; it should be a torch.Tensor"),
    (torch.zeros(2, 7, 12, dtype=torch.int64), TypeError, EMBEDS + "has dtype torch.int64"),
    (torch.zeros(2, 12), ValueError, EMBEDS + r"has shape \[2, 12\]; it should be \[2, L, 12\]"),
    (torch.zeros(2, 7, 13), ValueError, EMBEDS + r"has shape \[2, 7, 13\]"),
    (torch.zeros(1, 7, 12), ValueError, EMBEDS + r"has shape \[1, 7, 12\]; it should be \[2, L, 12\]"),
    (torch.zeros(2, 0, 12), ValueError, EMBEDS + r"has shape \[2, 0, 12\]"),
    (torch.zeros(2, 7, 12, device="meta"), ValueError, EMBEDS + "is on meta; it should be on cpu"),
])
def test_bad_input_is_named(embeds, error, message):
    with pytest.raises(error, match=message):
        one()(**dict(inputs(), ip_adapter_image_embeds=embeds))


def test_a_model_without_one():
    with pytest.raises(ValueError, match=EMBEDS + "is given; it should be None, as the model has no IP-Adapter"):
        bare("sd3")(**inputs())


def flux() -> nn.Module:
    return test_flux.ours("dev", stock_flux.stock_model("dev"))


def timed(channels: int = CHANNELS) -> TimeImageProjection:
    return TimeImageProjection(IMAGE, channels, WIDTH, depth=1, heads=1, tokens=2, waves=WAVES)


def h94() -> dict:
    return dict(image_proj=official_projection("simple", 24), ip_adapter={})


@pytest.mark.parametrize("call, error, message", [
    (lambda: attach(bare("sd3"), [ImageProjection(16, 32, 4)]), ValueError, r"^projections\[0\] is of the class ImageProjection; it should be TimeImageProj"),
    (lambda: attach(flux(), [timed()]), ValueError, r"^projections\[0\] is of the class TimeImageProjection; it should not be TimeImageProj.*class Flux"),
    (lambda: attach(bare("sd3"), [timed(), timed()]), ValueError, "^projections has 2 entries; it should have 1"),
    (lambda: attach(bare("sd3"), [timed(48)]), ValueError, r"^projections\[0\] gives 48 channels; it should give 32"),
    (lambda: attach(bare("sd3"), []), ValueError, "^projections is empty"),
    (lambda: set_scale(bare("sd3"), 1.0), ValueError, r"^scale is \[\]; it should be a number or 0 of them"),
    (lambda: set_scale(one(), [1.0, 1.0]), ValueError, r"^scale is \[1.0, 1.0\]; it should be a number or 1 of them"),
    (lambda: set_scale(one(), [[0.5, 0.5]]), ValueError, r"^scale is \[\[0.5, 0.5\]\]; it should be a number, as an MMDiT takes no masks"),
    (lambda: set_scale(one(), 1.0, under="up"), ValueError, "^under is 'up', with which no name begins; names are .*0.attn, .*0.attn2, .*1.attn"),
    (lambda: projections_of({"image_proj.proj.weight": torch.zeros(1)}), KeyError, "a projection of .'proj.weight'"),
    (lambda: load(bare("sd3"), [h94()]), KeyError, "'image_proj.proj.weight', which no IP-Adapter of an MMDiT has"),
    (lambda: load(flux(), [checkpoint(2)]), KeyError, "which no IP-Adapter of such a model has"),
    (lambda: load(bare("sd3"), [checkpoint(3)]), KeyError, "'ip_adapter.2.norm_ip.linear.weight', which this model has no layer for"),
    (lambda: load(bare("sd3"), [checkpoint(1)]), KeyError, "lack .*transformer_blocks.1.attn.processor.norm_ip.linear.bias"),
    (lambda: load(bare("sd3"), [checkpoint(2)] * 2), ValueError, "^checkpoints has 2 entries; it should have 1"),
])
def test_bad_use_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
