"""Attention with heads of more than 128 channels on a GPU: PyTorch's choice, cuDNN, FlashAttention-2, what ``ops.attention`` chooses, our Triton kernel.

    python benchmarks/gpu_wide_heads.py --json benchmarks/results/gpu-wide-heads.json
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusewire import ops
from fusewire.kernels.dispatch import forced
from gpu_timing import device_us, main

# (queries, keys, heads, channels, causal): SD1.5's deepest levels, whole tiles, a width between
SHAPES = ((1024, 1024, 8, 160, False), (256, 256, 8, 160, False), (64, 64, 8, 160, False), (256, 77, 8, 160, False), (2048, 2048, 16, 256, False),
          (2048, 2048, 16, 256, True), (4096, 4096, 16, 192, False))
EVERY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SIDES = {"sdpa": EVERY, "cudnn": EVERY[:1], "flash": EVERY[1:2], "ours": EVERY, "triton": EVERY}


def measure(found: dict, options) -> None:
    found["rows"] = []
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
        print(row, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, measure))
