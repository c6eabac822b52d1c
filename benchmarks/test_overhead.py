"""What one call of each public op costs on small tensors, under torch.no_grad as pipelines call them, beside the eager chain and torch.compile of it; and its overhead.

``python benchmarks/test_overhead.py [--rounds N] [--json FILE]``: 16 tokens of width 64, float32. The overhead is the time of the same call with no
token: every check, the choice of a backend, the registered op and its outputs, with nothing to compute. (An empty linear is PyTorch's own call.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import test_adaln
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


def cases(tokens: int):
    """(op, under which its calls are counted, the call, the eager chain, the chain's arguments)."""
    x, y, row, shift = torch.randn(1, tokens, 64), torch.randn(1, tokens, 64), torch.randn(1, 64), torch.randn(1, 64)
    q, k, v = (torch.randn(1, tokens, 2, 32) for _ in range(3))
    out, weight, matrix, bias = (torch.empty_like(q), torch.empty_like(k)), torch.rand(32), torch.randn(64, 64) / 8, torch.randn(64)
    table = ops.flow_euler_table(torch.tensor([1.0, 0.5, 0.0]))
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
    yield "sampler_step", "flow_euler_step", lambda: ops.sampler_step(x, y, table, 0), euler, (x, y, -0.5)


def measured(arguments) -> tuple[list[dict], dict]:
    """What each row says beside its times, and the median time of each (op, side)."""
    # One list of all sides, each once a round: where a machine is slower for some seconds, no op meets that alone. All are compiled before
    # the first is measured, as the compiler's workers take the cores when they start.
    sides, found = {}, []
    for (op, counted, ours, eager, given), (_, _, empty, _, _) in zip(cases(16), cases(0)):
        compiled = torch.compile(eager, dynamic=False)
        sides |= {(op, "ours"): ours, (op, "eager"): lambda eager=eager, given=given: eager(*given),
                  (op, "compile"): lambda compiled=compiled, given=given: compiled(*given), (op, "ours, no tokens"): empty}
        ops.reset_stats()
        ours()
        found.append({"op": op, "size": list(given[0].shape), "dtype": "float32", "backend": served(counted)})
    return found, measure(sides, arguments.rounds, inner=CALLS)


def rows(arguments):
    with torch.inference_mode(False), torch.no_grad():
        found, times = measured(arguments)
    for row in found:
        own = {side: time for (op, side), time in times.items() if op == row["op"]}
        yield {**row, **own, "eager/ours": round(own["eager"] / own["ours"], 2), "compile/ours": round(own["compile"] / own["ours"], 2)}


if __name__ == "__main__":
    main(__doc__, rows)
