"""Recording the calls of fused ops, and judging them one at a time."""

import pytest
import torch

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.parity import ops as judge_ops
from tests.layouts import LAYOUTS
from tests.spoil import spoil


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_copies_keep_the_layout(layout):
    x = layout(torch.randn(1, 5, 6).expand(3, 5, 6))
    copy = judge_ops.copy_in_layout(x)
    assert copy.stride() == x.stride() and torch.equal(copy, x) and copy.data_ptr() != x.data_ptr()


@pytest.fixture
def inputs():
    return torch.randn(2, 7, 24), torch.randn(2, 24), torch.randn(2, 24)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_holds(inputs, numerics, dtype):
    x, shift, scale = (t.to(dtype) for t in inputs)
    with judge_ops.recording() as calls:
        ops.adaln_modulate(x, shift, scale, numerics=numerics)
        ops.adaln_modulate(x, shift, scale, numerics=numerics)
    [row] = judge_ops.judge(calls, numerics)
    assert calls[0].count == 2 and row.holds, row.reason
    assert row.backend == dispatch.TABLES["adaln_modulate"].rows[0].name or row.backend == "reference"
    assert row.rule == numerics and row.stock_max_error > 0


@pytest.mark.parametrize("numerics, change", [("exact", lambda t: torch.nextafter(t, torch.full_like(t, torch.inf))), ("close", lambda t: t * 1.01),
                                              ("exact", lambda t: t * torch.nan), ("close", lambda t: t[:, :-1])])
def test_a_perturbed_kernel_fails(inputs, monkeypatch, numerics, change):
    spoil(monkeypatch, "gate_residual", change)
    x, gate, _ = inputs
    with judge_ops.recording() as calls:
        ops.gate_residual(x, x.flip(0), gate, numerics=numerics)
    [row] = judge_ops.judge(calls, numerics)
    assert row.backend == "cpu" and not row.holds and row.reason


def test_recording_ends_with_the_block(inputs):
    rows = dispatch.TABLES["adaln_modulate"].rows
    with pytest.raises(RuntimeError), judge_ops.recording():
        raise RuntimeError
    assert dispatch.TABLES["adaln_modulate"].rows is rows


def test_arguments_are_kept_as_they_were(inputs):
    x, shift, scale = inputs
    before = x.clone()
    with judge_ops.recording() as calls:
        ops.adaln_modulate(x, shift, scale)
    x.zero_()
    assert torch.equal(calls[0].args[0], before)


def test_an_op_that_writes_is_judged_by_what_it_wrote(monkeypatch):
    q, k, weight = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), torch.randn(8)
    joint = torch.zeros(2, 1, 9, 2, 8)

    def run():
        with judge_ops.recording() as calls:
            ops.qk_norm_into(q, k, weight, weight, joint[0][:, :5], joint[1][:, :5])
        return judge_ops.judge(calls, "exact")

    [row] = run()
    assert row.holds and row.max_error is not None, row.reason

    def wrong(args):
        args[4][0, 0, 0, 0] += 1e-3

    into = dispatch.TABLES["qk_norm_into"]
    reference = judge_ops.reference_of("qk_norm_into")
    monkeypatch.setattr(into, "rows", [dispatch.Backend("cpu", dispatch.always, lambda *args: (reference(*args), wrong(args))[0]), into.rows[-1]])
    monkeypatch.setattr(into, "calls", {"cpu": 0, "reference": 0})
    [row] = run()
    assert row.backend == "cpu" and not row.holds
