"""What one call of each public op costs on small tensors, under torch.no_grad as pipelines call them, beside the eager chain and torch.compile of it; and its overhead.

``python benchmarks/test_overhead.py [--rounds N] [--json FILE]``: 16 tokens of width 64, float32. The overhead is the time of the same call with no
token: every check, the choice of a backend, the registered op and its outputs, with nothing to compute. It is left out where another backend takes
an empty call, as for a linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import test_adaln
import test_gated_mlp
import test_norm
from alternating import main, measure, served
from fusewire import ops
from test_qk_norm_rope import eager as qk_norm

CALLS = 200  # per round: 5 us are near what one reading of the clock costs


def attention(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def joint_attention(q, k, v, q2, k2, v2):
    out = attention(torch.cat([q, q2], dim=1), torch.cat([k, k2], dim=1), torch.cat([v, v2], dim=1))
    return out[:, :q.shape[1]], out[:, q.shape[1]:]


def qk_norm_into(q, k, weight, q_out, k_out):
    q, k = qk_norm(q, k, weight, None)
    q_out.copy_(q)
    k_out.copy_(k)


def linear_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def euler(sample, model_output, dt):
    return sample + dt * model_output


def group_norm_silu(x, weight, bias):
    return F.silu(F.group_norm(x, 8, weight, bias, 1e-6))


def attention_varlen(q, k, v, cu_seqlens):
    return attention(q[None], k[None], v[None])[0]


def cases(tokens: int):
    """(op, under which its calls are counted, the call, the eager chain, the chain's arguments)."""
    x, y, row, shift = torch.randn(1, tokens, 64), torch.randn(1, tokens, 64), torch.randn(1, 64), torch.randn(1, 64)
    q, k, v = (torch.randn(1, tokens, 2, 32) for _ in range(3))
    out, weight, matrix, bias = (torch.empty_like(q), torch.empty_like(k)), torch.rand(32), torch.randn(64, 64) / 8, torch.randn(64)
    table, solver_table = ops.flow_euler_table(torch.tensor([1.0, 0.5, 0.0])), ops.solver_table(2, x=1.0, e=-0.5, e_m=1.0)
    wide, affine, picture = torch.randn(1, tokens, 128), (torch.rand(64), torch.randn(64)), torch.randn(1, 64, 4, tokens // 4)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)
    for name, given in (("adaln_modulate", (x, shift, row)), ("adaln_modulate_dual", (x, shift, row, row, shift)), ("gate_residual", (x, y, row)),
                        ("gate_residual_adaln", (x, y, row, shift, row))):
        yield name, name, lambda ours=getattr(ops, name), given=given: ours(*given), test_adaln.EAGER[name], given
    yield "attention", "attention", lambda: ops.attention(q, k, v), attention, (q, k, v)
    yield "joint_attention", "joint_attention", lambda: ops.joint_attention(q, k, v, q, k, v), joint_attention, (q, k, v, q, k, v)
    yield "qk_norm_rope", "qk_norm_rope", lambda: ops.qk_norm_rope(q, k, weight, weight), qk_norm, (q, k, weight, None)
    yield "qk_norm_into", "qk_norm_into", lambda: ops.qk_norm_into(q, k, weight, weight, *out), qk_norm_into, (q, k, weight, *out)
    for numerics in ("exact", "close"):
        yield (f"linear, GELU, {numerics}", "linear", lambda numerics=numerics: ops.linear(x, matrix, bias, activation="gelu_tanh", numerics=numerics),
               linear_gelu, (x, matrix, bias))
    for name in ("rms_norm", "layer_norm", "global_response_norm", "layer_norm_2d"):
        first = {"layer_norm_2d": picture, "global_response_norm": picture.permute(0, 2, 3, 1).contiguous()}.get(name, x)
        given, numerics = (first, *affine[:1 if name == "rms_norm" else 2]), "close" if name == "global_response_norm" else "exact"
        yield (name, name, lambda ours=getattr(ops, name), given=given, numerics=numerics: ours(*given, eps=1e-6, numerics=numerics),
               test_norm.EAGER[name], given)
    yield ("group_norm_silu", "group_norm_silu", lambda: ops.group_norm_silu(picture, 8, *affine, eps=1e-6), group_norm_silu, (picture, *affine))
    for name in ("geglu", "swiglu", "quick_gelu"):
        yield (name, name, lambda ours=getattr(ops, name): ours(wide, numerics="close"), getattr(test_gated_mlp, name), (wide,))
    yield ("attention_varlen", "attention_varlen", lambda: ops.attention_varlen(q[0], k[0], v[0], cu_seqlens), attention_varlen,
           (q[0], k[0], v[0], cu_seqlens))
    yield "solver_step", "solver_step", lambda: ops.solver_step(x, y, solver_table, 0), euler, (x, y, -0.5)
    yield "sampler_step", "flow_euler_step", lambda: ops.sampler_step(x, y, table, 0), euler, (x, y, -0.5)


def backend_of(counted: str, call) -> str:
    ops.reset_stats()
    call()
    return served(counted)


def measured(arguments) -> tuple[list[dict], dict]:
    """What each row says beside its times, and the median time of each (op, side)."""
    # One list of all sides, each once a round: where a machine is slower for some seconds, no op meets that alone. All are compiled before
    # the first is measured, as the compiler's workers take the cores when they start.
    sides, found = {}, []
    for (op, counted, ours, eager, given), (_, _, empty, _, _) in zip(cases(16), cases(0)):
        compiled = torch.compile(eager, dynamic=False)
        sides |= {(op, "ours"): ours, (op, "eager"): lambda eager=eager, given=given: eager(*given),
                  (op, "compile"): lambda compiled=compiled, given=given: compiled(*given)}
        backend = backend_of(counted, ours)
        if backend_of(counted, empty) == backend:
            sides[op, "ours, no tokens"] = empty
        found.append({"op": op, "size": list(given[0].shape), "dtype": "float32", "backend": backend})
    return found, measure(sides, arguments.rounds, inner=CALLS)


def rows(arguments):
    with torch.inference_mode(False), torch.no_grad():
        found, times = measured(arguments)
    for row in found:
        own = {side: time for (op, side), time in times.items() if op == row["op"]}
        yield {**row, **own, "eager/ours": round(own["eager"] / own["ours"], 2), "compile/ours": round(own["compile"] / own["ours"], 2)}


if __name__ == "__main__":
    main(__doc__, rows)
