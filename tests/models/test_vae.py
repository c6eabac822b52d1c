"""AutoencoderKL against diffusers' class and against golden tensors of FLUX.1's official repository."""

from __future__ import annotations

import copy

import pytest
import torch

from fusewire.models.vae import AutoencoderKL, AutoencoderKLConfig, from_official
from tests.models import stock_unet
from tests.models.golden import golden
from tests.models.stock_unet import VAE, VAES
from tests.tolerance import GRADIENTS_FLOAT64, MODEL_FLOAT32, MODEL_FLOAT64

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ours(stock, numerics: str = "close") -> AutoencoderKL:
    model = AutoencoderKL(AutoencoderKLConfig.from_dict(stock.config), numerics).eval().to(stock.dtype)
    model.load_state_dict(stock.state_dict(), strict=True)
    return model


def picture(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width).to(dtype)


def latents(stock, batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, stock.config.latent_channels, height, width).to(stock.dtype)


@pytest.mark.parametrize("variant", VAES)
def test_float64_against_diffusers(variant):
    stock = stock_unet.vae(torch.float64, variant)
    model, x, z = ours(stock), picture(2, 16, 24, torch.float64), latents(stock, 2, 5, 3)
    with torch.no_grad():
        want, got = stock.encode(x).latent_dist, model.encode(x)
        for value, expected in ((got.mean, want.mean), (got.logvar, want.logvar), (model.decode(z), stock.decode(z).sample)):
            assert (value - expected).abs().max() <= MODEL_FLOAT64 * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("batch, height, width", [(1, 8, 8), (3, 12, 20), (2, 32, 24)])
@pytest.mark.parametrize("variant", VAES)
def test_float32_against_diffusers(variant, batch, height, width, numerics):
    stock = stock_unet.vae(variant=variant)
    model, x, z = ours(stock, numerics), picture(batch, height, width), latents(stock, batch, height // 4, width // 4)
    with torch.no_grad():
        for got, want in ((model.encode(x).mean, stock.encode(x).latent_dist.mean), (model.decode(z), stock.decode(z).sample)):
            assert got.shape == want.shape and (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, height, width", [(1, 12, 20), (3, 16, 8)])
@pytest.mark.parametrize("variant", VAES)
def test_exact_is_equal_to_diffusers(variant, batch, height, width, dtype):
    stock = stock_unet.vae(dtype, variant)
    model, x, z = ours(stock, "exact"), picture(batch, height, width, dtype), latents(stock, batch, height // 4, width // 4)
    noise = torch.randn(batch, stock.config.latent_channels, *stock.encode(x).latent_dist.mean.shape[2:]).to(dtype)
    with torch.no_grad():
        want, got = stock.encode(x).latent_dist, model.encode(x)
        assert torch.equal(got.mean, want.mean) and torch.equal(got.logvar, want.logvar)
        assert torch.equal(got.sample(noise), want.mean + want.std * noise)
        assert torch.equal(model.decode(z), stock.decode(z).sample)


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_channels_last_is_kept(numerics):
    stock = stock_unet.vae().to(memory_format=torch.channels_last)
    model, z = ours(stock, numerics).to(memory_format=torch.channels_last), latents(stock, 2, 6, 5).to(memory_format=torch.channels_last)
    with torch.no_grad():
        want, got = stock.decode(z).sample, model.decode(z)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("height, width", [(8, 21), (19, 30), (5, 9)], ids=["one row", "both ways", "shorter than a tile"])
def test_tiles_are_diffusers(height, width, dtype):
    """Tiles of 8 latents, 6 apart: the last ones are shorter than the fading, or empty but for it."""
    stock = stock_unet.vae(dtype)
    model, z, x = ours(stock, "exact"), latents(stock, 2, height, width), picture(1, 2 * height, 2 * width, dtype)
    for either in (stock, model):
        either.use_tiling = True
    with torch.no_grad():
        assert torch.equal(model.decode(z), stock.decode(z).sample)
        assert torch.equal(model.encode(x).mean, stock.encode(x).latent_dist.mean)
        model.use_tiling = False
        assert not torch.equal(model.decode(z), stock.decode(z).sample)


def test_slices_are_the_batch():
    stock = stock_unet.vae()
    model, z, x = ours(stock), latents(stock, 3, 6, 5), picture(3, 12, 10)
    with torch.no_grad():
        want, moments = model.decode(z), model.encode(x).mean
        calls = []
        model.decoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
        model.use_slicing = True
        assert (model.decode(z) - want).abs().max() <= MODEL_FLOAT32 * want.abs().max() and calls == [1, 1, 1]
        assert (model.encode(x).mean - moments).abs().max() <= MODEL_FLOAT32 * moments.abs().max()


def test_there_and_back_and_the_scale():
    stock = stock_unet.vae(variant="flux")
    model, x = ours(stock), picture(2, 16, 8)
    with torch.no_grad():
        want = stock(x).sample
        assert (model(x) - want).abs().max() <= MODEL_FLOAT32 * want.abs().max()
        noise = torch.randn(2, 16, 4, 2)
        assert torch.equal(model(x, noise), model.decode(model.encode(x).sample(noise)))
    z = torch.randn(2, 16, 4, 2)
    assert torch.equal(model.scale(z), (z - 0.1159) * 0.3611) and (model.unscale(model.scale(z)) - z).abs().max() <= 1e-6


def test_what_wants_float32():
    model = AutoencoderKL(AutoencoderKLConfig.from_dict(VAE))
    assert not model.wants_float32 and model.half().wants_float32
    assert not AutoencoderKL(AutoencoderKLConfig.from_dict(dict(VAE, force_upcast=False))).half().wants_float32


@pytest.mark.parametrize("variant", VAES)
def test_state_dict_is_diffusers(variant):
    stock, model = stock_unet.vae(variant=variant).state_dict(), AutoencoderKL(AutoencoderKLConfig.from_dict(VAES[variant])).state_dict()
    assert {key: value.shape for key, value in model.items()} == {key: value.shape for key, value in stock.items()}


@pytest.mark.parametrize("tiles", [False, True])
def test_gradients_against_diffusers(tiles):
    stock = stock_unet.vae(torch.float64)
    model, reference = ours(stock), copy.deepcopy(stock)
    x = picture(2, 8, 12, torch.float64) if not tiles else picture(1, 20, 24, torch.float64)
    direction = torch.randn_like(x)
    model.use_tiling = tiles
    (model(x) * direction).sum().backward()
    if tiles:  # stock writes into its tiles and cannot be differentiated: against the finite difference along a direction
        name, weight = next((name, weight) for name, weight in model.named_parameters() if name == "decoder.conv_in.weight")
        step, along = 1e-6, torch.randn_like(weight)
        with torch.no_grad():
            weight += step * along
            above = (model(x) * direction).sum()
            weight -= 2 * step * along
            below = (model(x) * direction).sum()
        slope = (above - below) / (2 * step)
        assert ((weight.grad * along).sum() - slope).abs() <= MODEL_FLOAT32 * slope.abs()
        return
    (reference(x).sample * direction).sum().backward()
    want = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name].grad).abs().max() <= GRADIENTS_FLOAT64 * want[name].grad.abs().max().clamp_min(1), name


@pytest.mark.parametrize("change, message", [
    (dict(up_block_types=("AttnUpDecoderBlock2D",) * 2), "^up_block_types is"),
    (dict(down_block_types=("DownEncoderBlock2D",) * 3), "^down_block_types is"),
    (dict(act_fn="gelu"), "^act_fn is 'gelu'"),
    (dict(num_blocks=3), "unknown entries.*num_blocks"),
])
def test_bad_config_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig.from_dict(dict(VAE, **change))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8), (2, 3, 1, 8)])
def test_bad_input_is_named(shape):
    model = AutoencoderKL(AutoencoderKLConfig.from_dict(VAE))
    with pytest.raises(ValueError, match="^x has shape"):
        model.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="^z has shape"):
        model.decode(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, MODEL_FLOAT64), (torch.float32, 9.3e-6)], ids=str)
def test_golden_tensors_of_the_official_repository(dtype, bound):
    tensors, official = golden("flux_autoencoder")
    config = AutoencoderKLConfig(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                                 latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    model = AutoencoderKL(config).eval()
    checkpoint = {"first_stage_model." + key: value for key, value in official.items()} | {"model.x": torch.zeros(1)}
    model.load_state_dict(from_official(checkpoint), strict=True)
    model, x = model.to(dtype), tensors["in/x"].to(dtype)
    with torch.no_grad():
        latent = model.scale(model.encode(x).mean)
        for name, got in (("out/z", latent), ("out/x", model.decode(model.unscale(tensors["in/z"].to(dtype)))),
                          ("out/rec", model.decode(model.unscale(latent)))):
            assert (got - tensors[name]).abs().max() <= bound * tensors[name].abs().max(), name
