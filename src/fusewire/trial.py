"""Swapping once and taking it back: what ``fusewire swap`` does."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from fusewire.copies import detached, tensors_in
from fusewire.errors import BadInput, blaming
from fusewire.parity import blocks, inputs_of, pictures, swap_copies
from fusewire.targets import Target


@dataclass
class Trial:
    """``ok`` is False where restoring did not give the very same output."""

    target: str
    numerics: str
    report: dict  # {"swapped": [...], "left": [...], "noted": [...]}
    ran: str = ""  # which backends served the swapped model
    restored: bool | None = None  # None: not tried
    lines: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.restored is not False

    def to_dict(self) -> dict:
        return {"kind": "swap", "schema": 1, "ok": self.ok, "target": self.target, "numerics": self.numerics, "ran": self.ran,
                "restored": self.restored, **self.report}


def try_swap(target: Target, numerics: str, *, dry_run: bool) -> Trial:
    """Report what ``swap`` does to a target; unless ``dry_run``, run it swapped and restored too.

    Raises: BadInput for an unknown numerics, NothingToDo where nothing can be swapped.
    """
    if numerics not in ("exact", "close"):
        raise BadInput(f"numerics is {numerics!r}; it should be 'exact' or 'close'")
    _, reports = swap_copies(target.value, [numerics])
    trial = Trial(target.name, numerics, reports[numerics])
    if dry_run:
        return trial
    from fusewire.swap import swap

    call = _call_of(target)
    with nullcontext() if isinstance(target.value, nn.Module) else blaming(pictures.GIVEN, type(target.value).__name__):
        before = call()
    handle = swap(target.value, numerics=numerics)
    with blocks.Counting() as counts:
        call()
    handle.restore()
    after = call()
    trial.ran = counts.text
    trial.restored = all(torch.equal(a, b) for a, b in zip(before, after))
    trial.lines = [f"One call ran on: {counts.text}. Restored: outputs are {'torch.equal to those before' if trial.restored else 'NOT those before'}."]
    return trial


def _call_of(target: Target):
    """One short call of the target: the denoiser once, or a pipeline for two steps."""
    if isinstance(target.value, nn.Module):
        kwargs = inputs_of(target.value, target.inputs, target.size)

        def call():
            with torch.inference_mode():
                return tensors_in(target.value(**detached(kwargs)))
    else:
        run = pictures.plan(target.value, None, [0], 2, 4.0, target.size, None)

        def call():
            return pictures.generate(target.value, run, decode=False).latents
    return call
