"""A Stable Diffusion 3 pipeline small enough for a test: random weights, real classes, a tokenizer of single letters."""

from __future__ import annotations

import torch

CALL = dict(max_sequence_length=8)  # rows of zeros that stand for the third text encoder
LETTERS = [chr(code) for code in range(33, 127)]


def letters():
    """A CLIP tokenizer of single letters, 8 tokens a prompt."""
    from transformers import CLIPTokenizer

    tokens = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=8)


def tiny_pipeline(dtype: torch.dtype = torch.float32, seed: int = 0):
    """Pictures of 16 x 16 pixels from [4, 8, 8] latents; two blocks of width 32, the first with a second attention."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = letters()
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.pad_token_id)
    transformer = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
                                        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
                                        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,))
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        norm_num_groups=4, latent_channels=4, layers_per_block=1, shift_factor=0.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5), vae=vae,
                                    text_encoder=CLIPTextModelWithProjection(config), tokenizer=tokenizer,
                                    text_encoder_2=CLIPTextModelWithProjection(config), tokenizer_2=tokenizer,
                                    text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)
