"""The adaLN CUDA kernel with every thread on the CPU (tests/kernels/cuda_on_cpu): values, layouts, barriers. (Races and speed: tests/gpu.)"""

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from tests.kernels.adaln.cases import NAMES, NORMED, call, far_apart, inputs, op_name, stock, used, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One; tails of a chunk; less than a warp and rows of one warp; several warps; the longest rows with one, two and four chunks a thread in either itemsize
WIDTHS = (1, 7, 63, 72, 129, 300, 1024, 1152, 1536, 2056, 3072, 4104)


def assert_values(in_cuda, v) -> None:
    """exact gives stock's bits, close keeps the rule, contiguously."""
    for name in NAMES:
        with in_cuda(op_name(name), 2):
            exact, close = call(name, v), call(name, v, numerics="close")
        for got, got_close, plain, want in zip(exact, close, stock(name, v), stock(name, wide(v)), strict=True):
            assert_exact(got, plain, name)
            assert_close(got_close, want, plain, name)
            assert got.is_contiguous() and got_close.is_contiguous()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(in_cuda, dtype, width):
    """tail: 5 rows are no multiple of a block's 4."""
    v = inputs(1, 5, width, dtype)
    before = {name: tensor.clone() for name, tensor in v.items()}
    assert_values(in_cuda, v)
    assert all(torch.equal(before[name], v[name]) for name in v)


@pytest.mark.parametrize("kind", ("one", "token"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulation_shapes(in_cuda, dtype, kind):
    v = inputs(3, 6, 40, dtype, kind)
    assert_values(in_cuda, v)


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("given", ((), ("weight",), ("weight", "bias"), ("bias",)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine(in_cuda, dtype, given, norm):
    v, affine = inputs(2, 3, 300, dtype), {name: torch.randn(600).to(dtype)[::2] for name in given}
    for name in ("adaln_modulate", "adaln_modulate_dual", "two_gates"):
        with in_cuda(op_name(name), 2):
            exact, close = call(name, v, norm=norm, **affine), call(name, v, norm=norm, numerics="close", **affine)
        with forced("reference"):
            plain = call(name, v, norm=norm, **affine)
            want = call(name, wide(v), norm=norm, numerics="close", **wide(affine))
        for got, got_close, bits, true in zip(exact, close, plain, want, strict=True):
            assert_exact(got, bits, name)
            assert_close(got_close, true, bits, name)


@pytest.mark.parametrize("width", (64, 63))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(in_cuda, layout, width):
    """strided-input, misaligned: the same bits for any layout, one argument at a time (each chooses its own width of access) and all together."""
    v = inputs(2, 5, width, torch.bfloat16, "token")
    for name in NAMES:
        with in_cuda(op_name(name), 2 + len(used(name))):
            want = call(name, v, numerics="close")
            for changed in (*((argument,) for argument in used(name)), used(name)):
                got = call(name, {**v, **{argument: layout(v[argument]) for argument in changed}}, numerics="close")
                for one, other in zip(got, want, strict=True):
                    assert_exact(one, other, f"{name} {changed}")
                    assert one.is_contiguous()


def test_int32_stride(in_cuda):
    """int32-stride: three tokens 2^30 elements apart."""
    far, v = far_apart()
    for name in NAMES:
        for argument in used(name):
            far.copy_(v[argument])
            with in_cuda(op_name(name), 2):
                for got, want in zip(call(name, {**v, argument: far}, numerics="close"), call(name, v, numerics="close"), strict=True):
                    assert_exact(got, want, f"{name} {argument}")


@pytest.mark.parametrize("numerics", ("exact", "close"))
@pytest.mark.parametrize("width", (40, 1536))
def test_batch_coupling(in_cuda, width, numerics):
    v = inputs(6, 2, width, torch.bfloat16)
    for name in NAMES:
        with in_cuda(op_name(name), 2):
            together, alone = call(name, v, numerics=numerics), call(name, {key: t[4:5] for key, t in v.items()}, numerics=numerics)
        for whole, one in zip(together, alone, strict=True):
            assert_exact(whole[4:5], one, name)


def test_nondeterminism(in_cuda, cuda_machine):
    """Threads, warps and blocks in the opposite order: a barrier that is missing would give other bits."""
    for width in (40, 1536):
        v = inputs(2, 3, width)
        for name in NAMES:
            with in_cuda(op_name(name), 2):
                forward = call(name, v, numerics="close")
                cuda_machine.reverse(True)
                try:
                    backward = call(name, v, numerics="close")
                finally:
                    cuda_machine.reverse(False)
            for one, other in zip(forward, backward, strict=True):
                assert_exact(one, other, name)


def test_cancellation(in_cuda):
    """Mean 100, standard deviation 0.01."""
    x, zero = 100 + 0.01 * torch.randn(1, 8, 1536), torch.zeros(1, 1536)
    with in_cuda("adaln_modulate"):
        got = ops.adaln_modulate(x, zero, zero, eps=1e-12, numerics="close")
    want = torch.nn.functional.layer_norm(x.double(), (1536,), eps=1e-12)
    assert ((got - want).abs().amax(-1) / want.abs().amax(-1)).max() <= 1e-5


@pytest.mark.parametrize("name", NORMED)
def test_fp16_overflow(in_cuda, name):
    v = inputs(1, 2, 1536, torch.float16)
    v["x"] = torch.where(torch.rand(1, 2, 1536) > 0.5, 1000.0, -1000.0).half()
    for norm in ("layer", "rms"):
        with in_cuda(name):
            assert all(out.isfinite().all() for out in call(name, v, norm=norm, numerics="close"))


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("eps", (1e-5, 1e-6, 1e-2))
def test_eps(in_cuda, eps, name):
    v = inputs(1, 3, 100)
    v["x"] *= 1e-4
    v["y"] *= 1e-4
    with in_cuda(name):
        got = call(name, v, eps=eps, numerics="close")
    for out, want, plain in zip(got, stock(name, wide(v), eps), stock(name, v, eps), strict=True):
        assert_close(out, want, plain)


def test_special_values(in_cuda):
    """NaN and infinities come out where stock has them, and in no other row, though four rows share a block."""
    v = inputs(1, 4, 65, torch.bfloat16)
    v["x"][0, 1, 3], v["x"][0, 2, 64] = torch.nan, torch.inf
    for name in NAMES:
        with in_cuda(op_name(name)):
            got = call(name, v, numerics="close")
        for one, want in zip(got, stock(name, v), strict=True):
            assert torch.equal(one.isnan(), want.isnan()), name


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 3, 0)), ids=str)
def test_empty(in_cuda, shape):
    v = inputs(*shape)
    for name in NAMES:
        with in_cuda(op_name(name), 2):
            assert all(out.shape == shape for numerics in ("exact", "close") for out in call(name, v, numerics=numerics))


def test_biased_cast(in_cuda):
    """The mean signed error of the bfloat16 results is near zero: rounded, not truncated."""
    x, gate = torch.randn(1, 64, 4096).bfloat16(), torch.full((1, 4096), 0.3).bfloat16()
    with in_cuda("gate_residual"):
        got = ops.gate_residual(x, x, gate, numerics="close")
    want = x.double() * (1 + gate[0, 0].double())
    assert_unbiased(got, want)


def test_gradients(in_cuda):
    """Where a gradient is wanted the registered op runs, and its backward is the reference's."""
    v = inputs(2, 3, 24)
    grads = {}
    for backend in ("cuda", "reference"):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in v.items()}
        with forced(backend):
            outputs = [out for name in NAMES for out in call(name, leaves)]
        torch.stack([out.square().sum() for out in outputs]).sum().backward()
        grads[backend] = [leaf.grad for leaf in leaves.values()]
    for got, want in zip(*grads.values(), strict=True):
        assert_exact(got, want)


def test_what_it_leaves_to_others(in_cuda):
    """Other dtypes, mixed dtypes and rows that no block can hold."""
    v = inputs(1, 2, 8)
    for spoiled, reason in (({"shift": v["shift"].half()}, "an argument has dtype torch.float16, x has torch.float32"),
                            (wide(v), "x has dtype torch.float64"), (inputs(1, 1, 16385), "x has 16385 channels, more than 16384")):
        said = {choice.backend: choice for choice in ops.backends("adaln_modulate", *({**v, **spoiled}[name] for name in ("x", "shift", "scale")))}
        assert said["cuda"].reason == reason
    with in_cuda("adaln_modulate"):
        longest = inputs(1, 1, 16384)
        assert_exact(call("adaln_modulate", longest)[0], stock("adaln_modulate", longest)[0])


@pytest.mark.parametrize("numerics", ("exact", "close"))
def test_forms(in_cuda, numerics):
    """No shift (a zero that is expanded), and a row for each frame: the bits of the same values written out."""
    x, scale, shift = torch.randn(2, 6, 72).bfloat16(), torch.randn(2, 3, 72).bfloat16(), torch.randn(2, 3, 72).bfloat16()
    with in_cuda("adaln_modulate", 4):
        assert_exact(ops.adaln_modulate(x, None, scale[:, 0], numerics=numerics),
                     ops.adaln_modulate(x, torch.zeros(2, 72).bfloat16(), scale[:, 0], numerics=numerics))
        assert_exact(ops.adaln_modulate(x, shift, scale, numerics=numerics),
                     ops.adaln_modulate(x, shift.repeat_interleave(2, 1), scale.repeat_interleave(2, 1), numerics=numerics))
