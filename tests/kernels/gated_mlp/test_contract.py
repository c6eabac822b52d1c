"""What every op of the project promises, for the gated activations: layouts, batches, threads, gradients, tracing, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.gated_mlp import reference
from fusewire.kernels.library import CPU
from tests.kernels.gated_mlp.cases import DTYPES, KINDS, call, inputs, leaves, served, stock
from tests.kernels.on_reference import EXACT, MIXED_DTYPES
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
NUMERICS = ("exact", "close")


def gradients(kind: str, v: dict, grad=None, **keywords) -> tuple[torch.Tensor, ...]:
    these, wanted = leaves(v)
    out = call(kind, these, **keywords)
    return torch.autograd.grad(out, wanted, torch.ones_like(out) if grad is None else grad)


def there(v: dict) -> list[str]:
    return [name for name, t in v.items() if t is not None]


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row(kind):
    """x [F]: the gradients, the bias's too, are those of x [1, F] without its first dimension, by the kernel and by the reference that it stands for."""
    v = {name: t if t is None or name == "bias" else t[0] for name, t in inputs(1, 12, kind=kind, batch=1).items()}
    one = {name: t if t is None or name == "bias" else t[0] for name, t in v.items()}
    name, own, apart = KINDS[kind]
    grad = torch.randn(1, 12)

    def by_reference(v, grad):
        rest = () if apart is None else (v["gate"],)
        return getattr(reference, f"{name}_backward")(grad, v["x"], *rest, v["bias"], *([own.get("gate_first", False)] if name == "swiglu" else []), True)

    for of in (lambda v, grad: gradients(kind, v, grad, numerics="close"), by_reference):
        for got, want in zip(of(one, grad[0]), of(v, grad), strict=True):
            assert_exact(got, want if want.dim() == 1 else want[0])
    assert served(kind, "_backward") == (2, 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, kind, layout):
    """strided-input, misaligned: the same values in any layout give the same bits in close, one argument at a time, forward and backward. (exact is
    stock's own code: its activation takes elements that do not fill a vector another way, and a layout decides which those are.)"""
    v = inputs(6, 35, dtype, kind)
    v["x"][1] = v["x"][0]  # so that an expanded layout exists
    want = call(kind, v, numerics="close")
    grad = torch.randn_like(want)
    want_gradients = gradients(kind, v, grad, numerics="close")
    for name in there(v):
        other = {**v, name: layout(v[name])}
        assert_exact(call(kind, other, numerics="close"), want, name)
        for got, expected in zip(gradients(kind, other, grad, numerics="close"), want_gradients, strict=True):
            assert_exact(got, expected, name)
    assert not CPU.loaded or (served(kind)[1], served(kind, "_backward")[1]) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@needs_library
def test_strided_grad(kind):
    """strided-grad: expanded (`.sum()`), transposed and stepping grad_out give the gradients of the same values laid out
    contiguously, and in exact those that stock gives."""
    v = inputs(6, 24, kind=kind)
    shape = call(kind, v).shape
    for grad in (torch.ones(()).expand(shape), torch.randn(shape[::-1]).permute(2, 1, 0), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]):
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
    for kind in ("geglu", "swiglu", "quick_gelu"):
        v = inputs(3, 8 if kind == "quick_gelu" else 4, torch.bfloat16, kind, batch=1)
        far.copy_(v["x"])
        assert_exact(call(kind, {**v, "x": far}, numerics="close"), call(kind, v, numerics="close"))
        grad = far[..., :call(kind, v).shape[-1]]
        for got, want in zip(*(gradients(kind, v, g, numerics="close") for g in (grad, grad.contiguous())), strict=True):
            assert_exact(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype, kind):
    """batch-coupling: in close a sample alone equals the sample in a batch of 8, and so do its gradients."""
    v = inputs(9, 131, dtype, kind, batch=8)
    alone = {name: t if t is None or name == "bias" else t[5:6] for name, t in v.items()}
    whole = call(kind, v, numerics="close")
    assert_exact(call(kind, alone, numerics="close"), whole[5:6])
    grad = torch.randn_like(whole)
    for name, got, want in zip(there(v), gradients(kind, alone, grad[5:6], numerics="close"), gradients(kind, v, grad, numerics="close")):
        if name != "bias":
            assert_exact(got, want[5:6], name)


@pytest.mark.parametrize("kind", KINDS)
def test_nondeterminism(kind):
    """nondeterminism: 20 repeats and any number of threads give the same bits, bias gradients included."""
    v, threads = inputs(150, 301, kind=kind), torch.get_num_threads()
    grad = torch.randn_like(call(kind, v))

    def everything():
        return (call(kind, v, numerics="close"), *gradients(kind, v, grad, numerics="close"))

    want = everything()
    for _ in range(20):
        assert all(map(torch.equal, everything(), want))
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert all(map(torch.equal, everything(), want)), n
    finally:
        torch.set_num_threads(threads)


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", ((0, 3, 8), (2, 0, 8), (2, 3, 0)), ids=str)
def test_empty(sizes, kind, numerics):
    """empty: a zero in each dimension, forward and backward."""
    batch, rows, width = sizes
    these, wanted = leaves(inputs(rows, width, kind=kind, batch=batch))
    out = call(kind, these, numerics=numerics)
    assert out.shape == sizes
    for grad, t in zip(torch.autograd.grad(out.sum(), wanted), wanted):
        assert grad.shape == t.shape and not grad.any()


@pytest.mark.on_reference(when=lambda shape: len(shape) > 9, reason="the kernel takes nine dimensions")
@pytest.mark.parametrize("shape", ((6,), (1, 6), (2, 1, 3, 1, 6), (1,) * 9 + (6,)), ids=str)
def test_any_rank(shape):
    """One dimension up to ten; beyond nine the reference serves."""
    x = torch.randn(shape)
    assert_exact(ops.geglu(x), stock("geglu", {"x": x, "gate": None, "bias": None}))
    if len(shape) <= 9:
        assert_exact(ops.swiglu(x, numerics="close").view(-1, 3), ops.swiglu(x.view(-1, 6), numerics="close"))
    ops.quick_gelu(x, numerics="close")
    assert ops.stats()["quick_gelu"]["reference"] == (not CPU.loaded or len(shape) > 9)


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", KINDS)
def test_alias(kind, numerics):
    """alias: inputs keep their bits; outputs and gradients share no storage with them or each other."""
    v = inputs(5, 32, kind=kind)
    before = {name: v[name].clone() for name in there(v)}
    found = (call(kind, v, numerics=numerics), *gradients(kind, v, numerics=numerics), *(v[name] for name in there(v)))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)
    assert all(torch.equal(v[name], before[name]) for name in before)


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, bias, numerics):
    """First and second derivatives in float64."""
    v = inputs(3, 4, torch.float64, kind, bias, spread=1.5)
    names = there(v)

    def run(*tensors):
        return call(kind, {**v, **dict(zip(names, tensors))}, numerics=numerics)

    wanted = [v[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted, atol=1e-4, fast_mode=True)
    assert not CPU.loaded or (served(kind, "_backward")[0] > 0) is (numerics == "close")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_gradients_of_the_registered_op(kind, dtype):
    """What is recorded with ``exact``, in a graph too, has stock's gradients bit for bit, by no kernel."""
    v = inputs(9, 65, dtype, kind)
    (these, wanted), (others, wanted_too) = leaves(v), leaves(v)
    name, keywords, apart = KINDS[kind]
    rest = (these["bias"],) if apart is None else (these["gate"], these["bias"], *([keywords.get("gate_first", False)] if name == "swiglu" else []))
    got, want = getattr(torch.ops.fusewire, name)(these["x"], *rest, True), stock(kind, others)
    grad = torch.randn_like(want)
    for mine, theirs in zip(torch.autograd.grad(got, wanted, grad), torch.autograd.grad(want, wanted_too, grad), strict=True):
        assert_exact(mine, theirs)
    assert served(kind, "_backward") == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_some_gradients(kind):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(7, 40, kind=kind)
    want = dict(zip(there(v), gradients(kind, v, numerics="close")))
    for name in there(v):
        these = {other: t if t is None else t.detach().requires_grad_(other == name) for other, t in v.items()}
        call(kind, these, numerics="close").sum().backward()
        assert torch.equal(these[name].grad, want[name])
        assert all(these[other].grad is None for other in there(v) if other != name)


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("exact", (False, True), ids=("close", "exact"))
def test_fake_mismatch(exact, permuted):
    """fake-mismatch: opcheck of every registration, on contiguous and on permuted-dense inputs."""
    def lay(*shape):
        x = torch.randn(shape)
        return (x.transpose(0, -1).contiguous().transpose(0, -1) if permuted else x).requires_grad_()

    x, gate, bias, grad = lay(2, 3, 8), lay(2, 3, 8), torch.rand(16, requires_grad=True), lay(2, 3, 8).detach()
    both, fusewire = lay(2, 3, 16), torch.ops.fusewire
    for own in (None, torch.rand(8, requires_grad=True)):
        opcheck(fusewire.quick_gelu.default, (x, own, exact))
        opcheck(fusewire.quick_gelu_backward.default, (grad, x.detach(), None if own is None else own.detach(), own is not None))
    for tensors in ((x, gate, bias), (both, None, bias), (both, None, None)):
        opcheck(fusewire.geglu.default, (*tensors, exact))
        opcheck(fusewire.swiglu.default, (*tensors, tensors[1] is None, exact))
        plain = [None if t is None else t.detach() for t in tensors]
        for of_bias in (False, True)[:1 + (tensors[2] is not None)]:
            opcheck(fusewire.geglu_backward.default, (grad, *plain, of_bias))
            opcheck(fusewire.swiglu_backward.default, (grad, *plain, False, of_bias))


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
@needs_library
def test_compile(numerics):
    """No graph break, the same bits forward, the same gradients in a training step; a second shape compiles too."""
    def step(x, bias):
        half = x.shape[-1] // 2
        return [ops.geglu(x, bias=bias, numerics=numerics), ops.swiglu(x, gate_first=True, numerics=numerics), ops.quick_gelu(x, bias=bias, numerics=numerics),
                ops.swiglu(x[..., :half], gate=x[..., half:], bias=bias, numerics=numerics)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (5, 9):
        x, bias = torch.randn(2, rows, 32, requires_grad=True), torch.randn(32, requires_grad=True)
        got, want = compiled(x, bias), step(x, bias)
        assert all(map(torch.equal, got, want))
        grads = [torch.autograd.grad(sum(out.square().sum() for out in outputs), (x, bias)) for outputs in (got, want)]
        assert all(map(torch.equal, *grads))


@MIXED_DTYPES
@pytest.mark.parametrize("dtypes", [(x, b) for x in DTYPES for b in DTYPES], ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("autocast", (False, True))
def test_autocast(autocast, dtypes):
    """autocast: every pair of x's and the bias's dtype gives what stock gives, forward and backward."""
    for kind in KINDS:
        v = inputs(3, 16, dtypes[0], kind)
        v["bias"] = v["bias"].to(dtypes[1])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (ours, wanted), (theirs, wanted_too) = leaves(v), leaves(v)
            got, want = call(kind, ours), stock(kind, theirs)
            assert_exact(got, want, kind)
            assert call(kind, v, numerics="close").dtype is want.dtype
        for a, b in zip(torch.autograd.grad(got.sum(), wanted), torch.autograd.grad(want.sum(), wanted_too), strict=True):
            assert_exact(a, b, kind)


@EXACT
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_of_quick_gelu(dtype, numerics):
    """autocast: x's dtype, as stock's product and sigmoid, and in exact their bits, forward and backward."""
    x = inputs(3, 16, dtype, "quick_gelu")["x"]
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ops.quick_gelu(ours, numerics=numerics), stock("quick_gelu", {"x": theirs, "gate": None, "bias": None})
    assert got.dtype is want.dtype is dtype
    assert_exact(got, want if numerics == "exact" else ops.quick_gelu(x, numerics=numerics))
    gradients = [torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in ((got, ours), (want, theirs))]
    assert gradients[0].dtype is dtype
    if numerics == "exact":
        assert_exact(*gradients)


@pytest.mark.on_reference
def test_mixed_dtypes_are_counted_on_the_reference():
    """silent-off: what the CPU row does not serve runs on the reference, visibly; forcing the row is an error that says why."""
    v = inputs(2, 8, torch.bfloat16)
    v["bias"] = v["bias"].float()
    call("geglu", v, numerics="close")
    assert served("geglu") == (0, 1)
    if CPU.loaded:
        with forced("cpu"), pytest.raises(RuntimeError, match="an argument has dtype torch.float32, x has torch.bfloat16"):
            call("geglu", v, numerics="close")
        with forced("cpu"), pytest.raises(RuntimeError, match="numerics='exact' keeps PyTorch's own activation"):
            call("swiglu", inputs(2, 8, kind="swiglu"))


def test_vmap():
    v = inputs(4, 8, batch=3)
    for numerics in NUMERICS:
        assert_exact(torch.vmap(lambda x: ops.geglu(x, bias=v["bias"], numerics=numerics))(v["x"]), call("geglu", v, numerics=numerics))
        assert_exact(torch.vmap(lambda x: ops.quick_gelu(x, bias=v["bias"], numerics=numerics))(v["x"]), ops.quick_gelu(v["x"], bias=v["bias"], numerics=numerics))


X = torch.ones(2, 3, 8)
BAD = {
    "x is a list": (lambda: ops.geglu([1.0]), TypeError, "x is a list; it should be a torch.Tensor"),
    "x integer": (lambda: ops.quick_gelu(X.int()), TypeError, "x has dtype torch.int32"),
    "x odd": (lambda: ops.swiglu(X[..., :7]), ValueError, r"x has shape \[2, 3, 7\]; it should be \[\.\.\., 2F\]"),
    "x scalar": (lambda: ops.geglu(torch.tensor(1.0)), ValueError, r"x has shape \[\]; it should be"),
    "x scalar quick": (lambda: ops.quick_gelu(torch.tensor(1.0)), ValueError, r"x has shape \[\]; it should be \[\.\.\., F\]"),
    "gate shape": (lambda: ops.geglu(X, gate=X[:1]), ValueError, r"gate has shape \[1, 3, 8\]; it should be \[2, 3, 8\], as x"),
    "gate integer": (lambda: ops.swiglu(X, gate=X.int()), TypeError, "gate has dtype torch.int32"),
    "gate device": (lambda: ops.swiglu(X, gate=X.to("meta")), ValueError, "gate is on meta; it should be on cpu"),
    "bias of one half": (lambda: ops.geglu(X, bias=torch.ones(4)), ValueError, r"bias has shape \[4\]; it should be \[8\]"),
    "bias beside a gate": (lambda: ops.geglu(X, gate=X, bias=torch.ones(8)), ValueError, r"bias has shape \[8\]; it should be \[16\]"),
    "bias of quick GELU": (lambda: ops.quick_gelu(X, bias=torch.ones(16)), ValueError, r"bias has shape \[16\]; it should be \[8\]"),
    "integer bias": (lambda: ops.quick_gelu(X, bias=torch.ones(8, dtype=torch.int32)), TypeError, "bias has dtype torch.int32"),
    "bias device": (lambda: ops.quick_gelu(X, bias=torch.ones(8, device="meta")), ValueError, "bias is on meta; it should be on cpu"),
    "gate twice": (lambda: ops.swiglu(X, gate=X, gate_first=True), ValueError, "gate_first is True beside a gate of its own"),
    "numerics": (lambda: ops.quick_gelu(X, numerics="fast"), ValueError, "numerics is 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    run, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run()
    assert all(sum(counts.values()) == 0 for counts in ops.stats().values())
