"""The rounding contract.

``"exact"``: round where the stock module rounds, and sum in the order in which the stock kernel sums: the result is ``torch.equal`` to stock's.
``"close"``: float32 inside (float64 for float64), one rounding at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

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


def promoted(dtype: torch.dtype, *tensors: torch.Tensor | None) -> torch.dtype:
    """What ``dtype`` becomes in arithmetic with the tensors."""
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def differs_from_stock(ours: Callable, stock: Callable, cases: Iterable[tuple]) -> str:
    """Whether a kernel may claim ``exact`` beside the installed torch: ``""``, or the reason why its row stands down.

    Both functions take the arguments of one case and return a tensor or a tuple of tensors, which must agree bit for bit. A room asks once, at
    import, so ``cases`` are few and small (``probe_values``): no parallel region starts, no random number is drawn.
    """
    with torch.no_grad():
        for case in cases:
            pairs = zip(*(out if isinstance(out, tuple) else (out,) for out in (ours(*case), stock(*case))))
            if not all(torch.equal(mine, theirs) for mine, theirs in pairs):
                return f"torch {torch.__version__} rounds or sums in another order than the kernel"
    return ""


def probe_values(*shape: int, dtype: torch.dtype = torch.float32, seed: float = 1.0) -> torch.Tensor:
    """Values between -4 and 4 without pattern, on the CPU, the same in every process.

    Not by ``torch.sin``, which starts threads however few the values: a process that forks after importing would wait for them in the child.
    """
    values = [4 * math.sin(i * i * (0.618 * seed)) for i in range(1, math.prod(shape) + 1)]
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype).view(shape)
