"""Peak memory of one call: what PyTorch's allocator holds at its fullest, and what it does not see. Counted, so that it repeats to the byte.

Resident memory would say the same only in a process of its own with a C library that hands freed memory back at once (``benchmarks/memory.py``).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fusewire.kernels.library import cpu_scratch
from fusewire.machine import synchronise
from fusewire.profile.kinds import muted
from fusewire.profile.result import MemoryRow, Verdict
from fusewire.targets import modules_of

LIMITS = {"exact": 1.02, "close": 1.10}  # of stock's peak
SMALL = 2**20  # bytes of scratch memory a thread that are not held against a side: they do not shrink with the model
MEASUREMENTS = 2  # of each side


@dataclass(frozen=True)
class Memory:
    """Bytes of one side. weights: parameters and buffers of the target. kept: tensors that the swap and its first call left behind, beyond what stock's
    first call leaves: rearranged weights would be among them. tensors: what one call allocates at its peak, by measurement. scratch: working memory of
    the CPU library's threads; the like of it that PyTorch's own libraries keep is not seen on any side."""

    weights: int
    kept: int
    tensors: tuple[int, ...]
    scratch: int

    @property
    def working(self) -> int:
        """What is needed beyond the weights."""
        return self.kept + max(self.tensors) + self.scratch

    @property
    def peak(self) -> int:
        return self.weights + self.working

    @property
    def spread(self) -> float:
        """By how much of the smallest the largest measurement is larger."""
        return max(self.tensors) / max(1, min(self.tensors)) - 1


def judged(sides: dict[str, Memory], threads: int) -> list[MemoryRow]:
    """One row for each side; the swapped ones are held against stock's (``"eager"``)."""
    stock, rows = sides["eager"], []
    for variant, side in sides.items():
        limit = LIMITS.get(variant)
        holds = limit is None or side.peak - min(side.scratch, SMALL * threads) <= limit * stock.peak
        mib = (size / 2**20 for size in (side.peak, side.weights, side.working, max(side.tensors), side.scratch, side.kept))
        rows.append(MemoryRow(variant, *mib, side.spread, side.peak / stock.peak if stock.peak else 1.0,
                              side.working / stock.working if stock.working else 1.0, limit, holds))
    return rows


def memory_verdicts(rows: Iterable[MemoryRow]) -> list[Verdict]:
    """What has to hold of the rows that have a limit."""
    return [Verdict(f"{row.variant}: peak memory", row.holds, f"{row.against_eager:.3f} of stock's, {row.working_against_eager:.3f} without the weights; the limit is "
                    f"{row.limit:.2f}{_scratch_text(row)}. {kept_text(row)}") for row in rows if row.limit is not None]


def _scratch_text(row: MemoryRow) -> str:
    return f", beside {SMALL >> 20} MiB of scratch memory a thread, where {row.scratch_mib:.1f} MiB are needed in all" if row.scratch_mib else ""


def kept_text(row: MemoryRow) -> str:
    """What the swap cost for good."""
    if row.kept_mib < 0.01:
        return f"No rearranged weights are kept ({round(row.kept_mib * 2**20)} bytes of tensors)"
    return f"Rearranged weights and tables that are kept: {row.kept_mib:.2f} MiB"


def peak_of_call(call: Callable[[], object], device: torch.device) -> tuple[int, int] | None:
    """(bytes that PyTorch's allocator holds at its peak inside ``call`` beyond what it held before, bytes of the CPU library's scratch memory that the
    call needs); None on a device whose allocator does not tell."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before, 0
    if device.type != "cpu":
        return None
    gc.collect()  # what waits for the collector would otherwise be freed at some point of the call, or not
    cpu_scratch(reset=True)
    with muted(), torch.autograd.profiler.profile(profile_memory=True) as found:
        call()
    changes = sorted((event.start_ns(), i, event.nbytes()) for i, event in enumerate(found.kineto_results.events()) if event.name() == "[memory]")
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak, cpu_scratch()


def tensor_bytes() -> int:
    """Bytes of all tensors that this process can still reach from Python."""
    gc.collect()
    return _storage_bytes(found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))


def weight_bytes(target) -> int:
    """Bytes of the parameters and buffers of a module, or of all modules of a pipeline; what is shared counts once."""
    return _storage_bytes(tensor for _, module in modules_of(target) for tensor in (*module.parameters(), *module.buffers()))


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    sizes = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            sizes[tensor.device, storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError):  # of no memory: fake, sparse, wrapped
            pass
    return sum(size for (_, address), size in sizes.items() if address)
