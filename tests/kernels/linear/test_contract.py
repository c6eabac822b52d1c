"""ops.linear, what every op promises: far strides, overflow, unbiased rounding, the same bits again."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.library import CPU, cpu_isa
from fusewire.kernels.linear import reference
from tests.kernels.linear.served import BELOW_AVX2, close, linear
from tests.kernels.on_reference import EXACT
from tests.tolerance import assert_close, assert_exact, assert_unbiased

FAST = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = BELOW_AVX2
needs_native = pytest.mark.skipif(not CPU.loaded or cpu_isa() == "base", reason="the compiled library does not serve linear here")


def layer(rows, k, n, dtype):
    return torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int32_stride(dtype):
    """Three rows of x, then of the weight, of the gate and of the residual, 2^30 elements apart (memory that is never touched in between)."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=dtype), (3, 40), (2**30, 1))
    x, weight, bias = layer(3, 40, 3, dtype)
    given = {"x": x, "weight": weight, "bias": bias, "residual": torch.randn(3, 3).to(dtype), "gate": torch.randn(3, 3).to(dtype)}
    want = close(**given)
    for name in ("x", "weight", "gate", "residual"):
        laid = far[:, :given[name].shape[1]]
        laid.copy_(given[name])
        assert_exact(close(**{**given, name: laid}), want, name)
    assert ops.stats()["linear"]["cpu"] == 5


@needs_native
def test_fp16_overflow():
    """A product of 1.3e5, over float16's 65504, that the gate makes small again: the sum is kept in float32 until the end."""
    x, weight = torch.full((5, 64), 200.0, dtype=torch.float16), torch.full((16, 64), 10.0, dtype=torch.float16)
    weight += torch.rand(16, 1).half()
    gate, residual = torch.full((16,), 1e-3, dtype=torch.float16), torch.randn(5, 16).half()
    got = close(x, weight, None, gate=gate, residual=residual)
    assert ops.stats()["linear"]["cpu"] == 1 and got.isfinite().all()
    want = residual.double() + gate.double() * (x.double() @ weight.double().T)
    assert_close(got, want, want.half())


@needs_native
@pytest.mark.parametrize("gated", [False, True])
def test_biased_cast(gated):
    """The mean signed error of 2^20 outputs, whose magnitudes are between 1 and 2, is within 0.02 units in the last place."""
    x, weight, _ = layer(4096, 32, 256, torch.bfloat16)
    x, weight, bias = x.clamp(-1, 1) / 32, weight.clamp(-0.4, 0.4), torch.tensor([1.5, -1.5], dtype=torch.bfloat16).repeat(128)
    rest = {"gate": torch.ones(256, dtype=torch.bfloat16), "residual": torch.zeros(4096, 256, dtype=torch.bfloat16)} if gated else {}
    got, want = ops.linear(x, weight, bias, **rest, numerics="close"), x.double() @ weight.double().T + bias.double()
    assert 1 < want.abs().min() and want.abs().max() < 2 and got.numel() == 2**20 and ops.stats()["linear"]["cpu"] == 1
    assert_unbiased(got, want)


@EXACT
@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("dtype", FAST)
def test_nondeterminism(dtype, numerics):
    x, weight, bias = layer(77, 300, 129, dtype)
    rest = {"gate": torch.randn(129).to(dtype), "residual": torch.randn(77, 129).to(dtype)}
    for run in (ops.linear, linear):  # as dispatched, and by the library
        want = run(x, weight, bias, **rest, numerics=numerics)
        for _ in range(20):
            assert_exact(run(x, weight, bias, **rest, numerics=numerics), want)


@needs_native
@pytest.mark.parametrize("dtype", FAST)
def test_nondeterminism_over_threads(dtype):
    """Our own product gives the same bits on any number of threads."""
    x, weight, bias = layer(300, 300, 129, dtype)
    rest = {"gate": torch.randn(129).to(dtype), "residual": torch.randn(300, 129).to(dtype)}
    want, threads = close(x, weight, bias, **rest), torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert_exact(close(x, weight, bias, **rest), want, f"{n} threads")
    finally:
        torch.set_num_threads(threads)
    assert ops.stats()["linear"]["cpu"] == 4


@pytest.mark.on_reference(reason="no kernel takes float64")
@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("epilogue", [None, "gelu_tanh", "gelu", "silu", "residual", "gate"])
def test_gradcheck(epilogue, numerics):
    """First and second derivatives in float64 of every argument."""
    names = ["x", "weight", "bias"] + ["residual"] * (epilogue in ("residual", "gate")) + ["gate"] * (epilogue == "gate")
    shapes = {"x": (2, 3, 4), "weight": (5, 4), "bias": (5,), "residual": (2, 3, 5), "gate": (2, 5)}
    wanted = [torch.randn(shapes[name], dtype=torch.float64, requires_grad=True) for name in names]
    rest = {} if epilogue in (None, "residual", "gate") else {"activation": epilogue}

    def run(*tensors):
        return ops.linear(**dict(zip(names, tensors)), **rest, numerics=numerics)

    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted, atol=1e-4, fast_mode=True)


@pytest.mark.on_reference
def test_autocast_against_reference():
    """autocast: with gate and residual, too, what stock's calls give under it."""
    x, weight, bias = layer(5, 24, 16, torch.float32)
    gate, residual = torch.randn(16), torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.linear(x, weight, bias, gate=gate, residual=residual, numerics="close")
        want = reference.linear(x, weight, bias, "none", gate, residual, False)
    assert_exact(got, want)
