"""``fusewire.profile`` on a tiny pipeline, its verdicts, and the bench of single ops."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import fusewire
from fusewire.errors import BadInput, NothingToDo
from fusewire.kernels import dispatch
from fusewire.profile import native_backends, verdicts
from fusewire.profile.bench import bench
from fusewire.profile.kinds import STAGES, StageClock
from fusewire.profile.result import Row
from tests.spoil import spoil
from tests.tiny import CALL, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def test_a_pipeline(pipe):
    result = fusewire.profile(pipe, prompts=["a red 7"], steps=2, rounds=2, call=CALL)
    assert [row.variant for row in result.rows] == ["eager", "exact", "close"]
    assert all(0 < row.low_ms <= row.median_ms <= row.high_ms for row in result.rows)
    assert all(set(spent) == set(STAGES) and spent["denoiser"] > 0 and spent["VAE"] > 0 and spent["text encoders"] > 0 and spent["scheduler"] > 0
               for spent in result.stages.values())
    assert result.floor["gflop"] > 0
    ran = [verdict for verdict in result.verdicts if "fused kernels ran" in verdict.name]
    assert len(ran) == 2 and all(verdict.holds for verdict in ran), ran
    for row in result.rows[1:]:
        assert row.backends and (not native_backends() or set(row.backends) & set(native_backends()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules()) and "step" not in vars(pipe.scheduler)
    json.loads(json.dumps(result.to_dict(), allow_nan=False))


ROW = Row("eager", 100.0, 95.0, 105.0, 1.0, None, 0.5, 120.0, 20.0, 1.0, {})


@pytest.mark.parametrize("changes, broken", [
    ({}, []), (dict(median_ms=130.0, low_ms=110.0, high_ms=140.0), ["not slower than eager"]), (dict(extra_first_ms=1500.0), ["no compile step"]),
    (dict(backends={}), ["fused kernels ran"]), (dict(median_ms=103.0, low_ms=101.0), [])])
def test_verdicts(changes, broken):
    swapped = dataclasses.replace(ROW, variant="close", **{"backends": {"cpu": 9, "reference": 1}, **changes})
    assert [v.name.removeprefix("close: ") for v in verdicts([ROW, swapped]) if not v.holds] == broken


def test_silence_is_noticed(monkeypatch):
    """A native library is here, and yet only the reference served."""
    monkeypatch.setattr("fusewire.profile.native_backends", lambda: ["cpu"])
    swapped = dataclasses.replace(ROW, variant="close", backends={"reference": 10})
    assert [v.name for v in verdicts([ROW, swapped]) if not v.holds] == ["close: fused kernels ran"]


def test_stage_clock(pipe):
    class Scheduler:
        def step(self, x):
            return x + 1

    class Pipe:
        components = {"transformer": nn.Linear(4, 4)}

    part, scheduler = Pipe(), Scheduler()
    part.scheduler = scheduler
    part.components["transformer"].device = torch.device("cpu")
    with StageClock(part) as clock:
        clock.start()
        assert scheduler.step(1) == 2
        part.components["transformer"](torch.ones(1, 4))
        clock.stop()
    assert "step" not in vars(scheduler) and not part.components["transformer"]._forward_hooks
    assert clock.medians(1)["denoiser"] > 0 and clock.medians(1)["scheduler"] > 0 and clock.medians(1)["VAE"] == 0


@pytest.mark.parametrize("arguments, message", [(dict(rounds=0), "rounds is 0"), (dict(numerics="best"), "numerics is 'best'"), (dict(steps=0), "steps is 0"),
                                                (dict(rounds=2.5), "rounds is 2.5")])
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(BadInput, match=message):
        fusewire.profile(pipe, **arguments)


def test_nothing_to_swap():
    for inputs in (dict(input=torch.ones(1, 3)), None):
        with pytest.raises(NothingToDo):
            fusewire.profile(nn.Linear(3, 3), inputs=inputs)
        with pytest.raises(NothingToDo):
            bench(nn.Linear(3, 3), inputs=inputs)


def test_bench(pipe):
    result = bench(pipe.transformer, numerics="exact", rounds=1)
    assert result.ok and {"gate_residual_adaln", "adaln_modulate"} <= {row.op for row in result.rows}
    assert all(row.median_us > 0 and row.eager_us > 0 and row.clone_us > 0 for row in result.rows)
    if native_backends():
        assert "cpu" in {row.backend for row in result.rows}


def test_bench_gives_no_speed_up_for_a_wrong_kernel(pipe, monkeypatch):
    spoil(monkeypatch, "gate_residual_adaln", lambda out: (out[0], out[1] * 1.5))
    result = bench(pipe.transformer, numerics="exact", only=["gate_residual_adaln"], rounds=1)
    assert not result.ok and all(row.against_eager is None and row.reason for row in result.rows)


def test_bench_of_an_unknown_op(pipe):
    assert "adaln_modulate" in dispatch.TABLES
    with pytest.raises(BadInput, match="op is 'adalnn'"):
        bench(pipe.transformer, only=["adalnn"])
