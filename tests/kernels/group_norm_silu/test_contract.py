"""What every op of the project promises, for group_norm_silu: layouts, batches, threads, gradients, tracing, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.group_norm_silu.reference import suggest_memory_format
from fusewire.kernels.library import CPU
from tests.kernels.group_norm_silu.cases import DTYPES, FORMATS, OPTIONS, call, in_format, inputs, leaves, served, stock
from tests.kernels.on_reference import MIXED_DTYPES
from tests.layouts import LAYOUTS
from tests.tolerance import assert_exact

needs_library = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
NUMERICS = ("exact", "close")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype, layout):
    """strided-input, misaligned: the same values in any layout give the bits of the picture that is dense in the memory format torch sees."""
    v = inputs((2, 6, 5, 7), dtype)
    v = {name: tensor if tensor.dim() == 1 else tensor[:1].expand(tensor.shape).clone() for name, tensor in v.items()}  # an expanded layout exists
    for numerics in NUMERICS:
        for argument in v:
            strided = {**v, argument: layout(v[argument])}
            dense = {**v, "x": v["x"].contiguous(memory_format=suggest_memory_format(strided["x"]))}
            assert_exact(call(strided, 3, numerics=numerics), call(dense, 3, numerics=numerics), argument)
            if numerics == "exact":
                assert_exact(call(strided, 3), stock(strided, 3), argument)
    assert not CPU.loaded or layout.__name__ == "expanded" or served()[1] == 0


@pytest.mark.parametrize("numerics", NUMERICS)
@needs_library
def test_slices_are_read_in_place(numerics):
    """strided-input: slices along the batch and expanded batches of both formats, and pictures cut out of wider ones."""
    for memory_format in FORMATS:
        base = inputs((6, 8, 5, 7), options="plain", memory_format=memory_format)["x"]
        for x in (base[::2], base[1:4], base[:1].expand(3, -1, -1, -1), base[:, 2:6], base[..., 1:5], base[:, :, ::2]):
            dense = x.contiguous(memory_format=suggest_memory_format(x))
            got = ops.group_norm_silu(x, 2, numerics=numerics)
            assert_exact(got, ops.group_norm_silu(dense, 2, numerics=numerics))
            assert got.stride() == torch.nn.functional.group_norm(x, 2).stride()
    assert served()[1] == 0


@needs_library
def test_int32_stride():
    """int32-stride: samples, channels and pixels 2^30 elements apart (memory that is never touched in between)."""
    base = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    for shape, strides in (((3, 4, 2, 3), (2**30, 6, 3, 1)), ((1, 3, 2, 4), (2**31, 2**30, 4, 1)), ((1, 4, 3, 2), (2**31, 1, 2**30, 4))):
        v = inputs(shape, torch.bfloat16, "plain")
        far = torch.as_strided(base, shape, strides)
        far.copy_(v["x"])
        for numerics in NUMERICS:
            dense = v["x"].contiguous(memory_format=suggest_memory_format(far))
            assert_exact(ops.group_norm_silu(far, 1, numerics=numerics), ops.group_norm_silu(dense, 1, numerics=numerics))
    assert served()[1] == 0


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype, numerics, memory_format):
    """batch-coupling: a sample alone equals the sample in a batch of 8. In exact as far as stock keeps it so: not where its silu's tails fall
    differently (float32 and float64, by the length of the whole), nor in large channels-last pictures, which its threads share."""
    for shape, groups in (((8, 12, 8, 8), 3), ((8, 30, 33, 40), 5)):
        if numerics == "exact" and memory_format == "channels_last" and shape[2] * shape[3] >= 1024:
            continue
        v = inputs(shape, dtype, "all", memory_format)
        silu = numerics == "close" or dtype in (torch.bfloat16, torch.float16)
        alone = {name: tensor if tensor.dim() == 1 else tensor[5:6] for name, tensor in v.items()}
        assert_exact(call(alone, groups, numerics=numerics, silu=silu), call(v, groups, numerics=numerics, silu=silu)[5:6])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_nondeterminism(numerics, memory_format):
    """nondeterminism: 20 repeats give the same bits, and in close any number of threads does (exact follows stock's)."""
    v, threads = inputs((3, 24, 40, 41), memory_format=memory_format), torch.get_num_threads()
    want = call(v, 4, numerics=numerics)
    for _ in range(20):
        assert torch.equal(call(v, 4, numerics=numerics), want)
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(call(v, 4, numerics=numerics), want if numerics == "close" else stock(v, 4)), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("shape", ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0), (2, 4, 0)), ids=str)
def test_empty(shape, numerics):
    """empty: a zero in each dimension, forward and backward."""
    v = leaves(inputs(shape))
    out = call(v, 2, numerics=numerics)
    assert out.shape == shape
    for grad, tensor in zip(torch.autograd.grad(out.sum(), list(v.values()), allow_unused=True), v.values()):
        assert grad.shape == tensor.shape and not grad.any()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_alias(numerics, memory_format):
    """alias: inputs keep their bits, the output shares no storage with them; gradients share none with each other."""
    v = leaves(inputs((2, 6, 5, 7), memory_format=memory_format))
    before = {name: tensor.detach().clone() for name, tensor in v.items()}
    out = call(v, 3, numerics=numerics)
    found = torch.autograd.grad(out.square().sum(), list(v.values()))
    storages = [tensor.untyped_storage().data_ptr() for tensor in (out, *v.values(), *found)]
    assert len(set(storages)) == len(storages)
    assert all(torch.equal(v[name], before[name]) for name in v)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_gradcheck(numerics, memory_format, options):
    v = leaves(inputs((2, 4, 2, 3), torch.float64, options, memory_format))
    run = lambda *tensors: call(dict(zip(v, tensors)), 2, numerics=numerics)  # noqa: E731
    assert torch.autograd.gradcheck(run, list(v.values()))
    assert torch.autograd.gradgradcheck(run, list(v.values()), atol=1e-4, fast_mode=True)
    assert CPU.loaded is (served()[1] == 0)


@pytest.mark.parametrize("memory_format", FORMATS)
@needs_library
def test_exact_gradients(memory_format):
    """strided-grad: expanded (`.sum()`) and transposed grad_out give the stock chain's gradients, bit for bit."""
    v = leaves(inputs((2, 6, 5, 7), memory_format=memory_format))
    for grad in (torch.ones(()).expand(2, 6, 5, 7), torch.randn(7, 5, 6, 2).permute(3, 2, 1, 0)):
        got, want = (torch.autograd.grad(out, list(v.values()), grad) for out in (call(v, 3), stock(v, 3)))
        for name, a, b in zip(v, got, want):
            assert_exact(a, b, name)


@pytest.mark.parametrize("memory_format", ("contiguous", "channels_last", "permuted"))
@pytest.mark.parametrize("shape, exact", [((2, 6, 5, 7), False), ((2, 6, 5, 7), True), ((2, 6, 3, 5, 7), False), ((2, 6, 9), True),
                                          *(pytest.param(*other, marks=pytest.mark.slow) for other in (((2, 6, 3, 5, 7), True), ((2, 6, 9), False)))], ids=str)
def test_fake_mismatch(shape, exact, memory_format):
    """fake-mismatch: opcheck on contiguous, channels-last and permuted-dense inputs."""
    v = inputs(shape, memory_format="contiguous" if memory_format == "permuted" else memory_format)
    if memory_format == "permuted":
        v["x"] = v["x"].transpose(0, -1).contiguous().transpose(0, -1)
    v = leaves(v)
    op = torch.ops.fusewire.group_norm_silu.default
    opcheck(op, (v["x"], 3, v["weight"], v["bias"], 1e-5, v["shift"], v["scale"], v["add"], True, exact))
    opcheck(op, (v["x"], 2, None, None, 1e-5, None, None, None, False, exact))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("numerics", NUMERICS)
@needs_library
def test_compile(numerics, memory_format):
    """No graph break, the same bits forward, the same gradients in a training step; a second shape compiles too."""
    compiled = torch.compile(lambda v: call(v, 3, numerics=numerics), fullgraph=True, backend="aot_eager")
    for shape in ((2, 6, 5, 7), (1, 9, 33, 35)):
        v = leaves(inputs(shape, memory_format=memory_format))
        got, want = compiled(v), call(v, 3, numerics=numerics)
        assert torch.equal(got, want) and got.stride() == want.stride()
        grads = [torch.autograd.grad(out.square().sum(), list(v.values())) for out in (got, want)]
        assert all(map(torch.equal, *grads))


@MIXED_DTYPES
@pytest.mark.parametrize("dtypes", [(x, m) for x in DTYPES for m in DTYPES], ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("autocast", (False, True))
def test_autocast(autocast, dtypes):
    """autocast: every pair of x's and the modulations' dtype gives what stock gives, forward and backward."""
    v = inputs((2, 6, 5, 7), dtypes[0], "adagn")
    v = leaves({name: tensor.to(dtypes[1]) if name in ("shift", "scale") else tensor for name, tensor in v.items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, want = call(v, 3), stock(v, 3)
        assert_exact(got, want)
        assert call(v, 3, numerics="close").dtype is want.dtype
        for a, b in zip(torch.autograd.grad(got.sum(), list(v.values())), torch.autograd.grad(want.sum(), list(v.values())), strict=True):
            assert_exact(a, b)


@pytest.mark.on_reference
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_mixed_dtypes_are_counted_on_the_reference(dtype):
    """silent-off: what the CPU row does not serve runs on the reference, visibly; forcing the row is an error that says why."""
    v = inputs((1, 6, 4, 4), dtype, "affine")
    v["weight"], v["bias"] = v["weight"].float(), v["bias"].float()
    assert_exact(call(v, 3), stock(v, 3))
    assert served() == (0, 1)
    if CPU.loaded:
        with forced("cpu"), pytest.raises(RuntimeError, match=f"weight has dtype torch.float32, x has {dtype}"):
            call(v, 3)


def test_vmap():
    v = inputs((3, 4, 5, 5), options="affine")
    got = torch.vmap(lambda x: ops.group_norm_silu(x[None], 2, v["weight"], v["bias"])[0])(v["x"])
    want = torch.cat([ops.group_norm_silu(x[None], 2, v["weight"], v["bias"]) for x in v["x"]])
    assert_exact(got, want)


def test_parameters_of_every_shape():
    v = inputs((2, 6, 5, 7))
    column = {name: tensor[..., None, None] if name in ("shift", "scale", "add") else tensor for name, tensor in v.items()}
    assert_exact(call(column, 3), call(v, 3))


BAD = {
    "x is a list": (lambda v: call({**v, "x": [1]}, 2), TypeError, "x is a list; it should be a torch.Tensor"),
    "x integer": (lambda v: call({**v, "x": v["x"].int()}, 2), TypeError, "x has dtype torch.int32"),
    "x rank": (lambda v: call({**v, "x": v["x"][0, 0]}, 2), ValueError, r"x has shape \[3, 4\]; it should be \[B, C, L\]"),
    "x rank 6": (lambda v: call({**v, "x": v["x"][None, None]}, 2), ValueError, r"x has shape \[1, 1, 2, 6, 3, 4\]"),
    "groups": (lambda v: call(v, 4), ValueError, "groups is 4; it should be a divisor of x's 6 channels"),
    "groups zero": (lambda v: call(v, 0), ValueError, "groups is 0; it should be a divisor"),
    "groups negative": (lambda v: call(v, -2), ValueError, "groups is -2; it should be a divisor"),
    "groups float": (lambda v: call(v, 2.0), TypeError, "groups is a float; it should be an int"),
    "weight shape": (lambda v: call({**v, "weight": torch.ones(5)}, 2), ValueError, r"weight has shape \[5\]; it should be \[6\]"),
    "bias dtype": (lambda v: call({**v, "bias": torch.ones(6).int()}, 2), TypeError, "bias has dtype torch.int32"),
    "shift shape": (lambda v: call({**v, "shift": v["shift"][:1]}, 2), ValueError, r"shift has shape \[1, 6\]; .* be \[2, 6\] or \[2, 6, 1, 1\]"),
    "scale shape": (lambda v: call({**v, "scale": v["x"]}, 2), ValueError, r"scale has shape \[2, 6, 3, 4\]"),
    "add list": (lambda v: call({**v, "add": [1]}, 2), TypeError, "add is a list"),
    "device": (lambda v: call({**v, "add": v["add"].to("meta")}, 2), ValueError, "add is on meta; it should be on cpu"),
    "silu": (lambda v: call(v, 2, silu="yes"), TypeError, "silu is 'yes'; it should be True or False"),
    "eps zero": (lambda v: call(v, 2, eps=0.0), ValueError, "eps is 0.0; it should be greater than 0"),
    "eps nan": (lambda v: call(v, 2, eps=float("nan")), ValueError, "eps is nan"),
    "numerics": (lambda v: call(v, 2, numerics="fast"), ValueError, "numerics is 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    run, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run(inputs((2, 6, 3, 4)))
    assert all(sum(counts.values()) == 0 for counts in ops.stats().values())
