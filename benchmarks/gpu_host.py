"""What launching costs the processor on a GPU's machine: microseconds until a call returns, of PyTorch's calls and ours; and the same where each call is
worked out (kernels/plans.py), and where Triton's kernels are launched by way of Triton itself. Then whole U-Nets of batch 1, which wait for their launches:
milliseconds until the call returns, and until it is done.

    python benchmarks/gpu_host.py --json benchmarks/results/gpu-host.json
"""

from __future__ import annotations

import copy
import statistics
import time
from unittest import mock

import torch
import torch.nn.functional as F

import fusewire
from fusewire import ops
from fusewire.presets import build
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


MODELS = (("sdxl", 1024), ("sd1.5", None))
ROUNDS = 9


def models(name: str, size: int | None):
    """The sides of one model in turn, medians."""
    with torch.device("cuda"):
        model, inputs, _, _ = build(name, torch.bfloat16, None, size, 0)
    model = model.to("cuda")
    inputs = {key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    sides = {"eager": model}
    for numerics in ("exact", "close"):
        sides[numerics] = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        fusewire.swap(sides[numerics], numerics=numerics)
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(ROUNDS + 3):
        for side, ours in sides.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            ours(**inputs)
            returned = time.perf_counter()
            torch.cuda.synchronize()
            taken[side].append((returned - begin, time.perf_counter() - begin))
    for side, times in taken.items():
        host, whole = ([round(pair[i] * 1e3, 1) for pair in times[3:]] for i in (0, 1))
        yield {"model": name if size is None else f"{name}:{size}", "side": side, "host ms": statistics.median(host), "ms": statistics.median(whole), "least ms": min(whole)}


def measure(found: dict, options) -> None:
    from fusewire.kernels import plans, triton_launch  # imports Triton

    sides = {"us": (plans, "KEPT", plans.KEPT), "us without a plan": (plans, "_kind", lambda args: None), "us by way of Triton": (triton_launch, "_hooked", lambda: True)}
    found["rows"] = []
    with torch.inference_mode():
        for name, call in cases().items():
            ops.reset_stats()
            call()
            served = {op: [backend for backend, n in counts.items() if n] for op, counts in ops.stats().items() if any(counts.values())}
            host_us(call, 50)  # warm
            taken: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(5):
                for side, (module, name_of, instead) in sides.items():
                    with mock.patch.object(module, name_of, instead):
                        call()
                        taken[side].append(host_us(call, 64))
            row = {"call": name} | {side: round(statistics.median(times), 1) for side, times in taken.items()}
            found["rows"].append(row | {"served": served})
            print(found["rows"][-1], flush=True)
        found["models"] = [row for model in MODELS for row in models(*model)]
        print(*found["models"], sep="\n", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, measure))
