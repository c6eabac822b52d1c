"""The candidates for attention on Hopper (kernels/attention/hopper.py, hopper_triton.py) against PyTorch's cuDNN and flash attention.

``python benchmarks/hopper_attention.py [--dry] [--only TEXT] [--rounds N] [--json FILE]``: every candidate in a process of its own, so that one that hangs
or crashes ends alone: first its error against float64 beside SDPA's, then its times, in turn with SDPA's. All compile first, without a device and in
parallel; ``--dry`` stops there and prints registers, spills and shared memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import queue
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/fusewire-hopper-triton")  # the processes share what they compile
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # the parent must not start CUDA: its children are forks

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = {64: [(2, 4250, 24), (2, 1178, 24)], 128: [(1, 4608, 24), (2, 2048, 16), (2, 8192, 16)]}  # B, T, H of each head dimension
TIMEOUT = 40


def candidates() -> dict[str, tuple]:
    """name -> (head dimension, module, tile), the likeliest first"""
    from fusewire.kernels.attention.hopper_limits import HopperTile
    from fusewire.kernels.attention.hopper_triton import TmaTile

    tiles = {
        64: [HopperTile(2, 128, 3), TmaTile(128, 128, 8, 2), HopperTile(2, 128, 3, ordered=True), HopperTile(2, 128, 3, persistent=False),
             HopperTile(3, 128, 3, producer_registers=32, registers=160), HopperTile(3, 128, 3, ordered=True, producer_registers=32, registers=160),
             TmaTile(128, 64, 8, 3), TmaTile(64, 128, 4, 2)],
        128: [HopperTile(2, 128, 2), HopperTile(2, 128, 2, ordered=True), HopperTile(2, 128, 2, persistent=False), HopperTile(2, 64, 4),
              TmaTile(128, 128, 8, 2), TmaTile(128, 64, 8, 3)],
    }
    found = {}
    for some in itertools.zip_longest(*tiles.values()):
        for dim, tile in zip(tiles, some):
            if tile is None:
                continue
            if isinstance(tile, HopperTile):
                name = f"gluon {tile.consumers}x64 queries, {tile.keys} keys, {tile.stages} stages" + ", ordered" * tile.ordered + ", not persistent" * (not tile.persistent)
            else:
                name = f"tma {tile.queries} queries, {tile.keys} keys, {tile.warps} warps, {tile.stages} stages"
            found[f"{dim}: {name}"] = (dim, "hopper" if isinstance(tile, HopperTile) else "hopper_triton", tile)
    return found


def _module(name: str):
    from importlib import import_module

    return import_module(f"fusewire.kernels.attention.{name}")


def _joint(module: str, dim: int, tile) -> bool:
    """Two segments are tried with one candidate of each head dimension only: compiling takes long."""
    return module == "hopper" and tile == _module("hopper_limits").hopper_tile(dim)


def _compile(name: str) -> dict:
    """Where there is no device: what the launcher would launch for a timed shape, for fewer programs (not specialised on) and causal, into Triton's cache."""
    from triton.runtime import driver

    from fusewire.kernels.compiled import TARGETS, _Offline, _resources
    from fusewire.kernels.triton_base import launches_go_to

    dim, module, tile = candidates()[name]
    found = {}

    def receive(kernel, programs, args, options):
        compiled = kernel.run(*args, grid=(programs,), warmup=True, **options)
        registers, stack, static = _resources(compiled.asm["cubin"])
        found.update(registers=registers, stack=max(stack, found.get("stack", 0)), shared=max(compiled.metadata.shared, static), wgmma=compiled.asm["ptx"].count("wgmma.mma_async"))

    driver.set_active(_Offline(TARGETS["sm_90"]))
    start = time.perf_counter()
    with launches_go_to(TARGETS["sm_90"], receive):
        q = torch.empty(1, 256, 2, dim, dtype=torch.bfloat16, device="meta")
        for x, causal in ((q.half(), False), (q, True), (q, False)):
            _module(module).attention(x, x, x, causal, tile=tile)
        if _joint(module, dim, tile):
            _module(module).joint_attention(q, q, q, q, q, q, tile=tile)
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def compile_all(names: list[str]) -> dict[str, dict]:
    found = {}
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(len(names), max(len(os.sched_getaffinity(0)) - 1, 1)), mp_context=context) as pool:
        jobs = {name: pool.submit(_compile, name) for name in names}
        for name, job in jobs.items():
            try:
                found[name] = job.result()
            except Exception as error:  # one candidate that does not compile must not hide the others
                found[name] = {"error": f"{type(error).__name__}: {error}"[-300:]}
    return found


def sdpa(q, k, v, causal: bool = False, backend=None):
    with sdpa_kernel([backend] if backend else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def cases(dim: int):
    """(what, q, k, v, causal): tails of both tiles, one token, fewer programs than multiprocessors and more, strides, grouped heads, float16."""
    make = lambda *shape, dtype=torch.bfloat16: torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)  # noqa: E731
    for tokens, keys in ((128, 128), (1, 1), (200, 77), (65, 300), (1178, 1178)):
        yield f"{tokens} on {keys}", make(2, tokens, 3, dim), make(2, keys, 3, dim), make(2, keys, 3, dim), False
    packed = make(2, 700, 24, 3 * dim)
    yield "packed q, k, v", *packed.chunk(3, -1), False
    yield "heads before tokens", *(make(2, 6, 513, dim).transpose(1, 2) for _ in range(3)), False
    yield "grouped heads", make(2, 300, 8, dim), make(2, 300, 2, dim), make(2, 300, 2, dim), False
    yield "large scores", 8 * make(1, 500, 2, dim), 8 * make(1, 500, 2, dim), make(1, 500, 2, dim), False
    yield "float16", *(make(2, 300, 4, dim, dtype=torch.float16) for _ in range(3)), False
    for tokens, keys in ((1, 5), (300, 300), (1000, 1000), (500, 200), (200, 500)):
        yield f"causal, {tokens} on {keys}", make(2, tokens, 3, dim), make(2, keys, 3, dim), make(2, keys, 3, dim), True


def check(attention, joint_attention, dim: int) -> tuple[list[str], float]:
    """(the cases whose largest error against float64 is more than twice SDPA's, the largest ratio). ``joint_attention`` may be None."""
    torch.manual_seed(0)
    wrong, largest = [], 0.0

    def compare(what, call, q, k, v, causal):
        nonlocal largest
        out = call()
        torch.cuda.synchronize()
        exact = sdpa(q.double(), k.double(), v.double(), causal, SDPBackend.MATH)
        error = (out.double() - exact).abs().max().item()
        stock = (sdpa(q, k, v, causal).double() - exact).abs().max().item()
        if stock:
            largest = max(largest, error / stock)
        again = call()
        if not error <= 2 * stock + 1e-6 or out.shape != q.shape or not out.is_contiguous() or not torch.equal(out, again):
            wrong.append(f"{what}: {error:.2e}, SDPA {stock:.2e}, {'the same' if torch.equal(out, again) else 'another result'} again")

    for what, q, k, v, causal in cases(dim):
        compare(what, lambda: attention(q, k, v, causal), q, k, v, causal)
    for tokens, tokens2 in ((1024, 154), (300, 77), (1, 130)) if joint_attention else ():
        first, second = ([torch.randn(2, n, 6, dim, device="cuda").bfloat16() for _ in range(3)] for n in (tokens, tokens2))
        whole = [torch.cat(pair, 1) for pair in zip(first, second)]
        compare(f"joint, {tokens} and {tokens2}", lambda: torch.cat(joint_attention(*first, *second), 1), *whole, False)
    return wrong, largest


def samples(calls: dict, rounds: int) -> dict[str, float]:
    """Median microseconds of each call from CUDA graphs of a few of them, in turn."""
    graphs, times, counts = {}, {name: [] for name in calls}, {}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        counts[name] = max(2, min(20, int(6 / max(start.elapsed_time(end), 0.05))))
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(counts[name]):
                call()
    for i in range(rounds + 2):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times[name].append(start.elapsed_time(end) * 1000 / counts[name])
    return {name: statistics.median(some) for name, some in times.items()}


def _measure(name: str, rounds: int, results) -> None:
    dim, module, tile = candidates()[name]
    attend = lambda q, k, v, causal=False: _module(module).attention(q, k, v, causal, tile=tile)  # noqa: E731
    joint = (lambda *segments: _module(module).joint_attention(*segments, tile=tile)) if _joint(module, dim, tile) else None
    try:
        with torch.inference_mode():
            if module == "hopper":
                q = torch.empty(1, 64, 1, dim, dtype=torch.bfloat16, device="cuda")
                if reason := _module("hopper_limits").why_not_hopper(q, q, q):
                    results.put({"name": name, "wrong": [reason]})
                    return
            wrong, ratio = check(attend, joint, dim)
            results.put({"name": name, "wrong": wrong, "error/SDPA's": round(ratio, 2), "device": torch.cuda.get_device_name()})
            for batch, tokens, heads in SHAPES[dim]:
                q, k, v = (torch.randn(batch, tokens, heads, dim, device="cuda").bfloat16() for _ in range(3))
                times = samples({"ours": lambda: attend(q, k, v), "cudnn": lambda: sdpa(q, k, v, False, SDPBackend.CUDNN_ATTENTION),
                                 "flash": lambda: sdpa(q, k, v, False, SDPBackend.FLASH_ATTENTION)}, rounds)
                flop = 4 * batch * heads * tokens**2 * dim
                results.put({"name": name, "shape": [batch, tokens, heads, dim], "us": {side: round(t, 1) for side, t in times.items()},
                             "TFLOP/s": {side: round(flop / t / 1e6) for side, t in times.items()}, "ours/cudnn": round(times["cudnn"] / times["ours"], 3)})
    except Exception as error:  # reported by the parent, which goes on with the next candidate
        results.put({"name": name, "wrong": [f"{type(error).__name__}: {error}"[-300:]]})


def measure(name: str, rounds: int) -> list[dict]:
    """What the candidate's process reported before it ended or its time was up."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_measure, args=(name, rounds, results))
    process.start()
    found, deadline = [], time.monotonic() + TIMEOUT
    while True:
        try:
            found.append(results.get(timeout=0.2))
        except queue.Empty:
            if not process.is_alive():
                while not results.empty():  # what came in since
                    found.append(results.get(timeout=1))
                break
            if time.monotonic() > deadline:
                found.append({"name": name, "wrong": [f"not done after {TIMEOUT} s"]})
                process.kill()
                break
    process.join(5)
    if process.exitcode not in (0, -9, None):
        found.append({"name": name, "wrong": [f"the process ended with {process.exitcode}"]})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="compile only")
    parser.add_argument("--only", default="", help="only candidates whose name has this text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=110, help="seconds after which no further candidate is started")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    names = [name for name in candidates() if options.only in name]
    compiled, rows = compile_all(names), []
    for name, found in compiled.items():
        print(f"{name}: " + ", ".join(f"{what} {value}" for what, value in found.items()), flush=True)
    if not options.dry:
        for name in names:
            if "error" in compiled[name]:
                continue
            if time.monotonic() - start > options.budget:
                print(f"{name}: not started, {options.budget:g} s are over")
                continue
            for row in measure(name, options.rounds):
                rows.append(row)
                print("  ".join(f"{what} {value}" for what, value in row.items()), flush=True)
            if options.json:
                record = {"compiled": compiled, "rows": rows, "torch": torch.__version__}
                options.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{time.monotonic() - start:.0f} s")
    failed = [name for name in names if "error" in compiled[name] or compiled[name]["stack"]]
    return 1 if options.dry and failed else 0


if __name__ == "__main__":
    sys.exit(main())
