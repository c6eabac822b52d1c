"""group_norm_silu against stock code: bit for bit in ``exact``, against float64 in ``close``, on the backend that should run."""

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
from fusewire.kernels.dispatch import forced
from fusewire.kernels.group_norm_silu import native, reference
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.group_norm_silu.cases import DTYPES, FORMATS, OPTIONS, call, gradients, in_format, inputs, served, stock, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
# Odd ones first: tails beside vectors in channels and pixels, one channel a group, one group; then the kinds of U-Nets and VAEs. More than 1024
# pixels are where PyTorch sums channels-last pictures by threads, more than 32768 elements where its silu does.
# Eight samples of the smallest: each rounds three factors and offsets once, and the mean error of so few says little.
SHAPES = [((8, 3, 5, 7), 1), ((2, 30, 9, 7), 5), ((3, 17, 4, 4), 17), ((1, 8, 1, 3), 2), ((2, 24, 31, 33), 1), ((3, 40, 33, 37), 4),
          ((2, 320, 8, 8), 32), ((1, 128, 32, 32), 32), ((2, 12, 67), 3), ((2, 12, 3, 9, 11), 4), ((1, 20, 5, 17, 19), 4)]


def grid(shapes=SHAPES):
    """The shapes in both memory formats, where there are two."""
    return [pytest.param(shape, groups, memory_format, id=f"{'x'.join(map(str, shape))}-{groups}-{memory_format}")
            for shape, groups in shapes for memory_format in FORMATS if memory_format == "contiguous" or len(shape) > 3]


@pytest.mark.parametrize("shape, groups, memory_format", grid())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_exact(dtype, shape, groups, memory_format):
    """tail, exact: every combination of options equals stock bit for bit, in stock's memory format."""
    for options in OPTIONS:
        v = inputs(shape, dtype, options, memory_format)
        for silu in (True, False):
            got, want = call(v, groups, silu=silu), stock(v, groups, silu=silu)
            assert_exact(got, want, f"{options} {silu}")
            assert got.stride() == want.stride()
    assert served() == (2 * len(OPTIONS), 0)


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("memory_format", FORMATS)
@needs_library
def test_exact_follows_threads(memory_format, threads):
    """PyTorch's silu takes what its threads leave over one by one, and its channels-last sums follow them: so does exact."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.float64):
            for shape, groups in (((2, 10, 61, 67), 5), ((1, 33, 71, 73), 3), ((5, 6, 45, 33), 2)):
                v = inputs(shape, dtype, "all", memory_format)
                assert_exact(call(v, groups), stock(v, groups), f"{dtype} {shape}")
    finally:
        torch.set_num_threads(before)
    assert served() == (6, 0)


@pytest.mark.on_reference(reason="PyTorch lays out the sum of such a picture and its addend as channels-last, which the picture's strides do not say")
@pytest.mark.parametrize("shape, groups", [((6, 5, 7), 2), ((24, 40, 41), 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_of_one_picture_for_a_batch(dtype, shape, groups):
    """strided-input: one channels-last picture expanded over the batch, each sample with an addend of its own: stock's order of the sums."""
    for options in ("add", "all"):
        v = inputs((2, *shape), dtype, options)
        v["x"] = in_format(v["x"][:1], "channels_last").expand(2, *shape)
        assert_exact(call(v, groups), stock(v, groups), options)


LAYOUT = st.sampled_from(LAYOUTS)


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 19), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from(DTYPES),
       st.sampled_from(list(OPTIONS)), st.sampled_from(FORMATS), st.booleans(), st.floats(-50, 50), st.floats(1e-3, 100),
       st.lists(LAYOUT, min_size=5, max_size=5), st.integers(0, 2**31))
def test_exact_property(batch, groups, per_group, sizes, dtype, options, memory_format, silu, mean, spread, layouts, seed):
    """strided-input: any shape, options and scale in both memory formats, each parameter in a layout of its own: stock's bits and strides."""
    torch.manual_seed(seed)
    if batch * per_group * torch.Size(sizes).numel() == 1:
        return  # F.group_norm refuses one value per channel
    v = inputs((batch, groups * per_group, *sizes), dtype, options, memory_format)
    v["x"] = v["x"] * spread + mean
    laid = {name: v[name] if name == "x" else layout(v[name]) for layout, name in zip((None, *layouts), v)}
    got, want = call(laid, groups, silu=silu), stock(v, groups, silu=silu)
    assert_exact(got, want)
    assert got.stride() == want.stride() or got.numel() == got.shape[1]


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
@pytest.mark.parametrize("spatial", [12, 28])
def test_exact_order_of_float16(spatial):
    """Another order of the sums than stock's shows in a few float16 elements of a million, where the offset cancels."""
    for seed in range(200):
        torch.manual_seed(seed)
        x, weight, bias = torch.randn(8, 60, spatial).mul_(41).add_(14.5).half(), torch.randn(60).half(), torch.randn(60).half()
        assert_exact(ops.group_norm_silu(x, 12, weight, bias, silu=False), F.group_norm(x, 12, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, groups, memory_format", grid())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close(dtype, shape, groups, memory_format, backend):
    with forced(backend):
        for options in OPTIONS:
            v = inputs(shape, dtype, options, memory_format)
            for silu in (True, False):
                got = call(v, groups, silu=silu, numerics="close")
                assert_close(got, stock(wide(v), groups, silu=silu), stock(v, groups, silu=silu), f"{options} {silu}")
                assert got.stride() == stock(v, groups, silu=silu).stride()


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 19), st.lists(st.integers(2, 40), min_size=1, max_size=3), st.sampled_from(DTYPES),
       st.sampled_from(list(OPTIONS)), st.sampled_from(FORMATS), st.booleans(), st.lists(LAYOUT, min_size=6, max_size=6), st.integers(0, 2**31))
def test_close_property(batch, groups, per_group, sizes, dtype, options, memory_format, silu, layouts, seed):
    """strided-input: every shape and option; pictures of few elements, so by the bound of each, which holds in any layout of each argument."""
    torch.manual_seed(seed)
    v = inputs((batch, groups * per_group, *sizes), dtype, options, memory_format)
    laid = {name: layout(t) for layout, (name, t) in zip(layouts, v.items())}
    for these in (v, laid):
        assert_within(call(these, groups, silu=silu, numerics="close"), stock(wide(v), groups, silu=silu), 8)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("outlier", (False, True), ids=("plain", "outlier"))
@needs_library
def test_cancellation(outlier, memory_format):
    """cancellation: mean 100, standard deviation 0.01; and pictures whose first pixels lie far from the rest."""
    x = 100 + 0.01 * torch.randn(2, 32, 24, 24)
    if outlier:
        x[..., :4, :] = 101
    x = in_format(x, memory_format)
    got = ops.group_norm_silu(x, 8, eps=1e-12, silu=False, numerics="close")
    want = F.group_norm(x.double(), 8, eps=1e-12)
    assert ((got - want).abs().amax((1, 2, 3)) / want.abs().amax((1, 2, 3))).max() <= 1e-5
    assert served() == (1, 0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("numerics", ("exact", "close"))
def test_fp16_overflow(numerics, memory_format):
    """fp16-overflow: x = +-1000, whose squares and sums do not fit fp16."""
    v = inputs((1, 64, 40, 40), torch.float16, "affine", memory_format)
    v["x"] = in_format(torch.where(torch.rand(1, 64, 40, 40) > 0.5, 1000.0, -1000.0).half(), memory_format)
    assert torch.isfinite(call(v, 8, numerics=numerics)).all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("eps", (1e-5, 1e-6, 1e-2))
def test_eps(eps, memory_format):
    """eps: inside the root; x ~ 1e-4, where it decides the result."""
    v = inputs((2, 12, 6, 7), options="affine", memory_format=memory_format)
    v["x"] = v["x"] * 1e-4
    assert_exact(call(v, 3, eps=eps), stock(v, 3, eps))
    assert_close(call(v, 3, eps=eps, numerics="close"), stock(wide(v), 3, eps), stock(v, 3, eps))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_reference_of_close_rounds_once(dtype):
    v = inputs((2, 12, 5, 7), dtype, "all")
    given = {name: tensor.float() for name, tensor in v.items()}
    made, want = (reference.group_norm_silu(t["x"], 3, t["weight"], t["bias"], 1e-5, t["shift"], t["scale"], t["add"], True, exact)
                  for t, exact in ((v, False), (given, True)))
    assert_exact(made, want.to(dtype))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_biased_cast(dtype, memory_format):
    """biased-cast: over 2^20 elements the mean signed error is within 0.02 units in the last place; that of the gradient too."""
    v, grad = inputs((1, 64, 128, 128), dtype, "affine", memory_format), torch.randn(1, 64, 128, 128).to(dtype)
    for silu in (False, True):
        assert_unbiased(call(v, 32, silu=silu, numerics="close"), stock(wide(v), 32, silu=silu), f"SiLU {silu}")
        got, want = gradients(call, v, 32, grad, silu=silu, numerics="close"), gradients(stock, wide(v), 32, grad.double(), silu=silu)
        assert_unbiased(got["x"], want["x"], f"SiLU {silu} dx")
    assert served() == (4, 0) and served("group_norm_silu_backward") == (2, 0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_special_values(dtype, numerics, memory_format):
    """NaN and infinities come out in the groups that stock has them in, and in no other."""
    v = inputs((2, 12, 5, 9), dtype, "affine", memory_format)
    v["x"][0, 1, 2, 3], v["x"][1, 7, 0, 0] = torch.nan, torch.inf
    got, want = call(v, 4, numerics=numerics), stock(v, 4)
    assert torch.equal(got.isnan(), want.isnan())
    if numerics == "exact":
        assert_exact(got, want)


@pytest.mark.parametrize("numerics", ("exact", "close"))
def test_silu_of_large_values(numerics):
    """Far from zero SiLU is x or -0: no overflow of the exponential comes through."""
    x = torch.linspace(-1, 1, 4096).view(1, 1, 4096)
    for gain in (50.0, 90.0, 150.0, 1e4, 1e30):
        weight = torch.tensor([gain])
        got = ops.group_norm_silu(x, 1, weight, numerics=numerics)
        assert_within(got, F.silu(F.group_norm(x.double(), 1, weight.double())), 8)
        assert (got[x < -0.1].abs() <= gain).all()


SCRIPT = ("import torch; from tests.kernels.group_norm_silu.cases import *; from tests.tolerance import assert_within; torch.manual_seed(0)\n"
          "from fusewire.kernels.group_norm_silu import native; assert not native._stands_down, native._stands_down\n"
          "for dtype in DTYPES:\n"
          "  for shape, groups in (((2, 30, 9, 7), 5), ((1, 40, 33, 37), 4)):\n"
          "    for memory_format in FORMATS:\n"
          "      v = inputs(shape, dtype, 'all', memory_format)\n"
          "      assert torch.equal(call(v, groups), stock(v, groups)), (dtype, shape, memory_format)\n"
          "      assert_within(call(v, groups, numerics='close'), stock(wide(v), groups), 8)\n"
          "assert ops.stats()['group_norm_silu']['reference'] == 0, ops.stats()\n")


@pytest.mark.parametrize("variables", ({"FUSEWIRE_CPU_ISA": "base"}, {"FUSEWIRE_CPU_ISA": "avx2"}, {"FUSEWIRE_CPU_ISA": "avx512"},
                                       {"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}), ids=lambda v: "-".join(v.values()))
@needs_library
def test_every_isa_level(variables):
    """The exact bits do not depend on the level that our library runs at, and follow PyTorch's where it is told to use lesser kernels."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_exact_silu_of_every_value(dtype):
    """All 65536 values of a 16-bit type, as the bias of a norm whose weight is 0."""
    values = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = ops.group_norm_silu(torch.randn(1, 2**16, 32).to(dtype), 64, torch.zeros(2**16, dtype=dtype), values)
    assert_exact(got, F.silu(values)[None, :, None].expand(1, 2**16, 32).contiguous())
    assert served() == (1, 0)


def test_exact_bias_alone_is_left_to_torch():
    v = inputs((2, 12, 5, 9), options="affine", memory_format="channels_last")
    del v["weight"]
    assert_exact(call(v, 4), stock(v, 4))
    assert_close(call(v, 4, numerics="close"), stock(wide(v), 4), stock(v, 4))
    assert served() == ((1, 1) if CPU.loaded else (0, 2))


@needs_library
def test_stands_down_where_torch_differs(monkeypatch):
    """Had the probe found other bits, exact would run on the reference and say why; close would not care."""
    monkeypatch.setitem(native._stands_down, torch.float32, "another order")
    v = inputs((1, 8, 4, 4))
    assert_exact(call(v, 2), stock(v, 2))
    call(v, 2, numerics="close")
    assert served() == (1, 1)
    assert [choice.reason for choice in ops.backends("group_norm_silu", v["x"], 2)][0] == "another order"


@needs_library
def test_probe_tells_orders_apart():
    """The probe can fail: one order of summation, and one way of PyTorch's silu, passes for each dtype that shows the difference."""
    op, empty = torch.ops.fusewire.group_norm_silu.default, {dtype: torch.empty(0, dtype=dtype) for dtype in DTYPES}
    try:
        for dtype in DTYPES:
            passed = []
            for order in native._ORDERS:
                torch.ops.fusewire.cpu_group_norm_order(empty[dtype], *order, 0)
                if not native.differs_from_stock(op, native.reference.group_norm_silu, native._small_cases(dtype)):
                    passed.append(order)
            assert len({fused_offset for _, fused_offset in passed}) == 1 and len(passed) <= 2, (dtype, passed)
            if len(native._SILU_STEPS[dtype]) > 1:
                steps = []
                for step in native._SILU_STEPS[dtype]:
                    torch.ops.fusewire.cpu_group_norm_order(empty[dtype], *passed[0], step)
                    if not native.differs_from_stock(op, native.reference.group_norm_silu, native._silu_cases(dtype)):
                        steps.append(step)
                assert len(steps) == 1, (dtype, steps)
    finally:
        native.compare_with_stock(op)
