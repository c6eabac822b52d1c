"""The proof: error against float64 and against the stock module, op by op, block by block, whole models, whole pictures.

``fusewire.parity`` is this package, and calling it runs ``parity``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import nn

from fusewire.callable_package import calls
from fusewire.copies import check_target, denoiser_of, place_of, shared_copy
from fusewire.errors import BadInput, NothingToDo, blaming, count
from fusewire.interrupt import keeping
from fusewire.machine import describe
from fusewire.parity import around, blocks, ops, pictures
from fusewire.parity.result import LEVELS, ParityResult, Pictures, Row, name_of
from fusewire.parity.verdict import measure
from fusewire.presets import inputs_for
from fusewire.swap.report import SIDES
from fusewire.targets import check_finite, modules_of
from fusewire.targets import describe as describe_model

__all__ = ["LEVELS", "ParityResult", "Pictures", "Row", "measure", "parity"]

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


def parity(pipe_or_module, *, numerics: str = "both", levels: Sequence[str] = LEVELS, inputs: dict | None = None,
           prompts: Sequence[str] | None = None, seeds: Sequence[int] = (0, 1, 2, 3), steps: int = 28, guidance: float = 4.0,
           size: int | None = None, call: dict | None = None, name: str | None = None, progress: Progress | None = None) -> ParityResult:
    """Swap a copy of a pipeline or denoiser, and judge it against the stock one by the project's rule.

    Args:
        pipe_or_module: a diffusers pipeline or denoiser, not swapped; it is left as it is. Its dtype is the dtype of the comparison,
            which is one in evaluation mode, without dropout.
        numerics: ``"exact"``, ``"close"`` or ``"both"``.
        levels: which of ``("op", "block", "model", "picture")`` to judge. Pictures need a pipeline.
        inputs: keyword arguments of one call of a denoiser; random ones unless given, for the classes that presets have.
        prompts: one, or several, taken in turn, one for each seed. seeds: one picture each. steps: denoising steps. guidance: classifier-free guidance scale.
        size: picture width and height, pixels. call: more keyword arguments of the pipeline's call.
        name: of the target, in the result. progress: called with (what, done, total).

    Returns: ParityResult; ``.ok``, ``.rows``, ``.curves``, ``.pictures``, ``.to_dict()``.
    Raises: BadInput (a ValueError) for an argument that is not as stated or for weights that are not finite; NothingToDo (a ValueError)
        where nothing in the target can be swapped. A KeyboardInterrupt has the rows that are complete in ``.result``, a ParityResult.
    """
    check_target(pipe_or_module)
    variants = parse_numerics(numerics)
    levels = _parse_levels(levels)
    check_run(seeds, steps, guidance)
    check_finite(pipe_or_module)
    tell = progress or (lambda what, done, total: None)
    is_pipe = not isinstance(pipe_or_module, nn.Module)
    if levels == ("picture",) and not is_pipe:
        raise NothingToDo(f"pictures need a pipeline, and this is a {type(pipe_or_module).__name__}")
    stock = shared_copy(pipe_or_module)
    swapped, swaps = swap_copies(pipe_or_module, variants)
    for value in (stock, *swapped.values()):  # two calls of a dropout differ, stock or not
        for _, module in modules_of(value):
            module.eval()
    component, model = denoiser_of(stock)
    models = {numerics: denoiser_of(value)[1] for numerics, value in swapped.items()}
    rows: list[Row] = []
    result = ParityResult(name or type(pipe_or_module).__name__, describe_model(pipe_or_module), name_of(place_of(model)[1]), rows, swaps, describe(),
                          dict(numerics=list(variants), levels=list(levels)))
    with keeping(result):  # rows += takes each row over as soon as it is complete
        run, parts = None, []
        if is_pipe:
            run = pictures.plan(stock, prompts, seeds, steps, guidance, size, call)
            result.settings |= dict(prompts=run.prompts, seeds=run.seeds, steps=run.steps, guidance=run.guidance)
            short = min(2, steps)
            with around.watching(stock, swaps, component) as parts, blaming(pictures.GIVEN, type(stock).__name__):
                args, kwargs = blocks.captured(model, lambda: pictures.generate(stock, run, decode=False), which=steps // 2)
        else:
            args, kwargs = (), inputs_of(model, inputs, size)
            if inputs is not None:
                with blaming("inputs", type(model).__name__), torch.inference_mode():
                    model(**kwargs)

        if "op" in levels:
            for numerics, value in swapped.items():
                with ops.recording() as recorded:
                    if is_pipe:
                        pictures.generate(value, run, decode=False, steps=short)
                        for part in parts:
                            if part.is_half:
                                around.call(value, part)
                    else:
                        with torch.inference_mode():
                            value(*args, **kwargs)
                rows += ops.judge(recorded, numerics, ticker(tell, f"ops, {numerics}", len(recorded)))
        if "block" in levels:
            prefix = f"{component}." if component else ""
            names = {numerics: blocks.outermost([entry["name"].removeprefix(prefix) for entry in report["swapped"]], model)
                     for numerics, report in swaps.items()}
            total = len(set().union(*names.values()))
            rows += blocks.judge_blocks(model, models, names, args, kwargs, ticker(tell, "blocks", total))
        if "model" in levels:
            rows += blocks.judge_model(model, models, args, kwargs, ticker(tell, "whole denoiser", 1 + len(models)))
            rows += around.judge_parts(parts, stock, swapped, swaps, ticker(tell, "text encoders, autoencoder", len(parts) * (1 + len(models))))
        if "picture" in levels and is_pipe:
            _pictures(result, stock, swapped, run, tell)
    return result


def _pictures(result: ParityResult, stock, swapped: dict, run: pictures.Run, tell: Progress) -> None:
    with_truth = pictures.has_float64_trajectory(stock) and "prompt_embeds" not in run.call
    tick = ticker(tell, "pictures", run.steps * (1 + len(swapped) + with_truth))
    base = pictures.generate(stock, run, tick=tick)
    others = {numerics: pictures.generate(value, run, tick=tick) for numerics, value in swapped.items()}
    true = pictures.float64_trajectory(stock, run, tick=tick) if with_truth else None
    result.rows += pictures.judge_pictures(run, base, others)
    result.curves = pictures.curves(base, others, true)
    result.pictures = Pictures(run.prompts, run.seeds, {"stock": base.pictures} | {n: t.pictures for n, t in others.items()})


def parse_numerics(numerics: str) -> tuple[str, ...]:
    """``"both"`` -> ``("exact", "close")``; BadInput for a word that is neither."""
    if numerics in ("exact", "close"):
        return (numerics,)
    if numerics == "both":
        return ("exact", "close")
    raise BadInput(f"numerics is {numerics!r}; it should be 'exact', 'close' or 'both'")


def _parse_levels(levels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise BadInput(f"levels is {levels!r}; it should be a list of some of {', '.join(LEVELS)}")
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        raise BadInput(f"levels is {list(levels)}; it should be some of {', '.join(LEVELS)}")
    return tuple(level for level in LEVELS if level in levels)


def swap_copies(value, variants: Sequence[str], took: dict[str, float] | None = None) -> tuple[dict, dict]:
    """(numerics -> swapped copy, numerics -> {"swapped": [...], "left": [...], "noted": [...]}). NothingToDo where no copy has anything to swap.

    took: filled with the seconds that each swap took.
    """
    from fusewire.swap import swap

    copies, reports, idle = {}, {}, None
    for numerics in variants:
        copy = shared_copy(value)
        start = time.perf_counter()
        try:
            report = swap(copy, numerics=numerics).report
        except NothingToDo as error:
            idle = error
            continue
        if took is not None:
            took[numerics] = time.perf_counter() - start
        copies[numerics] = copy
        reports[numerics] = {side: [dict(name=e.name, op=e.op, reason=e.reason) for e in getattr(report, side)] for side in SIDES}
    if not copies:
        raise idle
    return copies, reports


def inputs_of(model: nn.Module, inputs: dict | None, size: int | None) -> dict:
    """The keyword arguments of one call of a denoiser: ``inputs``, or random ones for a class that a preset has. BadInput otherwise."""
    if inputs is not None:
        if not isinstance(inputs, Mapping):
            raise BadInput(f"inputs is a {type(inputs).__name__}; it should be a dictionary of the keyword arguments of one call")
        return dict(inputs)
    try:
        return inputs_for(model, size=size)
    except BadInput:
        swap_copies(model, ("exact", "close"))  # where nothing can be swapped, that is what there is to say
        raise


def check_run(seeds: Sequence[int], steps: int, guidance: float) -> None:
    """BadInput naming what no pictures can be drawn with."""
    if not isinstance(seeds, Sequence):
        raise BadInput(f"seeds is {seeds!r}; it should be a list of integers, one for each picture")
    if not seeds:
        raise BadInput("seeds is empty; there should be at least one")
    if not all(isinstance(seed, Integral) and not isinstance(seed, bool) and -2**63 <= seed < 2**64 for seed in seeds):
        raise BadInput(f"seeds is {list(seeds)}; each should be an integer of 64 bits")
    count("steps", steps)
    if not isinstance(guidance, Real) or not math.isfinite(guidance):
        raise BadInput(f"guidance is {guidance!r}; it should be a number")


def ticker(tell: Progress, what: str, total: int) -> Callable[[], None]:
    """A function that tells ``progress`` of one more step done, each time it is called."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        tell(what, done, total)

    tell(what, 0, total)
    return tick


calls(__name__, parity)
