"""Op by op: the calls that a swapped model makes, timed on every backend that can serve them, against eager PyTorch and a plain copy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fusewire.copies import denoiser_of
from fusewire.errors import BadInput, NothingToDo, blaming, count
from fusewire.interrupt import keeping
from fusewire.kernels.dispatch import TABLES
from fusewire.machine import describe
from fusewire.parity import inputs_of, ops, parse_numerics, swap_copies, ticker
from fusewire.parity.result import SCHEMA, name_of, plain
from fusewire.profile.timing import alternate

LEAST = 0.005  # seconds that one sample takes at least


@dataclass(frozen=True)
class BenchRow:
    """One op on one backend. Microseconds a call: median and quartiles. eager_us: the same arithmetic in eager PyTorch. clone_us: copying the
    outputs onto memory of their own, the least that any such op has to do. holds: its parity; a speed-up is given only where it holds."""

    op: str
    shape: str
    dtype: str
    numerics: str
    backend: str
    calls: int
    median_us: float
    low_us: float
    high_us: float
    eager_us: float
    clone_us: float
    against_eager: float | None
    against_clone: float
    holds: bool
    reason: str


@dataclass
class BenchResult:
    """``ok`` is True only when every row's parity holds, and none is lacking because of an interrupt."""

    target: str
    rows: list[BenchRow]
    machine: dict
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.interrupted and all(row.holds for row in self.rows)

    def to_dict(self) -> dict:
        return plain({"kind": "bench", "schema": SCHEMA, "ok": self.ok, "interrupted": self.interrupted, "target": self.target,
                      "rows": [dataclasses.asdict(r) for r in self.rows], "machine": self.machine})


def bench(module, *, numerics: str = "both", only: list[str] | None = None, inputs: dict | None = None, rounds: int = 7, size: int | None = None,
          name: str | None = None, progress=None) -> BenchResult:
    """Time each distinct call of a fused op that one call of a swapped denoiser makes.

    Args:
        module: a denoiser or a pipeline (its denoiser is used). inputs: keyword arguments of one call; random ones unless given.
        numerics: ``"exact"``, ``"close"`` or ``"both"``. only: names of ops. rounds: samples of each side. size: picture width and height, pixels,
            of random inputs.

    Raises: BadInput for an unknown op; NothingToDo where nothing can be swapped, or no call is left. A KeyboardInterrupt has the rows that are
        complete in ``.result``.
    """
    from fusewire import ops as public  # noqa: F401  (fills the tables)

    unknown = sorted(set(only or ()) - set(TABLES))
    if unknown:
        raise BadInput(f"op is {unknown[0]!r}; it should be one of {', '.join(sorted(TABLES))}")
    _, model = denoiser_of(module)
    kwargs, tell = inputs_of(model, inputs, size), progress or (lambda what, done, total: None)
    count("rounds", rounds)
    copies, _ = swap_copies(model, parse_numerics(numerics))
    if inputs is not None:
        with blaming("inputs", type(model).__name__), torch.inference_mode():
            model(**kwargs)
    work = []
    for label, copy in copies.items():
        with torch.inference_mode(), ops.recording() as calls:
            copy(**kwargs)
        work += [(label, call) for call in calls if not only or call.op in only]
    if not work:
        raise NothingToDo("no call of these ops is made by the swapped model")
    tick, result = ticker(tell, "ops", len(work)), BenchResult(name or type(module).__name__, [], {})
    with keeping(result):
        try:
            for label, call in work:
                result.rows += _rows(label, call, rounds)
                tick()
        finally:
            result.machine = describe()  # the load when it ended
    return result


def _rows(label: str, call: ops.Call, rounds: int) -> list[BenchRow]:
    reference = ops.reference_of(call.op)
    if reference is None:
        return []
    table, args = TABLES[call.op], call.args
    first = next(t for t in args if isinstance(t, torch.Tensor))
    eager_args = ops.with_rounding(call.op, args, True)
    served = {row.name: row for row in table.rows if row.name != "reference" and not row.why_not(*args)} or {"reference": call.backend}
    with torch.inference_mode():
        made = ops.outputs(call.op, reference, args)
        sides = {"eager": lambda: reference(*eager_args), "clone": lambda: [t.clone() for t in made]}
        sides |= {name: (lambda run=row.run: run(*args)) for name, row in served.items()}
        timings = alternate(sides, first.device, rounds=rounds, warmup=2, least=LEAST)
    found = []
    for name, row in served.items():
        [judged] = ops.judge([dataclasses.replace(call, backend=row)], label)
        timing, eager, clone = timings[name], timings["eager"].median, timings["clone"].median
        low, high = timing.quartiles
        found.append(BenchRow(call.op, "x".join(map(str, first.shape)), name_of(first.dtype), label, name, call.count, 1e6 * timing.median, 1e6 * low,
                              1e6 * high, 1e6 * eager, 1e6 * clone, eager / timing.median if judged.holds else None, timing.median / clone,
                              judged.holds, judged.reason))
    return found
