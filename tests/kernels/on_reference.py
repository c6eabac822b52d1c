"""Why tests are meant to run on the reference, for more rooms than one. conftest.py says what the mark is for.

``when`` takes the test's parameters: the mark holds for those values alone.
"""

import pytest
import torch


def _differ(dtypes, **_) -> bool:
    return dtypes[0] is not dtypes[1]


def _differ_but_for_float32_weights(dtypes, **_) -> bool:
    return _differ(dtypes) and not (dtypes[1] is torch.float32 and dtypes[0].itemsize == 2)


MIXED_DTYPES = pytest.mark.on_reference(when=_differ, reason="kernels take arguments of one dtype")
MIXED_DTYPES_OF_A_NORM = pytest.mark.on_reference(when=_differ_but_for_float32_weights, reason="the norms take float32 weights beside 16-bit rows, and no other mix")
EXACT = pytest.mark.on_reference(when=lambda numerics, **_: numerics == "exact", reason="exact keeps what PyTorch computes here")
