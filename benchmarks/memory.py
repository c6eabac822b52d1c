"""Peak memory of one call of a preset's model on the CPU, stock and swapped: as PyTorch's allocator counts it, and as the system sees it.

    python benchmarks/memory.py --target sd3.5-medium:float32 --target flux-dev:bfloat16:1 --json benchmarks/results/zen5/memory.json

A target is preset:dtype[:layers[:size]]. Each side runs in processes of its own, with nothing else in them and a C library that hands freed memory back at
once. Counted is what ``fusewire profile`` judges: weights, tensors, the library's scratch memory. Resident is the growth of the process, its peak in one
call and what stays after the first calls, so it holds the working memory of PyTorch's own libraries too. MiB; every measurement is in the row.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from alternating import machine, write
from fusewire import swap
from fusewire.profile.memory import LIMITS, Memory, judged, peak_of_call, tensor_bytes, weight_bytes
from fusewire.targets import load

SIDES = ("eager", "exact", "close")
CPU, MIB = torch.device("cpu"), 2**20
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Of glibc: what is larger gets pages of its own, which go back when it is freed, and so does the end of the heap; fixed, they do not adapt to what came before.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def trim() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def one_side(side: str, preset: str, dtype: str, layers: str = "", size: str = "", calls: int = 3) -> dict:
    """What a process finds: bytes."""
    target = load(preset, dtype=dtype, layers=int(layers) if layers else None, size=int(size) if size else None)
    held = tensor_bytes()
    if side != "eager":
        swap(target.value, numerics=side)

    @torch.inference_mode()
    def call():
        target.value(**target.inputs)

    trim()
    before = status("RssAnon")
    call()
    kept = tensor_bytes() - held
    call()
    growth, stays = [], []
    for _ in range(calls):
        trim()
        RESET.write_text("5")  # sets the peak back to what is resident now; see proc(5)
        stays.append(status("RssAnon") - before)
        start = status("VmRSS")
        call()
        growth.append(status("VmHWM") - start)
    counted = [peak_of_call(call, CPU) for _ in range(2)]
    return dict(description=target.description, weights=weight_bytes(target.value), kept=kept, tensors=[t for t, _ in counted],
                scratch=max(s for _, s in counted), growth=growth, stays=stays)


def in_a_process(side: str, target: str) -> dict:
    done = subprocess.run([sys.executable, __file__, "--side", side, "--target", target], env=os.environ | ENVIRONMENT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def mib(sizes) -> list[float]:
    return [round(size / MIB, 3) for size in sizes]


def rows_of(target: str, processes: int) -> list[dict]:
    """One row for each side; the ratios are to stock's."""
    found = {side: [in_a_process(side, target) for _ in range(processes)] for side in SIDES}
    memory = {side: Memory(runs[0]["weights"], max(0, max(r["kept"] for r in runs) - found["eager"][0]["kept"]) if side != "eager" else 0,
                           tuple(t for r in runs for t in r["tensors"]), max(r["scratch"] for r in runs)) for side, runs in found.items()}
    resident = {side: [g + s for r in runs for g, s in zip(r["growth"], r["stays"])] for side, runs in found.items()}
    rows = []
    for row in judged(memory, torch.get_num_threads()):
        side, stock = resident[row.variant], resident["eager"]
        weights, most = memory["eager"].weights, max(resident[row.variant])
        rows.append({"target": target, "what": found["eager"][0]["description"], "side": row.variant, "weights": round(row.weights_mib, 3),
                     "tensors": mib(memory[row.variant].tensors), "scratch": round(row.scratch_mib, 3), "kept tensors, bytes": memory[row.variant].kept,
                     "peak": round(row.peak_mib, 3), "against stock": round(row.against_eager, 4), "without weights": round(row.working_against_eager, 4),
                     "limit": LIMITS.get(row.variant), "holds": row.holds,
                     "resident in a call": mib(g for r in found[row.variant] for g in r["growth"]),
                     "resident for good": mib(s for r in found[row.variant] for s in r["stays"]),
                     "resident spread": round(max(side) / min(side) - 1, 4), "resident against stock": round((weights + most) / (weights + max(stock)), 4),
                     "resident without weights": round(most / max(stock), 4)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", required=True, help="preset:dtype[:layers[:size]]; give it several times")
    parser.add_argument("--processes", type=int, default=2, help="of each side, three calls in each")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_side(arguments.side, *arguments.target[0].split(":"))))
        return
    state, rows = machine(), []
    for target in arguments.target:
        for row in rows_of(target, arguments.processes):
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if arguments.json:  # after each target: they take minutes
            write(arguments.json, rows, state, unit="MiB")


if __name__ == "__main__":
    main()
