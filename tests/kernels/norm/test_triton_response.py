"""The Triton kernels of global_response_norm in the interpreter: parts of pictures, blocks of channels, masks, layouts, both directions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels import dispatch, plans
from fusewire.kernels.norm import reference, triton_limits, triton_response
from fusewire.kernels.tuning import PartsTile, ResponseTile, all_registers, cuda_arch, hip_arch, parts_tile, response_tile
from tests.effort import examples
from tests.kernels.interpreted import DTYPES, check_registered, in_triton, needs_interpreter, unchanged
from tests.kernels.norm import response_cases
from tests.kernels.norm.cases import leaves, wide
from tests.kernels.norm.response_cases import call, inputs, stock
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

pytestmark = needs_interpreter
NAMES = ("result", "x", "weight", "bias")


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """A picture [B, H, W, C] whose channels lie a picture apart in memory."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def in_both(v: dict, grad: torch.Tensor, **keywords) -> dict[str, torch.Tensor]:
    """The op's result and gradients, which Triton must have computed."""
    these, wanted = leaves(v)
    counts = ops.stats()
    with dispatch.forced("triton"):
        out = call(these, numerics="close", **keywords)
        found = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    after = ops.stats()
    assert all(after[name]["triton"] == counts[name]["triton"] + 1 for name in ("global_response_norm", "global_response_norm_backward"))
    return dict(zip(NAMES, (out.detach(), *found), strict=True))


def from_stock(v: dict, grad: torch.Tensor, **keywords) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, (stock(v, **keywords), *response_cases.gradients(v, grad.to(v["x"].dtype), lambda v: stock(v, **keywords))), strict=True))


def terms(v: dict, grad: torch.Tensor, **keywords) -> dict[str, torch.Tensor]:
    """What the gradients of weight and bias are sums of, in float64."""
    response = stock({"x": v["x"].double(), "weight": 1, "bias": 0}, **keywords) - v["x"].double()
    return {"weight": (grad.double() * response).flatten(0, -2), "bias": grad.double().flatten(0, -2)}


def keeps_the_rule(got: dict, v: dict, grad: torch.Tensor, **keywords) -> None:
    """Result and gradient of x by the rule of ``close``; sums over all pixels in proportion to their terms."""
    want, plain, summed = from_stock(wide(v), grad, **keywords), from_stock(v, grad, **keywords), terms(v, grad, **keywords)
    for name in NAMES:
        if name in summed:
            assert_within(got[name], want[name], 4, name, plain[name], summed[name])
        else:
            assert_close(got[name], want[name], plain[name], name)


# (B, H, W, C). A tail everywhere; one block of everything; a row of pixels, a column; many parts; more channels than the mean takes at once. The smallest
# by eights: what is wrong with the scale of one is wrong with all of it, so that one alone says by chance who errs more
SHAPES = ((8, 3, 5, 7), (8, 4, 4, 16), (4, 1, 17, 33), (1, 65, 1, 96), (1, 33, 32, 40), (2, 2, 3, 2100))


@pytest.mark.parametrize("layout", (torch.Tensor.contiguous, channels_first), ids=("channels last", "channels first"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, layout):
    """tail: of pixels, of parts and of channels, in both memory formats; the result is contiguous in either."""
    v, grad = inputs(shape, dtype), torch.randn(shape).to(dtype)
    laid, of_grad = v | {"x": layout(v["x"])}, layout(grad)
    check = unchanged(*laid.values(), of_grad)
    got = in_both(laid, of_grad)
    keeps_the_rule(got, v, grad)
    assert got["result"].is_contiguous() and got["x"].is_contiguous()
    check()


@pytest.mark.parametrize("layout", (torch.Tensor.contiguous, channels_first), ids=("channels last", "channels first"))
@pytest.mark.parametrize("steps", (1, 3, 7))
def test_parts_of_several_steps(monkeypatch, steps, layout):
    """tail: as of large pictures: programs that walk over several tiles of pixels, the last ones over fewer, over several blocks of parts, of channels
    and of samples."""
    monkeypatch.setattr(triton_response, "response_tile", lambda pixels, channels, arch: ResponseTile(8, 16, 1, steps))
    monkeypatch.setattr(triton_response, "parts_tile", lambda parts, channels, arch: PartsTile(2, 16, 1))
    monkeypatch.setattr(triton_response, "AT_ONCE", 2)
    v, grad = inputs((3, 7, 11, 37)), torch.randn(3, 7, 11, 37)
    keeps_the_rule(in_both(v | {"x": layout(v["x"])}, layout(grad)), v, grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strided_input(dtype, layout):
    """strided-input, misaligned, strided-grad: the same values in any layout give the same bits, one memory format or the other."""
    v, grad = inputs((2, 5, 7, 48), dtype), torch.randn(2, 5, 7, 48).to(dtype)
    v["x"][1], grad[1] = v["x"][0], grad[0]  # so that an expanded layout exists
    want = in_both(v, grad)
    for laid, of_grad in (*((v | {name: layout(v[name])}, grad) for name in v), (v, layout(grad)), (v | {"x": channels_first(v["x"])}, layout(grad)),
                          (v | {"x": layout(v["x"])}, channels_first(grad))):
        for name, got in in_both(laid, of_grad).items():
            assert_exact(got, want[name], name)


@settings(max_examples=examples(60), deadline=None)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(2, 70), st.sampled_from(DTYPES), st.sampled_from((1e-6, 1e-2)),
       st.lists(st.sampled_from((*LAYOUTS, channels_first)), min_size=2, max_size=2), st.integers(0, 2**31))
def test_property(batch, height, width, channels, dtype, eps, layouts, seed):
    """tail, strided-input: any picture: every element within a few units of float64 or of stock's error, and the same bits in any layout."""
    torch.manual_seed(seed)
    shape = batch, height, width, channels
    v, grad = inputs(shape, dtype), torch.randn(shape).to(dtype)
    got, want, plain = in_both(v, grad, eps=eps), from_stock(wide(v), grad, eps=eps), from_stock(v, grad, eps=eps)
    again = in_both(v | {"x": layouts[0](v["x"])}, layouts[1](grad), eps=eps)
    summed = terms(v, grad, eps=eps)
    for name in NAMES:
        assert_within(got[name], want[name], 8, name, plain[name], summed.get(name))
        assert_exact(again[name], got[name], name)


def test_strided_grad():
    """strided-grad: `.sum()`, whose gradient has stride 0 everywhere."""
    v = inputs((2, 3, 4, 24))
    want = in_both(v, torch.ones(2, 3, 4, 24))
    for name, got in in_both(v, torch.ones(()).expand(2, 3, 4, 24)).items():
        assert_exact(got, want[name], name)


def test_int32_stride():
    """int32-stride: rows 2^30 elements apart (memory that is never touched in between), and channels, forward and backward."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    for shape, strides in (((1, 3, 2, 8), (1, 2**30, 8, 1)), ((1, 2, 4, 3), (1, 4, 1, 2**30))):
        v, far = inputs(shape, torch.bfloat16), torch.as_strided(base, shape, strides)
        far.copy_(v["x"])
        want = in_both(v, v["x"])
        for name, got in in_both(v | {"x": far}, far).items():
            assert_exact(got, want[name], name)


@pytest.mark.parametrize("layout", (torch.Tensor.contiguous, channels_first), ids=("channels last", "channels first"))
def test_batch_coupling(layout):
    """batch-coupling: a picture alone has the result and the gradient that it has among 5, also where the others are NaN."""
    v, grad = inputs((5, 9, 8, 70)), layout(torch.randn(5, 9, 8, 70))
    v["x"] = layout(v["x"])
    whole, alone = in_both(v, grad), in_both(v | {"x": v["x"][1:2]}, grad[1:2])
    poisoned = v | {"x": v["x"].clone()}
    poisoned["x"][2:] = torch.nan
    beside = in_both(poisoned, grad)
    for name in ("result", "x"):
        assert_exact(alone[name], whole[name][1:2], name)
        assert_exact(beside[name][:2], whole[name][:2], name)
        assert beside[name][2:].isnan().all()


def test_nan():
    """A NaN is in the norm of its channel, by way of the mean in all of its picture, and in the gradients of x and weight, as it is in stock's."""
    v, grad = inputs((2, 3, 4, 20)), torch.randn(2, 3, 4, 20)
    v["x"][1, 2, 3, 7] = torch.nan
    want = from_stock(v, grad)
    for name, got in in_both(v, grad).items():
        assert torch.equal(got.isnan(), want[name].isnan()) and bool(got.isnan().any()) is (name != "bias"), name


def test_some_gradients(monkeypatch):
    """What is not wanted changes nothing in the rest; where that of x is not, no kernel computes it."""
    v, grad, applied, apply = inputs((2, 5, 5, 40)), torch.randn(2, 5, 5, 40), [], triton_response._apply
    monkeypatch.setattr(triton_response, "_apply", lambda given, *args: applied.append(given is not None) or apply(given, *args))
    want = in_both(v, grad)
    for wanted in (("x",), ("weight",), ("bias",), ("weight", "bias")):
        these = {name: t.detach().requires_grad_(name in wanted) for name, t in v.items()}
        plans.forget()
        with dispatch.forced("triton"):
            found = torch.autograd.grad(call(these, numerics="close"), [these[name] for name in wanted], grad)
        for name, got in zip(wanted, found, strict=True):
            assert_exact(got, want[name], name)
    assert applied == [False, True, False, True, False, False, False]  # in both directions; where x is wanted alone; the result alone


@pytest.mark.parametrize("dtypes", [(x, w) for x in DTYPES for w in DTYPES if x is not w], ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_autocast(dtypes):
    """autocast: x and its weights of two dtypes: the promoted one, rounded once; the same inside autocast."""
    v = inputs((2, 5, 7, 35), dtypes[0])
    v["weight"], v["bias"] = v["weight"].to(dtypes[1]), v["bias"].to(dtypes[1])
    with in_triton("global_response_norm", 2):
        got = call(v, numerics="close")
        with torch.autocast(v["x"].device.type, torch.bfloat16):
            assert_exact(call(v, numerics="close"), got)
    assert got.dtype is torch.promote_types(*dtypes)
    assert_close(got, stock(wide(v)), stock(v))


@pytest.mark.parametrize("shape", ((0, 3, 2, 8), (2, 0, 3, 8), (2, 3, 0, 8), (2, 3, 2, 0)), ids=str)
def test_empty(shape):
    """empty: a zero in each dimension; sums over no pixels are zero."""
    v = inputs(shape)
    for name, got in in_both(v, torch.ones(shape)).items():
        assert got.shape == (shape if name in ("result", "x") else shape[-1:]) and not got.any(), name


@pytest.mark.parametrize("value, dtype", [(1000.0, torch.float16), (1e17, torch.bfloat16), (1e17, torch.float32)], ids=str)
def test_fp16_overflow(value, dtype):
    """fp16-overflow: squares and norms that do not fit fp16, and norms whose squares fit neither beside a gradient: what is finite stays so."""
    v, grad = inputs((1, 40, 41, 8), torch.float32), 1e-3 * torch.randn(1, 40, 41, 8).to(dtype)
    v = {name: t.to(dtype) for name, t in v.items()} | {"x": torch.where(v["x"] > 0.1, value, -value).to(dtype)}
    want = from_stock(wide(v), grad)
    for name, got in in_both(v, grad).items():
        assert got.isfinite().all()
        scale = want[name].abs().max()
        assert_within((got.double() / scale).to(torch.float32 if dtype is torch.float32 else dtype), want[name] / scale, 8, name)


@pytest.mark.parametrize("eps", (1e-5, 1e-6, 1e-2))
def test_eps(eps):
    """eps: beside the mean; x ~ 1e-6, where it decides the result."""
    v, grad = inputs(), torch.randn(2, 5, 7, 35)
    v["x"], v["weight"], v["bias"] = v["x"] * 1e-6, v["weight"] * 100, v["bias"] * 0
    got = in_both(v, grad, eps=eps)
    keeps_the_rule(got, v, grad, eps=eps)
    assert not torch.equal(got["result"], in_both(v, grad, eps=1.5 * eps)["result"])


def test_channel_of_zeros():
    """A channel that is zero everywhere has no direction: its gradient comes by way of the sum alone, as stock's does; a picture of zeros too."""
    for channels in (slice(3, 5), slice(None)):
        v, grad = inputs(), torch.randn(2, 5, 7, 35)
        v["x"][..., channels] = 0
        keeps_the_rule(in_both(v, grad), v, grad)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_biased_cast(dtype):
    """biased-cast: the mean signed errors of the result and of the gradient of x are within 0.02 units in the last place."""
    v, grad = inputs((1, 32, 32, 64), dtype), torch.randn(1, 32, 32, 64).to(dtype)
    got, want = in_both(v, grad), from_stock(wide(v), grad)
    for name in ("result", "x"):
        assert_unbiased(got[name], want[name], name)


def test_exact_is_left_to_pytorch():
    with dispatch.forced("triton"), pytest.raises(RuntimeError, match="numerics='exact' keeps PyTorch's own norm"):
        call(inputs())


@pytest.mark.parametrize("layout", (torch.Tensor.contiguous, channels_first), ids=("channels last", "channels first"))
def test_fake_mismatch(layout):
    """fake-mismatch: opcheck of the Triton rows' own ops; they mean what the references mean, in either memory format."""
    v, grad = inputs((2, 3, 4, 8)), torch.randn(2, 3, 4, 8)
    x = layout(v["x"])
    check_registered("global_response_norm", lambda *args: reference.global_response_norm(*args, False), (x, v["weight"], v["bias"], 1e-6))
    for of_x in (True, False):
        check_registered("global_response_norm_backward", reference.global_response_norm_backward, (layout(grad), x, v["weight"], 1e-6, of_x))


def test_limits():
    """silent-off: what the rows decline, and why; the last program of a picture may count on beyond its pixels, in 32 bits."""
    x, w = torch.empty(1).expand(2, 3, 4, 40000), torch.empty(1).expand(40000)
    with dispatch.forced("triton"):
        assert not triton_limits.why_not_response(x, w, w, 1e-6, False)
        assert not triton_limits.why_not_response_backward(x, x, w, 1e-6, True)
        large = torch.empty(1).expand(1, 2**15, 2**15 + 1, 8)
        assert "more than 1073741824 rows" in triton_limits.why_not_response(large, w[:8], w[:8], 1e-6, False)
        assert not triton_limits.why_not_response(large[:, :, 1:], w[:8], w[:8], 1e-6, False)
        assert "rows" in triton_limits.why_not_response_backward(large, large, w[:8], 1e-6, True)
        assert "torch.float64" in triton_limits.why_not_response_backward(x, x.double(), w, 1e-6, True)


@pytest.mark.parametrize("arch", (cuda_arch(9, 0), hip_arch("gfx942")), ids=lambda arch: arch.name)
@pytest.mark.parametrize("pixels", (1, 31, 576, 4096, 65537, 2**30))
def test_tiles(pixels, arch):
    """Programs enough for a GPU, none with sums of more than 64 steps; tiles that a program's registers hold; for any channels."""
    for channels in (1, 16, 63, 320, 6144, 40000):
        tile = response_tile(pixels, channels, arch)
        assert tile.pixels * tile.channels == 2048 and 16 <= tile.channels <= 64 and tile.warps * arch.warp == 128 and 1 <= tile.steps <= 64
        parts = -(-pixels // (tile.pixels * tile.steps))
        tiles, programs = -(-pixels // tile.pixels) * -(-channels // tile.channels), parts * -(-channels // tile.channels)
        assert programs >= min(tiles, 256) and (programs <= 1024 or tile.steps in (1, 64))
        at_once = parts_tile(parts, channels, arch)
        threads, held = at_once.warps * arch.warp, at_once.parts * at_once.channels
        assert held <= 32 * threads and threads <= 512 and at_once.parts <= 256 and 16 <= at_once.channels <= 2048 and threads % arch.warp == 0
        registers = all_registers(at_once.warps, arch)
        assert registers.get("maxnreg", 0) * threads <= 65536 and bool(registers) is (arch.kind == "cuda")
