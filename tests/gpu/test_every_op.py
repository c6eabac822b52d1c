"""Every op on a GPU by its public function, forwards and for the gradient of its first argument: streams, graphs, repeats, a device that is not the
current one. ``python -m pytest -m gpu tests/gpu``.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._pytree import tree_map

from fusewire import ops
from fusewire.kernels.dispatch import TABLES, forced
from tests.kernels.test_backends import CALLS
from tests.tolerance import assert_exact

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WITH_KERNELS = [name for name, (*_, counted) in CALLS.items() if any(row.name == "triton" for row in TABLES[counted].rows)]
every_op = pytest.mark.parametrize("name", WITH_KERNELS)
both = pytest.mark.parametrize("backend", ("triton", None), ids=("triton", "default"))


def arguments(name: str, device: str = "cuda") -> tuple[tuple, dict]:
    """Of a call in bfloat16, each tensor by itself."""
    def moved(value):
        return value.to(torch.bfloat16 if value.dtype is torch.float32 else value.dtype).to(device).clone() if isinstance(value, torch.Tensor) else value

    args, kwargs, _ = CALLS[name]
    if "numerics" in inspect.signature(getattr(ops, name)).parameters:
        kwargs = kwargs | {"numerics": "close"}
    return tree_map(moved, (args, kwargs))


def results(name: str, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The results, and the gradient of the first argument; of an op that writes into its arguments, these alone."""
    def call(*args):
        out = getattr(ops, name)(*args, **kwargs)
        return list(args[4:6] if name == "qk_norm_into" else out if isinstance(out, tuple) else (out,))

    with torch.no_grad():
        plain = call(*args)
    if name == "qk_norm_into":
        return plain
    first = args[0].detach().requires_grad_()
    outputs = [part for part in call(first, *args[1:]) if part.requires_grad]
    return [*plain, *torch.autograd.grad(outputs, first, [torch.ones_like(part) for part in outputs])]


def same(got, want, context: str = "") -> None:
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert_exact(mine, theirs, f"{context} {i}")


@every_op
@both
def test_stream(name, backend):
    """On a stream of its own, behind a long kernel that its input waits for."""
    args, kwargs = arguments(name)
    late, a = torch.zeros_like(args[0]), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with forced(backend):
        want = [part.clone() for part in results(name, args, kwargs)]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                a = a @ a * 1e-4
            late.copy_(args[0])
            got = results(name, (late, *args[1:]), kwargs)
        torch.cuda.synchronize()
    same(got, want)


@every_op
@both
def test_graph_capture(name, backend):
    """Replayed on other values in the same memory: what a call by itself gives."""
    (args, kwargs), other = arguments(name), torch.randn_like(arguments(name)[0][0])
    with forced(backend):
        results(name, args, kwargs)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(name, args, kwargs)
        for values in (args[0].clone(), other):
            args[0].copy_(values)
            graph.replay()
            torch.cuda.synchronize()
            got = [part.clone() for part in captured]
            same(got, results(name, args, kwargs))


@every_op
@both
def test_nondeterminism(name, backend):
    """250 repeats."""
    args, kwargs = arguments(name)
    with forced(backend):
        want = [part.clone() for part in results(name, args, kwargs)]
        for i in range(250):
            same(results(name, args, kwargs), want, f"repeat {i}")


@every_op
@both
def test_device_guard(name, backend):
    """On the second GPU while the first is the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    here, there = arguments(name), arguments(name, "cuda:1")
    with forced(backend), torch.cuda.device(0):
        got, want = results(name, *there), results(name, *here)
        assert all(part.device.index == 1 for part in got)
    same([part.cpu() for part in got], [part.cpu() for part in want])
