"""Launches of Triton kernels on the device of a tensor, and its current stream.

Triton finds out at every call what each argument specialises the kernel by, and asks the driver where each pointer points: tens of microseconds for the
forty arguments of our kernels. Here a call that was made before, with the same numbers and constants and tensors of the same types and alignment,
starts the kernel that Triton compiled for it at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs

from fusewire.kernels.plans import watching
from fusewire.kernels.tuning import Arch, cuda_arch, hip_arch

GRID_LIMIT = 2**31 - 1  # programs along x; y and z, with 65,535, are never used
KEPT = 4096  # calls that are remembered: a model has some dozens of each size of picture

_archs: dict[int, Arch] = {}
_elsewhere: tuple[Arch, object] | None = None


def arch_of(device: torch.device) -> Arch:
    """The architecture of a CUDA or ROCm device. The interpreter is treated as sm_90."""
    if _elsewhere is not None:
        return _elsewhere[0]
    if device.type != "cuda":
        return cuda_arch(9, 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _archs:
        properties = torch.cuda.get_device_properties(index)
        hip = torch.version.hip is not None
        _archs[index] = hip_arch(properties.gcnArchName) if hip else cuda_arch(properties.major, properties.minor)
    return _archs[index]


class _Compiled(NamedTuple):
    """A kernel that Triton compiled, as its launcher wants it, and the values of the parameters that the call gave by name."""

    run: Callable
    function: int
    metadata: object
    constants: tuple

    def start(self, device: int, programs: int, values: list) -> None:
        with nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device):
            stream = torch._C._cuda_getCurrentRawStream(device)
            self.run(programs, 1, 1, stream, self.function, self.metadata, None, None, None, *values, *self.constants)


_compiled: dict[tuple, _Compiled] = {}


def launch(kernel, programs: int, tensor: torch.Tensor, *args, **options) -> None:
    """Run ``programs`` programs of ``kernel`` on the device of ``tensor`` and its current stream. No program: no launch.

    Neither synchronises nor tunes, so that a call can be captured in a CUDA graph (once the kernel is compiled). ``args`` are tensors, numbers and None;
    ``options`` the kernel's constants and Triton's own, in the same order at every call.
    """
    if not tensor.is_cuda or _elsewhere is not None or torch.version.hip is not None or _hooked() or not 0 < programs <= GRID_LIMIT:
        launch_anew(kernel, programs, tensor, *args, **options)
        if (watch := watching()) is not None:
            watch.called(launch_anew, kernel, programs, tensor, *args, **options)
        return
    device = tensor.get_device()
    values, key = list(args), [id(kernel), device]
    for i, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            values[i] = pointer = value.data_ptr()
            key.append(value.dtype)
            key.append(pointer % 16 == 0)
        else:  # the value, not only what Triton makes of it: few differ, and nothing has to be worked out. The type, as 1, 1.0 and True are equal
            key.append(value)
            key.append(value.__class__)
    key = (*key, *options.items())
    known = _compiled.get(key)
    if known is None:
        compiled = launch_anew(kernel, programs, tensor, *args, **options)
        if len(_compiled) >= KEPT:
            _compiled.clear()
        constants = tuple(options[name] for name in kernel.arg_names[len(args):])
        _compiled[key] = known = _Compiled(compiled.run, compiled.function, compiled.packed_metadata, constants)
    else:
        known.start(device, programs, values)
    if (watch := watching()) is not None:
        watch.started(partial(known.start, device), programs, args, values)


def visible() -> bool:
    """Whether someone looks at launches: a profiler, or who compiles them for another GPU."""
    return _elsewhere is not None or _hooked()


def _hooked() -> bool:
    """Whether a profiler looks at Triton's launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return enter is not None and getattr(enter, "calls", True) or leave is not None and getattr(leave, "calls", True)


def launch_anew(kernel, programs: int, tensor: torch.Tensor, *args, **options):
    """``launch`` by Triton's own way. Returns the compiled kernel, or None where nothing was launched."""
    if programs > GRID_LIMIT:
        raise ValueError(f"{kernel.__name__} would need {programs} programs; the limit is {GRID_LIMIT}")
    if programs == 0:
        return None
    if _elsewhere is not None:
        _elsewhere[1](kernel, programs, args, options)
        return None
    # What Triton's interpreter does with tensors is not the launcher's doing
    with torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext(), nullcontext() if watching() is None else _disable_current_modes():
        return kernel[(programs,)](*args, **options)


def relaunch(compiled, programs: int, tensor: torch.Tensor, *args) -> None:
    """Run again what ``launch_anew`` returned, on the same device, with all of the kernel's arguments in order: constants as they were, the others of the
    same types. Triton then does not ask anew what they are specialised by."""
    with torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext():
        if not tensor.is_cuda or _hooked():
            compiled[programs, 1, 1](*args)
        else:
            stream = torch._C._cuda_getCurrentRawStream(tensor.get_device())
            compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
    if (watch := watching()) is not None:
        watch.called(relaunch, compiled, programs, tensor, *args)


@contextmanager
def launches_go_to(arch: Arch, receive) -> Iterator[None]:
    """Inside, launchers choose for ``arch`` and hand ``receive(kernel, programs, args, options)`` what they would have launched.

    Meta tensors do: only shapes, strides and alignment are looked at. This is how the kernels are compiled where there is no GPU.
    """
    global _elsewhere
    before, _elsewhere = _elsewhere, (arch, receive)
    try:
        yield
    finally:
        _elsewhere = before
