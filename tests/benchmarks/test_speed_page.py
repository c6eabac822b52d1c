"""docs/speed.md stands for the result files as they are, and says what misses its aim."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import speed_page  # noqa: E402


def test_page_is_up_to_date():
    assert (ROOT / "docs" / "speed.md").read_text() == speed_page.page(), "python benchmarks/speed_page.py --write docs/speed.md"


def test_what_misses_is_bold():
    assert speed_page.cell(1.999, 2) == "**2.00**" and speed_page.cell(2.0, 2) == "2.00" and speed_page.cell(None, 2) == ""
    assert speed_page.cell(1.501, 1.5, at_most=True) == "**1.50**" and speed_page.cell(1.5, 1.5, at_most=True) == "1.50"


def test_every_machine_has_every_kind_of_op():
    """Nothing is left out for want of a file that was renamed."""
    for folder in speed_page.MACHINES.values():
        found = {line[0] for line in speed_page.memory_bound(folder)}
        assert found >= {f"`{op}`" for op in ("adaln_modulate", "gate_residual_adaln", "qk_norm_rope", "rms_norm", "layer_norm_2d", "geglu", "group_norm_silu")}
        assert len(speed_page.attention(folder)) >= 5 and len(speed_page.steps(folder)) == 6
