"""Convolutions as one product whose patches are gathered on the way: against float64 and stock, edges, formats, and when it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire.kernels.library import CPU, ISA_LEVELS, cpu_scratch
from fusewire.kernels.linear import native, patches, rows
from tests.effort import examples
from tests.kernels.isa_levels import run_at
from tests.tolerance import assert_close, assert_exact, assert_unbiased, assert_within

pytestmark = pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OP = torch.ops.fusewire.conv_rows.default
LAST = torch.channels_last
SAME = (1, 1), (1, 1)  # stride and padding


def picture(dtype, batch=2, size=(12, 9), channels=70, outputs=40, kernel=(3, 3)):
    x = torch.randn(batch, channels, *size).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(outputs, channels, *kernel) / (channels * kernel[0] * kernel[1])**0.5
    return x, weight.to(dtype), torch.randn(outputs).to(dtype)


def convolution(x, *args) -> torch.Tensor:
    """``rows.convolution``, by the library: PyTorch's own, the fallback, takes none of the library's working memory."""
    cpu_scratch(reset=True)
    y = rows.convolution(x, *args)
    assert cpu_scratch() > 0 and CPU.has("conv_rows") and not rows._why_not_library
    return y


def check(x, weight, bias, stride, padding) -> torch.Tensor:
    want = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), stride, padding)
    got = convolution(x, weight, bias, stride, padding)
    assert got.shape == want.shape and got.is_contiguous(memory_format=LAST)
    assert_close(got, want, F.conv2d(x, weight, bias, stride, padding))
    return got


# Around a slice of each level's kernel, in one part and in several; more rows than a block has
@pytest.mark.parametrize("channels", (1, 31, 256, 257, 515, 1030))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, channels):
    """tail: of channels, whose parts are equal but for the last; of outputs."""
    check(*picture(dtype, channels=channels), *SAME)
    check(*picture(dtype, 1, (38, 37), channels, 33), (1, 1), (0, 0))


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3),
       st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 2**31))
def test_property(batch, channels, outputs, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dtype, bias, seed):
    """tail: any picture, kernel, stride and edge; every element within a few units of float64 or of stock's error."""
    torch.manual_seed(seed)
    size = max(height, kernel_h), max(width, kernel_w)
    x, weight, b = picture(dtype, batch, size, channels, outputs, (kernel_h, kernel_w))
    b = b if bias else None
    arguments = (stride_h, stride_w), (pad_h, pad_w)
    got = convolution(x, weight, b, *arguments)
    want = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), *arguments)
    assert_within(got, want, 4, "", F.conv2d(x, weight, b, *arguments))
    assert rows._fake(x, weight, b, stride_h, stride_w, pad_h, pad_w).shape == got.permute(0, 2, 3, 1).flatten(1, 2).shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_input(dtype):
    """strided-input: a window of a picture, every other sample, contiguous pictures, a bias of every other number: the same bits."""
    x, weight, bias = picture(dtype, batch=4)
    want = check(x, weight, bias, *SAME)
    around = torch.randn(4, 70, 20, 15).to(dtype).contiguous(memory_format=LAST)
    around[:, :, 3:15, 2:11] = x
    for laid in (x.contiguous(), around[:, :, 3:15, 2:11], x.repeat_interleave(2, 0)[::2]):
        assert_exact(convolution(laid, weight, bias, *SAME), want)
    assert_exact(convolution(x, weight, bias.repeat_interleave(2)[::2], *SAME), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_coupling(dtype):
    """batch-coupling: a sample alone has the bits that it has among 5, also beside NaN."""
    x, weight, bias = picture(dtype, batch=5)
    together = convolution(x, weight, bias, *SAME)
    x[3] = torch.nan
    poisoned = convolution(x, weight, bias, *SAME)
    for i in (0, 2, 4):
        assert_exact(convolution(x[i:i + 1], weight, bias, *SAME), together[i:i + 1])
        assert_exact(poisoned[i], together[i])
    assert poisoned[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_biased_cast(dtype):
    x, weight, bias = picture(dtype, size=(20, 20))
    assert_unbiased(convolution(x, weight, bias, *SAME), F.conv2d(x.double(), weight.double(), bias.double(), *SAME))


def test_nothing_beyond_the_edge_is_read():
    """tail: what lies around a window in memory is NaN, and reaches nothing: beyond the edge are zeros."""
    x, weight, bias = picture(torch.bfloat16)
    around = torch.full((2, 70, 16, 13), torch.nan, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    around[:, :, 2:14, 2:11] = x
    assert_exact(convolution(around[:, :, 2:14, 2:11], weight, bias, *SAME), convolution(x, weight, bias, *SAME))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_does_not_fit_is_stocks_error(dtype):
    """Channels, a bias' length or dtype, a kernel larger than the picture: none may be ours, nor be read beyond its end."""
    x, weight, bias = picture(dtype, channels=64, outputs=64, size=(16, 16))
    other = torch.float32 if dtype is not torch.float32 else torch.bfloat16
    small = x[:, :, :1, :1].contiguous(memory_format=LAST)
    cases = [(x, weight[:, :32].contiguous(), bias), (x[:, :32].contiguous(memory_format=LAST), weight, bias), (x, weight, bias[:8]), (x, weight, bias.to(other)),
             (small, torch.randn(64, 64, 11, 11).to(dtype), bias)]
    for case in cases:
        for way in (rows, patches):
            assert not way.serves(*case, (1, 1), (0, 0))
    for case in cases[:4]:
        with pytest.raises(RuntimeError, match="conv_rows: (weight|bias) does not fit"):
            OP(*case, 1, 1, 0, 0)
    assert not rows.serves(x, weight[:, :32].contiguous(), bias, *SAME)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_that_cancel(dtype):
    """Weights whose sum is 0 on a picture far from 0: what is left of the products is less than their lower parts."""
    x = (100 + 0.1 * torch.randn(1, 64, 20, 20)).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(48, 64, 3, 3) / 24
    check(x, (weight - weight.mean((1, 2, 3), keepdim=True)).to(dtype), None, *SAME)


def test_fake_mismatch():
    """fake-mismatch: opcheck, with and without a bias."""
    x, weight, bias = picture(torch.float32)
    for b in (bias, None):
        torch.library.opcheck(OP, (x, weight, b, 1, 2, 1, 0))


def test_empty():
    """empty: no sample."""
    x, weight, bias = picture(torch.float32)
    assert rows.convolution(x[:0], weight, bias, *SAME).shape == (0, 40, 12, 9)


def test_when_it_is_chosen(monkeypatch):
    x, weight, bias = picture(torch.bfloat16)

    def serves(x=x, weight=weight, bias=bias):
        return rows.serves(x, weight, bias, *SAME)

    monkeypatch.setattr(native, "ISA", "avx512")
    monkeypatch.setattr(native, "SLOW_FLOAT16", False)
    monkeypatch.setattr(native, "WIDENED", False)
    assert not serves()
    monkeypatch.setattr(native, "WIDENED", True)
    assert serves() and serves(bias=None) and serves(x[:1])
    for other in (dict(channels=63), dict(outputs=31), dict(size=(7, 9))):  # few of each
        assert not serves(*picture(torch.bfloat16, **other)), other
    assert serves(*picture(torch.bfloat16, size=(8, 8), batch=1))
    assert serves(*picture(torch.float16)) and not serves(*picture(torch.float32)) and not serves(weight=weight.float())
    assert not serves(weight=weight.to(memory_format=LAST)) and not serves(x.to("meta"))
    for trained in (x, weight, bias):
        trained.requires_grad_()
        assert not serves()
        with torch.no_grad():
            assert serves()
        trained.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves()


@pytest.mark.parametrize("isa", ("avx2", "avx512_bf16", "amx"))
def test_float16_without_instructions_for_it(isa, monkeypatch):
    """Every size and stride, as PyTorch's take up to some hundred times as long there."""
    monkeypatch.setattr(native, "ISA", isa)
    monkeypatch.setattr(native, "WIDENED", False)
    few = picture(torch.float16, channels=3, outputs=1, size=(3, 2))
    for slow in (True, False):
        monkeypatch.setattr(native, "SLOW_FLOAT16", slow)
        assert rows.serves(*few, *SAME) is slow and rows.serves(*picture(torch.float16), (2, 2), (0, 1)) is slow
        assert not rows.serves(*few, (1, 1), (0, 0)), "the kernel is larger than the picture: stock's error"
        assert not rows.serves(*picture(torch.bfloat16, channels=3), *SAME) and not rows.serves(*picture(torch.float32, channels=3), *SAME)


def test_when_it_is_chosen_with_amx(monkeypatch):
    monkeypatch.setattr(native, "ISA", "amx")
    monkeypatch.setattr(native, "SLOW_FLOAT16", False)
    monkeypatch.setattr(native, "WIDENED", False)
    for dtype in DTYPES:
        assert rows.serves(*picture(dtype), *SAME) and not rows.serves(*picture(dtype), (2, 2), (1, 1))
        assert not rows.serves(*picture(dtype, channels=63), *SAME)
        assert rows.serves(*picture(dtype, outputs=4), *SAME) is (dtype is torch.float32)
        assert rows.serves(*picture(dtype, kernel=(1, 1)), (1, 1), (0, 0)) is (dtype is not torch.bfloat16)
    assert not rows.serves(*picture(torch.float64), *SAME)


@pytest.mark.parametrize("where", ("a pixel", "a pixel of every sample", "an output's weights"))
@pytest.mark.parametrize("value", (3.4e38, 1e-30, 0.0))
def test_what_does_not_split(value, where):
    """Numbers so large or so small that they are no sum of three bfloat16: as good as stock, and the rest of the batch keeps its bits."""
    x, weight, bias = picture(torch.float32, batch=3)
    if where == "an output's weights":
        x *= 1e-4  # so that the result is finite
    plain = convolution(x, weight, bias, *SAME)
    if where == "a pixel":
        x[1, :, 5, 4] = value
    elif where == "an output's weights":
        weight[35] = 0.0
        weight[35, 7, 1, 1] = value
    else:
        x[:, :, 0, 0] = value
    got = check(x, weight, bias, *SAME)
    if where == "a pixel":
        assert_exact(got[::2], plain[::2])
    if where == "an output's weights":
        assert_exact(got[:, :32], plain[:, :32])


def test_a_picture_in_bands():
    """More pixels than are packed at a time; more panels and blocks than a task has."""
    check(*picture(torch.float32, 1, (150, 161), 130, 300), *SAME)
    check(*picture(torch.bfloat16, 1, (140, 300), 230, 150, (3, 1)), (1, 1), (1, 0))


@pytest.mark.parametrize("level", ISA_LEVELS[:-1])
def test_every_isa_level(level):
    run_at(level, __file__, "against_float64 or strided or batch_coupling or edge")
