"""The fused backward of ``close``, its promises: any layout, batch and number of threads give the same bits; what is registered tells the truth."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fusewire.kernels.adaln import reference
from fusewire.kernels.library import CPU
from tests.kernels.adaln.cases import DTYPES, NAMES, call, far_apart, gradients, inputs, op_name, repeated, served, stock, upstream, used, with_affine
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
KINDS = ("chunk", "one", "token")
OP = torch.ops.fusewire
ALL = 511  # the bits of all gradients of any op


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, layout):
    """strided-input, misaligned: the same values in any layout give the same bits, one argument at a time."""
    for kind in ("chunk", "token"):
        v = repeated(dtype, kind)
        for name in NAMES:
            grads = upstream(v, name)
            want = gradients(call, name, v, grads, numerics="close")
            for argument in used(name):
                got = gradients(call, name, {**v, argument: layout(v[argument])}, grads, numerics="close")
                for other in want:
                    assert_exact(got[other], want[other], f"{name}: {other} where {argument} is {layout.__name__}")
    v = with_affine(v)
    want = gradients(call, "adaln_modulate", v, numerics="close")
    got = gradients(call, "adaln_modulate", {**v, "weight": layout(v["weight"]), "bias": layout(v["bias"])}, numerics="close")
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("kind", ("chunk", "token"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_grad(dtype, kind):
    """strided-grad: expanded (`.sum()`), transposed, stepping and offset grad_out give the gradients of the same values laid out contiguously."""
    v = inputs(2, 19, 24, dtype, kind)
    for name in NAMES:
        for grad in (torch.ones(()).expand(2, 19, 24), torch.randn(24, 19, 2).permute(2, 1, 0), torch.randn(2, 19, 48)[..., ::2],
                     torch.randn(2 * 19 * 24 + 1)[1:].view(2, 19, 24)):
            grads = [grad.to(dtype)] * len(call(name, v))
            want = gradients(call, name, v, [g.contiguous() for g in grads], numerics="close")
            for argument, got in gradients(call, name, v, grads, numerics="close").items():
                assert_exact(got, want[argument], f"{name} {argument}")


@needs_library
def test_int32_stride():
    """int32-stride: three tokens 2^30 elements apart, in the gradient and in each argument."""
    far, v = far_apart()
    for name in NAMES:
        grads = [v["x"]] * len(call(name, v))
        want = gradients(call, name, v, grads, numerics="close")
        for argument in used(name):
            far.copy_(v[argument])
            got = gradients(call, name, {**v, argument: far}, grads, numerics="close")
            assert all(torch.equal(got[k], want[k]) for k in want), f"{name} {argument}"
        far.copy_(v["x"])
        got = gradients(call, name, v, [far] * len(grads), numerics="close")
        assert all(torch.equal(got[k], want[k]) for k in want), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype, kind):
    """batch-coupling: a sample alone has the gradients that it has in a batch of 8."""
    v = inputs(8, 37, 130, dtype, kind)
    for name in NAMES:
        grads = upstream(v, name)
        whole = gradients(call, name, v, grads, numerics="close")
        alone = gradients(call, name, {k: t[5:6] for k, t in v.items()}, [grad[5:6] for grad in grads], numerics="close")
        for argument in used(name):
            assert_exact(alone[argument], whole[argument][5:6], f"{name} {argument}")


@pytest.mark.parametrize("kind", ("chunk", "token"))
def test_nondeterminism(kind):
    """nondeterminism: 20 repeats and any number of threads give the same bits, the sums over tokens and samples included."""
    v, threads = with_affine(inputs(2, 150, 300, kind=kind)), torch.get_num_threads()
    for name in NAMES:
        these = v if name in ("adaln_modulate", "gate_residual_adaln", "two_gates") else {k: t for k, t in v.items() if k not in ("weight", "bias")}
        grads = upstream(v, name)
        want = gradients(call, name, these, grads, numerics="close")
        try:
            for n in (*[threads] * 20, 1, 2, 5):
                torch.set_num_threads(n)
                got = gradients(call, name, these, grads, numerics="close")
                assert all(torch.equal(got[k], want[k]) for k in want), n
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 3, 0)), ids=str)
def test_empty(shape, kind):
    """empty: a zero in each dimension; sums over no tokens are zero."""
    v = with_affine(inputs(*shape, kind=kind))
    for name in NAMES:
        these = v if name in ("adaln_modulate", "two_gates") else {k: t for k, t in v.items() if k not in ("weight", "bias")}
        for argument, grad in gradients(call, name, these, numerics="close").items():
            assert grad.shape == v[argument].shape and not grad.any(), f"{name} {argument}"


def test_alias():
    """alias: inputs and grad_out keep their bits; gradients share no storage with an input, an output or each other."""
    v = inputs(2, 5, 32)
    for name in NAMES:
        before, grads = {k: t.clone() for k, t in v.items()}, upstream(v, name)
        kept = [grad.clone() for grad in grads]
        found = [*gradients(call, name, v, grads, numerics="close").values()]
        places = [t.untyped_storage().data_ptr() for t in (*found, *(v[k] for k in ("x", "y", "y2", "gate")))]
        assert len(set(places)) == len(places)
        assert all(torch.equal(v[k], before[k]) for k in v) and all(map(torch.equal, grads, kept))


def backward_calls(v: dict, wanted: int):
    """(op, its reference, arguments) of every backward op."""
    grad, grad2 = v["y2"].detach().clone(), v["y"].detach().clone()
    norm = (1e-6, False, wanted)
    both = (v["x"], v["y"], v["gate"])
    modulation = (v["shift"], v["scale"])
    return [
        (OP.adaln_modulate_backward, reference.adaln_modulate_backward, (grad, v["x"], *modulation, None, None, *norm)),
        (OP.adaln_modulate_backward, reference.adaln_modulate_backward, (grad, v["x"], *modulation, v["weight"], v["bias"], 1e-6, True, wanted)),
        (OP.adaln_modulate_dual_backward, reference.adaln_modulate_dual_backward, (grad, grad2, v["x"], *modulation, v["shift2"], v["scale2"], None, None, *norm)),
        (OP.adaln_modulate_dual_backward, reference.adaln_modulate_dual_backward,
         (grad, grad2, v["x"], *modulation, v["shift2"], v["scale2"], v["weight"], v["bias"], 1e-6, True, wanted)),
        (OP.gate_residual_backward, reference.gate_residual_backward, (grad, v["y"], v["gate"], wanted)),
        (OP.gate_residual_adaln_backward, reference.gate_residual_adaln_backward, (grad, grad2, *both, None, None, *modulation, v["weight"], None, *norm)),
        (OP.gate_residual_adaln_backward, reference.gate_residual_adaln_backward,
         (grad, grad2, *both, v["y2"], v["gate2"], *modulation, v["weight"], v["bias"], *norm)),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("wanted", (ALL, *(pytest.param(some, marks=pytest.mark.slow) for some in (0b1010, 0b0101))))
def test_fake_mismatch(wanted, permuted, kind):
    """fake-mismatch: opcheck of every backward op, on contiguous and on permuted-dense inputs; kernel and reference mean the same."""
    v = with_affine(inputs(2, 3, 8, torch.float64, kind))
    v = {k: t.transpose(0, -1).contiguous().transpose(0, -1) if permuted else t.contiguous() for k, t in v.items()}
    for op, meaning, arguments in backward_calls(v, wanted):
        opcheck(op.default, arguments)
        for got, want in zip(op(*arguments), meaning(*arguments), strict=True):
            assert got.shape == want.shape and got.stride() == want.stride()
            assert_within(got, want, 1)


@pytest.mark.parametrize("kind", ("chunk", pytest.param("token", marks=pytest.mark.slow)))
@needs_library
def test_compiled_training_step(kind):
    """A training step of every op compiles without a graph break, and gives the same gradients."""
    def step(v):
        return sum(out.square().sum() for name in NAMES for out in call(name, v, numerics="close"))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9):
        v = {k: t.detach().requires_grad_() for k, t in inputs(2, tokens, 32, kind=kind).items()}
        for got, want in zip(*(torch.autograd.grad(f(v), list(v.values())) for f in (compiled, step)), strict=True):
            assert_exact(got, want)


@pytest.mark.on_reference(reason="its dtypes are mixed")
@pytest.mark.parametrize("autocast", (False, True))
def test_autocast(autocast):
    """autocast, silent-off: mixed dtypes leave the kernel to the recomputed reference, and each gradient has its argument's dtype."""
    v = {k: t if k in ("x", "y", "y2") else t.bfloat16() for k, t in inputs(2, 5, 16).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name in NAMES:
            assert all(grad.dtype is v[k].dtype for k, grad in gradients(call, name, v, numerics="close").items())
            assert served(f"{op_name(name)}_backward") == (0, 0)


def test_exact_keeps_the_gradients_of_stock():
    """exact: bit for bit those of eager PyTorch, by no kernel."""
    v = inputs(2, 5, 33, torch.bfloat16)
    for name in NAMES:
        grads = upstream(v, name)
        want = gradients(stock, name, v, grads)
        for argument, got in gradients(call, name, v, grads, numerics="exact").items():
            assert_exact(got, want[argument], argument)
        assert served(f"{op_name(name)}_backward") == (0, 0)
