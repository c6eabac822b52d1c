"""The arguments of attention, and what is wrong with them."""

from __future__ import annotations

import torch

from fusewire.kernels import checks
from fusewire.kernels.attention.patterns import BlockPattern

WEIGHTS = ("q_weight", "k_weight", "q2_weight", "k2_weight")


def check(names: tuple[str, str, str], q, k, v) -> None:
    """q [B, Tq, H, D], k and v [B, Tk, H_kv, D], one dtype, one device."""
    if isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor):
        dtype, shape, key_shape = q.dtype, q.shape, k.shape
        if (k.dtype is dtype and v.dtype is dtype and dtype in checks.FLOATS and len(shape) == 4 and v.shape == key_shape
                and (key_shape == shape or key_shape[::2] == shape[::2] and key_shape[3:] == shape[3:])
                and (k.is_cpu and v.is_cpu if q.is_cpu else k.device == q.device == v.device)):
            return  # the common good input: everything below holds
    for name, x in zip(names, (q, k, v)):
        checks.floating(name, x)
        checks.rank(name, x, 4, "[B, T, H, D]")
    (batch, _, heads, channels), shape = q.shape, k.shape
    if shape[0] != batch or shape[3] != channels or (shape[2] != heads and (shape[2] == 0 or heads % shape[2])):
        raise ValueError(f"{names[1]} has shape {list(shape)}; for {names[0]} of shape {list(q.shape)} it should be [{batch}, T, H, {channels}] "
                         f"with H a divisor of {heads}")
    if v.shape != shape:
        raise ValueError(f"{names[2]} has shape {list(v.shape)}; it should be {list(shape)}, as {names[1]} has")
    for name, x in ((names[1], k), (names[2], v)):
        if x.dtype is not q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; it should be {q.dtype}, as {names[0]} has")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it should be on {q.device}, where {names[0]} is")


def joins(q, k, v, q2, k2, v2) -> int:
    """The head dimension of the common joint attention, in few comparisons: on the CPU, each stream's q, k and v of one shape. 0: others, which
    take the checks below."""
    kind = torch.Tensor
    if not (isinstance(q, kind) and isinstance(k, kind) and isinstance(v, kind) and isinstance(q2, kind) and isinstance(k2, kind) and isinstance(v2, kind)):
        return 0
    dtype, shape, shape2 = q.dtype, k.shape, k2.shape
    if (k.dtype is dtype and v.dtype is dtype and q2.dtype is dtype and k2.dtype is dtype and v2.dtype is dtype and dtype in checks.FLOATS
            and q.is_cpu and k.is_cpu and v.is_cpu and q2.is_cpu and k2.is_cpu and v2.is_cpu
            and len(shape) == 4 == len(shape2) and q.shape == shape == v.shape and q2.shape == shape2 == v2.shape
            and shape[0] == shape2[0] and shape[2] == shape2[2] and shape[3] == shape2[3]):
        return shape[3]
    return 0


def check_streams(q, k, q2, k2) -> None:
    """The second stream differs from the first in its tokens only."""
    for name, other, x in (("q", q, q2), ("k", k, k2)):
        shape, wanted = x.shape, other.shape
        if shape[0] != wanted[0] or shape[2:] != wanted[2:]:
            raise ValueError(f"{name}2 has shape {list(shape)}; it should be [{wanted[0]}, T, {wanted[2]}, {wanted[3]}], as {name} has")
    if q2.dtype is not q.dtype:
        raise TypeError(f"q2 has dtype {q2.dtype}; it should be {q.dtype}, as q has")
    if q2.device != q.device:
        raise ValueError(f"q2 is on {q2.device}; it should be on {q.device}, where q is")


def check_rest(q, names: tuple[str, ...], weights: tuple, scale, eps) -> None:
    for name, weight in zip(names, weights):
        if weight is not None:
            checks.vector(name, weight, q.shape[3], q.device)
    if type(eps) is not float or not eps > 0:
        checks.positive("eps", eps)
    if scale is not None:
        checks.number("scale", scale)


def full_mask(mask, q, k) -> torch.Tensor:
    """The mask as [B or 1, H or 1, Tq or 1, Tk]."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask is a {type(mask).__name__}; it should be a torch.Tensor or None")
    if mask.dtype is not torch.bool and mask.dtype not in checks.FLOATS:
        raise TypeError(f"mask has dtype {mask.dtype}; it should be bool (True: attend) or floating (added to the logits)")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}; it should be on {q.device}, where q is")
    shape = tuple(mask.shape)
    if len(shape) == 2:
        mask, shape = mask[None, None], (1, 1, *shape)
    batch, queries, heads, _ = q.shape
    if not (len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] in (1, queries) and shape[3] == k.shape[1]):
        raise ValueError(f"mask has shape {list(mask.shape)}; it should be [{batch} or 1, {heads} or 1, {queries} or 1, {k.shape[1]}] "
                         f"or [{queries}, {k.shape[1]}]")
    return mask


def check_pattern(pattern, q, k) -> None:
    if not isinstance(pattern, BlockPattern):
        raise TypeError(f"pattern is a {type(pattern).__name__}; it should be what fusewire.ops.block_pattern(function, {q.shape[1]}, {k.shape[1]}) "
                        "gives")
    if (pattern.q_len, pattern.k_len) != (q.shape[1], k.shape[1]):
        raise ValueError(f"pattern is for {pattern.q_len} queries and {pattern.k_len} keys; it should be for {q.shape[1]} and {k.shape[1]}")
    batch, heads = pattern.blocks.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        raise ValueError(f"pattern has batch={batch} and heads={heads}; for q of shape {list(q.shape)} they should be 1 or {q.shape[0]}, "
                         f"and 1 or {q.shape[2]}")
    if pattern.device != q.device:
        raise ValueError(f"pattern is on {pattern.device}; it should be on {q.device}, where q is: pattern.to({str(q.device)!r})")


def cast(tensors: tuple) -> tuple:
    """What autocast makes of the arguments of PyTorch's attention: all in its dtype (float64 stays)."""
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        return tensors  # for check to refuse
    kind = checks.kind_of(tensors[0])
    if not checks.autocasts(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x for x in tensors)


def learns(*tensors) -> bool:
    """Whether a gradient of any of them is wanted."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
