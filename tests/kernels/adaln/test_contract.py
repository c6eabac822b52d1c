"""What every op of the project promises, for adaln: layouts, batches, threads, gradients, tracing, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.adaln import reference
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.adaln.cases import DTYPES, NAMES, call, far_apart, inputs, op_name, repeated, served, stock, used, with_affine
from tests.kernels.on_reference import MIXED_DTYPES
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
NUMERICS = ("exact", "close")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, layout):
    """strided-input, misaligned: the same values in any layout give the same bits, one argument at a time."""
    for kind in ("chunk", "token"):
        v = repeated(dtype, kind)
        for numerics in NUMERICS:
            for name in NAMES:
                want = call(name, v, numerics=numerics)
                for argument in used(name):
                    for got, expected in zip(call(name, {**v, argument: layout(v[argument])}, numerics=numerics), want, strict=True):
                        assert_exact(got, expected, f"{name} {argument}")
    weight = torch.rand(35).to(dtype)
    want = call("adaln_modulate", v, weight=weight, bias=weight)[0]
    strided = weight.repeat_interleave(2)[::2]
    assert_exact(call("adaln_modulate", v, weight=strided, bias=strided)[0], want)
    assert CPU.loaded is all(ops.stats()[op_name(name)]["reference"] == 0 for name in NAMES)


@needs_library
def test_int32_stride():
    """int32-stride: three tokens 2^30 elements apart."""
    far, v = far_apart()
    far.copy_(v["x"])
    for name in NAMES:
        for argument in used(name):
            far.copy_(v[argument])
            for got, want in zip(call(name, {**v, argument: far}), call(name, v), strict=True):
                assert_exact(got, want, f"{name} {argument}")


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype, numerics):
    """batch-coupling: a sample alone equals the sample in a batch of 8, and a token alone the token among 9."""
    v = inputs(8, 9, 130, dtype)
    for name in NAMES:
        whole = call(name, v, numerics=numerics)
        for got, want in zip(call(name, {k: t[5:6] for k, t in v.items()}, numerics=numerics), whole, strict=True):
            assert_exact(got, want[5:6], name)
        for got, want in zip(call(name, {k: t[:, 3:4] if t.dim() == 3 else t for k, t in v.items()}, numerics=numerics), whole, strict=True):
            assert_exact(got, want[:, 3:4], name)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_nondeterminism(numerics):
    """nondeterminism: 20 repeats and any number of threads give the same bits."""
    v, threads = inputs(2, 50, 300), torch.get_num_threads()
    for name in NAMES:
        want = call(name, v, numerics=numerics)
        for _ in range(20):
            assert all(map(torch.equal, call(name, v, numerics=numerics), want))
        try:
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                assert all(map(torch.equal, call(name, v, numerics=numerics), want)), n
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 3, 0)), ids=str)
def test_empty(shape):
    """empty: a zero in each dimension, forward and backward."""
    v = {name: tensor.detach().requires_grad_() for name, tensor in inputs(*shape).items()}
    for name in NAMES:
        outputs = call(name, v)
        assert all(out.shape == shape for out in outputs)
        torch.autograd.grad([out.sum() for out in outputs], [v[argument] for argument in used(name)])


@pytest.mark.parametrize("numerics", NUMERICS)
def test_alias(numerics):
    """alias: inputs keep their bits, outputs share no storage with them or each other."""
    v = inputs(2, 5, 32)
    before = {name: tensor.clone() for name, tensor in v.items()}
    for name in NAMES:
        storages = [t.untyped_storage().data_ptr() for t in (*call(name, v, numerics=numerics), v["x"], v["y"], v["y2"], v["shift"])]
        assert len(set(storages)) == len(storages)
    assert all(torch.equal(v[name], before[name]) for name in v)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kind", ("chunk", "token"))
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, kind, numerics):
    v = {k: t.detach().requires_grad_() for k, t in inputs(2, 2, 3, torch.float64, kind).items()}
    names = used(name)
    run = lambda *tensors: call(name, dict(zip(names, tensors)), numerics=numerics)  # noqa: E731
    assert torch.autograd.gradcheck(run, [v[k] for k in names])
    assert torch.autograd.gradgradcheck(run, [v[k] for k in names], atol=1e-4, fast_mode=True)
    assert CPU.loaded is (ops.stats()[op_name(name)]["reference"] == 0)


@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_gradcheck_affine(norm):
    v = {k: t.detach().requires_grad_() for k, t in inputs(2, 3, 5, torch.float64).items()}
    weight, bias = torch.rand(5).double().requires_grad_(), torch.rand(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s, c, w, b: ops.adaln_modulate(x, s, c, norm=norm, weight=w, bias=b),
                                    (v["x"], v["shift"], v["scale"], weight, bias))


@pytest.mark.parametrize("name", NAMES)
@needs_library
def test_strided_grad(name):
    """strided-grad: expanded (`.sum()`) and transposed grad_out give the reference's gradients, bit for bit."""
    v = {k: t.detach().requires_grad_() for k, t in inputs(2, 3, 8).items()}
    wanted = [v[k] for k in used(name)]
    for grad in (torch.ones(()).expand(2, 3, 8), torch.randn(8, 3, 2).transpose(0, 2)):
        found = [torch.autograd.grad(outputs, wanted, [grad] * len(outputs)) for outputs in (call(name, v), stock(name, v))]
        for got, want in zip(*found, strict=True):
            assert_exact(got, want, name)


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("exact", (False, True), ids=("close", "exact"))
def test_fake_mismatch(exact, permuted):
    """fake-mismatch: opcheck of every registration, on contiguous and on permuted-dense inputs."""
    v = {k: (t.transpose(0, -1).contiguous().transpose(0, -1) if permuted else t).detach().requires_grad_()
         for k, t in inputs(2, 3, 8).items()}
    weight = torch.rand(8, requires_grad=True)
    fusewire = torch.ops.fusewire
    norm = (1e-6, False, exact)
    opcheck(fusewire.adaln_modulate.default, (v["x"], v["shift"], v["scale"], None, None, *norm))
    opcheck(fusewire.adaln_modulate_dual.default, (v["x"], v["shift"], v["scale"], v["shift2"], v["scale2"], None, None, *norm))
    opcheck(fusewire.adaln_modulate_dual.default, (v["x"], v["shift"], v["scale"], v["shift2"], v["scale2"], weight, weight, 1e-6, True, exact))
    opcheck(fusewire.gate_residual.default, (v["x"], v["y"], v["gate"], exact))
    opcheck(fusewire.gate_residual_adaln.default, (v["x"], v["y"], v["gate"], v["y2"], v["gate2"], v["shift"], v["scale"], weight, weight, *norm))


@pytest.mark.parametrize("numerics", NUMERICS)
@needs_library
def test_compile(numerics):
    """No graph break, the same bits forward, the same gradients in a training step; a second shape compiles too."""
    def step(v):
        return [out for name in NAMES for out in call(name, v, numerics=numerics)]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch, tokens in ((2, 5), (1, 9)):
        v = {k: t.detach().requires_grad_() for k, t in inputs(batch, tokens, 32).items()}
        got, want = compiled(v), step(v)
        assert all(map(torch.equal, got, want))
        grads = [torch.autograd.grad(sum(out.square().sum() for out in outputs), list(v.values())) for outputs in (got, want)]
        assert all(map(torch.equal, *grads))


@MIXED_DTYPES
@pytest.mark.parametrize("dtypes", [(x, m) for x in DTYPES for m in DTYPES], ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("autocast", (False, True))
def test_autocast(autocast, dtypes):
    """autocast: every pair of x's and the modulations' dtype gives what stock gives, forward and backward."""
    v = {k: (t if k in ("x", "y", "y2") else t.to(dtypes[1])).detach().requires_grad_() for k, t in inputs(2, 3, 16, dtypes[0]).items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for name in NAMES:
            got, want = call(name, v), stock(name, v)
            for a, b in zip(got, want, strict=True):
                assert_exact(a, b, name)
            close = call(name, v, numerics="close")
            assert [t.dtype for t in close] == [t.dtype for t in want]
            wanted = [v[k] for k in used(name)]
            for a, b in zip(torch.autograd.grad([t.sum() for t in got], wanted), torch.autograd.grad([t.sum() for t in want], wanted), strict=True):
                assert a.dtype is b.dtype and torch.allclose(a, b, equal_nan=True, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("exact", (False, True), ids=("close", "exact"))
def test_fake_mismatch_of_mixed_dtypes(exact):
    """fake-mismatch: for arguments that differ in dtype the fake kernels, which the Triton rows have too, promise what PyTorch's promotion gives."""
    v = with_affine(inputs(2, 3, 8, torch.bfloat16))
    for op, names, rest in (("adaln_modulate", ("x", "shift", "scale"), (None, None, 1e-6, False, exact)), ("gate_residual", ("x", "y", "gate"), (exact,)),
                            ("adaln_modulate_dual", ("x", "shift", "scale", "shift2", "scale2"), (None, None, 1e-6, False, exact)),
                            ("adaln_modulate_dual", ("x", "shift", "scale", "shift2", "scale2", "weight", "bias"), (1e-6, True, exact))):
        for wide in names:
            given = [v[name].float() if name == wide else v[name] for name in names]
            made, want = (f(*tensors, *rest) for f, tensors in ((getattr(torch.ops.fusewire, op).default, [t.to("meta") for t in given]),
                                                               (getattr(reference, op), given)))
            made, want = ((made,), (want,)) if isinstance(made, torch.Tensor) else (made, want)
            assert [out.dtype for out in made] == [out.dtype for out in want], (op, wide)


@pytest.mark.on_reference
def test_mixed_dtypes_are_counted_on_the_reference():
    """silent-off: what the CPU row does not serve runs on the reference, visibly; forcing the row is an error that says why."""
    v = inputs(1, 2, 8, torch.bfloat16)
    v["scale"] = v["scale"].float()
    call("adaln_modulate", v)
    assert served("adaln_modulate") == (0, 1)
    if CPU.loaded:
        with forced("cpu"), pytest.raises(RuntimeError, match="scale has dtype torch.float32, x has torch.bfloat16"):
            call("adaln_modulate", v)


def test_vmap():
    v = inputs(3, 4, 8)
    got = torch.vmap(lambda x: ops.adaln_modulate(x[None], v["shift"][:1], v["scale"][:1])[0])(v["x"])
    want = ops.adaln_modulate(v["x"], v["shift"][:1].expand(3, 8), v["scale"][:1].expand(3, 8))
    assert_exact(got, want)


BAD = {
    "x is a list": (lambda v: call("adaln_modulate", {**v, "x": [1]}), TypeError, "x is a list; it should be a torch.Tensor"),
    "x integer": (lambda v: call("gate_residual", {**v, "x": v["x"].int()}), TypeError, "x has dtype torch.int32"),
    "x rank": (lambda v: call("adaln_modulate", {**v, "x": v["x"][0]}), ValueError, r"x has shape \[3, 8\]; it should be \[B, T, C\]"),
    "scale channels": (lambda v: call("adaln_modulate", {**v, "scale": v["scale"][:, :7]}), ValueError, r"scale has shape \[2, 7\]"),
    "shift batch": (lambda v: call("adaln_modulate_dual", {**v, "shift2": v["shift2"][:1]}), ValueError, r"shift2 has shape \[1, 8\]"),
    "gate integer": (lambda v: call("gate_residual", {**v, "gate": v["gate"].int()}), TypeError, "gate has dtype torch.int32"),
    "y shape": (lambda v: call("gate_residual_adaln", {**v, "y": v["y"][:, :2]}), ValueError, r"y has shape \[2, 2, 8\]; it should be \[2, 3, 8\], as x"),
    "y2 alone": (lambda v: ops.gate_residual_adaln(v["x"], v["y"], v["gate"], v["shift"], v["scale"], y2=v["y2"]), ValueError, "gate2 is None"),
    "gate2 alone": (lambda v: ops.gate_residual_adaln(v["x"], v["y"], v["gate"], v["shift"], v["scale"], gate2=v["gate"]), ValueError, "y2 is None"),
    "device": (lambda v: call("adaln_modulate", {**v, "shift": v["shift"].to("meta")}), ValueError, "shift is on meta; it should be on cpu"),
    "weight shape": (lambda v: call("adaln_modulate", v, weight=torch.ones(7)), ValueError, r"weight has shape \[7\]; it should be \[8\]"),
    "dual weight shape": (lambda v: call("adaln_modulate_dual", v, weight=torch.ones(7)), ValueError, r"weight has shape \[7\]; it should be \[8\]"),
    "dual norm": (lambda v: call("adaln_modulate_dual", v, norm="batch"), ValueError, "norm is 'batch'"),
    "dual scale": (lambda v: call("adaln_modulate_dual", {**v, "shift2": None, "scale2": None}), TypeError, "scale2 is a NoneType"),
    "eps zero": (lambda v: call("adaln_modulate", v, eps=0.0), ValueError, "eps is 0.0; it should be greater than 0"),
    "eps nan": (lambda v: call("two_gates", v, eps=float("nan")), ValueError, "eps is nan"),
    "norm": (lambda v: call("adaln_modulate", v, norm="batch"), ValueError, "norm is 'batch'"),
    "numerics": (lambda v: call("gate_residual", v, numerics="fast"), ValueError, "numerics is 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    run, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run(inputs(2, 3, 8))
    assert all(sum(counts.values()) == 0 for counts in ops.stats().values())
