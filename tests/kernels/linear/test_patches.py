"""Convolutions of small pictures as products with their patches: each patch bit for bit, the whole against float64, and when it is chosen."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.kernels.linear import native, patches
from tests.effort import examples
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

needed = pytest.mark.skipif(not CPU.loaded or patches.INTEL and not native.WIDENED, reason=CPU.reason or "not on Intel with AMX, or without AVX512-BF16")
pytorchs = pytest.mark.on_reference(when=lambda dtype, **_: dtype is torch.float16 and native.FLOAT16_PRODUCTS, reason="PyTorch's own product is faster there")
OP = torch.ops.fusewire.conv_patches.default
SERVED = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if patches._least(dtype) and (dtype is torch.float32 or native.ONEDNN_BFLOAT16)]
SAME = (1, 1), (1, 1)  # stride and padding
FORMATS = (torch.contiguous_format, torch.channels_last)


@settings(max_examples=examples(200), deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3),
       st.integers(0, 2), st.integers(0, 2), st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)), st.sampled_from(LAYOUTS))
def test_property(batch, channels, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dtype, layout):
    """tail, strided-input: the numbers that a convolution multiplies, in the order of a contiguous weight, zeros beyond the picture's edge."""
    height, width = max(height, kernel_h), max(width, kernel_w)
    x = torch.randn(batch, channels, height, width).to(dtype)
    numbers = kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w
    want = F.unfold(x.double(), (kernel_h, kernel_w), padding=(pad_h, pad_w), stride=(stride_h, stride_w)).transpose(1, 2).to(dtype)
    got = OP(layout(x), *numbers)
    assert_exact(got, want)
    assert got.is_contiguous() and patches._fake(x, *numbers).shape == got.shape
    assert CPU.has("conv_patches") is CPU.loaded  # not the fallback


def test_opcheck():
    x = torch.randn(2, 5, 6, 7)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        torch.library.opcheck(OP, (given, 3, 3, 1, 2, 1, 0))


def picture(dtype, batch=2, size=8, channels=320, outputs=320, kernel=3):
    x = torch.randn(batch, channels, size, size).to(dtype)
    return x, (torch.randn(outputs, channels, kernel, kernel) / (kernel * channels**0.5)).to(dtype), torch.randn(outputs).to(dtype)


@needed
@pytorchs
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("stride, padding", [SAME, ((2, 1), (2, 1))])
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_against_float64(dtype, bias, stride, padding, memory_format):
    x, weight, b = picture(dtype)
    x, b = x.contiguous(memory_format=memory_format), b if bias else None
    assert patches.serves(x, weight, b, stride, padding)
    want = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), stride, padding)
    before = ops.stats()["linear"]["cpu"]
    got = patches.convolution(x, weight, b, stride, padding)
    ours = not (dtype is torch.float16 and native.FLOAT16_PRODUCTS)  # PyTorch's own product is faster there
    assert ops.stats()["linear"]["cpu"] == before + ours and CPU.has("conv_patches")
    assert_close(got, want, F.conv2d(x, weight, b, stride, padding))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_exact(patches.convolution(x.contiguous(), weight, b, stride, padding), got)


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_when_it_is_chosen_with_amx(monkeypatch):
    monkeypatch.setattr(native, "WIDENED", False)
    monkeypatch.setattr(native, "SLOW_FLOAT16", False)
    monkeypatch.setattr(native, "ISA", "amx")
    monkeypatch.setattr(native, "ONEDNN_BFLOAT16", True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight, bias = picture(dtype, channels=1280, outputs=1280)
        assert patches.serves(x, weight, bias, *SAME)
        assert not patches.serves(x, weight.to(memory_format=torch.channels_last), bias, *SAME)
        assert not patches.serves(*picture(dtype, size=16, channels=1280, outputs=1280), *SAME)


@needed
@pytorchs
@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_a_sample_alone(dtype):
    """Whether a sample is in a batch changes neither the choice nor a bit of the result."""
    x, weight, b = picture(dtype, batch=5)
    together = patches.convolution(x, weight, b, *SAME)
    for i in range(5):
        assert patches.serves(x, weight, b, *SAME) and patches.serves(x[i:i + 1], weight, b, *SAME)
        ours = dtype is (torch.bfloat16 if native.WIDENED else torch.float32) or dtype is torch.float16 and native.SLOW_FLOAT16
        if ours:  # otherwise the product is PyTorch's
            assert_exact(patches.convolution(x[i:i + 1], weight, b, *SAME), together[i:i + 1])


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
@pytest.mark.parametrize("isa", ("avx2", "avx512_bf16", "amx"))
def test_float16_without_instructions_for_it(isa, monkeypatch):
    """From the first pixel on: the product is ours whatever the number of rows."""
    for name, value in dict(ISA=isa, WIDENED=False, ONEDNN_BFLOAT16=False).items():
        monkeypatch.setattr(native, name, value)
    for slow in (True, False):
        monkeypatch.setattr(native, "SLOW_FLOAT16", slow)
        for size in (1, 2, 8):
            assert patches.serves(*picture(torch.float16, size=size), *SAME) is slow
        assert not patches.serves(*picture(torch.float16, size=32), *SAME) and not patches.serves(*picture(torch.bfloat16, size=2), *SAME)


@needed
def test_when_it_is_chosen(monkeypatch):
    monkeypatch.setattr(native, "SLOW_FLOAT16", False)
    serves = lambda *tensors: patches.serves(*tensors, *SAME)
    dtype, other = SERVED[0], torch.float32 if native.WIDENED else torch.float16
    x, weight, b = picture(dtype)
    assert serves(x, weight, b) and serves(x, weight, None)
    assert not serves(*picture(dtype, size=64))  # the picture outweighs the weight
    assert not serves(*picture(dtype, size=4))  # too few rows for a product
    assert not serves(*picture(dtype, channels=2000, outputs=2000, size=6, kernel=1))  # a product already
    assert not serves(*picture(torch.float64)) and not serves(*picture(other))
    assert not serves(x, weight.double(), b) and not serves(x, weight.to(memory_format=torch.channels_last), b)
    assert not serves(x.to("meta"), weight, b)
    for trained in (x, weight, b):
        trained.requires_grad_()
        assert not serves(x, weight, b)
        with torch.no_grad():
            assert serves(x, weight, b)
        trained.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(x, weight, b)
    monkeypatch.setattr(patches, "INTEL", True)
    monkeypatch.setattr(native, "WIDENED", False)
    assert not serves(x, weight, b)
