"""What launching costs the processor on a GPU's machine: microseconds until a call returns, of PyTorch's calls and ours; and the same where Triton's kernels
are launched by way of Triton itself.

    python benchmarks/gpu_host.py --json benchmarks/results/gpu-host.json
"""

from __future__ import annotations

from unittest import mock

import torch
import torch.nn.functional as F

from fusewire import ops
from gpu_timing import host_us, main


def cases() -> dict:
    def rand(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, w, b, halves, picture, gain, residual, m = rand(1, 64, 640), rand(640, 640), rand(640), rand(1, 64, 1280), rand(1, 64, 16, 16), rand(64), rand(1, 64, 640), rand(1, 640)
    q, q2, few = rand(1, 1024, 4, 64), rand(1, 128, 4, 64), rand(1, 77, 4, 64)
    gains = dict.fromkeys(("q_weight", "k_weight", "q2_weight", "k2_weight"), gain)
    return {
        "F.linear": lambda: F.linear(x, w, b), "add": lambda: x + x, "empty_like": lambda: torch.empty_like(x), "F.layer_norm": lambda: F.layer_norm(x, (640,), b, b),
        "F.group_norm": lambda: F.group_norm(picture, 32, gain, gain), "sdpa": lambda: F.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3),
        "ops.linear": lambda: ops.linear(x, w, b, numerics="close"),
        "ops.linear, GELU": lambda: ops.linear(x, w, b, activation="gelu_tanh", numerics="close"),
        "ops.linear, residual": lambda: ops.linear(x, w, b, residual=residual, numerics="close"),
        "ops.linear, gate and residual": lambda: ops.linear(x, w, b, gate=m, residual=residual, numerics="close"),
        "ops.geglu": lambda: ops.geglu(halves, numerics="close"), "ops.layer_norm": lambda: ops.layer_norm(x, b, b, numerics="close"),
        "ops.gate_residual_adaln": lambda: ops.gate_residual_adaln(x, residual, m, m, m, numerics="close"),
        "ops.group_norm_silu": lambda: ops.group_norm_silu(picture, 32, gain, gain, numerics="close"),
        "ops.attention, 1024 tokens": lambda: ops.attention(q, q, q), "ops.attention, 128 tokens": lambda: ops.attention(q2, q2, q2),
        "ops.attention, on 77 keys": lambda: ops.attention(q, few, few), "ops.joint_attention": lambda: ops.joint_attention(q, q, q, q2, q2, q2),
        "ops.joint_attention, norms": lambda: ops.joint_attention(q, q, q, q2, q2, q2, **gains),
    }


def measure(found: dict, options) -> None:
    from fusewire.kernels import triton_launch  # imports Triton

    found["rows"] = []
    with torch.inference_mode():
        for name, call in cases().items():
            ops.reset_stats()
            call()
            served = {op: [backend for backend, n in counts.items() if n] for op, counts in ops.stats().items() if any(counts.values())}
            host_us(call, 50)  # warm
            row = {"call": name, "us": round(host_us(call, 300), 1)}
            with mock.patch.object(triton_launch, "_hooked", lambda: True):
                row["us by way of Triton"] = round(host_us(call, 300), 1)
            found["rows"].append(row | {"served": served})
            print(found["rows"][-1], flush=True)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, measure))
