"""The state of the machine that stands beside every figure: processor, threads, versions; and its measured rates."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fusewire import ops

PACKAGES = ("torch", "diffusers", "transformers", "triton", "peft", "accelerate", "safetensors", "numpy", "matplotlib")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def version_of(package: str) -> str:
    """The installed version of ``package``, or ``""``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The processor's name as its maker writes it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_total() -> int | None:
    """Bytes of main memory, or None where the system does not say."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe() -> dict:
    """What a figure depends on, ready for JSON. Holds no host name, no user name and no path."""
    import fusewire
    from fusewire.kernels.library import cpu_isa

    memory = memory_total()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "fusewire_isa": cpu_isa() or None,
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "fusewire": fusewire.__version__,
        "versions": {name: version_of(name) for name in PACKAGES if version_of(name)},
    }


def synchronise(device: torch.device) -> None:
    """Wait until ``device`` has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, work on the device included."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


@functools.cache  # one figure for a process: the floors of several targets are then on one scale
@torch.inference_mode()
def gemm_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """FLOP/s of the best matrix product of [1024, 1536] with [1536, 6144] that this machine's libraries, ours among them, offer in ``dtype``."""
    rows, inner, columns = 1024, 1536, 6144
    seed = torch.Generator(device).manual_seed(0)  # the global one is the user's
    x, weight = (torch.randn(count, inner, device=device, dtype=dtype, generator=seed) for count in (rows, columns))
    calls = [lambda: F.linear(x, weight), lambda: ops.linear(x[None], weight, numerics="close")]
    # PyTorch sends float32 products to one library and bf16 products to another; the floor is set by the fastest of all.
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    best = float("inf")
    for call in calls:
        call()
        best = min(best, *(seconds(call, device) for _ in range(repeats)))
    return 2 * rows * inner * columns / best


@functools.cache
@torch.inference_mode()
def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second, read and written, of copying 256 MiB onto memory that is already there."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.copy_(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(repeats))
