"""What the C library does with memory that PyTorch frees."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3)
_MOST = 2**31 - 1


def keep_memory() -> bool:
    """Tell the C library to keep what is freed for the next tensor: from now on, for the whole process.

    glibc hands a large tensor's memory back to the system as soon as it is freed. The next one of that size then costs a page fault for every 4 KiB,
    which can take longer than the kernel that fills it: on the CPU this helps pictures above all, stock models as much as swapped ones. The process
    keeps its largest size for as long as it runs. No result changes.

    Returns: whether it could be told: False without glibc (macOS, Windows, musl).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _MOST))
