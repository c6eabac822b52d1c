"""group_norm_silu against the eager chain, torch.compile of it (warm), and a clone of the output; forward, and with ``--gradients`` a whole step.

``python benchmarks/test_group_norm_silu.py [--case WORDS] [--gradients] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main, measure, served
from fusewire import ops
from gradients import gradients_option
from registry import chosen

GROUPS = 32


def eager(x, weight, bias):
    return F.silu(F.group_norm(x, GROUPS, weight, bias, 1e-5))


def step(function, x, weight, bias, grad):
    """Forward and backward, as one training step has them."""
    return torch.autograd.grad(function(x, weight, bias), (x, weight, bias), grad)


def rows(arguments):
    op = "group_norm_silu"
    for case in chosen(op, arguments):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for name in case.dtypes:
                dtype = getattr(torch, name)
                given = [torch.randn(case.shape).to(dtype).contiguous(memory_format=memory_format), *torch.randn(2, case.shape[1]).to(dtype)]
                ours = {numerics: lambda x, w, b, n=numerics: ops.group_norm_silu(x, GROUPS, w, b, numerics=n) for numerics in ("exact", "close")}
                torch._dynamo.reset()  # beyond eight shapes it would give up, and time eager under the name of compile
                compiled, out = torch.compile(eager, dynamic=False), eager(*given)
                assert torch.equal(ours["exact"](*given), out), f"{case.shape} in {name} is not exact"
                ops.reset_stats()
                shown = {"op": op, "shape": case.what, "size": list(case.shape), "format": str(memory_format).removeprefix("torch."), "dtype": name}
                if arguments.gradients:
                    with torch.inference_mode(False):
                        leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in given]
                        grad = torch.randn(case.shape).to(dtype).contiguous(memory_format=memory_format)
                        times = measure({
                            "close": lambda: step(ours["close"], *leaves, grad),
                            "compile": lambda: step(compiled, *leaves, grad),
                            "eager": lambda: step(eager, *leaves, grad),
                        }, arguments.rounds)
                    yield {**shown, "backend": served(op), "backward": served(f"{op}_backward"), **times,
                           "compile/close": round(times["compile"] / times["close"], 2), "eager/close": round(times["eager"] / times["close"], 2)}
                    continue
                times = measure({
                    "exact": lambda: ours["exact"](*given),
                    "close": lambda: ours["close"](*given),
                    "clone": lambda: out.clone(),
                    "compile": lambda: compiled(*given),
                    "eager": lambda: eager(*given),
                }, arguments.rounds)
                yield {**shown, "backend": served(op), **times,
                       **{f"{other}/{mine}": round(times[other] / times[mine], 2) for mine in ("exact", "close") for other in ("compile", "eager")},
                       "exact/clone": round(times["exact"] / times["clone"], 2), "close/clone": round(times["close"] / times["clone"], 2),
                       "GB/s": round(case.elements * given[0].element_size() / times["exact"] / 1e3, 1)}


if __name__ == "__main__":
    main(__doc__, rows, options=gradients_option)
