"""FLUX.1's ControlNets against diffusers' FluxControlNetModel; their residuals in our Flux."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.models.controlnet_flux import FluxControlNet, FluxControlNetConfig, from_official
from tests.models import stock_flux, test_flux
from tests.models.golden import golden
from tests.models.stock_flux import in_float64
from tests.models.stock_sd3 import randomise
from tests.models.test_controlnet import assert_equal, assert_near, loaded
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

DEV = dict(stock_flux.DEV, num_layers=1)
# As published: InstantX's, its union, Shakker Labs' (two streams alone), XLabs' (pixels); one for schnell, of one stream alone
CONFIGS = {"dev": DEV, "union": dict(DEV, num_single_layers=1, num_mode=3), "two streams": dict(DEV, num_layers=2, num_single_layers=0),
           "pixels": dict(DEV, num_layers=2, num_single_layers=0, patch_size=2, conditioning_embedding_channels=4),
           "schnell": dict(DEV, num_layers=0, guidance_embeds=False)}
SIZES = [(1, 3, 5), (3, 4, 2)]


def stock_model(variant: str, dtype: torch.dtype = torch.float32) -> FluxControlNetModel:
    return randomise(FluxControlNetModel(**CONFIGS[variant])).eval().to(dtype)  # what begins at zero too


def ours(stock: FluxControlNetModel, numerics: str = "close") -> FluxControlNet:
    return loaded(FluxControlNet, FluxControlNetConfig, stock, numerics)


def inputs(variant: str, batch: int = 2, rows: int = 3, columns: int = 5, dtype: torch.dtype = torch.float32) -> dict:
    given = stock_flux.inputs("schnell" if variant == "schnell" else "dev", batch, rows, columns, dtype=dtype)
    given["txt_ids"] = torch.rand(7, 3)  # a union's token has the place of the first
    shape = (3, 16 * rows, 16 * columns) if variant == "pixels" else (rows * columns, 16)
    given["controlnet_cond"] = torch.randn(batch, *shape).to(dtype)
    return given | dict(controlnet_mode=torch.randint(0, 3, (batch, 1))) if variant == "union" else given


def listed(residuals) -> list[torch.Tensor]:
    return [*(residuals[0] or ()), *(residuals[1] or ())]


def run(stock: FluxControlNetModel, data: dict, **more) -> list[torch.Tensor]:
    return listed(stock(**data, **more, return_dict=False))


def rotate(x, tables, use_real=True, use_real_unbind_dim=-1, sequence_dim=2):
    """diffusers' rotation of neighbours, x [B, T, H, D], without its cast to float32."""
    assert use_real and use_real_unbind_dim == -1 and sequence_dim == 1
    cos, sin = (table[:, None].to(x.dtype) for table in tables)
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin


@pytest.mark.parametrize("variant", CONFIGS)
def test_float64_against_diffusers_with_gradients(variant, monkeypatch):
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rotate)
    stock = stock_model(variant, torch.float64)
    model, reference, data = ours(stock), in_float64(copy.deepcopy(stock)), inputs(variant, dtype=torch.float64)
    found = listed(model(**data)), run(reference, data)
    assert_near(*found, MODEL_FLOAT64)
    for residuals in found:
        sum(residual.square().mean() for residual in residuals).backward()
    want, last = dict(reference.named_parameters()), f"transformer_blocks.{CONFIGS[variant]['num_layers'] - 1}."
    for name, parameter in model.named_parameters():
        if want[name].grad is None:  # the last block's text stream leads nowhere
            assert parameter.grad is None and name.startswith(last) and not CONFIGS[variant]["num_single_layers"], name
        else:
            assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64 * want[name].grad.abs().max().clamp_min(1), name


@pytest.mark.parametrize("batch, rows, columns", SIZES)
@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_float32_against_diffusers(variant, batch, rows, columns):
    stock, data = stock_model(variant), inputs(variant, batch, rows, columns)
    got, want = ours(stock)(**data), stock(**data, return_dict=False)
    assert [residuals is None for residuals in got] == [residuals is None for residuals in want]
    assert_near(listed(got), listed(want), MODEL_FLOAT32)
    assert not CPU.loaded or ops.stats()["adaln_modulate"]["cpu"] and ops.stats()["linear"]["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_exact_is_equal_to_diffusers(variant, dtype):
    stock = stock_model(variant, dtype)
    model = ours(stock, "exact")
    for size in SIZES:
        data = inputs(variant, *size, dtype)
        assert_equal(listed(model(**data, conditioning_scale=0.7)), run(stock, data, conditioning_scale=0.7))
        lying = data | {name: data[name].mT.contiguous().mT for name in ("hidden_states", "controlnet_cond")}
        assert_equal(listed(model(**lying)), run(stock, lying))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        assert_equal(listed(model(**data)), run(stock, data))
    assert not CPU.loaded or ops.stats()["adaln_modulate"]["cpu"]


@pytest.mark.parametrize("variant", ["union", "two streams", "pixels"])
@torch.no_grad()
def test_residuals_in_our_flux(variant, monkeypatch):
    """Our ControlNet and Flux against diffusers' two. XLabs' residuals are taken in turn."""
    stock, denoiser = stock_model(variant), stock_flux.stock_model("dev", num_layers=3)
    repeat = dict(controlnet_blocks_repeat=variant == "pixels")
    for dtype, numerics, bound in ((torch.float32, "exact", 0), (torch.bfloat16, "exact", 0), (torch.float32, "close", MODEL_FLOAT32),
                                   (torch.float64, "close", MODEL_FLOAT64)):
        theirs = stock.to(dtype), denoiser.to(dtype)
        mine = ours(theirs[0], numerics), test_flux.ours("dev", theirs[1], numerics, num_layers=3).to(dtype)
        if dtype is torch.float64:
            monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rotate)
            theirs = tuple(map(in_float64, theirs))
        data, found = stock_flux.inputs(dtype=dtype), []
        control = inputs(variant, dtype=dtype)
        for (model, flux), more in ((mine, {}), (theirs, dict(return_dict=False))):
            blocks, single = model(**control | {key: value for key, value in data.items() if key in control}, conditioning_scale=0.8, **more)
            result = flux(**data, controlnet_block_samples=blocks, controlnet_single_block_samples=single, **repeat, **more)
            found.append(result[0] if more else result)
        plain = theirs[1](**data, return_dict=False)[0]
        assert (found[0] - found[1]).abs().max() <= bound * found[1].abs().max() and (found[1] - plain).abs().max() > 1e-2


@torch.no_grad()
def test_a_new_one_changes_nothing():
    """It begins with the Flux's weights and with zeros where it joins."""
    flux = test_flux.ours("dev", stock_flux.stock_model("dev"))
    model = FluxControlNet(FluxControlNetConfig.from_dict(DEV)).eval()
    missing, unexpected = model.load_state_dict(flux.state_dict(), strict=False)
    assert all(key.startswith("controlnet_") for key in missing)
    assert all(key.startswith(("transformer_blocks.1.", "norm_out.", "proj_out.")) for key in unexpected)
    data = inputs("dev")
    blocks, single = model(**data)
    assert (len(blocks), len(single)) == (1, 2) and not any(residual.any() for residual in [*blocks, *single])
    data.pop("controlnet_cond")
    assert torch.equal(flux(**data, controlnet_block_samples=blocks, controlnet_single_block_samples=single), flux(**data))
    for variant, count in (("dev", 2 * (1 + 2 + 1)), ("pixels", 2 * (2 + 1))):  # where pixels are seen, their features are zero at first
        stock = FluxControlNetModel(**CONFIGS[variant])
        zeros = [{key for key, value in one.state_dict().items() if not value.any()}
                 for one in (FluxControlNet(FluxControlNetConfig.from_dict(stock.config)), stock)]
        assert zeros[0] == zeros[1] and len(zeros[0]) == count


@pytest.mark.parametrize("variant", ["union", "pixels"])
@torch.no_grad()
def test_picture_and_mode_count_and_one_picture_may_serve_all(variant):
    stock, data = stock_model(variant), inputs(variant, 3)
    one = data | dict(controlnet_cond=data["controlnet_cond"][:1])
    model = ours(stock, "exact")
    want = listed(model(**one))
    assert_equal(want, run(stock, one))
    others = [data]
    if variant == "union":
        others.append(one | dict(controlnet_mode=(data["controlnet_mode"] + 1) % 3))
    assert all((mine - theirs).abs().max() > 1e-3 for other in others for mine, theirs in zip(listed(model(**other)), want, strict=True))


@pytest.mark.parametrize("variant", CONFIGS)
def test_state_dict_is_diffusers(variant):
    stock = stock_model(variant)
    model, want = FluxControlNet(FluxControlNetConfig.from_dict(stock.config)).state_dict(), stock.state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in want.items()}


def test_config_of_one_made_from_a_transformer():
    transformer = FluxTransformer2DModel(**stock_flux.DEV)
    stock = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    assert FluxControlNetConfig.from_dict(stock.config) == FluxControlNetConfig(**dict(DEV, num_single_layers=1))
    assert FluxControlNetConfig.from_dict(transformer.config) == FluxControlNetConfig(**stock_flux.DEV)
    ours(stock)


@pytest.mark.slow  # the same blocks as Flux's
@pytest.mark.parametrize("numerics", ["exact", "close"])
@torch.no_grad()
def test_compiles_without_a_graph_break(numerics):
    model, data = ours(stock_model("union"), numerics), inputs("union")
    torch._dynamo.reset()
    assert_near(listed(torch.compile(model, fullgraph=True, backend="eager")(**data)), listed(model(**data)), MODEL_FLOAT32)


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_trains_under_autocast(numerics):
    model, data = ours(stock_model("union"), numerics).train(), inputs("union")
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(residual.float().square().mean() for residual in listed(model(**data)))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype is torch.float32 and parameter.grad.isfinite().all() and (parameter.grad.any() or name.endswith("to_k.bias")), name


@pytest.mark.parametrize("change, message", [
    (dict(conditioning_embedding_channels=4), "^conditioning_embedding_channels is 4; 1 x 1 of them, by patch_size, should be in_channels = 16"),
    (dict(axes_dims_rope=(4, 4)), r"^axes_dims_rope is \(4, 4\)"),
    (dict(extra_condition_channels=4), "unknown entries.*extra_condition_channels"),
])
def test_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        FluxControlNetConfig.from_dict(dict(DEV, **change))


@pytest.mark.parametrize("variant, change, message", [
    ("dev", dict(controlnet_cond=torch.zeros(2, 14, 16)), r"^controlnet_cond is \[2, 14, 16\]; it should be \[2, 15, 16\]"),
    ("dev", dict(controlnet_cond=torch.zeros(3, 15, 16)), r"^controlnet_cond is \[3, 15, 16\]"),
    ("dev", dict(controlnet_cond=None), r"^controlnet_cond is None; it should be \[2, 15, 16\]"),
    ("pixels", dict(controlnet_cond=torch.zeros(2, 3, 48, 64)), r"^controlnet_cond is \[2, 3, 48, 64\]; .* \[2, 3, H, W\], 15 squares of 16 x 16 pixels"),
    ("pixels", dict(controlnet_cond=torch.zeros(2, 3, 24, 160)), r"^controlnet_cond is \[2, 3, 24, 160\]"),
    ("pixels", dict(controlnet_cond=torch.zeros(2, 1, 48, 80)), r"^controlnet_cond is \[2, 1, 48, 80\]"),
    ("pixels", dict(controlnet_cond=torch.zeros(2, 15, 16)), r"^controlnet_cond is \[2, 15, 16\]"),
    ("union", dict(controlnet_mode=None), r"^controlnet_mode is None; it should be \[2, 1\], as num_mode is 3"),
    ("union", dict(controlnet_mode=torch.zeros(2, dtype=torch.int64)), r"^controlnet_mode is \[2\]"),
    ("dev", dict(controlnet_mode=torch.zeros(2, 1, dtype=torch.int64)), r"^controlnet_mode is \[2, 1\]; it should be None, as num_mode is None"),
    ("dev", dict(guidance=None), "^guidance is None"),
    ("dev", dict(hidden_states=torch.zeros(2, 15, 17)), "^hidden_states has shape"),
    ("dev", dict(img_ids=torch.zeros(14, 3)), "^img_ids has shape"),
])
def test_bad_input_is_named(variant, change, message):
    with pytest.raises(ValueError, match=message):
        FluxControlNet(FluxControlNetConfig.from_dict(CONFIGS[variant]))(**inputs(variant) | change)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-6), (torch.float32, MODEL_FLOAT32)], ids=str)
@torch.no_grad()
def test_golden_tensors_of_the_official_repository(dtype, bound):
    """float64 is held up by the float32 tables of the rotation alone."""
    tensors, official = golden("flux_controlnet")
    config = FluxControlNetConfig(patch_size=2, in_channels=64, num_layers=2, num_single_layers=0, attention_head_dim=24, num_attention_heads=2,
                                  joint_attention_dim=28, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 8, 12),
                                  conditioning_embedding_channels=16)
    model = FluxControlNet(config).eval()
    model.load_state_dict(from_official(official), strict=True)
    img, txt, pooled, timestep, guidance, picture = (tensors[f"in/{name}"].to(dtype) for name in ("img", "txt", "y", "timesteps", "guidance", "controlnet_cond"))
    found, none = model.to(dtype)(img, txt, pooled, timestep, tensors["in/img_ids"][0].to(dtype), tensors["in/txt_ids"][0].to(dtype), picture, guidance)
    assert none is None
    assert_near(found, [tensors["out/0"], tensors["out/1"]], bound)
    assert not CPU.loaded or ops.stats()["adaln_modulate"]["cpu"]


@pytest.mark.parametrize("key", ["final_layer.linear.weight", "double_blocks.0.img_attn.bogus.weight", "input_hint_block.16.weight", "controlnet_blocks.0.0.bias"])
def test_a_name_the_official_repository_does_not_have(key):
    with pytest.raises(KeyError, match=key):
        from_official({"img_in.weight": torch.zeros(48, 64), key: torch.zeros(3)})
