"""Forms of QK norm and rotary embedding beside the room's fused one, which is the RMS norm of each head and a rotation of adjacent pairs.

They are made of it, of the norm room's ops and of the rotation alone, with views and tables between them, so that every gradient is there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels import checks
from fusewire.kernels.norm.op import layer_norm, rms_norm
from fusewire.kernels.rounding import compute_dtype

RMS = {"rms": "diffusers", "torch_rms": "torch"}
LAYER = {"layer": "torch", "float32_layer": "float32"}
NORMS = (*RMS, *LAYER, "l2", "none")
LOG_SCALE_LIMIT = 4.605170249938965  # log(100) in float32, where VAR clamps its learned scale


def check_norm(name: str, x, weight, bias, log_scale, norm: str, across: bool) -> None:
    """The vectors that belong to ``norm``, for x [B, T, H, D]; those that do not are None."""
    size = x.shape[2] * x.shape[3] if across else x.shape[3]
    allowed = {"weight": norm not in ("l2", "none"), "bias": norm in LAYER, "log_scale": norm == "l2"}
    for kind, vector, length in (("weight", weight, size), ("bias", bias, size), ("log_scale", log_scale, x.shape[2])):
        if vector is not None and not allowed[kind]:
            raise ValueError(f"{name}_{kind} is given; for norm {norm!r} it should be None")
        checks.vector(f"{name}_{kind}", vector, length, x.device)
    if across and norm in ("l2", "none"):
        raise ValueError(f"across_heads is True; for norm {norm!r} it should be False")


def check_rope(q, k, rope, name: str = "rope") -> None:
    """``rope`` (in messages ``name``) is a pair of float32 tables or one of complex64, [T, R/2] or [B, T, R/2] for R <= D."""
    if isinstance(rope, torch.Tensor) and rope.dtype is torch.complex64:
        tables = [(name, rope)]
    elif isinstance(rope, (tuple, list)) and len(rope) == 2:
        tables = [(f"{name}'s cos", rope[0]), (f"{name}'s sin", rope[1])]
        for part, table in tables:
            checks.floating(part, table)
            if table.dtype is not torch.float32:
                raise TypeError(f"{part} has dtype {table.dtype}; it should be float32")
    else:
        raise TypeError(f"{name} is a {type(rope).__name__}; it should be a pair (cos, sin) or a complex64 tensor")
    batch, tokens, _, dim = q.shape
    if k.shape[1] != tokens or dim % 2:
        raise ValueError(f"{name} is given for q of shape {list(q.shape)} and k of shape {list(k.shape)}; T should be the same and D even")
    for part, table in tables:
        # One by one: torch.compile does not find a shape with symbols in a tuple of shapes
        fits = table.dim() == 2 or table.dim() == 3 and (table.shape[0] == 1 or table.shape[0] == batch)
        if not (fits and table.shape[-2] == tokens and table.shape[-1] <= dim // 2):
            raise ValueError(f"{part} has shape {list(table.shape)}; it should be [{tokens}, {dim // 2}] "
                             f"or [{batch}, {tokens}, {dim // 2}], or narrower")
        if table.shape != tables[0][1].shape:
            raise ValueError(f"{part} has shape {list(table.shape)}; it should be {list(tables[0][1].shape)}, as {tables[0][0]}")
        if table.device != q.device:
            raise ValueError(f"{part} is on {table.device}; it should be on {q.device}, where q is")


def normed(x, weight, bias, log_scale, eps: float, norm: str, across: bool, exact: bool) -> torch.Tensor:
    """The norm of x [B, T, H, D] over each head, or over all heads of a token; x itself for "none"."""
    numerics = "exact" if exact else "close"
    if norm == "none":
        return x
    if norm == "l2":
        y = _l2(x, eps, exact)
        return y if log_scale is None else y * log_scale.clamp_max(LOG_SCALE_LIMIT).exp().view(-1, 1)
    rows = x.flatten(2) if across else x
    if norm in LAYER:
        y = layer_norm(rows, weight, bias, eps=eps, rounding=LAYER[norm], numerics=numerics)
    else:
        y = rms_norm(rows, weight, eps=eps, rounding=RMS[norm], numerics=numerics)
    return y.view(x.shape)


def _l2(x, eps: float, exact: bool) -> torch.Tensor:
    """x / max(|x|, eps). close: an RMS norm, x / sqrt(|x|^2 + eps^2), with a weight of 1 / sqrt(D)."""
    if exact:
        return F.normalize(x.contiguous(), dim=-1, eps=eps)
    dim = x.shape[-1]
    weight = torch.full((dim,), max(dim, 1) ** -0.5, dtype=compute_dtype(x.dtype), device=x.device)
    eps = eps * eps * max(dim, 1) ** -1.0  # a product: torch.compile does not know the bounds of a quotient of two symbols
    return rms_norm(x, weight, eps=eps, rounding="torch", numerics="close")


def tables(rope) -> list[torch.Tensor]:
    """(cos, sin) of either form; one table for the whole batch loses its dimension."""
    pair = (rope.real, rope.imag) if isinstance(rope, torch.Tensor) else rope
    return [table[0] if table.dim() == 3 and table.shape[0] == 1 else table for table in pair]


def padded(cos, sin, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables that leave the pairs beyond their own as they are: an angle of 0."""
    missing = pairs - cos.shape[-1]
    return (F.pad(cos, (0, missing), value=1.0), F.pad(sin, (0, missing))) if missing else (cos, sin)


def by_sample(op, q, k, q_weight, k_weight, cos, sin, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    """``op`` with tables [T, R/2] or [B, T, R/2]: all samples' tokens are those of one, for the latter; copied where they do not lie so."""
    if cos.dim() == 2:
        return op(q, k, q_weight, k_weight, cos, sin, *rest)
    flat = [x.flatten(0, 1).unsqueeze(0) for x in (q, k)]
    found = op(*flat, q_weight, k_weight, cos.flatten(0, 1), sin.flatten(0, 1), *rest)
    return tuple(y.view(x.shape) for y, x in zip(found, (q, k)))


def turned(op, q, k, cos, sin, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated in their first R dimensions by ``op``."""
    width = 2 * cos.shape[-1]
    if width == q.shape[-1]:
        return by_sample(op, q, k, None, None, cos, sin, *rest)
    found = by_sample(op, q[..., :width], k[..., :width], None, None, cos, sin, *rest)
    return tuple(torch.cat([y, x[..., width:]], -1) for y, x in zip(found, (q, k)))


STOCK = "numerics='exact' keeps PyTorch's own F.normalize and product of complex numbers, whose last bits belong to them"


def by_stock(q, k, q_log_scale, k_log_scale, rope, eps: float, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The norms "l2" and "none", and a rotation by complex numbers where ``rope`` is one of them, in ``exact``: PyTorch's own calls throughout."""
    q, k = normed(q, None, None, q_log_scale, eps, norm, False, True), normed(k, None, None, k_log_scale, eps, norm, False, True)
    return (q, k) if rope is None else (turned_as_complex(q, rope), turned_as_complex(k, rope))


def turned_as_complex(x, rope) -> torch.Tensor:
    """x rotated as stock does it in complex numbers: PyTorch's product, whose last bits differ between vectors and the elements left over."""
    width = 2 * rope.shape[-1]
    pairs = x[..., :width].float().reshape(*x.shape[:-1], width // 2, 2)
    *apart, together = pairs.stride()
    if together != 1 or pairs.storage_offset() % 2 or any(stride % 2 for stride in apart):  # no complex number may lie so; stock fails
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    head = torch.view_as_complex(pairs)
    y = torch.view_as_real(head * rope.unsqueeze(-2)).flatten(3).type_as(x)
    return y if width == x.shape[-1] else torch.cat([y, x[..., width:]], -1)
