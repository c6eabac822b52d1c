"""Every public op, one import line each."""

from fusewire.kernels.adaln.op import adaln_modulate
from fusewire.kernels.dispatch import TABLES as _TABLES
from fusewire.kernels.dispatch import reset_stats, stats

__all__ = ["adaln_modulate", "reset_stats", "stats"]
