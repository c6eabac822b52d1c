"""The main job: both instruments on the embedded pipeline and on a full-size shape, then the page."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fusewire import targets
from fusewire.errors import BadInput, count
from fusewire.interrupt import undisturbed
from fusewire.parity import ParityResult, check_run, parity
from fusewire.parity.pictures import PROMPTS
from fusewire.parity.result import name_of
from fusewire.presets import check_shape
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
    """Every result, in the order in which they were made, and the page. lacking: the results that an interrupt prevented, in words. page: None where
    nothing was finished."""

    parities: list[ParityResult] = field(default_factory=list)
    profiles: list[ProfileResult] = field(default_factory=list)
    page: Path | None = None
    seconds: float = 0.0
    skipped: str = ""
    interrupted: bool = False
    lacking: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.lacking and all(result.ok for result in (*self.parities, *self.profiles))


def run(plan: Plan, out: Path, *, command: str = "fusewire demo", bars: Callable, show: Callable[[object], None] = lambda result: None) -> Outcome:
    """Run the demo and write the page.

    Args:
        out: the folder of index.html and report.json.
        bars: called with a title, gives a context manager that yields a ``progress`` function.
        show: called with each result as soon as it is there.

    Raises: BadInput, with nothing run yet, where ``out`` cannot be written, a package is lacking or the plan asks for what cannot be. Of whatever else
        is raised the page of what is finished is written first; a KeyboardInterrupt has the outcome in ``.result``, None where nothing was finished.
    """
    start, outcome = time.perf_counter(), Outcome()
    jobs = [(plan.preset, dtype) for dtype in plan.dtypes]
    if plan.target is not None or targets.embedded() is not None:
        jobs = [(plan.target, dtype) for dtype in plan.dtypes] + jobs
    else:
        outcome.skipped = f"the embedded pipeline {targets.EMBEDDED} is not part of this installation; only {plan.preset} was measured"
    wanted = [f"{what} of {Path(name or targets.EMBEDDED).name}, {name_of(targets.parse_dtype(dtype))}" for name, dtype in jobs
              for what in ("parity", "profile")]
    check_packages()
    check_out(out)
    count("rounds", plan.rounds)
    check_run(plan.seeds, plan.steps, 1.0)
    check_shape(plan.preset, plan.layers, plan.size)
    try:
        for name, dtype in jobs:
            _measure(name, dtype, plan, outcome, bars, show)
    except KeyboardInterrupt as stop:
        outcome.interrupted, outcome.lacking = True, wanted[len(outcome.parities) + len(outcome.profiles):]
        if outcome.parities:
            _write(outcome, out, command, start)
        stop.result = outcome if outcome.page else None
        raise
    except Exception as error:
        outcome.lacking = wanted[len(outcome.parities) + len(outcome.profiles):]
        if outcome.parities:
            _write(outcome, out, command, start)
        if outcome.page and isinstance(error, BadInput):
            raise BadInput(f"{error}; what was finished before is on the page, {outcome.page}") from error
        raise
    _write(outcome, out, command, start)
    return outcome


def check_packages() -> None:
    """Raise BadInput where a package that the page needs is not installed."""
    for package, name in (("matplotlib", "matplotlib"), ("PIL", "pillow"), ("jinja2", "jinja2")):
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"{name} is not installed, and the page needs it: pip install 'fusewire[report]'")


def check_out(out: Path) -> None:
    """Raise BadInput where the page could not be written. ``out`` is tried, and left as it was: absent where it was absent."""
    made: list[Path] = []
    try:
        made = [part for part in (out, *out.parents) if not part.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for path in (out / "index.html", out / "report.json"):
            if path.exists():
                path.open("ab").close()
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        for part in made:
            with suppress(OSError):
                part.rmdir()


def unwritable(out: Path, error: OSError) -> BadInput:
    """What to say where the page cannot be written."""
    return BadInput(f"--out is {str(out)!r}, where the page cannot be written ({error.strerror}); it should be a folder that is there or can be made, "
                    "and that you may write to")


def _measure(name: str | None, dtype: str, plan: Plan, outcome: Outcome, bars: Callable, show: Callable[[object], None]) -> None:
    """Parity, then profile of one target in one dtype; each is in ``outcome`` as soon as it is complete."""
    is_preset = name in targets.PRESETS
    target = targets.load(name, dtype=dtype, layers=plan.layers if is_preset else None, size=plan.size if is_preset else None)
    shared = dict(name=target.name, inputs=target.inputs)
    if not is_preset:
        shared |= dict(prompts=EMBEDDED_PROMPTS, steps=plan.steps)

    def keep(results: list, result) -> None:
        result.description = target.description
        results.append(result)
        show(result)

    with bars(f"{target.name}, {dtype}") as tell:
        proof = parity(target.value, progress=tell, **shared, **({} if is_preset else dict(seeds=plan.seeds)))
    keep(outcome.parities, proof)
    with bars(f"{target.name}, {dtype}") as tell:
        gain = profile(target.value, progress=tell, rounds=plan.rounds, compile=plan.compile and is_preset, **shared)
    keep(outcome.profiles, gain)


def _write(outcome: Outcome, out: Path, command: str, start: float) -> None:
    with undisturbed():
        from fusewire.report.page import write

        outcome.seconds = time.perf_counter() - start
        try:
            outcome.page = write(out, outcome.parities, outcome.profiles, command=command, seconds=outcome.seconds, lacking=outcome.lacking)
        except OSError as error:  # the disk is full, or the folder was taken away meanwhile
            raise unwritable(out, error) from error
