"""Attention against PyTorch's, in turn in one process, on the shapes of real models.

``python benchmarks/attention.py [--rounds N] [--training] [--json FILE]``: median times, GFLOP/s (4 * B * H * Tq * Tk * D, softmax not counted) and
their ratio. ``--training``: of the gradients of q, k and v alone (10 instead of 4), and of both directions together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main, measure, served
from fusewire import ops

# (what, B, queries, keys, H, D)
SHAPES = [
    ("SD3.5-medium 512^2, joint", 1, 1178, 1178, 24, 64),
    ("SD3.5-medium 512^2, joint, guidance", 2, 1178, 1178, 24, 64),
    ("Flux width, half its heads", 1, 1178, 1178, 12, 128),
    ("SD1.5 cross attention, 64x64", 2, 4096, 77, 8, 40),
    ("SD1.5 self attention, 32x32", 2, 1024, 1024, 8, 80),
]


def rows(arguments):
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for what, *size in SHAPES:
            batch, queries, keys, heads, channels = size
            q, k, v = (torch.randn(batch, tokens, heads, channels).to(dtype) for tokens in (queries, keys, keys))
            ops.reset_stats()
            measured = training(q, k, v, arguments.rounds) if arguments.training else inference(q, k, v, arguments.rounds)
            backend = served("attention_backward" if arguments.training else "attention")
            yield {"shape": what, "size": size, "dtype": str(dtype)[6:], "backend": backend, **measured}


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def inference(q, k, v, rounds: int) -> dict:
    times = measure({"close": lambda: ops.attention(q, k, v), "sdpa": lambda: sdpa(q, k, v)}, rounds, warm=1)
    gflop = 4 * q.numel() * k.shape[1] / 1e9
    return {**times, "close GFLOP/s": round(gflop / times["close"] * 1e6), "sdpa GFLOP/s": round(gflop / times["sdpa"] * 1e6),
            "sdpa/close": round(times["sdpa"] / times["close"], 2)}


def training(q, k, v, rounds: int) -> dict:
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        grad = torch.randn(q.shape).to(q.dtype)
        sides = {"close": ops.attention, "sdpa": sdpa}
        outs = {name: call(*inputs) for name, call in sides.items()}
        backward = measure({name: lambda out=out: torch.autograd.grad(out, inputs, grad, retain_graph=True) for name, out in outs.items()}, rounds, warm=1)
        both = measure({name: lambda call=call: torch.autograd.grad(call(*inputs), inputs, grad) for name, call in sides.items()}, rounds, warm=1)
    return {"close backward": backward["close"], "sdpa backward": backward["sdpa"], "close both": both["close"], "sdpa both": both["sdpa"],
            "backward sdpa/close": round(backward["sdpa"] / backward["close"], 2), "both sdpa/close": round(both["sdpa"] / both["close"], 2)}


if __name__ == "__main__":
    main(__doc__, rows, rounds=9, options=lambda parser: parser.add_argument("--training", action="store_true", help="the gradients"))
