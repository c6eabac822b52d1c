"""What a bfloat16 matrix product on AMX tiles can reach here at best, with everything already in the caches: the limit that the linears meet.

``python benchmarks/amx_limits.py [--json FILE]``: compiles amx_limits.cpp with g++ and runs it on one core, then on all.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import torch

from alternating import main

FLAGS = ("-O2", "-std=c++20", "-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-pthread")


def rows(arguments):
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "amx_limits"
        subprocess.run(["g++", *FLAGS, str(Path(__file__).with_suffix(".cpp")), "-o", str(program)], check=True)
        for threads in sorted({1, torch.get_num_threads()}):
            for line in subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True).stdout.splitlines():
                case, rate = line.split("\t")
                yield {"case": case, "threads": threads, "TFLOP/s": float(rate)}


if __name__ == "__main__":
    main(__doc__, rows)
