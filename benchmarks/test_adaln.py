"""The adaLN ops against the eager chain, torch.compile of it (warm), and a clone of the outputs; with ``--gradients`` both directions against eager.

``python benchmarks/test_adaln.py [--case WORDS] [--gradients] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main, measure, served
from fusewire import ops
from gradients import gradients_option, with_backward
from registry import chosen


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# The eager chains, as diffusers' blocks spell them.
def adaln_modulate(x, shift, scale):
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


def adaln_modulate_dual(x, shift, scale, shift2, scale2):
    n = norm(x)
    return n * (1 + scale[:, None]) + shift[:, None], n * (1 + scale2[:, None]) + shift2[:, None]


def gate_residual(x, y, gate):
    return x + gate.unsqueeze(1) * y


def gate_residual_adaln(x, y, gate, shift, scale):
    x = x + gate.unsqueeze(1) * y
    return x, norm(x) * (1 + scale[:, None]) + shift[:, None]


EAGER = {f.__name__: f for f in (adaln_modulate, adaln_modulate_dual, gate_residual, gate_residual_adaln)}


def arguments_of(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x (and y), then shift, scale, gate as chunks of one projection, in which form the blocks have them."""
    x, y = (torch.randn(shape).to(dtype) for _ in range(2))
    shift, scale, gate, shift2, scale2 = torch.randn(shape[0], 5 * shape[2]).to(dtype).chunk(5, dim=1)
    return {"adaln_modulate": (x, shift, scale), "adaln_modulate_dual": (x, shift, scale, shift2, scale2), "gate_residual": (x, y, gate),
            "gate_residual_adaln": (x, y, gate, shift, scale)}[name]


def rows(arguments):
    for op, eager in EAGER.items():
        ours = getattr(ops, op)
        for case in chosen(op, arguments):
            for name in case.dtypes:
                given = arguments_of(op, case.shape, getattr(torch, name))
                compiled = torch.compile(eager, dynamic=False)
                stock, exact = eager(*given), ours(*given)
                outputs = stock if isinstance(stock, tuple) else (stock,)
                assert all(torch.equal(a, b) for a, b in zip(outputs, exact if isinstance(exact, tuple) else (exact,))), f"{op} in {name} is not exact"
                ops.reset_stats()
                shown = {"op": op, "shape": case.what, "size": list(case.shape), "dtype": name}
                if arguments.gradients:
                    times = with_backward(ours, eager, given, outputs, arguments.rounds)
                    yield {**shown, "backend": served(op), "backend of backward": served(f"{op}_backward"), **times,
                           "with backward, eager/close": round(times["eager with backward"] / times["close with backward"], 2)}
                    continue
                times = measure({
                    "exact": lambda: ours(*given),
                    "close": lambda: ours(*given, numerics="close"),
                    "clone": lambda: [out.clone() for out in outputs],
                    "compile": lambda: compiled(*given),
                    "eager": lambda: eager(*given),
                }, arguments.rounds)
                yield {**shown, "backend": served(op), **times,
                       "compile/exact": round(times["compile"] / times["exact"], 2), "eager/exact": round(times["eager"] / times["exact"], 2),
                       "exact/clone": round(times["exact"] / times["clone"], 2),
                       "GB/s": round(case.elements * given[0].element_size() / times["exact"] / 1e3, 1)}


if __name__ == "__main__":
    main(__doc__, rows, options=gradients_option)
