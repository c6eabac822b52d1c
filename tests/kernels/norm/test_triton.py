"""The Triton kernels of the norms in the interpreter: indexing, masks, layouts, sums over rows. (Races and speed: tests/gpu.)"""

import pytest
import torch

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.kernels.norm import triton_kernel, triton_limits
from tests.kernels.interpreted import DTYPES, in_triton, needs_interpreter
from tests.kernels.norm.cases import call, inputs, leaves, stock, true, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = needs_interpreter
KINDS = ("rms", "rms-torch", "layer", "layer-float32")


def gradients(kind, v, grad, backend="triton", function=None):
    these, wanted = leaves(v)
    with dispatch.forced(backend):
        out = call(kind, these, numerics="close") if function is None else function(these)
        return (out, *torch.autograd.grad(out, wanted, grad.to(out.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels, affine", [(1, "plain"), (63, "weight-bias"), (72, "weight"), (128, "plain"), (2049, "weight-bias")])
def test_values(kind, dtype, channels, affine):
    """tail: one channel; a tail; no multiple of 16; whole vectors; more than a tile of rows. Forward and backward."""
    v, grad = inputs(5, channels, dtype, kind, affine), torch.randn(2, 5, channels).to(dtype)
    got = gradients(kind, v, grad)
    plain = gradients(kind, v, grad, None, lambda v: stock(kind, v))
    want = gradients(kind, wide(v), grad, None, lambda v: true(kind, v))
    names = ["result", *(name for name, t in v.items() if t is not None)]
    for name, mine, theirs, exactly in zip(names, got, plain, want, strict=True):
        if channels == 1 and name == "x":  # dx is what rounding leaves of a difference of equals
            assert ((mine - exactly).abs() <= 4 * torch.finfo(dtype).eps * (grad / v["x"]).abs()).all()
        else:
            assert_close(mine, exactly, theirs, f"{kind} {name}")
    assert ops.stats()[("rms" if kind.startswith("rms") else "layer") + "_norm_backward"]["triton"] == 1


@pytest.mark.parametrize("steps", (1, 2, 5))
def test_sums_over_many_tiles(monkeypatch, steps):
    """A program of the backward that walks over several tiles, the last one cut short, and programs beyond the rows."""
    v, grad = inputs(37, 600, kind="layer", batch=1), torch.randn(1, 37, 600)
    want = gradients("layer", v, grad)
    monkeypatch.setattr(triton_kernel, "PROGRAMS", -(-13 // steps))
    for got, expected in zip(gradients("layer", v, grad), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_strided_input(kind, layout):
    v, grad = inputs(6, 64, torch.bfloat16, kind), torch.randn(2, 2, 3, 64).to(torch.bfloat16)
    v["x"] = v["x"].view(2, 2, 3, 64)
    want = gradients(kind, v, grad)
    for got, expected in zip(gradients(kind, {name: layout(t) for name, t in v.items()}, layout(grad)), want, strict=True):
        assert_exact(got, expected)


def test_batch_coupling():
    v, grad = inputs(3, 40, batch=8), torch.randn(8, 3, 40)
    for kind in ("rms", "layer"):
        together, alone = gradients(kind, v, grad), gradients(kind, {**v, "x": v["x"][5:6]}, grad[5:6])
        assert_exact(alone[0], together[0][5:6])
        assert_exact(alone[1], together[1][5:6])


def test_cancellation():
    x = 100 + 0.01 * torch.randn(1, 4, 1536)
    with in_triton("layer_norm"):
        got = ops.layer_norm(x, eps=1e-6, numerics="close")
    assert_close(got, true("layer", {"x": x.double(), "weight": None, "bias": None}), stock("layer", {"x": x, "weight": None, "bias": None}))


@pytest.mark.parametrize("channels", (1536, 4096))
def test_cancellation_in_gradients(channels):
    """cancellation: mean 100, standard deviation 0.01."""
    v, grad = {"x": 100 + 0.01 * torch.randn(1, 8, channels), "weight": torch.ones(channels), "bias": None}, torch.randn(1, 8, channels)

    def found(v, grad, function):
        these, leaf = leaves(v)
        with dispatch.forced("triton"):
            return torch.autograd.grad(function("layer", these, eps=1e-12), leaf, grad)

    pairs = zip(found(v, grad, lambda *args, **options: call(*args, numerics="close", **options)), found(wide(v), grad.double(), true))
    for name, (got, want) in zip(("x", "weight"), pairs):
        assert ((got - want).abs().amax(-1) / want.abs().amax(-1)).max() <= 1e-5, name


def test_limits():
    """silent-off: the last program of the backward may count on beyond the rows, in 32 bits."""
    x = torch.empty(1).expand(2**16, 2**15, 1)
    arguments = x[:2**15 + 1], x[:2**15 + 1], None, 1e-6, True, True, True
    with dispatch.forced("triton"):
        assert not triton_limits.why_not_norm(x[:2**15 + 1], None, None, 1e-6, False, False)
        assert f"more than {2**30} rows" in triton_limits.why_not_backward(*arguments)
        assert not triton_limits.why_not_backward(x[:2**15], x[:2**15], *arguments[2:])
        assert "rows" in triton_limits.why_not_norm(x, None, None, 1e-6, False, False)


def test_fp16_overflow():
    x = torch.full((2, 512), 1000.0, dtype=torch.float16)
    x[:, ::2] *= -1
    with in_triton("rms_norm"), in_triton("layer_norm"):
        assert (ops.rms_norm(x, numerics="close").abs() == 1).all() and (ops.layer_norm(x, numerics="close").abs() == 1).all()


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0), (0,)])
def test_empty(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    with dispatch.forced("triton"):
        out = ops.layer_norm(x, weight, numerics="close")
        dx, dw = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == dx.shape == shape and not dw.any()


def test_exact_is_left_to_pytorch():
    with dispatch.forced("triton"), pytest.raises(RuntimeError, match="numerics='exact' keeps PyTorch's own norm"):
        ops.rms_norm(torch.ones(2, 8))
