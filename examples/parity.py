"""Prove that swapping leaves the picture as it was: op by op, block by block, the whole denoiser, whole pictures.

    python examples/parity.py [FOLDER]        (a Stable Diffusion 3 folder; the embedded digits pipeline unless given)
"""

import sys
from pathlib import Path

from diffusers import StableDiffusion3Pipeline

import fusewire

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "digits-sd3"
pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)  # it has no T5

result = fusewire.parity(pipe, prompts=["a handwritten red seven on white paper"], seeds=[0, 1], steps=4)
for row in result.rows:
    print(f"{row.level:8} {row.name:40} {row.numerics:6} {row.backend:16} {'holds' if row.holds else row.reason}")
for name, errors in result.curves.items():
    print(f"{name}: {errors[-1]:.1e} after the last step")
print("every verdict holds:", result.ok)
sys.exit(not result.ok)
