"""Attention with heads of more than 128 channels on a GPU: PyTorch's choice, cuDNN, FlashAttention-2, what ``ops.attention`` chooses, our Triton kernel; and
that kernel by other tiles: what kernels/tuning.py should choose.

    python benchmarks/gpu_wide_heads.py --json benchmarks/results/gpu-wide-heads.json
"""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewire import ops
from fusewire.kernels import plans
from fusewire.kernels.dispatch import forced
from fusewire.kernels.tuning import AttentionTile
from gpu_timing import device_us, main

# (queries, keys, heads, channels, causal): SD1.5's deepest levels, whole tiles, a width between
SHAPES = ((1024, 1024, 8, 160, False), (256, 256, 8, 160, False), (64, 64, 8, 160, False), (256, 77, 8, 160, False), (2048, 2048, 16, 256, False),
          (2048, 2048, 16, 256, True), (4096, 4096, 16, 192, False))
TILES = ((64, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3))  # queries, keys, warps, stages
EVERY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SIDES = {"sdpa": EVERY, "cudnn": EVERY[:1], "flash": EVERY[1:2], "ours": EVERY, "triton": EVERY}


def tiles(q, k, v, causal: bool):
    from fusewire.kernels.attention import triton_kernel  # imports Triton

    for queries, keys, warps, stages in TILES:
        tile = AttentionTile(queries, keys, 256, warps, stages, "ieee")
        plans.forget()
        with mock.patch.object(triton_kernel, "attention_tile", lambda *arguments: tile), forced("triton"), torch.no_grad():
            took = round(device_us(lambda: ops.attention(q, k, v, causal=causal), 15), 1)
        yield {"queries": queries, "keys": keys, "warps": warps, "stages": stages, "us": took}
    plans.forget()


def measure(found: dict, options) -> None:
    found["rows"], found["tiles"] = [], []
    for queries, keys, heads, dim, causal in SHAPES:
        q, k, v = (torch.randn(2, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for tokens in (queries, keys, keys))
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*(x.double() for x in turned), is_causal=causal).transpose(1, 2)
        row = {"what": f"[2, {queries}, {heads}, {dim}] on {keys}{' causal' if causal else ''} bf16"}
        for side, backends in SIDES.items():
            ours = side in ("ours", "triton")

            def call():
                return ops.attention(q, k, v, causal=causal) if ours else F.scaled_dot_product_attention(*turned, is_causal=causal).transpose(1, 2)

            with sdpa_kernel(backends, set_priority=True), forced("triton" if side == "triton" else None), torch.no_grad():
                try:
                    ops.reset_stats()
                    error = (call().double() - want).abs().max().item()
                    served = [backend for backend, calls in ops.stats()["attention"].items() if calls]
                    row[side] = {"us": round(device_us(call, 15), 1), "error": error, "served": served}
                except RuntimeError as reason:  # PyTorch's backends do not serve every shape
                    row[side] = str(reason).splitlines()[0]
        found["rows"].append(row)
        found["tiles"] += [{"what": row["what"]} | tile for tile in tiles(q, k, v, causal)]
        print(row, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, measure))
