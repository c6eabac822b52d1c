"""What torch.func makes of a fused op, as ``library.define`` registers it.

``vmap`` calls the kernel for one sample after another. ``grad``, ``vjp``, ``jvp`` and all that is made of them differentiate the op's meaning, plain
PyTorch: the autograd formulas of ``torch.library`` are none of theirs. So does forward mode without torch.func (``torch.autograd.forward_ad``). An op that
changes its arguments is computed out of place and copied, also for ``functionalize``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad


def written_by(op: torch._ops.OpOverload) -> list[int]:
    """Which of its arguments an op changes."""
    return [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write]


def by_sample(op: torch._ops.OpOverload) -> Callable:
    """The rule of ``vmap`` for ``torch.library.register_vmap``: the results of all samples, stacked."""
    def rule(info, in_dims, *args):
        if not info.batch_size:
            raise ValueError(f"{op} is under a vmap over no samples; it should be called for one at least")
        results = [op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims))) for i in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])

    return rule


class Differentiable:
    """A library for ``torch.library.register_autograd``: inside a transform the kernel that it registers leaves the call to ``meaning``."""

    def __init__(self, library: torch.library.Library, meaning: Callable):
        self.library, self.meaning = library, meaning

    def impl(self, name: str, kernel: Callable, key: str, **options) -> None:
        active, meaning = torch._C._are_functorch_transforms_active, self.meaning

        def differentiable(keyset, *args):
            return meaning(*args) if active() or forward_ad._current_level >= 0 else kernel(keyset, *args)

        self.library.impl(name, differentiable, key, **options)


def copying(op: torch._ops.OpOverload, out_of_place: Callable) -> Callable:
    """The kernel of ``op`` that every transform calls first, where ``op`` changes arguments: they get ``out_of_place``'s results one by one."""
    written = written_by(op)

    def kernel(*args):
        for i, value in zip(written, out_of_place(*args), strict=True):
            try:
                args[i].copy_(value)
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                raise RuntimeError(f"{op} under vmap: {op._schema.arguments[i].name} is one tensor for all samples; it should be batched, as what is "
                                   "written into it is: torch.empty_like(x) of a batched x is, x.new_empty(...) is not") from error

    return kernel
