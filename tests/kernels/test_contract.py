"""What every public op promises to PyTorch's transforms and tracers: vmap, torch.func, functionalisation, export, torch.compile, autocast.

``opcheck``, gradcheck and autocast of every pair of dtypes are in the rooms' own tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusewire import ops
from fusewire.kernels import triton_rows
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU, cpu_is_intel, cpu_isa
from tests.kernels.test_backends import CALLS
from tests.tolerance import assert_close, assert_exact, assert_within

CASES = [(name, numerics) for name in CALLS for numerics in ("exact", "close")
         if numerics == "close" or "numerics" in inspect.signature(getattr(ops, name)).parameters]
every_op = pytest.mark.parametrize("name, numerics", CASES, ids=map("-".join, CASES))
SAMPLES = 3


class Call(NamedTuple):
    """An op as a function of its floating tensors, the table of a schedule apart, which returns a tuple of new tensors."""

    run: Callable
    tensors: list[torch.Tensor]
    fused: bool  # whether a backend other than the reference serves it
    counted: str  # the name under which its calls are counted

    def check_backend(self) -> None:
        """What was to serve has served, since the test began."""
        calls = ops.stats()[self.counted]
        assert (calls["reference"] == 0 < sum(calls.values())) if self.fused else (calls["reference"] > 0 == calls["cpu"]), calls


def call_of(name: str, numerics: str, dtype: torch.dtype = torch.float32) -> Call:
    args, kwargs, _ = CALLS[name]
    op = getattr(ops, name)
    if "numerics" in inspect.signature(op).parameters:
        kwargs = kwargs | {"numerics": numerics}
    if name == "layer_norm" and dtype is torch.float64:  # FP32LayerNorm computes it in float32
        kwargs = kwargs | {"rounding": "torch"}
    if name == "qk_norm_into":  # the heads of a stream come behind those of another
        op, args = _behind, args[:4]
    flat, structure = tree_flatten((args, kwargs))
    places = [i for i, value in enumerate(flat) if isinstance(value, torch.Tensor) and value.dtype is torch.float32]

    def run(*tensors):
        given = list(flat)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor
        args, kwargs = tree_unflatten(given, structure)
        out = op(*args, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    tensors = [torch.randn(flat[i].shape, dtype=dtype) for i in places]
    running = [choice.backend for choice in ops.backends(name, *CALLS[name][0], **kwargs) if choice.runs]
    # Nothing here holds by plain PyTorch alone: in close the library serves every op (but for a product that some processors leave to PyTorch)
    by_library = CPU.loaded and numerics == "close" and not (name == "linear" and (cpu_isa() == "base" or cpu_is_intel() and cpu_isa() != "amx"))
    assert not by_library or running == ["cpu"]
    return Call(run, tensors, running != ["reference"], CALLS[name][2])


def _behind(q, k, q_weight, k_weight, **options):
    joint_q, joint_k = (torch.cat([0 * q[:, :2], x], dim=1) for x in (q, k))  # batched under vmap, where q is
    ops.qk_norm_into(q, k, q_weight, k_weight, joint_q[:, 2:], joint_k[:, 2:], **options)
    return joint_q, joint_k


def samples_of(call: Call, batched: int) -> list[torch.Tensor]:
    """The first ``batched`` tensors for each of some samples, the others as they are."""
    return [torch.randn(SAMPLES, *tensor.shape, dtype=tensor.dtype) if i < batched else tensor for i, tensor in enumerate(call.tensors)]


def one_by_one(function: Callable, tensors: list[torch.Tensor], batched: int) -> list[torch.Tensor]:
    results = [function(*(tensor[i] if place < batched else tensor for place, tensor in enumerate(tensors))) for i in range(SAMPLES)]
    return [torch.stack(parts) for parts in zip(*results)]


def same(got, want, context: str = "") -> None:
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert_exact(mine, theirs, f"{context} {i}")


def near(got, want) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, theirs)


def targets(graph: torch.fx.Graph) -> list:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def ours(graph: torch.fx.Graph) -> bool:
    return any("fusewire" in str(target) for target in targets(graph))


def mutates(graph: torch.fx.Graph) -> bool:
    return any(target._schema.is_mutable for target in targets(graph) if isinstance(target, torch._ops.OpOverload))


@every_op
@pytest.mark.parametrize("recording", (True, False), ids=("grad", "no_grad"))
def test_vmap(name, numerics, recording):
    """Over all tensors, over the first alone, and over another dimension than the first: the bits of one call a sample."""
    call = call_of(name, numerics)
    # What PyTorch alone computes on a GPU may sum in another order for another number of samples
    def alike(got, want):
        for mine, theirs in zip(got, want, strict=True):
            assert_within(mine, theirs, 8) if mine.is_cuda and not call.fused else assert_exact(mine, theirs)

    with torch.set_grad_enabled(recording):
        for batched in {1, len(call.tensors)}:
            tensors = samples_of(call, batched)
            want = one_by_one(call.run, tensors, batched)
            dims = [0 if i < batched else None for i in range(len(tensors))]
            alike(torch.vmap(call.run, tuple(dims))(*tensors), want)
            tensors[0], dims[0] = tensors[0].transpose(0, 1).contiguous(), 1
            alike(torch.vmap(call.run, tuple(dims), 1)(*tensors), [part.transpose(0, 1) for part in want])
    call.check_backend()


@every_op
def test_vmap_of_gradients(name, numerics):
    """torch.func.grad of each sample, all at once, in float64: the gradients that autograd finds one by one."""
    call = call_of(name, numerics, torch.float64)
    tensors = samples_of(call, len(call.tensors))

    def loss(*tensors):
        return sum((part.square() * (i + 1)).sum() for i, part in enumerate(call.run(*tensors)))

    def by_autograd(*tensors):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)

    places = tuple(range(len(tensors)))
    near(torch.vmap(torch.func.grad(loss, places))(*tensors), one_by_one(by_autograd, tensors, len(tensors)))


@pytest.mark.parametrize("name", CALLS)
def test_jvp(name):
    """Forward mode against reverse mode, in float64: <grad, J t> is <J^T grad, t>. (Parts of exact are float32, as in the stock calls.)"""
    call = call_of(name, "close", torch.float64)
    directions = [torch.randn_like(tensor) for tensor in call.tensors]
    out, moved = torch.func.jvp(call.run, tuple(call.tensors), tuple(directions))
    grads = [torch.randn_like(part) for part in out]
    leaves = [tensor.clone().requires_grad_() for tensor in call.tensors]
    outputs, their_grads = zip(*((part, grad) for part, grad in zip(call.run(*leaves), grads) if part.requires_grad))
    found = torch.autograd.grad(outputs, leaves, their_grads, materialize_grads=True)
    forwards, backwards = (sum((a * b).sum() for a, b in zip(*pairs)) for pairs in ((grads, moved), (found, directions)))
    assert forwards != 0
    near([forwards], [backwards])


@every_op
def test_batched_gradients(name, numerics):
    """is_grads_batched, which calls the ops of the gradients under vmap, in float64: the same as one gradient after the other."""
    call = call_of(name, numerics, torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in call.tensors]
    out = [part for part in call.run(*leaves) if part.requires_grad]
    grads = [torch.randn(SAMPLES, *part.shape, dtype=part.dtype) for part in out]

    def gradients(*grads, batched=False):
        return torch.autograd.grad(out, leaves, grads, retain_graph=True, materialize_grads=True, is_grads_batched=batched)

    near(gradients(*grads, batched=True), one_by_one(gradients, grads, len(grads)))


@every_op
def test_functionalisation(name, numerics):
    """The same bits, and a graph without mutation that holds the fused op where one serves."""
    call = call_of(name, numerics)
    functional = torch.func.functionalize(call.run)
    want = call.run(*call.tensors)
    same(functional(*call.tensors), want, "functionalised")
    graph = make_fx(functional)(*call.tensors)
    same(graph(*call.tensors), want, "its graph")
    assert ours(graph.graph) is call.fused
    assert not mutates(graph.graph)


@every_op
def test_export(name, numerics):
    """The exported program holds the fused op where one serves, and gives its bits; so does its functional form."""
    call = call_of(name, numerics)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call.run(*tensors)

    want = call.run(*call.tensors)
    exported = torch.export.export(Module(), tuple(call.tensors), strict=False)
    assert ours(exported.graph) is call.fused
    same(exported.module()(*call.tensors), want, "exported")
    other = [torch.randn_like(tensor) for tensor in call.tensors]  # no constant was baked in
    same(exported.module()(*other), call.run(*other), "exported, other values")
    functional = exported.run_decompositions({})
    same(functional.module()(*call.tensors), want, "functional")
    assert not mutates(functional.graph)


@every_op
def test_compile_fullgraph(name, numerics):
    """One graph, with the same bits."""
    call = call_of(name, numerics)
    torch.compiler.reset()  # dynamo counts the compilations of call.run for all ops together
    compiled = torch.compile(call.run, fullgraph=True, backend="eager")
    with torch.no_grad():
        same(compiled(*call.tensors), call.run(*call.tensors))
    call.check_backend()


@every_op
def test_autocast(name, numerics):
    """autocast: the dtypes of the stock calls, and in exact their bits; the gradients of float32 arguments are float32."""
    call = call_of(name, numerics)
    leaves = [tensor.clone().requires_grad_() for tensor in call.tensors]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            got = call.run(*call.tensors)
            with forced("reference"):
                want = call.run(*call.tensors)
        recorded = call.run(*leaves)
    assert [part.dtype for part in got] == [part.dtype for part in want] == [part.dtype for part in recorded]
    if numerics == "exact":
        same(got, want)
    grads = torch.autograd.grad(sum(part.float().sum() for part in recorded), leaves, materialize_grads=True)
    assert all(grad.dtype is torch.float32 for grad in grads) and any(grad.any() for grad in grads)


def test_vmap_of_an_op_that_writes():
    """Into views of a buffer of each sample, which it is not new for; one buffer for all samples is an error that says what to do."""
    q, k = torch.randn(SAMPLES, 2, 5, 2, 32), torch.randn(SAMPLES, 2, 5, 1, 32)
    joint_q, joint_k = torch.ones(SAMPLES, 2, 7, 2, 32), torch.ones(SAMPLES, 2, 7, 1, 32)

    def write(q, k, joint_q, joint_k):
        ops.qk_norm_into(q, k, None, None, joint_q[:, 2:], joint_k[:, 2:])

    version = joint_q._version
    torch.vmap(lambda *tensors: (write(*tensors), tensors[0])[1])(q, k, joint_q, joint_k)
    assert joint_q._version > version and (joint_q[:, :, :2] == 1).all()
    same((joint_q[:, :, 2:], joint_k[:, :, 2:]), one_by_one(lambda *pair: ops.qk_norm_rope(*pair), [q, k], 2))
    with pytest.raises(RuntimeError, match=r"fusewire.qk_norm_into\w*.default under vmap: q_out is one tensor for all samples; it should be batched"):
        torch.vmap(lambda q, k: (write(q, k, joint_q[0], joint_k[0]), q)[1])(q, k)
    with pytest.raises(ValueError, match=r"fusewire.rms_norm\w*.default is under a vmap over no samples"):
        torch.vmap(lambda x: ops.rms_norm(x, numerics="close"))(torch.ones(0, 2, 8))


def test_functionalisation_of_an_op_that_writes():
    """The caller's tensors change as they do without, by functionalize and by the exported program."""
    q, k = torch.randn(2, 5, 2, 32), torch.randn(2, 5, 1, 32)
    want = ops.qk_norm_rope(q, k)

    class Module(torch.nn.Module):
        def forward(self, q, k, q_out, k_out):
            ops.qk_norm_into(q, k, None, None, q_out, k_out)
            return q_out + 1

    exported = torch.export.export(Module(), (q, k, *map(torch.zeros_like, want)), strict=False)
    for module in (torch.func.functionalize(Module()), exported.module(), exported.run_decompositions({}).module()):
        out = [torch.zeros_like(part) for part in want]
        assert_exact(module(q, k, *out), want[0] + 1)
        same(out, want)


@pytest.mark.skipif(bool(triton_rows.MISSING) or torch.get_default_device().type == "cpu" and not triton_rows.INTERPRETED, reason="no Triton here")
@pytest.mark.parametrize("recording", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("name", ("gate_residual", "rms_norm", "qk_norm_rope", "qk_norm_into"))
def test_vmap_of_a_launched_kernel(name, recording):
    """Where nothing records a graph a kernel is launched without its registered op: not on tensors that vmap has batched."""
    call = call_of(name, "close")
    tensors = samples_of(call, len(call.tensors))
    with forced("triton"), torch.set_grad_enabled(recording):
        same(torch.vmap(call.run)(*tensors), one_by_one(call.run, tensors, len(tensors)))
    op = name.replace("into", "rope")
    assert ops.stats()[op]["triton"] > 0 and ops.stats()[op]["reference"] == 0
