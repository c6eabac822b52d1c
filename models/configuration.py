"""What the configs of the model families share: diffusers' field names, and a reader of its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import ClassVar


class StockConfig:
    """Base of a frozen dataclass whose fields are those of a diffusers class's config.

    ``fixed`` names the entries that we do not have as fields, with the values at which they mean what our model does; other values are refused.
    An empty tuple stands for an entry without effect.
    """

    stock: ClassVar[str]
    fixed: ClassVar[Mapping[str, tuple]] = {}

    @classmethod
    def from_dict(cls, config: Mapping) -> StockConfig:
        """From the content of a diffusers ``config.json``; entries starting with an underscore are its bookkeeping. ValueError names a bad entry."""
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(set(given) - known - set(cls.fixed))
        if unknown:
            raise ValueError(f"config has unknown entries {unknown}; {cls.stock} has {sorted(known | set(cls.fixed))}")
        for name, allowed in cls.fixed.items():
            if name in given and allowed and given[name] not in allowed:
                raise ValueError(f"{name} is {given[name]!r}; it should be {' or '.join(map(repr, allowed))}")
        return cls(**{key: _frozen(value) for key, value in given.items() if key in known})

    def check_choice(self, name: str, known: Sequence) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it should be {' or '.join(map(repr, known))}")


def _frozen(value):
    """Lists, as JSON has them, as tuples: a config can be compared and hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
