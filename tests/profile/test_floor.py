"""Counted work: figures that can be worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusewire import machine
from fusewire.profile import floor
from fusewire.profile.floor import MatrixWork


def counted(call, mode):
    with mode(), MatrixWork() as work:
        call()
    return work.operations


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_linear(mode):
    layer, x = nn.Linear(16, 32), torch.randn(2, 5, 16)
    [(flop, size)] = counted(lambda: layer(x), mode)
    assert flop == 2 * 10 * 16 * 32
    assert size == 4 * (10 * 16 + 16 * 32 + 32 + 10 * 32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention(mode):
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 11, 8)
    operations = counted(lambda: F.scaled_dot_product_attention(q, k, k), mode)
    assert sum(flop for flop, _ in operations) == 4 * 2 * 3 * 7 * 11 * 8


def test_elementwise_work_is_not_counted():
    assert counted(lambda: F.layer_norm(torch.randn(4, 8), (8,)) * 2 + 1, torch.no_grad) == []


def test_floor_of_a_call(monkeypatch):
    monkeypatch.setattr(floor, "gemm_rate", lambda *a: 1e9)
    monkeypatch.setattr(floor, "copy_bandwidth", lambda *a: 1e6)
    layer, x = nn.Linear(100, 100, bias=False), torch.randn(50, 100)
    found = floor.floor_of(lambda: layer(x), torch.float32, torch.device("cpu"))
    assert found.flop == 10**6 and found.bytes == 4 * (50 * 100 * 2 + 100 * 100)
    assert found.arithmetic == pytest.approx(1e-3) and found.memory == pytest.approx(0.08) and found.roofline == found.memory


def test_measuring_leaves_the_users_random_numbers_alone():
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    assert machine.gemm_rate.__wrapped__(torch.float32, torch.device("cpu"), repeats=1) > 0
    assert torch.equal(torch.randn(4), want)
