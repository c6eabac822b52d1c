"""Where the time of one call of a denoiser goes on a GPU, kernel by kernel (torch.profiler); and the rate of its matrix products back to back.

    python benchmarks/gpu_kernels.py flux-dev:1024 --json benchmarks/results/gpu-kernels.json
"""

from __future__ import annotations

import copy
import json
import statistics

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fusewire
from fusewire.presets import PRESETS, build
from gpu_models import timed
from gpu_timing import main

KERNELS = 16  # of a side, the longest
PRODUCTS = ((4096, 3072, 9216), (4608, 3072, 9216), (4608, 3072, 21504), (4608, 3072, 12288), (4608, 15360, 3072), (4096, 12288, 3072), (4096, 3072, 3072))  # FLUX.1's


def sides(what: str):
    name, size = (*what.split(":"), None)[:2]
    with torch.device("cuda"):
        model, inputs, _, _ = build(name, torch.bfloat16, PRESETS[name].full_layers if PRESETS[name].depth else None, int(size) if size else None, 0)
    model = model.to("cuda")
    inputs = {key: value.to("cuda") if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    ours = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    fusewire.swap(ours, numerics="close")
    return {"close": lambda: ours(**inputs), "eager": lambda: model(**inputs)}


def measure(found: dict, options) -> None:
    found |= {"sides": [], "products": []}
    with torch.inference_mode():
        for side, call in sides(options.model).items():
            for _ in range(3):
                call()
            row = {"side": side, "ms": [round(timed(call), 2) for _ in range(5)]}
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                call()
                torch.cuda.synchronize()
            events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
            row["kernels' ms"] = round(sum(event.self_device_time_total for event in events) / 1e3, 2)
            row["kernels"] = [{"ms": round(event.self_device_time_total / 1e3, 2), "calls": event.count, "kernel": event.key[:120]} for event in events[:KERNELS]]
            found["sides"].append(row)
            print(json.dumps(row, indent=1), flush=True)
        for rows, inner, outer in PRODUCTS:
            x, w, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((rows, inner), (outer, inner), (outer,)))
            for _ in range(3):
                F.linear(x, w, b)
            ms = statistics.median(timed(lambda: [F.linear(x, w, b) for _ in range(10)]) / 10 for _ in range(5))
            found["products"].append({"rows": rows, "inner": inner, "outer": outer, "us": round(ms * 1e3, 1), "tflops": round(2 * rows * inner * outer / ms / 1e9, 1)})
            print(found["products"][-1], flush=True)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, measure, "model"))
