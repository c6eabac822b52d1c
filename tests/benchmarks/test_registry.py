"""Every op has cases on the shapes of real models, and declares what it moves and multiplies as the tensors of a call have it."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fusewire import ops
from tests.kernels.test_backends import CALLS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import registry  # noqa: E402
from registry import REGISTRY, case_option, chosen  # noqa: E402

CASES = [(op, case) for op, cases in REGISTRY.items() for case in cases]
MODELS = ("SD3.5-medium", "SD3.5-large", "Flux", "SDXL", "Z-Image", "Qwen-Image", "DiT-XL/2", "SD1.5 VAE")


def new(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call_of(op: str, shape: tuple[int, ...]):
    """(the op's call on tensors of the case's shape, which hold no memory; the tensors that it reads)."""
    x = new(*shape)
    if op.startswith(("adaln", "gate")):
        row = new(shape[0], shape[2])
        read = {"adaln_modulate": (x, row, row), "adaln_modulate_dual": (x, row, row, row, row), "gate_residual": (x, x, row),
                "gate_residual_adaln": (x, x, row, row, row)}[op]
    elif op == "linear":
        batch, tokens, inputs, outputs = shape
        read = new(batch, tokens, inputs), new(outputs, inputs), new(outputs)
    elif op == "attention":
        batch, queries, keys, heads, dim = shape
        read = tuple(new(batch, tokens, heads, dim) for tokens in (queries, keys, keys))
    elif op == "joint_attention":
        batch, tokens, text, heads, dim = shape
        read = *(new(batch, tokens, heads, dim) for _ in range(3)), *(new(batch, text, heads, dim) for _ in range(3))
    elif op == "attention_varlen":
        heads, dim, *lengths = shape
        read = tuple(new(sum(lengths), heads, dim) for _ in range(3))
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to("meta")
        return lambda: ops.attention_varlen(*read, ends, ends), read
    elif op in ("qk_norm_rope", "qk_norm_into"):
        read = x, x, new(shape[3]), new(shape[3])
        if op == "qk_norm_into":
            return lambda: (ops.qk_norm_into(*read, *(outs := (new(*shape), new(*shape)))), outs)[1], read
    elif op == "group_norm_silu":
        return lambda: ops.group_norm_silu(x, 32, new(shape[1]), new(shape[1])), (x,)
    elif op == "sampler_step":
        read = x, new(2 * shape[0], *shape[1:])
        return lambda: ops.sampler_step(*read, new(28, 2, dtype=torch.float64), 3), read
    elif op == "solver_step":
        return lambda: ops.solver_step(x, x, new(28, 19, dtype=torch.float64), 3), (x, x)
    else:
        vector = new(shape[1 if op == "layer_norm_2d" else -1])
        read = x, *[vector] * {"rms_norm": 1, "layer_norm": 2, "layer_norm_2d": 2, "global_response_norm": 2}.get(op, 0)
    return lambda: getattr(ops, op)(*read), read


def test_every_op_has_cases():
    assert set(REGISTRY) == set(CALLS)
    for op, cases in REGISTRY.items():
        assert len({case.what for case in cases}) == len(cases) >= 1, op
        assert any(case.recorded for case in cases) or op in ("joint_attention", "attention_varlen"), op
        recorded = [case.recorded for case in cases]
        assert recorded == sorted(recorded, reverse=True), f"{op}: the recorded cases come first"


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_there(model):
    found = {op for op, case in CASES if case.what.startswith(model)}
    wanted = {"SD1.5 VAE": {"group_norm_silu", "attention"}, "SDXL": {"group_norm_silu", "attention", "geglu", "layer_norm", "solver_step"}}
    blocks = {"adaln_modulate", "gate_residual", "gate_residual_adaln", "attention", "linear"}
    assert wanted.get(model, blocks | (set() if model == "DiT-XL/2" else {"qk_norm_rope"})) <= found


@pytest.mark.parametrize("op, case", CASES, ids=[f"{op}, {case.what}" for op, case in CASES])
def test_what_is_declared_is_what_the_tensors_hold(op, case):
    call, read = call_of(op, case.shape)
    made = call()
    outputs = made if isinstance(made, tuple) else (made,)
    moved = sum(tensor.numel() for tensor in (*read, *outputs))
    assert 0.99 * moved <= case.elements <= moved, (case.elements, moved)


@pytest.mark.parametrize("op, case", [(op, case) for op, case in CASES if case.flops], ids=lambda value: getattr(value, "what", value))
def test_flops_are_those_that_torch_counts(op, case):
    counter = FlopCounterMode(display=False)
    with counter:
        if op == "linear":
            batch, tokens, inputs, outputs = case.shape
            F.linear(new(batch * tokens, inputs), new(outputs, inputs))
        elif op == "attention_varlen":
            heads, dim, *lengths = case.shape
            for length in lengths:
                sdpa(1, length, length, heads, dim)
        elif op == "joint_attention":
            batch, tokens, text, heads, dim = case.shape
            sdpa(batch, tokens + text, tokens + text, heads, dim)
        else:
            sdpa(*case.shape)
    assert counter.get_total_flops() == case.flops


def sdpa(batch: int, queries: int, keys: int, heads: int, dim: int) -> None:
    q, k = new(batch, heads, queries, dim), new(batch, heads, dim, keys)
    (q @ k) @ new(batch, heads, keys, dim)


def test_only_ops_that_multiply_have_flops():
    assert {op for op, case in CASES if case.flops} == {"linear", "attention", "joint_attention", "attention_varlen"}


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    case_option(parser)
    return parser.parse_args(words)


def test_cases_are_chosen_by_their_words():
    assert [case.what for case in chosen("adaln_modulate", parsed())] == ["SD3.5-medium 512^2, guidance"]
    assert [case.what for case in chosen("adaln_modulate", parsed("--case", "sd3.5-LARGE", "--case", "qwen"))] == [
        "SD3.5-large 1024^2, guidance", "Qwen-Image 1024^2, guidance"]
    assert chosen("adaln_modulate", parsed("--case", "all")) == REGISTRY["adaln_modulate"] and not chosen("geglu", parsed("--case", "DiT"))


@pytest.mark.parametrize("name", ("test_adaln", "test_gated_mlp", "group_norm_silu", "test_norm", "test_qk_norm_rope", "test_sampler_step", "attention"))
def test_what_is_recorded_is_what_is_measured_by_default(name):
    """The files in results/ hold the cases that the registry says are recorded."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    op = {"group_norm_silu": "group_norm_silu", "test_qk_norm_rope": "qk_norm_rope", "test_sampler_step": "sampler_step", "attention": "attention"}.get(name)
    assert rows and {(row.get("op", op), row["shape"], tuple(row["size"])) for row in rows} <= {
        (op, case.what, case.shape) for op, case in CASES if case.recorded}
