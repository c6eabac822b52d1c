"""The gradients of GroupNorm with SiLU by csrc/cuda with every thread on the CPU (tests/kernels/cuda_on_cpu): values, sums over pixels, layouts, barriers."""

import pytest
import torch

from fusewire.kernels.group_norm_silu import cuda_backward, reference
from tests.kernels.group_norm_silu.cases import FORMATS, MANY_CHANNELS, OPTIONS, call, gradients, inputs, stock, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tails; one channel a group; channels of 1, 2, 16 and 32 threads and of a block; groups that whole chunks fill though their channels do not; five and
# three dimensions
SHAPES = [((1, 3, 5, 7), 1), ((1, 12, 1, 3), 2), ((2, 10, 6, 6), 10), ((1, 16, 5, 2), 2), ((1, 32, 8, 8), 4), ((1, 3, 16, 32), 1), ((1, 6, 29, 36), 3),
          ((1, 8, 3, 5, 7), 2), ((2, 12, 67), 3)]


@pytest.fixture
def backward(in_cuda):
    """The gradients, which csrc/cuda must have computed."""
    def run(v: dict, groups: int, grad: torch.Tensor, **keywords) -> dict[str, torch.Tensor]:
        with in_cuda("group_norm_silu_backward"), torch.enable_grad():
            return gradients(call, v, groups, grad, numerics="close", **keywords)
    return run


def check(backward, v: dict, groups: int, **keywords) -> None:
    """dx keeps the rule of close against eager PyTorch's, in x's memory format; the parameters' few elements, whose errors are luck, are right."""
    grad = torch.randn(v["x"].shape).to(v["x"].dtype)
    got, plain = backward(v, groups, grad, **keywords), gradients(stock, v, groups, grad, **keywords)
    for name, want in gradients(stock, wide(v), groups, grad.double(), **keywords).items():
        if name == "x" and want.numel() >= 128:
            assert_close(got[name], want, plain[name], name)
        else:
            assert_within(got[name], want, 16, name)
        assert got[name].is_contiguous() if name != "x" else got[name].stride() == v["x"].stride()


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(backward, dtype, memory_format, shape, groups):
    """tail: with and without SiLU and each parameter."""
    for options in OPTIONS:
        v = inputs(shape, dtype, options, memory_format)
        before = {name: tensor.clone() for name, tensor in v.items()}
        for silu in (True, False):
            check(backward, v, groups, silu=silu)
        assert all(torch.equal(before[name], v[name]) for name in v)


@pytest.mark.parametrize("dtype, shape, groups", MANY_CHANNELS, ids=str)
def test_many_channels(backward, dtype, shape, groups):
    check(backward, inputs(shape, dtype, "all", "channels_last"), groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_one_channel(backward, monkeypatch, dtype):
    """A block a channel, whose threads walk over it: of two, then of one chunk in each thread, and not in every one; chunks shared with the next channel.
    And two blocks, each with one chunk for every thread."""
    for pixels in (39 * 67, 61 * 84):
        check(backward, inputs((1, 8, pixels), dtype, "all"), 1)
    monkeypatch.setattr(cuda_backward, "PLANE", 256 * 16 // dtype.itemsize)
    check(backward, inputs((1, 2, 2 * cuda_backward.PLANE), dtype, "all"), 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("plane, smallest", ((1, 1), (16, 64), (100, 200), (700, 2**14)))
def test_parts(backward, monkeypatch, memory_format, plane, smallest):
    """As of large pictures: several parts of a channel, the last one cut short or with nothing left, whose sums a second kernel adds up."""
    for name, value in (("PLANE", plane), ("SMALLEST", smallest)):
        monkeypatch.setattr(cuda_backward, name, value)
    for shape in ((2, 6, 23, 19), (1, 8, 12, 16), (1, 4, 3, 3)):
        check(backward, inputs(shape, torch.bfloat16, "all", memory_format), 2)


def test_how_channels_are_cut():
    """One part for small pictures; by the picture's size alone."""
    assert [cuda_backward.parts_of(320, pixels, False) for pixels in (1, 4096, 8192, 8193, 2**20)] == [1, 1, 1, 2, 128]
    assert [cuda_backward.parts_of(channels, pixels, True) for channels, pixels in ((320, 1), (8, 9), (320, 4096), (1280, 4096), (128, 2**20))] == [
        1, 1, 80, 256, 2048]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_some_gradients(backward, memory_format):
    """What is not wanted changes nothing in the rest."""
    v, grad = inputs((2, 6, 5, 7), options="all", memory_format=memory_format), torch.randn(2, 6, 5, 7)
    want = backward(v, 3, grad)
    for wanted in (*((name,) for name in v), ("weight", "add")):
        for name, got in backward(v, 3, grad, wanted=wanted).items():
            assert_exact(got, want[name], name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 16, 8, 8)], ids=str)
def test_strided_input(backward, layout, shape):
    """strided-input, misaligned, strided-grad: the same bits for any layout of a parameter or of the gradient; and of x where it keeps the memory
    format, copied or not."""
    v, grad, groups = inputs(shape, torch.bfloat16), torch.randn(shape).bfloat16(), shape[1] // 2
    v["x"][1], grad[1] = v["x"][0], grad[0]  # so that an expanded layout exists
    want, right = backward(v, groups, grad), gradients(stock, wide(v), groups, grad.double())
    for changed in (*v, "grad"):
        laid = {**v, "grad": grad, changed: layout(grad if changed == "grad" else v[changed])}
        got = backward({name: laid[name] for name in v}, groups, laid["grad"])
        for name in v:
            what = f"{name} where {changed} is {layout.__name__}"
            if got["x"].stride() == want["x"].stride():
                assert_exact(got[name], want[name], what)
            else:
                assert changed == "x" and layout.__name__ in ("transposed", "reversed_permute"), what
                assert_within(got[name], right[name], 16, what)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_samples_apart(backward, memory_format):
    """Samples of x and of the gradient that are dense, but not next to each other nor aligned, or one sample for all, are read in place."""
    def apart():
        base = torch.randn(2 * 3 * 8 * 9 * 9 + 1)[1:].view(3, 2, 8 * 9 * 9)[:, 0]
        return base.view(3, 8, 9, 9) if memory_format == "contiguous" else base.view(3, 9, 9, 8).permute(0, 3, 1, 2)

    x, grad = apart(), apart()
    for x, grad in ((x, grad), (x[:1].expand(3, 8, 9, 9), grad), (x, grad[:1].expand(3, 8, 9, 9))):
        seen = reference.suggest_memory_format(x)  # of an expanded picture not the one that its samples have
        dense = backward({"x": x.clone(memory_format=seen)}, 4, grad.clone(memory_format=seen))
        assert_exact(backward({"x": x}, 4, grad)["x"], dense["x"])


def test_int32_stride(backward):
    """int32-stride: three samples 2^30 elements apart (memory that is never touched in between), of x or of the gradient."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (3, 4, 2, 4), (2**30, 8, 4, 1))
    v, grad = inputs((3, 4, 2, 4), torch.bfloat16), torch.randn(3, 4, 2, 4).bfloat16()
    want = backward(v, 2, grad)
    far.copy_(v["x"])
    of_x = backward({**v, "x": far}, 2, grad)
    far.copy_(grad)
    of_grad = backward(v, 2, far)
    for name in v:
        assert_exact(of_x[name], want[name], name)
        assert_exact(of_grad[name], want[name], name)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("plane", (100, 2**13))
def test_batch_coupling(backward, monkeypatch, memory_format, plane):
    """batch-coupling: a sample alone has the gradients that it has among 5."""
    monkeypatch.setattr(cuda_backward, "PLANE", plane)
    monkeypatch.setattr(cuda_backward, "SMALLEST", 4 * plane)
    v, grad = inputs((5, 6, 11, 23), memory_format=memory_format), torch.randn(5, 6, 11, 23)
    whole = backward(v, 2, grad)
    alone = backward({name: t if t.dim() == 1 else t[3:4] for name, t in v.items()}, 2, grad[3:4])
    for name in ("x", "shift", "scale", "add"):
        assert_exact(alone[name], whole[name][3:4], name)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_nondeterminism(backward, cuda_machine, monkeypatch, memory_format):
    """nondeterminism: threads, warps and blocks in the opposite order: a barrier that is missing would give other bits."""
    for plane in (2**13, 200):
        monkeypatch.setattr(cuda_backward, "PLANE", plane)
        monkeypatch.setattr(cuda_backward, "SMALLEST", 4 * plane)
        for shape in ((2, 24, 3, 5), (2, 6, 43, 31)):
            v, grad = inputs(shape, memory_format=memory_format), torch.randn(shape)
            forwards = backward(v, 3, grad)
            cuda_machine.reverse(True)
            try:
                backwards = backward(v, 3, grad)
            finally:
                cuda_machine.reverse(False)
            for name in v:
                assert_exact(forwards[name], backwards[name], name)


@pytest.mark.parametrize("outlier", (False, True), ids=("plain", "outlier"))
@pytest.mark.parametrize("memory_format", FORMATS)
def test_cancellation(backward, monkeypatch, memory_format, outlier):
    """cancellation: mean 100, deviation 0.01, over several parts; and with a first value, about which sums are taken, far from all others."""
    monkeypatch.setattr(cuda_backward, "PLANE", 300)
    v, grad = inputs((1, 6, 29, 31), options="affine", memory_format=memory_format), torch.randn(1, 6, 29, 31)
    v["x"] = 100 + 0.01 * v["x"]
    if outlier:
        v["x"][0, 0, 0, 0] = 101
    got, want = backward(v, 1, grad), gradients(stock, wide(v), 1, grad.double())
    for name in v:
        assert ((got[name] - want[name]).abs().max() / want[name].abs().max()) <= 1e-5, name


@pytest.mark.parametrize("memory_format", FORMATS)
def test_groups_of_equal_values(backward, memory_format):
    """cancellation: a variance of zero, about a mean that no float is: eps alone decides, and nothing is NaN."""
    v = inputs((4, 6, 7, 5), memory_format=memory_format)
    v["x"][:] = torch.tensor([0.1, 1e4 / 3, -1e10 / 3, 0.0]).view(4, 1, 1, 1)
    for name, grad in backward(v, 2, torch.randn(4, 6, 7, 5)).items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("memory_format", FORMATS)
def test_fp16_overflow(backward, memory_format):
    """fp16-overflow: values of +-1000, whose squares do not fit fp16."""
    v = inputs((1, 8, 9, 9), torch.float16, "all", memory_format)
    v["x"] = torch.where(torch.rand_like(v["x"]) > 0.5, 1000.0, -1000.0).half()
    for name, grad in backward(v, 2, torch.randn(1, 8, 9, 9).half()).items():
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_silu(backward, dtype, memory_format):
    """h of +-200, where exp(-|h|) is 0: SiLU's slope is 1 and 0, and nothing is NaN."""
    v, grad = inputs((1, 8, 9, 9), dtype, "all", memory_format), torch.randn(1, 8, 9, 9).to(dtype)
    v["shift"] = torch.tensor([200.0, -200.0], dtype=dtype).repeat(4)[None]
    for got in backward(v, 2, grad).values():
        assert got.isfinite().all()
    assert_within(backward(v, 2, grad)["shift"], torch.tensor([1, 0]).repeat(4) * grad.double().sum((2, 3)), 2)


@pytest.mark.parametrize("shape", ((0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)), ids=str)
def test_empty(backward, shape):
    """empty: a zero in each dimension; sums over no pixels are zero."""
    v = inputs(shape)
    for name, grad in backward(v, 2, torch.randn(shape)).items():
        assert grad.shape == v[name].shape and not grad.any(), name


def test_alias(backward):
    """alias: gradients share no storage with an input, with grad_out or with each other."""
    v, grad = inputs((2, 6, 5, 7)), torch.randn(2, 6, 5, 7)
    found, given_ = ([t.untyped_storage().data_ptr() for t in tensors] for tensors in (backward(v, 3, grad).values(), (*v.values(), grad)))
    assert len(set(found)) == len(found) and not set(found) & set(given_)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_eps(backward, memory_format):
    """eps: inside the root; x ~ 1e-4, where it decides the result."""
    v = inputs((1, 4, 6, 6), options="affine", memory_format=memory_format)
    v["x"] = v["x"] * 1e-4
    for eps in (1e-5, 1e-6):
        check(backward, v, 2, eps=eps)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_special_values(backward, memory_format):
    """A NaN of x or of the gradient reaches its group's dx, and no other group; so does an infinity. A channel that has one shares a chunk with others."""
    v, grad = inputs((2, 6, 5, 7), torch.bfloat16, "affine", memory_format), torch.randn(2, 6, 5, 7).bfloat16()
    v["x"][0, 1, 4, 6], v["x"][1, 5, 0, 0], grad[1, 0, 4, 6] = torch.nan, torch.inf, torch.nan
    found = backward({**v, "add": torch.zeros(2, 6).bfloat16()}, 3, grad)
    want = [[True, False, False], [True, False, True]]
    for name in ("x", "add"):
        spoiled = found[name].isnan().reshape(2, 3, -1)
        assert spoiled.all(2).tolist() == spoiled.any(2).tolist() == want, name
    assert found["bias"].isnan().tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_biased_cast(backward, memory_format):
    """biased-cast: the bfloat16 gradients are rounded, not truncated."""
    v, grad = inputs((1, 16, 40, 48), torch.bfloat16, "affine", memory_format), torch.randn(1, 16, 40, 48).bfloat16()
    got, want = backward(v, 4, grad)["x"], gradients(stock, wide(v), 4, grad.double())["x"]
    assert_unbiased(got, want)
