"""What a swap leaves with its user, and how an instance gets another class: the numbers of the swaps that are in force for it, and undoing them."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import MethodType

from torch import nn

from fusewire.swap.fused import stock_of
from fusewire.swap.report import Report

IN_FORCE = "_fusewire_in_force"  # attribute of a swapped instance: the numbers of the swaps that made it what it is, in their order
# They begin at random: what was pickled elsewhere carries numbers of other swaps
_numbers = itertools.count(int.from_bytes(os.urandom(6), "little"))
_made: dict[int, list[tuple[weakref.ref, type]]] = {}  # what each swap changed, and from what, as long as it may have to be undone
_lock = threading.RLock()  # a swap plans first and changes then: another thread's would come in between


def alone(function: Callable) -> Callable:
    """``function``, by one thread at a time."""
    @functools.wraps(function)
    def run(*args, **kwargs):
        with _lock:
            return function(*args, **kwargs)

    return run


class Handle:
    """A swap that was made. ``report`` says what it did; ``restore()`` puts every part back to what it was before it."""

    def __init__(self, target, roots: Iterable[object], report: Report, changes: list[tuple[object, type, type]]):
        self.report = report
        self._roots = [weakref.ref(root) for root in roots if isinstance(root, nn.Module)]  # the handle keeps no model alive
        self._pipeline = _weakly(target)
        self._changes = [(weakref.ref(instance), before) for instance, before, _ in changes]
        self._before = {fused: before for _, before, fused in changes}
        self._number = next(_numbers)
        for number in [number for number, made in _made.items() if not any(reference() for reference, _ in made)]:
            del _made[number]  # nothing of it exists any more
        _made[self._number] = self._changes
        for instance, _, _ in changes:
            vars(instance)[IN_FORCE] = [*vars(instance).get(IN_FORCE, ()), self._number]  # a new list: a shallow copy shares the old one

    @alone
    def restore(self) -> None:
        """Give back the classes from before this swap, and so undo those made since. What it no longer is in force for, or no longer exists, stays."""
        roots = [root for reference in self._roots if (root := reference()) is not None]
        parts = list(getattr(self._pipeline(), "components", {}).values())
        others = [part for part in parts if not isinstance(part, nn.Module)]
        here = {id(part) for part in (*others, *(module for root in roots for module in root.modules()))}
        in_force = self._number in _made or not self._changes
        # With what was made since of the parts of this target
        for number in sorted((number for number in _made if in_force and number >= self._number), reverse=True):
            for reference, before in reversed(_made[number]):
                if number == self._number or id(reference()) in here:
                    _undo(reference(), before, number)
            if not any(number in vars(reference() or self).get(IN_FORCE, ()) for reference, _ in _made[number]):
                del _made[number]
        # A pipeline may have put a copy of a part in its place (of its scheduler; of its model by quantisation), a model one of a layer (peft)
        for module in (module for root in (*roots, *parts) if isinstance(root, nn.Module) for module in root.modules()):
            _undo(module, self._before.get(type(module), stock_of(module)), self._number)
        for instance in others:
            _undo(instance, self._before.get(type(instance)), self._number)
        self._changes, self._roots, self._pipeline = [], [], _weakly(None)

    def __repr__(self) -> str:
        return f"<fusewire handle: {self.report}>"


def _undo(instance, before: type | None, number: int) -> None:
    """Give back the class from before swap ``number``, where that is in force, and forget it and those after it."""
    in_force = () if instance is None else vars(instance).get(IN_FORCE, ())
    if number in in_force:
        if before is not None:
            set_class(instance, before)
        vars(instance)[IN_FORCE] = in_force[:in_force.index(number)]
        if not vars(instance)[IN_FORCE]:
            del vars(instance)[IN_FORCE]


def _weakly(target) -> Callable[[], object]:
    """A weak reference; of what takes none, one to nothing."""
    try:
        return weakref.ref(target)
    except TypeError:
        return lambda: None


def set_class(instance, new: type) -> None:
    """Change an instance's class, also inside the hooks that hold its old forward (offload, casting and cache hooks wrap the bound method)."""
    old = type(instance)
    new = _rebased(old, new)
    slots = list(forward_slots(instance, old))
    instance.__class__ = new
    for holder, key in slots:
        holder[key] = MethodType(new.forward, instance)
    if stock_of(instance) is None:
        for key in [key for key in vars(instance) if key.startswith("_fusewire_") and key != IN_FORCE]:
            del vars(instance)[key]


def _rebased(old: type, new: type) -> type:
    """``new``; for an instance whose class was since derived from ours (by FSDP2, by torch's parametrisations), that class derived from ``new``."""
    if not hasattr(old, "fusewire_stock") or "fusewire_stock" in vars(old) or hasattr(new, "fusewire_stock") and "fusewire_stock" not in vars(new):
        return new
    bases = tuple(_rebased(base, new) if hasattr(base, "fusewire_stock") else base for base in old.__bases__)
    kept = {key: value for key, value in vars(old).items() if key not in ("__dict__", "__weakref__")}
    # A class may wrap what it inherits when it is made (transformers' checkpointed layers do): the new one then wraps what it inherits
    if getattr(kept.get("forward"), "__wrapped__", None) in [base.forward for base in old.__bases__ if hasattr(base, "forward")]:
        del kept["forward"]
    return type(old)(old.__name__, bases, kept)


def forward_slots(instance, cls: type) -> Iterator[tuple[dict, str]]:
    """(dictionary, key) of each place that holds ``cls.forward`` bound to this very instance: on the instance itself, by accelerate's hook, by diffusers' hook registry."""
    if not isinstance(instance, nn.Module):
        return
    own = instance.__dict__
    places = [(own, "forward"), (own, "_old_forward")]
    for reference in getattr(own.get("_diffusers_hook"), "_fn_refs", ()):
        places += [(vars(reference), "forward"), (vars(reference), "original_forward")]
    for holder, key in places:
        method = holder.get(key)
        if isinstance(method, MethodType) and method.__self__ is instance and method.__func__ is cls.forward:
            yield holder, key
