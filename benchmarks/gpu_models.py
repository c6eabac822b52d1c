"""One call of a denoiser on a GPU: stock diffusers, torch.compile, swapped in exact and in close, each also as one CUDA graph; alternating, medians.

    python benchmarks/gpu_models.py flux-dev:1024 sd3.5-large:1024 --json benchmarks/results/gpu-models.json

A model is ``preset[:size[:layers]]``, at its full depth unless told, random weights. ``--compile MODE`` adds torch.compile (``default`` or
``max-autotune-no-cudagraphs``), which takes minutes on a deep model. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch

import fusewire
from fusewire import ops
from fusewire.presets import PRESETS, build
from gpu_timing import machine


def timed(call) -> float:
    """Milliseconds of one call, by events on the stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def graphed(call):
    """The call as one CUDA graph: a replay returns what the captured call returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def sides_of(model, inputs: dict, compile_mode: str | None, regional: bool) -> dict:
    """The call of each side; all share the model's weights."""
    def swapped(numerics: str):
        ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        if not fusewire.swap(ours, numerics=numerics).report.swapped:
            raise RuntimeError("nothing was swapped")
        return lambda: ours(**inputs)[0]

    calls = {"eager": lambda: model(**inputs)[0], "exact": swapped("exact"), "close": swapped("close")}
    if compile_mode:
        options = {"fullgraph": True, "mode": None if compile_mode == "default" else compile_mode}
        compiled = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        compiled.compile_repeated_blocks(**options) if regional else compiled.compile(**options)
        calls["compile, its blocks" if regional else "compile"] = lambda: compiled(**inputs)[0]
    return calls


def rows(what: str, dtype: torch.dtype, compile_mode: str | None, regional: bool, rounds: int):
    name, size, layers = (*what.split(":"), None, None)[:3]
    layers = int(layers) if layers else PRESETS[name].full_layers if PRESETS[name].depth else None
    with torch.device("cuda"):
        model, inputs, about, _ = build(name, dtype, layers, int(size) if size else None, 0)
    model = model.to("cuda")
    inputs = {key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    calls, outputs, served, first = sides_of(model, inputs, compile_mode, regional), {}, {}, {}
    for side, call in calls.items():
        ops.reset_stats()
        begin = time.perf_counter()
        outputs[side] = call()
        torch.cuda.synchronize()
        first[side] = time.perf_counter() - begin
        served[side] = {op: {backend: n for backend, n in counts.items() if n} for op, counts in ops.stats().items() if any(counts.values())}
    for side in ("eager", "exact", "close"):
        graph = f"{side}, CUDA graph"
        try:
            replay = graphed(calls[side])
            outputs[graph] = replay().clone()
            calls[graph] = replay
        except Exception as reason:  # what synchronises cannot be captured
            yield {"model": what, "side": graph, "failed": f"{type(reason).__name__}: {reason}"[:300]}
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {side: [] for side in calls}
    for i in range(rounds + 1):
        for side, call in calls.items():
            times[side].append(timed(call))
    eager = outputs["eager"].double()
    for side, taken in times.items():
        taken = taken[1:]
        yield {"model": what, "about": about, "dtype": str(dtype)[6:], "side": side, "ms": round(statistics.median(taken), 3), "least": round(min(taken), 3),
               "eager/this": round(statistics.median(times["eager"][1:]) / statistics.median(taken), 3), "equals eager": torch.equal(outputs[side], outputs["eager"]),
               "relative difference": ((outputs[side].double() - eager).norm() / eager.norm()).item(), "first call s": round(first.get(side, 0.0), 2),
               "backends": served.get(side, {})}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", help="preset[:size[:layers]]")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--compile", help="the mode of torch.compile; left out unless given")
    parser.add_argument("--regional", action="store_true", help="compile each repeated block (diffusers' compile_repeated_blocks), not the whole model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {"command": f"python benchmarks/gpu_models.py {' '.join(arg for arg in sys.argv[1:] if not arg.startswith('/'))}", "machine": machine(), "rows": []}
    with torch.inference_mode():
        for what in options.models:
            try:
                for row in rows(what, getattr(torch, options.dtype), options.compile, options.regional, options.rounds):
                    found["rows"].append(row)
                    print({k: v for k, v in row.items() if k not in ("about", "backends")}, row.get("backends", "") if row.get("side") == "close" else "", flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(found, indent=1))
            except Exception as reason:  # the other models are still measured; the exit status tells
                import traceback

                traceback.print_exc()
                found["rows"].append({"model": what, "failed": f"{type(reason).__name__}: {reason}"[:500]})
            torch.cuda.empty_cache()
    found["machine_after"] = machine()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(any("failed" in row for row in found["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
