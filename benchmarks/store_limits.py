"""What the ops bound by memory could take at best here: a bare loop over the bytes that an op reads and writes, with ordinary stores and with ones past the
caches, beside the op, torch.compile and a clone of the outputs, each once a round.

``python benchmarks/store_limits.py [--rounds N] [--json FILE]``: needs g++ and AVX-512.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch

from alternating import main, measure
from fusewire import ops
from test_adaln import EAGER, arguments_of
from test_qk_norm_rope import eager as qk_norm

FLAGS = ("-O2", "-std=c++20", "-mavx512f", "-fopenmp", "-shared", "-fPIC")
SHAPE = (2, 1024, 1536)  # SD3.5-medium at 512 x 512, with guidance


def library(folder: str) -> ctypes.CDLL:
    path = Path(folder) / "store_limits.so"
    subprocess.run(["g++", *FLAGS, str(Path(__file__).with_suffix(".cpp")), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def bare(loop, a: torch.Tensor, b: torch.Tensor | None, outputs: int, streams: bool):
    """The loop over tensors of one size, into new ones, as an op makes them."""
    def address(x: torch.Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if x is None else x.data_ptr())

    def run():
        c, d = torch.empty_like(a), torch.empty_like(a) if outputs == 2 else None
        loop.store_limits(address(a), address(b), address(c), address(d), ctypes.c_int64(a.nbytes), ctypes.c_int64(torch.get_num_threads()),
                          ctypes.c_int64(streams))
        return c, d
    return run


def cases(dtype: torch.dtype):
    """(op, a call of it in close, the eager chain's, what it reads whole, its outputs)."""
    for name in ("adaln_modulate", "gate_residual", "gate_residual_adaln", "adaln_modulate_dual"):
        given, op, eager = arguments_of(name, SHAPE, dtype), getattr(ops, name), EAGER[name]
        yield name, lambda given=given, op=op: op(*given, numerics="close"), eager, given, (given[:2] if name.startswith("gate") else given[:1])
    q, k = (torch.randn(*SHAPE[:2], 24, 64).to(dtype) for _ in range(2))
    weight = torch.rand(64).to(dtype)
    yield "qk_norm_rope", lambda: ops.qk_norm_rope(q, k, weight, weight, numerics="close"), qk_norm, (q, k, weight, None), (q, k)


def rows(arguments):
    with tempfile.TemporaryDirectory() as folder:
        loop = library(folder)
        for dtype in (torch.float32, torch.bfloat16):
            for name, call, eager, given, read in cases(dtype):
                outputs = eager(*given)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                compiled = torch.compile(eager, dynamic=False)
                a, b = (*read, None)[:2]
                times = measure({
                    "close": call,
                    "bare loop": bare(loop, a, b, len(outputs), False),
                    "bare loop, past the caches": bare(loop, a, b, len(outputs), True),
                    "clone": lambda: [out.clone() for out in outputs],
                    "compile": lambda: compiled(*given),
                }, arguments.rounds)
                best = min(times["bare loop"], times["bare loop, past the caches"])
                yield {"op": name, "size": list(SHAPE), "dtype": str(dtype)[6:], **times, "compile/close": round(times["compile"] / times["close"], 2),
                       "compile/best loop": round(times["compile"] / best, 2)}


if __name__ == "__main__":
    main(__doc__, rows)
