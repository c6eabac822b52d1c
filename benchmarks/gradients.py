"""One row of a benchmark of an op that has a backward kernel: forward, and forward with backward, beside eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from alternating import measure, served
from fusewire import ops
from registry import Case, case_option


def gradients_option(parser) -> None:
    case_option(parser)
    parser.add_argument("--gradients", action="store_true", help="time forward and backward together")


def with_backward(ours: Callable, eager: Callable, given: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], rounds: int) -> dict[str, float]:
    """Forward and backward of ``ours(*given, numerics="close")`` and of ``eager(*given)`` in turn, for random gradients of their ``outputs``."""
    with torch.inference_mode(False), torch.enable_grad():  # the harness runs in inference mode, whose tensors take no gradient
        leaves = [t.clone().requires_grad_() for t in given]
        grads = [torch.randn(out.shape).to(out.dtype) for out in outputs]

    def step(function: Callable) -> Callable:
        def run():
            with torch.inference_mode(False), torch.enable_grad():
                torch.autograd.grad(function(*leaves), leaves, grads)
        return run

    return measure({"close with backward": step(lambda *tensors: ours(*tensors, numerics="close")), "eager with backward": step(eager)}, rounds)


def row(op: str, case: Case, dtype: str, ours: Callable, eager: Callable, given: tuple[torch.Tensor, ...], rounds: int, modes: tuple[str, ...]) -> dict:
    """``ours(*given, numerics=...)`` and ``eager(*given)`` in turn, each mode forward and ``close`` with its gradients. ``exact`` must be equal to eager."""
    stock, made = eager(*given), ours(*given, numerics=modes[0])
    assert modes[0] != "exact" or torch.equal(made, stock), f"{op} in {dtype} is not exact"
    compiled, backends = torch.compile(eager, dynamic=False), {}
    for mode in modes:
        ops.reset_stats()
        ours(*given, numerics=mode)
        backends[mode] = served(op)
    times = measure({
        **{mode: (lambda mode=mode: ours(*given, numerics=mode)) for mode in modes},
        "clone": lambda: made.clone(),
        "compile": lambda: compiled(*given),
        "eager": lambda: eager(*given),
    }, rounds) | with_backward(ours, eager, given, (stock,), rounds)  # apart, so that no forward begins with the caches that a backward leaves
    first, both = times[modes[0]], times["eager with backward"] / times["close with backward"]
    return {"op": op, "shape": case.what, "size": list(case.shape), "dtype": dtype, "backend": backends["close"],
            **({"backend of exact": backends["exact"]} if backends["close"] != backends.get("exact", backends["close"]) else {}),
            "backend of backward": served(f"{op}_backward"), **times,
            f"compile/{modes[0]}": round(times["compile"] / first, 2), f"eager/{modes[0]}": round(times["eager"] / first, 2),
            f"{modes[0]}/clone": round(first / times["clone"], 2), "with backward, eager/close": round(both, 2),
            "GB/s": round(case.elements * given[0].element_size() / first / 1e3, 1)}
