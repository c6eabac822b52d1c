"""Trains a small but complete Stable Diffusion 3 pipeline on scikit-learn's handwritten digits, from nothing.

    python examples/train_digits_sd3.py --out assets/digits-sd3

Three stages: the autoencoder, the two CLIP text encoders (contrastive, then frozen), the MMDiT (rectified flow). The
folder that results is in diffusers' format; `StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)` loads it. The weights are
stored as float16, and every later stage is trained on the rounded weights of the stages before it.

Interrupt it whenever you like: the same command goes on from the last checkpoint (in OUT-training) and ends with the
same weights as an uninterrupted run. Delete OUT-training to start afresh. The loss curve (OUT-training/loss.png) is
redrawn at every checkpoint, and so is the pipeline in OUT, so that an unfinished model can be tried.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

# Threads that wait without spinning: steps are short, and the machine may be shared. Must be set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import torch
import transformers

from digits import data, flow, text, vae
from digits.stage import Interrupted, Stage, generator, ship


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("digits-sd3"), help="folder of the finished pipeline (default: digits-sd3)")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="ceiling on the compute minutes of the MMDiT stage; it ends its schedule early there (default: none)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number gives other roundings (default: 2)")
    parser.add_argument("--vae-steps", type=int, default=560, help="default: 560")
    parser.add_argument("--clip-steps", type=int, default=300, help="default: 300")
    parser.add_argument("--steps", type=int, default=2200, help="of the MMDiT (default: 2200)")
    parser.add_argument("--batch", type=int, default=64, help="pictures per MMDiT step (default: 64)")
    parser.add_argument("--pool", type=int, default=32768, help="pictures drawn and encoded for the MMDiT (default: 32768)")
    parser.add_argument("--until", choices=("vae", "clip", "mmdit"), default="mmdit", help="stop after this stage")
    return parser.parse_args()


def train_vae(args: argparse.Namespace, work: Path) -> None:
    (scans, _), _ = data.split_scans()
    torch.manual_seed(args.seed)
    model = vae.build()
    stage = Stage(work, "vae", model, seed=args.seed, steps=args.vae_steps, lr=2e-3, ema=0.995)
    stage.run(lambda random: vae.loss(model, scans, 32, random))
    model.load_state_dict(stage.average)
    model.half().float()   # the shipped weights; the scale is measured on them
    vae.set_scale(model, scans, generator(args.seed, "scale", 0))
    ship(model, args.out / "vae")


def train_clip(args: argparse.Namespace, work: Path) -> None:
    (scans, digits), _ = data.split_scans()
    tokenizers = [text.write_tokenizer(args.out / "tokenizer", pad=text.END), text.write_tokenizer(args.out / "tokenizer_2", pad="!")]
    torch.manual_seed(args.seed)
    encoders = text.build(*tokenizers)
    model = text.Contrast(encoders)
    stage = Stage(work, "clip", model, seed=args.seed, steps=args.clip_steps, lr=2e-3, weight_decay=0.05)
    stage.run(lambda random: model.loss(*text.batch(scans, digits, tokenizers, random)))
    ship(encoders[0], args.out / "text_encoder")
    ship(encoders[1], args.out / "text_encoder_2")


def train_mmdit(args: argparse.Namespace, work: Path) -> None:
    from fusewire.models.mmdit import MMDiT, MMDiTConfig

    (scans, digits), _ = data.split_scans()
    pipe = flow.load_frozen(args.out)
    print(f"drawing and encoding {args.pool} pictures and all captions ...", flush=True)
    cache = flow.fill_cache(pipe, scans, digits, args.pool, generator(args.seed, "pool", 0))
    torch.manual_seed(args.seed)
    model = MMDiT(MMDiTConfig(**flow.CONFIG))
    model.init_weights()
    stage = Stage(work, "mmdit", model, seed=args.seed, steps=args.steps, lr=1e-3, ema=0.998, minutes=args.minutes)

    def finish() -> None:
        flow.pack(pipe, stage.average, args.out)
        plot_losses(work)

    stage.run(lambda random: flow.loss(model, cache, args.batch, stage.step, random), after_save=finish)
    finish()


def plot_losses(work: Path) -> None:
    """Draws every stage's loss, smoothed, into loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = [work / f"{name}.pt" for name in ("vae", "clip", "mmdit") if (work / f"{name}.pt").exists()]
    figure, axes = plt.subplots(1, len(paths), figsize=(4 * len(paths), 3), squeeze=False, layout="constrained")
    for axis, path in zip(axes[0], paths):
        losses = torch.tensor(torch.load(path, weights_only=True)["losses"])
        window = max(1, min(50, len(losses) // 4))
        axis.plot(range(window - 1, len(losses)), losses.unfold(0, window, 1).mean(1))
        axis.set(title=path.stem, xlabel="step", ylabel=f"loss, mean of {window} steps", yscale="log")
    figure.savefig(work / "loss.png", dpi=90)
    plt.close(figure)


def summarise(args: argparse.Namespace, work: Path, began: float, resumed: bool) -> None:
    """Writes OUT/training.json (settings, steps, compute time per stage, the time by the clock since `began`) and copies the loss curve beside it."""
    stages = {}
    for name in STAGES:
        state = torch.load(work / f"{name}.pt", weights_only=True)
        stages[name] = {"steps": state["step"], "minutes": round(state["spent"] / 60, 2),
                        "final_loss": round(sum(state["losses"][-100:]) / len(state["losses"][-100:]), 5)}
    report = {"settings": {k: str(v) for k, v in vars(args).items() if k not in ("out", "until")}, "stages": stages,
              "minutes_are": f"CPU time of the training loops divided by {args.threads} threads",
              "clock_minutes": round((time.monotonic() - began) / 60, 2),
              "clock_minutes_are": "of the last sitting alone, which went on from a checkpoint" if resumed else "from the start to here, without an interruption",
              "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "transformers": transformers.__version__}}
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.copyfile(work / "loss.png", args.out / "loss.png")


STAGES = {"vae": train_vae, "clip": train_clip, "mmdit": train_mmdit}


def main() -> int:
    args, began = parse(), time.monotonic()
    torch.set_num_threads(args.threads)
    work = args.out.with_name(args.out.name + "-training")
    resumed = work.exists()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, train in STAGES.items():
        done = work / f"{name}.done"
        if not done.exists():
            try:
                train(args, work)
            except Interrupted as stop:
                print(stop)
                return 130
            plot_losses(work)
            done.touch()
        if name == args.until:
            break
    if args.until == "mmdit":
        summarise(args, work, began, resumed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
