"""The launches that compiled.py compiles: shapes of real models, on meta tensors."""

from __future__ import annotations

import itertools

import torch

from fusewire.kernels.adaln import triton_kernel as adaln
from fusewire.kernels.attention import hopper
from fusewire.kernels.attention import triton_backward as attention_backward
from fusewire.kernels.attention import triton_kernel as attention
from fusewire.kernels.gated_mlp import triton_kernel as gated_mlp
from fusewire.kernels.group_norm_silu import triton_kernel as group_norm_silu
from fusewire.kernels.linear import triton_kernel as linear
from fusewire.kernels.norm import triton_kernel as norm
from fusewire.kernels.norm import triton_response as response
from fusewire.kernels.qk_norm_rope import triton_kernel as qk_norm_rope
from fusewire.kernels.qk_norm_rope.reference import RMS
from fusewire.kernels.sampler_step import triton_kernel as sampler_step

SHORT = {torch.bfloat16: "bf16", torch.float32: "f32"}  # float16 differs from bfloat16 in one conversion instruction
CASES: dict = {}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def case(name: str):
    def add(function):
        CASES[name] = function
        return function
    return add


def _tokens(channels: int, dtype, tokens: int = 1024, batch: int = 2):
    """x and the nine chunks of one modulation tensor."""
    return meta(batch, tokens, channels, dtype=dtype), meta(batch, 9 * channels, dtype=dtype).chunk(9, -1)


for _channels, _dtype in itertools.product((64, 1152, 1536, 3072, 8192, 16384), SHORT):
    @case(f"adaln_modulate {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x, m = _tokens(channels, dtype)
        adaln.adaln_modulate(x, m[0], m[1], None, None, 1e-6, False, False)

    @case(f"gate_residual_adaln two gates {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x, m = _tokens(channels, dtype)
        adaln.gate_residual_adaln(x, x, m[0], x, m[1], m[2], m[3], None, None, 1e-6, False, False)

    if _channels == 1536:
        @case(f"adaln_modulate_dual {_channels} {SHORT[_dtype]}")
        def _(channels=_channels, dtype=_dtype):
            x, m = _tokens(channels, dtype)
            adaln.adaln_modulate_dual(x, *m[:4], None, None, 1e-6, False, False)

        @case(f"adaln_modulate_dual rms affine {_channels} {SHORT[_dtype]}")
        def _(channels=_channels, dtype=_dtype):
            (x, m), w = _tokens(channels, dtype), meta(channels, dtype=dtype)
            adaln.adaln_modulate_dual(x, *m[:4], w, w, 1e-6, True, False)

        @case(f"gate_residual exact {_channels} {SHORT[_dtype]}")
        def _(channels=_channels, dtype=_dtype):
            x, m = _tokens(channels, dtype)
            adaln.gate_residual(x, x, m[0], True)

        @case(f"adaln_modulate exact {_channels} {SHORT[_dtype]}")
        def _(channels=_channels, dtype=_dtype):
            x, m = _tokens(channels, dtype)
            adaln._launch(x, (), adaln.NONE, None, None, ((m[0], m[1]),), 1e-6, True, (torch.empty_like(x),))

        @case(f"linear gate residual {_channels} {SHORT[_dtype]}")
        def _(channels=_channels, dtype=_dtype):
            x, m = _tokens(channels, dtype)
            linear.epilogue(x, None, "none", m[0].unsqueeze(1), x, False)

        @case(f"linear bias gelu_tanh {_channels} {SHORT[_dtype]}")
        def _(channels=_channels, dtype=_dtype):
            x, _ = _tokens(channels, dtype)
            linear.epilogue(x, meta(channels, dtype=dtype), "gelu_tanh", None, None, False)

for _channels, _dtype in itertools.product((64, 1152, 1536, 2039, 3072, 4096), SHORT):
    @case(f"adaln_modulate_backward {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x, m = _tokens(channels, dtype)
        adaln.adaln_modulate_backward(x, x, m[0], m[1], None, None, 1e-6, False, 0b111)

    @case(f"adaln_modulate_backward affine {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        (x, m), w = _tokens(channels, dtype), meta(channels, dtype=dtype)
        adaln.adaln_modulate_backward(x, x, m[0], m[1], w, w, 1e-6, True, 0b11111)

    @case(f"adaln_modulate_dual_backward {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x, m = _tokens(channels, dtype)
        adaln.adaln_modulate_dual_backward(x, x, x, *m[:4], None, None, 1e-6, False, 0b11111)

    @case(f"gate_residual_backward {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x, m = _tokens(channels, dtype)
        adaln.gate_residual_backward(x, x, m[0], 0b11)

    @case(f"gate_residual_adaln_backward two gates {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x, m = _tokens(channels, dtype)
        adaln.gate_residual_adaln_backward(x, x, x, x, m[0], x, m[1], m[2], m[3], None, None, 1e-6, False, 0b001111111)

    @case(f"gate_residual_adaln_backward affine {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        (x, m), w = _tokens(channels, dtype), meta(channels, dtype=dtype)
        adaln.gate_residual_adaln_backward(x, x, x, x, m[0], None, None, m[1], m[2], w, w, 1e-6, False, 0b111100111)

    @case(f"gate_residual_adaln_backward each token {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x, _ = _tokens(channels, dtype)
        adaln.gate_residual_adaln_backward(x, x, x, x, x, None, None, x, x, None, None, 1e-6, False, 0b001100111)

for _channels, _dtype in itertools.product((64, 1536, 4096, 8192), SHORT):
    @case(f"layer_norm {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        w = meta(channels, dtype=dtype)
        norm.layer_norm(meta(2, 1024, channels, dtype=dtype), w, w, 1e-6, False, False)

    @case(f"rms_norm {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        norm.rms_norm(meta(1, 512, channels, dtype=dtype), meta(channels, dtype=dtype), None, 1e-6, False, False)

    @case(f"layer_norm_backward {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x = meta(2, 1024, channels, dtype=dtype)
        norm.layer_norm_backward(x, x, meta(channels, dtype=dtype), 1e-6, True, True, True)

    @case(f"rms_norm_backward {_channels} {SHORT[_dtype]}")
    def _(channels=_channels, dtype=_dtype):
        x = meta(1, 512, channels, dtype=dtype)
        norm.rms_norm_backward(x, x, meta(channels, dtype=dtype), 1e-6, True, True, False)

for (_channels, _side), _dtype, _format in itertools.product(((320, 16), (1536, 64), (63, 24)), SHORT, ("", " channels last")):
    @case(f"layer_norm_2d {_channels} {SHORT[_dtype]}{_format}")
    def _(channels=_channels, side=_side, dtype=_dtype, last=_format):
        x, w = meta(2, channels, side, side, dtype=dtype), meta(channels, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        norm.layer_norm_2d(x, w, w, 1e-6, False)

    @case(f"layer_norm_2d_backward {_channels} {SHORT[_dtype]}{_format}")
    def _(channels=_channels, side=_side, dtype=_dtype, last=_format):
        x, w = meta(2, channels, side, side, dtype=dtype), meta(channels, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        norm.layer_norm_2d_backward(x, x, w, 1e-6, True, True, True)

for (_channels, _side), _dtype, _format in itertools.product(((320, 16), (6144, 24), (63, 24), (40, 15)), SHORT, ("", " channels first")):
    @case(f"global_response_norm {_channels} {SHORT[_dtype]}{_format}")
    def _(channels=_channels, side=_side, dtype=_dtype, first=_format):
        x, w = meta(2, side, side, channels, dtype=dtype), meta(channels, dtype=dtype)
        response.global_response_norm(meta(2, channels, side, side, dtype=dtype).permute(0, 2, 3, 1) if first else x, w, w, 1e-6)

    @case(f"global_response_norm_backward {_channels} {SHORT[_dtype]}{_format}")
    def _(channels=_channels, side=_side, dtype=_dtype, first=_format):
        x, w = meta(2, side, side, channels, dtype=dtype), meta(channels, dtype=dtype)
        response.global_response_norm_backward(x, meta(2, channels, side, side, dtype=dtype).permute(0, 2, 3, 1) if first else x, w, 1e-6, True)

for _width, _dtype in itertools.product((63, 6144), SHORT):
    @case(f"bias_activation_backward gelu_tanh {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        y, b = meta(2, 1024, width, dtype=dtype), meta(width, dtype=dtype)
        linear.bias_activation_backward(y, y, b, "gelu_tanh", True)
        linear.bias_activation_backward(y, y, b, "gelu", False)

    @case(f"bias_activation silu {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        linear.bias_activation(meta(2, 1024, width, dtype=dtype), meta(width, dtype=dtype), "silu")

for _width, _dtype in itertools.product((5120, 10240), SHORT):
    @case(f"geglu {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        gated_mlp.geglu(meta(2, 1024, 2 * width, dtype=dtype), None, None, False)

    @case(f"geglu_backward bias {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        gated_mlp.geglu_backward(meta(2, 1024, width, dtype=dtype), meta(2, 1024, 2 * width, dtype=dtype), None, meta(2 * width, dtype=dtype), True)

    @case(f"swiglu gate first bias {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        gated_mlp.swiglu(meta(1, 1024, 2 * width, dtype=dtype), None, meta(2 * width, dtype=dtype), True, False)

    @case(f"swiglu_backward gate apart {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        x = meta(1, 1024, width, dtype=dtype)
        gated_mlp.swiglu_backward(x, x, x, None, False, False)

    @case(f"quick_gelu bias {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        gated_mlp.quick_gelu(meta(2, 77, width, dtype=dtype), meta(width, dtype=dtype), False)

    @case(f"quick_gelu_backward bias {_width} {SHORT[_dtype]}")
    def _(width=_width, dtype=_dtype):
        x = meta(2, 77, width, dtype=dtype)
        gated_mlp.quick_gelu_backward(x, x, meta(width, dtype=dtype), True)
        gated_mlp.quick_gelu_backward(x, x, None, False)

# The same values in other layouts: the order of the sums must be that of the plain one
LAYOUTS = {
    "unaligned": lambda x: meta(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x,
    "reversed": lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1]),
    "step two": lambda x: meta(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2],
    "sliced": lambda x: meta(*x.shape[:-1], 3 * x.shape[-1], dtype=x.dtype)[..., x.shape[-1]:2 * x.shape[-1]],
}
for _channels, (_name, _layout) in itertools.product((1536, 1000, 63), {"plain": lambda x: x, **LAYOUTS}.items()):
    @case(f"layout of adaln {_channels}: {_name}")
    def _(channels=_channels, layout=_layout):
        x, m = _tokens(channels, torch.bfloat16)
        adaln.gate_residual_adaln(layout(x), layout(x), layout(m[0]), None, None, layout(m[1]), layout(m[2]), None, None, 1e-6, False, False)

for _channels, (_name, _layout) in itertools.product((1536, 63), {"plain": lambda x: x, **LAYOUTS}.items()):
    @case(f"layout of adaln_backward {_channels}: {_name}")
    def _(channels=_channels, layout=_layout):
        (x, m), w = _tokens(channels, torch.bfloat16), meta(channels)
        adaln.gate_residual_adaln_backward(layout(x), layout(x), layout(x), layout(x), layout(m[0]), None, None, layout(m[1]), layout(m[2]), layout(w),
                                           None, 1e-6, False, 0b011100111)

    @case(f"layout of norm_backward {_channels}: {_name}")
    def _(channels=_channels, layout=_layout):
        x, w = meta(2, 1024, channels), meta(channels)
        norm.layer_norm_backward(layout(x), layout(x), layout(w), 1e-6, True, True, True)

for _dim, (_name, _layout) in itertools.product((64, 40, 9), {"plain": lambda x: x, **LAYOUTS}.items()):
    @case(f"layout of qk_norm {_dim}: {_name}")
    def _(dim=_dim, layout=_layout):
        q, w = meta(2, 1178, 24, dim), meta(dim)
        qk_norm_rope.qk_norm_rope(layout(q), layout(q), layout(w), w, None, None, 1e-6, RMS, False)

    @case(f"layout of qk_norm_backward {_dim}: {_name}")
    def _(dim=_dim, layout=_layout):
        q, w, table = meta(2, 1178, 24, dim), meta(dim), layout(meta(1178, dim // 2, dtype=torch.float32)) if dim % 2 == 0 else None
        qk_norm_rope.qk_norm_rope_backward(layout(q), layout(q), layout(q), layout(q), layout(w), w, table, table, 1e-6, 15)

for _name, _layout in {"plain": lambda x: x, **LAYOUTS}.items():
    @case(f"layout of attention 64: {_name}")
    def _(layout=_layout):
        q = layout(meta(2, 1024, 24, 64))
        attention.attention(q, q, q, None, None, None, False, None, 1e-6)

for _dim, _dtype in itertools.product((40, 64, 128, 256), SHORT):
    @case(f"qk_norm_rope {_dim} {SHORT[_dtype]}")
    def _(dim=_dim, dtype=_dtype):
        q, k = meta(2, 1178, 3 * 24 * dim, dtype=dtype).view(2, 1178, 3, 24, dim).unbind(2)[:2]
        table = meta(1178, dim // 2, dtype=torch.float32)
        qk_norm_rope.qk_norm_rope(q, k, meta(dim, dtype=dtype), meta(dim, dtype=dtype), table, table, 1e-6, RMS, False)

for _dim, _dtype in itertools.product((40, 64, 72, 128, 256, 1000, 1024), SHORT):
    @case(f"qk_norm_rope_backward {_dim} {SHORT[_dtype]}")
    def _(dim=_dim, dtype=_dtype):
        q, k = meta(2, 1178, 3 * 24 * dim, dtype=dtype).view(2, 1178, 3, 24, dim).unbind(2)[:2]
        grad, w, table = meta(2, 1178, 24, dim, dtype=dtype), meta(dim, dtype=dtype), meta(1178, dim // 2, dtype=torch.float32)
        qk_norm_rope.qk_norm_rope_backward(grad, grad, q, k, w, w, table, table, 1e-6, 15)

    @case(f"qk_norm_rope_backward plain {_dim} {SHORT[_dtype]}")
    def _(dim=_dim, dtype=_dtype):
        q = meta(2, 1178, 24, dim, dtype=dtype)
        qk_norm_rope.qk_norm_rope_backward(q, q, q, q, None, None, None, None, 1e-6, 3)

for _dtype in SHORT:
    @case(f"qk_norm_into joint buffer 64 {SHORT[_dtype]}")
    def _(dtype=_dtype):
        q, joint, w = meta(2, 1024, 24, 64, dtype=dtype), meta(2, 1178, 24, 64, dtype=dtype), meta(64, dtype=dtype)
        qk_norm_rope.qk_norm_into(q, q, w, w, joint[:, :1024], joint[:, :1024], None, None, 1e-6, RMS, False)

    @case(f"flow_euler_step guided {SHORT[_dtype]}")
    def _(dtype=_dtype):
        sampler_step.flow_euler_step(meta(1, 16, 128, 128, dtype=torch.float32), meta(2, 16, 128, 128, dtype=dtype), None,
                                     meta(28, 2, dtype=torch.float64), 0, meta(dtype=torch.int64), True)

    @case(f"solver_step guided {SHORT[_dtype]}")
    def _(dtype=_dtype):
        x, both = meta(1, 4, 128, 128, dtype=dtype), meta(2, 4, 128, 128, dtype=dtype)
        sampler_step.solver_step(x, both, None, x, None, x, None, None, None, meta(28, 19, dtype=torch.float64), 0, meta(dtype=torch.int64),
                                 False, True, False, False, True)

    @case(f"solver_step inpainting {SHORT[_dtype]}")
    def _(dtype=_dtype):
        x = meta(1, 4, 128, 128, dtype=dtype)
        sampler_step.solver_step(x, x, None, x, x, x, x, x, x, meta(28, 19, dtype=torch.float64), 3, None, True, True, True, True, False)

for _dtype, (_shape, _format) in itertools.product(SHORT, itertools.product(((2, 320, 64, 64), (1, 128, 512, 512)), ("", " channels last"))):
    @case(f"group_norm_silu {_shape[1]} {SHORT[_dtype]}{_format}")
    def _(dtype=_dtype, shape=_shape, last=_format):
        x, w = meta(*shape, dtype=dtype), meta(shape[1], dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        group_norm_silu.group_norm_silu(x, 32, w, w, 1e-5, None, None, None, True, False)

    @case(f"group_norm_silu_backward {_shape[1]} {SHORT[_dtype]}{_format}")
    def _(dtype=_dtype, shape=_shape, last=_format):
        x, w, m = meta(*shape, dtype=dtype), meta(shape[1], dtype=dtype), meta(shape[0], shape[1], dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        group_norm_silu.group_norm_silu_backward(x, x, 32, w, w, 1e-5, m, m, m, True, True)

MASKS = {"": lambda q: None, " bool": lambda q: meta(q.shape[0], 1, q.shape[1], q.shape[1], dtype=torch.bool),
         " additive": lambda q: meta(q.shape[0], 1, 1, q.shape[1], dtype=torch.float32)}
for _dim, _dtype, _mask in itertools.product((16, 40, 64, 72, 96, 128, 160, 256, 512), SHORT, MASKS):
    @case(f"attention {_dim} {SHORT[_dtype]}{_mask}")
    def _(dim=_dim, dtype=_dtype, mask=_mask):
        q = meta(2, 1024, 24, dim, dtype=dtype)
        attention.attention(q, q, q, MASKS[mask](q), None, None, False, None, 1e-6)

for _dim, _dtype in itertools.product((64, 128), SHORT):
    @case(f"attention {_dim} {SHORT[_dtype]} causal")
    def _(dim=_dim, dtype=_dtype):
        q = meta(2, 1024, 24, dim, dtype=dtype)
        attention.attention(q, q, q, None, None, None, True, None, 1e-6)

    @case(f"attention_varlen {_dim} {SHORT[_dtype]}")
    def _(dim=_dim, dtype=_dtype):
        q, cu_seqlens = meta(2048, 24, dim, dtype=dtype), meta(9, dtype=torch.int32)
        attention.attention_varlen(q, q, q, cu_seqlens, cu_seqlens, False, None)

    @case(f"attention_varlen {_dim} {SHORT[_dtype]} causal")
    def _(dim=_dim, dtype=_dtype):
        q, cu_seqlens = meta(2048, 24, dim, dtype=dtype), meta(9, dtype=torch.int32)
        attention.attention_varlen_softmax(q, q, q, cu_seqlens, cu_seqlens, True, None)

    @case(f"attention {_dim} {SHORT[_dtype]} pattern")
    def _(dim=_dim, dtype=_dtype):
        q, blocks, words = meta(2, 1024, 24, dim, dtype=dtype), meta(1, 24, 32, 32, dtype=torch.int32), meta(300, 32, dtype=torch.int32)
        attention.attention(q, q, q, None, None, None, False, None, 1e-6, blocks, words)

    @case(f"joint_attention {_dim} {SHORT[_dtype]}")
    def _(dim=_dim, dtype=_dtype):
        q, q2, w = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 154, 24, dim, dtype=dtype), meta(dim, dtype=dtype)
        attention.joint_attention(q, q, q, q2, q2, q2, w, None, w, None, None, 1e-6)

for _dim in (64, 128):
    @case(f"attention hopper {_dim} bf16")
    def _(dim=_dim):
        q = meta(2, 1024, 24, dim)
        hopper.attention(q, q, q)

    @case(f"attention hopper {_dim} bf16 causal")
    def _(dim=_dim):
        q = meta(2, 1024, 24, dim)
        hopper.attention(q, q, q, True)

    @case(f"joint_attention hopper {_dim} bf16")
    def _(dim=_dim):
        q, q2 = meta(2, 1024, 24, dim), meta(2, 154, 24, dim)
        hopper.joint_attention(q, q, q, q2, q2, q2)

for _dim, _dtype, _mask in itertools.product((16, 40, 64, 72, 128, 160, 256), SHORT, (*MASKS, " causal")):
    @case(f"attention_backward {_dim} {SHORT[_dtype]}{_mask}")
    def _(dim=_dim, dtype=_dtype, mask=_mask):
        q, row = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 24, 1024, dtype=torch.float64)
        hidden = None if mask == " causal" else MASKS[mask](q)
        attention_backward.attention_backward(q, None, q, q, q, q, row, row, hidden, mask == " causal", None)

    if not _mask:
        @case(f"attention_backward {_dim} {SHORT[_dtype]} pattern")
        def _(dim=_dim, dtype=_dtype):
            q, row = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 24, 1024, dtype=torch.float64)
            blocks, words = meta(1, 24, 32, 32, dtype=torch.int32), meta(300, 32, dtype=torch.int32)
            attention_backward.attention_backward(q, None, q, q, q, q, row, row, None, False, None, blocks, words)

    if _dim in (64, 128) and _mask in ("", " causal"):
        @case(f"attention_varlen_backward {_dim} {SHORT[_dtype]}{_mask}")
        def _(dim=_dim, dtype=_dtype, mask=_mask):
            q, row, cu_seqlens = meta(2048, 24, dim, dtype=dtype), meta(24, 2048, dtype=torch.float64), meta(9, dtype=torch.int32)
            attention_backward.attention_varlen_backward(q, row, q, q, q, q, row, row, cu_seqlens, cu_seqlens, mask == " causal", None)

QUICK = ("adaln_modulate 1536 bf16", "gate_residual_adaln two gates 3072 f32", "gate_residual exact 1536 f32", "linear gate residual 1536 bf16",
         "qk_norm_into joint buffer 64 bf16", "flow_euler_step guided bf16", "attention 64 bf16", "attention hopper 64 bf16", "attention hopper 128 bf16", "joint_attention 128 bf16", "attention 72 bf16 bool", "attention 128 bf16 causal",
         "layer_norm 1536 bf16", "rms_norm_backward 4096 bf16", "geglu 5120 bf16", "geglu_backward bias 5120 f32",
         "gate_residual_backward 1536 bf16", "gate_residual_adaln_backward two gates 1536 bf16", "qk_norm_rope_backward 64 bf16")
DOCUMENTED = (*QUICK, "adaln_modulate_backward 1536 bf16", "adaln_modulate_backward affine 3072 f32", "adaln_modulate 3072 bf16", "adaln_modulate_dual 1536 bf16", "gate_residual_adaln two gates 1536 bf16",
              "gate_residual_adaln two gates 16384 f32", "adaln_modulate exact 1536 bf16", "linear bias gelu_tanh 1536 bf16", "qk_norm_rope 64 bf16",
              "qk_norm_rope 128 f32", "qk_norm_rope_backward 128 f32", "layer_norm_2d 1536 bf16", "layer_norm_2d_backward 1536 bf16",
              "global_response_norm 6144 bf16", "global_response_norm_backward 6144 bf16", "bias_activation_backward gelu_tanh 6144 bf16",
              "attention 64 f32", "attention 128 bf16", "attention 128 bf16 additive", "attention 128 f32",
              "attention 256 bf16", "attention 512 bf16", "joint_attention 64 bf16", "attention_varlen 64 bf16", "attention_varlen 128 bf16 causal", "attention 64 bf16 pattern",
              "attention 128 bf16 pattern", "attention_backward 64 bf16", "attention_backward 128 bf16 causal", "attention_backward 64 bf16 pattern", "attention_backward 128 f32",
              "joint_attention hopper 64 bf16", "joint_attention hopper 128 bf16")
