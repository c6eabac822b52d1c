"""Every public op, one import line each."""

from fusewire.kernels.adaln.op import adaln_modulate, adaln_modulate_dual, gate_residual, gate_residual_adaln
from fusewire.kernels.attention.op import attention, joint_attention
from fusewire.kernels.dispatch import TABLES as _TABLES
from fusewire.kernels.dispatch import reset_stats, stats
from fusewire.kernels.linear.op import linear
from fusewire.kernels.qk_norm_rope.op import qk_norm_into, qk_norm_rope
from fusewire.kernels.sampler_step.op import sampler_step
from fusewire.kernels.sampler_step.tables import flow_euler_table

__all__ = [
    "adaln_modulate",
    "adaln_modulate_dual",
    "attention",
    "flow_euler_table",
    "gate_residual",
    "gate_residual_adaln",
    "joint_attention",
    "linear",
    "qk_norm_into",
    "qk_norm_rope",
    "reset_stats",
    "sampler_step",
    "stats",
]
