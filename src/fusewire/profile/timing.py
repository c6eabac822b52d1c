"""Timing of several sides in one process, in turn, after warm-up: medians and quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fusewire.machine import seconds


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25 % and the 75 % point; the smallest and the largest sample where there are fewer than four."""
        if len(self.samples) < 4:
            return min(self.samples), max(self.samples)
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


def alternate(sides: dict[str, Callable[[], object]], device: torch.device, *, rounds: int, warmup: int = 1, least: float = 0.0,
              tick: Callable[[], None] = lambda: None, samples: dict[str, list[float]] | None = None) -> dict[str, Timing]:
    """Call every side ``warmup`` times, then ``rounds`` times in turn.

    least: seconds that one sample should take; a faster side is called several times for each sample. samples: filled with each side's seconds, a round at
    a time, for a caller that is to have the complete rounds where a later one is interrupted.
    """
    repeats = {}
    for name, call in sides.items():
        for _ in range(max(1, warmup)):
            took = seconds(call, device)
        repeats[name] = max(1, min(10_000, int(least / max(took, 1e-7))))
        tick()
    samples = {} if samples is None else samples
    for _ in range(rounds):
        taken = {}
        for name, call in sides.items():
            count = repeats[name]
            taken[name] = seconds(lambda: [call() for _ in range(count)], device) / count
            tick()
        for name, one in taken.items():
            samples.setdefault(name, []).append(one)
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}
