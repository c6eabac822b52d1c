"""Block by block, then the whole denoiser: the swapped modules and the stock ones on the inputs that the stock model gave its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fusewire.copies import detached, tensors_in
from fusewire.kernels import dispatch
from fusewire.parity.result import Row, name_of
from fusewire.parity.twin import float64_twin, widen
from fusewire.parity.verdict import measure


def captured(module: nn.Module, call: Callable[[], object], which: int = 0) -> tuple[tuple, dict]:
    """(args, kwargs) of the ``which``-th time that ``call`` runs ``module``, cloned; of the last time where it runs less often."""
    seen: list[tuple[tuple, dict]] = []

    def hook(_, args, kwargs):
        if len(seen) <= which:
            seen.append((detached(args), detached(kwargs)))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    return seen[-1]


def outermost(names: list[str], model: nn.Module) -> list[str]:
    """Of the swapped modules' names, those that lie in ``model`` and in no other swapped module, in the model's order."""
    known = [name for name, _ in model.named_modules() if name in set(names)]
    return [name for name in known if not any(name.startswith(f"{other}.") for other in known)]


class Counting:
    """Which backends served fused ops inside a ``with``: ``.text`` is ``"cpu"``, ``"cpu, reference"`` or ``"none"``."""

    def __enter__(self):
        self.before = dispatch.stats()
        return self

    def __exit__(self, *error):
        self.calls: dict[str, int] = dict.fromkeys(dispatch.NAMES, 0)
        for op, served in dispatch.stats().items():
            for name, calls in served.items():
                self.calls[name] += calls - self.before.get(op, {}).get(name, 0)
        self.text = ", ".join(name for name, calls in self.calls.items() if calls) or "none"


@torch.inference_mode()
def judge_blocks(stock: nn.Module, swapped: dict[str, nn.Module], names: dict[str, list[str]], args: tuple, kwargs: dict,
                 tick: Callable[[], None]) -> Iterator[Row]:
    """One row for each swapped block and numerics, each as soon as it is complete.

    Args:
        stock: the stock denoiser. swapped: numerics -> its swapped copy. names: numerics -> names of the modules to compare.
        args, kwargs: of one call of the denoiser.
    """
    wanted = [name for name, _ in stock.named_modules() if any(name in part for part in names.values())]
    inputs = {name: None for name in wanted}
    handles = []
    for name in wanted:
        def hook(_, a, k, name=name):
            inputs[name] = (detached(a), detached(k))
        handles.append(stock.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        stock(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for name in wanted:
        block = stock.get_submodule(name)
        if inputs[name] is None:
            continue  # the model does not run it
        a, k = inputs[name]
        want = tensors_in(block(*detached(a), **detached(k)))
        true = tensors_in(float64_twin(block)(*widen(a), **widen(k)))
        for numerics, model in swapped.items():
            if name in names[numerics]:
                with Counting() as counts:
                    got = tensors_in(model.get_submodule(name)(*detached(a), **detached(k)))
                yield _row("block", name, numerics, counts.text, got, want, true)
        inputs[name] = None
        tick()


@torch.inference_mode()
def judge_model(stock: nn.Module, swapped: dict[str, nn.Module], args: tuple, kwargs: dict, tick: Callable[[], None],
                name: str | None = None) -> Iterator[Row]:
    """One row for each numerics: the whole denoiser, or another model of that ``name``. A swapped model in which no fused op ran does not hold."""
    want = tensors_in(stock(*detached(args), **detached(kwargs)))
    true = tensors_in(float64_twin(stock)(*widen(args), **widen(kwargs)))
    tick()
    for numerics, model in swapped.items():
        with Counting() as counts:
            got = tensors_in(model(*detached(args), **detached(kwargs)))
        yield _row("model", name or type(stock).__name__, numerics, counts.text, got, want, true, must_run=True)
        tick()


def _row(level: str, name: str, numerics: str, backend: str, got, want, true, must_run: bool = False) -> Row:
    found = measure(got, want, true, exact=numerics == "exact")
    idle = "no fused op ran in it" if must_run and backend == "none" else ""
    return Row(level, name, numerics, name_of(want[0].dtype), backend, "x".join(map(str, want[-1].shape)), numerics, found.holds and not idle,
               found.equal, "; ".join(filter(None, (found.reason, idle))), found.max_error, found.mean_error, found.stock_max_error,
               found.stock_mean_error, found.max_difference, found.mean_difference, found.mismatch)
