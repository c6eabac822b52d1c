"""SD3's ControlNets against diffusers' SD3ControlNetModel; their residuals in our MMDiT."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SD3ControlNetModel

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.models.controlnet_sd3 import SD3ControlNet, SD3ControlNetConfig, from_official
from tests.models import stock_sd3, test_mmdit
from tests.models.golden import golden
from tests.models.stock_sd3 import SD3, SD35, in_float64, randomise
from tests.models.test_controlnet import assert_equal, assert_near, loaded
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

# As published: InstantX's, one with what SD3.5-medium has, alimama's, which has a mask beside the picture, and Stability's of SD3.5-large
CONFIGS = {"sd3": SD3, "sd3.5": dict(SD35, dual_attention_layers=(1,)), "inpainting": dict(SD3, num_layers=1, extra_conditioning_channels=1),
           "sd3.5-large": dict(SD3, joint_attention_dim=None, caption_projection_dim=64, pos_embed_max_size=None, pos_embed_type=None, use_pos_embed=False,
                               force_zeros_for_pooled_projection=False),
           "no positions": dict(SD3, num_layers=1, pos_embed_type=None, pos_embed_max_size=None)}
SIZES = [(1, 8, 12), (3, 16, 4)]


def stock_model(variant: str, dtype: torch.dtype = torch.float32) -> SD3ControlNetModel:
    return randomise(SD3ControlNetModel(**CONFIGS[variant])).eval().to(dtype)  # what begins at zero too


def ours(stock: SD3ControlNetModel, numerics: str = "close") -> SD3ControlNet:
    return loaded(SD3ControlNet, SD3ControlNetConfig, stock, numerics)


def inputs(variant: str, batch: int = 2, height: int = 8, width: int = 12, dtype: torch.dtype = torch.float32) -> dict:
    given = stock_sd3.inputs(batch, height, width, dtype=dtype)
    if variant == "sd3.5-large":
        given |= dict(hidden_states=torch.randn(batch, height * width // 4, 32).to(dtype), encoder_hidden_states=None)
    return given | dict(controlnet_cond=torch.randn(batch, 4 + (variant == "inpainting"), height, width).to(dtype))


def run(stock: SD3ControlNetModel, data: dict, **more) -> list[torch.Tensor]:
    return stock(**data, **more, return_dict=False)[0]


@pytest.mark.parametrize("variant", CONFIGS)
def test_float64_against_diffusers_with_gradients(variant):
    stock = stock_model(variant, torch.float64)
    model, reference, data = ours(stock), in_float64(copy.deepcopy(stock)), inputs(variant, dtype=torch.float64)
    found = model(**data), run(reference, data)
    assert_near(*found, MODEL_FLOAT64)
    for residuals in found:
        sum(residual.square().mean() for residual in residuals).backward()
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if want[name].grad is None:  # the last block's text stream leads nowhere
            assert parameter.grad is None and name.startswith(f"transformer_blocks.{len(found[0]) - 1}."), name
        else:
            assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64 * want[name].grad.abs().max().clamp_min(1), name


@pytest.mark.parametrize("batch, height, width", SIZES)
@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_float32_against_diffusers(variant, batch, height, width):
    stock, data = stock_model(variant), inputs(variant, batch, height, width)
    assert_near(ours(stock)(**data), run(stock, data), MODEL_FLOAT32)
    assert not CPU.loaded or ops.stats()["gate_residual_adaln"]["cpu"] and ops.stats()["linear"]["cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", CONFIGS)
@torch.no_grad()
def test_exact_is_equal_to_diffusers(variant, dtype):
    """However the inputs lie: where a convolution's output lies otherwise, stock's products have other bits in 16 bits."""
    stock = stock_model(variant, dtype)
    model = ours(stock, "exact")
    for size in SIZES:
        data = inputs(variant, *size, dtype)
        assert_equal(model(**data, conditioning_scale=0.7), run(stock, data, conditioning_scale=0.7))
        lying = {key: value.contiguous(memory_format=torch.channels_last) if value is not None and value.dim() == 4 else value for key, value in data.items()}
        if variant == "sd3.5-large":
            lying["hidden_states"] = lying["hidden_states"].mT.contiguous().mT
        assert_equal(model(**lying), run(stock, lying))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        assert_equal(model(**data), run(stock, data))
    assert not CPU.loaded or ops.stats()["gate_residual_adaln"]["cpu"]


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-large"])
@torch.no_grad()
def test_residuals_in_our_mmdit(variant):
    """Our ControlNet and MMDiT against diffusers' two; without an embedding of its own, the ControlNet sees the MMDiT's."""
    stock, denoiser = stock_model(variant), stock_sd3.stock_model("sd3.5", num_layers=5)
    for dtype, numerics, bound in ((torch.float32, "exact", 0), (torch.bfloat16, "exact", 0), (torch.float32, "close", MODEL_FLOAT32),
                                   (torch.float64, "close", MODEL_FLOAT64)):
        theirs = stock.to(dtype), denoiser.to(dtype)
        mine = ours(theirs[0], numerics), test_mmdit.ours("sd3.5", theirs[1], numerics, num_layers=5).to(dtype)
        if dtype is torch.float64:
            theirs = tuple(map(in_float64, theirs))
        data, found = inputs(variant, dtype=dtype) | stock_sd3.inputs(dtype=dtype), []
        picture = dict(controlnet_cond=data.pop("controlnet_cond"), conditioning_scale=0.8)
        for (model, mmdit), more in ((mine, {}), (theirs, dict(return_dict=False))):
            seen = data if variant != "sd3.5-large" else data | dict(hidden_states=mmdit.pos_embed(data["hidden_states"]), encoder_hidden_states=None)
            residuals = model(**seen, **picture, **more)
            result = mmdit(**data, block_controlnet_hidden_states=residuals[0] if more else residuals, **more)
            found.append(result[0] if more else result)
        plain = theirs[1](**data, return_dict=False)[0]
        assert (found[0] - found[1]).abs().max() <= bound * found[1].abs().max() and (found[1] - plain).abs().max() > 1e-2


@torch.no_grad()
def test_the_mmdits_embedding_may_be_assigned():
    """As diffusers' pipeline does for SD3.5-large: it then takes latents."""
    stock, denoiser, data = stock_model("sd3.5-large", torch.bfloat16), stock_sd3.stock_model("sd3", torch.bfloat16), inputs("sd3", dtype=torch.bfloat16)
    model, mmdit, data["encoder_hidden_states"] = ours(stock, "exact"), test_mmdit.ours("sd3", denoiser, "exact").bfloat16(), None
    tokens = model(**data | dict(hidden_states=mmdit.pos_embed(data["hidden_states"])))
    model.pos_embed, stock.pos_embed = mmdit.pos_embed, stock._get_pos_embed_from_transformer(denoiser).bfloat16()
    assert_equal(model(**data), run(stock, data))
    assert_equal(model(**data), tokens)
    with pytest.raises(ValueError, match=r"^hidden_states has shape \[2, 4, 34, 12\]; .* at most 32"):
        model(**data | dict(hidden_states=torch.zeros(2, 4, 34, 12)))


@torch.no_grad()
def test_a_new_one_changes_nothing():
    """It begins with the MMDiT's weights and with zeros where it joins."""
    mmdit = test_mmdit.ours("sd3", stock_sd3.stock_model("sd3", num_layers=3), num_layers=3)
    model = SD3ControlNet(SD3ControlNetConfig.from_dict(CONFIGS["sd3"])).eval()
    missing, unexpected = model.load_state_dict(mmdit.state_dict(), strict=False)
    assert all(key.startswith(("controlnet_blocks.", "pos_embed_input.")) for key in missing)
    assert all(key.startswith(("transformer_blocks.2.", "norm_out.", "proj_out.")) for key in unexpected)
    data = inputs("sd3")
    residuals = model(**data)
    assert len(residuals) == 2 and not any(residual.any() for residual in residuals)
    data.pop("controlnet_cond")
    assert torch.equal(mmdit(**data, block_controlnet_hidden_states=residuals), mmdit(**data))
    zeros = [{key for key, value in one.state_dict().items() if not value.any()} for one in (model, SD3ControlNetModel(**CONFIGS["sd3"]))]
    assert zeros[0] == zeros[1] and len(zeros[0]) == 2 * (2 + 1)


@pytest.mark.parametrize("variant", ["sd3", "sd3.5-large"])
@torch.no_grad()
def test_the_picture_counts_and_one_may_serve_all(variant):
    stock, data = stock_model(variant), inputs(variant, 3)
    one = data | dict(controlnet_cond=data["controlnet_cond"][:1])
    model = ours(stock, "exact")
    assert_equal(model(**one), run(stock, one))
    assert all((mine - theirs).abs().max() > 1e-3 for mine, theirs in zip(model(**one), model(**data), strict=True))


@pytest.mark.parametrize("variant", CONFIGS)
def test_state_dict_is_diffusers(variant):
    stock = stock_model(variant)
    config = SD3ControlNetConfig.from_dict(stock.config)
    model, want = SD3ControlNet(config).state_dict(), stock.state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in want.items()}
    assert config.force_zeros_for_pooled_projection == (variant != "sd3.5-large")


@pytest.mark.parametrize("numerics", ["exact", pytest.param("close", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiles_without_a_graph_break(numerics):
    dtype = torch.bfloat16 if numerics == "exact" else torch.float32
    model, data = ours(stock_model("sd3", dtype), numerics), inputs("sd3", dtype=dtype)
    torch._dynamo.reset()
    assert_near(torch.compile(model, fullgraph=True, backend="eager")(**data), model(**data), 0 if numerics == "exact" else MODEL_FLOAT32)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("variant", ["sd3.5", "sd3.5-large"])
def test_trains_under_autocast(variant, numerics):
    model, data = ours(stock_model(variant), numerics).train(), inputs(variant)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(residual.float().square().mean() for residual in model(**data))
    loss.backward()
    last = f"transformer_blocks.{len(model.transformer_blocks) - 1}."
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # the last block's text stream leads nowhere
            assert name.startswith(last) and ("context" in name or "add" in name), name
        else:
            assert parameter.grad.dtype is torch.float32 and parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or name.endswith(("to_k.bias", "add_k_proj.bias")) or name.startswith(last), name


@pytest.mark.parametrize("change, message", [
    (dict(qk_norm="layer_norm"), "^qk_norm is 'layer_norm'; it should be None or 'rms_norm'"),
    (dict(pos_embed_type="rotary"), "^pos_embed_type is 'rotary'; it should be None or 'sincos'"),
    (dict(pos_embed_max_size=None), "^pos_embed_max_size is None; it should be the side"),
    (dict(caption_projection_dim=64), "^caption_projection_dim is 64; it should be .* = 32"),
    (dict(num_layers=0), "^num_layers is 0"),
    (dict(num_single_layers=2), "unknown entries.*num_single_layers"),
])
def test_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        SD3ControlNetConfig.from_dict(dict(CONFIGS["sd3"], **change))


@pytest.mark.parametrize("variant, change, message", [
    ("sd3", dict(controlnet_cond=torch.zeros(2, 4, 8, 10)), r"^controlnet_cond is \[2, 4, 8, 10\]; it should be \[2, 4, 8, 12\]"),
    ("sd3", dict(controlnet_cond=torch.zeros(3, 4, 8, 12)), r"^controlnet_cond is \[3, 4, 8, 12\]"),
    ("inpainting", dict(controlnet_cond=torch.zeros(2, 4, 8, 12)), r"^controlnet_cond is .* it should be \[2, 5, 8, 12\]"),
    ("sd3.5-large", dict(controlnet_cond=torch.zeros(2, 4, 8, 10)), r"^controlnet_cond is .* it should be \[2, 4, H, W\], 24 patches of 2 x 2"),
    ("sd3.5-large", dict(controlnet_cond=torch.zeros(2, 4, 96)), r"^controlnet_cond is \[2, 4, 96\]"),
    ("sd3.5-large", dict(controlnet_cond=torch.zeros(2, 4, 3, 32)), r"^controlnet_cond is \[2, 4, 3, 32\]"),
    ("sd3", dict(controlnet_cond=None), "^controlnet_cond is None; it should be"),
    ("sd3", dict(encoder_hidden_states=None), r"^encoder_hidden_states is None; it should be \[2, L, 32\], as joint_attention_dim is 32"),
    ("sd3.5-large", dict(encoder_hidden_states=torch.zeros(2, 5, 32)), r"^encoder_hidden_states is \[2, 5, 32\]; it should be None"),
    ("sd3", dict(hidden_states=torch.zeros(2, 24, 32)), r"^hidden_states has shape \[2, 24, 32\]; it should be \[B, 4, H, W\]"),
    ("sd3", dict(hidden_states=torch.zeros(2, 4, 34, 12)), "^hidden_states has shape .* at most 32"),
    ("no positions", dict(hidden_states=torch.zeros(2, 4, 7, 12)), "^hidden_states has shape .* multiples of 2$"),
    ("sd3.5-large", dict(hidden_states=torch.zeros(2, 4, 8, 12)), r"^hidden_states has shape .* it should be \[B, T, 32\], tokens"),
    ("sd3", dict(encoder_hidden_states=torch.zeros(2, 5, 31)), "^encoder_hidden_states has shape"),
    ("sd3.5-large", dict(pooled_projections=torch.zeros(1, 64)), "^pooled_projections has shape"),
    ("sd3", dict(timestep=torch.zeros(3)), "^timestep has shape"),
])
def test_bad_input_is_named(variant, change, message):
    with pytest.raises(ValueError, match=message):
        SD3ControlNet(SD3ControlNetConfig.from_dict(CONFIGS[variant]))(**inputs(variant) | change)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, MODEL_FLOAT64), (torch.float32, MODEL_FLOAT32)], ids=str)
@torch.no_grad()
def test_golden_tensors_of_the_official_repository(dtype, bound):
    tensors, official = golden("sd35_controlnet")
    config = SD3ControlNetConfig(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=1, joint_attention_dim=None,
                                 pooled_projection_dim=24, pos_embed_max_size=None, pos_embed_type=None, use_pos_embed=False)
    model = SD3ControlNet(config).eval()
    model.load_state_dict(from_official(official), strict=True)
    x, picture, pooled = (tensors[f"in/{name}"].to(dtype) for name in ("x", "x_cond", "y"))
    got = model.to(dtype)(x, None, pooled, 1000 * tensors["in/timestep"], picture)
    assert_near(got, [tensors["out/0"], tensors["out/1"]], bound)
    assert not CPU.loaded or ops.stats()["adaln_modulate"]["cpu"]


@pytest.mark.parametrize("key", ["transformer_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.bias"])
def test_a_name_the_official_repository_does_not_have(key):
    with pytest.raises(KeyError, match=key):
        from_official({key: torch.zeros(3)})
