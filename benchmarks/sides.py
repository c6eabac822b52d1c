"""What the benchmarks of whole models share: stock diffusers, torch.compile, Fusewire and OpenVINO, alternating in one process."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable

import torch

from alternating import samples
from fusewire import ops

SIDES = ("eager", "compile", "exact", "close", "openvino")
MORE_SIDES = ("exact compiled", "close compiled")  # torch.compile of the swapped model


def swapped(model: torch.nn.Module, numerics: str) -> torch.nn.Module:
    """A copy of ``model`` on the same weights, with Fusewire's kernels swapped in."""
    import fusewire

    memo = {id(parameter): parameter for parameter in model.parameters()}
    ours = copy.deepcopy(model, memo)
    if not fusewire.swap(ours, numerics=numerics).report.swapped:
        raise RuntimeError("nothing was swapped")
    return ours


def openvino_call(model: torch.nn.Module, example: dict, dtype: torch.dtype) -> Callable[[], torch.Tensor] | None:
    """A call of the model converted to OpenVINO, or None where that is not possible. bfloat16 is its inference precision; its inputs stay float32."""
    try:
        import openvino
    except ImportError:
        print("openvino is not installed: left out", file=sys.stderr)
        return None
    if not all(isinstance(value, torch.Tensor) for value in example.values()):
        print("openvino: the model takes more than tensors: left out", file=sys.stderr)
        return None
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in example.items()}

    class Positional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.float()

        def forward(self, *values):
            return self.model(**dict(zip(wide, values)), return_dict=False)[0]

    with torch.no_grad():
        converted = openvino.convert_model(Positional(), example_input=tuple(wide.values()))
    precision = "bf16" if dtype is torch.bfloat16 else "f32"
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
                                                                "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    request, arrays = compiled.create_infer_request(), [tensor.numpy() for tensor in wide.values()]
    return lambda: torch.from_numpy(next(iter(request.infer(arrays, share_inputs=True).values())))


def sides(wanted: list[str], make: Callable[[], torch.nn.Module], example: dict, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The call of each side on ``example``, keyword arguments; ``make`` builds the stock model, the same each time."""
    model = make()
    calls: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda: model(**example, return_dict=False)[0]}
    if "compile" in wanted:
        compiled = torch.compile(model, fullgraph=True)
        calls["compile"] = lambda: compiled(**example, return_dict=False)[0]
    for numerics in ("exact", "close"):
        if numerics in wanted:
            ours = swapped(model, numerics)
            calls[numerics] = lambda ours=ours: ours(**example, return_dict=False)[0]
        if f"{numerics} compiled" in wanted:
            graph = torch.compile(swapped(model, numerics), fullgraph=True)
            calls[f"{numerics} compiled"] = lambda graph=graph: graph(**example, return_dict=False)[0]
    if "openvino" in wanted:
        call = openvino_call(make(), example, dtype)
        if call is not None:
            calls["openvino"] = call
    return {name: call for name, call in calls.items() if name in wanted}


def measured(calls: dict[str, Callable[[], torch.Tensor]], arguments: argparse.Namespace):
    """One row for each side."""
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
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--sides", nargs="+", choices=(*SIDES, *MORE_SIDES), default=list(SIDES))
