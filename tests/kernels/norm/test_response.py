"""Global response normalisation: diffusers' module bit for bit in ``exact``, against float64 in ``close``, and what every op promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.effort import examples
from tests.kernels.isa_levels import run_at
from tests.kernels.norm.cases import DTYPES, leaves, wide
from tests.kernels.norm.response_cases import call, gradients, inputs, stock
from tests.kernels.on_reference import EXACT, MIXED_DTYPES
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
BACKENDS = [pytest.param("cpu", marks=needs_library), "reference"]
NUMERICS = ("exact", "close")
# (B, H, W, C). Odd first; rows and channels around the kernel's 4 rows, its groups of 16 and its vectors; blocks of rows; Stable Cascade's width
SHAPES = ((1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 4, 16), (2, 1, 17, 33), (2, 5, 13, 65), (1, 33, 32, 40), (1, 4, 4, 8192))


def served(suffix: str = "") -> tuple[int, int]:
    counts = ops.stats()["global_response_norm" + suffix]
    return counts["cpu"], counts["reference"]


@settings(max_examples=examples(250), deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 70), st.sampled_from(DTYPES), st.sampled_from((1e-6, 1e-2)), st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4),
       st.integers(0, 2**31))
@needs_library
def test_property(batch, height, width, channels, dtype, eps, layouts, seed):
    """tail, strided-input, strided-grad: pictures of any shape: forward and gradients are the formula's and autograd's in float64, and have the same bits
    where each argument has a layout of its own. In float64 nothing hides behind rounding."""
    torch.manual_seed(seed)
    v = inputs((batch, height, width, channels), dtype)
    got, laid = call(v, eps=eps, numerics="close"), {name: layout(t) for layout, (name, t) in zip(layouts, v.items())}
    assert_within(got, stock(wide(v), eps), 8, plain=stock(v, eps))
    assert_exact(call(laid, eps=eps, numerics="close"), got)
    grad = torch.randn(v["x"].shape).to(dtype)
    found = (gradients(v, grad, eps=eps, numerics="close"), gradients(wide(v), grad.double(), stock, eps=eps), gradients(v, grad, stock, eps=eps),
             gradients(laid, layouts[3](grad), eps=eps, numerics="close"))
    response = stock({"x": v["x"].double(), "weight": 1, "bias": 0}, eps) - v["x"].double()
    terms = {"x": None, "weight": (grad.double() * response).flatten(0, -2), "bias": grad.double().flatten(0, -2)}
    for name, got, want, plain, again in zip(v, *found, strict=True):
        assert_within(got, want, 8, name, plain, terms[name])
        assert_exact(again, got, f"{name} {' '.join(layout.__name__ for layout in layouts)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_stock_modules(dtype):
    """The modules themselves, for every pair of dtypes, forward and backward."""
    normalization = pytest.importorskip("diffusers.models.normalization")
    cascade = pytest.importorskip("diffusers.models.unets.unet_stable_cascade")
    for shape in SHAPES[:5]:
        for weight_dtype in DTYPES:
            for module in (normalization.GlobalResponseNorm(shape[-1]), cascade.GlobalResponseNorm(shape[-1])):
                torch.nn.init.normal_(module.gamma)
                torch.nn.init.normal_(module.beta)
                module.to(weight_dtype)
                x = inputs(shape, dtype)["x"].requires_grad_()
                want = module(x)
                got = ops.global_response_norm(x, module.gamma.flatten(), module.beta.flatten())
                assert_exact(got, want)
                assert ops.global_response_norm(x, module.gamma.flatten(), module.beta.flatten(), numerics="close").dtype is want.dtype
                grad, wanted = torch.randn_like(want), (x, module.gamma, module.beta)
                for a, b in zip(torch.autograd.grad(got, wanted, grad), torch.autograd.grad(want, wanted, grad), strict=True):
                    assert_exact(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close(dtype, shape, backend):
    """tail: within the rule, on every backend."""
    v = inputs(shape, dtype)
    with forced(backend):
        assert_close(call(v, numerics="close"), stock(wide(v)), stock(v))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_close_gradients(dtype, shape, backend):
    """tail, silent-off: the gradients come from the backward kernel, or from its meaning where that is forced, and keep the rule."""
    v, grad = inputs(shape, dtype), torch.randn(shape).to(dtype)
    found = gradients(v, grad, backward=backend, numerics="close"), gradients(wide(v), grad.double(), stock), gradients(v, grad, stock)
    for name, got, want, plain in zip(v, *found, strict=True):
        if got.numel() < 64:  # too few to compare errors
            assert_within(got, want, 8, name)
        else:
            assert_close(got, want, plain, name)
    assert served("_backward") == ((1, 0) if backend == "cpu" else (0, 1))


@needs_library
def test_silent_off():
    """silent-off: close runs on the CPU library; what it does not serve runs on the reference, with the reason."""
    v = inputs(dtype=torch.bfloat16)
    call(v, numerics="close")
    assert served() == (1, 0)
    call(v)
    call({**v, "weight": v["weight"].float()}, numerics="close")
    assert served() == (1, 2)
    with forced("cpu"), pytest.raises(RuntimeError, match="torch.norm sums in an order of its own"):
        call(v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype):
    """strided-input, misaligned: the same values in any layout give the same bits, one argument at a time, forward and backward."""
    v = inputs(dtype=dtype)
    v["x"][1] = v["x"][0]
    grad = torch.randn(v["x"].shape).to(dtype)
    wants = {numerics: (call(v, numerics=numerics), *gradients(v, grad, numerics=numerics)) for numerics in NUMERICS}
    for layout in (*LAYOUTS, lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1) if t.dim() == 4 else t):
        for name in v:
            moved = {**v, name: layout(v[name])}
            for numerics in NUMERICS:
                for got, want in zip((call(moved, numerics=numerics), *gradients(moved, grad, numerics=numerics)), wants[numerics], strict=True):
                    assert_exact(got, want, f"{name} {numerics}")


@needs_library
def test_strided_grad():
    """strided-grad: expanded (`.sum()`), transposed and stepping grad_out give the gradients of the same values laid out contiguously."""
    v, shape = inputs((2, 3, 4, 24)), (2, 3, 4, 24)
    for grad in (torch.ones(()).expand(shape), torch.randn(shape[::-1]).permute(3, 2, 1, 0), torch.randn(2, 3, 4, 48)[..., ::2]):
        for got, want in zip(gradients(v, grad, numerics="close"), gradients(v, grad.contiguous(), numerics="close"), strict=True):
            assert_exact(got, want)
    assert served("_backward") == (6, 0)


@needs_library
def test_int32_stride():
    """int32-stride: rows 2^30 elements apart (memory that is never touched in between), forward and backward."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (1, 3, 2, 8), (1, 2**30, 8, 1))
    v = inputs((1, 3, 2, 8), torch.bfloat16)
    far.copy_(v["x"])
    assert_exact(call({**v, "x": far}, numerics="close"), call(v, numerics="close"))
    for got, want in zip(gradients({**v, "x": far}, far, numerics="close"), gradients(v, v["x"], numerics="close"), strict=True):
        assert_exact(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype):
    """batch-coupling: a sample alone equals the sample in a batch of 8, and so does its gradient."""
    v = inputs((8, 9, 8, 130), dtype)
    alone, grad = {**v, "x": v["x"][5:6]}, torch.randn(v["x"].shape).to(dtype)
    assert_exact(call(alone, numerics="close"), call(v, numerics="close")[5:6])
    assert_exact(gradients(alone, grad[5:6], numerics="close")[0], gradients(v, grad, numerics="close")[0][5:6])
    poisoned = {**v, "x": v["x"].clone()}
    poisoned["x"][0] = torch.nan
    assert_exact(call(poisoned, numerics="close")[1:], call(v, numerics="close")[1:])


@needs_library
def test_nondeterminism():
    """nondeterminism: 20 repeats and any number of threads give the same bits, weight gradients included."""
    v, threads = inputs((3, 20, 21, 130)), torch.get_num_threads()
    grad = torch.randn_like(v["x"])

    def everything():
        return call(v, numerics="close"), *gradients(v, grad, numerics="close")

    want = everything()
    try:
        for n in (1, 2, 5, *[threads] * 17):
            torch.set_num_threads(n)
            assert all(map(torch.equal, everything(), want)), n
    finally:
        torch.set_num_threads(threads)


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (2, 0, 3, 8), (2, 3, 0, 8), (2, 3, 2, 0)), ids=str)
def test_empty(shape, numerics):
    """empty: a zero in each dimension, forward and backward."""
    v = inputs(shape)
    assert call(v, numerics=numerics).shape == shape
    dx, dw, db = gradients(v, numerics=numerics)
    assert dx.shape == shape and dw.shape == db.shape == shape[-1:] and not dw.any() and not db.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_overflow(backend):
    """fp16-overflow: x = +-1000, whose squares and whose norm over 90 x 90 pixels do not fit fp16."""
    v = inputs((1, 90, 90, 8), torch.float16)
    v["x"] = torch.where(v["x"] > 0.1, 1000.0, -1000.0).half()
    with forced(backend):
        assert torch.isfinite(call(v, numerics="close")).all()
    assert all(torch.isfinite(grad).all() for grad in gradients(v, torch.full_like(v["x"], 1e-4), backward=backend, numerics="close"))


@pytest.mark.parametrize("eps", (1e-5, 1e-6, 1e-2))
def test_eps(eps):
    """eps: beside the mean; x ~ 1e-6, where it decides the result."""
    v = inputs()
    v["x"], v["weight"], v["bias"] = v["x"] * 1e-6, v["weight"] * 100, v["bias"] * 0
    assert_exact(call(v, eps=eps), stock(v, eps))
    assert_close(call(v, eps=eps, numerics="close"), stock(wide(v), eps), stock(v, eps))
    assert not torch.equal(call(v, eps=eps, numerics="close"), call(v, eps=eps * 1.5, numerics="close"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_channel_of_zeros(backend):
    """A channel that is zero everywhere has no direction: its gradient comes by way of the sum alone, as stock's does; a picture of zeros too."""
    for channels in (slice(3, 5), slice(None)):
        v = inputs()
        v["x"][..., channels] = 0
        found = gradients(v, backward=backend, numerics="close"), gradients(wide(v), function=stock), gradients(v, function=stock)
        for got, want, plain in zip(*found, strict=True):
            assert torch.isfinite(got).all()
            assert_close(got, want, plain) if got.dim() == 4 else assert_within(got, want, 8)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@needs_library
def test_biased_cast(dtype):
    """biased-cast: over 2^20 elements the mean signed error is within 0.02 units in the last place; that of the gradient too."""
    v, grad = inputs((2, 32, 32, 512), dtype), torch.randn(2, 32, 32, 512).to(dtype)
    assert_unbiased(call(v, numerics="close"), stock(wide(v)))
    assert_unbiased(gradients(v, grad, numerics="close")[0], gradients(wide(v), grad.double(), stock)[0], "dx")
    assert served() == (2, 0) and served("_backward") == (1, 0)


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
def test_alias(numerics):
    """alias: inputs keep their bits; outputs and gradients share no storage with them or each other."""
    v = inputs()
    before = {name: t.clone() for name, t in v.items()}
    found = (call(v, numerics=numerics), *gradients(v, torch.randn_like(v["x"]), numerics=numerics), *v.values())
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)
    assert all(torch.equal(v[name], before[name]) for name in v)


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
def test_gradcheck(numerics):
    """First and second derivatives in float64; one that is not wanted changes nothing in the rest."""
    v = inputs((2, 2, 3, 4), torch.float64)
    wanted = [t.requires_grad_() for t in v.values()]

    def run(*tensors):
        return ops.global_response_norm(*tensors, numerics=numerics)

    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted, atol=1e-4, fast_mode=True)
    whole = torch.autograd.grad(run(*wanted).square().sum(), wanted)
    for i, tensor in enumerate(wanted):
        assert torch.equal(torch.autograd.grad(run(*wanted).square().sum(), tensor)[0], whole[i])


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
def test_fake_mismatch(permuted):
    """fake-mismatch: opcheck of both registrations, on contiguous and on permuted-dense inputs."""
    x, grad = ((t.movedim(-1, 1).contiguous().movedim(1, -1) if permuted else t) for t in torch.randn(2, 2, 3, 4, 8).unbind())
    weight, bias = torch.randn(2, 8).unbind()
    opcheck(torch.ops.fusewire.global_response_norm.default, (x.detach().requires_grad_(), weight.requires_grad_(), bias, 1e-6))
    for of_x in (False, True):
        opcheck(torch.ops.fusewire.global_response_norm_backward.default, (grad, x, weight.detach(), 1e-6, of_x))


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
def test_compile(numerics):
    """No graph break, the same bits forward, the same gradients; a second shape compiles too."""
    compiled = torch.compile(lambda v: call(v, numerics=numerics), fullgraph=True, backend="aot_eager")
    for width in (5, 9):
        v, wanted = leaves(inputs((2, 3, width, 32)))
        got, want = compiled(v), call(v, numerics=numerics)
        assert torch.equal(got, want)
        assert all(map(torch.equal, *(torch.autograd.grad(out.square().sum(), wanted) for out in (got, want))))


@MIXED_DTYPES
@pytest.mark.parametrize("dtypes", [(x, w) for x in DTYPES for w in DTYPES], ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_autocast(dtypes):
    """autocast: every pair of dtypes gives what it gives without autocast, forward and backward."""
    v = inputs(dtype=dtypes[0])
    v["weight"] = v["weight"].to(dtypes[1])
    for numerics in NUMERICS:
        want = (call(v, numerics=numerics), *gradients(v, numerics=numerics))
        with torch.autocast("cpu", torch.bfloat16):
            got = (call(v, numerics=numerics), *gradients(v, numerics=numerics))
        for a, b in zip(got, want, strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("isa", ("base", "avx2", pytest.param("avx512", marks=pytest.mark.slow)))
@needs_library
def test_isa_levels(isa):
    """The levels below this processor's keep the rule too."""
    run_at(isa, __file__, "test_close and cpu and (float32 or bfloat16)")


X, W = torch.ones(2, 3, 4, 8), torch.ones(8)
BAD = {
    "x rank": (lambda: ops.global_response_norm(X[0], W, W), ValueError, r"x has shape \[3, 4, 8\]; it should be \[B, H, W, C\]"),
    "x integer": (lambda: ops.global_response_norm(X.int(), W, W), TypeError, "x has dtype torch.int32"),
    "weight rank": (lambda: ops.global_response_norm(X, W.view(1, 1, 1, 8), W), ValueError, r"weight has shape \[1, 1, 1, 8\]; it should be \[8\]"),
    "weight missing": (lambda: ops.global_response_norm(X, None, W), TypeError, "weight is a NoneType"),
    "bias missing": (lambda: ops.global_response_norm(X, W, None), TypeError, "bias is a NoneType"),
    "bias device": (lambda: ops.global_response_norm(X, W, W.to("meta")), ValueError, "bias is on meta; it should be on cpu"),
    "eps": (lambda: ops.global_response_norm(X, W, W, eps=0.0), ValueError, "eps is 0.0; it should be greater than 0"),
    "numerics": (lambda: ops.global_response_norm(X, W, W, numerics="fast"), ValueError, "numerics is 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    run, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run()
    assert served() == (0, 0)
