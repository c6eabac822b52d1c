"""Timing of several sides in one process, in turn, after warm-up: medians and quartiles."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
              tick: Callable[[], None] = lambda: None) -> dict[str, Timing]:
    """Call every side ``warmup`` times, then ``rounds`` times in turn.

    least: seconds that one sample should take; a faster side is called several times for each sample.
    """
    repeats = {}
    for name, call in sides.items():
        for _ in range(max(1, warmup)):
            took = seconds(call, device)
        repeats[name] = max(1, min(10_000, int(least / max(took, 1e-7))))
        tick()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            count = repeats[name]
            samples[name].append(seconds(lambda: [call() for _ in range(count)], device) / count)
            tick()
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which the process (on a GPU: the allocator) grows at its peak inside one call; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not status.is_file() or not reset.exists():
        return None
    _give_back_freed_memory()  # otherwise what was freed before would be taken again unseen
    reset.write_text("5")  # sets the peak back to what is resident now; see proc(5)
    before = _status(status, "VmRSS")
    call()
    return max(0, _status(status, "VmHWM") - before)


def _give_back_freed_memory() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library than glibc
        pass


def _status(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
