"""A test that no kernel served fails, unless that is meant (conftest.py)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU
from tests.kernels.conftest import pytest_pyfunc_call

X, ROW, WIDE = torch.randn(1, 3, 8), torch.randn(1, 8), torch.randn(1, 8, dtype=torch.float64)


def outcome(call, *marks, folder: str = "adaln", **params):
    """What becomes of a test of that room which makes this call: nothing, or the failure."""
    item = SimpleNamespace(path=Path(__file__).parent / folder / "test_it.py", callspec=SimpleNamespace(params=params),
                           iter_markers=lambda name: [made.mark for made in marks if made.name == name])
    around = pytest_pyfunc_call(item)
    next(around)
    call()
    with pytest.raises(StopIteration):
        around.send(None)


def served():
    ops.gate_residual(X, X, ROW)


def fell():
    ops.gate_residual(X, X, WIDE)


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_a_test_that_no_kernel_served_fails():
    with pytest.raises(pytest.fail.Exception, match=r"the reference served every call \(gate_residual: 2\)"):
        outcome(lambda: [fell(), fell()], pytest.mark.slow)


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_a_condition_is_asked():
    mark = pytest.mark.on_reference(when=lambda width, **_: width == 7, reason="-")
    outcome(fell, mark, width=7, tensor=X)
    with pytest.raises(pytest.fail.Exception, match="the reference served every call"):
        outcome(fell, mark, width=8, tensor=X)


@pytest.mark.parametrize("call, marks, where", (
    (lambda: None, (), {}), (fell, (pytest.mark.on_reference,), {}), (fell, (), {"backend": "reference"}), (fell, (), {"folder": "."}),
), ids=("no call", "marked", "parametrised", "outside the rooms"))
def test_what_is_meant_passes(call, marks, where):
    outcome(call, *marks, **where)


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason or "-")
def test_one_call_that_a_kernel_served_is_enough():
    outcome(lambda: [fell(), served()])


def test_forced():
    with forced("reference"):
        outcome(served)


def test_without_a_library(monkeypatch):
    monkeypatch.setattr(CPU, "loaded", False)
    outcome(fell)
