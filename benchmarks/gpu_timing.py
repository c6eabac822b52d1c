"""How the GPU benchmarks measure: what a call takes on the device, with cold caches, and what it takes the processor to launch it."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from fusewire.kernels.library import CUDA

CACHE = 256 * 2**20  # bytes written before each call: several times the L2 cache
_AHEAD = 1_000_000  # clock cycles that the device waits, so that all launches of a call are queued before its first kernel starts
_AHEAD_OF_GRADIENTS = 4_000_000  # autograd's take longer
_flush: torch.Tensor | None = None


def device_us(call, repeats: int = 25, gradients: bool = False) -> float:
    """Median microseconds between the first kernel's start and the last one's end; the L2 cache is flushed before each call."""
    global _flush
    if _flush is None:
        _flush = torch.empty(CACHE // 4, dtype=torch.int32, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        _flush.zero_()
        torch.cuda._sleep(_AHEAD_OF_GRADIENTS if gradients else _AHEAD)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


def host_us(call, repeats: int = 50) -> float:
    """Median microseconds until a call returns, with the device waiting: what launching costs."""
    taken = []
    for _ in range(repeats):
        torch.cuda._sleep(100_000)
        begin = time.perf_counter()
        call()
        taken.append((time.perf_counter() - begin) * 1e6)
        if len(taken) % 16 == 0:
            torch.cuda.synchronize()  # the queue of launches has an end
    torch.cuda.synchronize()
    return statistics.median(taken)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of 2 GiB, bytes read and written."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / device_us(lambda: b.copy_(a), 11) / 1e3


def main(doc: str, measure, *arguments: str) -> int:
    """A script that writes one JSON file: ``measure(found, options)`` fills ``found``, which has its command and the machine. ``arguments``: by place."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    for name in arguments:
        parser.add_argument(name)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here", file=sys.stderr)
        return 3
    given = " ".join(getattr(options, name) for name in arguments)
    found = {"command": f"benchmarks/{Path(sys.argv[0]).name} {given} --json".replace("  ", " "), "machine": machine()}
    measure(found, options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


def machine() -> dict:
    """The GPU, its clocks as they are now, and the versions."""
    import triton

    found = {"torch": torch.__version__, "cuda library": CUDA.loaded, "triton": triton.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
             "cudnn": torch.backends.cudnn.version(), "when": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,power.draw,temperature.gpu"
        found["nvidia-smi"] = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()
    return found
