"""Attention against PyTorch's, in turn in one process, on the shapes of real models.

``python benchmarks/attention.py [--case WORDS] [--rounds N] [--training | --prologue] [--json FILE]``: median times, GFLOP/s
(4 * B * H * Tq * Tk * D, softmax not counted) and their ratio. ``--training``: of the gradients of q, k and v alone (10 instead of 4), and of both directions together. ``--prologue``: with RMS norm and
rotation of q and k, within attention, or by ``qk_norm_rope`` before it, against FLUX.1's eager calls in diffusers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main, measure, served
from fusewire import ops
from registry import case_option, chosen


def rows(arguments):
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for case in chosen("attention", arguments):
            batch, queries, keys, heads, channels = case.shape
            q, k, v = (torch.randn(batch, tokens, heads, channels).to(dtype) for tokens in (queries, keys, keys))
            ops.reset_stats()
            if arguments.prologue:
                if queries != keys:
                    continue  # only tokens of one sequence have places of their own
                measured = prologue(q, k, v, arguments.rounds)
            else:
                measured = training(q, k, v, arguments.rounds) if arguments.training else inference(q, k, v, arguments.rounds, case.flops)
            backend = served("attention_backward" if arguments.training else "attention")
            yield {"shape": case.what, "size": list(case.shape), "dtype": str(dtype)[6:], "backend": backend, **measured}


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def options(parser) -> None:
    case_option(parser)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--training", action="store_true", help="the gradients")
    kind.add_argument("--prologue", action="store_true", help="with RMS norm and rotation of q and k")


def inference(q, k, v, rounds: int, flops: int) -> dict:
    times = measure({"close": lambda: ops.attention(q, k, v), "sdpa": lambda: sdpa(q, k, v)}, rounds, warm=1)
    return {**times, "close GFLOP/s": round(flops / times["close"] / 1e3), "sdpa GFLOP/s": round(flops / times["sdpa"] / 1e3),
            "sdpa/close": round(times["sdpa"] / times["close"], 2)}


def prologue(q, k, v, rounds: int) -> dict:
    tokens, channels = q.shape[1], q.shape[3]
    weights = [torch.rand(channels).to(q.dtype) + 0.5 for _ in range(2)]
    angles = torch.rand(tokens, channels // 2) * 6.3
    tables = angles.cos(), angles.sin()
    twice = [table.repeat_interleave(2, dim=-1)[None, :, None] for table in tables]  # as FluxPosEmbed gives them

    def turned(x, weight):
        x = F.rms_norm(x, (channels,), weight, 1e-6)
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        other = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return (x.float() * twice[0] + other.float() * twice[1]).to(x.dtype)

    def apart():
        return ops.attention(*ops.qk_norm_rope(q, k, *weights, rope=tables, norm="torch_rms", numerics="close"), v)

    times = measure({"close": lambda: ops.attention(q, k, v, q_weight=weights[0], k_weight=weights[1], rope=tables), "apart": apart,
                     "eager": lambda: sdpa(turned(q, weights[0]), turned(k, weights[1]), v)}, rounds, warm=1)
    return {**times, "apart/close": round(times["apart"] / times["close"], 2), "eager/close": round(times["eager"] / times["close"], 2)}


def training(q, k, v, rounds: int) -> dict:
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        grad = torch.randn(q.shape).to(q.dtype)
        sides = {"close": ops.attention, "sdpa": sdpa}
        outs = {name: call(*inputs) for name, call in sides.items()}
        backward = measure({name: lambda out=out: torch.autograd.grad(out, inputs, grad, retain_graph=True) for name, out in outs.items()}, rounds, warm=1)
        both = measure({name: lambda call=call: torch.autograd.grad(call(*inputs), inputs, grad) for name, call in sides.items()}, rounds, warm=1)
    return {"close backward": backward["close"], "sdpa backward": backward["sdpa"], "close both": both["close"], "sdpa both": both["sdpa"],
            "backward sdpa/close": round(backward["sdpa"] / backward["close"], 2), "both sdpa/close": round(both["sdpa"] / both["close"], 2)}


if __name__ == "__main__":
    main(__doc__, rows, rounds=9, options=options)
