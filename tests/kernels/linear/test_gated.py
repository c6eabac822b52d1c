"""``ops.linear`` with a gated activation: diffusers' GEGLU and SwiGLU bit for bit in ``exact``, against float64 in ``close``, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.linear.served import BELOW_AVX2
from tests.kernels.on_reference import EXACT
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = {"geglu": F.gelu, "swiglu": F.silu}
pytestmark = BELOW_AVX2


def inputs(shape=(2, 40, 96), n=80, dtype=torch.float32, bias=True) -> dict:
    k = shape[-1]
    return {"x": torch.randn(shape).to(dtype), "weight": (2 * torch.randn(2 * n, k) / k**0.5).to(dtype),
            "bias": torch.randn(2 * n).to(dtype) if bias else None}


def stock(v: dict, activation: str) -> torch.Tensor:
    hidden, gate = F.linear(v["x"], v["weight"], v["bias"]).chunk(2, dim=-1)
    return hidden * ACTIVATIONS[activation](gate)


def wide(v: dict) -> dict:
    return {name: None if t is None else t.double() for name, t in v.items()}


def gradients(run, v: dict, grad) -> list[torch.Tensor]:
    v = {name: None if t is None else t.detach().requires_grad_() for name, t in v.items()}
    return torch.autograd.grad(run(v), [t for t in v.values() if t is not None], grad)


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "plain"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, dtype, bias):
    """tail, silent-off: exact is stock's bit for bit, forwards and backwards; close keeps the rule, and its activation is the CPU library's."""
    v, grad = inputs(dtype=dtype, bias=bias), torch.randn(2, 40, 80).to(dtype)
    exact, close = (lambda v, numerics=numerics: ops.linear(**v, activation=activation, numerics=numerics) for numerics in ("exact", "close"))
    plain, true = (lambda v: stock(v, activation)), wide(v)
    assert_exact(exact(v), plain(v))
    for got, want in zip(gradients(exact, v, grad), gradients(plain, v, grad), strict=True):
        assert_exact(got, want)
    ops.reset_stats()
    assert_close(close(v), plain(true), plain(v))
    assert not CPU.loaded or ops.stats()[activation]["cpu"] == 1
    for got, want, eager in zip(gradients(close, v, grad), gradients(plain, true, grad.double()), gradients(plain, v, grad), strict=True):
        assert_close(got, want, eager)
    assert not CPU.loaded or ops.stats()[f"{activation}_backward"]["cpu"] == 1


@EXACT
@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(layout, numerics):
    """strided-input: the activation reads the product where it lies; the arguments in any layout are the same layer, within the rule of close."""
    v = inputs(n=12)
    for activation in ACTIVATIONS:
        laid = {name: layout(t) for name, t in v.items()}
        assert_close(ops.linear(**laid, activation=activation, numerics=numerics), stock(wide(v), activation), stock(v, activation))


def test_stock_module():
    """diffusers' GEGLU and SwiGLU, projection included."""
    activations = pytest.importorskip("diffusers.models.activations")
    for module, name in ((activations.GEGLU(24, 40), "geglu"), (activations.SwiGLU(24, 40), "swiglu")):
        x = torch.randn(2, 9, 24)
        assert_exact(ops.linear(x, module.proj.weight, module.proj.bias, activation=name), module(x))
        ops.linear(x, module.proj.weight, module.proj.bias, activation=name, numerics="close")


@EXACT
@pytest.mark.parametrize("numerics", ("exact", "close"))
def test_autocast(numerics):
    """autocast: float32 parameters, and the dtype of stock's projection."""
    v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = ops.linear(**v, activation="geglu", numerics=numerics), stock(v, "geglu")
    assert_exact(got, plain) if numerics == "exact" else assert_close(got, stock(wide(v), "geglu"), plain)


def test_compile():
    """No graph break, and the same bits."""
    def run(v):
        return [ops.linear(**v, activation=activation, numerics=numerics) for activation in ACTIVATIONS for numerics in ("exact", "close")]

    v = inputs()
    for got, want in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(v), run(v), strict=True):
        assert torch.equal(got, want)


def test_backends():
    """``ops.backends`` answers for the product; a forced backend holds for both calls."""
    v = inputs()
    assert sum(choice.runs for choice in ops.backends("linear", **v, activation="geglu", numerics="close")) == 1
    with forced("cpu"), pytest.raises(RuntimeError, match="numerics='exact' keeps the stock matrix product"):
        ops.linear(**v, activation="swiglu")
    ops.linear(**v, activation="swiglu", numerics="close")


X, W = torch.ones(2, 3, 8), torch.ones(10, 8)
BAD = {
    "odd": (dict(weight=torch.ones(9, 8)), ValueError, r"weight has shape \[9, 8\]; for activation 'geglu' it should be \[2N, K\]"),
    "bias of one half": (dict(bias=torch.ones(5)), ValueError, r"bias has shape \[5\]; it should be \[10\]"),
    "residual": (dict(residual=torch.ones(2, 3, 10)), ValueError, "activation is 'geglu'; it should be None where residual is given"),
    "gate": (dict(gate=torch.ones(2, 5)), ValueError, "gate is given without residual"),
    "numerics": (dict(numerics="fast"), ValueError, "numerics is 'fast'"),
    "dtype": (dict(weight=W.half()), TypeError, "weight has dtype torch.float16"),
    "no such": (dict(activation="reglu"), ValueError, "'silu', 'geglu' or 'swiglu'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    keywords, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ops.linear(**{"x": X, "weight": W, "activation": "geglu", **keywords})
    assert all(sum(counts.values()) == 0 for counts in ops.stats().values())
