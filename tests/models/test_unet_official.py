"""UNet against golden tensors of latent-diffusion (SD1.x), generative-models (SDXL) and guided-diffusion (ADM)."""

from __future__ import annotations

import pytest
import torch

from fusewire.models.unet import UNet, UNetConfig
from fusewire.models.unet_official import from_official
from tests.models.golden import golden

LEVELS = dict(block_out_channels=(32, 64), layers_per_block=1)
CONFIGS = {
    "ldm_unet_sd15": UNetConfig(**LEVELS, down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
                                cross_attention_dim=20, attention_head_dim=2),
    "sgm_unet_sdxl": UNetConfig(**LEVELS, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=24, attention_head_dim=4,
                                use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=28),
    "guided_diffusion_unet": UNetConfig(**LEVELS, in_channels=3, out_channels=6, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                        mid_block_type="UNetMidBlock2D", up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=32,
                                        num_class_embeds=10, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32, add_attention=True),
}


def data(name: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict:
    given = dict(sample=tensors["in/x"].to(dtype), timestep=tensors["in/t"])
    if name != "guided_diffusion_unet":
        given["encoder_hidden_states"] = tensors["in/context"].to(dtype)
    if name == "sgm_unet_sdxl":
        given["added_cond_kwargs"] = dict(vector=tensors["in/y"].to(dtype))
    return dict(given, class_labels=tensors["in/y"]) if name == "guided_diffusion_unet" else given


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1.3e-5)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_golden_tensors_of_the_official_repository(name, dtype, bound):
    tensors, official = golden(name)
    model = UNet(CONFIGS[name]).eval()
    checkpoint = {"model.diffusion_model." + key: value for key, value in official.items()} | {"first_stage_model.x": torch.zeros(1)}
    model.load_state_dict(from_official(checkpoint, CONFIGS[name]), strict=True)
    with torch.no_grad():
        got = model.to(dtype)(**data(name, tensors, dtype))
    assert (got - tensors["out/x"]).abs().max() <= bound * tensors["out/x"].abs().max()


def test_the_new_attention_order():
    """The same heads, packed with all q first: what the old order gives after that repacking."""
    config = CONFIGS["guided_diffusion_unet"]
    _, official = golden("guided_diffusion_unet")
    repacked = {key: value.unflatten(0, (2, 3, 32)).transpose(0, 1).flatten(0, 2) if ".qkv." in key else value for key, value in official.items()}
    want, got = from_official(official, config), from_official(repacked, config, new_attention_order=True)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert not all(torch.equal(value, want[key]) for key, value in from_official(repacked, config).items())


@pytest.mark.parametrize("key", ["input_blocks.1.0.bogus.weight", "input_blocks.9.0.in_layers.0.weight", "middle_block.3.norm.weight"])
def test_a_name_the_official_repository_does_not_have(key):
    with pytest.raises(KeyError, match=key):
        from_official({key: torch.zeros(1)}, CONFIGS["guided_diffusion_unet"])
