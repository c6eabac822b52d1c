"""What every op of the project promises, for the norms: layouts, batches, threads, gradients, tracing, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.norm.cases import DTYPES, KINDS, NARROWED, call, inputs, leaves, served, stock
from tests.kernels.on_reference import MIXED_DTYPES_OF_A_NORM
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
NUMERICS = ("exact", "close")


def gradients(kind: str, v: dict, grad=None, **keywords) -> tuple[torch.Tensor, ...]:
    these, wanted = leaves(v)
    out = call(kind, these, **keywords)
    return torch.autograd.grad(out, wanted, torch.ones_like(out) if grad is None else grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, kind, layout):
    """strided-input, misaligned: the same values in any layout give the same bits, one argument at a time, forward and backward."""
    v = inputs(6, 35, dtype, kind)
    v["x"][1] = v["x"][0]  # so that an expanded layout exists
    if kind != "layer-2d":
        v["x"] = v["x"].view(2, 2, 3, 35)
    for numerics in NUMERICS:
        want = call(kind, v, numerics=numerics)
        for name in v:
            assert_exact(call(kind, {**v, name: layout(v[name])}, numerics=numerics), want, name)
    grad = torch.randn_like(want)
    want = gradients(kind, v, grad, numerics="close")
    for name in v:
        for got, expected in zip(gradients(kind, {**v, name: layout(v[name])}, grad, numerics="close"), want, strict=True):
            assert_exact(got, expected, name)
    assert CPU.loaded is (served(kind, "_backward")[0] == 4) or kind == "layer-float32" and dtype is torch.float64


@pytest.mark.parametrize("kind", KINDS)
@needs_library
def test_strided_grad(kind):
    """strided-grad: expanded (`.sum()`), transposed and stepping grad_out give the gradients of the same values laid out
    contiguously, and in exact those that stock gives."""
    v = inputs(6, 24, kind=kind)
    shape = v["x"].shape
    for grad in (torch.ones(()).expand(shape), torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]):
        for got, want in zip(*(gradients(kind, v, g, numerics="close") for g in (grad, grad.contiguous())), strict=True):
            assert_exact(got, want)
        these, wanted = leaves(v)
        for got, want in zip(gradients(kind, v, grad), torch.autograd.grad(stock(kind, these), wanted, grad), strict=True):
            assert_exact(got, want)


@needs_library
def test_int32_stride():
    """int32-stride: three rows 2^30 elements apart (memory that is never touched in between), forward and backward."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = torch.as_strided(base, (1, 3, 8), (1, 2**30, 1))
    for kind in ("rms", "layer"):
        v = inputs(3, 8, torch.bfloat16, kind, batch=1)
        far.copy_(v["x"])
        for numerics in NUMERICS:
            assert_exact(call(kind, {**v, "x": far}, numerics=numerics), call(kind, v, numerics=numerics))
        want = gradients(kind, v, far, numerics="close")
        for got, expected in zip(gradients(kind, v, far.contiguous(), numerics="close"), want, strict=True):
            assert_exact(got, expected)
    picture = torch.as_strided(base, (1, 3, 2, 4), (1, 2**30, 4, 1)).copy_(torch.randn(1, 3, 2, 4))
    assert_exact(ops.layer_norm_2d(picture), ops.layer_norm_2d(picture.contiguous()))


@NARROWED
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype, kind, numerics):
    """batch-coupling: a sample alone equals the sample in a batch of 8, and so does its gradient."""
    v = inputs(9, 130, dtype, kind, batch=8)
    alone = {**v, "x": v["x"][5:6]}
    assert_exact(call(kind, alone, numerics=numerics), call(kind, v, numerics=numerics)[5:6])
    grad = torch.randn_like(v["x"])
    assert_exact(gradients(kind, alone, grad[5:6], numerics=numerics)[0], gradients(kind, v, grad, numerics=numerics)[0][5:6])


@needs_library
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
def test_nondeterminism(kind, numerics):
    """nondeterminism: 20 repeats and any number of threads give the same bits, weight gradients included."""
    v, threads = inputs(150, 300, kind=kind), torch.get_num_threads()
    grad = torch.randn_like(call(kind, v))

    def everything():
        found = call(kind, v, numerics=numerics)
        return (found, *gradients(kind, v, grad, numerics=numerics)) if numerics == "close" else (found,)

    want = everything()
    for _ in range(20):
        assert all(map(torch.equal, everything(), want))
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert all(map(torch.equal, everything(), want)), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 3, 0), (0,), (2, 0, 3, 4), (2, 3, 0, 4)), ids=str)
def test_empty(shape, numerics):
    """empty: a zero in each dimension, forward and backward."""
    x = torch.randn(shape, requires_grad=True)
    calls = [ops.rms_norm, ops.layer_norm] if len(shape) != 4 else [ops.layer_norm_2d]
    for op in calls:
        weight, bias = torch.randn(2, shape[-1 if len(shape) != 4 else 1]).requires_grad_().unbind()
        out = op(x, weight, bias, numerics=numerics)
        assert out.shape == shape
        dx, dw, db = torch.autograd.grad(out.sum(), (x, weight, bias))
        assert dx.shape == shape and not dw.any() and not db.any()


@pytest.mark.parametrize("shape", ((5,), (1, 5), (2, 1, 3, 1, 5), (1, 2, 1, 2, 1, 2, 1, 2, 5), (1,) * 9 + (5,)), ids=str)
def test_any_rank(shape):
    """One dimension up to ten; beyond nine the reference serves."""
    x, weight = torch.randn(shape), torch.randn(5)
    assert_exact(ops.layer_norm(x, weight, eps=1e-6), stock("layer", {"x": x, "weight": weight, "bias": None}))
    assert_exact(ops.rms_norm(x, weight, numerics="close").view(-1, 5), ops.rms_norm(x.view(-1, 5), weight, numerics="close"))
    assert ops.stats()["layer_norm"]["reference"] == (not CPU.loaded or len(shape) > 9)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
def test_alias(kind, numerics):
    """alias: inputs keep their bits; outputs and gradients share no storage with them or each other."""
    v = inputs(5, 32, kind=kind)
    before = {name: t.clone() for name, t in v.items()}
    found = (call(kind, v, numerics=numerics), *gradients(kind, v, numerics=numerics), *v.values())
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)
    assert all(torch.equal(v[name], before[name]) for name in v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", ("plain", "weight", "weight-bias"))
def test_gradcheck(affine, kind):
    """First and second derivatives in float64; ``exact`` as well, where the stock module keeps float64."""
    v = inputs(3, 5, torch.float64, kind, affine)
    names = [name for name, t in v.items() if t is not None]
    for numerics in NUMERICS if kind in ("rms-torch", "layer", "layer-2d") else ("close",):
        def run(*tensors):
            return call(kind, {**v, **dict(zip(names, tensors))}, numerics=numerics)

        wanted = [v[name].detach().requires_grad_() for name in names]
        assert torch.autograd.gradcheck(run, wanted)
        assert torch.autograd.gradgradcheck(run, wanted, atol=1e-4, fast_mode=True)
    assert not CPU.loaded or served(kind, "_backward")[0] > 0


@pytest.mark.parametrize("needed", ((0,), (1,), (2,), (0, 2), (1, 2)), ids=str)
@pytest.mark.parametrize("kind", ("rms", "layer", "layer-2d"))
def test_some_gradients(kind, needed):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(7, 40, kind=kind)
    want = gradients(kind, v, numerics="close")
    these = {name: t.detach().requires_grad_(i in needed) for i, (name, t) in enumerate(v.items())}
    call(kind, these, numerics="close").sum().backward()
    for i, t in enumerate(these.values()):
        assert t.grad is None if i not in needed else torch.equal(t.grad, want[i])


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("exact", (False, True), ids=("close", "exact"))
def test_fake_mismatch(exact, permuted):
    """fake-mismatch: opcheck of every registration, on contiguous and on permuted-dense inputs."""
    def lay(x):
        return (x.transpose(0, -1).contiguous().transpose(0, -1) if permuted else x).detach().requires_grad_()

    x, picture, grad = lay(torch.randn(2, 3, 8)), lay(torch.randn(2, 8, 3, 4)), lay(torch.randn(2, 3, 8)).detach()
    weight, bias = torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
    fusewire = torch.ops.fusewire
    for switch in (False, True):
        opcheck(fusewire.rms_norm.default, (x, weight, bias, 1e-6, switch, exact))
        opcheck(fusewire.layer_norm.default, (x, weight, bias, 1e-6, switch, exact))
    opcheck(fusewire.rms_norm.default, (x, None, None, 1e-6, False, exact))
    for these in (picture, picture.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        opcheck(fusewire.layer_norm_2d.default, (these, weight, bias, 1e-6, exact))
    plain = x.detach(), weight.detach()
    for wanted in ((True, True, True), (True, False, False), (False, True, False)):
        opcheck(fusewire.rms_norm_backward.default, (grad, *plain, 1e-6, *wanted))
        opcheck(fusewire.layer_norm_backward.default, (grad, *plain, 1e-6, *wanted))
        for these in (picture, picture.contiguous(memory_format=torch.channels_last)):
            opcheck(fusewire.layer_norm_2d_backward.default, (torch.randn_like(these), these.detach(), weight.detach(), 1e-6, *wanted))


def test_layout_of_pictures():
    """channels_last stays channels_last, anything else becomes contiguous, on every backend."""
    x = torch.randn(2, 8, 3, 4)
    for backend in (("cpu", "reference") if CPU.loaded else ("reference",)):
        with forced(backend):
            for numerics in NUMERICS:
                assert ops.layer_norm_2d(x, numerics=numerics).is_contiguous()
                assert ops.layer_norm_2d(x.transpose(2, 3), numerics=numerics).is_contiguous()
                last = ops.layer_norm_2d(x.contiguous(memory_format=torch.channels_last), numerics=numerics)
                assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("numerics", NUMERICS)
@needs_library
def test_compile(numerics):
    """No graph break, the same bits forward, the same gradients in a training step; a second shape compiles too."""
    def step(v, picture):
        outputs = [call(kind, v, numerics=numerics) for kind in KINDS if kind != "layer-2d"]
        return [*outputs, ops.layer_norm_2d(picture, v["weight"], v["bias"], numerics=numerics)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (5, 9):
        v, wanted = leaves(inputs(rows, 32))
        picture = torch.randn(2, 32, rows, 3)
        got, want = compiled(v, picture), step(v, picture)
        assert all(map(torch.equal, got, want))
        grads = [torch.autograd.grad(sum(out.square().sum() for out in outputs), wanted) for outputs in (got, want)]
        assert all(map(torch.equal, *grads))


@MIXED_DTYPES_OF_A_NORM
@pytest.mark.parametrize("dtypes", [(x, w) for x in DTYPES for w in DTYPES], ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("autocast", (False, True))
def test_autocast(autocast, dtypes):
    """autocast: every pair of x's and the weight's dtype gives what stock gives, forward and backward; what stock refuses is a TypeError."""
    for kind in ("rms", "rms-torch", "layer", "layer-float32"):
        v = inputs(3, 16, dtypes[0], kind, "weight")
        v["weight"] = v["weight"].to(dtypes[1])
        refused = kind == "layer" and dtypes[1] is not dtypes[0] and not (dtypes[1] is torch.float32 and dtypes[0].itemsize == 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert call(kind, v, numerics="close").dtype is (dtypes[0] if kind != "rms" else stock(kind, v).dtype)
            if refused:
                with pytest.raises(TypeError, match="weight has dtype"):
                    call(kind, v)
                continue
            if autocast and kind in ("rms-torch", "layer"):
                continue  # autocast gives float32 to torch's own norms; the ops promote as the modules do without it
            (ours, wanted), (theirs, wanted_too) = leaves(v), leaves(v)
            got, want = call(kind, ours), stock(kind, theirs)
            assert_exact(got, want, kind)
            for a, b in zip(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(want.sum(), wanted_too), strict=True):
                assert a.dtype is b.dtype and torch.allclose(a, b, equal_nan=True, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_of_pictures(dtype):
    """autocast: as the module does without it (which is as it does with it, for float32), forward and backward."""
    v = inputs(3, 16, dtype, "layer-2d")
    with torch.autocast("cpu", torch.bfloat16):
        (ours, wanted), (theirs, wanted_too) = leaves(v), leaves(v)
        got, want = call("layer-2d", ours), stock("layer-2d", theirs) if dtype is torch.float32 else None
        close = call("layer-2d", ours, numerics="close")
    with torch.no_grad():
        assert_exact(got.detach(), stock("layer-2d", v))
        assert_exact(close.detach(), call("layer-2d", v, numerics="close"))
    gradients = torch.autograd.grad(got.sum(), wanted)
    assert all(gradient.dtype is dtype for gradient in gradients)
    if want is not None:
        assert_exact(got, want)
        for a, b in zip(gradients, torch.autograd.grad(want.sum(), wanted_too), strict=True):
            assert_exact(a, b)


@pytest.mark.on_reference
def test_mixed_dtypes_are_counted_on_the_reference():
    """silent-off: what the CPU row does not serve runs on the reference, visibly; forcing the row is an error that says why."""
    v = inputs(2, 8, torch.bfloat16)
    v["weight"] = v["weight"].float()
    call("rms", v)
    assert served("rms") == (0, 1)
    if CPU.loaded:
        with forced("cpu"), pytest.raises(RuntimeError, match="weight has dtype torch.float32, x has torch.bfloat16"):
            call("rms", v)


def test_mixed_dtypes_keep_their_gradients():
    """A float32 weight's gradient is float32, and not rounded to x's bfloat16 on the way."""
    v = inputs(5, 40, torch.bfloat16)
    v = {name: t if name == "x" else t.float() for name, t in v.items()}
    dx, dw, db = gradients("layer", v, numerics="close")
    assert dx.dtype is torch.bfloat16 and dw.dtype is torch.float32
    assert not torch.equal(dw, dw.bfloat16().float()) and torch.equal(db, torch.full((40,), 10.0))


def test_vmap():
    v = inputs(4, 8, batch=3)
    for kind in ("rms", "layer"):
        for numerics in NUMERICS:
            got = torch.vmap(lambda x: call(kind, {**v, "x": x}, numerics=numerics))(v["x"])
            assert_exact(got, call(kind, v, numerics=numerics))


X, W = torch.ones(2, 3, 8), torch.ones(8)
BAD = {
    "x is a list": (lambda: ops.rms_norm([1.0]), TypeError, "x is a list; it should be a torch.Tensor"),
    "x integer": (lambda: ops.layer_norm(X.int()), TypeError, "x has dtype torch.int32; it should be float32"),
    "x scalar": (lambda: ops.rms_norm(torch.tensor(1.0)), ValueError, r"x has shape \[\]; it should be \[\.\.\., C\]"),
    "picture rank": (lambda: ops.layer_norm_2d(X), ValueError, r"x has shape \[2, 3, 8\]; it should be \[B, C, H, W\]"),
    "picture channels": (lambda: ops.layer_norm_2d(X[None], W), ValueError, r"weight has shape \[8\]; it should be \[2\]"),
    "weight shape": (lambda: ops.rms_norm(X, W[:7]), ValueError, r"weight has shape \[7\]; it should be \[8\]"),
    "weight rank": (lambda: ops.layer_norm(X, W[None]), ValueError, r"weight has shape \[1, 8\]; it should be \[8\]"),
    "bias shape": (lambda: ops.layer_norm(X, W, W[:1]), ValueError, r"bias has shape \[1\]; it should be \[8\]"),
    "bias integer": (lambda: ops.rms_norm(X, W, W.int()), TypeError, "bias has dtype torch.int32"),
    "weight list": (lambda: ops.rms_norm(X, [1.0]), TypeError, "weight is a list"),
    "weight dtype": (lambda: ops.layer_norm(X, W.double()), TypeError, "weight has dtype torch.float64; for x of torch.float32 and torch's exact"),
    "bias dtype": (lambda: ops.layer_norm(X.half(), W.half(), W), TypeError, "bias has dtype torch.float32; with torch's exact rounding it should be"),
    "device": (lambda: ops.rms_norm(X, W.to("meta")), ValueError, "weight is on meta; it should be on cpu"),
    "eps zero": (lambda: ops.rms_norm(X, eps=0.0), ValueError, "eps is 0.0; it should be greater than 0"),
    "eps nan": (lambda: ops.layer_norm(X, eps=float("nan")), ValueError, "eps is nan"),
    "rounding": (lambda: ops.rms_norm(X, rounding="t5"), ValueError, "rounding is 't5'; it should be one of 'diffusers', 'torch'"),
    "rounding list": (lambda: ops.layer_norm(X, rounding=[]), ValueError, r"rounding is \[\]; it should be one of 'torch', 'float32'"),
    "numerics": (lambda: ops.layer_norm_2d(X[None], numerics="fast"), ValueError, "numerics is 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    run, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run()
    assert all(sum(counts.values()) == 0 for counts in ops.stats().values())
