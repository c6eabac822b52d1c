"""Calls like one before, on a GPU: the kernels that a launcher started, and the tensors that it made for them, are noted at its first call of a kind; the next
calls do the same without working it out again. What a launcher does in Python (views, strides, tiles, Triton's arguments) takes a GPU's machine longer than
PyTorch takes for a whole op, and a model of many small kernels waits for it.

A kind is all that a launcher may look at: each tensor's dtype, shape, strides, device and alignment, and every other argument. What a launcher does is watched
(``TorchDispatchMode``): it may make tensors with nothing in them, take views, launch, and call other rooms' ops that write into such tensors. One that does
anything else is called as it is, every time.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusewire.kernels.dispatch import LAUNCHERS, forced_backend

KEPT = 4096  # kinds of calls of each launcher: a model has some dozens for each size of picture
TRIED = 8  # kinds of calls of which none could have a plan: the launcher's others are then called as they are
_Tensor, _empty, _strided = torch.Tensor, torch.empty_strided, torch.as_strided
_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_PLAIN = (int, float, bool, str, torch.dtype, type(None))

recorders: dict[int, "Recorder"] = {}  # thread -> the call in it that is watched; launches are told to it
_all: list["Planned"] = []


def forget() -> None:
    """Have every call worked out anew: after what launchers ask (tiles, backends' limits) was changed."""
    for one in _all:
        one.forget()


def _kind(args: tuple) -> tuple | None:
    """What a plan is for. None: nothing to make a plan of."""
    key: list = [forced_backend()]
    for arg in args:
        if isinstance(arg, _Tensor):
            key += (arg.dtype, arg.shape, arg.stride(), arg.get_device(), arg.data_ptr() & 15)
        elif isinstance(arg, _PLAIN):
            key += (arg, arg.__class__)  # 1, 1.0 and True are equal
        else:
            return None
    return tuple(key)


class _Place:
    """A tensor that a step takes: the ``source``-th of the call's arguments and then of what it made, or a view, ``offset`` elements further on."""

    __slots__ = ("source", "offset", "shape", "strides", "whole")

    def __init__(self, source: int, of: _Tensor, tensor: _Tensor):
        self.source, self.offset = source, tensor.storage_offset() - of.storage_offset()
        self.shape, self.strides = tensor.shape, tensor.stride()
        self.whole = tensor is of

    def of(self, sources: list) -> _Tensor:
        source = sources[self.source]
        return source if self.whole else _strided(source, self.shape, self.strides, source.storage_offset() + self.offset)


class _Rebased(NamedTuple):
    """What a launcher reads of a tensor, with that tensor as its first field."""

    make: type
    base: _Place
    rest: tuple

    def of(self, sources: list):
        return self.make(self.base.of(sources), *self.rest)


class _Started:
    """A Triton kernel that was compiled: its launcher's arguments, of which some are addresses of a source and so many bytes."""

    def __init__(self, start: Callable, programs: int, values: list, addresses: list[tuple[int, int, int]]):
        self.start, self.programs, self.values, self.addresses = start, programs, values, addresses

    def __call__(self, sources: list, addresses: list[int]) -> None:
        values = self.values.copy()
        for i, source, offset in self.addresses:
            values[i] = addresses[source] + offset
        self.start(self.programs, values)


class _Called:
    """A call that takes tensors: an op of the compiled library, or a launch by way of Triton."""

    def __init__(self, call: Callable, args: list, options: dict):
        self.call, self.args, self.options = call, args, options

    def __call__(self, sources: list, addresses: list[int]) -> None:
        self.call(*[arg.of(sources) if arg.__class__ is _Place or arg.__class__ is _Rebased else arg for arg in self.args], **self.options)


class Plan:
    """The steps of a call. ``made``: (shape, strides, dtype) of the tensors to make, on the device of the argument ``beside``; ``result``: where those are
    that the call returns; ``same``: which arguments must be one tensor."""

    def __init__(self, steps: list, made: list, beside: int, result, same: list[tuple[int, int]]):
        self.steps, self.made, self.beside, self.result, self.same = steps, made, beside, result, same

    def serves(self, args: tuple) -> bool:
        for i, j in self.same:
            if args[i] is not args[j]:
                return False
        return True

    def __call__(self, args: tuple):
        sources = list(args)
        device = args[self.beside].device
        for shape, strides, dtype in self.made:
            sources.append(_empty(shape, strides, dtype=dtype, device=device))
        addresses = [source.data_ptr() if isinstance(source, _Tensor) else 0 for source in sources]
        for step in self.steps:
            step(sources, addresses)
        result = self.result
        if result.__class__ is _Place:
            return result.of(sources)
        return None if result is None else tuple([None if place is None else place.of(sources) for place in result])


class Recorder(TorchDispatchMode):
    """Watches one call of a launcher. ``reason``: why there is no plan of it; ``later``: the next call of its kind may have one."""

    def __init__(self, args: tuple):
        super().__init__()
        self.count, self.reason, self.later = len(args), "", False
        self.steps: list = []
        self.made: list[tuple] = []
        self.sources: list = list(args)
        self.known: dict[int, int] = {}  # a tensor's id -> its source
        self.alive: list = []  # so that no other tensor gets such an id
        self.same: list[tuple[int, int]] = []  # arguments that are one tensor: a plan of the call does not tell them apart
        for i, arg in enumerate(args):
            if isinstance(arg, _Tensor) and self.known.setdefault(id(arg), i) != i:
                self.same.append((self.known[id(arg)], i))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del recorders[get_ident()]
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            recorders[get_ident()] = self
        name = func._schema.name
        self.alive.append(out)
        if name in _EMPTY:
            self.known[id(out)] = len(self.sources)
            self.sources.append(out)
            self.made.append((out.shape, out.stride(), out.dtype))
        elif name.startswith("fusewire::") and out is None and not kwargs:
            self.steps.append(_Called(LAUNCHERS.get(func, func), [self.place(arg) for arg in args], {}))
        elif func is torch.ops.aten.promote_types.default:
            pass
        elif func.is_view and id(args[0]) in self.known:
            for view in out if isinstance(out, (list, tuple)) else (out,):
                if view.dtype is not args[0].dtype or view.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr():
                    self.reason = f"{name} copies, or counts in other elements"
                self.known[id(view)] = self.known[id(args[0])]
        else:
            self.reason = f"{name} computes"
        return out

    def place(self, arg):
        """``arg`` as a step keeps it."""
        if isinstance(arg, tuple) and arg and isinstance(arg[0], _Tensor):
            return _Rebased(arg.__class__, self.place(arg[0]), tuple(arg[1:]))
        if not isinstance(arg, _Tensor):
            return arg
        if id(arg) not in self.known:
            self.reason = "a tensor comes from elsewhere"
            return None
        source = self.known[id(arg)]
        return _Place(source, self.sources[source], arg)

    def started(self, start: Callable, programs: int, args: tuple, values: list) -> None:
        """A launch of a compiled kernel: ``start(programs, values)``, where ``values`` has the addresses of the tensors in ``args``."""
        addresses = []
        for i, arg in enumerate(args):
            if isinstance(arg, _Tensor) and values[i]:
                place = self.place(arg)
                if place is not None:
                    addresses.append((i, place.source, place.offset * arg.element_size()))
        self.steps.append(_Started(start, programs, list(values), addresses))

    def called(self, launch: Callable, *args, **options) -> None:
        """A launch in another way: ``launch`` of these arguments."""
        self.steps.append(_Called(launch, [self.place(arg) for arg in args], options))

    def plan(self, out) -> Plan | None:
        """Of the call that returned ``out``: nothing, or what it made."""
        places = [self.place(part) for part in (out if isinstance(out, tuple) else (out,))]
        if self.reason or not self.steps or any(place is not None and (place.__class__ is not _Place or place.source < self.count) for place in places):
            return None  # (an argument that is returned would be one more name for it)
        beside = next(i for i, arg in enumerate(self.sources) if isinstance(arg, _Tensor))
        return Plan(self.steps, self.made, beside, tuple(places) if isinstance(out, tuple) else places[0], self.same)


def watching() -> Recorder | None:
    """The recorder of this thread's call, if it is watched."""
    return recorders.get(get_ident()) if recorders else None


class Planned:
    """``launcher``, which takes an op's arguments, by plans where there are any. ``visible``: whether someone wants to see each launch as Triton makes it."""

    def __init__(self, launcher: Callable, visible: Callable[[], bool] = lambda: False):
        self.launcher, self.visible = launcher, visible
        self.forget()
        _all.append(self)

    def forget(self) -> None:
        self.plans: dict[tuple, Plan | None] = {}
        self.failures = 0  # kinds without a plan, until the first with one

    def __call__(self, *args):
        if torch._C._len_torch_dispatch_stack() or self.visible() or watching() is not None or self.failures >= TRIED:
            return self.launcher(*args)
        key = _kind(args)
        if key is None:
            return self.launcher(*args)
        plan = self.plans.get(key)
        if plan is not None and plan.serves(args):
            return plan(args)
        if plan is None and key in self.plans:
            return self.launcher(*args)
        return self.watched(key, args)

    def watched(self, key: tuple, args: tuple):
        watch, thread = Recorder(args), get_ident()
        recorders[thread] = watch
        try:
            with watch:
                out = self.launcher(*args)
        finally:
            del recorders[thread]
        if not watch.later:
            if len(self.plans) >= KEPT:
                self.plans.clear()
            plan = self.plans[key] = watch.plan(out)
            self.failures = self.failures + 1 if plan is None else -KEPT
        return out
