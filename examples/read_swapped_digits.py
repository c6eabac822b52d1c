"""Are the digits still read the same after a swap? The embedded pipeline, stock and swapped, from the same seeds, read by its classifier.

    python examples/read_swapped_digits.py --count 40 --json benchmarks/results/read_swapped_digits.json

Digit, ink and paper of every picture are read as in evaluate_digits_sd3.py. Exit code 0 if every swapped picture reads as the stock one does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import diffusers
import torch
from tqdm import tqdm

import fusewire
from digits import data, reader
from evaluate_digits_sd3 import load_or_train_reader, plan

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "assets" / "digits-sd3"


def pictures(pipe, prompts: list[str], batch: int, steps: int) -> torch.Tensor:
    """[N, 3, 32, 32] in -1..1, seeds 1000, 1001, ..., rounded to 8 bits as a saved file would be."""
    out = []
    for start in range(0, len(prompts), batch):
        seeds = [torch.Generator().manual_seed(1000 + i) for i in range(start, min(start + batch, len(prompts)))]
        out.append(pipe(prompts[start:start + batch], height=data.SIZE, width=data.SIZE, num_inference_steps=steps, guidance_scale=4.0, generator=seeds,
                        output_type="pt").images.float())
    return (torch.cat(out) * 255).round() / 127.5 - 1


@torch.inference_mode()
def readings(model: reader.Reader, x: torch.Tensor) -> list[tuple[int, int, int]]:
    inks, papers = reader.read_colours(x)
    return list(zip(model(x).argmax(1).tolist(), inks.tolist(), papers.tolist()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="pictures (default: 40)")
    parser.add_argument("--steps", type=int, default=28, help="sampling steps (default: 28)")
    parser.add_argument("--batch", type=int, default=10, help="pictures per call (default: 10)")
    parser.add_argument("--json", type=Path, help="where the report goes (default: only to the terminal)")
    args = parser.parse_args()
    model = load_or_train_reader(FOLDER / "reader.safetensors")
    prompts, rows = [prompt for _, prompt in plan(args.count)], []
    bar = tqdm(total=6, desc="runs")
    for dtype in (torch.float32, torch.bfloat16):
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None, torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        stock = pictures(pipe, prompts, args.batch, args.steps)
        bar.update()
        for numerics in ("exact", "close"):
            with fusewire.swapped(pipe, numerics=numerics):
                swapped = pictures(pipe, prompts, args.batch, args.steps)
            bar.update()
            same = sum(a == b for a, b in zip(readings(model, swapped), readings(model, stock)))
            rows.append({"dtype": str(dtype).removeprefix("torch."), "numerics": numerics, "pictures": args.count, "read the same": same,
                         "equal": torch.equal(swapped, stock)})
    bar.close()
    report = {"command": "python examples/read_swapped_digits.py " + " ".join(sys.argv[1:]), "date": datetime.date.today().isoformat(),
              "settings": {"steps": args.steps, "guidance": 4.0, "first seed": 1000}, "rows": rows,
              "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__}}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["read the same"] == row["pictures"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
