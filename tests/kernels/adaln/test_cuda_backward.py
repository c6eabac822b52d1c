"""The gradients of adaLN by csrc/cuda with every thread on the CPU (tests/kernels/cuda_on_cpu): values, sums over tokens, layouts, barriers."""

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels import cuda_rows
from fusewire.kernels.adaln import cuda_backward, reference, triton_limits
from fusewire.kernels.dispatch import forced
from tests.kernels.adaln.cases import NAMES, affine_stock, call, far_apart, gradients, inputs, op_name, stock, upstream, used, wide, with_affine
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("chunk", "one", "token")


@pytest.fixture
def backward(in_cuda):
    """The gradients, which csrc/cuda must have computed."""
    def run(name: str, v: dict, grads=None, **keywords) -> dict[str, torch.Tensor]:
        with in_cuda(f"{op_name(name)}_backward"), torch.enable_grad():
            return gradients(call, name, v, grads, "cuda", numerics="close", **keywords)
    return run


def check(backward, name: str, v: dict, plain_of=stock, **keywords) -> None:
    """Every gradient keeps the rule of close against eager PyTorch's; few elements, whose errors are luck, are right."""
    grads = upstream(v, name)
    got, plain = backward(name, v, grads, **keywords), gradients(plain_of, name, v, grads)
    for argument, want in gradients(plain_of, name, wide(v), [grad.double() for grad in grads]).items():
        if want.numel() < 128:
            assert_within(got[argument], want, 8, f"{name} {argument}")
        else:
            assert_close(got[argument], want, plain[argument], f"{name} {argument}")
        assert got[argument].is_contiguous()


# One; tails of a chunk; rows of one warp, the longest with all its lanes; several warps; two chunks a thread in float32; the longest
@pytest.mark.parametrize("width", (1, 7, 63, 72, 129, 256, 300, 1152, 4096))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(backward, dtype, width):
    """tail: 7 tokens are no multiple of a block's 4 parts."""
    v = inputs(1, 3 if width > 1000 else 7, width, dtype)
    before = {name: tensor.clone() for name, tensor in v.items()}
    for name in NAMES:
        check(backward, name, v)
    assert all(torch.equal(before[name], v[name]) for name in v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulation_shapes(backward, dtype, kind):
    v = inputs(3, 6, 40, dtype, kind)
    for name in NAMES:
        check(backward, name, v)


def test_modulation_of_frames(backward):
    """A row of shift and scale for each frame of a video."""
    x, shift, scale, grad = torch.randn(2, 6, 72), torch.randn(2, 3, 72), torch.randn(2, 3, 72), torch.randn(2, 6, 72)
    got = backward("adaln_modulate", {"x": x, "shift": shift, "scale": scale}, [grad])
    v = {"x": x, "shift": shift.repeat_interleave(2, 1), "scale": scale.repeat_interleave(2, 1)}
    want, plain = gradients(stock, "adaln_modulate", wide(v), [grad.double()]), gradients(stock, "adaln_modulate", v, [grad])
    for argument in got:
        of_frame = (lambda t: t) if argument == "x" else (lambda t: t.unflatten(1, (3, 2)).sum(2))
        assert_close(got[argument], of_frame(want[argument]), of_frame(plain[argument]), argument)


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_affine(backward, dtype, norm):
    """The gradients of weight and bias are sums over all samples."""
    v = with_affine(inputs(2, 5, 301, dtype))
    dual = () if dtype is torch.float32 else ("adaln_modulate_dual",)  # which has no kernel
    for name in ("adaln_modulate", *dual, "gate_residual_adaln"):
        check(backward, name, v, affine_stock(norm), norm=norm)


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("affine", (("weight",), ("bias",), ("weight", "bias"), ()), ids=str)
def test_mixed_modulations(backward, affine, norm):
    """Modulations of each kind in one call, with weight and bias, one of them or neither; two gates and both: the kernel means what the reference means."""
    v, tokens = with_affine(inputs(2, 6, 40)), inputs(2, 6, 40, kind="token")
    v |= {k: tokens[k] for k in ("gate2", "scale", "shift2")}
    v = {k: t for k, t in v.items() if k not in ("weight", "bias") or k in affine}
    for name in ("adaln_modulate", "adaln_modulate_dual", "two_gates"):
        v = {k: t.half() for k, t in v.items()} if name == "adaln_modulate_dual" and affine else {k: t.float() for k, t in v.items()}
        grads = upstream(v, name)
        want = gradients(call, name, wide(v), [grad.double() for grad in grads], "reference", numerics="close", norm=norm)
        for argument, got in backward(name, v, grads, norm=norm).items():
            assert_within(got, want[argument], 8, f"{name} {argument}")


@pytest.mark.parametrize("parts, longest", ((2, 64), (256, 4), (5, 3)))
def test_sums_over_many_tokens(backward, monkeypatch, parts, longest):
    """Parts of several tokens, the last one cut short, in both widths of a block: 22 tokens are 2 parts of 11; 6 of 4 (limited); 8 of 3."""
    monkeypatch.setattr(cuda_backward, "PARTS", parts)
    monkeypatch.setattr(cuda_backward, "LONGEST", longest)
    for width in (40, 500):
        v = with_affine(inputs(2, 22, width))
        for name in ("adaln_modulate", "gate_residual_adaln"):
            check(backward, name, v, affine_stock("layer"))


def test_more_parts_than_a_block_reads_at_once(backward):
    """300 tokens are 150 parts, of two samples: the second kernel adds them up in steps of 128."""
    assert cuda_backward.parts_of(300) == 150
    v = with_affine(inputs(2, 300, 36))
    check(backward, "adaln_modulate", v, affine_stock("layer"))
    check(backward, "gate_residual", inputs(2, 300, 36))


@pytest.mark.parametrize("name", NAMES)
def test_some_gradients(backward, name):
    """What is not wanted is not computed, and changes nothing in the rest."""
    v = inputs(2, 6, 40)
    want = backward(name, v)
    for argument in used(name):
        if name != "gate_residual" or argument != "x":  # the gradient itself: no kernel runs
            assert_exact(backward(name, v, wanted=(argument,))[argument], want[argument], argument)


@pytest.mark.parametrize("width", (64, 63))
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strided_input(backward, layout, width):
    """strided-input, misaligned, strided-grad: the same bits for any layout, of one argument at a time, of all, and of the gradients."""
    for name, kind in (("two_gates", "chunk"), ("adaln_modulate_dual", "token"), ("adaln_modulate", "one")):
        v = inputs(2, 5, width, torch.bfloat16, kind)
        v = with_affine(v) if name == "adaln_modulate" else v
        for tensor in v.values():
            tensor[1] = tensor[0]  # so that an expanded layout exists
        grads, names = upstream(v, name), (*used(name), *(("weight", "bias") if name == "adaln_modulate" else ()))
        want = backward(name, v, grads)
        for changed in (*((argument,) for argument in names), names):
            got = backward(name, {**v, **{k: layout(v[k]) for k in changed}}, [layout(grad) for grad in grads] if changed is names else grads)
            for argument in want:
                assert_exact(got[argument], want[argument], f"{name}: {argument} where {changed} are {layout.__name__}")


def test_int32_stride(backward):
    """int32-stride: three tokens 2^30 elements apart."""
    far, v = far_apart()
    for name in ("two_gates", "adaln_modulate_dual"):
        grads = upstream(v, name)
        want = backward(name, v, grads)
        for argument in used(name):
            far.copy_(v[argument])
            got = backward(name, {**v, argument: far}, grads)
            assert all(torch.equal(got[k], want[k]) for k in want), f"{name} {argument}"
        far.copy_(grads[-1])
        got = backward(name, v, [*grads[:-1], far])
        assert all(torch.equal(got[k], want[k]) for k in want), name


@pytest.mark.parametrize("width", (40, 600))
@pytest.mark.parametrize("kind", KINDS)
def test_batch_coupling(backward, kind, width):
    """batch-coupling: a sample alone has the gradients that it has in a batch of 3, sums over tokens included."""
    v = inputs(3, 9, width, torch.bfloat16, kind)
    for name in ("two_gates", "adaln_modulate_dual"):
        grads = upstream(v, name)
        together = backward(name, v, grads)
        alone = backward(name, {k: t[2:3] for k, t in v.items()}, [grad[2:3] for grad in grads])
        for argument in alone:
            assert_exact(alone[argument], together[argument][2:3], f"{name} {argument}")


def test_nondeterminism(backward, cuda_machine, monkeypatch):
    """nondeterminism: threads, warps and blocks in the opposite order; rows follow each other in a block, so a missing barrier would give other bits."""
    monkeypatch.setattr(cuda_backward, "PARTS", 2)
    for width in (40, 1100):
        for name, norm in (("adaln_modulate", "layer"), ("adaln_modulate", "rms"), ("two_gates", "layer"), ("gate_residual", None)):
            v = inputs(2, 7, width)
            these = with_affine(v) if name == "adaln_modulate" else v
            keywords = {"norm": norm} if norm else {}
            forwards = backward(name, these, **keywords)
            cuda_machine.reverse(True)
            try:
                backwards = backward(name, these, **keywords)
            finally:
                cuda_machine.reverse(False)
            for argument in forwards:
                assert_exact(forwards[argument], backwards[argument], f"{name} {argument}")


@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8), (2, 3, 0)), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_empty(backward, shape, kind):
    """empty: a zero in each dimension; sums over no tokens are zero."""
    v = with_affine(inputs(*shape, kind=kind))
    for name in ("adaln_modulate", "gate_residual_adaln"):
        for argument, grad in backward(name, v).items():
            assert grad.shape == v[argument].shape and not grad.any(), f"{name} {argument}"


def test_alias(backward):
    """alias: gradients share no storage with an input, with grad_out or with each other."""
    v = with_affine(inputs(2, 5, 32))
    grads = upstream(v, "gate_residual_adaln")
    found = backward("gate_residual_adaln", v, grads)
    mine, others = ([t.untyped_storage().data_ptr() for t in tensors] for tensors in (found.values(), (*v.values(), *grads)))
    assert len(set(mine)) == len(mine) and not set(mine) & set(others)


@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_cancellation(backward, norm):
    """cancellation: mean 100, standard deviation 0.01 (of an RMSNorm: all alike, whose gradient is nearly orthogonal to them)."""
    v, zero = {"x": 100 + 0.01 * torch.randn(1, 8, 1536)}, torch.zeros(1, 1536)
    v, grad = {**v, "shift": zero, "scale": zero}, torch.randn(1, 8, 1536)
    got = backward("adaln_modulate", v, [grad], eps=1e-12, norm=norm)
    want = gradients(call, "adaln_modulate", wide(v), [grad.double()], "reference", eps=1e-12, norm=norm, numerics="close")
    for argument in ("x", "scale"):
        assert ((got[argument] - want[argument]).abs().amax(-1) / want[argument].abs().amax(-1)).max() <= 1e-5, argument


def test_rows_of_equal_values(backward):
    """cancellation: a variance of zero, about a mean that no float is: eps alone decides, and nothing is NaN."""
    v = inputs(1, 4, 300)
    for tokens, value in enumerate((0.1, 1e4 / 3, -1e10 / 3, 0.0)):
        v["x"][0, tokens] = value
    for argument, grad in backward("adaln_modulate", v).items():
        assert torch.isfinite(grad).all(), argument


def test_special_values(backward):
    """NaN and infinities come out where eager PyTorch has them: in their own row, in the sums over its sample."""
    v = inputs(2, 5, 65, torch.bfloat16)
    v["x"][0, 1, 3], v["x"][0, 2, 64] = torch.nan, torch.inf
    for name in NAMES:
        grads = upstream(v, name)
        got, want = backward(name, v, grads), gradients(stock, name, v, grads)
        for argument in got:
            assert torch.equal(got[argument].isnan(), want[argument].isnan()), f"{name} {argument}"


@pytest.mark.parametrize("name, argument", (("gate_residual", "y"), ("adaln_modulate", "x"), ("adaln_modulate", "scale")))
def test_biased_cast(backward, name, argument):
    """biased-cast: the bfloat16 gradients are rounded, not truncated."""
    v = inputs(1, 8, 4096, torch.bfloat16, "token")
    grads = upstream(v, name)
    got, want = backward(name, v, grads)[argument], gradients(stock, name, wide(v), [grad.double() for grad in grads])[argument]
    assert_unbiased(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("gate_residual_backward", "adaln_modulate_backward"))
def test_fake_mismatch(in_cuda, name, kind):
    """fake-mismatch: opcheck of the CUDA rows' own ops, on contiguous and on permuted inputs; they mean what the references mean."""
    v = with_affine(inputs(2, 3, 8, kind=kind))
    op = getattr(torch.ops.fusewire, f"{name}_cuda").default
    for v in (v, {k: t.transpose(0, -1).contiguous().transpose(0, -1) for k, t in v.items()}):
        arguments = (v["x"], v["y"], v["gate"], 3) if name == "gate_residual_backward" else (
            v["y"], v["x"], v["shift"], v["scale"], v["weight"], v["bias"], 1e-6, False, 31)
        opcheck(op, arguments)
        for got, want in zip(op(*arguments), getattr(reference, name)(*arguments), strict=True):
            assert got.shape == want.shape and got.stride() == want.stride()
            assert_within(got, want, 8)


def test_what_it_leaves_to_others(in_cuda, monkeypatch):
    """silent-off: what the rows decline, and why; large samples are Triton's where Triton takes them, but for gate_residual in float32."""
    def why_not(x, m, second=(None, None), weight=None):
        return cuda_backward.why_not_gate_modulate_backward(x, x, x, x, m, *second, m, m, weight, None, 1e-6, False, 511)

    x, m = torch.empty(1, 2, 8), torch.empty(1, 8)
    assert not why_not(x, m) and "dtype torch.bfloat16" in why_not(x, m.bfloat16()) and "dtype torch.float64" in why_not(x.double(), m.double())
    assert "4104 channels, more than 4096" in why_not(torch.empty(1, 2, 4104), torch.empty(1, 4104))
    monkeypatch.setattr(cuda_rows, "INTERPRETED", False)
    monkeypatch.setattr(cuda_rows, "MISSING", "")
    monkeypatch.setattr(triton_limits, "why_not", lambda *args: "")
    large = torch.empty(1, cuda_rows.LARGE // 64, 64, dtype=torch.bfloat16)
    m = torch.empty(1, 64, dtype=torch.bfloat16)
    assert "Triton" in why_not(large, m)
    assert "Triton" in why_not(large.float(), m.float()) and "Triton" in cuda_backward.why_not_gate_backward(large, large, m, 7)
    assert not cuda_backward.why_not_gate_backward(large.float(), large.float(), m.float(), 7), "in float32 both are as fast"
    assert not why_not(large, m, (large, m), m[0]), "Triton has no registers for six sums"
    reason = cuda_backward.why_not_modulate_dual_backward(*(t.float() for t in (large, large, large, m, m, m, m, m[0])), None, 1e-6, True, 127)
    assert "do not hold six sums" in reason
    for weight in (None, m[0]):
        assert ("Triton" in cuda_backward.why_not_modulate_dual_backward(large, large, large, m, m, m, m, weight, None, 1e-6, True, 127)) is (weight is None)
    with forced("cuda"):
        assert not why_not(large, m)


def test_backends(in_cuda):
    """Gradients of close come to the CUDA row where the CPU's does not serve; exact has stock's, and no kernel."""
    v = inputs(2, 3, 24)
    before = ops.stats()["adaln_modulate_backward"]
    with forced("cuda"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in v.items()}
        call("adaln_modulate", leaves)[0].sum().backward()
        assert ops.stats()["adaln_modulate_backward"] == before
        call("adaln_modulate", leaves, numerics="close")[0].sum().backward()
    assert ops.stats()["adaln_modulate_backward"]["cuda"] == before["cuda"] + 1
