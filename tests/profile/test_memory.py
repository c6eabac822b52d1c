"""Peak memory: counted to the byte, held against stock's, in the verdicts; what a swap keeps for good."""

import json

import pytest
import torch
from torch import nn

import fusewire
from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CPU as LIBRARY
from fusewire.kernels.library import cpu_scratch
from fusewire.profile.memory import LIMITS, SMALL, Memory, judged, kept_text, memory_verdicts, peak_of_call, tensor_bytes, weight_bytes
from tests.spoil import spoil
from tests.tiny import CALL, tiny_pipeline

CPU = torch.device("cpu")
MIB = 2**20


def block(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def tensors_of(call) -> int:
    return peak_of_call(call, CPU)[0]


def test_one_call_takes_64_mib_more():
    def less():
        return block(8).clone()

    def more():
        wide = block(64)
        return block(8).clone(), wide.numel()

    assert tensors_of(less) == 16 * MIB and tensors_of(more) == 80 * MIB


def test_a_peak_is_what_is_held_at_once():
    kept = [block(32)]

    def in_turn():
        block(16)
        block(16)

    assert tensors_of(in_turn) == 16 * MIB
    assert tensors_of(lambda: (block(16), block(16))) == 32 * MIB
    assert tensors_of(lambda: (kept.clear(), block(8))) == 8 * MIB  # what was there before does not count, nor does its end


def test_it_repeats_to_the_byte():
    pipe = tiny_pipeline()
    inputs = dict(hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 7, 32), pooled_projections=torch.randn(1, 32),
                  timestep=torch.full((1,), 500.0))

    def call():
        with torch.inference_mode():
            pipe.transformer(**inputs)

    call()
    found = {peak_of_call(call, CPU) for _ in range(3)}
    assert len(found) == 1 and found.pop()[0] > 0


def test_another_device_does_not_tell():
    assert peak_of_call(lambda: None, torch.device("meta")) is None


def test_weights_count_once():
    first, second = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
    both = nn.Sequential(first, second)
    assert weight_bytes(both) == 80_000
    second.weight = first.weight
    assert weight_bytes(both) == 40_000
    both.register_buffer("table", torch.zeros(10))
    assert weight_bytes(both) == 40_040


def test_tensors_that_python_can_reach():
    before = tensor_bytes()
    held = {"deep": [block(3)]}
    view = held["deep"][0][:5]
    assert tensor_bytes() - before == 3 * MIB
    held.clear()
    assert tensor_bytes() - before == 3 * MIB  # the view holds it
    del view
    assert tensor_bytes() == before


@pytest.mark.skipif(not LIBRARY.loaded, reason="of the compiled library")
def test_the_librarys_own_memory_is_counted():
    x, weight = torch.randn(1, 600, 64), torch.randn(64, 64)
    q = torch.randn(1, 100, 2, 16)
    cpu_scratch(reset=True)
    assert cpu_scratch() == 0
    ops.adaln_modulate(x, torch.zeros(1, 64), torch.zeros(1, 64), numerics="close")
    assert cpu_scratch() == 0
    with forced("cpu"):  # in float32 PyTorch's own serves on some processors
        ops.linear(x, weight, numerics="close")
    linear = cpu_scratch()
    assert 0 < linear < 8 * MIB * torch.get_num_threads() and linear == cpu_scratch()
    ops.attention(q, q, q)
    assert cpu_scratch() > linear
    with forced("cpu"):
        _, scratch = peak_of_call(lambda: ops.linear(x, weight, numerics="close"), CPU)
    assert scratch == linear  # of that call alone


STOCK = Memory(900 * MIB, 0, (100 * MIB, 100 * MIB), 0)


@pytest.mark.parametrize("variant, side, holds", [
    ("exact", STOCK, True),
    ("exact", Memory(900 * MIB, 0, (115 * MIB,), 0), True),
    ("exact", Memory(900 * MIB, 0, (150 * MIB,), 0), False),  # 5 % of stock's peak
    ("exact", Memory(900 * MIB, 50 * MIB, (100 * MIB,), 0), False),  # the same, kept for good
    ("exact", Memory(900 * MIB, 0, (100 * MIB, 150 * MIB), 0), False),  # in one measurement of two
    ("close", Memory(900 * MIB, 0, (150 * MIB,), 0), True),
    ("close", Memory(900 * MIB, 0, (220 * MIB,), 0), False),
    ("close", Memory(900 * MIB, 0, (100 * MIB,), 2 * SMALL + 120 * MIB), False),
    ("compile", Memory(900 * MIB, 0, (900 * MIB,), 0), True)])
def test_limits(variant, side, holds):
    rows = judged({"eager": STOCK, variant: side}, threads=2)
    assert [row.holds for row in rows] == [True, holds]
    assert rows[1].against_eager == pytest.approx(side.peak / (1000 * MIB)) and rows[1].limit == LIMITS.get(variant)
    assert [v.holds for v in memory_verdicts(rows)] == ([holds] if variant in LIMITS else [])


def test_scratch_memory_of_tiny_models():
    """What the threads need however small the model is, and no more than that, is not held against it."""
    tiny = Memory(MIB, 0, (MIB,), 0)
    assert judged({"eager": tiny, "close": Memory(MIB, 0, (MIB,), 2 * SMALL)}, threads=2)[1].holds
    assert not judged({"eager": tiny, "close": Memory(MIB, 0, (MIB,), 3 * SMALL)}, threads=2)[1].holds
    assert not judged({"eager": tiny, "close": Memory(MIB, 0, (3 * MIB,), 0)}, threads=2)[1].holds


def test_spread_and_text():
    rows = judged({"eager": STOCK, "exact": Memory(900 * MIB, 0, (100 * MIB, 101 * MIB), 0), "close": Memory(900 * MIB, 7 * MIB, (90 * MIB,), 0)}, threads=1)
    assert [row.spread for row in rows] == pytest.approx([0, 0.01, 0])
    assert "No rearranged weights are kept (0 bytes" in kept_text(rows[1]) and "7.00 MiB" in kept_text(rows[2])


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def profiled(pipe, **more):
    return fusewire.profile(pipe, prompts=["a red 7"], steps=2, rounds=1, call=CALL, **more)


def memory_of(result, variant):
    return next(row for row in result.memory if row.variant == variant), next(v for v in result.verdicts if v.name == f"{variant}: peak memory")


@pytest.mark.slow
def test_a_pipeline(pipe):
    result = profiled(pipe)
    assert [row.variant for row in result.memory] == ["eager", "exact", "close"]
    for row in result.memory:
        assert row.spread < 0.01 and row.weights_mib == pytest.approx(weight_bytes(pipe) / MIB) and row.tensors_mib > 0
        assert row.kept_mib < 0.001  # tables of the scheduler's step, no weights
        assert row.peak_mib == pytest.approx(row.weights_mib + row.working_mib) and result.row(row.variant).peak_mib == row.working_mib
    for variant in ("exact", "close"):
        row, verdict = memory_of(result, variant)
        assert row.holds and verdict.holds and "No rearranged weights are kept" in verdict.detail, verdict
    assert memory_of(result, "exact")[0].working_against_eager < 1.02
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["memory"][1]["variant"] == "exact" and data["memory"][1]["limit"] == 1.02 and data["memory"][0]["limit"] is None


def test_excess_fails(pipe, monkeypatch):
    """A kernel that needs 5 % of the peak in passing."""
    stock = memory_of(profiled(pipe, numerics="exact"), "exact")[0]
    extra = int((stock.working_mib + 0.05 * stock.peak_mib) * MIB)

    def greedy(out):
        torch.empty(extra, dtype=torch.uint8)
        return out

    spoil(monkeypatch, "gate_residual_adaln", greedy)
    result = profiled(pipe, numerics="exact")
    row, verdict = memory_of(result, "exact")
    assert row.against_eager > 1.02 and not row.holds and not verdict.holds and not result.ok


def test_what_is_kept_is_told(pipe, monkeypatch):
    cache = {}

    def hoarding(out):
        cache.setdefault("weights", block(1))
        return out

    spoil(monkeypatch, "gate_residual_adaln", hoarding)
    row, verdict = memory_of(profiled(pipe, numerics="exact"), "exact")
    assert row.kept_mib == pytest.approx(1, rel=1e-3) and not verdict.holds and "kept: 1.00 MiB" in verdict.detail
