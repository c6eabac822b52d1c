"""The SD3.5-medium shape on the CPU: stock diffusers, torch.compile, Fusewire and OpenVINO, alternating in one process.

``SD3Transformer2DModel`` with 3 of SD3.5-medium's 24 blocks (2 with the second attention), 1024 image and 154 text tokens, width 1536,
24 heads of 64, batch 1, random weights. Every side gets the same inputs; one call of each side in turn, medians. Prints a table and writes JSON:

    python benchmarks/sd3_block.py --dtype bfloat16 --rounds 7 --json benchmarks/results/sd3_block-bfloat16.json

OpenVINO is a rival only where it is installed (``pip install openvino``); it runs the module converted by ``openvino.convert_model``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable

import torch

from alternating import main, samples
from fusewire import ops

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


def rows(arguments: argparse.Namespace):
    calls = sides(arguments.sides, getattr(torch, arguments.dtype))
    outputs, backends = {}, {}
    for name, call in calls.items():
        ops.reset_stats()
        outputs[name] = call()  # the first call compiles
        backends[name] = {op: {backend: n for backend, n in counts.items() if n} for op, counts in ops.stats().items() if any(counts.values())}
    times = samples(calls, arguments.rounds, warm=0)
    eager = outputs.get("eager")
    for name, taken in times.items():
        row = {"side": name, "dtype": arguments.dtype, "median": round(statistics.median(taken)), "least": round(min(taken))}
        if eager is not None:
            row |= {"eager/this": round(statistics.median(times["eager"]) / statistics.median(taken), 2), "equals eager": torch.equal(outputs[name], eager),
                    "largest difference from eager": (outputs[name].float() - eager.float()).abs().max().item()}
        yield row | {"backends in one call": backends[name], "all": [round(t) for t in taken]}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))


if __name__ == "__main__":
    main(__doc__, rows, rounds=7, options=options)
