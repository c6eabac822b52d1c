"""The contract's signed bias, at most 0.02 units in the last place, for every result and every gradient of every public op in 16 bits.

What there is to measure follows from the ops themselves: the results of a call, and the arguments that are tensors. Each has enough elements in some
call of ``CALLS``, or a reason in ``UNROUNDED``. In float32 nothing is rounded to a narrower dtype, and the bias of sums and roots in float32 is
PyTorch's own: docs/limits.md has figures.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import TABLES, forced
from fusewire.kernels.library import CPU, cpu_isa
from fusewire.kernels.linear import native
from tests.kernels.test_backends import CALLS as EVERY
from tests.tolerance import ENOUGH, assert_unbiased

HANDED_ON = "the upstream gradient itself, which nothing rounds"
HOST = "scalars of the host in float64, which nothing rounds"
INTEGERS = "integers, which have no gradient"
OVERWRITTEN = "what stood there before is overwritten: its gradient is 0"
TABLES = "float32 as the tables are, and PyTorch's own: no kernel has their gradients"
UNROUNDED = {
    ("gate_residual", "x"): HANDED_ON, ("linear", "residual"): HANDED_ON, ("sampler_step", "sample"): HANDED_ON,
    ("sampler_step", "table"): HOST, ("solver_step", "table"): HOST, ("sampler_step", "step"): INTEGERS, ("solver_step", "step"): INTEGERS,
    ("attention_varlen", "cu_seqlens_q"): INTEGERS, ("attention_varlen", "cu_seqlens_k"): INTEGERS,
    ("qk_norm_rope", "rope"): TABLES, ("qk_norm_into", "rope"): TABLES, ("attention", "rope"): TABLES, ("joint_attention", "rope"): TABLES,
    ("joint_attention", "rope2"): TABLES, ("qk_norm_into", "q_out"): OVERWRITTEN, ("qk_norm_into", "k_out"): OVERWRITTEN,
}
# float32, but made of weights that are rounded to 16 bits before they are summed, where they are so multiplied with the values
LOG_SUM_EXP = {("attention", "result 1"), ("attention_varlen", "result 1")}


class Run(NamedTuple):
    """A call on tensors of these shapes, made ``times`` times on new numbers: of a vector as long as a head there are few elements in each.

    ``least``: as for ``assert_unbiased``; 1 where an element is a sum of products that were rounded before."""

    tensors: dict[str, tuple[int, ...]]
    options: dict = {}
    times: int = 1
    least: float = 1 / 16


WIDE = ENOUGH  # channels: of a few rows' parameters there are enough elements
X, ROW, AFFINE = (2, 4, WIDE), (2, WIDE), dict(weight=(WIDE,), bias=(WIDE,))
GATED = [Run(dict(x=(8, 2 * WIDE), bias=(2 * WIDE,))), Run(dict(x=X, gate=X))]
HEADS, FEW, HEAD, HALF, ANGLES = (1, 512, 2, 64), (1, 16, 1, 256), (256,), (4, 64, 8, 64), torch.linspace(0, 3, WIDE).view(512, 32)
MANY, STREAMS = (1, 2, 2 * WIDE, 8), ("q", "k", "v", "q2", "k2", "v2")  # heads
QK = [Run(dict(q=HEADS, k=HEADS), dict(rope=(ANGLES.cos(), ANGLES.sin()))), Run(dict(q=FEW, k=FEW, q_weight=HEAD, k_weight=HEAD), {}, 64),
      Run(dict(q=FEW, k=FEW, q_weight=HEAD, k_weight=HEAD, q_bias=HEAD, k_bias=HEAD), dict(norm="layer"), 64),
      Run(dict(q=MANY, k=MANY, q_log_scale=MANY[2:3], k_log_scale=MANY[2:3]), dict(norm="l2"), 1, 1.0)]
TURNS = (ANGLES[:64].cos(), ANGLES[:64].sin())
LATENT, STARTS = (2, 4, 64, 64), torch.tensor([0, 128, 512], dtype=torch.int32)
TABLE = ops.flow_euler_table(torch.tensor([1.0, 0.8125, 0.0]), 4.3125)  # numbers that float32 holds, here and in the next
SOLVER = ops.solver_table(1, x=0.875, x0=0.375, e=0.3125, x0_x=0.75, x0_m=-0.625, e_x=0.3125, e_m=0.875, e_x0=0.25, e_previous=0.5, noise=0.75, known=0.625,
                          known_noise=0.375, guidance=1.75)
CALLS = {
    "adaln_modulate": [Run(dict(x=X, shift=ROW, scale=ROW, **AFFINE)), Run(dict(x=X, shift=ROW, scale=ROW), dict(norm="rms"))],
    "adaln_modulate_dual": [Run(dict(x=X, shift=ROW, scale=ROW, shift2=ROW, scale2=ROW, **affine)) for affine in ({}, AFFINE)],
    "gate_residual": [Run(dict(x=X, y=X, gate=ROW))],
    "gate_residual_adaln": [Run(dict(x=X, y=X, gate=ROW, shift=ROW, scale=ROW, **more)) for more in ({}, dict(y2=X, gate2=ROW, **AFFINE))],
    "qk_norm_rope": QK, "qk_norm_into": QK,
    "attention": [Run(dict.fromkeys("qkv", (4, 256, 16, 16)), dict(return_lse=True)),
                  Run(dict.fromkeys("qkv", (4, 128, 8, 32)) | dict(mask=(1, 8, 128, 128))),
                  Run(dict.fromkeys("qkv", HALF), dict(rope=TURNS), 1, 1.0),
                  Run(dict.fromkeys("qkv", FEW) | dict(q_weight=HEAD, k_weight=HEAD), {}, 128, 1.0)],
    "joint_attention": [Run(dict.fromkeys(STREAMS, HALF)),
                        Run(dict.fromkeys(STREAMS, HALF), dict(rope=TURNS, rope2=TURNS), 1, 1.0),
                        Run(dict.fromkeys(STREAMS, FEW) | dict.fromkeys((f"{name}_weight" for name in ("q", "k", "q2", "k2")), HEAD), {}, 128, 1.0)],
    "attention_varlen": [Run(dict.fromkeys("qkv", (512, 32, 16)), dict(cu_seqlens_q=STARTS, return_lse=True)),
                         Run(dict.fromkeys("qkv", (512, 8, 32)), dict(cu_seqlens_q=STARTS))],
    "linear": [Run(dict(x=(512, 32), weight=(512, 32), bias=(512,))), Run(dict(x=(8, 16), weight=(WIDE, 16), bias=(WIDE,))),
               Run(dict(x=(2, 64, 16), weight=(WIDE // 2, 16), bias=(WIDE // 2,), gate=(2, WIDE // 2), residual=(2, 64, WIDE // 2)), {}, 1, 1.0),
               *(Run(dict(x=(1024, 16), weight=(1024, 16), bias=(1024,)), dict(activation=name), 1, 1.0) for name in ("gelu_tanh", "gelu", "silu")),
               *(Run(dict(x=(8, 16), weight=(2 * WIDE, 16), bias=(2 * WIDE,)), dict(activation=name), 1, 1.0)
                 for name in ("gelu_tanh", "gelu", "silu", "geglu", "swiglu"))],
    "rms_norm": [Run(dict(x=(8, WIDE), **AFFINE))], "layer_norm": [Run(dict(x=(8, WIDE), **AFFINE))], "layer_norm_2d": [Run(dict(x=(1, WIDE, 3, 3), **AFFINE))],
    "global_response_norm": [Run(dict(x=(1, 3, 3, WIDE), **AFFINE))], "geglu": GATED, "swiglu": GATED, "quick_gelu": [Run(dict(x=(8, WIDE), bias=(WIDE,)))],
    "group_norm_silu": [Run(dict(x=(2, WIDE, 4, 4), **AFFINE, shift=ROW, scale=ROW, add=ROW), dict(groups=512))],
    "sampler_step": [Run(dict(sample=LATENT, model_output=LATENT, uncond=LATENT), dict(table=TABLE, step=0))],
    "solver_step": [Run(dict.fromkeys(("sample", "model_output", "uncond", "previous", "base", "noise", "mask", "known", "known_noise"), LATENT),
                        dict(table=SOLVER, step=0, keep_slope=True, wide_x0=False))],
}


def tensor_arguments(name: str) -> set[str]:
    """Those without an annotation, as test_backends.py asserts."""
    return {argument for argument, parameter in inspect.signature(getattr(ops, name)).parameters.items() if parameter.annotation is inspect.Parameter.empty}


def call(name: str, given: dict, options: dict) -> tuple[torch.Tensor, ...]:
    if "numerics" in inspect.signature(getattr(ops, name)).parameters:
        options = options | {"numerics": "close"}
    if name == "qk_norm_into":
        given = {"q_weight": None, "k_weight": None} | given | {"q_out": torch.zeros_like(given["q"]), "k_out": torch.zeros_like(given["k"])}
        ops.qk_norm_into(**given, **options)
        return given["q_out"], given["k_out"]
    out = getattr(ops, name)(**given, **options)
    return out if isinstance(out, tuple) else (out,)


def measured(name: str, run: Run, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{result or argument: (ours, float64's)} of one call on the same numbers: the results with and without autograd, and the gradients."""
    given = {argument: torch.randn(shape).to(dtype).requires_grad_() for argument, shape in run.tensors.items()}
    true = {argument: tensor.detach().double().requires_grad_() for argument, tensor in given.items()}
    with torch.no_grad():
        bare = call(name, given, run.options)
    out = call(name, given, run.options)
    upstream = [torch.randn_like(one) for one in out]
    grads = torch.autograd.grad(out, list(given.values()), upstream)
    with forced("reference"):
        want = call(name, true, run.options)
        true_grads = torch.autograd.grad(want, list(true.values()), [grad.double() for grad in upstream])
    results = {f"result {i}": (torch.stack([one, again]), torch.stack([truth, truth])) for i, (one, again, truth) in enumerate(zip(bare, out, want, strict=True))}
    return {what: (got.detach().flatten(), exact.detach().flatten()) for what, (got, exact) in (results | dict(zip(given, zip(grads, true_grads)))).items()}


def test_every_op_is_here():
    assert set(CALLS) == set(EVERY) and all(argument in tensor_arguments(name) for name, argument in UNROUNDED) and all(UNROUNDED.values())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_biased_cast(name, dtype, monkeypatch):
    """biased-cast: of every result and gradient, which are tested or have a reason, and not both."""
    monkeypatch.setattr(native, "FLOAT16_PRODUCTS", False)  # the library's own product, where PyTorch's is the faster too
    tested = {argument for op, argument in UNROUNDED if op == name}
    every = set(tensor_arguments(name))
    for run in CALLS[name]:
        found: dict[str, list] = {}
        for _ in range(run.times):
            for what, pair in measured(name, run, dtype).items():
                found.setdefault(what, []).append(pair)
        every |= set(found)
        for what, pairs in found.items():
            got, want = map(torch.cat, zip(*pairs))
            if got.numel() >= ENOUGH and (name, what) not in UNROUNDED:
                assert_unbiased(got, want, f"{name} {what}, {set(run.tensors) | set(run.options)}", run.least, dtype if (name, what) in LOG_SUM_EXP else None)
                tested.add(what)
    assert tested == every
    by_library = CPU.loaded and torch.get_default_device().type == "cpu" and not (name == "linear" and cpu_isa() == "base")
    if by_library:
        forward = EVERY[name][2]
        tables = [table for table in (forward, f"{forward}_backward") if table == forward or table in TABLES and any(row.name == "cpu" for row in TABLES[table].rows)]
        assert all(ops.stats()[table]["cpu"] > 0 for table in tables), ops.stats()
