"""The command line: ``fusewire demo | swap | parity | profile | bench | doctor``.

Exit codes: 0 all holds, 1 a verdict fails, 2 bad input, 3 nothing to do, 130 interrupted. Results go to standard output, progress and errors to
the error stream. Ctrl-C loses nothing that is finished: it is shown or written, and one line says so.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape

from fusewire.errors import BadInput, NothingToDo
from fusewire.interrupt import finished, undisturbed

CODES = "Exit codes: 0 all holds, 1 a verdict fails, 2 bad input, 3 nothing to do, 130 interrupted."
MOST_THREADS = 1024  # OpenMP ends the process where it cannot start as many as it is told to
app = typer.Typer(help=f"Fused kernels for text-to-image models: swap them in, profile the gain, prove the picture is the same.\n\n{CODES}",
                  no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

TargetArg = Annotated[Optional[str], typer.Argument(
    help="A diffusers folder, or a preset with random weights: sd3.5-medium, sd3.5-large, sd3-medium, flux-dev, flux-schnell, sd1.5, sdxl, sd-vae, "
         "dit-xl-2, or the small sd3.5-tiny, sd3-tiny, flux-tiny, sd-tiny, dit-tiny. Default: the embedded pipeline, digits-sd3.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="Of weights and inputs: float32, bfloat16, float16 or float64.")]
Numerics = Annotated[str, typer.Option(help="exact: torch.equal to stock. close: one rounding, other libraries. both.")]
Layers = Annotated[Optional[int], typer.Option(help="Blocks of a preset.", show_default="the preset's own")]
Size = Annotated[Optional[int], typer.Option(help="Picture width and height in pixels.", show_default="the model's own")]
Steps = Annotated[int, typer.Option(help="Denoising steps of a pipeline.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale of a pipeline.")]
Prompt = Annotated[Optional[list[str]], typer.Option(help="Prompt of a pipeline; give it several times to take several in turn.", show_default=False)]
Rounds = Annotated[int, typer.Option(help="Timed calls of each side, after one that warms up.")]
Threads = Annotated[Optional[int], typer.Option(help="CPU threads.", show_default="torch's own")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def guarded(command):
    """Turn bad input, idle calls, interrupts and what cannot be written into one line and an exit code."""
    @functools.wraps(command)
    def run(*args, **kwargs):
        _hush()
        threads = kwargs.get("threads")
        try:
            if threads is not None:
                _set_threads(threads)
            code = command(*args, **kwargs)
            sys.stdout.flush()
            raise typer.Exit(code)
        except (BadInput, NothingToDo) as error:
            code, message = 2 if isinstance(error, BadInput) else 3, str(error)
        except KeyboardInterrupt:
            code, message = 130, "interrupted before any result was complete; nothing is kept"
        except BrokenPipeError:  # the reader has seen enough; typer ends without a word
            raise
        except OSError as error:
            code, message = 2, _reason(error)
        except (MemoryError, RuntimeError) as error:
            code, message = 2, _short_of_memory(error) or _unserved(error)
            if not message:
                raise
        _complain(message, code, kwargs.get("as_json", False))
        raise typer.Exit(code)

    return run


def _reason(error: OSError) -> str:
    """The file and what is wrong with it. An error of writing has no file's name: what wrote may have been ``print``."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename or 'a file or standard output cannot be written'}: {error.strerror}"


def _short_of_memory(error: MemoryError | RuntimeError) -> str:
    """What to do where memory ran out; "" if something else happened. torch's allocator for CPUs raises a plain RuntimeError."""
    import torch

    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
        return ""
    asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
    return f"not enough memory{f' (it tried to allocate {asked[1]})' if asked else ''}: a smaller --size, fewer --layers or a 16-bit --dtype takes less"


def _unserved(error: MemoryError | RuntimeError) -> str:
    """A call that the backend of FUSEWIRE_BACKEND does not serve; "" if something else happened."""
    from fusewire.kernels.dispatch import BackendError

    return str(error) if isinstance(error, BackendError) else ""


def _complain(message: str, code: int, as_json: bool) -> None:
    print(f"fusewire: {' '.join(message.split())}", file=sys.stderr)
    try:
        if as_json:
            print(json.dumps({"ok": False, "exit_code": code, "interrupted": code == 130, "error": message}))
        sys.stdout.flush()
    except OSError:  # it is standard output that is full; Python would try once more at its end, and say so with an exit code of its own
        sys.stdout = open(os.devnull, "w")


def _set_threads(threads: int) -> None:
    import torch

    if not 1 <= threads <= MOST_THREADS:
        raise BadInput(f"--threads is {threads}; it should be from 1 to {MOST_THREADS}")
    torch.set_num_threads(threads)


def _hush() -> None:
    """Other libraries' notes and bars stay off the terminal; what matters of them is in our own reports."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"fusewire\.kernels\.library")  # a compiled library that is broken or too old


def _console() -> Console:
    # A pipe or a file has no width of its own; tables cut to 80 columns would be of no use there.
    return Console(width=None if sys.stdout.isatty() else 160)


def _show(as_json: bool, result, *tables, kept: str = "") -> int:
    """``kept``: what is left of an interrupted result, where that is not its complete rows."""
    with undisturbed():
        if as_json:
            print(json.dumps({"command": _command()} | result.to_dict(), indent=1))
        else:
            from fusewire.report.tables import fitted

            console = _console()
            for table in tables:
                console.print(*fitted(table, console))
                console.print()
        if getattr(result, "interrupted", False):
            kept = kept or f"the {len(result.rows)} rows that were complete are kept, the others are lacking"
            print(f"fusewire: interrupted; {kept}", file=sys.stderr)
            return 130
    return 0 if result.ok else 1


def _load(target, dtype, layers=None, size=None):
    from fusewire import targets
    from fusewire.report.progress import bars

    with bars() as tell:
        tell("loading", 0, 1)
        return targets.load(target, dtype=dtype, layers=layers, size=size)


@app.command(epilog=CODES)
@guarded
def parity(target: TargetArg = None, dtype: Dtype = "float32", numerics: Numerics = "both", layers: Layers = None, size: Size = None,
           steps: Steps = 28, seeds: Annotated[int, typer.Option(help="Pictures: seeds 0, 1, ...")] = 4, guidance: Guidance = 4.0,
           prompt: Prompt = None, level: Annotated[Optional[list[str]], typer.Option(
               help="op, block, model or picture; give it several times.", show_default="all")] = None,
           threads: Threads = None, as_json: Json = False) -> int:
    """Prove that a swapped model gives the same picture.

    Every fused op, block and model, and (of a pipeline) whole pictures are compared with stock diffusers and with float64.
    """
    from fusewire.parity import LEVELS
    from fusewire.parity import parity as prove
    from fusewire.report import tables
    from fusewire.report.progress import bars

    if seeds < 1:
        raise BadInput(f"--seeds is {seeds}; it should be at least 1")
    loaded = _load(target, dtype, layers, size)
    with bars() as tell:
        result = finished(lambda: prove(loaded.value, numerics=numerics, levels=level or LEVELS, inputs=loaded.inputs, prompts=prompt, seeds=range(seeds),
                                        steps=steps, guidance=guidance, size=loaded.size, name=loaded.name, progress=tell))
    result.description = loaded.description
    return _show(as_json, result, tables.swap_table(result.swaps, loaded.name), tables.parity_table(result))


@app.command(epilog=CODES)
@guarded
def profile(target: TargetArg = None, dtype: Dtype = "float32", numerics: Numerics = "both", layers: Layers = None, size: Size = None,
            compile: Annotated[bool, typer.Option("--compile", help="Time torch.compile too; it compiles for a minute or so.")] = False,
            rounds: Rounds = 7, steps: Steps = 28, guidance: Guidance = 4.0, prompt: Prompt = None, threads: Threads = None,
            as_json: Json = False) -> int:
    """Show what was gained, and where the time goes.

    Stock, swapped and compiled run in turn in one process; medians with quartiles, the floor, stages, memory, the first call.
    """
    from fusewire.profile import profile as measure
    from fusewire.report import tables
    from fusewire.report.progress import bars

    loaded = _load(target, dtype, layers, size)
    with bars() as tell:
        result = finished(lambda: measure(loaded.value, numerics=numerics, compile=compile, rounds=rounds, inputs=loaded.inputs, prompts=prompt, steps=steps,
                                          guidance=guidance, size=loaded.size, name=loaded.name, progress=tell))
    result.description = loaded.description
    shown = (tables.memory_table, result.memory), (tables.kinds_table, result.kinds), (tables.verdict_table, result.verdicts)
    kept = f"the medians are of {result.settings['rounds']} of {rounds} rounds, and what is measured after them is lacking"
    return _show(as_json, result, tables.profile_table(result), *(table(result) for table, found in shown if found), kept=kept)


@app.command(epilog=CODES)
@guarded
def swap(model: TargetArg = None, dtype: Dtype = "float32", numerics: Annotated[str, typer.Option(help="exact or close.")] = "exact",
         layers: Layers = None, size: Size = None,
         dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be swapped; run nothing.")] = False,
         threads: Threads = None, as_json: Json = False) -> int:
    """Say what can be swapped in a model, and what is left alone and why.

    Without --dry-run the swapped model also runs once, is restored, and has to give the very same output as before.
    """
    from fusewire.report import tables
    from fusewire.trial import try_swap

    loaded = _load(model, dtype, layers, size)
    result = try_swap(loaded, numerics, dry_run=dry_run)
    return _show(as_json, result, tables.swap_table({numerics: result.report}, loaded.name), *result.lines)


@app.command(epilog=CODES)
@guarded
def bench(target: Annotated[str, typer.Argument(help="A preset or a diffusers folder whose fused ops are timed.")] = "sd3.5-medium",
          op: Annotated[Optional[list[str]], typer.Option(help="Only this op; give it several times.", show_default="all")] = None,
          dtype: Dtype = "float32", numerics: Numerics = "both", layers: Layers = None, size: Size = None, rounds: Rounds = 7,
          threads: Threads = None, as_json: Json = False) -> int:
    """Time every fused op on the shapes that a model gives it.

    Each backend that can serve the call, against eager PyTorch and against a plain copy of the outputs. No speed-up is given for an op whose
    parity fails.
    """
    from fusewire.profile.bench import bench as measure
    from fusewire.report import tables
    from fusewire.report.progress import bars

    loaded = _load(target, dtype, layers, size)
    with bars() as tell:
        result = finished(lambda: measure(loaded.value, numerics=numerics, only=op, inputs=loaded.inputs, rounds=rounds, size=loaded.size, name=loaded.name,
                                          progress=tell))
    return _show(as_json, result, tables.bench_table(result))


@app.command(epilog=CODES)
@guarded
def demo(out: Annotated[Path, typer.Option(help="Folder of index.html and report.json.")] = Path("report"),
         target: Annotated[Optional[str], typer.Option(help="A diffusers folder.", show_default="the embedded pipeline")] = None,
         preset: Annotated[str, typer.Option(help="The full-size shape.")] = "sd3.5-medium", layers: Layers = None, size: Size = None,
         dtype: Annotated[Optional[list[str]], typer.Option(help="Give it several times.", show_default="float32, bfloat16")] = None,
         steps: Steps = 28, seeds: Annotated[int, typer.Option(help="Pictures: seeds 0, 1, ...")] = 6, rounds: Rounds = 5,
         compile: Annotated[bool, typer.Option(help="Time torch.compile of the full-size shape too.")] = True,
         threads: Threads = None, as_json: Json = False) -> int:
    """Do the main job once: parity and profile of the embedded pipeline and of a full-size shape, and a page to look at."""
    from fusewire import targets
    from fusewire.demo import Plan, run
    from fusewire.report import tables
    from fusewire.report.progress import bars

    if preset not in targets.PRESETS:
        raise BadInput(f"--preset is {preset!r}; it should be one of {', '.join(targets.PRESETS)}")
    if seeds < 1:
        raise BadInput(f"--seeds is {seeds}; it should be at least 1")
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160) if as_json else _console()
    reported: set[str] = set()

    def show(result) -> None:
        if hasattr(result, "curves"):
            if result.target not in reported:
                reported.add(result.target)
                console.print(tables.swap_table(result.swaps, result.target), "")
            console.print(*tables.fitted(tables.parity_table(result, full=False), console), "")
        else:
            console.print(*tables.fitted(tables.profile_table(result), console), "")

    plan = Plan(target, preset, tuple(dtype or ("float32", "bfloat16")), layers, size, steps, tuple(range(seeds)), rounds, compile)
    outcome = finished(lambda: run(plan, out, command=_command(), bars=bars, show=show))
    with undisturbed():
        return _conclude(outcome, console, as_json)


def _conclude(outcome, console: Console, as_json: bool) -> int:
    """The last words of ``demo``: what fails, what is lacking, and where the page is."""
    from fusewire.report.page import report_dict

    if outcome.skipped:
        print(f"fusewire: {outcome.skipped}", file=sys.stderr)
    if as_json:
        print(json.dumps(report_dict(outcome.parities, outcome.profiles, command=_command(), seconds=outcome.seconds, lacking=outcome.lacking), indent=1))
    else:
        for row in [row for p in outcome.parities for row in p.failed]:
            console.print("[bold red]fails[/]:", escape(f"{row.level} {row.name}, {row.numerics}, {row.dtype}: {row.reason}"))
        for result in outcome.profiles:
            for v in result.verdicts:
                if not v.holds:
                    console.print("[bold red]fails[/]:", escape(f"{result.target}, {result.dtype}: {v.name}: {v.detail}"))
    if outcome.interrupted:
        print(f"fusewire: interrupted; what is finished is on the page, {outcome.page}; lacking: {'; '.join(outcome.lacking) or 'nothing'}", file=sys.stderr)
        return 130
    if not as_json:
        console.print(f"{'All verdicts hold' if outcome.ok else 'Not all verdicts hold'}, after {outcome.seconds / 60:.1f} minutes. The page: {outcome.page}",
                      soft_wrap=True, highlight=False, markup=False)
    return 0 if outcome.ok else 1


def _command() -> str:
    """The command as it was typed, without any path of this machine."""
    def nameless(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return option + equals + (Path(value).name if "/" in value else value)

    return shlex.join(["fusewire", *map(nameless, sys.argv[1:])])


@app.command(epilog=CODES)
@guarded
def doctor(as_json: Json = False) -> int:
    """Say what each backend can do on this machine, and why not."""
    from fusewire.doctor import diagnose
    from fusewire.report import tables

    found = diagnose()
    return _show(as_json, found, *tables.doctor_tables(found))


def main() -> None:
    """The console script."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who called
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sign that the terminal's encoding lacks is no reason to lose a result
    app(prog_name="fusewire")
