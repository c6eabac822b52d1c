"""Which product serves a linear: the library's, oneDNN's or PyTorch's, with what the library does behind it."""

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.linear import native
from tests.kernels.linear.served import BELOW_AVX2, in_float64, layer, needs_native, stock
from tests.tolerance import assert_close, assert_exact

pytestmark = BELOW_AVX2


@needs_native
@pytest.mark.parametrize("tokens, ours", [(63, False), (64, True), (150, True)])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
@torch.no_grad()  # the registered op calls oneDNN as it was found at import
def test_bfloat16_on_an_intel_without_amx(tokens, ours, activation, monkeypatch):
    """Where bfloat16 is multiplied as float32: from so many tokens on this library serves, at any batch, and keeps the rule of close; float16's stay PyTorch's."""
    monkeypatch.setattr(native, "WIDENED", True)
    served, onednn = [], native.onednn
    monkeypatch.setattr(native, "onednn", lambda *args: (served.append(1), onednn(*args))[1])
    args = layer((3, tokens, 96), 80, torch.bfloat16)
    with forced("cpu"):
        got = ops.linear(*args, activation=activation, numerics="close")
    assert not (ours and served) and (ours or served or not native.ONEDNN_BFLOAT16)
    assert_close(got, in_float64(*args, activation or "none"), stock(*args, activation or "none"))
    with forced("cpu"):
        assert_exact(ops.linear(args[0][1:2], *args[1:], activation=activation, numerics="close"), got[1:2])
    monkeypatch.setattr(native, "FLOAT16_PRODUCTS", True)
    halves = layer((3, tokens, 96), 80, torch.float16)
    assert native.product_is_pytorchs(*halves[:2])
    before, backend = ops.stats()["linear"], "cpu" if activation else "reference"
    ops.linear(*halves, activation=activation, numerics="close")
    assert ops.stats()["linear"][backend] == before[backend] + 1


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_gate_of_pytorchs_product(dtype, recorded, monkeypatch):
    """Gate and residual behind PyTorch's product are one pass of the library's, where a sample has one gate; values and gradients keep the rule."""
    monkeypatch.setattr(native, "product_is_pytorchs", lambda x, weight: "it is faster")
    x, weight, bias = layer((2, 50, 96), 80, dtype)
    residual = torch.randn(2, 50, 80).to(dtype)
    for gate, fused in ((torch.randn(2, 80), 1), (torch.randn(2, 1, 80), 1), (torch.randn(2, 50, 80), 0)):
        leaves = [t.clone().requires_grad_(recorded) for t in (x, weight, bias, gate.to(dtype), residual)]
        before = ops.stats()
        out = ops.linear(*leaves[:3], gate=leaves[3], residual=leaves[4], numerics="close")
        after = ops.stats()
        assert [after[op]["cpu"] - before[op]["cpu"] for op in ("linear", "gate_residual")] == [fused, fused]

        def plain(kind):
            given = [t.detach().to(kind).requires_grad_() for t in leaves]
            gates = given[3].unsqueeze(1) if gate.dim() == 2 else given[3]
            return given, given[4] + gates * F.linear(*given[:3])

        (wide, true), (narrow, eager) = plain(torch.float64), plain(dtype)
        assert_close(out, true, eager)
        if recorded:
            grad = torch.randn_like(out)
            for got, want, theirs in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(true, wide, grad.double()), torch.autograd.grad(eager, narrow, grad)):
                assert_close(got, want, theirs)


@needs_native
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_activation_of_pytorchs_product(dtype, activation, recorded, monkeypatch):
    """Where PyTorch multiplies faster, bias and activation are one pass of the library's behind its product: values and gradients keep the rule, in any layout."""
    monkeypatch.setattr(native, "product_is_pytorchs", lambda x, weight: "it is faster")
    x, weight, bias = layer((2, 50, 96), 80, dtype)
    before = {name: dict(counts) for name, counts in ops.stats().items()}
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[:, :, None].expand(-1, -1, 2, -1)[:, :, 1]):
        leaves = [t.clone().requires_grad_(recorded) if t is not x else t for t in (given, weight, bias)]
        out = ops.linear(*leaves, activation=activation, numerics="close")
        want, plain = in_float64(x, weight, bias, activation), stock(x, weight, bias, activation)
        assert_close(out, want, plain)
        if recorded:
            grad = torch.randn_like(out)
            found = torch.autograd.grad(out, leaves[1:], grad)
            wide, narrow = ([t.detach().to(kind).requires_grad_() for t in (x, weight, bias)] for kind in (torch.float64, dtype))
            true = torch.autograd.grad(stock(*wide, activation), wide[1:], grad.double())
            eager = torch.autograd.grad(stock(*narrow, activation), narrow[1:], grad)
            for got, expected, theirs in zip(found, true, eager):
                assert_close(got, expected, theirs)
    after = ops.stats()
    assert after["linear"]["cpu"] == before["linear"]["cpu"] + 3 and after["linear"]["reference"] == before["linear"]["reference"]
    assert after["bias_activation"]["cpu"] == before["bias_activation"]["cpu"] + 3


@needs_native
@pytest.mark.parametrize("shape, n, of_x, of_weight", [((2, 64, 96), 80, True, False), ((2, 63, 96), 80, False, False), ((1100, 1024), 1025, False, True)])
def test_gradients_on_an_intel_without_amx(shape, n, of_x, of_weight, monkeypatch):
    """Which of the products of bfloat16's gradients are this library's there; each keeps the rule."""
    monkeypatch.setattr(native, "WIDENED", True)
    ran, ours = [], native._ours
    monkeypatch.setattr(native, "_ours", lambda *args: (ran.append(1), ours(*args))[1])
    x, weight, _ = layer(shape, n, torch.bfloat16)
    dy = torch.randn(*shape[:-1], n).to(torch.bfloat16)
    for wanted, expected in (((True, False), of_x), ((False, True), of_weight)):
        ran.clear()
        got = native.products_backward(dy, x, weight, *wanted)[wanted[1]]
        assert bool(ran) is expected
        of = lambda dy, x, weight: dy @ weight if wanted[0] else dy.flatten(0, -2).t() @ x.flatten(0, -2)  # noqa: E731
        assert_close(got, of(dy.double(), x.double(), weight.double()), of(dy, x, weight))


@pytest.mark.skipif(not native.ONEDNN_BFLOAT16, reason="oneDNN has no bfloat16 here")
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "gelu", "silu"])
def test_long_bfloat16_is_never_left_to_stock(activation):
    args = layer((1, 300, 64), 256, torch.bfloat16)
    got = ops.linear(*args, activation=activation, numerics="close")
    assert {name: calls for name, calls in ops.stats()["linear"].items() if calls} == {"cpu": 1}
    assert_close(got, in_float64(*args, activation or "none"), stock(*args, activation or "none"))


def test_what_serves_bfloat16_on_amx(monkeypatch):
    """Ours but for few tokens, few inputs, and few weights with many tokens; the batch does not choose."""
    monkeypatch.setattr(native, "ISA", "amx")
    monkeypatch.setattr(native, "WIDENED", False)
    monkeypatch.setattr(native, "ONEDNN_BFLOAT16", True)

    def ours(tokens, inputs, outputs, activation="none", batch=1):
        x, weight = torch.empty(batch, tokens, inputs, dtype=torch.bfloat16), torch.empty(outputs, inputs, dtype=torch.bfloat16)
        return not native.onednn_serves(x, weight, activation, None, None)

    assert ours(32, 768, 768) and ours(256, 1152, 1152) and ours(4096, 3072, 3072, "gelu_tanh") and ours(256, 1152, 4608, "gelu")
    assert not ours(31, 768, 768, batch=4) and not ours(32, 767, 768) and not ours(4096, 1280, 320)


@pytest.mark.parametrize("tokens", (1, 2, 10, 15, 16, 47, 48, 300))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_batch_does_not_choose_the_backend(tokens, dtype):
    """batch-coupling: how many samples there are has no say in which library multiplies one."""
    weight, found = torch.randn(256, 1024).to(dtype), set()  # as many inputs as it takes for tiles to be an answer
    for batch in (1, 2, 8, 50):
        x = torch.zeros(batch, tokens, 1024, dtype=dtype)
        found.add((*(choice.backend for choice in ops.backends("linear", x, weight, numerics="close") if choice.runs),
                   native.onednn_serves(x, weight, "none", None, None)))
    assert len(found) == 1
