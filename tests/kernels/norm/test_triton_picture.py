"""The Triton kernels of layer_norm_2d in the interpreter: both memory formats, masks, layouts, sums over channels and over pixels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.kernels.norm import reference, triton_limits
from tests.effort import EFFORT, examples
from tests.kernels.interpreted import DTYPES, check_registered, in_triton, needs_interpreter, unchanged
from tests.kernels.norm.cases import leaves, stock, true, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_within

pytestmark = needs_interpreter


def inputs(shape, dtype=torch.float32, affine=(True, True)) -> dict:
    """x [B, C, H, W], weight and bias [C] or None."""
    weight, bias = (torch.randn(shape[1]).to(dtype) if there else None for there in affine)
    return {"x": (1.5 * torch.randn(shape) + 0.5).to(dtype), "weight": weight, "bias": bias}


def gradients(v, grad, backend="triton", function=None) -> dict[str, torch.Tensor]:
    """The result and the gradients of what is there; without ``function`` those of the op, which Triton must have computed."""
    these, wanted = leaves(v)
    counts = ops.stats()
    with dispatch.forced(backend):
        out = ops.layer_norm_2d(*these.values(), eps=1e-6, numerics="close") if function is None else function("layer-2d", these)
        found = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    if function is None:
        after = ops.stats()
        assert all(after[name]["triton"] == counts[name]["triton"] + 1 for name in ("layer_norm_2d", "layer_norm_2d_backward"))
    return dict(zip(["result", *(name for name, t in v.items() if t is not None)], (out.detach(), *found), strict=True))


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, affine", [((2, 40, 5, 5), (True, True)), ((1, 300, 4, 9), (True, False)), ((3, 63, 1, 7), (False, True)),
                                           ((1, 128, 16, 1), (False, False)), ((1, 2, 64, 65), (True, True))], ids=str)
def test_values(shape, affine, dtype, format):
    """tail: of channels and of pixels; several steps over the channels; many pixels, whose tiles are others."""
    v, grad = inputs(shape, dtype, affine), torch.randn(shape).to(dtype)
    v["x"] = v["x"].contiguous(memory_format=format)
    check = unchanged(*v.values(), grad)
    got, plain = gradients(v, grad), gradients(v, grad, None, stock)
    for name, want in gradients(wide(v), grad, None, true).items():
        if name in ("result", "x"):
            assert_close(got[name], want, plain[name], name)
            assert got[name].is_contiguous(memory_format=format)
        else:
            assert_within(got[name], want, 4, name)
    check()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strided_input(dtype, layout):
    """strided-input, misaligned, strided-grad: the same values in any layout give the same bits, one memory format or the other."""
    v, grad = inputs((2, 24, 4, 6), dtype), torch.randn(2, 24, 4, 6).to(dtype)
    v["x"][1], grad[1] = v["x"][0], grad[0]  # so that an expanded layout exists
    want = gradients(v, grad)
    pixels_apart = v | {"x": v["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)}
    for laid, of_grad in (({name: layout(t) for name, t in v.items()}, grad), (v, layout(grad)), (pixels_apart, grad),
                          (v | {"x": v["x"].contiguous(memory_format=torch.channels_last)}, layout(grad))):
        for name, got in gradients(laid, of_grad).items():
            assert_exact(got, want[name], name)


@settings(max_examples=examples(100), deadline=None)
@given(st.integers(1, 2), st.integers(8, 40), st.integers(1, 4), st.integers(1, 5), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
       st.sampled_from((torch.contiguous_format, torch.channels_last)), st.integers(0, 2**31))
def test_property(batch, channels, height, width, dtype, weight, bias, format, seed):
    """tail: any picture, in either memory format: every element within a few units of float64, and the same bits in both."""
    torch.manual_seed(seed)
    v, grad = inputs((batch, channels, height, width), dtype, (weight, bias)), torch.randn(batch, channels, height, width).to(dtype)
    got, want = gradients(v | {"x": v["x"].contiguous(memory_format=format)}, grad), gradients(wide(v), grad, None, true)
    for name in want:
        assert_within(got[name], want[name], 16, name)
    if EFFORT > 1:  # in `make test` test_strided_input says it
        for other in (torch.contiguous_format, torch.channels_last):
            for name, again in gradients(v | {"x": v["x"].contiguous(memory_format=other)}, grad).items():
                assert_exact(again, got[name], name)


def test_strided_grad():
    """strided-grad: `.sum()`, whose gradient has stride 0 everywhere."""
    v = inputs((1, 12, 3, 4))
    want = gradients(v, torch.ones(1, 12, 3, 4))
    for name, got in gradients(v, torch.ones(()).expand(1, 12, 3, 4)).items():
        assert_exact(got, want[name], name)


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_batch_coupling(format):
    """batch-coupling: a picture alone has the result and the gradient that it has among 3."""
    v, grad = inputs((3, 40, 5, 6)), torch.randn(3, 40, 5, 6)
    v["x"] = v["x"].contiguous(memory_format=format)
    whole, alone = gradients(v, grad), gradients(v | {"x": v["x"][1:2]}, grad[1:2])
    for name in ("result", "x"):
        assert_exact(alone[name], whole[name][1:2], name)


@pytest.mark.parametrize("wanted", (("x",), ("weight",), ("bias",), ("weight", "bias")), ids=str)
def test_some_gradients(wanted):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v, grad = inputs((2, 40, 5, 5)), torch.randn(2, 40, 5, 5)
    want = gradients(v, grad)
    these = {name: t.detach().requires_grad_(name in wanted) for name, t in v.items()}
    with dispatch.forced("triton"):
        found = torch.autograd.grad(ops.layer_norm_2d(*these.values(), numerics="close"), [these[name] for name in wanted], grad)
    for name, got in zip(wanted, found, strict=True):
        assert_exact(got, want[name], name)


@pytest.mark.parametrize("shape", ((0, 8, 2, 3), (2, 0, 2, 3), (2, 8, 0, 3), (2, 8, 2, 0)), ids=str)
def test_empty(shape):
    """empty: a zero in each dimension; sums over no pixels are zero."""
    v = inputs(shape)
    for name, got in gradients(v, torch.ones(shape)).items():
        assert got.shape == (shape if name == "result" else v[name].shape) and not got.any(), name


def test_cancellation():
    """cancellation: mean 100, standard deviation 0.01, forwards and backwards; a constant picture has no square root of a negative number."""
    v, grad = {"x": 100 + 0.01 * torch.randn(1, 1536, 2, 3), "weight": torch.ones(1536), "bias": None}, torch.randn(1, 1536, 2, 3)
    these, leaf = leaves(v)
    with dispatch.forced("triton"):
        out = ops.layer_norm_2d(these["x"], these["weight"], eps=1e-12, numerics="close")
        found = (out, *torch.autograd.grad(out, leaf, grad))
    these, leaf = leaves(wide(v))
    out = true("layer-2d", these, 1e-12)
    for name, got, want in zip(("result", "x", "weight"), found, (out, *torch.autograd.grad(out, leaf, grad.double()))):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name
    with in_triton("layer_norm_2d"):
        assert ops.layer_norm_2d(torch.full((1, 1000, 1, 4), 1234567.0), eps=1e-30, numerics="close").isfinite().all()


def test_fp16_overflow():
    """fp16-overflow: squares that do not fit fp16."""
    x = torch.full((1, 512, 2, 2), 1000.0, dtype=torch.float16)
    x[:, ::2] *= -1
    with in_triton("layer_norm_2d"):
        assert (ops.layer_norm_2d(x, numerics="close").abs() == 1).all()


def test_exact_is_left_to_pytorch():
    with dispatch.forced("triton"), pytest.raises(RuntimeError, match="numerics='exact' keeps PyTorch's own norm"):
        ops.layer_norm_2d(torch.ones(2, 8, 1, 1))


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_fake_mismatch(format):
    """fake-mismatch: opcheck of the Triton rows' own ops; they mean what the references mean, in either memory format."""
    v, grad = inputs((2, 8, 3, 4)), torch.randn(2, 8, 3, 4)
    x = v["x"].contiguous(memory_format=format)
    for name, arguments in (("layer_norm_2d", (x, v["weight"], v["bias"], 1e-6, False)), ("layer_norm_2d_backward", (grad, x, v["weight"], 1e-6, True, True, True)),
                            ("layer_norm_2d_backward", (grad, x, None, 1e-6, False, False, True))):
        check_registered(name, getattr(reference, name), arguments)


def test_limits():
    """silent-off: what the rows decline, and why; any number of channels is served."""
    with dispatch.forced("triton"):
        x = torch.empty(1).expand(2, 40000, 3, 4)
        assert not triton_limits.why_not_picture(x, None, None, 1e-6, False)
        assert not triton_limits.why_not_picture_backward(x, x, None, 1e-6, True, True, True)
        assert "pixels" in triton_limits.why_not_picture(torch.empty(1).expand(2**15, 1, 2**8, 2**8), None, None, 1e-6, False)
        assert "torch.float64" in triton_limits.why_not_picture_backward(x, x.double(), None, 1e-6, True, True, True)
