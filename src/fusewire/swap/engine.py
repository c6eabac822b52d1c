"""Swapping and restoring: plan over the whole tree first, then change all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from fusewire.errors import BadInput, NothingToDo
from fusewire.kernels import flops
from fusewire.kernels.rounding import NUMERICS
from fusewire.models.layers import How
from fusewire.swap import custom, families
from fusewire.swap.families import Candidate
from fusewire.swap.fused import stock_of
from fusewire.swap.handle import IN_FORCE, Handle, alone, forward_slots, set_class
from fusewire.swap.report import Entry, Report, SwapError, warn_the_user

ALREADY = "already swapped"
REPLACED = "its forward was replaced on the instance by something that does not call it through a hook we know"
HELD = "its forward was replaced on the instance after a swap with other numerics, and holds what that swap gave it: take it off first"
_warned: set[tuple[str, str]] = set()


@alone
def swap(target, numerics: str, only: str | Iterable[str] | None, strict: bool) -> Handle:
    if numerics not in NUMERICS:
        raise BadInput(f"numerics is {numerics!r}; it should be 'exact' or 'close'")
    how = How.of(numerics)
    known, missing = families.load()
    only = _names(only, sorted({op for family in known for op in family.ops}))
    if only is not None:
        how = How(how.numerics, attention=how.attention and "attention" in only, linear=how.linear and "linear" in only)
    parts = list(_parts(target))
    _check_loaded(parts)

    report, changes, seen, named = Report(numerics), [], set(), set()
    for name, instance in parts:
        found = [candidate for family in known for candidate in family.candidates(name, instance, how)]
        for candidate in found or (custom.somebodys_own(name, instance, how) if id(instance) not in named else ()):
            named.add(id(candidate.instance))
            if id(candidate.instance) not in seen or candidate.fused is None:
                _settle(candidate, only, report, changes, seen)
    if only is None:
        _undo_others(parts, report, changes, seen)
    if known and only is None and not isinstance(target, nn.Module):
        report.left += custom.unknown_models(getattr(target, "components", {}), [*report.swapped, *report.left])
    report.noted += [Entry(name or "model", "torch.compile", custom.COMPILED) for name, instance in parts if custom.is_compiled(instance)]
    if not report.swapped:
        raise NothingToDo(_nothing_to_swap(target, report, missing))
    unexpected = [entry for entry in report.left if not entry.by_choice]
    if strict and unexpected:
        raise SwapError(f"strict=True, and {len(unexpected)} of the ops would have been left at stock:\n{report}")
    _warn(unexpected)  # which raises where warnings are errors: before anything is changed
    _apply(changes)
    flops.register()
    return Handle(target, _roots(target).values(), report, changes)


@alone
def restore(target) -> int:
    parts = [instance for _, instance in _parts(target)]
    swapped = [instance for instance in parts if stock_of(instance) is not None]
    for instance in swapped:
        set_class(instance, stock_of(instance))
    for instance in parts:
        vars(instance).pop(IN_FORCE, None)
    return len(swapped)


def _settle(candidate: Candidate, only, report: Report, changes: list, seen: set) -> None:
    """Enter one candidate into the report, and into the changes where it is to be swapped."""
    name, instance, ops, fused, reason, by_choice = candidate
    if only is not None and not only.intersection(ops):
        return
    if fused is not None and _wrapped(instance) and getattr(instance, "fusewire_how", None) != fused.fusewire_how:
        fused, reason = None, HELD if stock_of(instance) else REPLACED
    if fused is None:
        report.left.extend(Entry(name, op, reason, by_choice) for op in ops)
        return
    seen.add(id(instance))
    report.swapped.extend(Entry(name, op, _state(instance, fused)) for op in ops)
    if type(instance) is not fused:
        changes.append((instance, type(instance), fused))


def _wrapped(instance) -> bool:
    """Whether the instance has a forward of its own that is no hook's: whatever its class becomes, that is called, with what it holds."""
    return isinstance(instance, nn.Module) and "forward" in vars(instance) and not any(forward_slots(instance, type(instance)))


def _undo_others(parts: list[tuple[str, object]], report: Report, changes: list, seen: set) -> None:
    """What was swapped with other numerics, and is nothing that these swap, becomes stock again: ``exact`` holds for the whole of it."""
    for name, instance in parts:
        stock = stock_of(instance)
        if stock is not None and id(instance) not in seen and instance.fusewire_how.numerics != report.numerics and not _wrapped(instance):
            changes.append((instance, type(instance), stock))
            report.noted.append(Entry(name or "model", "stock again", f"it was swapped with numerics={instance.fusewire_how.numerics!r}"))


def _state(instance, fused: type) -> str:
    if stock_of(instance) is None:
        return ""
    before = instance.fusewire_how
    return ALREADY if before == fused.fusewire_how else f"it was swapped with numerics={before.numerics!r}"


def _apply(changes: list[tuple[object, type, type]]) -> None:
    done = []
    try:
        for instance, before, fused in changes:
            set_class(instance, fused)
            done.append((instance, before))
    except BaseException:
        for instance, before in reversed(done):
            set_class(instance, before)
        raise


def _roots(target) -> dict[str, object]:
    """What a target consists of, by name."""
    if isinstance(target, type):
        raise TypeError(f"pipe_or_module is the class {target.__name__}; it should be a pipeline, a module or a scheduler made of it")
    if isinstance(target, nn.Module):
        return {"": target}
    if isinstance(components := getattr(target, "components", None), dict):
        for name in ("transformer", "unet"):
            if name in components and components[name] is None and name not in getattr(target, "_optional_components", ()):
                raise BadInput(f"pipe_or_module has {name}=None; it should be a pipeline with its model loaded")
        return components
    if hasattr(target, "set_timesteps") and hasattr(target, "step"):
        return {"scheduler": target}
    raise TypeError(f"pipe_or_module is a {type(target).__name__}; it should be a diffusers pipeline, a torch.nn.Module or a scheduler")


def _parts(target) -> Iterator[tuple[str, object]]:
    """(dotted name, instance) of everything in a pipeline or module that could be swapped, each once."""
    seen = set()
    for root, instance in _roots(target).items():
        if isinstance(instance, nn.Module):
            for path, module in instance.named_modules(prefix=root):
                if id(module) not in seen:
                    seen.add(id(module))
                    yield path, module
        elif hasattr(instance, "step"):
            yield root, instance


def _check_loaded(parts: list[tuple[str, object]]) -> None:
    """A parameter on the meta device has no values, unless an offload hook puts them there for each call."""
    for name, instance in parts:
        if isinstance(instance, nn.Module) and not hasattr(instance, "_hf_hook"):
            for key, parameter in instance._parameters.items():
                if parameter is not None and parameter.is_meta:
                    raise BadInput(f"pipe_or_module is not loaded: {f'{name}.{key}'.lstrip('.')} is on the meta device")


WITHIN_LINEARS = ("geglu", "quick_gelu")


def _names(only, known: list[str]) -> set[str] | None:
    if only is None:
        return None
    if not isinstance(only, Iterable):
        raise BadInput(f"only is {only!r}; it should be the name of an op, or several")
    names = {only} if isinstance(only, str) else set(only)
    unknown = sorted(names.difference(known), key=str)
    if unknown or not names:
        raise BadInput(f"only is {sorted(names, key=str)}; it should name some of {', '.join(known)}")
    if (within := sorted(names.intersection(WITHIN_LINEARS))) and "linear" not in names:
        raise BadInput(f"only is {sorted(names)}; {' and '.join(within)} only come with the linears of their feed-forward: name 'linear' too")
    return names


def _nothing_to_swap(target, report: Report, missing: str) -> str:
    lines = [f"pipe_or_module is a {type(target).__name__} with nothing to swap for numerics={report.numerics!r}"]
    if missing:
        lines.append(missing)
    lines += sorted({f"{entry.op}: {entry.reason}" for entry in report.left})
    return "; ".join(lines)


def _warn(entries: list[Entry]) -> None:
    counts: dict[tuple[str, str], int] = {}
    for entry in entries:
        counts[entry.op, entry.reason] = counts.get((entry.op, entry.reason), 0) + 1
    for (op, reason), count in counts.items():
        if (op, reason) not in _warned:
            warn_the_user(f"{op} stays stock in {count} module{'s' * (count > 1)}: {reason}")
            _warned.add((op, reason))
