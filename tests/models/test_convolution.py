"""Convolutions in the form that is faster: none may change what a model computes, nor what a user's own choice of a format is."""

import pytest
import torch
from torch import nn

from fusewire import ops
from fusewire.kernels.library import CPU, cpu_is_intel, cpu_scratch
from fusewire.kernels.linear import native, patches, rows
from fusewire.models import convolution
from tests.tolerance import assert_close, assert_exact

# (channels, outputs, size): the weight outweighs the picture; the picture the weight
SHAPES = {"deep": (320, 320, 8), "wide": (12, 20, 40)}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def layer(shape, dtype, **options):
    channels, outputs, size = SHAPES[shape]
    module = nn.Conv2d(channels, outputs, 3, **{"padding": 1, **options}).to(dtype).requires_grad_(False).eval()
    return module, torch.randn(2, channels, size, size).to(dtype)


@pytest.mark.parametrize("intel", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, shape, intel, monkeypatch):
    if cpu_is_intel() and not intel:
        pytest.skip("PyTorch's own product serves float32 on Intel")
    if not intel:
        monkeypatch.setattr(native, "WIDENED", False)
        monkeypatch.setattr(native, "ISA", "avx512")
    for room in (convolution, patches):
        monkeypatch.setattr(room, "INTEL", intel)
    for options in ({}, {"stride": 2}, {"bias": False}, {"padding": "same"}, {"dilation": 2, "padding": 2}, {"padding_mode": "circular"},
                    {"groups": 4}):
        module, x = layer(shape, dtype, **options)
        want, plain = layer(shape, dtype, **options)[0].double(), module(x)
        want.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
        assert_close(convolution.convolution(module, x), want(x.double()), plain, str(options))


@pytest.mark.skipif(not CPU.loaded or cpu_is_intel() or not native.ONEDNN_BFLOAT16, reason="the forms differ on AMD, with its bfloat16")
def test_which_form(monkeypatch):
    called = []
    monkeypatch.setattr(patches, "_patches_op", lambda *args: called.append(args) or torch.ops.fusewire.conv_patches(*args))
    for shape, dtype, options, is_called in (("deep", torch.bfloat16, {}, 1), ("deep", torch.float32, {}, 1), ("wide", torch.bfloat16, {}, 0),
                                             ("deep", torch.bfloat16, {"padding": "same"}, 0), ("deep", torch.bfloat16, {"dilation": 2}, 0),
                                             ("deep", torch.bfloat16, {"padding_mode": "reflect"}, 0)):
        module, x = layer(shape, dtype, **options)
        called.clear()
        before = ops.stats()["linear"]["cpu"]
        y = convolution.convolution(module, x)
        assert len(called) == is_called == ops.stats()["linear"]["cpu"] - before, (shape, dtype, options)
        assert y.is_contiguous(memory_format=torch.channels_last) or not is_called and dtype is torch.float32


@pytest.mark.skipif(not CPU.loaded or not native.ONEDNN_BFLOAT16, reason=CPU.reason or "no bfloat16")
@pytest.mark.parametrize("channels, size, dtype, way", [(320, 8, torch.bfloat16, patches), (64, 20, torch.bfloat16, rows), (64, 20, torch.float16, rows),
                                                        (64, 20, torch.float32, None), (12, 20, torch.bfloat16, None)])
def test_which_form_on_an_intel_without_amx(channels, size, dtype, way, monkeypatch):
    monkeypatch.setattr(native, "ISA", "avx512")
    monkeypatch.setattr(native, "WIDENED", True)
    monkeypatch.setattr(patches, "INTEL", True)
    called = []
    for one in (patches, rows):
        monkeypatch.setattr(one, "convolution", lambda *args, one=one, convolve=one.convolution: called.append(one) or convolve(*args))
    module, x = nn.Conv2d(channels, 320, 3, padding=1).to(dtype).requires_grad_(False), torch.randn(2, channels, size, size).to(dtype)
    y = convolution.convolution(module, x)
    assert called == ([way] if way else [])
    assert_close(y, torch.nn.functional.conv2d(x.double(), module.weight.double(), module.bias.double(), padding=1), module(x))


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
@pytest.mark.parametrize("options, is_ours", [({}, True), ({"stride": 2, "bias": False}, True), ({"dilation": 2, "padding": 2}, False), ({"groups": 4}, False),
                                              ({"padding_mode": "circular"}, False)], ids=str)
def test_float16_without_instructions_for_it(options, is_ours, monkeypatch):
    """Ours where it can be; otherwise PyTorch's of a channels-last picture, which takes a fiftieth of the time of a contiguous one there."""
    monkeypatch.setattr(native, "SLOW_FLOAT16", True)
    monkeypatch.setattr(native, "ISA", "avx512")
    called = []
    monkeypatch.setattr(rows, "convolution", lambda *args, convolve=rows.convolution: called.append(args) or convolve(*args))
    module, x = layer("wide", torch.float16, **options)
    want = layer("wide", torch.float16, **options)[0].double()
    want.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    cpu_scratch(reset=True)
    y = convolution.convolution(module, x)
    assert len(called) == is_ours == (cpu_scratch() > 0), "by the library: the op's fallback is PyTorch's"
    assert y.is_contiguous(memory_format=torch.channels_last) or "padding_mode" in options, "PyTorch pads into a contiguous picture"
    assert_close(y, want(x.double()), module(x))


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_float32_is_contiguous_for_pytorch(monkeypatch):
    """oneDNN's float32 convolutions of channels-last pictures, as ours leave them, err several times as much."""
    monkeypatch.setattr(native, "ISA", "avx512")
    module, x = nn.Conv2d(64, 64, 3, stride=2, padding=1).requires_grad_(False), torch.randn(2, 64, 20, 20)
    assert_exact(convolution.convolution(module, x.contiguous(memory_format=torch.channels_last)), module(x))


def test_weights_that_are_channels_last_stay_the_users_choice():
    module, x = layer("deep", torch.bfloat16)
    module = module.to(memory_format=torch.channels_last)
    assert_exact(convolution.convolution(module, x), module(x))


def test_gradients_are_stocks():
    module, x = layer("deep", torch.float32)
    module.requires_grad_()
    expected = torch.autograd.grad(module(x).sin().sum(), list(module.parameters()))
    for got, want in zip(torch.autograd.grad(convolution.convolution(module, x).sin().sum(), list(module.parameters())), expected):
        assert_exact(got, want)


def test_compiled_whole():
    module, x = layer("deep", torch.float32)
    with torch.no_grad():
        compiled = torch.compile(lambda x: convolution.convolution(module, x), fullgraph=True, backend="aot_eager")
        assert_exact(compiled(x), convolution.convolution(module, x))
