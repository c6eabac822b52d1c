"""The gradients of ``close``: against float64, by the kernels that should run, in every layout; the epilogue's backward op by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU, cpu_isa
from fusewire.kernels.linear import gradients as tables
from fusewire.kernels.linear import native, reference
from tests.effort import examples
from tests.kernels.isa_levels import run_at
from tests.kernels.linear.served import BELOW_AVX2, FLOAT64, close, linear
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

pytestmark = BELOW_AVX2
needs_native = pytest.mark.skipif(not CPU.loaded or cpu_isa() == "base", reason="the compiled library does not serve linear here")
FAST = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FAST, torch.float64]
ACTIVATIONS = ["gelu_tanh", "gelu", "silu"]
NAMES = ("x", "weight", "bias", "gate", "residual")
BACKWARD = torch.ops.fusewire.bias_activation_backward
BIAS_ACTIVATION, BIAS_ACTIVATION_BACKWARD = tables.bias_activation, tables._bias_activation_backward  # as dispatched, and counted


def inputs(batch: int, tokens: int, k: int, n: int, dtype=torch.float32, gate: tuple | None = None, bias: bool = True) -> dict:
    """A layer's tensors and the gradient of its output; ``gate``: its shape, and a residual with it."""
    v = {"x": torch.randn(batch, tokens, k), "weight": torch.randn(n, k) / k**0.5, "bias": torch.randn(n) if bias else None,
         "gate": None if gate is None else torch.randn(gate), "residual": None if gate is None else torch.randn(batch, tokens, n),
         "grad": torch.randn(batch, tokens, n)}
    return {name: t if t is None else t.to(dtype) for name, t in v.items()}


def gradients(v: dict, activation: str | None = None, call=None, names=NAMES, numerics: str = "close", create_graph=False,
              dispatched: bool = False) -> dict:
    """``call``: stock code in the place of the op. ``dispatched``: by what the dispatcher prefers, not by the library wherever it can."""
    these = {k: t if t is None else t.detach().requires_grad_(k in names) for k, t in v.items() if k != "grad"}
    rest = {"gate": these["gate"], "residual": these["residual"]}
    if call is None:
        out = (ops.linear if dispatched else linear)(these["x"], these["weight"], these["bias"], activation=activation, **rest, numerics=numerics)
    else:
        out = call(these["x"], these["weight"], these["bias"], activation or "none", **rest, exact=True)
    names = [k for k in names if v[k] is not None]
    return dict(zip(names, torch.autograd.grad(out, [these[k] for k in names], v["grad"], create_graph=create_graph)))


def check(v: dict, activation: str | None = None, context: str = "", dispatched: bool = False) -> None:
    """Every gradient keeps the rule of close; sums over few elements, where its statistics say little, are within 4 units."""
    got, plain = gradients(v, activation, dispatched=dispatched), gradients(v, activation, reference.linear)
    for name, want in gradients({k: t if t is None else t.double() for k, t in v.items()}, activation, reference.linear).items():
        if want.numel() >= 1000:
            assert_close(got[name], want, plain[name], f"{context} {name}")
        else:
            assert_within(got[name], want, 4, f"{context} {name}")


def served() -> tuple[int, int]:
    counts = ops.stats()["bias_activation_backward"]
    return counts["cpu"], counts["reference"]


@pytest.mark.skipif(cpu_isa() != "amx", reason="elsewhere PyTorch's products are faster")
@pytest.mark.parametrize("dtype, ours", ((torch.float32, 2), (torch.float16, 2), (torch.bfloat16, 1)), ids=str)
def test_silent_off(dtype, ours, monkeypatch):
    """silent-off: which of dx and dweight are our products."""
    calls, product = [], native._ours
    v = inputs(2, 300, 200, 256, dtype)
    monkeypatch.setattr(native, "_ours", lambda x, weight: calls.append(1) or product(x, weight))
    native.products_backward(v["grad"], v["x"], v["weight"], True, True)
    assert len(calls) == ours


@FLOAT64
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("shape", ((2, 77, 40, 65), (1, 300, 200, 256), (3, 50, 193, 300)), ids=str)
@pytest.mark.parametrize("activation", (None, *ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, activation, shape, bias):
    """tail, silent-off: with each activation; the second shape is large enough for every product of ours."""
    expected = 0
    for dispatched in (True, False):
        check(inputs(*shape, dtype, bias=bias), activation, dispatched=dispatched)
        expected += activation is not None and serves(inputs(*shape, dtype), None if dispatched else "cpu")
        assert served() == ((expected, 0) if CPU.loaded else (0, expected))  # without the library oneDNN serves bfloat16 forwards alone


def serves(v: dict, backend: str | None) -> bool:
    """Whether the library takes a layer of these tensors."""
    with forced(backend):
        return not native.why_not_cpu(v["x"], v["weight"], v["bias"], "gelu_tanh", None, None, False)


@FLOAT64
@pytest.mark.parametrize("gate", ((2, 80), (2, 1, 80), (2, 77, 80), (80,), (1, 77, 80)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_residual(dtype, gate):
    """Where ``gate_residual`` takes the gate its own gradients serve; the reference is recomputed for other shapes."""
    for dispatched in (True, False):
        check(inputs(2, 77, 96, 80, dtype, gate), dispatched=dispatched)


@FLOAT64
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_alone(dtype):
    v = inputs(2, 77, 96, 80, dtype, (80,)) | {"gate": None}
    for dispatched in (True, False):
        check(v, dispatched=dispatched)


@needs_native
@pytest.mark.parametrize("names", (("x",), ("weight",), ("bias",), ("x", "bias")), ids=str)
@pytest.mark.parametrize("activation", (None, "gelu_tanh"))
def test_some_gradients(activation, names):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(2, 77, 96, 256)
    want = gradients(v, activation)
    for name, got in gradients(v, activation, names=names).items():
        assert_exact(got, want[name], name)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input_and_strided_grad(dtype, layout):
    """strided-input, strided-grad, misaligned: the epilogue's backward gives the same bits for any layout of its arguments."""
    grad, y = torch.randn(2, 37, 40).to(dtype), torch.randn(2, 37, 40).to(dtype)
    grad[1], y[1], bias = grad[0], y[0], torch.randn(40).to(dtype)
    for activation in ACTIVATIONS:
        want = BACKWARD(grad, y, bias, activation, True)
        for laid in ((layout(grad), y, bias), (grad, layout(y), bias), (grad, y, layout(bias))):
            for got, other in zip(BACKWARD(*laid, activation, True), want):
                assert_exact(got, other, activation)


@needs_native
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_strided_input_of_transposed_products(dtype):
    """strided-input, tail: operands whose rows lie side by side, read in squares of 32, give the bits of contiguous ones; whole squares and parts of them."""
    x, weight = torch.randn(100, 150).to(dtype), torch.randn(70, 150).to(dtype)

    def product(x, weight):
        return torch.ops.fusewire.linear(x, weight, None, "none", None, None, False)

    want = product(x, weight)
    x, weight = (t.t().contiguous().t() for t in (x, weight))
    for got in (product(x, weight), product(x, weight.contiguous()), product(x.contiguous(), weight)):
        assert_exact(got, want)


@needs_native
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_strided_grad(dtype):
    """strided-grad: `.sum()`, whose gradient has stride 0 everywhere, and a transposed one. Where the dispatcher prefers PyTorch's product, the
    gradients are PyTorch's own bit for bit, whose last bits a layout may change."""
    v = inputs(2, 60, 96, 200, dtype)
    for grad in (torch.ones(()).to(dtype).expand(2, 60, 200), torch.randn(200, 60, 2).to(dtype).permute(2, 1, 0)):
        strided, packed = {**v, "grad": grad}, {**v, "grad": grad.contiguous()}
        with forced("cpu"):
            same(gradients(strided, "silu"), gradients(packed, "silu"))
        before = ops.stats()["linear"]["reference"]
        found = gradients(strided, "silu", dispatched=True)
        by_reference = ops.stats()["linear"]["reference"] == before + 1
        same(found, gradients(strided, "silu", reference.linear) if by_reference else gradients(packed, "silu", dispatched=True))


def same(found: dict, want: dict) -> None:
    for name in want:
        assert_exact(found[name], want[name], name)


@needs_native
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_batch_coupling(dtype):
    """batch-coupling: dx of a sample alone is that among 4."""
    v = inputs(4, 64, 96, 256, dtype)
    alone = gradients({k: t if k in ("weight", "bias", "gate", "residual") else t[2:3] for k, t in v.items()}, "gelu_tanh")["x"]
    if dtype is torch.bfloat16:  # PyTorch's product
        return assert_within(alone, gradients(v, "gelu_tanh")["x"][2:3], 1)
    assert_exact(alone, gradients(v, "gelu_tanh")["x"][2:3])


@needs_native
def test_nondeterminism():
    """nondeterminism: 20 repeats and any number of threads give the same bits, the bias's gradient included."""
    grad, y, bias = torch.randn(300, 300), torch.randn(300, 300), torch.randn(300)
    want, threads = BACKWARD(grad, y, bias, "gelu_tanh", True), torch.get_num_threads()
    try:
        for n in (*[threads] * 20, 1, 2, 5):
            torch.set_num_threads(n)
            assert all(map(torch.equal, BACKWARD(grad, y, bias, "gelu_tanh", True), want)), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.on_reference(reason="what is empty is left to PyTorch")
@pytest.mark.parametrize("shape", ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)), ids=str)
@pytest.mark.parametrize("activation", (None, *ACTIVATIONS))
def test_empty(activation, shape):
    """empty: a zero in each dimension."""
    v = inputs(*shape)
    for name, grad in gradients(v, activation).items():
        assert grad.shape == v[name].shape and grad.isfinite().all()


LAYOUT = st.sampled_from(LAYOUTS)


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 90), st.integers(1, 150), st.sampled_from(DTYPES), st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from((1.0, 30.0)),
       st.tuples(LAYOUT, LAYOUT, LAYOUT), st.integers(0, 2**31))
def test_epilogue_property(rows, width, dtype, activation, bias, spread, layouts, seed):
    """tail, cancellation: the kernel, forwards and backwards, is autograd of the formula in float64, far out in both tails too, with the same bits in
    any layout."""
    torch.manual_seed(seed)
    y, grad = (spread * torch.randn(rows, width)).to(dtype), (2 * torch.rand(rows, width) - 1).to(dtype)
    b = torch.randn(width).to(dtype) if bias else None
    leaves = [t.double().requires_grad_() for t in (y, b) if t is not None]
    out = reference.ACTIVATIONS[activation](sum(leaves))
    want = out.detach(), *torch.autograd.grad(out, leaves, grad.double())

    def found(y, grad, b):
        return BIAS_ACTIVATION(y, b, activation), *BIAS_ACTIVATION_BACKWARD(grad, y, b, activation, bias)[:len(leaves)]

    got = found(y, grad, b)
    for name, mine, theirs in zip(("out", "y", "bias"), got, want):
        units = 4 if dtype is torch.float32 else 1  # 16 bits are rounded once
        assert_within(mine, theirs, units, name, terms=want[1] if name == "bias" else None)
    for mine, again in zip(got, found(*(t if t is None else layout(t) for layout, t in zip(layouts, (y, grad, b))))):
        assert_exact(again, mine, " ".join(layout.__name__ for layout in layouts))


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slopes(dtype, activation):
    """cancellation: every slope keeps the rule of close where the logistic function is almost 1 too, on each side apart."""
    for low, high in ((-12, 0), (0, 3), (3, 12)):
        y = torch.linspace(low, high, 20001).to(dtype)[None]
        plain, want = (gradient_of(activation, t) for t in (y, y.double()))
        assert_close(BACKWARD(torch.ones_like(y), y, None, activation, False)[0], want, plain, f"{low} to {high}")


def gradient_of(activation, y):
    y = y.detach().requires_grad_()
    return torch.autograd.grad(reference.ACTIVATIONS[activation](y).sum(), y)[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FAST, ids=str)
def test_far_tails(dtype, activation):
    """fp16-overflow: values to the ends of the dtype give finite slopes: 0 to the left, 1 to the right."""
    y = torch.tensor([-6e4, -1e3, -88.0, -20.0, 0.0, 20.0, 88.0, 1e3, 6e4]).to(dtype)[None]
    slope, _ = BACKWARD(torch.ones_like(y), y, None, activation, False)
    assert_within(slope, torch.tensor([0.0, 0, 0, 0, 0.5, 1, 1, 1, 1], dtype=torch.float64)[None], 1)


@pytest.mark.on_reference
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("activation", (None, *ACTIVATIONS))
def test_exact_keeps_the_gradients_of_stock(activation, dtype):
    """exact: bit for bit, by no kernel, also where one would be faster."""
    v = inputs(2, 60, 256, 320, dtype)
    want = gradients(v, activation, reference.linear)
    for name, got in gradients(v, activation, numerics="exact").items():
        assert_exact(got, want[name], name)
    assert served() == (0, 0)


@needs_native
@pytest.mark.parametrize("activation, gate", (("none", None), ("gelu_tanh", None), ("silu", None), ("none", (2, 1, 65))), ids=str)
def test_gradients_of_the_registered_op(activation, gate):
    """What a graph recorded, each epilogue in one op, has the gradients of the formula."""
    v = inputs(2, 40, 33, 65, gate=gate)
    found = []
    for convert in (torch.Tensor.float, torch.Tensor.double):
        these = {k: t if t is None else convert(t.detach()).requires_grad_() for k, t in v.items() if k != "grad"}
        call = torch.ops.fusewire.linear if convert is torch.Tensor.float else reference.linear
        out = call(these["x"], these["weight"], these["bias"], activation, these["gate"], these["residual"], False)
        found.append(torch.autograd.grad(out, [t for t in these.values() if t is not None], convert(v["grad"])))
    for got, want in zip(*found, strict=True):
        assert_within(got, want, 16)


@needs_native
@pytest.mark.parametrize("activation", (None, *ACTIVATIONS))
def test_second_derivatives(activation):
    """create_graph recomputes the reference: its first derivatives are float64's, its second too."""
    v = inputs(1, 50, 40, 200)
    leaves = [v[k].requires_grad_() for k in ("x", "weight", "bias")]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out = close(*leaves, activation=activation), reference.linear(*wide, activation or "none", None, None, True)
    first = [torch.autograd.grad((o * v["grad"]).sum(), these, create_graph=True) for o, these in zip(out, (leaves, wide))]
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), these[:2]) for grads, these in zip(first, (leaves, wide))]
    for got, want in zip(second[0], second[1]):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert served() == (0, 0)


@needs_native
@pytest.mark.parametrize("activation", (None, "silu"))
def test_a_single_row(activation):
    """x [K]: the gradients are those of x [1, K], without its first dimension."""
    tensors = torch.randn(40), torch.randn(24, 40), torch.randn(24)
    found = []
    for x in (tensors[0], tensors[0][None]):
        leaves = [t.clone().requires_grad_() for t in (x, *tensors[1:])]
        with forced("cpu"):
            found.append(torch.autograd.grad(ops.linear(*leaves, activation=activation, numerics="close").square().sum(), leaves))
    assert_exact(found[0][0], found[1][0][0])
    for got, want in zip(found[0][1:], found[1][1:], strict=True):
        assert_exact(got, want)


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("bias", (True, False))
def test_fake_mismatch(bias, permuted):
    """fake-mismatch: opcheck of the ops that training runs; kernel and reference mean the same."""
    grad, y = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    grad, y = (t.transpose(0, 2).contiguous().transpose(0, 2) if permuted else t for t in (grad, y))
    b = torch.randn(8, dtype=torch.float64) if bias else None
    opcheck(BACKWARD.default, (grad, y, b, "gelu_tanh", bias))
    opcheck(torch.ops.fusewire.bias_activation.default, (y, b, "silu"))
    for got, want in zip(BACKWARD(grad, y, b, "gelu_tanh", bias), reference.bias_activation_backward(grad, y, b, "gelu_tanh", bias), strict=True):
        assert got.shape == want.shape and got.stride() == want.stride()
        assert_within(got, want, 1)
    if cpu_isa() not in ("", "base"):
        x, weight = torch.randn(2, 5, 4), torch.randn(8, 4)
        x, weight = (t.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() if permuted else t.requires_grad_() for t in (x, weight))
        opcheck(torch.ops.fusewire.linear_activated.default, (x, weight, b if b is None else b.float(), "silu"))


@pytest.mark.on_reference(when=lambda backend: backend is None and cpu_isa() != "amx", reason="as dispatched, float32 may be PyTorch's product")
@needs_native
@pytest.mark.parametrize("backend", (None, "cpu"))
def test_compiled_training_step(backend):
    """A feed-forward's training step compiles without a graph break, and gives the same gradients."""
    def step(x, w, b, w2, gate, residual):
        hidden = ops.linear(x, w, b, activation="gelu_tanh", numerics="close")
        return ops.linear(hidden, w2, None, gate=gate, residual=residual, numerics="close").square().sum()

    given = inputs(2, 50, 96, 256), inputs(2, 50, 256, 96, gate=(2, 1, 96))
    leaves = [t.requires_grad_() for t in (given[0]["x"], given[0]["weight"], given[0]["bias"], given[1]["weight"], given[1]["gate"], given[1]["residual"])]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with forced(backend):
        for got, want in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, step)), strict=True):
            assert_exact(got, want)


@pytest.mark.parametrize("level", ("avx2", "avx512"))
@needs_native
def test_every_isa_level(level):
    run_at(level, __file__, "(test_gradients and (300 or 50)) or test_epilogue_property or test_far_tails")


@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_result_may_be_changed_in_place(activation, dtype):
    """As PyTorch's activations allow: their gradients are of what went in."""
    v = inputs(2, 40, 16, 24, dtype)
    found = []
    for change in (lambda y: y + 1, lambda y: y.add_(1)):
        leaves = [v[name].clone().requires_grad_() for name in NAMES[:3]]
        y = change(ops.linear(*leaves, activation=activation, numerics="close"))
        found.append(torch.autograd.grad(y, leaves, v["grad"]))
    for got, want in zip(*found):
        assert_exact(got, want)


@pytest.mark.parametrize("dtype", FAST, ids=str)
@needs_native
@pytest.mark.parametrize("gate", [torch.tensor(2.0), torch.full((1,), 2.0), torch.full((1, 1, 1), 2.0)], ids=lambda gate: str(list(gate.shape)))
def test_one_gate_for_everything(gate, dtype):
    v, gate = inputs(2, 5, 8, 6, dtype, gate=(2, 6)), gate.to(dtype)
    exact = ops.linear(v["x"], v["weight"], v["bias"], gate=gate, residual=v["residual"])
    with forced("cpu"):
        got = ops.linear(v["x"], v["weight"], v["bias"], gate=gate, residual=v["residual"], numerics="close")
    want = v["residual"].double() + 2 * torch.nn.functional.linear(v["x"].double(), v["weight"].double(), v["bias"].double())
    assert_close(got, want, exact)
