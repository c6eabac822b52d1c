"""The subclasses that are put in place of stock classes, and the check that a stock method is one we know."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable

from torch import nn

from fusewire.models.layers import How

# Filled by the family files: stock class -> function(how) that gives the namespace of its fused subclass, and where needed a function that makes
# a new fused class known to the library that it belongs to.
MAKERS: dict[type, Callable[[How], dict]] = {}
ANNOUNCE: dict[type, Callable[[type], None]] = {}
# Stock class -> the ops that an instance or a part of it carries. What is derived from one of these is somebody's own code: it stays, and is named.
CARRIES: dict[type, tuple[str, ...]] = {}
_classes: dict[tuple[type, How], type] = {}


def fused_class(stock: type, how: How) -> type:
    """The subclass of ``stock`` that computes as ``how`` says. It carries stock's name, module and docstring: what finds a class by its name (offload,
    ``compile_repeated_blocks``, ``save_pretrained``) finds it."""
    key = (stock, how)
    if key not in _classes:
        namespace = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__, "__new__": _new, "__reduce_ex__": _reduce_ex,
                     "fusewire_stock": stock, "fusewire_how": how, **MAKERS[stock](how)}
        if hasattr(stock, "extra_repr"):
            namespace["extra_repr"] = _extra_repr
        if "forward" in namespace:
            namespace |= _unless_replaced(stock, namespace["forward"])
        _classes[key] = type(stock)(stock.__name__, (stock,), namespace)
        ANNOUNCE.get(stock, lambda fused: None)(_classes[key])
    return _classes[key]


def _unless_replaced(stock: type, ours: Callable) -> dict:
    """The forward of a fused class: ``ours``, unless the stock class was given another since (``BasicTransformerBlock.forward = mine``): then that one."""
    verified = stock.forward

    @functools.wraps(ours)
    def forward(self, *args, **kwargs):
        if stock.forward is not verified:
            return stock.forward(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    return {"forward": forward, "stands_for_stock": staticmethod(lambda: stock.forward is verified)}


def stock_of(instance) -> type | None:
    """The stock class of a swapped instance; None for any other."""
    return getattr(type(instance), "fusewire_stock", None)


def _extra_repr(self) -> str:
    mine, stock = f"fusewire: {self.fusewire_how.numerics}", self.fusewire_stock.extra_repr(self)
    return f"{stock}, {mine}" if stock else mine


def _new(cls, *args, **kwargs):
    """What is made by calling a swapped instance's class (``type(pipe.scheduler).from_config(...)``) is nobody's swap: an instance of the stock class."""
    if "fusewire_stock" in vars(cls) and (args or kwargs or not issubclass(cls, nn.Module)):  # (DataParallel's replicas are made without any)
        return cls.fusewire_stock(*args, **kwargs)
    return cls.fusewire_stock.__new__(cls)


def _reduce_ex(self, protocol):
    """Copies and pickles name the stock class and how it was swapped: the subclass itself cannot be imported by name."""
    _, arguments, *rest = self.fusewire_stock.__reduce_ex__(self, max(protocol, 2))
    return (_blank, (self.fusewire_stock, tuple(self.fusewire_how), *arguments[1:]), *rest)


def _blank(stock: type, how: tuple, *arguments):
    """An instance without state, for copy and pickle. Where this diffusers is not one whose forward we know, it is a stock instance."""
    from fusewire.swap import families

    families.load()  # fills MAKERS
    return stock.__new__(fused_class(stock, How(*how)) if stock in MAKERS else stock, *arguments)


def announce_block(fused: type) -> None:
    """diffusers' cache hooks look a block's class up in a registry; the subclass gets the entry of its stock class."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry.register(fused, dataclasses.replace(TransformerBlockRegistry.get(fused.fusewire_stock)))


@functools.lru_cache(maxsize=None)
def fingerprint(function: Callable) -> str:
    """The first 12 digits of the SHA-256 of a function's source without comment lines, blank lines and indentation; "" where it cannot be read."""
    try:
        lines = [line.strip() for line in inspect.getsource(function).splitlines()]
    except (OSError, TypeError):
        return ""
    return hashlib.sha256("\n".join(line for line in lines if line and not line.startswith("#")).encode()).hexdigest()[:12]


def _now(function: Callable) -> Callable | None:
    """What stands where this function was made."""
    return functools.reduce(lambda owner, name: getattr(owner, name, None), function.__qualname__.split("."), sys.modules.get(function.__module__))


def unknown_forward(known: dict[Callable, tuple[str, ...]]) -> str:
    """Why a class whose fused forward stands for these stock functions must be left alone; "" where every source is one that was verified."""
    for function, digests in known.items():
        if _now(function) not in (function, None):
            return f"{function.__qualname__} was replaced"
        found = fingerprint(function)
        if found not in digests:
            return f"{function.__qualname__} is not one that was verified (source {found or 'not readable'})"
    return ""
