"""Attention against PyTorch's, in turn in one process, on the shapes of real models.

``python benchmarks/attention.py [--rounds N] [--json FILE]``: median times, GFLOP/s (4 * B * H * Tq * Tk * D, softmax not counted) and their ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.library import cpu_isa

# (what, B, queries, keys, H, D)
SHAPES = [
    ("SD3.5-medium 512^2, joint", 1, 1178, 1178, 24, 64),
    ("SD3.5-medium 512^2, joint, guidance", 2, 1178, 1178, 24, 64),
    ("Flux width, half its heads", 1, 1178, 1178, 12, 128),
    ("SD1.5 cross attention, 64x64", 2, 4096, 77, 8, 40),
    ("SD1.5 self attention, 32x32", 2, 1024, 1024, 8, 80),
]


def measure(functions: list, rounds: int) -> list[float]:
    """Median seconds of each function, called in turn."""
    times = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, seconds in zip(functions, times):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def rows(rounds: int):
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for what, batch, queries, keys, heads, channels in SHAPES:
            q, k, v = (torch.randn(batch, tokens, heads, channels).to(dtype) for tokens in (queries, keys, keys))
            stock = [x.transpose(1, 2) for x in (q, k, v)]
            ops.reset_stats()
            ours, theirs = measure([lambda: ops.attention(q, k, v), lambda: F.scaled_dot_product_attention(*stock)], rounds)
            served = ops.stats()["attention"]
            flops = 4 * batch * heads * queries * keys * channels
            yield {"shape": what, "size": [batch, queries, keys, heads, channels], "dtype": str(dtype)[6:],
                   "backend": max(served, key=served.get), "ms": ours * 1e3, "sdpa_ms": theirs * 1e3,
                   "gflops": flops / ours / 1e9, "sdpa_gflops": flops / theirs / 1e9, "ratio": theirs / ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    machine = {"processor": platform.processor() or platform.machine(), "isa": cpu_isa(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(machine)
    found = []
    with torch.inference_mode():
        for row in rows(arguments.rounds):
            found.append(row)
            print(f"{row['dtype']:9} {row['shape']:37} {row['backend']:9} {row['ms']:7.2f} ms {row['gflops']:4.0f} GFLOP/s   "
                  f"PyTorch {row['sdpa_ms']:7.2f} ms {row['sdpa_gflops']:4.0f} GFLOP/s   {row['ratio']:.2f}x", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "rows": found}, file, indent=1)


if __name__ == "__main__":
    main()
