"""One training stage: a loop that can be interrupted anywhere and resumed to the same bits, and how weights are shipped.

All randomness of step k comes from a generator seeded by (seed, stage, k), so a checkpoint needs no random state.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
import zlib
from pathlib import Path
from typing import Callable

import torch
from torch import nn
from tqdm import tqdm


class Interrupted(Exception):
    """Raised after Ctrl-C or SIGTERM, once the checkpoint is on disk."""


def generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one step of one stage."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{stage}/{step}".encode()))


def rate_factor(step: int, progress: float, warmup: int = 100, decay_from: float = 0.7) -> float:
    """Learning-rate factor: linear over the first `warmup` steps, level, then linear down to 2 % from `decay_from` on.

    The level middle makes a run's weights independent of its planned length until the decay begins.
    """
    return min(1.0, (step + 1) / warmup) * max(0.02, min(1.0, (1 - progress) / (1 - decay_from)))


class Stage:
    """State of one stage (`model`, its optimizer, a moving average of its weights, the losses so far) and its loop.

    work: folder for checkpoints. name: of the stage; also names its checkpoint. steps: length of the schedule.
    minutes: ceiling on compute time (CPU time over threads, so a paused or starved process does not lose its turn);
    where it would be passed, the learning rate comes down early and the stage ends.
    """

    def __init__(self, work: Path, name: str, model: nn.Module, *, seed: int, steps: int, lr: float,
                 weight_decay: float = 0.01, ema: float | None = None, minutes: float = math.inf):
        self.path, self.name, self.model = work / f"{name}.pt", name, model
        self.seed, self.steps, self.lr, self.minutes, self.ema_decay = seed, steps, lr, minutes, ema
        decay = [p for p in model.parameters() if p.ndim > 1]
        no_decay = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": weight_decay},
                                            {"params": no_decay, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.99))
        self.average = {k: v.clone() for k, v in model.state_dict().items()} if ema is not None else None
        self.step, self.spent, self.losses = 0, 0.0, []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.spent, self.losses = (state[k] for k in ("average", "step", "spent", "losses"))

    def save(self) -> None:
        """Writes the checkpoint; a kill during the write leaves the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
                    "step": self.step, "spent": self.spent, "losses": self.losses}, fresh)
        os.replace(fresh, self.path)

    @property
    def progress(self) -> float:
        """How much of the stage is done, 0..1."""
        return max(self.step / self.steps, self.spent / (60 * self.minutes))

    def run(self, loss_of: Callable[[torch.Generator], torch.Tensor], save_every: int = 250,
            after_save: Callable[[], None] | None = None) -> None:
        """Trains to the end: each step minimises `loss_of(random numbers of this step)`.

        Raises Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved.
        """
        stop = []
        before = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=self.steps, initial=self.step, desc=f"{self.name:7}", mininterval=2.0, dynamic_ncols=True)
        threads, began, spent = torch.get_num_threads(), time.process_time(), self.spent
        try:
            while self.progress < 1 and not stop:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * rate_factor(self.step, self.progress)
                loss = loss_of(generator(self.seed, self.name, self.step))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.step += 1
                self.spent = spent + (time.process_time() - began) / threads
                self._update_average()
                self.losses.append(loss.item())
                bar.update()
                recent = self.losses[-50:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
                if self.step % save_every == 0:
                    self.save()
                    if after_save:
                        after_save()
            self.save()
        finally:
            bar.close()
            for s, handler in before.items():
                signal.signal(s, handler)
        if stop:
            raise Interrupted(f"stopped at step {self.step} of stage {self.name}; run the same command to go on")

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            for key, value in self.model.state_dict().items():
                self.average[key].lerp_(value, 1 - decay)


def ship(model: nn.Module, folder: Path) -> None:
    """Saves a Hugging Face style module in float16 safetensors: these rounded weights are the ones that count."""
    model.half().save_pretrained(folder, safe_serialization=True)
    model.float()   # what the rounding left, for whoever goes on with this object
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)   # safetensors creates them readable by their owner only
    config = folder / "config.json"
    entries = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
    if "dtype" in entries:
        entries["dtype"] = "float32"   # transformers loads in the dtype named here unless told otherwise; diffusers in float32
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
