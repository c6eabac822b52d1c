"""What is somebody's own in a model: classes derived from those that we know, linears that are none of PyTorch's, compiled modules, models unknown to us.
The report names it; nothing of it is changed, but for what is swapped inside a compiled module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fusewire.models import layers
from fusewire.models.layers import How, plain_linear
from fusewire.swap.families import Candidate
from fusewire.swap.fused import CARRIES, stock_of
from fusewire.swap.report import Entry

COMPILED = "it is compiled: its next call compiles anew, and a compiled call rounds as torch.compile does"
SHARDED = "fully_shard has given it another class: swap first, then shard"
DENOISERS = ("transformer", "unet")  # components of a pipeline


def somebodys_own(name: str, instance, how: How) -> Iterator[Candidate]:
    """An instance of a class derived from one that we know, which may compute anything, an attention or a feed-forward that no block of ours has, or a
    linear that is not PyTorch's."""
    cls = type(instance)
    base = next((base for base in cls.__mro__[1:] if base in CARRIES), None)
    if base is not None and cls not in CARRIES and stock_of(instance) is None:
        sharded = any(parent.__name__ == "FSDPModule" for parent in cls.__mro__)
        reason = SHARDED if sharded else f"{cls.__name__} is derived from {base.__name__}, and its code may be another"
        stays_anyway = how.numerics == "exact" and set(CARRIES[base]) <= {"attention", "linear"}
        yield Candidate(name or "module", instance, CARRIES[base], None, reason, by_choice=stays_anyway)
    elif {"attention", "linear"} & set(CARRIES.get(cls, ())):
        yield Candidate(name or "module", instance, CARRIES[cls], None, "it lies in a block that we do not know", by_choice=how.numerics == "exact")
    elif isinstance(instance, nn.Linear) and unusual_linear(instance):
        yield from called_linear(name or "module", instance, how)


def called_linear(name: str, module: nn.Module | None, how: How) -> Iterator[Candidate]:
    """A linear that is called as it is: LoRA-wrapped, quantised, offloaded or observed. exact calls them all, and names those of other classes."""
    if module is not None and (not plain_linear(module) if how.linear else how.numerics == "exact" and unusual_linear(module)):
        yield Candidate(name, module, ("linear",), None, f"{described(module)} is called as it is", by_choice=True)


def unusual_linear(module: nn.Module) -> bool:
    """Of another class than ``nn.Linear``, or with another kind of weight: LoRA-wrapped, quantised, pruned or normalised."""
    return type(module) is not nn.Linear or type(module._parameters.get("weight")) is not nn.Parameter


def unknown_models(components: dict, entries: Iterable[Entry]) -> Iterator[Entry]:
    """The models of a pipeline in which nothing is known, be it swapped or left."""
    known, seen = {entry.name.split(".")[0] for entry in entries}, set()
    for name, part in components.items():
        if isinstance(part, nn.Module) and id(part) not in seen and name not in known:
            yield Entry(name, "model", f"{type(part).__name__} is not a model that we know, nor is a block of it", by_choice=name not in DENOISERS)
        seen.add(id(part))


def is_compiled(instance) -> bool:
    """By ``module.compile()``, by ``torch.compile(module)``, or by a compiled method of its own (an autoencoder's ``decode``)."""
    if not isinstance(instance, nn.Module):
        return False
    own = vars(instance)
    if own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]:
        return True
    return any(hasattr(part, "_torchdynamo_orig_callable") for part in own.values())


def described(module: nn.Module) -> str:
    """A module's class with its package, and what sets the instance apart from a plain one."""
    cls = stock_of(module) or type(module)
    weight = getattr(module, "weight", None)
    extra = f" with a {type(weight).__name__} weight" if isinstance(weight, torch.Tensor) and type(weight) is not nn.Parameter else ""
    return f"{cls.__module__.split('.')[0]}'s {cls.__name__}{extra}{'' if layers.untouched(module) else ' with hooks'}"
