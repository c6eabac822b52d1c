"""What ``fusewire.parity`` returns: rows with verdicts, error curves and pictures."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch

LEVELS = ("op", "block", "model", "picture")
SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One comparison. Errors are absolute; None where a figure does not apply.

    level: ``"op"``, ``"block"``, ``"model"`` or ``"picture"``. backend: what ran, e.g. ``"cpu"``. max_error, mean_error: of the fused side
    against float64; stock_*: of the stock side; max_difference: fused against stock; mismatch: share of elements that differ from stock's, 0
    to 1; psnr: dB against stock's picture. rule: the rule by which ``holds`` was decided; reason: why it does not hold, or ``""``.
    """

    level: str
    name: str
    numerics: str
    dtype: str
    backend: str
    shape: str
    rule: str
    holds: bool
    equal: bool
    reason: str = ""
    max_error: float | None = None
    mean_error: float | None = None
    stock_max_error: float | None = None
    stock_mean_error: float | None = None
    max_difference: float | None = None
    mean_difference: float | None = None
    mismatch: float | None = None
    psnr: float | None = None


@dataclass
class Pictures:
    """Decoded pictures of every variant, [N, 3, H, W] float32 in 0..1: one per seed."""

    prompts: list[str]
    seeds: list[int]
    variants: dict[str, torch.Tensor]  # "stock", "exact", "close"


@dataclass
class ParityResult:
    """``ok`` is True only when there are rows, every row holds, and none is lacking because of an interrupt."""

    target: str
    description: str
    dtype: str
    rows: list[Row]
    swaps: dict[str, dict]  # numerics -> the lists of its report, by swap.report.SIDES
    machine: dict
    settings: dict
    curves: dict[str, list[float]] = field(default_factory=dict)  # label -> relative error after each step
    pictures: Pictures | None = None
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.interrupted and all(row.holds for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """The rows whose verdict does not hold."""
        return [row for row in self.rows if not row.holds]

    def to_dict(self) -> dict:
        """Everything but the pixels, ready for JSON. Infinite and undefined figures are the strings "inf" and "nan"."""
        return plain({"kind": "parity", "schema": SCHEMA, "ok": self.ok, "interrupted": self.interrupted, "target": self.target,
                      "description": self.description, "dtype": self.dtype, "settings": self.settings, "rows": [dataclasses.asdict(row) for row in self.rows],
                      "curves": self.curves, "swaps": self.swaps, "machine": self.machine})


def plain(value):
    """``value`` with the floats that JSON has no word for as strings."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def name_of(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")
