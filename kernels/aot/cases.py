"""All launches that are compiled: shapes of real models, and for each tile that a launcher may choose a size that chooses it
(tests/kernels/test_triton_configurations.py looks for one that is missing)."""

from __future__ import annotations

from fusewire.kernels.aot import attention, elements, layouts, rows  # noqa: F401 (they register their cases)
from fusewire.kernels.aot.register import CASES, SWEPT  # noqa: F401

# What the default test run compiles
QUICK = ("adaln_modulate 1536 bf16", "gate_residual_adaln two gates 3072 f32", "gate_residual exact 1536 f32", "linear gate residual 1536 bf16",
         "qk_norm_into joint buffer 64 bf16", "flow_euler_step guided bf16", "attention 64 bf16", "attention hopper 64 bf16", "attention hopper 128 bf16", "joint_attention 128 bf16", "attention 72 bf16 bool", "attention 128 bf16 causal",
         "layer_norm 1536 bf16", "rms_norm_backward 4096 bf16", "geglu 5120 bf16", "geglu_backward bias 5120 f32",
         "gate_residual_backward 1536 bf16", "gate_residual_adaln_backward two gates 1536 bf16", "qk_norm_rope_backward 64 bf16")
