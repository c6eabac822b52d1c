"""The floor: what the matrix products and convolutions of a call cost at the rate and bandwidth that this machine was measured at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fusewire.copies import tensors_in
from fusewire.machine import copy_bandwidth, gemm_rate

aten = torch.ops.aten


@dataclass(frozen=True)
class Floor:
    """flop, bytes: of the matrix work of one call, each operand moved once. rate: FLOP/s. bandwidth: bytes/s. Times in seconds.

    arithmetic: flop / rate. memory: bytes / bandwidth. roofline: the sum over the operations of the larger of their two times.
    """

    flop: int
    bytes: int
    rate: float
    bandwidth: float
    roofline: float

    @property
    def arithmetic(self) -> float:
        return self.flop / self.rate

    @property
    def memory(self) -> float:
        return self.bytes / self.bandwidth


def attention_flop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """2 * B * H * S * L * (D + D_v) for query [B, H, S, D], key [B, H, L, D], value [B, H, L, D_v]."""
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (width + value.shape[-1])


class MatrixWork(TorchDispatchMode):
    """Counts (flop, bytes) of every matrix product, convolution and attention that runs inside."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:  # inside inference_mode a linear arrives here whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if packet is aten._scaled_dot_product_flash_attention_for_cpu:
            flop = attention_flop(*args[:3])
        elif packet in flop_registry:
            flop = flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            return out
        operands = tensors_in(list(args)) + tensors_in(out)
        self.operations.append((int(flop), sum(t.numel() * t.element_size() for t in operands)))
        return out


def floor_of(call: Callable[[], object], dtype: torch.dtype, device: torch.device) -> Floor:
    """Count the matrix work of one stock call and measure the machine's two rates."""
    with torch.no_grad(), MatrixWork() as work:
        call()
    rate, bandwidth = gemm_rate(dtype, device), copy_bandwidth(device)
    return Floor(sum(f for f, _ in work.operations), sum(b for _, b in work.operations), rate, bandwidth,
                 sum(max(f / rate, b / bandwidth) for f, b in work.operations))
