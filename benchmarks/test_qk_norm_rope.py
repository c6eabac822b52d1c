"""QK norm against the eager formula, torch.compile of it (warm), and a clone of the outputs; with ``--gradients`` both directions against eager.

``python benchmarks/test_qk_norm_rope.py [--case WORDS] [--gradients] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import torch

from alternating import main, measure, served
from fusewire import ops
from gradients import gradients_option, with_backward
from registry import chosen


def eager(q, k, weight, rope):
    """diffusers' RMSNorm and apply_rotary_emb, as formulas that torch.compile can fuse."""
    def one(x):
        y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
        y = (y.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else y) * weight
        if rope is None:
            return y
        real, imaginary = y.reshape(*y.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return (y.float() * rope[0][None, :, None] + turned.float() * rope[1][None, :, None]).to(y.dtype)

    return one(q), one(k)


def rows(arguments):
    for case in chosen("qk_norm_rope", arguments):
        for name in case.dtypes:
            dtype = getattr(torch, name)
            q, k, weight = torch.randn(case.shape).to(dtype), torch.randn(case.shape).to(dtype), torch.rand(case.shape[-1]).to(dtype)
            with torch.inference_mode(False):  # tables that a gradient may be computed from
                angle = torch.randn(case.shape[1], case.shape[3] // 2)
                rope = (angle.cos(), angle.sin()) if "rotated" in case.what else None
                doubled = None if rope is None else tuple(table.repeat_interleave(2, dim=-1) for table in rope)
            ops.reset_stats()
            shown = {"shape": case.what, "size": list(case.shape), "dtype": name}
            if arguments.gradients:
                times = with_backward(lambda q, k, weight, numerics: ops.qk_norm_rope(q, k, weight, weight, rope=rope, numerics=numerics),
                                      lambda q, k, weight: eager(q, k, weight, doubled), (q, k, weight), (q, k), arguments.rounds)
                yield {**shown, "backend": served("qk_norm_rope"), "backend of backward": served("qk_norm_rope_backward"), **times,
                       "with backward, eager/close": round(times["eager with backward"] / times["close with backward"], 2)}
                continue
            q_out, k_out = torch.empty_like(q), torch.empty_like(k)
            compiled = torch.compile(eager, dynamic=False)
            times = measure({
                "exact": lambda: ops.qk_norm_rope(q, k, weight, weight, rope=rope),
                "close": lambda: ops.qk_norm_rope(q, k, weight, weight, rope=rope, numerics="close"),
                "into": lambda: ops.qk_norm_into(q, k, weight, weight, q_out, k_out, rope=rope),
                "clone": lambda: (q.clone(), k.clone()),
                "compile": lambda: compiled(q, k, weight, doubled),
                "eager": lambda: eager(q, k, weight, doubled),
            }, arguments.rounds)
            yield {**shown, "backend": served("qk_norm_rope"), **times,
                   "compile/exact": round(times["compile"] / times["exact"], 2), "exact/clone": round(times["exact"] / times["clone"], 2),
                   "GB/s": round(case.elements * q.element_size() / times["exact"] / 1e3, 1)}


if __name__ == "__main__":
    main(__doc__, rows, options=gradients_option)
