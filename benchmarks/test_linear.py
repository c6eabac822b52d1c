"""Linear layers with an epilogue against eager PyTorch; with ``--gradients`` both directions.

``python benchmarks/test_linear.py [--case WORDS] [--gradients] [--rounds N] [--json FILE]``
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main, measure, served
from fusewire import ops
from gradients import gradients_option, with_backward
from registry import chosen

ACTIVATIONS = {"gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}


def epilogues(batch: int, tokens: int, outputs: int, dtype: torch.dtype):
    """(name, arguments beside x, weight and bias, ours, eager), in the places where SD3.5's feed-forward and its projections have them."""
    yield "none", (), lambda x, w, b, numerics: ops.linear(x, w, b, numerics=numerics), F.linear
    for name, function in ACTIVATIONS.items():
        yield (name, (), lambda x, w, b, numerics, name=name: ops.linear(x, w, b, activation=name, numerics=numerics),
               lambda x, w, b, function=function: function(F.linear(x, w, b)))
    gate, residual = torch.randn(batch, outputs).to(dtype), torch.randn(batch, tokens, outputs).to(dtype)
    yield ("gate, residual", (gate, residual), lambda x, w, b, g, r, numerics: ops.linear(x, w, b, gate=g, residual=r, numerics=numerics),
           lambda x, w, b, g, r: r + g[:, None] * F.linear(x, w, b))


def rows(arguments):
    for case in chosen("linear", arguments):
        batch, tokens, inputs, outputs = case.shape
        for name in case.dtypes:
            dtype = getattr(torch, name)
            given = torch.randn(batch, tokens, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(outputs).to(dtype)
            for epilogue, rest, ours, eager in epilogues(batch, tokens, outputs, dtype):
                if (epilogue == "gate, residual") != (outputs < inputs):  # the second linear of a feed-forward has them, the first an activation
                    continue
                ops.reset_stats()
                shown = {"shape": case.what, "size": list(case.shape), "dtype": name, "epilogue": epilogue}
                if arguments.gradients:
                    times = with_backward(ours, eager, (*given, *rest), (eager(*given, *rest),), arguments.rounds)
                    yield {**shown, "backend": served("linear"), **times,
                           "with backward, eager/close": round(times["eager with backward"] / times["close with backward"], 2)}
                    continue
                times = measure({"close": lambda: ours(*given, *rest, numerics="close"), "eager": lambda: eager(*given, *rest)}, arguments.rounds)
                yield {**shown, "backend": served("linear"), **times, "eager/close": round(times["eager"] / times["close"], 2)}


if __name__ == "__main__":
    main(__doc__, rows, rounds=7, options=gradients_option)
