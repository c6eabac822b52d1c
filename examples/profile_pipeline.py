"""Show what swapping gains, and where the time goes.

    python examples/profile_pipeline.py [FOLDER]        (a Stable Diffusion 3 folder; the embedded digits pipeline unless given)

(A script named profile.py would hide Python's own module of that name, which torch imports.)
"""

import sys
from pathlib import Path

from diffusers import StableDiffusion3Pipeline

import fusewire

folder = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "assets" / "digits-sd3"
pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)  # it has no T5

result = fusewire.profile(pipe, prompts=["a handwritten red seven on white paper"], steps=4, rounds=3)
for row in result.rows:
    print(f"{row.variant:8} {row.median_ms:8.1f} ms   {row.against_eager:.2f}x eager   first call {row.first_ms:.0f} ms   {row.backends}")
for stage in result.stages["eager"]:
    print(f"{stage:14}", "   ".join(f"{variant} {spent[stage]:.1f} ms" for variant, spent in result.stages.items()))
for verdict in result.verdicts:
    print(f"{'holds' if verdict.holds else 'FAILS'}: {verdict.name} ({verdict.detail})")
