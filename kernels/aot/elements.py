"""Cases of the elementwise kernels and of those over pictures: linear's epilogues, gated activations, samplers, group norm, layer norm of pictures."""

from __future__ import annotations

import itertools

import torch

from fusewire.kernels.aot.register import cases, meta, tokens
from fusewire.kernels.gated_mlp import triton_kernel as gated_mlp
from fusewire.kernels.group_norm_silu import triton_kernel as group_norm_silu
from fusewire.kernels.linear import triton_kernel as linear
from fusewire.kernels.norm import triton_kernel as norm
from fusewire.kernels.norm import triton_response as response
from fusewire.kernels.sampler_step import triton_kernel as sampler_step

MOST = 16384  # from there on no size chooses another tile


@cases("linear gate residual {} {}", (1536, 3072), most=MOST)
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    linear.epilogue(x, None, "none", m[0].unsqueeze(1), x, False)


@cases("linear gate residual exact {} {}", (16, 100, 250, 500, 1536, 2039), most=MOST)
def _(channels, dtype):
    x, m, w = tokens(channels, dtype)
    linear.epilogue(x, w, "none", m[0].unsqueeze(1), x, True)


@cases("linear bias gelu_tanh {} {}", (1536,))
def _(channels, dtype):
    x, _, w = tokens(channels, dtype)
    linear.epilogue(x, w, "gelu_tanh", None, None, False)


for _activation in ("gelu_tanh", "gelu"):
    @cases(f"bias_activation_backward {_activation} {{}} {{}}", (63, 6144), most=MOST)
    def _(width, dtype, activation=_activation):
        y, b = meta(2, 1024, width, dtype=dtype), meta(width, dtype=dtype)
        linear.bias_activation_backward(y, y, b, activation, True)
        linear.bias_activation_backward(y, y, b, activation, False)


@cases("bias_activation_backward silu {} {}", (63, 6144))
def _(width, dtype):
    y = meta(2, 1024, width, dtype=dtype)
    linear.bias_activation_backward(y, y, None, "silu", False)


for _activation in ("gelu", "silu"):
    @cases(f"bias_activation {_activation} {{}} {{}}", (63, 6144))
    def _(width, dtype, activation=_activation):
        linear.bias_activation(meta(2, 1024, width, dtype=dtype), meta(width, dtype=dtype), activation)


LAST = {"": torch.contiguous_format, " channels last": torch.channels_last}
for (_channels, _side), _format in itertools.product(((320, 16), (320, 15), (1536, 64), (63, 24), (63, 65)), LAST):
    _named = f"{_channels}{'' if _side % 4 == 0 else f' of {_side} x {_side}'} {{1}}{_format}"

    @cases(f"layer_norm_2d {_named}")
    def _(_, dtype, shape=(2, _channels, _side, _side), last=LAST[_format]):
        x, w = meta(*shape, dtype=dtype).contiguous(memory_format=last), meta(shape[1], dtype=dtype)
        norm.layer_norm_2d(x, w, w, 1e-6, False)

    @cases(f"layer_norm_2d_backward {_named}")
    def _(_, dtype, shape=(2, _channels, _side, _side), last=LAST[_format]):
        x, w = meta(*shape, dtype=dtype).contiguous(memory_format=last), meta(shape[1], dtype=dtype)
        norm.layer_norm_2d_backward(x, x, w, 1e-6, True, True, True)


@cases("layer_norm_2d cropped 320 {1}")
def _(_, dtype):
    x, w = meta(2, 320, 32, 64, dtype=dtype)[..., :32], meta(320, dtype=dtype)
    norm.layer_norm_2d(x, None, None, 1e-6, False)
    norm.layer_norm_2d_backward(x, x, None, 1e-6, True, False, False)
    norm.layer_norm_2d_backward(x, x, w, 1e-6, False, True, True)


def _response(dtype, channels: int, height: int, width: int, first: bool = False) -> None:
    """Both directions; ``first``: what is read lies with its channels first."""
    x, w = meta(2, height, width, channels, dtype=dtype), meta(channels, dtype=dtype)
    y = meta(2, channels, height, width, dtype=dtype).permute(0, 2, 3, 1) if first else x
    response.global_response_norm(y, w, w, 1e-6)
    response.global_response_norm_backward(x, y, w, 1e-6, True)


for _format in ("", " channels first"):
    @cases(f"global_response_norm {{}} {{}}{_format}", (320, 6144, 63, 40))
    def _(channels, dtype, first=bool(_format)):
        side = {320: 16, 40: 15}.get(channels, 24)
        _response(dtype, channels, side, side, first)


@cases("global_response_norm channels {} {}", (16, 32, 64, 128, 256, 512, 1024, 2048, 16384), most=MOST)
def _(channels, dtype):
    _response(dtype, channels, 24, 24)


@cases("global_response_norm pixels {} {}", (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), most=MOST)
def _(pixels, dtype):
    _response(dtype, 320, pixels, 1)


@cases("global_response_norm cropped 320 {1}")
def _(_, dtype):
    x, w = meta(2, 32, 64, 320, dtype=dtype)[:, :, :32], meta(320, dtype=dtype)
    response.global_response_norm(x, w, w, 1e-6)
    response.global_response_norm_backward(x, x, w, 1e-6, True)


@cases("geglu {} {}", (5120, 10240, 63, 100, 250, 500, 2039), most=MOST)
def _(width, dtype):
    gated_mlp.geglu(meta(2, 1024, 2 * width, dtype=dtype), None, None, False)


@cases("geglu_backward bias {} {}", (5120, 10240, 63, 100, 250, 500, 2039), most=MOST)
def _(width, dtype):
    gated_mlp.geglu_backward(meta(2, 1024, width, dtype=dtype), meta(2, 1024, 2 * width, dtype=dtype), None, meta(2 * width, dtype=dtype), True)


@cases("swiglu gate first bias {} {}", (5120, 10240))
def _(width, dtype):
    gated_mlp.swiglu(meta(1, 1024, 2 * width, dtype=dtype), None, meta(2 * width, dtype=dtype), True, False)


@cases("swiglu_backward gate apart {} {}", (5120, 10240))
def _(width, dtype):
    x = meta(1, 1024, width, dtype=dtype)
    gated_mlp.swiglu_backward(x, x, x, None, False, False)


@cases("quick_gelu bias {} {}", (5120, 10240))
def _(width, dtype):
    gated_mlp.quick_gelu(meta(2, 77, width, dtype=dtype), meta(width, dtype=dtype), False)


@cases("quick_gelu_backward bias {} {}", (5120, 10240, 63, 100, 250, 500, 2039), most=MOST)
def _(width, dtype):
    x = meta(2, 77, width, dtype=dtype)
    gated_mlp.quick_gelu_backward(x, x, meta(width, dtype=dtype), True)
    gated_mlp.quick_gelu_backward(x, x, None, False)


for _exact in ("", " exact"):
    @cases(f"flow_euler_step guided{_exact} {{1}}")
    def _(_, dtype, exact=bool(_exact)):
        sampler_step.flow_euler_step(meta(1, 16, 128, 128, dtype=torch.float32), meta(2, 16, 128, 128, dtype=dtype), None,
                                     meta(28, 2, dtype=torch.float64), 0, meta(dtype=torch.int64), exact)

    @cases(f"solver_step guided{_exact} {{1}}")
    def _(_, dtype, exact=bool(_exact)):
        x, both = meta(1, 4, 128, 128, dtype=dtype), meta(2, 4, 128, 128, dtype=dtype)
        sampler_step.solver_step(x, both, None, x, None, x, None, None, None, meta(28, 19, dtype=torch.float64), 0, meta(dtype=torch.int64),
                                 False, True, False, False, exact)

    @cases(f"solver_step inpainting{_exact} {{1}}")
    def _(_, dtype, exact=bool(_exact)):
        x = meta(1, 4, 128, 128, dtype=dtype)
        sampler_step.solver_step(x, x, None, x, x, x, x, x, x, meta(28, 19, dtype=torch.float64), 3, None, True, True, True, True, exact)


@cases("flow_euler_step guided one dtype {1}")
def _(_, dtype):
    sampler_step.flow_euler_step(meta(1, 16, 128, 128, dtype=dtype), meta(2, 16, 128, 128, dtype=dtype), None, meta(28, 2, dtype=torch.float64), 0,
                                 meta(dtype=torch.int64), False)


@cases("flow_euler_step {} {}", (63, 100, 250, 500, 1024), most=MOST)
def _(elements, dtype):
    sampler_step.flow_euler_step(meta(1, elements, dtype=dtype), meta(1, elements, dtype=dtype), None, meta(28, 2, dtype=torch.float64), 0, None, True)


@cases("solver_step {} {}", (63, 100, 250, 500, 1024), most=MOST)
def _(elements, dtype):
    x = meta(1, elements, dtype=dtype)
    sampler_step.solver_step(x, x, None, None, None, None, x, x, None, meta(28, 19, dtype=torch.float64), 3, None, False, False, True, False, True)


for (_channels, _side), _format in itertools.product(((320, 64), (128, 512), (512, 16)), LAST):
    @cases(f"group_norm_silu {_channels} {{1}}{_format}")
    def _(_, dtype, shape=(2, _channels, _side, _side), last=LAST[_format]):
        x, w = meta(*shape, dtype=dtype).contiguous(memory_format=last), meta(shape[1], dtype=dtype)
        group_norm_silu.group_norm_silu(x, 32, w, w, 1e-5, None, None, None, True, False)

    @cases(f"group_norm_silu_backward {_channels} {{1}}{_format}")
    def _(_, dtype, shape=(2, _channels, _side, _side), last=LAST[_format]):
        x, w, m = meta(*shape, dtype=dtype).contiguous(memory_format=last), meta(shape[1], dtype=dtype), meta(*shape[:2], dtype=dtype)
        group_norm_silu.group_norm_silu_backward(x, x, 32, w, w, 1e-5, m, m, m, True, True)

# Groups of one channel: as many elements as pixels
for _format, _pixels in (("", (256, 400, 1024, 1936, 4096)), (" channels last", (256, 4096))):
    @cases(f"group_norm_silu pixels {{}} {{}}{_format}", _pixels, most=MOST)
    def _(pixels, dtype, last=LAST[_format]):
        x, w = meta(2, 32, pixels, 1, dtype=dtype).contiguous(memory_format=last), meta(32, dtype=dtype)
        group_norm_silu.group_norm_silu(x, 32, w, w, 1e-5, None, None, None, True, False)
        group_norm_silu.group_norm_silu_backward(x, x, 32, w, w, 1e-5, None, None, None, True, True)


@cases("group_norm_silu modulated 320 {1}")
def _(_, dtype):
    x, w, m = meta(2, 320, 64, 64, dtype=dtype), meta(320, dtype=dtype), meta(2, 320, dtype=dtype)
    group_norm_silu.group_norm_silu(x, 32, w, w, 1e-5, m, m, m, True, False)


@cases("group_norm_silu plain 320 {1}")
def _(_, dtype):
    x = meta(2, 320, 64, 64, dtype=dtype)
    group_norm_silu.group_norm_silu(x, 32, None, None, 1e-5, None, None, None, False, False)
    group_norm_silu.group_norm_silu_backward(x, x, 32, None, None, 1e-5, None, None, None, False, True)
