"""Attention at the ISA levels below this processor's own, at which the other tests run: the same accuracy, forwards and backwards."""

import pytest

from fusewire.kernels.library import ISA_LEVELS
from tests.effort import EFFORT
from tests.kernels.isa_levels import run_at

FEWER = EFFORT == 1  # `make test-all` takes the gradients of all patterns and sizes too
SELECTION = {
    "test_attention.py": "cpu and (test_against_float64 or test_joint) and not (160 or 512 or 100 or 256) or test_nan_under_mask",
    "test_varlen.py": f"cpu and against_float64 and not (float64-{' or gradients and 160' * FEWER})",
    "test_patterns.py": "together or hidden" if FEWER else "against_float64 and not (float64- or reference) or together or hidden",
    "test_backward.py": "test_against_float64 and not (512 or 256) or test_log_sum_exp or test_any_shape",
}


@pytest.mark.parametrize("level", ISA_LEVELS[:-1])
def test_every_isa_level(level):
    run_at(level, __file__, SELECTION)
