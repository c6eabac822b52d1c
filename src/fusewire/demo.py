"""The main job: both instruments on the embedded pipeline and on a full-size shape, then the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusewire import targets
from fusewire.parity import ParityResult, parity
from fusewire.parity.pictures import PROMPTS
from fusewire.profile import ProfileResult, profile

SEEDS = (0, 1, 2, 3, 4, 5)
EMBEDDED_PROMPTS = (*PROMPTS, "a handwritten purple two on white paper", "a handwritten orange nine on blue paper")


@dataclass
class Plan:
    """What the demo runs. target: a folder, or None for the embedded pipeline. preset: the full-size shape. compile: time torch.compile too."""

    target: str | None = None
    preset: str = "sd3.5-medium"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    layers: int | None = None
    size: int | None = None
    steps: int = 28
    seeds: tuple[int, ...] = SEEDS
    rounds: int = 5
    compile: bool = True


@dataclass
class Outcome:
    """Every result, in the order in which they were made, and the page."""

    parities: list[ParityResult]
    profiles: list[ProfileResult]
    page: Path
    seconds: float
    skipped: str = ""

    @property
    def ok(self) -> bool:
        return all(result.ok for result in (*self.parities, *self.profiles))


def run(plan: Plan, out: Path, *, command: str = "fusewire demo", bars: Callable, show: Callable[[object], None] = lambda result: None) -> Outcome:
    """Run the demo and write the page.

    Args:
        out: the folder of index.html and report.json.
        bars: called with a title, gives a context manager that yields a ``progress`` function.
        show: called with each result as soon as it is there.
    """
    start = time.perf_counter()
    parities: list[ParityResult] = []
    profiles: list[ProfileResult] = []
    jobs = [(plan.preset, dtype) for dtype in plan.dtypes]
    skipped = ""
    if plan.target is not None or targets.embedded() is not None:
        jobs = [(plan.target, dtype) for dtype in plan.dtypes] + jobs
    else:
        skipped = f"the embedded pipeline {targets.EMBEDDED} is not part of this installation; only {plan.preset} was measured"
    for name, dtype in jobs:
        is_preset = name in targets.PRESETS
        target = targets.load(name, dtype=dtype, layers=plan.layers if is_preset else None, size=plan.size if is_preset else None)
        shared = dict(name=target.name, inputs=target.inputs)
        if not is_preset:
            shared |= dict(prompts=EMBEDDED_PROMPTS, steps=plan.steps)
        with bars(f"{target.name}, {dtype}") as tell:
            parities.append(parity(target.value, progress=tell, **shared, **({} if is_preset else dict(seeds=plan.seeds))))
        show(parities[-1])
        with bars(f"{target.name}, {dtype}") as tell:
            profiles.append(profile(target.value, progress=tell, rounds=plan.rounds, compile=plan.compile and is_preset, **shared))
        for result in (parities[-1], profiles[-1]):
            result.description = target.description
        show(profiles[-1])
        del target
    from fusewire.report.page import write

    seconds = time.perf_counter() - start
    return Outcome(parities, profiles, write(out, parities, profiles, command=command, seconds=seconds), seconds, skipped)
