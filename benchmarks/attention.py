"""Attention against PyTorch's, in turn in one process, on the shapes of real models.

``python benchmarks/attention.py [--rounds N] [--json FILE]``: median times, GFLOP/s (4 * B * H * Tq * Tk * D, softmax not counted) and their ratio.
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
        for what, batch, queries, keys, heads, channels in SHAPES:
            q, k, v = (torch.randn(batch, tokens, heads, channels).to(dtype) for tokens in (queries, keys, keys))
            stock = [x.transpose(1, 2) for x in (q, k, v)]
            ops.reset_stats()
            times = measure({"close": lambda: ops.attention(q, k, v), "sdpa": lambda: F.scaled_dot_product_attention(*stock)}, arguments.rounds, warm=1)
            gflop = 4 * batch * heads * queries * keys * channels / 1e9
            yield {"shape": what, "size": [batch, queries, keys, heads, channels], "dtype": str(dtype)[6:], "backend": served("attention"), **times,
                   "close GFLOP/s": round(gflop / times["close"] * 1e6), "sdpa GFLOP/s": round(gflop / times["sdpa"] * 1e6),
                   "sdpa/close": round(times["sdpa"] / times["close"], 2)}


if __name__ == "__main__":
    main(__doc__, rows, rounds=9)
