"""The SD3.5-medium shape on the CPU: stock diffusers, torch.compile, Fusewire and OpenVINO, alternating in one process.

``SD3Transformer2DModel`` with 3 of SD3.5-medium's 24 blocks (2 with the second attention), 1024 image and 154 text tokens, width 1536,
24 heads of 64, batch 1, random weights. Every side gets the same inputs; one call of each side in turn, medians. Prints a table and writes JSON:

    python benchmarks/sd3_block.py --dtype bfloat16 --rounds 7 --json benchmarks/results/sd3_block-bfloat16.json

OpenVINO is a rival only where it is installed (``pip install openvino``); it runs the module converted by ``openvino.convert_model``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

SIDES = ("eager", "compile", "exact", "close", "openvino")
CONFIG = dict(sample_size=128, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
              caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384, dual_attention_layers=(0, 1),
              qk_norm="rms_norm")


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One picture of 64 x 64 latents: 1024 tokens, and 154 tokens of text."""
    generator = torch.Generator().manual_seed(1)
    shapes = dict(hidden_states=(1, 16, 64, 64), encoder_hidden_states=(1, 154, 4096), pooled_projections=(1, 2048))
    named = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return named | dict(timestep=torch.tensor([500.0]).to(dtype))


def stock(dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(**CONFIG).eval().to(dtype)


def swapped(model: torch.nn.Module, numerics: str) -> torch.nn.Module:
    """A copy of ``model`` on the same weights, with Fusewire's kernels swapped in."""
    import fusewire

    memo = {id(parameter): parameter for parameter in model.parameters()}
    ours = copy.deepcopy(model, memo)
    if not fusewire.swap(ours, numerics=numerics).report.swapped:
        raise RuntimeError("nothing was swapped")
    return ours


def openvino_call(model: torch.nn.Module, example: dict[str, torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor] | None:
    """A call of the model converted to OpenVINO, or None where it is not installed. bfloat16 is its inference precision; its inputs stay float32."""
    try:
        import openvino
    except ImportError:
        print("openvino is not installed: left out", file=sys.stderr)
        return None
    wide = {name: tensor.float() for name, tensor in example.items()}

    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.float()

        def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep):
            return self.model(hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict=False)[0]

    with torch.no_grad():
        converted = openvino.convert_model(Positional(), example_input=tuple(wide.values()))
    precision = "bf16" if dtype is torch.bfloat16 else "f32"
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
                                                                "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    request, arrays = compiled.create_infer_request(), [tensor.numpy() for tensor in wide.values()]
    return lambda: torch.from_numpy(next(iter(request.infer(arrays, share_inputs=True).values())))


def sides(wanted: list[str], dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    example = inputs(dtype)
    model = stock(dtype)
    calls: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: model(**example, return_dict=False)[0]}
    if "compile" in wanted:
        compiled = torch.compile(model, fullgraph=True)
        calls["compile"] = lambda: compiled(**example, return_dict=False)[0]
    for numerics in ("exact", "close"):
        if numerics in wanted:
            ours = swapped(model, numerics)
            calls[numerics] = lambda ours=ours: ours(**example, return_dict=False)[0]
    if "openvino" in wanted:
        call = openvino_call(stock(dtype), example, dtype)
        if call is not None:
            calls["openvino"] = call
    return {name: call for name, call in calls.items() if name in wanted}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    if not named:
        return platform.processor()
    return f"{named.get('model name')} (family {named.get('cpu family')}, model {named.get('model')}), {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with torch.inference_mode():
        calls = sides(args.sides, dtype)
        outputs = {name: call() for name, call in calls.items()}  # the first call compiles
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
    from fusewire import ops

    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = outputs.get("eager")
    for name, median in medians.items():
        differs = "" if reference is None else f"  largest difference from eager {(outputs[name].float() - reference.float()).abs().max():.2e}"
        print(f"{name:9s} {median:8.1f} ms (least {min(times[name]):.1f}){differs}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record = dict(command=" ".join(["python", "benchmarks/sd3_block.py", *sys.argv[1:]]), dtype=args.dtype, processor=processor(), versions=versions(),
                      milliseconds_median={k: round(v, 1) for k, v in medians.items()}, milliseconds={k: [round(t, 1) for t in v] for k, v in times.items()},
                      exact_equals_eager=None if not {"eager", "exact"} <= outputs.keys() else torch.equal(outputs["eager"], outputs["exact"]),
                      backends=ops.stats())
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
