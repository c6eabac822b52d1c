"""Whether what an op writes shares elements with what it reads, or with another of its outputs."""

from __future__ import annotations

import itertools

import torch


def refuse(outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
    """ValueError where two outputs overlap, or an output and an input; but for the i-th output and the i-th input, where they are the same elements.

    Tensors without memory (on the meta device, compiled, traced, or within a transform of torch.func) are not looked at.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if not all(type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta for x in (*outputs.values(), *inputs.values())):
        return
    pairs = [(name, out, other, x, i == j) for i, (name, out) in enumerate(outputs.items()) for j, (other, x) in enumerate(inputs.items())]
    pairs += [(*one, *other, False) for one, other in itertools.combinations(outputs.items(), 2)]
    for name, out, other, x, may_be_same in pairs:
        if not (may_be_same and same(out, x)) and overlap(out, x):
            raise ValueError(f"{name} shares elements with {other}; it should be memory of its own"
                             + (f", or {other} itself" if may_be_same else ""))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both are the same elements in the same order."""
    return (a.data_ptr() == b.data_ptr() and a.shape == b.shape
            and all(one == other or size == 1 for one, other, size in zip(a.stride(), b.stride(), a.shape)))


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype, number of dimensions and device share an element.

    It is found out for tensors of the same strides. Others with elements between each other's are taken for apart, unless they start at one place.
    """
    if not a.numel() or not b.numel():
        return False
    bytes, distance = a.element_size(), b.data_ptr() - a.data_ptr()
    if distance >= _span(a) * bytes or -distance >= _span(b) * bytes:
        return False
    strides = [(one, other) for one, other, sizes in zip(a.stride(), b.stride(), zip(a.shape, b.shape)) if sizes != (1, 1)]
    if any(one != other for one, other in strides):
        return distance == 0
    dims = sorted(((stride, n, m) for stride, n, m in zip(b.stride(), a.shape, b.shape) if stride), reverse=True)
    return distance % bytes != 0 or _reaches(distance // bytes, dims)


def _span(x: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


def _reaches(distance: int, dims: list[tuple[int, int, int]]) -> bool:
    """Whether ``distance`` is a sum of multiples of the strides, of each stride from 1 - m to n - 1 times; ``dims``: (stride, n, m), widest first."""
    if not dims:
        return distance == 0
    (stride, n, m), rest = dims[0], dims[1:]
    left = sum(other * (max(sizes) - 1) for other, *sizes in rest)  # which the others can make up for
    first, last = max(-((left - distance) // stride), 1 - m), min((distance + left) // stride, n - 1)
    return any(_reaches(distance - i * stride, rest) for i in range(first, last + 1))
