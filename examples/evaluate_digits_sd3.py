"""Measures a digits pipeline: does it draw what the prompt says, in the colours that the prompt says?

    python examples/evaluate_digits_sd3.py assets/digits-sd3

Generates pictures with the stock diffusers pipeline (28 steps, guidance 4, one fixed seed per picture) for prompts that
cover digits, inks, papers and wordings evenly. A classifier trained here on real held-in scans, never on generated
pictures, reads the digits (its accuracy on real held-out scans is reported too); the colours are measured. Writes a
JSON report and a picture grid; exit code 0 if digits and colours are both right at least 95 times in 100, else 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from digits import data, reader

THRESHOLD = 0.95


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="pipeline in diffusers' format")
    parser.add_argument("--count", type=int, default=200, help="pictures (default: 200)")
    parser.add_argument("--steps", type=int, default=28, help="sampling steps (default: 28)")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default: 4)")
    parser.add_argument("--text-zeros", type=int, default=256,
                        help="the pipeline's max_sequence_length: rows of zeros where T5 would be (default: 256, the pipeline's own)")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first picture, the next ones count up (default: 1000)")
    parser.add_argument("--batch", type=int, default=20, help="pictures per call (default: 20)")
    parser.add_argument("--json", type=Path, help="where the report goes (default: only to the terminal)")
    parser.add_argument("--grid", type=Path, help="where the picture grid (PNG) goes")
    parser.add_argument("--reader", type=Path, help="safetensors file of the classifier: used if it exists, else written")
    return parser.parse_args()


def plan(count: int) -> list[tuple[data.Concept, str]]:
    """`count` concepts with their prompts: digits in turn; inks, papers, wordings and word or numeral evenly mixed."""
    rows = []
    for k in range(count):
        turn = k // 10
        concept = data.Concept(k % 10, (turn + k) % len(data.INKS), (turn + k // 3) % len(data.PAPERS))
        rows.append((concept, data.caption(data.TEMPLATES[(turn + 3 * k) % len(data.TEMPLATES)], concept, numeral=turn % 2 == 1)))
    return rows


def generate(args: argparse.Namespace, prompts: list[str]) -> torch.Tensor:
    """Pictures [N, 3, 32, 32] in -1..1, rounded to 8 bits as a saved file would be."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(args.folder, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    out = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="pictures"):
        part = prompts[start:start + args.batch]
        seeds = [torch.Generator().manual_seed(args.seed + start + i) for i in range(len(part))]
        out.append(pipe(part, height=data.SIZE, width=data.SIZE, num_inference_steps=args.steps, guidance_scale=args.guidance,
                        generator=seeds, max_sequence_length=args.text_zeros, output_type="pt").images)
    return (torch.cat(out) * 255).round() / 127.5 - 1


def load_or_train_reader(path: Path | None) -> reader.Reader:
    from safetensors.torch import load_file, save_file

    if path is not None and path.exists():
        model = reader.Reader()
        model.load_state_dict(load_file(path))
        return model.eval()
    model = reader.train()
    if path is not None:
        save_file(model.state_dict(), path)
    return model


def save_grid(x: torch.Tensor, path: Path, columns: int = 20, zoom: int = 2) -> None:
    rows = -(-len(x) // columns)
    sheet = torch.ones(rows * columns, *x.shape[1:])
    sheet[:len(x)] = x
    pixels = ((sheet + 1) * 127.5).round().byte().view(rows, columns, 3, data.SIZE, data.SIZE).permute(0, 3, 1, 4, 2)
    image = Image.fromarray(pixels.reshape(rows * data.SIZE, columns * data.SIZE, 3).numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.BICUBIC).save(path, optimize=True)


def main() -> int:
    args = parse()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    model = load_or_train_reader(args.reader)
    real = reader.accuracy_on_held_out(model)
    began, cpu = time.perf_counter(), time.process_time()
    rows = plan(args.count)
    x = generate(args, [prompt for _, prompt in rows])
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    with torch.inference_mode():
        digits = model(x).argmax(1).tolist()
    inks, papers = (t.tolist() for t in reader.read_colours(x))
    inks_named, papers_named = list(data.INKS), list(data.PAPERS)
    wrong, right = [], {"digit": 0, "ink": 0, "paper": 0, "colours": 0}
    for k, ((concept, prompt), digit, ink, paper) in enumerate(zip(rows, digits, inks, papers)):
        hit = {"digit": digit == concept.digit, "ink": ink == concept.ink, "paper": paper == concept.paper}
        hit["colours"] = hit["ink"] and hit["paper"]
        for key in right:
            right[key] += hit[key]
        if not (hit["digit"] and hit["colours"]):
            wrong.append({"seed": args.seed + k, "prompt": prompt, "read": f"{inks_named[ink]} {digit} on {papers_named[paper]}"})
    rates = {key: value / args.count for key, value in right.items()}
    passed = rates["digit"] >= THRESHOLD and rates["colours"] >= THRESHOLD
    report = {
        "command": "python examples/evaluate_digits_sd3.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(), "pictures": args.count,
        "settings": {"steps": args.steps, "guidance": args.guidance, "text_zeros": args.text_zeros, "seed": args.seed}, "right": right, "rates": rates,
        "threshold": THRESHOLD, "passed": passed, "reader_on_real_held_out_scans": real, "wrong": wrong,
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__,
                     "transformers": transformers.__version__}}
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.grid:
        save_grid(x, args.grid)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
