"""The truth: a float64 copy of a stock model, free of the float32 casts that stock modules make inside."""

from __future__ import annotations

import types
from collections.abc import Iterator

import torch
from torch import nn

from fusewire.copies import mapped, shared_copy

# Above this many bytes a float64 copy is made block by block, while each block runs, instead of at once.
AT_ONCE = 2 * 2**30


def widen(value):
    """Nested arguments with every floating-point tensor in float64."""
    return mapped(value, lambda t: t.to(torch.float64) if t.is_floating_point() else t)


def float64_twin(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that computes in float64 from the same weights. ``module`` itself is not touched.

    A large model's blocks (the entries of its outermost ModuleLists) are widened as they are entered and given back as they are left, so that the copy
    never needs the memory of a whole model in float64.
    """
    twin = shared_copy(module)
    for part in twin.modules():
        _true_rms_norm(part)
    late: list[nn.Module] = []
    if 8 * sum(p.numel() for p in twin.parameters()) > AT_ONCE:
        late = list(_blocks(twin))
    for block in late:
        block.register_forward_pre_hook(_enter)
        block.register_forward_hook(_leave, always_call=True)
    within = {id(part) for block in late for part in block.modules()}
    _replace(part for part in twin.modules() if id(part) not in within)
    return twin


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.children():
        yield from part if isinstance(part, nn.ModuleList) else _blocks(part)


def _replace(modules) -> list[tuple[dict, dict]]:
    """Give each module float64 tensors of its own; returns (store, what it held before) pairs."""
    before, seen = [], {}
    for part in modules:
        for store in (part._parameters, part._buffers):
            before.append((store, dict(store)))
            for name, tensor in store.items():
                if tensor is not None and tensor.is_floating_point():
                    if id(tensor) not in seen:
                        wide = tensor.detach().to(torch.float64)
                        seen[id(tensor)] = nn.Parameter(wide, requires_grad=False) if store is part._parameters else wide
                    store[name] = seen[id(tensor)]
    return before


def _enter(block, args):
    block._fusewire_before = _replace(block.modules())


def _leave(block, args, output):
    for store, tensors in block.__dict__.pop("_fusewire_before", ()):
        store.update(tensors)


def _true_rms_norm(module: nn.Module) -> None:
    """diffusers' RMSNorm and transformers' T5LayerNorm take the mean square in float32 whatever their input: the twin takes it in float64."""
    if (type(module).__name__, type(module).__module__.split(".")[0]) in (("RMSNorm", "diffusers"), ("T5LayerNorm", "transformers")):
        module.forward = types.MethodType(_rms_norm, module)


def _rms_norm(self, hidden_states):
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    y = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + eps)
    if self.weight is not None:
        y = y * self.weight
    return y if getattr(self, "bias", None) is None else y + self.bias
