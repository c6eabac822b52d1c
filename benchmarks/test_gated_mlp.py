"""The gated activations, forward and with backward, against the eager chains, torch.compile of them (warm), and a clone of the output.

``python benchmarks/test_gated_mlp.py [--case WORDS] [--rounds N] [--json FILE]``. Only ``close`` is measured: ``exact`` is the eager chain itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from alternating import main
from fusewire import ops
from gradients import row
from registry import case_option, chosen


# The eager chains, as diffusers' modules spell them after their projection.
def geglu(x):
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def swiglu(x):
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.silu(gate)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def rows(arguments):
    for eager in (geglu, swiglu, quick_gelu):
        op = eager.__name__
        for case in chosen(op, arguments):
            for name in case.dtypes:
                yield row(op, case, name, getattr(ops, op), eager, (torch.randn(case.shape).to(getattr(torch, name)),), arguments.rounds, ("close",))


if __name__ == "__main__":
    main(__doc__, rows, options=case_option)
