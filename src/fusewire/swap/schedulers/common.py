"""What the swapped schedulers share: the place of a timestep without asking the device, tables of scalars as stock rounds them, and the one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fusewire import ops
from fusewire.kernels.sampler_step.tables import SOLVER

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Known(NamedTuple):
    """A stock scheduler: the methods that its fused step stands for, with their fingerprints, and ``why_not(scheduler)``: "" or why it stays stock."""

    verified: dict[Callable, tuple[str, ...]]
    why_not: Callable[[object], str]


KNOWN: dict[type, Known] = {}


class Scalars:
    """How stock's 0-dim float32 scalars take part in arithmetic with latents of ``dtype``; ``close`` rounds none of them.

    On the CPU the left operand of a product is rounded to the latents' dtype, a right one or a divisor is not. PyTorch's CUDA kernels round neither
    where the scalar lies on the CPU, and divide by multiplying with its reciprocal; a scalar on the GPU is rounded on either side.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, scalars: torch.device, exact: bool):
        on_gpu, with_latents = device.type != "cpu", scalars.type != "cpu"
        self.dtype, self.device, self.exact = dtype, device, exact
        self.reciprocal = exact and on_gpu and not with_latents
        self._left, self._right = exact and (with_latents or not on_gpu), exact and with_latents

    def left(self, value: torch.Tensor) -> torch.Tensor:
        return self.stored(value) if self._left else value

    def right(self, value: torch.Tensor) -> torch.Tensor:
        return self.stored(value) if self._right else value

    divisor = right

    def stored(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype)

    def prediction(self, kind: str, alpha: torch.Tensor, sigma: torch.Tensor) -> dict[str, torch.Tensor | float]:
        """The columns of x0 for ``z = alpha * x0 + sigma * eps``, as DDIM, DDPM, LCM and DPM-Solver++ compute it."""
        if kind == "epsilon":
            return dict(x0_x=1.0, x0_m=-self.left(sigma), x0_divisor=self.divisor(alpha))
        if kind == "v_prediction":
            return dict(x0_x=self.left(alpha), x0_m=-self.left(sigma))
        return dict(x0_m=1.0)

    def limit(self, config) -> dict[str, float]:
        if not config.clip_sample:
            return {}
        return dict(x0_limit=self.stored(torch.tensor(config.clip_sample_range, dtype=torch.float32)) if self.exact else config.clip_sample_range)


@contextmanager
def kept() -> Iterator[None]:
    """What is made inside serves later calls too: on the CPU unless told otherwise, and outside inference mode, whose tensors no graph can hold."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        yield


def on_cpu(value) -> bool:
    """Whether this is a tensor, as schedulers make their levels, and lies on the CPU."""
    return isinstance(value, torch.Tensor) and value.is_cpu


def stamp(tensor: torch.Tensor) -> int | bytes:
    """What changes when a tensor is written to. Those made in inference mode have no version: on the CPU their bytes tell; on a device nobody can."""
    if not tensor.is_inference():
        return tensor._version
    return tensor.numpy().tobytes() if tensor.is_cpu else 0


def uploaded(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table on ``device``. From pinned memory, of which PyTorch keeps track: nobody waits."""
    return table.pin_memory().to(device, non_blocking=True) if table.is_cpu and device.type == "cuda" else table.to(device)


def gathered(rows: list[dict]) -> dict[str, list[float]]:
    """Columns from rows made one by one; what a row does not name has its default."""
    return {name: [float(row.get(name, SOLVER[name])) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def stacked(steps: int, *blocks: dict) -> dict[str, torch.Tensor]:
    """Columns of a table that has for each block, one after the other, a row for each step."""
    def column(name: str) -> torch.Tensor:
        return torch.cat([torch.as_tensor(block.get(name, SOLVER[name]), dtype=torch.float64, device="cpu").expand(steps) for block in blocks])

    return {name: column(name) for name in dict.fromkeys(name for block in blocks for name in block)}


def host_alphas(scheduler) -> torch.Tensor:
    """``alphas_cumprod`` on the CPU; where ``add_noise`` has moved them, what they were moved from."""
    alphas = scheduler.alphas_cumprod
    moved, version, before = scheduler.__dict__.get("_fusewire_host") or (None, None, None)
    return before if moved is alphas and version == stamp(alphas) else alphas.cpu()


def host_levels(scheduler, name: str = "sigmas") -> torch.Tensor:
    """``scheduler.sigmas``, or levels of another name, on the CPU, fetched once for each tensor that they are set to."""
    levels = getattr(scheduler, name)
    if levels.is_cpu:
        return levels
    fetched = scheduler.__dict__.setdefault("_fusewire_fetched", {})
    known = fetched.get(name)
    if known is None or known[0] is not levels or known[1] != stamp(levels):
        known = fetched[name] = (levels, stamp(levels), levels.cpu())
    return known[2]


class Prepared(NamedTuple):
    """The table of a schedule for latents of one dtype and device, and what it was made from. ``rows`` is None where the step stays stock."""

    sources: tuple[torch.Tensor, ...]
    stamps: tuple[int | bytes, ...]
    config: object
    rows: torch.Tensor | None
    reciprocal: bool


def prepared(scheduler, key: tuple, sources: tuple[torch.Tensor, ...], sample: torch.Tensor, exact: bool, columns: Callable[[Scalars], dict]) -> Prepared:
    """The table with ``columns(scalars)``, made again when one of ``sources``, or the configuration, is another one or was written to.

    The first of the sources is what the scalars are computed from.
    """
    tables, place = scheduler.__dict__.setdefault("_fusewire_tables", {}), (key, sample.dtype, sample.device)
    found, config = tables.get(place), scheduler._internal_dict
    if found is not None and found.config is config:
        for source, known, before in zip(sources, found.sources, found.stamps):
            if source is not known or stamp(source) != before:
                break
        else:
            return found
    if not all(isinstance(source, torch.Tensor) for source in sources):  # a user's own numbers: stock takes any kind
        return Prepared((), (), config, None, False)
    if len(tables) >= 8:  # of other dtypes, devices and etas
        tables.clear()
    rows, scalars = None, Scalars(sample.dtype, sample.device, sources[0].device, exact)
    if sources[0].dtype is torch.float32 and not KNOWN[scheduler.fusewire_stock].why_not(scheduler):
        with kept():
            named = columns(scalars)
            steps = max(len(values) for values in named.values() if not isinstance(values, (int, float)) and torch.as_tensor(values).dim())
            rows = uploaded(ops.solver_table(steps, **named), sample.device)
    found = tables[place] = Prepared(sources, tuple(map(stamp, sources)), config, rows, scalars.reciprocal)
    return found


def times(scheduler) -> list:
    """The values of ``scheduler.timesteps``, fetched once for each tensor that they are set to."""
    timesteps = scheduler.timesteps
    known = scheduler.__dict__.get("_fusewire_times")
    if known is None or known[0] is not timesteps or known[1] != stamp(timesteps):
        known = scheduler.__dict__["_fusewire_times"] = (timesteps, stamp(timesteps), timesteps.tolist())
    return known[2]


def host_times(scheduler) -> torch.Tensor:
    """``scheduler.timesteps`` on the CPU."""
    timesteps = scheduler.timesteps
    return timesteps if timesteps.is_cpu else torch.tensor(times(scheduler), dtype=timesteps.dtype, device="cpu")


def place(scheduler, timestep) -> int | None:
    """Where in ``scheduler.timesteps`` an element of that very tensor lies: pipelines pass such, and no value has to be fetched. None: anything else."""
    timesteps = scheduler.timesteps
    if not isinstance(timestep, torch.Tensor) or not isinstance(timesteps, torch.Tensor):
        return None
    if (timestep.dim() or timestep.dtype is not timesteps.dtype or timestep.device != timesteps.device
            or not timesteps.is_contiguous()):
        return None
    offset, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return offset if rest == 0 and 0 <= offset < len(timesteps) else None


def indexed(stock: type) -> dict:
    """``_init_step_index`` of the schedulers that count their steps, without the look-up that makes the first one wait for the device."""

    def _init_step_index(self, timestep):
        at = place(self, timestep) if self._begin_index is None else None
        if at is None:
            return stock._init_step_index(self, timestep)
        values = times(self)
        first = values.index(values[at])
        # A value that is there twice: stock takes the second place, so that a run may start in the middle
        self._step_index = values.index(values[at], first + 1) if values.count(values[at]) > 1 else first

    return {"_init_step_index": _init_step_index}


def usable(model_output, sample) -> bool:
    """Whether the op serves these latents: of one shape, dtype and device."""
    return (isinstance(model_output, torch.Tensor) and isinstance(sample, torch.Tensor) and sample.dtype in FLOATS and sample.dim() > 0
            and model_output.dtype is sample.dtype and model_output.shape == sample.shape and model_output.device == sample.device)


def within(scheduler, *at: int) -> bool:
    """Whether the training had all these timesteps; for others stock has an error to raise."""
    return max(at) < len(scheduler.alphas_cumprod)


def unknown_limit(scheduler) -> str:
    """A table takes a limit of 0 for none, and cannot hold one that the latents' dtype does not."""
    config = scheduler.config
    limit = config.clip_sample_range if config.clip_sample else 1.0
    return "" if 0 < limit <= torch.finfo(torch.float16).max else f"clip_sample_range is {limit}"


def no_thresholding(scheduler) -> str:
    return "thresholding=True needs a quantile of every picture" if getattr(scheduler.config, "thresholding", False) else ""


def of_levels(scheduler, order: int = 2) -> str:
    """Why a multistep solver along noise levels stays stock: a higher order, thresholding, or a prediction that is none of the four."""
    if scheduler.config.solver_order > order:
        return f"solver_order is {scheduler.config.solver_order}"
    return no_thresholding(scheduler) or unknown_prediction(scheduler, "epsilon", "sample", "v_prediction", "flow_prediction")


def unknown_prediction(scheduler, *kinds: str) -> str:
    kind = scheduler.config.prediction_type
    return "" if kind in kinds else f"prediction_type is {kind!r}"
