"""ControlNet against diffusers' ControlNetModel and against golden tensors of lllyasviel/ControlNet; its residuals in our U-Net."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from fusewire.models.controlnet import ControlNet, ControlNetConfig, from_official
from fusewire.models.unet import UNet, UNetConfig
from fusewire.models.unet_official import from_official as unet_from_official
from tests.models import stock_unet, test_unet
from tests.models.golden import golden
from tests.models.stock_sd3 import randomise
from tests.models.stock_unet import SD, in_float64
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

SD2 = test_unet.VARIANTS["sd2"]
UNETS = {"sd": SD, "sd2": dict(SD2, layers_per_block=2), "sdxl": stock_unet.SDXL, "no attention in the middle": dict(SD, mid_block_type="UNetMidBlock2D"),
         "adm": stock_unet.ADM, "classes": dict(SD, num_class_embeds=6)}
PICTURES = dict(conditioning_embedding_out_channels=(4, 8))  # two pixels along one of the latents
ALONE = {"four pixels": dict(SD, conditioning_embedding_out_channels=(4, 8, 12), conditioning_channels=1),
         "bgr": dict(SD, controlnet_conditioning_channel_order="bgr"), "pooled": dict(SD, global_pool_conditions=True)}
CONFIGS = {name: PICTURES | {key: value for key, value in config.items() if key not in ("sample_size", "out_channels", "up_block_types")}
           for name, config in {**UNETS, **ALONE}.items()}


def stock_model(variant: str, dtype: torch.dtype = torch.float32) -> ControlNetModel:
    return randomise(ControlNetModel(**CONFIGS[variant])).eval().to(dtype)  # the zero convolutions too


def ours(stock: ControlNetModel, numerics: str = "close") -> ControlNet:
    return loaded(ControlNet, ControlNetConfig, stock, numerics)


def loaded(cls: type, config: type, stock, numerics: str):
    """Our model of a stock one's configuration, with its weights."""
    model = cls(config.from_dict(stock.config), numerics).eval().to(stock.dtype)
    model.load_state_dict(stock.state_dict(), strict=True)
    return model


def inputs(variant: str, batch: int = 2, height: int = 8, width: int = 12, dtype: torch.dtype = torch.float32) -> dict:
    given = dict(stock_unet.unet_inputs("sdxl" if variant == "sdxl" else "sd", batch, height, width, dtype=dtype), timestep=torch.randint(0, 1000, (batch,)))
    if variant == "classes":
        given["class_labels"] = torch.randint(0, 6, (batch,))
    config = CONFIGS[variant]
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    picture = torch.rand(batch, config.get("conditioning_channels", 3), factor * height, factor * width)
    return dict(given, controlnet_cond=picture.to(dtype))


def listed(residuals) -> list[torch.Tensor]:
    return [*residuals[0], residuals[1]]


def run(stock: ControlNetModel, data: dict, **more) -> list[torch.Tensor]:
    return listed(stock(**data, **more, return_dict=False))


def assert_near(got: list[torch.Tensor], want: list[torch.Tensor], bound: float) -> None:
    for index, (mine, stocks) in enumerate(zip(got, want, strict=True)):
        assert mine.shape == stocks.shape and (mine - stocks).abs().max() <= bound * stocks.abs().max().clamp_min(1), index


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(mine, stocks) for mine, stocks in zip(got, want, strict=True))


@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_float64_against_diffusers(variant):
    stock, data = stock_model(variant, torch.float64), inputs(variant, dtype=torch.float64)
    assert_near(listed(ours(stock)(**data)), run(in_float64(stock), data), MODEL_FLOAT64)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("batch, height, width", [(1, 8, 12), (3, 16, 4), (2, 7, 10)])
@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_float32_against_diffusers(variant, batch, height, width, numerics):
    stock, data = stock_model(variant), inputs(variant, batch, height, width)
    assert_near(listed(ours(stock, numerics)(**data)), run(stock, data), MODEL_FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_exact_is_equal_to_diffusers(variant, dtype):
    stock, data = stock_model(variant, dtype), inputs(variant, dtype=dtype)
    for scale in (1.0, 0.7):
        got, want = ours(stock, "exact")(**data, conditioning_scale=scale), run(stock, data, conditioning_scale=scale)
        assert_equal(listed(got), want)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        assert_equal(listed(ours(stock, "exact")(**data)), run(stock, data))


@pytest.mark.parametrize("variant", UNETS)
@torch.no_grad()
def test_residuals_in_our_unet(variant):
    """Our ControlNet and U-Net against diffusers' two."""
    stock, denoiser = stock_model(variant), randomise(UNet2DConditionModel(**UNETS[variant])).eval()
    data = inputs(variant)
    picture = data.pop("controlnet_cond")

    def controlled(model, unet, more):
        down, middle = model(**data, controlnet_cond=picture, conditioning_scale=0.8, **more)
        result = unet(**data, down_block_additional_residuals=down, mid_block_additional_residual=middle, **more)
        return result[0] if more else result

    for dtype, numerics, bound in ((torch.float32, "exact", 0), (torch.float32, "close", MODEL_FLOAT32), (torch.float64, "close", MODEL_FLOAT64)):
        picture = picture.to(dtype)
        data = {key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value for key, value in data.items()}
        if variant == "sdxl":
            data["added_cond_kwargs"] = {key: value.to(dtype) for key, value in data["added_cond_kwargs"].items()}
        theirs = stock.to(dtype), denoiser.to(dtype)
        mine = ours(theirs[0], numerics), test_unet.ours(theirs[1], numerics)
        if dtype is torch.float64:
            theirs = tuple(map(in_float64, theirs))
        got, want, plain = controlled(*mine, {}), controlled(*theirs, dict(return_dict=False)), theirs[1](**data, return_dict=False)[0]
        assert (got - want).abs().max() <= bound * want.abs().max() and (want - plain).abs().max() > 1e-2


@torch.no_grad()
def test_a_new_one_changes_nothing():
    """It begins with the U-Net's weights and with zeros where it joins."""
    unet, config = test_unet.ours(test_unet.stock_model("sd")), ControlNetConfig.from_dict(CONFIGS["sd"])
    model = ControlNet(config).eval()
    missing, unexpected = model.load_state_dict(unet.state_dict(), strict=False)
    assert all(key.startswith("controlnet_") for key in missing) and all(key.startswith(("up_blocks", "conv_norm_out", "conv_out")) for key in unexpected)
    data = inputs("sd")
    picture = data.pop("controlnet_cond")
    down, middle = model(**data, controlnet_cond=picture)
    assert not any(residual.any() for residual in [*down, middle])
    assert torch.equal(unet(**data, down_block_additional_residuals=down, mid_block_additional_residual=middle), unet(**data))
    zeros = [{key for key, value in one.state_dict().items() if key.startswith("controlnet_") and not value.any()}
             for one in (ControlNet(config), ControlNetModel(**CONFIGS["sd"]))]
    assert zeros[0] == zeros[1] and len(zeros[0]) == 2 * (1 + 4 + 1)


@torch.no_grad()
def test_one_picture_and_one_timestep_for_all():
    stock, data = stock_model("sd"), inputs("sd")
    for timestep in (7, torch.tensor(400), torch.tensor([3])):
        given = dict(data, timestep=timestep, controlnet_cond=data["controlnet_cond"][:1])
        got, want = listed(ours(stock, "exact")(**given)), run(stock, given)
        assert_equal(got, want)


@torch.no_grad()
def test_the_picture_counts():
    model, data = ours(stock_model("sd")), inputs("sd")
    other = dict(data, controlnet_cond=1 - data["controlnet_cond"])
    assert all((mine - theirs).abs().max() > 1e-3 for mine, theirs in zip(listed(model(**data)), listed(model(**other)), strict=True))


@pytest.mark.parametrize("variant", CONFIGS)
def test_state_dict_is_diffusers(variant):
    stock = stock_model(variant)
    model = ControlNet(ControlNetConfig.from_dict(stock.config)).state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in stock.state_dict().items()}


@pytest.mark.parametrize("variant", ["sd", "sdxl"])
def test_gradients_against_diffusers(variant):
    stock = stock_model(variant, torch.float64)
    model, reference, data = ours(stock), in_float64(copy.deepcopy(stock)), inputs(variant, dtype=torch.float64)
    for one, call in ((model, lambda: listed(model(**data))), (reference, lambda: run(reference, data))):
        sum(residual.square().mean() for residual in call()).backward()
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64 * want[name].grad.abs().max().clamp_min(1), name


@pytest.mark.parametrize("numerics", ["exact", pytest.param("close", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break_and_trains_under_autocast(numerics):
    model, data = ours(stock_model("sd"), numerics), inputs("sd")
    torch._dynamo.reset()
    with torch.no_grad():
        assert_near(listed(torch.compile(model, fullgraph=True, backend="aot_eager")(**data)), listed(model(**data)), MODEL_FLOAT32)
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(residual.float().square().mean() for residual in listed(model.train()(**data)))
    loss.backward()
    assert all(parameter.grad.dtype is torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


class Official(ControlNetConfig):
    """``channel_mult`` of the golden tensors' network begins with 2: the first convolution is half as wide as the first level."""

    width = 32


@pytest.mark.parametrize("dtype, bound", [(torch.float64, MODEL_FLOAT64), (torch.float32, MODEL_FLOAT32)], ids=str)
@torch.no_grad()
def test_golden_tensors_of_the_official_repository(dtype, bound):
    tensors, official = golden("controlnet")
    config = Official(block_out_channels=(64, 64), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=20,
                      attention_head_dim=2, conditioning_embedding_out_channels=(16, 32, 96, 256))
    model = ControlNet(config).eval()
    checkpoint = {"control_model." + key: value for key, value in official.items()} | {"model.diffusion_model.x": torch.zeros(1)}
    model.load_state_dict(from_official(checkpoint, config), strict=True)
    got = listed(model.to(dtype)(tensors["in/x"].to(dtype), tensors["in/t"], tensors["in/context"].to(dtype), tensors["in/hint"].to(dtype)))
    assert_near(got, [tensors[f"out/control_{index}"] for index in range(5)], bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, MODEL_FLOAT64), (torch.float32, MODEL_FLOAT32)], ids=str)
@torch.no_grad()
def test_golden_tensors_of_a_controlled_unet(dtype, bound):
    tensors, official = golden("controlnet_unet")
    config = UNetConfig(block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=20, attention_head_dim=2)
    model = UNet(config).eval()
    model.load_state_dict(unet_from_official(official, config), strict=True)
    *down, middle = (tensors[f"in/control_{index}"].to(dtype) for index in range(5))
    data = dict(sample=tensors["in/x"].to(dtype), timestep=tensors["in/t"], encoder_hidden_states=tensors["in/context"].to(dtype))
    for name, residuals in (("x", dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)),
                            ("x_mid_only", dict(mid_block_additional_residual=middle)), ("x_uncontrolled", {})):
        assert_near([model.to(dtype)(**data, **residuals)], [tensors[f"out/{name}"]], bound)


@pytest.mark.parametrize("change, message", [
    (dict(controlnet_conditioning_channel_order="gbr"), "^controlnet_conditioning_channel_order is 'gbr'; it should be 'rgb' or 'bgr'"),
    (dict(mid_block_type=None), "^mid_block_type is None"),
    (dict(down_block_types=("DownBlock2D",)), "^down_block_types is .* 2 levels"),
    (dict(up_block_types=("UpBlock2D",) * 2), "unknown entries.*up_block_types"),
    (dict(encoder_hid_dim=8), "^encoder_hid_dim is 8; it should be None"),
])
def test_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ControlNetConfig.from_dict(dict(CONFIGS["sd"], **change))


@pytest.mark.parametrize("change, error, message", [
    (dict(controlnet_cond=torch.zeros(2, 3, 16, 20)), ValueError, r"^controlnet_cond is \[2, 3, 16, 20\]; it should be \[2, 3, 16, 24\]"),
    (dict(controlnet_cond=torch.zeros(3, 3, 16, 24)), ValueError, r"^controlnet_cond is \[3, 3, 16, 24\]"),
    (dict(controlnet_cond=torch.zeros(2, 1, 16, 24)), ValueError, r"^controlnet_cond is \[2, 1, 16, 24\]"),
    (dict(controlnet_cond=None), ValueError, "^controlnet_cond is None"),
    (dict(controlnet_cond=torch.zeros(2, 3, 16, 24, dtype=torch.uint8)), TypeError, "^controlnet_cond has dtype torch.uint8"),
    (dict(controlnet_cond=torch.zeros(2, 3, 16, 24, device="meta")), ValueError, "^controlnet_cond is on meta"),
    (dict(encoder_hidden_states=None), ValueError, "^encoder_hidden_states is None"),
    (dict(sample=torch.zeros(2, 3, 8, 12)), ValueError, "^sample has shape"),
])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        ours(stock_model("sd"))(**dict(inputs("sd"), **change))


@pytest.mark.parametrize("key", ["input_hint_block.16.weight", "zero_convs.5.0.weight", "out.0.weight"])
def test_a_name_the_official_repository_does_not_have(key):
    with pytest.raises(KeyError, match=key):
        from_official({key: torch.zeros(1)}, ControlNetConfig.from_dict(CONFIGS["sd"]))
