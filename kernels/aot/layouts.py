"""Cases of equal values in other layouts: the order of the sums must be that of the plain one."""

from __future__ import annotations

import torch

from fusewire.kernels.adaln import triton_kernel as adaln
from fusewire.kernels.aot.register import cases, meta, tokens
from fusewire.kernels.attention import triton_kernel as attention
from fusewire.kernels.norm import triton_kernel as norm
from fusewire.kernels.qk_norm_rope import triton_kernel as qk_norm_rope
from fusewire.kernels.qk_norm_rope.reference import RMS

BF16 = (torch.bfloat16,)
LAYOUTS = {
    "plain": lambda x: x,
    "unaligned": lambda x: meta(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x,
    "reversed": lambda x: x.permute(*range(x.dim())[::-1]).contiguous().permute(*range(x.dim())[::-1]),
    "step two": lambda x: meta(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2],
    "sliced": lambda x: meta(*x.shape[:-1], 3 * x.shape[-1], dtype=x.dtype)[..., x.shape[-1]:2 * x.shape[-1]],
}
for _name, _layout in LAYOUTS.items():
    @cases(f"layout of adaln {{}}: {_name}", (1536, 1000, 63), BF16)
    def _(channels, dtype, layout=_layout):
        x, m, _ = tokens(channels, dtype)
        adaln.gate_residual_adaln(layout(x), layout(x), layout(m[0]), None, None, layout(m[1]), layout(m[2]), None, None, 1e-6, False, False)

    @cases(f"layout of adaln_backward {{}}: {_name}", (1536, 63), BF16)
    def _(channels, dtype, layout=_layout):
        x, m, w = tokens(channels, dtype)
        adaln.gate_residual_adaln_backward(layout(x), layout(x), layout(x), layout(x), layout(m[0]), None, None, layout(m[1]), layout(m[2]), layout(w),
                                           None, 1e-6, False, 0b011100111)

    @cases(f"layout of norm_backward {{}}: {_name}", (1536, 63), BF16)
    def _(channels, dtype, layout=_layout):
        x, w = meta(2, 1024, channels, dtype=dtype), meta(channels, dtype=dtype)
        norm.layer_norm_backward(layout(x), layout(x), layout(w), 1e-6, True, True, True)

    @cases(f"layout of qk_norm {{}}: {_name}", (64, 40, 9), BF16)
    def _(dim, dtype, layout=_layout):
        q, w = meta(2, 1178, 24, dim, dtype=dtype), meta(dim, dtype=dtype)
        qk_norm_rope.qk_norm_rope(layout(q), layout(q), layout(w), w, None, None, 1e-6, RMS, False)

    @cases(f"layout of qk_norm_backward {{}}: {_name}", (64, 40, 9), BF16)
    def _(dim, dtype, layout=_layout):
        q, w, table = meta(2, 1178, 24, dim, dtype=dtype), meta(dim, dtype=dtype), layout(meta(1178, dim // 2, dtype=torch.float32)) if dim % 2 == 0 else None
        qk_norm_rope.qk_norm_rope_backward(layout(q), layout(q), layout(q), layout(q), layout(w), w, table, table, 1e-6, 15)

    @cases(f"layout of attention {{}}: {_name}", (64,), BF16)
    def _(dim, dtype, layout=_layout):
        q = layout(meta(2, 1024, 24, dim, dtype=dtype))
        attention.attention(q, q, q, None, None, None, False, None, 1e-6)
