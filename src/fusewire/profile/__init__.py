"""The gain: stock, compiled and swapped in turn in one process, where the time goes, and how far the floor is.

``fusewire.profile`` is this package, and calling it runs ``profile``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch import nn

from fusewire.callable_package import calls
from fusewire.copies import check_target, denoiser_of, place_of, shared_copy
from fusewire.errors import NothingToDo, blaming, count
from fusewire.interrupt import keeping
from fusewire.machine import describe, seconds
from fusewire.parity import check_run, inputs_of, parse_numerics, pictures, swap_copies, ticker
from fusewire.parity.blocks import Counting
from fusewire.parity.result import name_of
from fusewire.profile.floor import Floor, floor_of
from fusewire.profile.kinds import StageClock, by_kind
from fusewire.profile.memory import MEASUREMENTS, Memory, judged, memory_verdicts, peak_of_call, tensor_bytes, weight_bytes
from fusewire.profile.result import MemoryRow, ProfileResult, Row, Verdict
from fusewire.profile.timing import Timing, alternate
from fusewire.targets import check_finite
from fusewire.targets import describe as describe_model

__all__ = ["MemoryRow", "ProfileResult", "Row", "Verdict", "profile"]

FIRST_CALL_LIMIT = 1.0  # seconds that the first call after swap may take longer than later ones


def profile(pipe_or_module, *, numerics: str = "both", compile: bool = False, rounds: int = 7, inputs: dict | None = None,
            prompts: Sequence[str] | None = None, seeds: Sequence[int] = (0,), steps: int = 28, guidance: float = 4.0, size: int | None = None,
            call: dict | None = None, name: str | None = None, progress: Callable[[str, int, int], None] | None = None) -> ProfileResult:
    """Time a pipeline or denoiser as it is, swapped in ``exact`` and in ``close``, and compiled, in turn in one process.

    Args:
        pipe_or_module: a diffusers pipeline or denoiser, not swapped; it is left as it is.
        numerics: ``"exact"``, ``"close"`` or ``"both"``.
        compile: time ``torch.compile`` of the denoiser too (its compilation takes a minute or so; it needs a C++ compiler).
        rounds: timed calls of each side, after one that warms up.
        inputs: keyword arguments of one call of a denoiser; random ones unless given, for the classes that presets have.
        prompts, seeds, steps, guidance, size, call, name, progress: as for ``fusewire.parity``.

    Returns: ProfileResult; ``.ok``, ``.rows``, ``.memory``, ``.verdicts``, ``.kinds``, ``.stages``, ``.floor``, ``.to_dict()``.
    Raises: BadInput, NothingToDo (ValueErrors) as ``fusewire.parity`` does. A KeyboardInterrupt after the first complete round has the result of the complete
    rounds in ``.result``.
    """
    check_target(pipe_or_module)
    wanted = parse_numerics(numerics)
    count("rounds", rounds)
    check_run(seeds, steps, guidance)
    check_finite(pipe_or_module)
    tell = progress or (lambda what, done, total: None)
    is_pipe = not isinstance(pipe_or_module, nn.Module)
    held = tensor_bytes()
    stock = shared_copy(pipe_or_module)
    usual = tensor_bytes() - held  # what a copy brings along, and then what its first call leaves behind: schedulers have tables
    component, model = denoiser_of(stock)
    device, dtype = place_of(model)
    notes: list[str] = []
    run = pictures.plan(stock, prompts, seeds, steps, guidance, size, call) if is_pipe else None
    kwargs = None if is_pipe else inputs_of(model, inputs, size)

    def caller(value):
        if is_pipe:
            return lambda: pictures.generate(value, run)
        return lambda: _call(value, kwargs)

    values, first, order, kept = {"eager": stock}, {}, ["eager"], {}
    held = tensor_bytes()
    tick = ticker(tell, "warm-up", 1 + compile + len(wanted))
    given = pictures.GIVEN if is_pipe else "inputs" if inputs is not None else None
    with blaming(given, type(stock).__name__) if given else nullcontext():
        first["eager"] = seconds(caller(stock), device)
    usual += tensor_bytes() - held
    tick()
    if compile and not has_compiler():
        notes.append("torch.compile was left out: it needs a C++ compiler, and none was found")
    elif compile:
        values["compile"] = shared_copy(pipe_or_module)
        first["compile"] = _compile(values["compile"], component, caller, device, values)
        order.append("compile")
    if compile:
        tick()
    took: dict[str, float] = {}
    swaps, idle = {}, None
    for variant in wanted:
        held = tensor_bytes()
        try:
            copies, report = swap_copies(pipe_or_module, [variant], took)
        except NothingToDo as error:
            idle = error
            continue
        values[variant], swaps[variant] = copies[variant], report[variant]
        first[variant] = took[variant] + seconds(caller(values[variant]), device)
        kept[variant] = max(0, tensor_bytes() - held - usual)
        order.append(variant)
        tick()
    if not swaps:
        raise idle

    settings = dict(numerics=list(wanted), rounds=rounds, compile="compile" in values)
    if is_pipe:
        settings |= dict(prompts=run.prompts, seeds=run.seeds, steps=steps, guidance=guidance)
    result = ProfileResult(name or type(pipe_or_module).__name__, describe_model(pipe_or_module), name_of(dtype), [], [], {}, {}, {}, swaps, describe(),
                           settings, notes)
    samples: dict[str, list[float]] = {}
    memory, backends, floor = {}, {}, None
    with keeping(result):
        try:
            with ExitStack() as stack:
                clocks = {variant: stack.enter_context(StageClock(values[variant])) for variant in order} if is_pipe else {}
                sides = {variant: _clocked(caller(values[variant]), clocks.get(variant)) for variant in order}
                timings = alternate(sides, device, rounds=rounds, tick=ticker(tell, "timing, in turn", (rounds + 1) * len(order)), samples=samples)
                result.stages = {variant: {stage: 1e3 * s for stage, s in clock.medians(rounds).items()} for variant, clock in clocks.items()}

            tick, weights = ticker(tell, "where the time goes", 2 + 2 * len(order)), weight_bytes(stock)
            for variant in order:
                if variant != "compile":  # generated kernels have no operator names that a kind could be read from
                    shares = by_kind(caller(values[variant]), device)
                    result.kinds[variant] = {kind: 1e3 * share * timings[variant].median for kind, share in shares.items()}
                tick()
                found = []
                for _ in range(MEASUREMENTS):
                    with Counting() as counts:
                        found.append(peak_of_call(caller(values[variant]), device))
                if None not in found:
                    tensors, scratch = zip(*found)
                    memory[variant] = Memory(weights, kept.get(variant, 0), tensors, max(scratch))
                backends[variant] = {backend: n for backend, n in counts.calls.items() if n}
                tick()
            floor = floor_of(caller(stock), dtype, device)
            tick()
        finally:
            if samples:
                timings = {variant: Timing(tuple(taken)) for variant, taken in samples.items()}
                result.rows = [_row(variant, timings, floor, first[variant], memory.get(variant), backends.get(variant, {})) for variant in order]
                settings["rounds"] = len(samples["eager"])

    result.floor = _floor_dict(floor)
    if memory:
        result.memory = judged(memory, torch.get_num_threads())
    else:
        notes.append(f"peak memory was not measured: the allocator of {device.type} does not tell")
    result.verdicts = verdicts(result.rows) + memory_verdicts(result.memory)
    tick()
    return result


@torch.inference_mode()
def _call(module: nn.Module, kwargs: dict):
    return module(**kwargs)


def has_compiler() -> bool:
    """Whether torch.compile can find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++", "c++"))


def _compile(value, component: str, caller, device, values: dict) -> float:
    """Compile the denoiser of a copy; seconds of its first call, compilation included."""
    torch._dynamo.reset()
    if component:
        setattr(value, component, torch.compile(getattr(value, component)))
    else:
        values["compile"] = value = torch.compile(value)
    return seconds(caller(value), device)


def _clocked(call, clock: StageClock | None):
    if clock is None:
        return call

    def run():
        clock.start()
        call()
        clock.stop()

    return run


def _row(variant: str, timings: dict[str, Timing], floor: Floor | None, first: float, memory: Memory | None, backends: dict[str, int]) -> Row:
    timing, compiled = timings[variant], timings.get("compile")
    low, high = timing.quartiles
    return Row(variant, 1e3 * timing.median, 1e3 * low, 1e3 * high, timings["eager"].median / timing.median,
               None if compiled is None else compiled.median / timing.median, None if floor is None else floor.roofline / timing.median, 1e3 * first,
               1e3 * (first - timing.median), None if memory is None else memory.working / 2**20, backends)


def _floor_dict(floor: Floor) -> dict:
    return dict(gflop=floor.flop / 1e9, gib=floor.bytes / 2**30, gemm_gflops=floor.rate / 1e9, bandwidth_gbs=floor.bandwidth / 1e9,
                arithmetic_ms=1e3 * floor.arithmetic, memory_ms=1e3 * floor.memory, roofline_ms=1e3 * floor.roofline)


def native_backends() -> list[str]:
    """The backends, beyond the reference, that this installation has for this machine."""
    from fusewire.kernels.library import CPU, CUDA

    return [name for name, library in (("cpu", CPU), ("cuda", CUDA)) if library.loaded]


def verdicts(rows: list[Row]) -> list[Verdict]:
    """What has to hold of the swapped sides: fused kernels ran, the first call needed no compile step, and none is slower than eager."""
    eager = next(row for row in rows if row.variant == "eager")
    found = []
    for row in rows:
        if row.variant in ("eager", "compile"):
            continue
        native = sum(n for backend, n in row.backends.items() if backend != "reference")
        available = native_backends()
        ran = ", ".join(f"{backend} {n}" for backend, n in row.backends.items()) or "none"
        found.append(Verdict(f"{row.variant}: fused kernels ran", native > 0 if available else bool(row.backends), f"calls by backend: {ran}"
                             + ("" if available else "; no compiled library here, so the reference serves")))
        found.append(Verdict(f"{row.variant}: no compile step", row.extra_first_ms < 1e3 * FIRST_CALL_LIMIT,
                             f"first call {row.extra_first_ms:.0f} ms longer than later ones; the limit is {1e3 * FIRST_CALL_LIMIT:.0f} ms"))
        found.append(Verdict(f"{row.variant}: not slower than eager", row.low_ms <= eager.high_ms,
                             f"median {row.median_ms:.1f} ms against {eager.median_ms:.1f} ms; slower means beyond both quartiles"))
    return found


calls(__name__, profile)
