"""The norms against the stock modules: bit for bit in ``exact``, against float64 in ``close``, forward and backward, on the backend that should run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from fusewire.kernels.norm import native, reference
from tests.effort import examples
from tests.kernels.isa_levels import run_at
from tests.kernels.norm.cases import AFFINE, DTYPES, KINDS, NARROWED, call, inputs, leaves, served, stock, terms, true, well_conditioned, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
# Odd first. Around one vector, one chunk of 16 vectors and several chunks of every dtype; real widths (SD3.5-medium, T5-XXL)
WIDTHS = (1, 3, 7, 17, 63, 65, 129, 255, 257, 300, 1152, 1536, 4096)


@NARROWED
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@needs_library
def test_exact(kind, dtype, width):
    """tail, silent-off: equal to stock bit for bit, on the CPU library; 1, 10 and 34 rows leave remainders of the kernel's blocks of 16 and of 4."""
    for rows, affine in ((1, "plain"), (5, "weight"), (17, "weight-bias")):
        v = inputs(rows, width, dtype, kind, affine)
        got = call(kind, v)
        assert_exact(got, stock(kind, v), affine)
        assert got.is_contiguous()
    assert served(kind) == ((0, 3) if kind == "layer-float32" and dtype is torch.float64 else (3, 0))


@needs_library
def test_exact_left_to_pytorch(monkeypatch, left_to_pytorch):
    """By default exact layer norms of contiguous float32 are PyTorch's own: nothing is fused with them."""
    monkeypatch.setattr(native, "LEFT_TO_PYTORCH", left_to_pytorch)
    for kind in ("layer", "layer-float32"):
        v = inputs(5, 40, torch.float32, kind)
        assert_exact(call(kind, v), stock(kind, v))
        assert_exact(call(kind, {**v, "x": v["x"].transpose(0, 1)}), stock(kind, v).transpose(0, 1))  # the library: PyTorch would copy x
        with forced("cpu"):
            assert_exact(call(kind, v), stock(kind, v))
    assert served("layer") == (4, 2)
    for kind, dtype, numerics in (("layer", torch.bfloat16, "exact"), ("layer", torch.float32, "close"), ("layer-2d", torch.float32, "exact"), ("rms", torch.float32, "exact")):
        before = served(kind)
        call(kind, inputs(5, 40, dtype, kind), numerics=numerics)
        assert served(kind) == (before[0] + 1, before[1])


@pytest.mark.parametrize("kind", ("rms-torch", "layer", "layer-float32", "layer-2d"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_exact_float32_weight(dtype, kind):
    """A float32 weight beside 16-bit tokens, as models keep that hold their norms in float32."""
    v = inputs(7, 77, dtype, kind, "weight" if kind == "rms-torch" else "weight-bias")
    v = {name: t if t is None or name == "x" else t.float() for name, t in v.items()}
    assert_exact(call(kind, v), stock(kind, v))
    assert_close(call(kind, v, numerics="close"), true(kind, wide(v)), stock(kind, v))
    assert served(kind) == (2, 0)


@pytest.mark.on_reference(when=lambda dtype, weight_dtype: weight_dtype is not dtype and not (weight_dtype is torch.float32 and dtype.itemsize == 2),
                          reason="the norms take float32 weights beside 16-bit rows, and no other mix")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_exact_stock_modules(dtype, weight_dtype):
    """The modules themselves: diffusers' RMSNorm, transformers' T5LayerNorm, torch.nn.RMSNorm, diffusers' MochiRMSNorm (which rounds once) and
    FP32LayerNorm, for every pair of dtypes."""
    normalization = pytest.importorskip("diffusers.models.normalization")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    x = torch.randn(2, 9, 40).to(dtype)
    made = {"rms": [normalization.RMSNorm(40, 1e-6), t5.T5LayerNorm(40, 1e-6)], "rms-torch": [torch.nn.RMSNorm(40, 1e-6)],
            "layer-float32": [normalization.FP32LayerNorm(40, eps=1e-6)]}
    if dtype is not torch.float64:
        made["rms-torch"].append(normalization.MochiRMSNorm(40, 1e-6))
    for kind, modules in made.items():
        for module in modules:
            torch.nn.init.normal_(module.weight)
            module.to(weight_dtype)
            v = {"x": x, "weight": module.weight.detach(), "bias": getattr(module, "bias", None)}
            with torch.no_grad():
                want = module(x)
                assert_exact(call(kind, v), want, type(module).__name__)
                assert call(kind, v, numerics="close").dtype is want.dtype


@pytest.mark.on_reference
def test_exact_bias_alone_is_left_to_torch():
    v = inputs(3, 40)
    v["weight"] = None
    assert_exact(call("layer", v), stock("layer", v))
    assert served("layer") == (0, 1)


LAYOUT = st.sampled_from(LAYOUTS)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 700), st.sampled_from(DTYPES), st.sampled_from(tuple(AFFINE)), st.floats(-50, 50),
       st.floats(1e-3, 100), st.sampled_from((1e-6, 1e-5, 1e-2)), st.tuples(LAYOUT, LAYOUT, LAYOUT), st.integers(0, 2**31))
def test_property(kind, batch, rows, width, dtype, affine, mean, spread, eps, layouts, seed):
    """strided-input: any shape, options and scale, each argument in a layout of its own: exact equals stock, close has the bits it has contiguous."""
    torch.manual_seed(seed)
    v = inputs(rows, width, dtype, kind, affine, batch)
    v["x"] = v["x"] * spread + mean
    laid = {name: None if t is None else layout(t) for layout, (name, t) in zip(layouts, v.items())}
    assert_exact(call(kind, laid, eps), stock(kind, v, eps))
    assert_exact(call(kind, laid, eps, numerics="close"), call(kind, v, eps, numerics="close"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", (1, 2, 7, 65, 300, 1536, 4096))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_close(kind, dtype, width, backend):
    """tail: within the rule, on every backend."""
    with forced(backend):
        for affine in AFFINE:
            v = inputs(9, width, dtype, kind, affine)
            assert_close(call(kind, v, numerics="close"), true(kind, wide(v)), plain_of(kind, v), affine)


def plain_of(kind, v, eps=1e-6):
    """Eager PyTorch in v's dtype; FP32LayerNorm of float64 computes in float32, which is no yardstick."""
    return stock("layer" if kind == "layer-float32" and v["x"].dtype is torch.float64 else kind, v, eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("width", (5, 33, 130, 300, 1536))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("rms-torch", "layer", "layer-2d"))
@needs_library
def test_close_gradients(kind, dtype, width, affine, backend):
    """tail, silent-off: the gradients of x, weight and bias come from the backward kernel and keep the rule; 70 rows are five groups, one cut short."""
    v, grad = inputs(35, width, dtype, kind, affine), None
    found = []
    for form, function in ((v, lambda v: call(kind, v, numerics="close")), (v, lambda v: plain_of(kind, v)), (wide(v), lambda v: true(kind, v))):
        these, wanted = leaves(form)
        out = function(these)
        grad = torch.randn_like(out) if grad is None else grad
        with forced(backend):
            found.append(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
    for name, got, plain, want in zip(("x", "weight", "bias"), *found, strict=False):
        assert_close(got, want, plain, name)
    assert served(kind, "_backward") == ((1, 0) if backend == "cpu" else (0, 1))


@pytest.mark.parametrize("kind", ("rms-torch", "layer", "layer-2d"))
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 60), st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from(tuple(AFFINE)), st.sampled_from((1e-6, 1e-2)),
       st.tuples(LAYOUT, LAYOUT, LAYOUT, LAYOUT), st.integers(0, 2**31))
@needs_library
def test_gradients_property(kind, batch, rows, width, dtype, affine, eps, layouts, seed):
    """tail, strided-input, strided-grad: the kernel's gradients are those that autograd takes of the formula in float64, and have the same bits where
    each argument has a layout of its own (but for a picture of another memory format, whose pixels are summed in another order). In float64 nothing hides
    behind rounding."""
    torch.manual_seed(seed)
    v, found = inputs(rows, width, dtype, kind, affine, batch), []
    well_conditioned(v["x"].movedim(1, -1) if kind == "layer-2d" else v["x"])
    grad = torch.randn(v["x"].shape).to(dtype)

    def close(these):
        return call(kind, these, eps, numerics="close")

    laid = {name: None if t is None else layout(t) for layout, (name, t) in zip(layouts, v.items())}
    for form, upstream, function in ((v, grad, close), (wide(v), grad.double(), lambda these: true(kind, these, eps)),
                                     (v, grad, lambda these: plain_of(kind, these, eps)), (laid, layouts[3](grad), close)):
        these = {name: None if t is None else t.detach().requires_grad_() for name, t in form.items()}
        found.append(torch.autograd.grad(function(these), [t for t in these.values() if t is not None], upstream))
    same_order = kind != "layer-2d" or reference.picture_layout(laid["x"]) is reference.picture_layout(v["x"])
    for name, got, want, plain, again in zip(("x", "weight", "bias"), *found, strict=False):
        assert_within(got, want, 8, name, plain, terms(kind, v, grad, eps)[name])
        if same_order:
            assert_exact(again, got, f"{name} {' '.join(layout.__name__ for layout in layouts)}")
        else:
            assert_within(again, want, 8, name, plain, terms(kind, v, grad, eps)[name])
    assert served(kind, "_backward")[1] == 0


@pytest.mark.parametrize("kind", ("layer", "layer-2d"))
def test_one_channel(kind):
    """tail: one channel has no deviation from its mean: its norm is zero, and so are the gradients of x and weight."""
    these, wanted = leaves(inputs(35, 1, kind=kind))
    out = call(kind, these, numerics="close")
    assert torch.equal(out, these["bias"].expand(out.shape.numel()).view(out.shape))
    dx, dw, db = torch.autograd.grad(out.sum(), wanted)
    assert not dx.any() and not dw.any() and db == 70


@pytest.mark.parametrize("kind", ("rms", "layer", "layer-2d"))
@needs_library
def test_weight_gradient_of_many_rows(kind):
    """The sums over 70,000 rows keep float32's precision: a running sum in order would be off by its length."""
    v = inputs(35000, 8, torch.float32, kind)
    v["x"] = v["x"].abs() + 1
    (these, wanted), (double, wanted_double) = leaves(v), leaves(wide(v))
    got = torch.autograd.grad(call(kind, these, numerics="close").sum(), wanted)
    want = torch.autograd.grad(true(kind, double).sum(), wanted_double)
    scale = 70000 ** 0.5 if kind != "rms" else 70000
    for mine, theirs in zip(got[1:], want[1:]):
        assert (mine - theirs).abs().max() <= 1e-6 * max(scale, theirs.abs().max())


@NARROWED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_gradients(dtype, kind):
    """exact: the gradients are stock's, bit for bit."""
    v = inputs(7, 40, dtype, kind)
    (ours, wanted), (theirs, wanted_too) = leaves(v), leaves(v)
    out = call(kind, ours)
    grad = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, wanted, grad), torch.autograd.grad(stock(kind, theirs), wanted_too, grad), strict=True):
        assert_exact(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outlier", (False, True), ids=("plain", "outlier"))
@needs_library
def test_cancellation(kind, outlier):
    """cancellation: mean 100, standard deviation 0.01; and rows whose first elements lie far from the rest. Forward and backward."""
    x = 100 + 0.01 * torch.randn(1, 64, 1536)
    if outlier:
        x[..., :16] = 101
    if kind == "layer-2d":
        x = x.mT[..., None]
    v = {"x": x, "weight": None, "bias": None}
    (ours, wanted), (double, wanted_double) = leaves(v), leaves(wide(v))
    got, want = call(kind, ours, 1e-12, numerics="close"), true(kind, double, 1e-12)
    dims = 1 if kind == "layer-2d" else -1
    assert ((got - want).abs().amax(dims) / want.abs().amax(dims)).max() <= 1e-5
    grad = torch.randn_like(got)
    dx, dx_true = torch.autograd.grad(got, wanted, grad)[0], torch.autograd.grad(want, wanted_double, grad.double())[0]
    assert ((dx - dx_true).abs().amax(dims) / dx_true.abs().amax(dims)).max() <= 1e-5
    assert served(kind) == (1, 0) and served(kind, "_backward") == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numerics", ("exact", "close"))
def test_fp16_overflow(numerics, kind):
    """fp16-overflow: x = +-1000, whose squares and sums do not fit fp16; forward and backward."""
    v = inputs(5, 1536, torch.float16, kind)
    v["x"] = torch.where(v["x"] > 0.5, 1000.0, -1000.0).half()
    these, wanted = leaves(v)
    out = call(kind, these, numerics=numerics)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.float().mean(), wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", (1e-5, 1e-6, 1e-2))
def test_eps(eps, kind):
    """eps: inside the root; x ~ 1e-4, where it decides the result."""
    v = inputs(6, 100, kind=kind)
    v["x"] = v["x"] * 1e-4
    assert_exact(call(kind, v, eps), stock(kind, v, eps))
    assert_close(call(kind, v, eps, numerics="close"), true(kind, wide(v), eps), stock(kind, v, eps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_biased_cast(dtype, kind):
    """biased-cast: over 2^20 elements the mean signed error is within 0.02 units in the last place; that of the gradient too."""
    v = inputs(1024, 512, dtype, kind)
    (ours, wanted), (double, wanted_double) = leaves(v), leaves(wide(v))
    got, want = call(kind, ours, numerics="close"), true(kind, double)
    assert_unbiased(got, want, kind)
    grad = torch.randn_like(got)
    assert_unbiased(torch.autograd.grad(got, wanted, grad)[0], torch.autograd.grad(want, wanted_double, grad.double())[0], f"{kind} dx")
    assert served(kind) == served(kind, "_backward") == (1, 0)


@NARROWED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, numerics, kind):
    """Denormals are kept; NaN and infinities come out where stock has them, and in no other row."""
    v = inputs(4, 65, dtype, kind)
    x = v["x"] if kind != "layer-2d" else v["x"][..., 0].mT
    x[0, 0] *= torch.finfo(dtype).smallest_normal / 4
    x[0, 1, 3], x[0, 2, 64] = torch.nan, torch.inf
    got, want = call(kind, v, numerics=numerics), stock(kind, v)
    assert torch.equal(got.isnan(), want.isnan())
    if numerics == "exact":
        assert_exact(got, want)


@pytest.mark.on_reference(reason="torch splits the sum of one row this long between its threads")
@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("kind", ("rms", "rms-torch"))
def test_exact_of_one_long_row(kind, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            v = inputs(1, 70001, dtype, kind, "weight", batch=1)
            assert_exact(call(kind, v), stock(kind, v), str(dtype))
    finally:
        torch.set_num_threads(before)
    assert served(kind) == (0, 2)


@pytest.mark.parametrize("level", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of these kernels is above it
@needs_library
def test_every_isa_level(level):
    """The exact bits do not depend on the level that our library runs at, and close keeps its rule, forward and backward."""
    run_at(level, __file__, "((test_exact or test_close) and (65 or 300) or test_close_gradients and (130 or 300)) and not property")


@needs_library
def test_stands_down_where_torch_differs(monkeypatch):
    """Had the probe found another rounding, exact would run on the reference and say why; close would not care."""
    assert not native._stands_down
    monkeypatch.setitem(native._stands_down, (torch.float32, "torch"), "another order")
    v = inputs(4, 32)
    assert_exact(call("rms-torch", v), stock("rms-torch", v))
    call("rms-torch", v, numerics="close")
    call("rms", v)
    assert served("rms-torch") == (2, 1)
    assert native.why_not_rms(v["x"], None, None, 1e-6, True, True) == "another order"


@needs_library
def test_probe_can_fail(monkeypatch):
    """A kernel that is off in one bit, or that follows the other module's rounding, is found at import."""
    rms, layer = torch.ops.fusewire.rms_norm, torch.ops.fusewire.layer_norm
    monkeypatch.setattr(native, "_stands_down", {})
    native.compare_with_stock(lambda *args: rms(*args[:4], not args[4], True), lambda *args: torch.nextafter(layer(*args), torch.zeros(())))
    found = set(native._stands_down)
    assert {(dtype, "layer") for dtype in DTYPES if dtype is not torch.float64} <= found
    assert {(torch.bfloat16, "torch"), (torch.float16, "torch"), (torch.bfloat16, "diffusers"), (torch.float16, "diffusers")} <= found


def test_counts_are_by_op():
    v = inputs(2, 8)
    call("rms", v), call("layer", v), call("layer-float32", v)
    assert sum(ops.stats()["rms_norm"].values()) == 1 and sum(ops.stats()["layer_norm"].values()) == 2
