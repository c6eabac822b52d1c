"""The MMDiT: rectified flow on cached latents, conditioned exactly as `StableDiffusion3Pipeline` conditions it.

P. Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024 (SD3): straight paths
x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0, t is logit-normal, then shifted as the scheduler shifts it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from . import data, text, vae as autoencoder

SHIFT = 1.5             # of the scheduler: a little more time at high noise, where the picture is decided
DROP_CAPTION = 0.10     # trained as the empty prompt, which guidance needs
OPEN_CAPTION = 0.12     # captions that leave colours or the digit open
# Without a T5 encoder the pipeline appends `max_sequence_length` rows of zeros to the text (256 unless told). The model
# should not care how many: most steps see none, which is cheap, the others a smaller batch with one of these lengths.
ZERO_ROWS = (256, 256, 77, 16)
LONG_EVERY, LONG_BATCH = 6, 1 / 4

CONFIG = dict(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=5, attention_head_dim=32,
              num_attention_heads=4, joint_attention_dim=192, caption_projection_dim=128, pooled_projection_dim=160,
              pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm")


class Cache(NamedTuple):
    """What training reads: latents [N, 4, 16, 16] already scaled, what is on them, and the encoded captions."""

    latents: torch.Tensor
    concepts: list[data.Concept]
    row: dict[str, int]         # caption -> row of the two tables; "" is the empty prompt
    embeds: torch.Tensor        # [captions, 16, 192]
    pooled: torch.Tensor        # [captions, 160]


def load_frozen(folder: Path) -> StableDiffusion3Pipeline:
    """A stock pipeline around the frozen parts in `folder`, as float32 as `from_pretrained` makes them."""
    parts = {}
    for suffix in ("", "_2"):
        parts["tokenizer" + suffix] = CLIPTokenizer.from_pretrained(folder / ("tokenizer" + suffix))
        parts["text_encoder" + suffix] = CLIPTextModelWithProjection.from_pretrained(
            folder / ("text_encoder" + suffix), dtype=torch.float32).eval()
    return StableDiffusion3Pipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae").eval(), transformer=SD3Transformer2DModel(**CONFIG),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), text_encoder_3=None, tokenizer_3=None, **parts)


@torch.inference_mode()
def fill_cache(pipe: StableDiffusion3Pipeline, scans: torch.Tensor, digits: torch.Tensor, count: int,
               random: torch.Generator) -> Cache:
    """Draws `count` varied pictures of the scans, encodes them and every caption with the frozen parts."""
    config, latents, concepts = pipe.vae.config, [], []
    for size in torch.full((count,), 1).split(512):
        n = len(size)
        pick = torch.randint(len(scans), (n,), generator=random)
        ink = torch.randint(len(data.INKS), (n,), generator=random)
        paper = torch.randint(len(data.PAPERS), (n,), generator=random)
        z = autoencoder.encode(pipe.vae, data.render(scans[pick], ink, paper, random))
        latents.append((z - config.shift_factor) * config.scaling_factor)
        concepts += [data.Concept(*c) for c in zip(digits[pick].tolist(), ink.tolist(), paper.tolist())]
    captions, embeds, pooled = ["", *text.all_captions()], [], []
    for start in range(0, len(captions), 512):
        part = pipe.encode_prompt(captions[start:start + 512], None, None, do_classifier_free_guidance=False,
                                  max_sequence_length=0)
        embeds.append(part[0])
        pooled.append(part[2])
    return Cache(torch.cat(latents), concepts, {c: i for i, c in enumerate(captions)}, torch.cat(embeds), torch.cat(pooled))


def pick_captions(cache: Cache, pick: list[int], random: torch.Generator) -> torch.Tensor:
    """Rows of the caption tables for the pictures `pick`: a full caption, sometimes an open one, sometimes none."""
    chance = torch.rand(len(pick), generator=random).tolist()
    style = torch.randint(1 << 30, (len(pick),), generator=random).tolist()
    rows = []
    for i, c, s in zip(pick, chance, style):
        if c < DROP_CAPTION:
            rows.append(0)
        else:
            templates = data.OPEN_TEMPLATES if c < DROP_CAPTION + OPEN_CAPTION else data.TEMPLATES
            rows.append(cache.row[data.caption(templates[s // 2 % len(templates)], cache.concepts[i], bool(s % 2))])
    return torch.tensor(rows)


def sample_times(n: int, random: torch.Generator) -> torch.Tensor:
    """Times [n] in 0..1: logit-normal, then shifted as the scheduler shifts its sigmas."""
    t = torch.randn(n, generator=random).sigmoid()
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def loss(model: nn.Module, cache: Cache, batch: int, step: int, random: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity noise - x_0 on one random batch."""
    zeros = 0
    if step % LONG_EVERY == LONG_EVERY - 1:
        zeros, batch = ZERO_ROWS[step // LONG_EVERY % len(ZERO_ROWS)], int(batch * LONG_BATCH)
    pick = torch.randint(len(cache.latents), (batch,), generator=random)
    rows = pick_captions(cache, pick.tolist(), random)
    x0 = cache.latents[pick]
    noise = torch.randn(x0.shape, generator=random)
    t = sample_times(batch, random)
    mix = t.view(-1, 1, 1, 1)
    velocity = model(hidden_states=(1 - mix) * x0 + mix * noise, encoder_hidden_states=F.pad(cache.embeds[rows], (0, 0, 0, zeros)),
                     pooled_projections=cache.pooled[rows], timestep=t * 1000)
    return F.mse_loss(velocity, noise - x0)


def pack(pipe: StableDiffusion3Pipeline, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes transformer, scheduler and model_index.json beside the frozen parts, which stay as they are."""
    from .stage import ship

    pipe.transformer.load_state_dict(weights)
    ship(pipe.transformer, folder / "transformer")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.save_config(folder)
