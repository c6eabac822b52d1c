"""UNet against diffusers' UNet2DConditionModel and UNet2DModel."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from fusewire.models.unet import UNet, UNetConfig
from tests.models.stock_sd3 import randomise
from tests.models.stock_unet import SD, UNETS, in_float64, unet_inputs
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

# As stock_unet's, and: SD2's linears and heads, three levels with several layers; Guided Diffusion's net as UNet2DModel has it, resampled both ways;
# DDPM's, with one head
VARIANTS = {**UNETS,
            "sd2": dict(SD, block_out_channels=(8, 16, 32), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=(1, 2, 4),
                        layers_per_block=(2, 1, 2), use_linear_projection=True, only_cross_attention=(False, True, False)),
            "distilled": dict(SD, time_cond_proj_dim=12, num_class_embeds=6, mid_block_type="UNetMidBlock2D", freq_shift=1, time_embedding_dim=40),
            "no middle": dict(SD, mid_block_type=None)}
GUIDED = dict(sample_size=8, in_channels=4, out_channels=8, block_out_channels=(16, 32), layers_per_block=2, norm_num_groups=4, attention_head_dim=8,
              down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=6,
              resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4)
GUIDED_VARIANTS = {"guided": GUIDED,
                   "guided resnet": dict(GUIDED, block_out_channels=(8, 16, 32), down_block_types=("AttnDownBlock2D",) * 3,
                                         up_block_types=("AttnUpBlock2D",) * 3, downsample_type="resnet", upsample_type="resnet",
                                         attn_norm_num_groups=None),
                   "ddpm": dict(GUIDED, attention_head_dim=None, resnet_time_scale_shift="default", attn_norm_num_groups=None, downsample_padding=0,
                                norm_eps=1e-6, freq_shift=1, flip_sin_to_cos=False),
                   "no attention": dict(GUIDED, add_attention=False)}
ALL = [*VARIANTS, *GUIDED_VARIANTS]


def stock_model(variant: str, dtype: torch.dtype = torch.float32):
    model = UNet2DModel(**GUIDED_VARIANTS[variant]) if variant in GUIDED_VARIANTS else UNet2DConditionModel(**VARIANTS[variant])
    return randomise(model).eval().to(dtype)


def ours(stock, numerics: str = "close") -> UNet:
    model = UNet(UNetConfig.from_dict(stock.config), numerics).eval().to(stock.dtype)
    model.load_state_dict(stock.state_dict(), strict=True)
    return model


def inputs(variant: str, batch: int = 2, height: int = 8, width: int = 12, dtype: torch.dtype = torch.float32) -> dict:
    given = unet_inputs(variant, batch, height, width, dtype=dtype)
    if variant in GUIDED_VARIANTS:
        del given["encoder_hidden_states"]
    if variant in GUIDED_VARIANTS or variant == "distilled":
        given["class_labels"] = torch.randint(0, 6, (batch,))
    if variant == "distilled":
        given["timestep_cond"] = torch.randn(batch, 12).to(dtype)
    return dict(given, timestep=torch.randint(0, 1000, (batch,)))


def run(stock, data: dict) -> torch.Tensor:
    return stock(**data, return_dict=False)[0]


@pytest.mark.parametrize("variant", ALL)
def test_float64_against_diffusers(variant):
    stock, data = stock_model(variant, torch.float64), inputs(variant, dtype=torch.float64)
    with torch.no_grad():
        got, want = ours(stock)(**data), run(in_float64(stock), data)
    assert (got - want).abs().max() <= MODEL_FLOAT64 * want.abs().max().clamp_min(1)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("batch, height, width", [(1, 8, 12), (3, 16, 4)])
@pytest.mark.parametrize("variant", ALL)
def test_float32_against_diffusers(variant, batch, height, width, numerics):
    stock, data = stock_model(variant), inputs(variant, batch, height, width)
    with torch.no_grad():
        got, want = ours(stock, numerics)(**data), run(stock, data)
    assert got.shape == want.shape and (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch, height, width", [(1, 16, 8), (3, 8, 12)])
@pytest.mark.parametrize("variant", ALL)
def test_exact_is_equal_to_diffusers(variant, batch, height, width, dtype):
    stock, data = stock_model(variant, dtype), inputs(variant, batch, height, width, dtype)
    with torch.no_grad():
        assert torch.equal(ours(stock, "exact")(**data), run(stock, data))


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("variant", ["sd", "sd2", "guided"])
def test_channels_last_is_kept(variant, numerics):
    last = dict(memory_format=torch.channels_last)
    stock, data = stock_model(variant).to(**last), inputs(variant)
    data["sample"] = data["sample"].contiguous(**last)
    with torch.no_grad():
        got, want = ours(stock, numerics).to(**last)(**data), run(stock, data)
    assert got.is_contiguous(**last)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("height, width", [(7, 12), (10, 9), (5, 5)])
@pytest.mark.parametrize("variant", ["sd", "sd2", "sdxl"])
def test_sizes_that_cannot_be_halved(variant, height, width):
    stock, data = stock_model(variant), inputs(variant, height=height, width=width)
    with torch.no_grad():
        assert torch.equal(ours(stock, "exact")(**data), run(stock, data))


@pytest.mark.parametrize("timestep", [7, 981.5, torch.tensor(400), torch.tensor([3])], ids=str)
def test_one_timestep_for_all(timestep):
    stock, data = stock_model("sd"), dict(inputs("sd"), timestep=timestep)
    with torch.no_grad():
        assert torch.equal(ours(stock, "exact")(**data), run(stock, data))


def test_a_mask_of_the_text():
    stock, data = stock_model("sd"), inputs("sd")
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    with torch.no_grad():
        want, plain = run(stock, dict(data, encoder_attention_mask=mask)), run(stock, data)
        for numerics in ("exact", "close"):
            got = ours(stock, numerics)(**data, encoder_attention_mask=mask)
            assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max() and (got - plain).abs().max() > 1e-3


def test_controlnet_residuals():
    stock, data = stock_model("sd"), inputs("sd")
    model = ours(stock)
    down = [torch.randn(2, 16, 8, 12), torch.randn(2, 16, 8, 12), torch.randn(2, 16, 4, 6), torch.randn(2, 32, 4, 6)]
    middle = torch.randn(2, 32, 4, 6)
    with torch.no_grad():
        plain = model(**data)
        want = run(stock, dict(data, down_block_additional_residuals=down, mid_block_additional_residual=middle))
        got = model(**data, down_block_additional_residuals=down, mid_block_additional_residual=middle)
        assert (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max() and (got - plain).abs().max() > 1e-2
        # The middle alone is all with zeros on the way down
        zeros = [torch.zeros_like(value) for value in down]
        want = run(stock, dict(data, down_block_additional_residuals=zeros, mid_block_additional_residual=middle))
        assert (model(**data, mid_block_additional_residual=middle) - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()
    with pytest.raises(ValueError, match="^down_block_additional_residuals has 3 entries; it should have 4"):
        model(**data, down_block_additional_residuals=down[:3])


@pytest.mark.parametrize("variant", ["sd", "sdxl"])
def test_t2i_adapter_residuals(variant):
    """Behind the attention of a block with text, at the end of one without, and, a third one, behind the middle block."""
    stock, data = stock_model(variant), inputs(variant)
    sizes = [(16, 8, 12), (32, 4, 6)] if variant == "sd" else [(16, 4, 6), (32, 4, 6), (32, 4, 6)]
    residuals = [torch.randn(2, *size) for size in sizes]
    with torch.no_grad():
        want = run(stock, dict(data, down_intrablock_additional_residuals=[value.clone() for value in residuals]))
        got, plain = ours(stock, "exact")(**data, down_intrablock_additional_residuals=residuals), run(stock, data)
    assert torch.equal(got, want) and (got - plain).abs().max() > 1e-2 and len(residuals) == len(sizes)


def test_the_vector_of_sdxl():
    stock, data = stock_model("sdxl"), inputs("sdxl")
    given = data["added_cond_kwargs"]
    vector = torch.cat([given["text_embeds"], stock.add_time_proj(given["time_ids"].flatten()).view(2, -1)], dim=1)
    model = ours(stock)
    with torch.no_grad():
        assert torch.equal(model(**dict(data, added_cond_kwargs=dict(vector=vector))), model(**data))


@pytest.mark.parametrize("variant", ALL)
def test_state_dict_is_diffusers(variant):
    stock = stock_model(variant)
    model = UNet(UNetConfig.from_dict(stock.config)).state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in stock.state_dict().items()}


@pytest.mark.parametrize("variant", ["sd", "sdxl", "adm", "guided"])
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


@pytest.mark.parametrize("change, message", [
    (dict(up_block_types=("UpBlock2D", "SkipUpBlock2D")), "^up_block_types is"),
    (dict(down_block_types=("DownBlock2D",)), "^down_block_types is .* 2 levels"),
    (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "^mid_block_type is"),
    (dict(addition_embed_type="image"), "^addition_embed_type is 'image'"),
    (dict(addition_embed_type="text_time"), "^addition_embed_type is 'text_time'; addition_time_embed_dim"),
    (dict(attention_head_dim=(2, 2, 2)), "^attention_head_dim is .* 2 entries"),
    (dict(attention_head_dim=None), "^attention_head_dim is None"),
    (dict(class_embed_type="projection"), "^class_embed_type is 'projection'; it should be None"),
    (dict(num_blocks=3), "unknown entries.*num_blocks"),
])
def test_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(dict(SD, **change))


@pytest.mark.parametrize("variant, name, change", [
    ("sd", "sample", dict(sample=torch.zeros(2, 3, 8, 12))),
    ("sd", "encoder_hidden_states", dict(encoder_hidden_states=None)),
    ("sd", "encoder_hidden_states", dict(encoder_hidden_states=torch.zeros(2, 5, 23))),
    ("sd", "class_labels", dict(class_labels=torch.zeros(2, dtype=torch.long))),
    ("guided", "class_labels", dict(class_labels=None)),
    ("sdxl", "added_cond_kwargs", dict(added_cond_kwargs=dict(text_embeds=torch.zeros(2, 32)))),
])
def test_bad_input_is_named(variant, name, change):
    with pytest.raises(ValueError, match=f"^{name} (has|is) "):
        ours(stock_model(variant))(**dict(inputs(variant), **change))
