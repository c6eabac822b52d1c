"""Put Fusewire's kernels into a diffusers pipeline with one line, and take them out again.

    python examples/swap.py [FOLDER]          (a Stable Diffusion 3 folder; the embedded digits pipeline unless given)
"""

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

import fusewire

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "digits-sd3"
pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)  # it has no T5


def picture():
    """The latents of one picture, always from the same seed."""
    return pipe("a handwritten red seven on white paper", num_inference_steps=4, guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
                output_type="latent").images


stock = picture()
handle = fusewire.swap(pipe)  # numerics="exact": every bit stays; numerics="close" is faster still
print(handle.report)
print("the same bits as stock:", torch.equal(picture(), stock))
print("calls by backend:", {op: calls for op, calls in fusewire.ops.stats().items() if any(calls.values())})

handle.restore()
print("the same bits after restoring:", torch.equal(picture(), stock))
