"""The rounding contract.

``"exact"``: round where the stock module rounds, and sum in the order in which the stock kernel sums: the result is ``torch.equal`` to stock's.
``"close"``: float32 inside (float64 for float64), one rounding at the end.
"""

from __future__ import annotations

import torch

NUMERICS = ("exact", "close")


def is_exact(numerics: str) -> bool:
    """True for ``"exact"``, False for ``"close"``; ValueError for anything else."""
    if numerics == "exact":
        return True
    if numerics == "close":
        return False
    raise ValueError(f"numerics is {numerics!r}; it should be 'exact' or 'close'")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``close`` computes in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32
