"""Cases of the kernels that hold rows: adaLN, norms, QK norm."""

from __future__ import annotations

import torch

from fusewire.kernels.adaln import triton_kernel as adaln
from fusewire.kernels.adaln.triton_limits import MAX_BACKWARD_CHANNELS, MAX_CHANNELS, MAX_UNALIGNED_CHANNELS
from fusewire.kernels.aot.register import cases, meta, tokens
from fusewire.kernels.norm import triton_kernel as norm
from fusewire.kernels.norm.triton_limits import MAX_BACKWARD_CHANNELS as MAX_NORM_BACKWARD_CHANNELS
from fusewire.kernels.qk_norm_rope import triton_kernel as qk_norm_rope
from fusewire.kernels.qk_norm_rope.reference import RMS, ROTATION
from fusewire.kernels.qk_norm_rope.triton_limits import MAX_DIM

# A size for each power of two, in vectors and element by element
POWERS = (16, 64, 128, 256, 512, 1024, 1536, 3072, 8192, 16384)
ODD = (20, 63, 100, 250, 500, 1000, 2039, 4095, 8191, 16383)


@cases("gate_residual_adaln two gates {} {}", (*POWERS, *ODD, 1152), most=MAX_CHANNELS)
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.gate_residual_adaln(x, x, m[0], x, m[1], m[2], m[3], None, None, 1e-6, False, False)


@cases("gate_residual_adaln two gates affine {} {}", (1536, 2039, 16384, 16383))
def _(channels, dtype):
    x, m, w = tokens(channels, dtype)
    adaln.gate_residual_adaln(x, x, m[0], x, m[1], m[2], m[3], w, w, 1e-6, False, False)


@cases("adaln_modulate {} {}", (64, 1152, 1536, 3072, 8192, 16384, 16383))
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.adaln_modulate(x, m[0], m[1], None, None, 1e-6, False, False)


@cases("adaln_modulate_dual {} {}", (1536, 16384, 16383))
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.adaln_modulate_dual(x, *m[:4], None, None, 1e-6, False, False)


@cases("adaln_modulate_dual rms affine {} {}", (1536, 16384, 16383))
def _(channels, dtype):
    x, m, w = tokens(channels, dtype)
    adaln.adaln_modulate_dual(x, *m[:4], w, w, 1e-6, True, False)


@cases("adaln_modulate_dual exact {} {}", (1536, 2039, 16384))
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln._launch(x, (), adaln.NONE, None, None, ((m[0], m[1]), (m[2], m[3])), 1e-6, True, (torch.empty_like(x), torch.empty_like(x)))


@cases("adaln_modulate exact {} {}", (1536, 16384))
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln._launch(x, (), adaln.NONE, None, None, ((m[0], m[1]),), 1e-6, True, (torch.empty_like(x),))


@cases("gate_residual exact {} {}", (1536, 2039, 16384))
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.gate_residual(x, x, m[0], True)


@cases("gate_residual_adaln two gates exact {} {}", (1536, 2039, 16384))
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln._launch(x, ((x, m[0]), (x, m[1])), adaln.NONE, None, None, (), 1e-6, True, (torch.empty_like(x),))


@cases("adaln_modulate float32 modulation {} {}", (1536, 16384), (torch.bfloat16,))
def _(channels, dtype):
    (x, *_), (_, m, _) = tokens(channels, dtype), tokens(channels, torch.float32)
    adaln.adaln_modulate(x, m[0], m[1], None, None, 1e-6, False, False)


_BACKWARD = (64, 1152, 1536, 2039, 3072, 4096)


def _gradients(channels: int) -> bool:
    return channels <= MAX_UNALIGNED_CHANNELS or channels % 16 == 0


@cases("adaln_modulate_backward {} {}", (16, *_BACKWARD, 128, 256, 512, 1024, *ODD[:6]), most=MAX_BACKWARD_CHANNELS, serves=_gradients)
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.adaln_modulate_backward(x, x, m[0], m[1], None, None, 1e-6, False, 0b111)


@cases("adaln_modulate_backward affine {} {}", _BACKWARD)
def _(channels, dtype):
    x, m, w = tokens(channels, dtype)
    adaln.adaln_modulate_backward(x, x, m[0], m[1], w, w, 1e-6, True, 0b11111)


@cases("adaln_modulate_dual_backward {} {}", _BACKWARD)
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.adaln_modulate_dual_backward(x, x, x, *m[:4], None, None, 1e-6, False, 0b11111)


@cases("adaln_modulate_dual_backward each token {} {}", (1536, 4096))
def _(channels, dtype):
    x, *_ = tokens(channels, dtype)
    adaln.adaln_modulate_dual_backward(x, x, x, x, x, x, x, None, None, 1e-6, False, 0b11111)


@cases("gate_residual_backward {} {}", _BACKWARD)
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.gate_residual_backward(x, x, m[0], 0b11)


@cases("gate_residual_adaln_backward two gates {} {}", (16, *_BACKWARD, 128, 256, 512, 1024, *ODD[:6]), most=MAX_BACKWARD_CHANNELS, serves=_gradients)
def _(channels, dtype):
    x, m, _ = tokens(channels, dtype)
    adaln.gate_residual_adaln_backward(x, x, x, x, m[0], x, m[1], m[2], m[3], None, None, 1e-6, False, 0b001111111)


@cases("gate_residual_adaln_backward affine {} {}", _BACKWARD)
def _(channels, dtype):
    x, m, w = tokens(channels, dtype)
    adaln.gate_residual_adaln_backward(x, x, x, x, m[0], None, None, m[1], m[2], w, w, 1e-6, False, 0b111100111)


@cases("gate_residual_adaln_backward each token {} {}", _BACKWARD)
def _(channels, dtype):
    x, *_ = tokens(channels, dtype)
    adaln.gate_residual_adaln_backward(x, x, x, x, x, None, None, x, x, None, None, 1e-6, False, 0b001100111)


_NORMS = (64, 1536, 4096, 8192)


@cases("layer_norm {} {}", (*POWERS, *ODD, 4096), most=MAX_CHANNELS)
def _(channels, dtype):
    w = meta(channels, dtype=dtype)
    norm.layer_norm(meta(2, 1024, channels, dtype=dtype), w, w, 1e-6, False, False)


@cases("rms_norm {} {}", (*_NORMS, 16384))
def _(channels, dtype):
    norm.rms_norm(meta(1, 512, channels, dtype=dtype), meta(channels, dtype=dtype), None, 1e-6, False, False)


@cases("rms_norm plain {} {}", (1536,))
def _(channels, dtype):
    norm.rms_norm(meta(1, 512, channels, dtype=dtype), None, None, 1e-6, False, False)


@cases("layer_norm_backward {} {}", (*POWERS[:-1], *ODD[:-1], 4096), most=MAX_NORM_BACKWARD_CHANNELS)
def _(channels, dtype):
    x = meta(2, 1024, channels, dtype=dtype)
    norm.layer_norm_backward(x, x, meta(channels, dtype=dtype), 1e-6, True, True, True)


@cases("rms_norm_backward {} {}", _NORMS)
def _(channels, dtype):
    x = meta(1, 512, channels, dtype=dtype)
    norm.rms_norm_backward(x, x, meta(channels, dtype=dtype), 1e-6, True, True, False)


@cases("layer_norm_backward x alone {} {}", (1536,))
def _(channels, dtype):
    x = meta(2, 1024, channels, dtype=dtype)
    norm.layer_norm_backward(x, x, None, 1e-6, True, False, False)


@cases("layer_norm_backward weight alone {} {}", (1536,))
def _(channels, dtype):
    x = meta(2, 1024, channels, dtype=dtype)
    norm.layer_norm_backward(x, x, meta(channels, dtype=dtype), 1e-6, False, True, False)


# Head dimensions up to MAX_DIM
_DIMS = (16, 40, 64, 72, 128, 256, 512, 1000, 1024)


@cases("qk_norm_rope {} {}", (*_DIMS, 20, 100, 250, 500), most=MAX_DIM, serves=lambda dim: dim % 2 == 0)
def _(dim, dtype):
    q, k = meta(2, 1178, 3 * 24 * dim, dtype=dtype).view(2, 1178, 3, 24, dim).unbind(2)[:2]
    table = meta(1178, dim // 2, dtype=torch.float32) if dim % 2 == 0 else None
    qk_norm_rope.qk_norm_rope(q, k, meta(dim, dtype=dtype), meta(dim, dtype=dtype), table, table, 1e-6, RMS, False)


@cases("qk_norm_rope exact {} {}", (64, 128))
def _(dim, dtype):
    q, w, table = meta(2, 1178, 24, dim, dtype=dtype), meta(dim, dtype=dtype), meta(1178, dim // 2, dtype=torch.float32)
    qk_norm_rope._launch(q, q, w, w, torch.empty_like(q), torch.empty_like(q), table, table, 1e-6, True, qk_norm_rope.GIVEN)
    qk_norm_rope.qk_norm_rope(q, q, None, None, table, table, 1e-6, ROTATION, True)
    qk_norm_rope.qk_norm_rope(q, q, None, None, table, table, 1e-6, ROTATION, False)


@cases("qk_norm_rope_backward {} {}", (*_DIMS, 20, 100, 250, 500), most=MAX_DIM, serves=lambda dim: dim % 2 == 0)
def _(dim, dtype):
    q, k = meta(2, 1178, 3 * 24 * dim, dtype=dtype).view(2, 1178, 3, 24, dim).unbind(2)[:2]
    grad, w, table = meta(2, 1178, 24, dim, dtype=dtype), meta(dim, dtype=dtype), meta(1178, dim // 2, dtype=torch.float32)
    qk_norm_rope.qk_norm_rope_backward(grad, grad, q, k, w, w, table, table, 1e-6, 15)


@cases("qk_norm_rope_backward plain {} {}", (20, 63, *_DIMS), most=MAX_DIM)
def _(dim, dtype):
    q = meta(2, 1178, 24, dim, dtype=dtype)
    qk_norm_rope.qk_norm_rope_backward(q, q, q, q, None, None, None, None, 1e-6, 3)


@cases("qk_norm_into joint buffer {} {}", (64,))
def _(dim, dtype):
    q, joint, w = meta(2, 1024, 24, dim, dtype=dtype), meta(2, 1178, 24, dim, dtype=dtype), meta(dim, dtype=dtype)
    qk_norm_rope.qk_norm_into(q, q, w, w, joint[:, :1024], joint[:, :1024], None, None, 1e-6, RMS, False)
