"""Every public op, one import line each; and what is known of their calls: ``backends``, ``stats``, ``reset_stats``."""

from fusewire.kernels.adaln.op import adaln_modulate, adaln_modulate_dual, gate_residual, gate_residual_adaln
from fusewire.kernels.attention.op import attention, joint_attention
from fusewire.kernels.attention.patterns import BlockPattern, block_pattern
from fusewire.kernels.attention.varlen import attention_varlen
from fusewire.kernels.dispatch import Choice as _Choice
from fusewire.kernels.dispatch import choices as _choices
from fusewire.kernels.dispatch import reset_stats, stats
from fusewire.kernels.gated_mlp.op import geglu, quick_gelu, swiglu
from fusewire.kernels.group_norm_silu.op import group_norm_silu
from fusewire.kernels.linear.op import linear
from fusewire.kernels.norm.op import global_response_norm, layer_norm, layer_norm_2d, rms_norm
from fusewire.kernels.qk_norm_rope.op import qk_norm_into, qk_norm_rope
from fusewire.kernels.sampler_step.op import sampler_step
from fusewire.kernels.sampler_step.solver_op import solver_step
from fusewire.kernels.sampler_step.tables import flow_euler_table, solver_table

__all__ = [
    "BlockPattern",
    "adaln_modulate",
    "adaln_modulate_dual",
    "attention",
    "attention_varlen",
    "block_pattern",
    "backends",
    "flow_euler_table",
    "gate_residual",
    "gate_residual_adaln",
    "geglu",
    "global_response_norm",
    "group_norm_silu",
    "joint_attention",
    "layer_norm",
    "layer_norm_2d",
    "linear",
    "qk_norm_into",
    "qk_norm_rope",
    "quick_gelu",
    "reset_stats",
    "rms_norm",
    "sampler_step",
    "solver_step",
    "solver_table",
    "stats",
    "swiglu",
]


_OPS = (adaln_modulate, adaln_modulate_dual, attention, attention_varlen, gate_residual, gate_residual_adaln, geglu, global_response_norm, group_norm_silu,
        joint_attention, layer_norm, layer_norm_2d, linear, qk_norm_into, qk_norm_rope, quick_gelu, rms_norm, sampler_step,
        solver_step, swiglu)


def backends(name: str, *args, **kwargs) -> list[_Choice]:
    """Which backend would serve ``fusewire.ops.<name>(*args, **kwargs)``, and why the others would not; nothing is computed.

    Returns: for each backend, in order of preference, (backend, runs, reason).
    Raises: ValueError where there is no such op; what the op itself raises for a bad argument.
    """
    for op in _OPS:
        if op.__name__ == name:
            return _choices(op, *args, **kwargs)
    raise ValueError(f"name is {name!r}; it should be one of {', '.join(op.__name__ for op in _OPS)}")
