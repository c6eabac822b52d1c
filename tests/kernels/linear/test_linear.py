"""ops.linear: both numerics against float64 in every dtype, epilogue and layout; which backend ran; gradients; registration."""

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import ISA_LEVELS, cpu_isa, cpu_scratch
from fusewire.kernels.linear import native, reference
from fusewire.kernels.linear.op import _linear_op, _onednn_op
from tests.kernels.isa_levels import run_at
from tests.kernels.linear.served import BELOW_AVX2, FLOAT64, close, in_float64, layer, linear, needs_native, stock
from tests.kernels.on_reference import EXACT
from tests.layouts import LAYOUTS, one_at_a_time
from tests.tolerance import assert_close, assert_exact

# (shape of x, N): one row; no multiple of any block; the tail of a vector; a batch of tokens; two groups of rows, four slices, two blocks
SHAPES = [((1, 63), 65), ((3, 11, 40), 129), ((2, 77, 96), 80), ((1, 16, 1, 33), 129), ((1009, 1153), 70)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FAST = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = BELOW_AVX2


@FLOAT64
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, n", SHAPES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "silu"])
def test_activation(shape, n, dtype, activation):
    for bias in (True, False):
        args = layer(shape, n, dtype, bias)
        plain = stock(*args, activation or "none")
        assert_exact(ops.linear(*args, activation=activation), plain)
        assert_close(close(*args, activation=activation), in_float64(*args, activation or "none"), plain)


@pytest.mark.on_reference
@pytest.mark.parametrize("shape", [(1, 1536), (2, 1536), (8, 1536), (4, 2, 1536), (2, 15, 128)])
def test_few_rows(shape):
    """What the dispatcher takes for the modulations of a batch: PyTorch sums short products in many partial sums, which a tile's chain cannot match."""
    args = layer(shape, 2048, torch.float32)
    assert_close(ops.linear(*args, numerics="close"), in_float64(*args), stock(*args))


@needs_native
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("k, n", [(1, 1), (15, 7), (64, 33), (259, 70), (1536, 1000)])
def test_conditioning_vectors(k, n, activation):
    """batch-coupling: a row of [B, K] has the same bits in every batch up to 64 and for every layout, one thread or several; and keeps the rule of close."""
    x, weight, bias = layer((64, k), n, torch.float32)
    with forced("cpu"):
        whole = ops.linear(x, weight, bias, activation=activation, numerics="close")
        assert_close(whole, in_float64(x, weight, bias, activation or "none"), stock(x, weight, bias, activation or "none"))
        for rows in (slice(0, 1), slice(5, 7), slice(8, 13), slice(3, 64)):
            assert_exact(ops.linear(x[rows], weight, bias, activation=activation, numerics="close"), whole[rows])
        assert_exact(ops.linear(x[9], weight, bias, activation=activation, numerics="close"), whole[9])
        for layout in LAYOUTS:
            assert_exact(ops.linear(layout(x), weight, bias, activation=activation, numerics="close"), whole)
            assert_exact(ops.linear(x, layout(weight), bias, activation=activation, numerics="close"), whole)
    before = ops.stats()["linear"]
    ops.linear(x, weight, bias, activation=activation, numerics="close")
    ops.linear(torch.cat([x, x]), weight, bias, activation=activation, numerics="close")
    # Behind whichever product, an activation is a pass of the library's
    expected = {"cpu": 2} if activation else {"reference": 2} if native.INTEL else {"cpu": 1, "reference": 1}
    assert {name: calls - before[name] for name, calls in ops.stats()["linear"].items() if calls > before[name]} == expected


@needs_native
@pytest.mark.parametrize("tokens", (1, 20, 63, 64, 150))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gate_of_few_tokens(dtype, tokens):
    """Whoever multiplies so few, the gate is the product's."""
    x, weight, bias = layer((2, tokens, 96), 80, dtype)
    gate, residual = torch.randn(2, 80).to(dtype), torch.randn(2, tokens, 80).to(dtype)
    out = ops.linear(x, weight, bias, gate=gate, residual=residual, numerics="close")
    want = residual.double() + gate.double()[:, None] * F.linear(x.double(), weight.double(), bias.double())
    assert_close(out, want, residual + gate[:, None] * F.linear(x, weight, bias))
    calls = ops.stats()["linear"]
    assert calls["cpu"] == 1 and calls["reference"] == 0


@FLOAT64
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_shape", [(2, 80), (2, 1, 80), (2, 77, 80), (80,), None])
def test_gate_residual(dtype, gate_shape):
    x, weight, bias = layer((2, 77, 96), 80, dtype)
    gate = None if gate_shape is None else torch.randn(gate_shape).to(dtype)
    residual = torch.randn(2, 77, 80).to(dtype)
    plain = stock(x, weight, bias, "none", gate, residual)
    want = in_float64(x, weight, bias, "none", gate, residual)
    assert_exact(ops.linear(x, weight, bias, gate=gate, residual=residual), plain)
    assert_close(close(x, weight, bias, gate=gate, residual=residual), want, plain)


@pytest.mark.on_reference
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_reference_rounds_gate_and_residual_once(dtype):
    x, weight, bias = layer((2, 77, 96), 80, dtype)
    gate, residual = torch.randn(2, 80).to(dtype), torch.randn(2, 77, 80).to(dtype)
    want = (residual.float() + gate[:, None].float() * F.linear(x, weight, bias).float()).to(dtype)
    with forced("reference"):
        assert_exact(ops.linear(x, weight, bias, gate=gate, residual=residual, numerics="close"), want)


@needs_native
@FLOAT64
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout, dtype):
    """strided-input: the same bits for eight layouts of each tensor argument. (The stock product, which serves float64, has other bits for other
    layouts.)"""
    given = dict(zip(("x", "weight", "bias"), layer((2, 19, 24), 16, dtype))) | dict(gate=torch.randn(2, 1, 16).to(dtype), residual=torch.randn(2, 19, 16).to(dtype))
    for name, laid, plain in one_at_a_time(given, layout):
        got, want = close(**laid), close(**plain)
        if dtype is torch.float64:
            assert_close(got, want, want, name)
        else:
            assert_exact(got, want, name)
        assert_exact(ops.linear(**laid), stock(laid["x"], laid["weight"], laid["bias"], "none", laid["gate"], laid["residual"]), name)


@needs_native
@pytest.mark.parametrize("dtype", FAST)
def test_silent_off(dtype):
    """silent-off: close runs a fast product, exact never does."""
    args = layer((2, 64, native.AMX_INPUTS_FLOAT32), 256, dtype)
    with forced("cpu" if native.INTEL and cpu_isa() != "amx" else None):  # there, float32 is MKL's
        ops.linear(*args, numerics="close")
    assert {name: calls for name, calls in ops.stats()["linear"].items() if calls} == {"cpu": 1}
    ops.linear(*args)
    assert {name: calls for name, calls in ops.stats()["linear"].items() if calls} == {"cpu": 1, "reference": 1}


@pytest.mark.on_reference(reason="what is empty is left to PyTorch")
@pytest.mark.parametrize("shape, n", [((0, 4), 3), ((2, 0, 4), 3), ((2, 3, 0), 3), ((2, 3, 4), 0)])
@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("dtype", FAST)
def test_empty(shape, n, numerics, dtype):
    """empty: zero rows, zero inputs, zero outputs, forward and backward."""
    x, weight, bias = (t.requires_grad_() for t in layer(shape, n, dtype))
    out = ops.linear(x, weight, bias, activation="gelu_tanh", numerics=numerics)
    assert_exact(out, stock(x, weight, bias, "gelu_tanh"))
    out.sum().backward()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape and bias.grad.shape == bias.shape


@EXACT
@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("epilogue", [None, "gelu_tanh", "gelu", "silu", "gate"])
def test_gradients(numerics, epilogue):
    """Every input's gradient, against float64 autograd of the formula; the gradient of the output comes in expanded (strided-grad)."""
    x, weight, bias = layer((2, 45, 24), 1033, torch.float32)  # a bias's gradient needs a thousand values for a comparison of two maxima
    inputs = [x, weight, bias] + ([torch.randn(2, 1033), torch.randn(2, 45, 1033)] if epilogue == "gate" else [])
    activation = "none" if epilogue in (None, "gate") else epilogue

    def gradients(call, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        out = call(*leaves[:3], *(leaves[3:] or (None, None)))
        return torch.autograd.grad(out, leaves, torch.arange(1033.0, dtype=dtype).expand(out.shape))

    kind = None if activation == "none" else activation
    plain = gradients(lambda x, w, b, g, r: stock(x, w, b, activation, g, r), torch.float32)
    want = gradients(lambda x, w, b, g, r: in_float64(x, w, b, activation, g, r), torch.float64)
    for run in (ops.linear, linear):  # as dispatched, and by the library
        got = gradients(lambda x, w, b, g, r: run(x, w, b, activation=kind, gate=g, residual=r, numerics=numerics), torch.float32)
        for i in range(len(inputs)):
            assert_close(got[i], want[i], plain[i], f"input {i}")


@needs_native
def test_second_gradient():
    args = [t.requires_grad_() for t in layer((3, 8), 5, torch.float32)]
    first, = torch.autograd.grad(close(*args, activation="silu").sum(), args[:1], create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), args[:1])
    wide = [t.detach().double().requires_grad_() for t in args]
    want, = torch.autograd.grad(in_float64(*wide, "silu").sum(), wide[:1], create_graph=True)
    want, = torch.autograd.grad(want.square().sum(), wide[:1])
    assert (second.double() - want).abs().max() <= 1e-5 * want.abs().max()


@needs_native
@pytest.mark.parametrize("dtype", FAST)
def test_batch_coupling(dtype):
    """batch-coupling: one sample alone equals the same sample in a batch of 8."""
    x, weight, bias = layer((8, 77, 96), 80, dtype)
    together = close(x, weight, bias, activation="gelu_tanh")
    gate, residual = torch.randn(8, 1, 80).to(dtype), torch.randn(8, 77, 80).to(dtype)
    gated = close(x, weight, bias, gate=gate, residual=residual)
    for i in range(8):
        one = slice(i, i + 1)
        assert_exact(close(x[one], weight, bias, activation="gelu_tanh"), together[one])
        assert_exact(close(x[one], weight, bias, gate=gate[one], residual=residual[one]), gated[one])


@needs_native
@pytest.mark.parametrize("inputs", (96, 1300, 3210))
def test_few_rows_and_many(inputs):
    """batch-coupling: samples that a kernel of few rows serves alone, and one of many together. In AMX's bfloat16: in one slice and in several."""
    x, weight, bias = layer((5, 210, inputs), 500, torch.bfloat16)

    def library(x):  # whatever `close` would take
        return torch.ops.fusewire.linear(x, weight, bias, "silu", None, None, False)

    cpu_scratch(reset=True)
    together = library(x)
    assert cpu_scratch() > 0  # PyTorch's product takes none of the library's working memory
    for first in (0, 3):
        assert_exact(library(x[first:first + 2]), together[first:first + 2])
        assert_exact(library(x[first:first + 1, :30]), together[first:first + 1, :30])
    assert_close(together, *(make(x, weight, bias, activation="silu") for make in (in_float64, stock)))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unsplittable(dtype):
    """batch-coupling, nan: infinities, NaN and tiny rows, which AMX's bfloat16 parts cannot hold, come out as stock's and leave other rows alone."""
    x, weight, bias = layer((1, 70, 700), 100, dtype)
    clean = close(x, weight, None)
    x[0, 3, 5], x[0, 40, 7], x[0, 68] = torch.inf, torch.nan, x[0, 68] * 1e-6
    if dtype is torch.float32:
        x[0, 12], x[0, 13, 2] = x[0, 12] * 1e-34, torch.finfo(dtype).max
    got, want, plain = close(x, weight, None), in_float64(x, weight, None), stock(x, weight, None)
    touched = [3, 12, 13, 40, 68]
    rest = [i for i in range(70) if i not in touched]
    assert_exact(got[:, rest], clean[:, rest])
    assert got[0, 3].isinf().equal(plain[0, 3].isinf()) and (got[0, 3] == plain[0, 3]).all() and got[0, 40].isnan().all()
    for row in (12, 68):
        assert_close(got[:, row], want[:, row], plain[:, row], f"row {row}")
    weight[33, 4], weight[65] = torch.inf, weight[65] * 0 + torch.finfo(dtype).tiny
    got, want, plain = close(x[:, rest], weight, bias), in_float64(x[:, rest], weight, bias), stock(x[:, rest], weight, bias)
    assert_exact(got[..., 33], plain[..., 33])
    columns = [i for i in range(100) if i != 33]
    assert_close(got[..., columns], want[..., columns], plain[..., columns])


@pytest.mark.parametrize("level", ISA_LEVELS[1:-1])
def test_every_isa_level(level):
    """The same accuracy at each level below this processor's own (its own is what the other tests run at)."""
    run_at(level, __file__, "test_gate_residual or test_batch_coupling or test_unsplittable or (test_activation and 33)")


def test_alias():
    """alias: inputs keep their bits; the output is new storage."""
    x, weight, bias = layer((2, 5, 24), 24, torch.float32)
    gate, residual = torch.randn(2, 24), torch.randn(2, 5, 24)
    tensors = [x, weight, bias, gate, residual]
    before = [t.clone() for t in tensors]
    for numerics in ("exact", "close"):
        out = linear(x, weight, bias, numerics, gate=gate, residual=residual)
        assert all(torch.equal(t, b) for t, b in zip(tensors, before))
        assert out.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}


@pytest.mark.on_reference
def test_autocast():
    """autocast: the stock call runs, in the autocast dtype, for float32 inputs as for mixed ones."""
    x, weight, bias = layer((2, 40, 24), 16, torch.float32)  # of so many tokens that a kernel would serve them otherwise
    with torch.autocast("cpu", torch.bfloat16):
        for numerics in ("exact", "close"):
            assert_exact(ops.linear(x.bfloat16(), weight, bias, numerics=numerics), F.linear(x.bfloat16(), weight, bias))
            assert_exact(ops.linear(x, weight, bias, numerics=numerics), F.linear(x, weight, bias))
            assert ops.linear(x, weight, bias, numerics=numerics).dtype is torch.bfloat16


@pytest.mark.on_reference
def test_mixed_dtypes_are_left_to_the_reference():
    x, weight, bias = layer((2, 40, 24), 16, torch.float32)
    gate, residual = torch.randn(2, 16, dtype=torch.float64), torch.randn(2, 40, 16)
    for rest in ({"residual": residual.double()}, {"gate": gate, "residual": residual}):
        got = ops.linear(x, weight, bias, **rest, numerics="close")
        assert_exact(got, reference.linear(x, weight, bias, "none", rest.get("gate"), rest["residual"], False))
        assert got.dtype is torch.float64


@needs_native
def test_registration():
    for args in [layer((2, 7, 24), 16, torch.float32), layer((2, 7, 24), 16, torch.float32, bias=False)]:
        args[0].requires_grad_(), args[1].requires_grad_()
        torch.library.opcheck(_linear_op, (*args, "gelu_tanh", None, None, False))
        permuted = args[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
        torch.library.opcheck(_linear_op, (permuted, *args[1:], "none", torch.randn(2, 1, 16), torch.randn(2, 7, 16), False))
        torch.library.opcheck(_onednn_op, (*args, "gelu"))
        torch.library.opcheck(_onednn_op, (permuted, *args[1:], "silu"))


@EXACT
@needs_native
@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_compile_fullgraph(numerics):
    x, weight, bias = layer((2, 7, 24), 16, torch.float32)

    def f(x, weight, bias):
        return ops.linear(x, weight, bias, activation="gelu_tanh", numerics=numerics)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for backend in (None, "cpu") if numerics == "close" else (None,):  # so few rows are PyTorch's as dispatched
        with forced(backend):
            assert_exact(compiled(x, weight, bias), f(x, weight, bias))
            with torch.no_grad():
                assert_exact(compiled(x, weight, bias), f(x, weight, bias))


@pytest.mark.parametrize("change, error, words", [
    (dict(x=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "x has dtype torch.int64"),
    (dict(x=[1.0]), TypeError, "x is a list"),
    (dict(x=torch.zeros(2, 5)), ValueError, r"x has shape \[2, 5\]"),
    (dict(weight=torch.zeros(4)), ValueError, r"weight has shape \[4\]"),
    (dict(weight=torch.zeros(4, 3, dtype=torch.float64)), TypeError, "weight has dtype torch.float64"),
    (dict(bias=torch.zeros(4, dtype=torch.float16)), TypeError, "bias has dtype torch.float16; it should be torch.float32"),
    (dict(bias=torch.zeros(3)), ValueError, r"bias has shape \[3\]; it should be \[4\]"),
    (dict(weight=torch.zeros(4, 3, device="meta")), ValueError, "weight is on meta"),
    (dict(activation="relu"), ValueError, "activation is 'relu'"),
    (dict(numerics="fast"), ValueError, "numerics is 'fast'"),
    (dict(gate=torch.zeros(4)), ValueError, "gate is given without residual"),
    (dict(residual=torch.zeros(2, 3)), ValueError, r"residual has shape \[2, 3\]; it should be \[2, 4\]"),
    (dict(residual=torch.zeros(2, 4), gate=torch.zeros(3, 4)), ValueError, r"gate has shape \[3, 4\]"),
    (dict(residual=torch.zeros(2, 4), activation="gelu"), ValueError, "activation is 'gelu'; it should be None"),
])
def test_bad_input(change, error, words):
    call = dict(x=torch.zeros(2, 3), weight=torch.zeros(4, 3), bias=None) | change
    with pytest.raises(error, match=words):
        ops.linear(call.pop("x"), call.pop("weight"), call.pop("bias"), **call)


@needs_native
@pytest.mark.parametrize("dtype", FAST, ids=str)
@pytest.mark.parametrize("shape, n", [((2, 0, 512), 256), ((0, 64, 512), 256), ((0, 512), 256), ((2, 64, 512), 0)])
def test_no_rows_or_columns_in_a_graph(shape, n, dtype):
    """empty: what dispatch leaves to PyTorch comes to the registered op from an exported graph."""
    x, weight, _ = layer(shape, n, dtype)
    assert torch.ops.fusewire.linear(x, weight, None, "none", None, None, False).shape == (*shape[:-1], n)
    if n:
        for out in torch.ops.fusewire.linear_activated(x, weight, torch.randn(n).to(dtype), "gelu"):
            assert out.shape == (*shape[:-1], n)
