"""Arguments of the wrong kind (no number, no tensor, no name): one error that names them, before any kernel. Wrong shapes and dtypes: each room's contract."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.kernels.library import CPU

X, M, Q, ONES = torch.randn(2, 8, 16), torch.randn(2, 16), torch.randn(2, 8, 2, 8), torch.ones(8)
CU_SEQLENS = torch.tensor([0, 3, 8], dtype=torch.int32)
TABLE, FLOW = ops.solver_table(3), ops.flow_euler_table(torch.tensor([1.0, 0.5, 0.0]))

WITH_EPS = {
    "adaln_modulate": lambda eps: ops.adaln_modulate(X, M, M, eps=eps),
    "adaln_modulate_dual": lambda eps: ops.adaln_modulate_dual(X, M, M, M, M, eps=eps),
    "gate_residual_adaln": lambda eps: ops.gate_residual_adaln(X, X, M, M, M, eps=eps),
    "qk_norm_rope": lambda eps: ops.qk_norm_rope(Q, Q, eps=eps),
    "qk_norm_into": lambda eps: ops.qk_norm_into(Q, Q, None, None, Q.clone(), Q.clone(), eps=eps),
    "attention": lambda eps: ops.attention(Q, Q, Q, q_weight=ONES, eps=eps),
    "joint_attention": lambda eps: ops.joint_attention(Q, Q, Q, Q, Q, Q, eps=eps),
    "rms_norm": lambda eps: ops.rms_norm(X, eps=eps),
    "layer_norm": lambda eps: ops.layer_norm(X, eps=eps, numerics="close"),
    "layer_norm_2d": lambda eps: ops.layer_norm_2d(Q, ONES, ONES, eps=eps),
    "global_response_norm": lambda eps: ops.global_response_norm(Q, ONES, ONES, eps=eps, numerics="close"),
    "group_norm_silu": lambda eps: ops.group_norm_silu(Q, 2, eps=eps),
}


@pytest.mark.parametrize("eps", (None, "1e-6", [1e-6]), ids=str)
@pytest.mark.parametrize("op", WITH_EPS)
def test_eps(op, eps):
    with torch.no_grad(), pytest.raises(TypeError, match="^eps is .*; it should be a number greater than 0"):
        WITH_EPS[op](eps)


@pytest.mark.parametrize("op", WITH_EPS)
def test_eps_of_one(op):
    """A whole number is a number; the kernel serves both."""
    want, got = WITH_EPS[op](1.0), WITH_EPS[op](1)
    assert not CPU.loaded or ops.stats()[op]["cpu"] == 2, ops.stats()[op]
    for one, other in zip(want if isinstance(want, tuple) else (want,), got if isinstance(got, tuple) else (got,)):
        assert one is other is None or torch.equal(one, other)


SCALED = {
    "attention": lambda scale: ops.attention(Q, Q, Q, scale=scale),
    "joint_attention": lambda scale: ops.joint_attention(Q, Q, Q, Q, Q, Q, scale=scale),
    "attention_varlen": lambda scale: ops.attention_varlen(Q[0], Q[0], Q[0], CU_SEQLENS, scale=scale),
}


@pytest.mark.parametrize("scale, error", (("0.1", TypeError), ([1], TypeError), (float("inf"), ValueError), (float("nan"), ValueError)), ids=str)
@pytest.mark.parametrize("op", SCALED)
def test_scale(op, scale, error):
    with pytest.raises(error, match="^scale is .*; it should be a (finite )?number"):
        SCALED[op](scale)


REFUSED = {
    "weight is a NoneType": lambda: ops.linear(X, None),
    "weight has shape": lambda: ops.linear(X, torch.ones(())),
    "weight  has shape": lambda: ops.linear(X, torch.ones(()), residual=X),
    "x is a NoneType": lambda: ops.linear(None, M),
    "activation is": lambda: ops.linear(X, torch.randn(16, 16), activation=[]),
    "activation is 3": lambda: ops.linear(X, torch.randn(16, 16), activation=3),
    "x is a str": lambda: ops.geglu("x"),
    "model_output is a list": lambda: ops.solver_step(X, [1], TABLE, 0),
    "uncond is a list": lambda: ops.solver_step(X, X, TABLE, 0, uncond=[1]),
    "previous is a int": lambda: ops.solver_step(X, X, TABLE, 0, previous=1),
    "noise is a str": lambda: ops.solver_step(X, X, TABLE, 0, noise="x"),
    "mask is a list": lambda: ops.solver_step(X, X, TABLE, 0, mask=[1], known=X),
    "known is a int": lambda: ops.solver_step(X, X, TABLE, 0, known=3),
    "step is 'a'": lambda: ops.solver_step(X, X, TABLE, "a"),
    "step is 1.5": lambda: ops.sampler_step(X, X, FLOW, 1.5),
    "step is None": lambda: ops.sampler_step(X, X, FLOW, None),
    "table is a NoneType": lambda: ops.solver_step(X, X, None, 0),
    "sigmas is a list": lambda: ops.flow_euler_table([1.0, 0.0]),
    "sigmas has dtype": lambda: ops.flow_euler_table(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words):
    with pytest.raises((TypeError, ValueError), match="^" + words.replace("  ", " ")):
        REFUSED[words]()
