"""Tiles of attention's gradients on a GPU: what kernels/tuning.py should choose. Each row is the time of all three kernels with one of them changed.

    python benchmarks/gpu_tiles.py --json benchmarks/results/gpu-gradient-tiles.json

Many processes compile into Triton's cache first; then one of them times.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch

from fusewire.kernels import tuning
from fusewire.kernels.attention.op import _softmax
from gpu_timing import device_us, main

SHAPES = {64: (1, 4250, 24, 64), 128: (1, 4608, 24, 128)}
PARTS = {  # queries, keys, warps, stages
    (128, "dkdv"): ((32, 64, 8, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 1), (64, 64, 8, 2), (16, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 1), (32, 64, 4, 2)),
    (128, "dq"): ((64, 64, 8, 2), (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (64, 128, 4, 2), (128, 32, 8, 3)),
    (64, "dkdv"): ((64, 64, 4, 2), (64, 128, 8, 1), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (128, 64, 8, 1), (32, 64, 4, 3), (32, 128, 8, 3)),
    (64, "dq"): ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 8, 1), (128, 128, 8, 2)),
}


def gradients(part: tuple[int, str, tuple] | None, q, k, v, grad, softmax):
    """By the tile of kernels/tuning.py, with ``part`` in the place of one kernel's."""
    from fusewire.kernels.attention import triton_backward  # imports Triton

    def tile(*arguments):
        found = tuning.attention_backward_tile(*arguments)
        return found if part is None else found._replace(**{part[1]: tuning.BackwardPart(*part[2])})

    with mock.patch.object(triton_backward, "attention_backward_tile", tile):
        return triton_backward.attention_backward(grad, None, q, k, v, *softmax, None, False, None)


def compiled(part) -> str:
    q, row = torch.empty(SHAPES[part[0]], device="cuda", dtype=torch.bfloat16), torch.empty((1, 24, SHAPES[part[0]][1]), device="cuda", dtype=torch.float64)
    try:
        gradients(part, q, q, q, q, (q, row, row))
    except Exception as reason:  # a tile that the GPU has no room for
        return f"{type(reason).__name__}: {reason}"[:200]
    return ""


def measure(found: dict, options) -> None:
    todo = [(dim, kernel, part) for (dim, kernel), parts in PARTS.items() for part in parts]
    with ProcessPoolExecutor(10, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = {part: reason for part, reason in zip(todo, pool.map(compiled, todo)) if reason}
    found["rows"] = []
    with torch.no_grad():
        for dim, shape in SHAPES.items():
            torch.manual_seed(0)
            q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            softmax = _softmax(q, k, v, None, False, None)
            want = gradients(None, q, k, v, grad, softmax)
            for part in (part for part in todo if part[0] == dim):
                row = {"op": "attention backward", "what": f"{list(shape)} bf16", "kernel": part[1]} | dict(zip(("queries", "keys", "warps", "stages"), part[2]))
                if part in failed:
                    row["failed"] = failed[part]
                else:
                    got = gradients(part, q, k, v, grad, softmax)
                    row["us"] = round(device_us(lambda: gradients(part, q, k, v, grad, softmax), 9), 1)
                    row["relative difference"] = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, want))
                found["rows"].append(row)
                print(row, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, measure))
