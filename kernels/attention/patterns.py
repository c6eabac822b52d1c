"""Which keys a query sees, as a function of their places, compiled once into a map of blocks that attention skips, reads whole, or masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from fusewire.kernels.attention.reference import BLOCK, EMPTY, FULL, pattern_mask

_AT_ONCE = 2**24  # pairs of a query and a key that the function is asked about together


class BlockPattern:
    """A pattern of ``block_pattern``, for ``attention(..., pattern=)``: made once, used for every call of its lengths.

    blocks: [B or 1, H or 1, ceil(Tq / 32), ceil(Tk / 32)], int32: -2 where none of 32 x 32 pairs is visible, -1 where all are, otherwise the number
    of the block in ``words``: [number, 32], int32, a word for each query, bit j for key j.
    """

    def __init__(self, blocks: torch.Tensor, words: torch.Tensor, q_len: int, k_len: int):
        self.blocks, self.words, self.q_len, self.k_len = blocks, words, q_len, k_len

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def to(self, device) -> BlockPattern:
        """The pattern on another device."""
        return BlockPattern(self.blocks.to(device), self.words.to(device), self.q_len, self.k_len)

    def dense(self) -> torch.Tensor:
        """The boolean mask that it stands for, [B or 1, H or 1, Tq, Tk]."""
        return pattern_mask(self.blocks, self.words, self.q_len, self.k_len)

    def computed(self) -> float:
        """The share of blocks that is computed: what attention costs of what it would without a pattern."""
        return (self.blocks != EMPTY).double().mean().item() if self.blocks.numel() else 0.0

    def __repr__(self) -> str:
        batch, heads = self.blocks.shape[:2]
        full = (self.blocks == FULL).double().mean().item() if self.blocks.numel() else 0.0
        return (f"BlockPattern({self.q_len} x {self.k_len}, batch={batch}, heads={heads}, device={str(self.device)!r}: "
                f"{self.computed():.0%} of the blocks computed, {full:.0%} without a mask)")


def block_pattern(function: Callable[..., torch.Tensor], q_len: int, k_len: int, *, batch: int = 1, heads: int = 1, device=None) -> BlockPattern:
    """Compile a function of places into a pattern for ``attention``.

    Args:
        function: ``(q_index, k_index)`` or ``(batch, head, q_index, k_index)`` -> bool (True: the query sees the key). The arguments are int64 tensors
            that broadcast against each other; so it computes with tensors, elementwise, and may index others: what ``flex_attention`` takes
            as a mask_mod does. It is called for some queries at a time, here alone: later changes of what it captures do not count.
        q_len, k_len: the numbers of queries and keys.
        batch, heads: how many of each the pattern tells apart: 1, or those of the tensors that it will be used with.
        device: where the tensors of ``attention`` will be; None for PyTorch's default device.

    Returns: a ``BlockPattern``, whose blocks of 32 x 32 are what the CPU's kernels compute at a time.
    Raises: TypeError where the function takes other arguments or gives no boolean tensor, ValueError for its shape or a negative length.
    Source: Dong et al. (2024), "Flex Attention".
    """
    for name, value, least in (("q_len", q_len, 0), ("k_len", k_len, 0), ("batch", batch, 1), ("heads", heads, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; it should be an integer of at least {least}")
    arguments = _arguments(function)
    if arguments == 2 and (batch, heads) != (1, 1):
        raise ValueError(f"batch is {batch} and heads is {heads}; for a function of (q_index, k_index) both should be 1: it is the same for all")
    places = [torch.arange(n, device=device) for n in (batch, heads, k_len)]
    b, h, k_index = places[0].view(-1, 1, 1, 1), places[1].view(-1, 1, 1), places[2].view(1, -1)
    rows = max(_AT_ONCE // max(batch * heads * k_len, 1) // BLOCK, 1) * BLOCK
    blocks, words, found = [], [], 0
    for start in range(0, q_len, rows):
        q_index = torch.arange(start, min(start + rows, q_len), device=device).view(-1, 1)
        visible = function(q_index, k_index) if arguments == 2 else function(b, h, q_index, k_index)
        some, mixed = _compile(_checked(visible, (batch, heads, q_index.shape[0], k_len)))
        blocks.append(torch.where(some >= 0, some + found, some))
        words.append(mixed)
        found += mixed.shape[0]
    shape = (batch, heads, -(-q_len // BLOCK), -(-k_len // BLOCK))
    empty = torch.empty((batch, heads, 0, shape[3]), dtype=torch.int32, device=device), torch.empty((0, BLOCK), dtype=torch.int32, device=device)
    return BlockPattern(torch.cat([*blocks, empty[0]], dim=2).view(shape).contiguous(), torch.cat([*words, empty[1]]), q_len, k_len)


def _arguments(function) -> int:
    if not callable(function):
        raise TypeError(f"function is a {type(function).__name__}; it should be a function of (q_index, k_index) or (batch, head, q_index, k_index)")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds and p.default is inspect.Parameter.empty]
    if len(wanted) not in (2, 4):
        raise TypeError(f"function takes ({', '.join(wanted)}); it should take (q_index, k_index) or (batch, head, q_index, k_index)")
    return len(wanted)


def _checked(visible, shape: tuple[int, ...]) -> torch.Tensor:
    if not isinstance(visible, torch.Tensor) or visible.dtype is not torch.bool:
        what = f"a tensor of {visible.dtype}" if isinstance(visible, torch.Tensor) else f"a {type(visible).__name__}"
        raise TypeError(f"function gave {what}; it should give a torch.Tensor of bool, made with comparisons, & and |")
    try:
        return visible.expand(shape)
    except RuntimeError:
        raise ValueError(f"function gave shape {list(visible.shape)}; it should give one that broadcasts to {list(shape)}, as its arguments do") from None


def _compile(visible) -> tuple[torch.Tensor, torch.Tensor]:
    """visible [B, H, Tq, Tk] -> (blocks, words). What a block has beyond the last query or key makes it neither less full nor less empty."""
    *outer, queries, keys = visible.shape
    padding = (0, -keys % BLOCK, 0, -queries % BLOCK)

    def squares(fill: bool) -> torch.Tensor:
        padded = torch.nn.functional.pad(visible, padding, value=fill)
        return padded.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4)  # [B, H, blocks, blocks, 32, 32]

    shown = squares(False)
    full, some = squares(True).flatten(4).all(-1), shown.flatten(4).any(-1)
    mixed = some & ~full
    numbers = mixed.flatten().cumsum(0).view(mixed.shape) - 1
    blocks = torch.where(mixed, numbers, torch.where(full, FULL, EMPTY)).to(torch.int32)
    bits = shown[mixed].to(torch.int64) << torch.arange(BLOCK, device=visible.device)
    words = bits.sum(-1)
    return blocks, torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
