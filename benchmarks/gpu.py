"""The GPU kernels against eager PyTorch, torch.compile, SDPA's backends and cuBLASLt: medians, every side in turn, caches flushed.

``benchmarks/gpu.py --json FILE [--seconds N] [--only attention elementwise ...] [--no-compile] [--no-sweep]``. Of each side: ``us`` on the device,
``host_us`` to launch. ``--dry`` runs tiny shapes once on the CPU, in Triton's interpreter, to see that the script itself works. Rows are written as
they come, so that a time limit loses nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
import torch

from fusewire import ops
from fusewire.kernels import plans
from fusewire.kernels.dispatch import forced
from gpu_cases import DRY, attention_cases, backward_cases, elementwise_cases, linear_cases, rand
from gpu_timing import copy_bandwidth, device_us, host_us, machine

ROUNDS = 3
SECTIONS = {"attention": attention_cases, "elementwise": elementwise_cases, "backward": backward_cases, "linear": linear_cases}


def once(call, gradients: bool = False) -> float:
    if DRY:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    return device_us(call, 15, gradients)


def sweep_rows(deadline: float):
    """Other tiles for unmasked attention in bfloat16: what kernels/tuning.py should choose here."""
    from triton.runtime.errors import OutOfResources

    from fusewire.kernels.attention import triton_kernel
    from fusewire.kernels.tuning import AttentionTile

    for tokens, heads, dim in (((16, 1, 16),) if DRY else ((4250, 24, 64), (4608, 24, 128))):
        q, k, v = (rand(2, tokens, heads, dim) for _ in range(3))
        want = None
        for queries, keys, warps, stages in (((16, 16, 4, 1),) if DRY else (
                (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 4), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 2), (128, 128, 8, 3),
                (64, 32, 4, 4), (128, 32, 8, 4), (128, 64, 4, 3))):
            if time.monotonic() > deadline:
                return
            tile = AttentionTile(queries, keys, dim, warps, stages, "ieee")
            side = f"{queries}x{keys}, {warps} warps, {stages} stages"
            with (mock.patch.object(triton_kernel, "attention_tile", lambda *arguments, tile=tile: tile),
                  mock.patch.object(triton_kernel, "why_not_hopper", lambda *arguments: "another kernel's tiles are looked for"), forced("triton")):
                plans.forget()
                try:
                    got = ops.attention(q, k, v)
                except OutOfResources as reason:
                    yield {"op": "attention tiles", "what": f"{list(q.shape)} bf16", "side": side, "failed": str(reason).splitlines()[0]}
                    continue
                want = got if want is None else want
                # A fast tile whose result is wrong is no result
                error = (got.float() - want.float()).abs().max().item()
                took = once(lambda: ops.attention(q, k, v))
            plans.forget()
            yield {"op": "attention tiles", "what": f"{list(q.shape)} bf16", "side": side,
                   "us": round(took, 2), "tflops": round(8 * heads * tokens**2 * dim / took / 1e6, 1), "difference": error}


def rows(deadline: float, compiling: bool, sections: list[str]):
    compiled_ops: set[tuple[str, str]] = set()
    for cases in (SECTIONS[name] for name in sections):
        for op, what, size, flops, sides in cases():
            if time.monotonic() > deadline:
                return
            if compiling and "attention" not in op and "backward" not in op and "bf16" in what and (op, "rotated" in what) not in compiled_ops:
                compiled_ops.add((op, "rotated" in what))  # one shape for each op: compiling takes seconds
                torch._dynamo.reset()
                sides["torch.compile"] = torch.compile(sides["eager"], dynamic=False)
            reference = sides["eager"]()
            reference = reference if isinstance(reference, tuple) else (reference,)
            error = {}
            for side, call in list(sides.items()):  # warm, and compare: a fast wrong answer is no result
                try:
                    ops.reset_stats()
                    out = call()
                except RuntimeError as reason:  # PyTorch's backends do not serve every shape; ours must
                    if not side.startswith("sdpa"):
                        raise
                    yield {"op": op, "what": what, "side": side, "failed": str(reason).splitlines()[0]}
                    del sides[side]
                    continue
                out = out if isinstance(out, tuple) else (out,)
                error[side] = max((a.float() - b.float()).abs().max().item() for a, b in zip(out, reference)), served()
            times: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(1 if DRY else ROUNDS):
                for side, call in sides.items():
                    times[side].append(once(call, "backward" in op))
            for side, taken in times.items():
                took = statistics.median(taken)
                row = {"op": op, "what": what, "side": side, "us": round(took, 2), "rounds": [round(t, 2) for t in taken], "difference": error[side][0],
                       "served": error[side][1]}
                if not DRY:
                    row["host_us"] = round(host_us(sides[side]), 1)
                if size:
                    row["gb_per_s"] = round(size / took / 1e3, 1)
                if flops:
                    row["tflops"] = round(flops / took / 1e6, 1)
                yield row


def served() -> str:
    """What served the calls since the last reset, "op: backend"."""
    return ", ".join(f"{op}: {backend}" for op, counts in ops.stats().items() for backend, n in counts.items() if n)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--seconds", type=float, default=250, help="start no measurement after this many seconds")
    parser.add_argument("--tests", type=int, help="the exit status of the GPU tests, to be written beside the figures")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-sweep", action="store_true", help="leave the attention tiles out")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: the script's own test")
    options = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no CUDA device here (--dry runs the script on the CPU)", file=sys.stderr)
        return 3
    torch.manual_seed(0)
    begin = time.monotonic()
    found = {"command": "benchmarks/gpu.py " + " ".join(word for word in sys.argv[1:] if "/" not in word), "machine": machine(), "tests": options.tests, "rows": []}
    if not DRY:
        found["copy GB/s"] = round(copy_bandwidth())
    with torch.inference_mode():
        sections = [rows(begin + 0.8 * options.seconds, not (options.no_compile or DRY), options.only)]
        if not options.no_sweep:
            sections.append(sweep_rows(begin + options.seconds))
        for section in sections:
            for row in section:
                found["rows"].append(row)
                print(row, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1))
    found["machine_after"] = machine()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
