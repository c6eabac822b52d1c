"""What ``fusewire.profile`` returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from fusewire.parity.result import SCHEMA, plain


@dataclass(frozen=True)
class Row:
    """One side. Milliseconds per call of the target: the median, and the quartiles low and high.

    against_eager, against_compile: that side's median divided by this one's (above 1: this one is faster). first_ms: the first call after
    ``swap`` or ``torch.compile``, the swap or compilation included. extra_first_ms: what that first call took longer than the median.
    peak_mib: what one call needs beyond the weights at its peak. backends: calls of fused ops by backend.
    """

    variant: str
    median_ms: float
    low_ms: float
    high_ms: float
    against_eager: float
    against_compile: float | None
    floor_share: float | None  # the roofline's time divided by the median: 1 is the floor; None where the floor was not measured
    first_ms: float
    extra_first_ms: float
    peak_mib: float | None
    backends: dict[str, int]


@dataclass(frozen=True)
class MemoryRow:
    """Memory of one side in MiB. peak: weights and working memory. working: tensors, the most that one call's need at once; scratch, of the CPU
    library's threads; and kept, what the swap left behind for good, such as rearranged weights.

    spread: by how much of the smallest measurement of ``tensors`` the largest is larger. against_eager: stock's peak is 1. working_against_eager: the
    same without the weights. limit: what against_eager may be at most.
    """

    variant: str
    peak_mib: float
    weights_mib: float
    working_mib: float
    tensors_mib: float
    scratch_mib: float
    kept_mib: float
    spread: float
    against_eager: float
    working_against_eager: float
    limit: float | None
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """One thing that has to hold."""

    name: str
    holds: bool
    detail: str


@dataclass
class ProfileResult:
    """``ok`` is True only when every verdict holds. interrupted: the rows are of the complete rounds, ``settings["rounds"]`` of them; what is measured after
    the last round, and with it the verdicts, is lacking or in part."""

    target: str
    description: str
    dtype: str
    rows: list[Row]
    verdicts: list[Verdict]
    floor: dict  # gflop, gib, gemm_gflops, bandwidth_gbs, arithmetic_ms, memory_ms, roofline_ms
    kinds: dict[str, dict[str, float]]  # variant -> kind -> ms
    stages: dict[str, dict[str, float]]  # variant -> stage of the pipeline -> ms
    swaps: dict[str, dict]
    machine: dict
    settings: dict
    notes: list[str] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        return bool(self.verdicts) and not self.interrupted and all(verdict.holds for verdict in self.verdicts)

    def row(self, variant: str) -> Row | None:
        """The row of ``"eager"``, ``"compile"``, ``"exact"`` or ``"close"``, or None."""
        return next((row for row in self.rows if row.variant == variant), None)

    def to_dict(self) -> dict:
        """Everything, ready for JSON."""
        return plain({"kind": "profile", "schema": SCHEMA, "ok": self.ok, **{f.name: _plain_field(getattr(self, f.name))
                                                                            for f in dataclasses.fields(self)}})


def _plain_field(value):
    return [dataclasses.asdict(part) for part in value] if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]) else value
