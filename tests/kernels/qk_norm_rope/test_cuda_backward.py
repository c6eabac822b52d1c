"""The gradients of QK norm by csrc/cuda with every thread on the CPU (tests/kernels/cuda_on_cpu): values, sums over rows, layouts, barriers."""

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels import cuda_rows
from fusewire.kernels.dispatch import forced
from fusewire.kernels.qk_norm_rope import cuda_backward, reference, triton_limits
from tests.kernels.qk_norm_rope.cases import NAMES, check, gradients, inputs, plain, wide
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def backward(in_cuda):
    """The gradients, which csrc/cuda must have computed."""
    def run(v: dict, names=NAMES, **options) -> dict[str, torch.Tensor]:
        with in_cuda("qk_norm_rope_backward"), torch.enable_grad():
            return gradients(v, "cuda", names, **options)
    return run


@pytest.mark.parametrize("rotated", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((2, 5, 3, 8), (1, 11, 3, 40), (2, 9, 4, 64), (1, 5, 2, 72), (1, 7, 3, 128), (1, 5, 2, 256), (1, 3, 2, 512), (1, 2, 3, 1024)),
                         ids=str)
def test_values(backward, shape, dtype, rotated):
    """head-dim, tail: heads of less than a chunk, of a warp and of several chunks a thread; rows that fill no block and more than one."""
    v = inputs(*shape, dtype, rotated, k_heads=2)
    before = {name: t.clone() for name, t in v.items() if name != "rope"}
    check(backward, v)
    assert all(torch.equal(t, v[name]) for name, t in before.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (1, 63))
def test_odd_heads(backward, dim, dtype):
    """tail: an odd number of channels, which nothing can turn; k with tokens of its own."""
    v = inputs(2, 6, 3, dim, dtype, k_tokens=4)
    if dim == 1:  # dx is what rounding leaves of a difference of equals: the weights' gradients alone
        got, want = backward(v), plain(wide(v))
        for name in ("q_weight", "k_weight"):
            assert_within(got[name], want[name], 8, name)  # what is left of 36 terms of both signs
    else:
        check(backward, v)


@pytest.mark.parametrize("norm", ("rms", "torch_rms"))
@pytest.mark.parametrize("weights", ((), ("q_weight",), ("k_weight",)), ids=str)
def test_without_weights(backward, weights, norm):
    v = inputs(2, 5, 3, 24, rotated=True)
    v |= {name: None for name in ("q_weight", "k_weight") if name not in weights}
    these = [None if v[name] is None else v[name].double().requires_grad_() for name in NAMES]
    outputs = reference.qk_norm_rope(*these, *v["rope"], 1e-6, reference.RMS, False)
    want = torch.autograd.grad(outputs, [t for t in these if t is not None], [v["q_grad"].double(), v["k_grad"].double()])
    for (name, got), theirs in zip(backward(v, norm=norm).items(), want, strict=True):
        assert_within(got, theirs, 8, name)


@pytest.mark.parametrize("parts, smallest, largest", ((1, 1, 2**16), (2, 1, 2**16), (512, 1, 2**16), (1, 1, 2500)))
def test_sums_over_many_rows(backward, monkeypatch, parts, smallest, largest):
    """One block for all rows; two, which walk over several tiles, the last one cut short; more blocks than tiles; no more than so many elements each."""
    for name, value in (("PARTS", parts), ("SMALLEST", smallest), ("LARGEST", largest)):
        monkeypatch.setattr(cuda_backward, name, value)
    for dim in (40, 512):
        check(backward, inputs(1, 11, 3, dim, rotated=True, k_heads=2))


def test_parts():
    """Few for small calls, 512, and more where each would be long."""
    assert [cuda_backward.parts_of(n) for n in (0, 1, 2048, 2049, 2**20, 2**24, 2**25, 2**27)] == [0, 1, 1, 2, 512, 512, 512, 2048]


@pytest.mark.parametrize("dim", (40, 64))
@pytest.mark.parametrize("names", (("q",), ("k",), ("q_weight",), ("k_weight",), ("k", "q_weight")), ids=str)
def test_some_gradients(backward, names, dim):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(2, 9, 5, dim, rotated=True)
    want = backward(v)
    for name, got in backward(v, names).items():
        assert_exact(got, want[name], name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dim", (24, 63, 64))
def test_strided_input(backward, dim, layout):
    """strided-input, misaligned, strided-grad: the same values in any layout, gradients and tables included, give the same bits."""
    v = inputs(2, 7, 3, dim, torch.bfloat16, rotated=dim % 2 == 0)
    for name in ("q", "k", "q_grad", "k_grad"):
        v[name][1] = v[name][0]  # so that an expanded layout exists
    want = backward(v)
    for changed in (("q",), ("k",), ("q_grad",), ("k_grad",), ("q_weight", "k_weight"), ("rope",), ("q", "k", "q_grad", "k_grad", "rope")):
        laid = {name: v[name] and tuple(map(layout, v[name])) if name == "rope" else layout(v[name]) for name in changed}
        for name, got in backward({**v, **laid}).items():
            assert_exact(got, want[name], f"{name} where {changed} are {layout.__name__}")
            assert got.is_contiguous()


def test_int32_stride(backward):
    """int32-stride: three tokens 2^30 elements apart (memory that is never touched in between), in q, k and their gradients."""
    far = torch.as_strided(torch.empty(2**31 + 64, dtype=torch.bfloat16), (1, 3, 2, 8), (1, 2**30, 8, 1))
    v = inputs(1, 3, 2, 8, torch.bfloat16, True)
    want = backward(v)
    for name in ("q", "k", "q_grad", "k_grad"):
        far.copy_(v[name])
        for other, got in backward({**v, name: far}).items():
            assert_exact(got, want[other], f"{other} where {name} is far apart")


@pytest.mark.parametrize("dim", (40, 64))
def test_batch_coupling(backward, dim):
    """batch-coupling: dq and dk of a sample alone are those among 5."""
    v = inputs(5, 9, 3, dim, torch.float16, True)
    whole, alone = backward(v), backward({k: t[3:4] if k not in ("q_weight", "k_weight", "rope") else t for k, t in v.items()})
    for name in ("q", "k"):
        assert_exact(alone[name], whole[name][3:4], name)


def test_nondeterminism(backward, cuda_machine, monkeypatch):
    """nondeterminism: threads, warps and blocks in the opposite order give the same bits: no barrier is missing among a block's sums."""
    monkeypatch.setattr(cuda_backward, "SMALLEST", 2**9)
    for dim in (8, 64, 1024):
        v = inputs(2, 9, 3, dim, rotated=True)
        forwards = backward(v)
        cuda_machine.reverse(True)
        try:
            backwards = backward(v)
        finally:
            cuda_machine.reverse(False)
        for name in NAMES:
            assert_exact(forwards[name], backwards[name], f"{name} {dim}")


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (1, 0, 2, 8), (1, 3, 0, 8), (1, 3, 2, 0)), ids=str)
def test_empty(backward, shape):
    """empty: a zero in each dimension; sums over no rows are zero."""
    v = inputs(*shape)
    for name, grad in backward(v).items():
        assert grad.shape == v[name].shape and not grad.any(), name


def test_alias(backward):
    """alias: gradients share no storage with an input, with grad_out or with each other."""
    v = inputs(2, 3, 2, 16)
    found = [*backward(v).values(), *(t for name, t in v.items() if name != "rope")]
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


@pytest.mark.parametrize("eps", (1e-6, 1e-2))
def test_eps(backward, eps):
    """eps: inside the root; q ~ 1e-4, where it decides the result."""
    v = inputs(2, 9, 5, 40, rotated=True)
    v["q"] *= 1e-4
    got, stock, want = backward(v, eps=eps), plain(v, eps), plain(wide(v), eps)
    assert_close(got["q"], want["q"], stock["q"])
    assert_within(got["q_weight"], want["q_weight"], 8)


def test_rows_that_are_not_there(backward):
    """tail: a tile is cut short, and 1 / sqrt(eps) is infinite in float32: the weights' sums stay finite."""
    v = inputs(1, 3, 1, 64)
    got, want = backward(v, eps=1e-60), plain(wide(v), 1e-60)
    for name in NAMES:
        assert_within(got[name], want[name], 16, name)


def test_fp16_overflow(backward):
    """fp16-overflow: values of +-1000, whose squares do not fit fp16."""
    v = inputs(1, 5, 3, 128, torch.float16, True)
    v["q"] = torch.where(torch.rand(1, 5, 3, 128) > 0.5, 1000.0, -1000.0).half()
    assert all(grad.isfinite().all() for grad in backward(v).values())


def test_special_values(backward):
    """NaN and infinities come out where eager PyTorch has them: in no other row, though rows share a warp."""
    v = inputs(1, 4, 3, 24, torch.bfloat16, True)
    v["q"][0, 1, 2, 3], v["k"][0, 2, 0, 23], v["q_grad"][0, 3, 1, 0] = torch.nan, torch.inf, torch.nan
    got, want = backward(v), plain(v)
    for name in NAMES:
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


def test_biased_cast(backward):
    """biased-cast: the bfloat16 gradients are rounded, not truncated."""
    v = inputs(1, 256, 2, 64, torch.bfloat16, True)
    got, want = backward(v, ("q",))["q"], plain(wide(v))["q"]
    assert_unbiased(got, want)


@pytest.mark.parametrize("permuted", (False, True), ids=("contiguous", "permuted"))
@pytest.mark.parametrize("wanted", (15, 10, 5))
def test_fake_mismatch(in_cuda, wanted, permuted):
    """fake-mismatch: opcheck of the CUDA row's own op, on contiguous and on permuted-dense inputs; it means what the reference means."""
    v = inputs(2, 3, 2, 8, rotated=True)
    op = torch.ops.fusewire.qk_norm_rope_backward_cuda.default
    lay = (lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)) if permuted else torch.Tensor.contiguous
    heads = [lay(v[k]) for k in ("q_grad", "k_grad", "q", "k")]
    for rest in ((v["q_weight"], None, *v["rope"], 1e-6, wanted), (None, v["k_weight"], None, None, 1e-6, wanted)):
        opcheck(op, (*heads, *rest))
        for got, want in zip(op(*heads, *rest), reference.qk_norm_rope_backward(*heads, *rest), strict=True):
            assert got.shape == want.shape and got.stride() == want.stride()
            assert_within(got, want, 8)


def test_what_it_leaves_to_others(in_cuda, monkeypatch):
    """silent-off: what the row declines, and why; large samples are Triton's where Triton takes them."""
    def reason(q, grad=None, weight=None):
        grad = q if grad is None else grad
        return cuda_backward.why_not(grad, q, q, q, weight, None, None, None, 1e-6, 15)

    q = torch.empty(1, 2, 3, 1024)
    assert not reason(q) and not reason(q, weight=q[0, 0, 0])
    assert "1026 dimensions, more than 1024" in reason(torch.empty(1, 2, 3, 1026))
    assert "dtype" in reason(q, grad=q.bfloat16()) and "dtype" in reason(q, weight=q[0, 0, 0].half()) and "torch.float64" in reason(q.double())
    monkeypatch.setattr(cuda_rows, "INTERPRETED", False)
    monkeypatch.setattr(cuda_rows, "MISSING", "")
    large = torch.empty(1, cuda_rows.LARGE // 64, 1, 64)
    monkeypatch.setattr(triton_limits, "why_not", lambda *args: "it does not serve")
    assert not reason(large)
    monkeypatch.setattr(triton_limits, "why_not", lambda *args: "")
    assert "Triton" in reason(large)
    with forced("cuda"):
        assert not reason(large)


def test_backends(in_cuda):
    """Gradients of close come to the CUDA row; exact has stock's, and no kernel."""
    v = inputs(2, 3, 2, 24)
    before = ops.stats()["qk_norm_rope_backward"]
    gradients(v, "cuda", numerics="exact")
    assert ops.stats()["qk_norm_rope_backward"] == before
    gradients(v, "cuda")
    assert ops.stats()["qk_norm_rope_backward"]["cuda"] == before["cuda"] + 1
