"""The adaln ops against stock code: bit for bit in ``exact``, against float64 in ``close``, on the backend that should run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.adaln import native
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.adaln.cases import DTYPES, NAMES, NORMED, affine_stock, call, inputs, op_name, served, stock, used, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
# Odd first. Around one vector, one chunk of 16 vectors and several chunks of every dtype; real widths (SD3.5-medium, DiT-XL, Flux)
WIDTHS = (1, 3, 7, 17, 63, 65, 129, 255, 257, 300, 1152, 1536, 3072)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_exact(dtype, width):
    """tail, exact: every op equals stock bit for bit; 1, 5 and 14 rows leave each remainder of the kernel's blocks of 4."""
    for batch, tokens in ((1, 1), (1, 5), (2, 7)):
        v = inputs(batch, tokens, width, dtype)
        for name in NAMES:
            for got, want in zip(call(name, v), stock(name, v), strict=True):
                assert_exact(got, want, name)
                assert got.is_contiguous()
    stats = ops.stats()
    assert all(stats[op_name(name)]["cpu"] >= 3 and stats[op_name(name)]["reference"] == 0 for name in NAMES)


@pytest.mark.parametrize("kind", ("one", "token"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_modulation_shapes(dtype, kind):
    v = inputs(3, 6, 40, dtype, kind)
    for name in NAMES:
        for got, want in zip(call(name, v), stock(name, v), strict=True):
            assert_exact(got, want, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", (False, True), ids=("weight", "weight-bias"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_affine(dtype, bias, backend):
    v, weight = inputs(2, 6, 77, dtype), torch.randn(77).to(dtype)
    bias = torch.randn(77).to(dtype) if bias else None
    with forced(backend):
        for name in ("adaln_modulate", "adaln_modulate_dual", "two_gates"):
            for got, want in zip(call(name, v, weight=weight, bias=bias, eps=1e-5), stock(name, v, 1e-5, weight, bias), strict=True):
                assert_exact(got, want, name)


@pytest.mark.on_reference
def test_exact_bias_alone_is_left_to_torch():
    v, bias = inputs(1, 3, 40), torch.randn(40)
    assert_exact(call("adaln_modulate", v, bias=bias)[0], stock("adaln_modulate", v, bias=bias)[0])
    assert served("adaln_modulate") == (0, 1)


@pytest.mark.parametrize("width", (1, 5, 65, 300, 1536))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_exact_rms(dtype, width):
    """diffusers' RMSNorm: float32 inside (float64 for float64), rounded before the weight."""
    v, weight, bias = inputs(2, 5, width, dtype), torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    for name in ("adaln_modulate", "adaln_modulate_dual"):
        for affine in ({}, {"weight": weight}, {"bias": bias}, {"weight": weight, "bias": bias}):
            for got, want in zip(call(name, v, norm="rms", **affine), affine_stock("rms")(name, v, **affine), strict=True):
                assert_exact(got, want, f"{name} {list(affine)}")
        assert served(name) == (4, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ("rms", "layer"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_channels_not_innermost(dtype, norm, backend):
    """strided-input: the bits are those of contiguous rows wherever the channels lie, though torch's own sums follow the layout."""
    v = inputs(1, 32, 130, dtype)
    laid = {**v, "x": v["x"].mT.contiguous().mT}
    with forced(backend):
        for name in NORMED:
            for got, want in zip(call(name, laid, norm=norm), affine_stock(norm)(name, v), strict=True):
                assert_exact(got, want, name)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 700), st.sampled_from(DTYPES), st.sampled_from(("chunk", "one", "token")),
       st.floats(-50, 50), st.floats(1e-3, 100), st.lists(st.sampled_from(LAYOUTS), min_size=7, max_size=7), st.integers(0, 2**31))
def test_exact_property(name, batch, tokens, width, dtype, kind, mean, spread, layouts, seed):
    """strided-input: any shape, modulation and scale, each argument in a layout of its own: exact equals stock, close has the bits it has contiguous."""
    torch.manual_seed(seed)
    v = inputs(batch, tokens, width, dtype, kind)
    v["x"] = v["x"] * spread + mean
    laid = {**v, **{argument: layout(v[argument]) for argument, layout in zip(used(name), layouts)}}
    for got, want in zip(call(name, laid), stock(name, v), strict=True):
        assert_exact(got, want, name)
    for got, want in zip(call(name, laid, numerics="close"), call(name, v, numerics="close"), strict=True):
        assert_exact(got, want, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", (1, 7, 65, 300, 1536))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close(dtype, width, backend):
    v = inputs(2, 7, width, dtype)
    with forced(backend):
        for name in NAMES:
            for got, want, plain in zip(call(name, v, numerics="close"), stock(name, wide(v)), stock(name, v), strict=True):
                assert_close(got, want, plain, name)


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_close_affine(dtype, norm):
    v, weight, bias = inputs(2, 7, 300, dtype), torch.randn(300).to(dtype), torch.randn(300).to(dtype)
    for name in ("adaln_modulate", "adaln_modulate_dual"):
        plain = affine_stock(norm)(name, v, weight, bias)
        want = affine_stock(norm)(name, wide(v), weight.double(), bias.double())
        for got, true, eager in zip(call(name, v, norm=norm, weight=weight, bias=bias, numerics="close"), want, plain, strict=True):
            assert_close(got, true, eager, name)
        assert ops.stats()[name]["reference"] == 0


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("outlier", (False, True), ids=("plain", "outlier"))
@needs_library
def test_cancellation(outlier, name):
    """cancellation: mean 100, standard deviation 0.01; and a row whose first elements lie far from the rest."""
    x = 100 + 0.01 * torch.randn(1, 64, 1536)
    if outlier:
        x[..., :16] = 101
    zero = torch.zeros(1, 1536)
    v = dict.fromkeys(("gate", "shift", "scale", "shift2", "scale2"), zero) | {"x": x, "y": x}
    *_, got = call(name, v, eps=1e-12, numerics="close")
    want = F.layer_norm(x.double(), (1536,), eps=1e-12)
    assert ((got - want).abs().amax(-1) / want.abs().amax(-1)).max() <= 1e-5
    assert served(name) == (1, 0)


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("numerics", ("exact", "close"))
def test_fp16_overflow(numerics, name):
    """fp16-overflow: x = +-1000, whose squares and sums do not fit fp16."""
    v = inputs(1, 5, 1536, torch.float16)
    v["x"] = torch.where(torch.rand(1, 5, 1536) > 0.5, 1000.0, -1000.0).half()
    for norm in ("layer", "rms"):
        assert all(out.isfinite().all() for out in call(name, v, norm=norm, numerics=numerics))


@needs_library
def test_fp16_overflow_of_products():
    """fp16-overflow: gate * y = 9e4 and the gate's sum over 256 tokens leave float16, what is added to them brings them back; exact has stock's infinity."""
    sign = torch.where(torch.arange(512) < 256, 1.0, -1.0).half()[None, :, None]
    v = {"x": -4e4 * sign.expand(1, 512, 40), "y": 300 * sign.expand(1, 512, 40), "gate": torch.full((1, 40), 300.0, dtype=torch.float16)}
    v = {name: tensor.contiguous().requires_grad_() for name, tensor in v.items()}
    got, want = call("gate_residual", v, numerics="close")[0], 5e4 * sign.double().expand(1, 512, 40)
    assert_close(got, want, want.half())
    assert_exact(call("gate_residual", v)[0], v["x"] + v["gate"][:, None] * v["y"])
    of_gate = torch.autograd.grad(got, v["gate"], torch.ones_like(got))[0]
    assert_exact(of_gate, torch.zeros_like(of_gate))
    assert served("gate_residual") == (2, 0) and served("gate_residual_backward") == (1, 0)


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("eps", (1e-5, 1e-6, 1e-2))
def test_eps(eps, name):
    """eps: inside the root; x ~ 1e-4, where it decides the result."""
    v = inputs(2, 3, 100)
    v["x"] *= 1e-4
    v["y"] *= 1e-4
    plain, want = stock(name, v, eps), stock(name, wide(v), eps)
    for exact, close, theirs, truth in zip(call(name, v, eps=eps), call(name, v, eps=eps, numerics="close"), plain, want, strict=True):
        assert_exact(exact, theirs)
        assert_close(close, truth, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_biased_cast(dtype, name):
    """biased-cast: over 2^20 elements the mean signed error is within 0.02 units in the last place."""
    v = inputs(1, 1024, 1024, dtype)
    for got, want in zip(call(name, v, numerics="close"), stock(name, wide(v)), strict=True):
        assert_unbiased(got, want, name)
    assert served(op_name(name)) == (1, 0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_ties_go_to_even(dtype):
    """biased-cast: the sum of two numbers of one binade and one sign has a digit more than they have: every second one is a tie."""
    sign = torch.randn(1, 1024, 1024).sign()
    x, y = (sign * (1 + 0.99 * torch.rand(2, 1, 1024, 1024))).to(dtype)
    got, want = ops.gate_residual(x, y, torch.ones(1, 1024, dtype=dtype), numerics="close"), x.double() + y.double()
    assert 0.4 < ((want - got.double()).abs() == torch.finfo(dtype).eps).double().mean() < 0.6
    assert_unbiased(got, want)


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_special_values(dtype, numerics):
    """Denormals are kept; NaN and infinities come out where stock has them, and in no other row."""
    v = inputs(1, 4, 65, dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    v["x"][0, 0] *= tiny
    v["shift"][0, :9] = tiny
    v["x"][0, 1, 3], v["x"][0, 2, 64] = torch.nan, torch.inf
    for name in NAMES:
        for got, want in zip(call(name, v, numerics=numerics), stock(name, v), strict=True):
            assert torch.equal(got.isnan(), want.isnan()), name
            if numerics == "exact":
                assert_exact(got, want, name)


EXACT_SCRIPT = ("import torch; from tests.kernels.adaln.cases import *; torch.manual_seed(0)\n"
                "from fusewire.kernels.adaln import native; assert not native.stands_down, native._stands_down\n"
                "for dtype in DTYPES:\n"
                "  for width in (5, 77, 300, 1536):\n"
                "    v = inputs(2, 5, width, dtype)\n"
                "    assert all(torch.equal(a, b) for name in NAMES for a, b in zip(call(name, v), stock(name, v))), (dtype, width)\n")


@pytest.mark.parametrize("isa", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))  # no level of these kernels is above it
@needs_library
def test_every_isa_level(isa):
    """The exact bits do not depend on the level that our library runs at. (A level that this processor lacks runs at the one it has.)"""
    run_with(EXACT_SCRIPT + "    assert all(torch.isfinite(a).all() for name in NAMES for a in call(name, v, numerics='close'))\n", FUSEWIRE_CPU_ISA=isa)


@pytest.mark.parametrize("capability", ("default", "avx2"))
@needs_library
def test_follows_torch_at_lower_capability(capability):
    """PyTorch told to use lesser kernels sums in another order: the exact row follows it, or stands down; it never differs."""
    run_with(EXACT_SCRIPT + "assert ops.stats()['adaln_modulate']['reference'] == 0\n", ATEN_CPU_CAPABILITY=capability)


def run_with(script: str, **variables: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_library
def test_stands_down_where_torch_differs(monkeypatch):
    """Had the probe found another order of summation, exact would run on the reference and say why; close would not care."""
    monkeypatch.setitem(native.stands_down, (torch.float32, False), "another order")
    v = inputs(1, 4, 32)
    assert_exact(call("adaln_modulate", v)[0], stock("adaln_modulate", v)[0])
    call("adaln_modulate", v, numerics="close")
    assert served("adaln_modulate") == (1, 1)
    assert native.why_not_modulate(v["x"], v["shift"], v["scale"], None, None, 1e-6, False, True) == "another order"


@needs_library
def test_probe_tells_orders_apart():
    """The probe can fail: with an order of summation of its own, no other passes (float32 and float16 differ in the tail alone)."""
    kept = {dtype: order for dtype in DTYPES for order in native._ORDERS if native._order_agrees(dtype, order)}
    assert set(kept) == set(DTYPES)
    for dtype in DTYPES:
        assert sum(native._order_agrees(dtype, order) for order in native._ORDERS) == 1, dtype
