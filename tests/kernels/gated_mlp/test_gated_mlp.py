"""The gated activations against stock code: bit for bit in ``exact``, against float64 in ``close``, forward and backward, on the right backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.gated_mlp import reference
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.gated_mlp.cases import DTYPES, KINDS, call, inputs, leaves, served, stock, wide
from tests.kernels.isa_levels import run_at
from tests.kernels.on_reference import EXACT
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
# Odd first. Around one vector and several of every dtype; a real width (SDXL's inner blocks)
WIDTHS = (1, 3, 7, 17, 31, 63, 65, 130, 300, 2560)


@pytest.mark.on_reference
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind, dtype, width):
    """silent-off: exact is stock's chain, counted on the reference, with the reason in ``ops.backends``."""
    v = inputs(5, width, dtype, kind)
    got = call(kind, v)
    assert_exact(got, stock(kind, v))
    assert got.is_contiguous() and served(kind) == (0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", (2, 7, 65, 300, 2560))
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_close(kind, dtype, bias, width, backend):
    """tail, silent-off: within the rule on every backend; 38 rows leave remainders of the kernel's blocks of 16."""
    v = inputs(19, width, dtype, kind, bias)
    with forced(backend):
        assert_close(call(kind, v, numerics="close"), stock(kind, wide(v)), stock(kind, v))
    assert served(kind) == ((1, 0) if backend == "cpu" else (0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", (29, 33, 130, 300))
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@needs_library
def test_close_gradients(kind, dtype, bias, width, backend):
    """tail, silent-off: every gradient comes from the backward kernel and keeps the rule; 70 rows are five groups, one cut short."""
    v, grad, found = inputs(35, width, dtype, kind, bias), None, []
    for form, function in ((v, lambda v: call(kind, v, numerics="close")), (v, lambda v: stock(kind, v)), (wide(v), lambda v: stock(kind, v))):
        these, wanted = leaves(form)
        out = function(these)
        grad = torch.randn_like(out) if grad is None else grad
        with forced(backend):
            found.append(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
    names = [name for name, t in v.items() if t is not None]
    for name, got, plain, want in zip(names, *found, strict=True):
        assert_close(got, want, plain, name)
    assert served(kind, "_backward") == ((1, 0) if backend == "cpu" else (0, 1))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 500), st.sampled_from(DTYPES), st.booleans(), st.floats(1e-3, 30), st.integers(0, 2**31))
def test_property(kind, batch, rows, width, dtype, bias, spread, seed):
    """Any shape, options and scale: exact equals stock; close has the same bits in another layout, and lies within a few units of float64."""
    torch.manual_seed(seed)
    v = inputs(rows, width, dtype, kind, bias, batch, spread)
    assert_exact(call(kind, v), stock(kind, v))
    got, want = call(kind, v, numerics="close"), stock(kind, wide(v))
    turned = {name: None if t is None else t.movedim(-1, 0).contiguous().movedim(0, -1) for name, t in v.items()}
    assert_exact(call(kind, turned, numerics="close"), got)
    info, largest = torch.finfo(dtype), 2 * max(t.double().abs().max() for t in v.values() if t is not None)
    # Stock's 1 + erf of a closed gate is off by a unit of 1: what is left of hidden * gate is, by as many units of that product
    assert ((got - want).abs() <= info.eps * (8 * want.abs() + largest**2 + info.smallest_normal)).all()


LAYOUT = st.sampled_from(LAYOUTS)


def close(kind, v):
    return call(kind, v, numerics="close")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 200), st.sampled_from(DTYPES), st.booleans(), st.floats(1e-3, 30),
       st.tuples(LAYOUT, LAYOUT, LAYOUT, LAYOUT), st.integers(0, 2**31))
@needs_library
def test_gradients_property(kind, batch, rows, width, dtype, bias, spread, layouts, seed):
    """Any shape, options and scale: every gradient by the kernel lies within a few units of float64's, with the same bits in any layout."""
    torch.manual_seed(seed)
    v, found = inputs(rows, width, dtype, kind, bias, batch, spread), []
    # Errors go with the products of gradient and hidden, none of which is above 1 here. In 16 bits there is one rounding.
    largest = 2 * max(1, *(t.abs().max().item() for t in v.values() if t is not None))
    grad = torch.randn(batch, rows, width)
    grad = (grad / (grad.abs().max() * largest)).to(dtype)
    laid = {name: None if t is None else layout(t) for layout, (name, t) in zip(layouts, v.items())}
    for form, upstream, function in ((v, grad, close), (laid, layouts[3](grad), close), (v, grad, stock), (wide(v), grad.double(), stock)):
        these, wanted = leaves(form)
        found.append(torch.autograd.grad(function(kind, these), wanted, upstream))
    for name, got, again, plain, want in zip([name for name, t in v.items() if t is not None], *found, strict=True):
        assert_within(got, want, 4 if dtype is torch.float32 else 1, name, plain)
        assert_exact(again, got, f"{name} {' '.join(layout.__name__ for layout in layouts)}")
    assert served(kind, "_backward")[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_whole_range(dtype):
    """Every region of the activations, from where e^-x leaves float to where it vanishes, values and slopes: no jump, no NaN."""
    x = torch.cat([torch.linspace(-100, 100, 20001), torch.linspace(-1e-3, 1e-3, 2001), torch.tensor([0.0, -0.0, 1e4, -1e4, 6e4, -6e4])]).to(dtype)
    v = {"x": torch.ones_like(x), "gate": x, "bias": None}
    for kind in ("geglu-apart", "swiglu-apart", "quick_gelu"):
        form = {"x": x, "gate": None, "bias": None} if kind == "quick_gelu" else v
        found = []
        for these, function in ((form, lambda u: call(kind, u, numerics="close")), (form, lambda u: stock(kind, u)), (wide(form), lambda u: stock(kind, u))):
            these, wanted = leaves(these)
            out = function(these)
            found.append((out.detach(), *torch.autograd.grad(out.sum(), wanted)))
        for got, plain, want in zip(*found, strict=True):
            assert_close(got, want, plain, kind)


@pytest.mark.parametrize("kind", KINDS)
@needs_library
def test_left_tail_keeps_its_digits(kind):
    """Where the gate closes, stock's 1 + erf(x) has lost every digit; ours keeps 5 in float32."""
    x = torch.linspace(-10, -3, 1001)
    v = {"x": torch.ones_like(x), "gate": x, "bias": None} if KINDS[kind][2] else {"x": x if kind == "quick_gelu" else torch.stack(
        (x, torch.ones_like(x)) if kind == "swiglu-first" else (torch.ones_like(x), x), 0).flatten(), "gate": None, "bias": None}
    got, x = call(kind, v, numerics="close").double(), x.double()
    want = 0.5 * x * torch.erfc(-x / 2**0.5) if kind.startswith("geglu") else x * torch.sigmoid((1.702 if kind == "quick_gelu" else 1) * x)
    assert ((got - want) / want).abs().max() <= 1e-5


@EXACT
@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("kind", KINDS)
def test_fp16_overflow(kind, numerics):
    """fp16-overflow: gates of +-1000, whose squares and exponentials do not fit fp16; forward and backward."""
    v = inputs(5, 640, torch.float16, kind)
    v = {name: None if t is None else torch.where(t > 0.5, 1000.0, -1000.0).half() for name, t in v.items()}
    if KINDS[kind][2] is not None:  # the product of hidden and gate should fit
        v["bias"] = None
        half = v["x"] if v["gate"] is not None else v["x"][..., 640:] if kind == "swiglu-first" else v["x"][..., :640]
        half.fill_(3.0)
    these, wanted = leaves(v)
    out = call(kind, these, numerics=numerics)
    assert torch.isfinite(out).all() and out.abs().max() >= 1000
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.float().mean(), wanted))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_reference_of_close_rounds_once(dtype):
    x, bias = torch.randn(6, 80).to(dtype), torch.randn(80).to(dtype)
    for name, rest in (("geglu", ()), ("swiglu", (True,))):
        function = getattr(reference, name)
        assert_exact(function(x, None, bias, *rest, False), function(x.float(), None, bias.float(), *rest, True).to(dtype), name)
    for b in (None, bias):
        assert_exact(reference.quick_gelu(x, b, False), reference.quick_gelu(x.float(), None if b is None else b.float(), True).to(dtype))


@pytest.mark.parametrize("kind", ("geglu", "swiglu", "quick_gelu"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_biased_cast(dtype, kind):
    """biased-cast: over 2^20 elements the mean signed error is within 0.02 units in the last place; that of the gradient too."""
    v = inputs(1024, 512, dtype, kind, spread=1)
    (ours, wanted), (double, wanted_double) = leaves(v), leaves(wide(v))
    got, want = call(kind, ours, numerics="close"), stock(kind, double)
    assert_unbiased(got, want, kind)
    grad = torch.randn_like(got)
    assert_unbiased(torch.autograd.grad(got, wanted, grad)[0], torch.autograd.grad(want, wanted_double, grad.double())[0], f"{kind} dx")
    assert served(kind) == served(kind, "_backward") == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
@needs_library
def test_bias_gradient_of_many_rows(kind):
    """The sums over 70,000 rows keep float32's precision: a running sum in order would be off by its length."""
    v = inputs(35000, 4, kind=kind)
    v = {name: t if t is None else t.abs() for name, t in v.items()}
    (these, wanted), (double, wanted_double) = leaves(v), leaves(wide(v))
    got = torch.autograd.grad(call(kind, these, numerics="close").sum(), wanted)[-1]
    want = torch.autograd.grad(stock(kind, double).sum(), wanted_double)[-1]
    assert ((got - want) / want).abs().max() <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, kind):
    """A NaN comes out where it went in and nowhere else, +infinity stays (PyTorch's float32 GELU makes NaN of it); far to the left the gate is closed."""
    apart = KINDS[kind][2]
    gate = torch.tensor([torch.nan, torch.inf, -60000.0, 2.0]).to(dtype)
    two = torch.full_like(gate, 2.0)
    v = {"x": gate if apart is None else two if apart else torch.cat((gate, two) if kind == "swiglu-first" else (two, gate)), "gate": gate if apart else None,
         "bias": None}
    got = call(kind, v, numerics="close")
    assert got.isnan().tolist() == [True, False, False, False] and got[1] == torch.inf and abs(got[2].item()) < 1e-30 and got[3] > 1


@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of these kernels is above it
@needs_library
def test_every_isa_level(level):
    """close keeps its rule at every level that our library can run at."""
    run_at(level, __file__, "(test_close and (65 or 300)) or test_whole_range or test_left_tail")


@pytest.mark.on_reference(reason="exact keeps PyTorch's own activation")
def test_stock_modules():
    """The modules themselves: diffusers' GEGLU, SwiGLU, Flux2SwiGLU and ApproximateGELU, whose projection the ops follow."""
    activations = pytest.importorskip("diffusers.models.activations")
    flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        for module, op in ((activations.GEGLU(24, 40), ops.geglu), (activations.SwiGLU(24, 40), ops.swiglu), (activations.ApproximateGELU(24, 40), ops.quick_gelu)):
            assert_exact(op(module.proj(x)), module(x))
        assert_exact(ops.swiglu(x, gate_first=True), flux2.Flux2SwiGLU()(x))
