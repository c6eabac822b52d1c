"""Eight memory layouts of the same values: an op must give the same bits for each (bug class ``strided-input``)."""

from __future__ import annotations

import torch


def contiguous(x):
    return x.contiguous()


def transposed(x):
    """The first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x.contiguous()


def reversed_permute(x):
    """All dimensions in reverse order in memory: the last one is not contiguous."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sliced(x):
    """The middle of a larger tensor, as the chunks of one projection are."""
    parts = torch.cat([torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)], dim=-1)
    return parts[..., x.shape[-1]:2 * x.shape[-1]]


def offset_by_one(x):
    """Contiguous, but starting one element into its storage: not aligned to a vector."""
    base = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    base[1:] = x.reshape(-1)
    return base[1:].view(x.shape)


def step_two(x):
    """Every second element of the last dimension."""
    base = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    base[..., ::2] = x
    return base[..., ::2]


def packed_third(x):
    """The middle third of a packed [..., 3, C] tensor, as q, k and v of one projection."""
    base = torch.full((*x.shape[:-1], 3, x.shape[-1]), torch.nan, dtype=x.dtype)
    base[..., 1, :] = x
    return base[..., 1, :]


def expanded(x):
    """Stride 0 over the first dimension where its rows are equal; otherwise the contiguous tensor."""
    if x.dim() and x.shape[0] > 1 and (x == x[:1]).all():
        return x[:1].contiguous().expand(x.shape)
    return x.contiguous()


def one_at_a_time(arguments: dict[str, torch.Tensor], layout):
    """For each argument (its name, the arguments with that one in ``layout``, the same values contiguous). For ``expanded`` its rows are made equal, so
    that the layout is real; other layouts keep them apart, so that a wrong stride shows."""
    for name, tensor in arguments.items():
        if layout is expanded and tensor.dim() and len(tensor) > 1:
            tensor = tensor[:1].expand_as(tensor).contiguous()
            assert layout(tensor).stride(0) == 0
        yield name, arguments | {name: layout(tensor)}, arguments | {name: tensor}


LAYOUTS = (contiguous, transposed, reversed_permute, sliced, offset_by_one, step_two, packed_third, expanded)
