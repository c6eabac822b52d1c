"""Timing in turn, and the kinds that operators belong to."""

import time

import pytest
import torch

from fusewire.profile.kinds import KINDS, by_kind, kind_of
from fusewire.profile.timing import Timing, alternate

CPU = torch.device("cpu")


def test_sides_run_in_turn_after_warm_up():
    order = []
    timings = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, rounds=3, warmup=2)
    assert "".join(order) == "aabb" + "ab" * 3
    assert len(timings["a"].samples) == 3


def test_a_slower_side_is_slower():
    timings = alternate({"fast": lambda: None, "slow": lambda: time.sleep(0.01)}, CPU, rounds=3)
    assert timings["slow"].median >= 0.01 > timings["fast"].median


def test_fast_sides_are_repeated():
    calls = []
    alternate({"a": lambda: calls.append(1)}, CPU, rounds=1, least=0.001)
    assert len(calls) > 10


def test_median_and_quartiles():
    timing = Timing((5.0, 1.0, 2.0, 3.0, 4.0))
    assert timing.median == 3.0 and timing.quartiles == (2.0, 4.0)
    assert Timing((1.0, 9.0)).quartiles == (1.0, 9.0)


@pytest.mark.parametrize("operator, kind", [
    ("aten::addmm", "linears"), ("aten::mm", "linears"), ("fusewire::linear", "linears"), ("mkldnn::_linear_pointwise", "linears"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("fusewire::attention", "attention"),
    ("aten::native_layer_norm", "norms and modulation"), ("aten::mul", "norms and modulation"), ("aten::add", "norms and modulation"),
    ("fusewire::gate_residual_adaln", "norms and modulation"), ("fusewire::qk_norm_rope", "norms and modulation"),
    ("aten::mkldnn_convolution", "convolutions"), ("aten::gelu", "other"), ("aten::copy_", "other"), ("fusewire::flow_euler_step", "other")])
def test_kinds(operator, kind):
    assert kind_of(operator) == kind


def test_shares_add_up():
    layer, x = torch.nn.Linear(1024, 1024), torch.ones(1024, 1024)  # milliseconds, beside which a pause of the machine is short
    found = by_kind(lambda: layer(x), CPU)
    assert tuple(found) == KINDS and sum(found.values()) == pytest.approx(1.0) and found["linears"] > 0.3
