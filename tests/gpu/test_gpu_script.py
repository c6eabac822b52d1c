"""benchmarks/gpu.py runs from end to end, on tiny shapes in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_dry_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry", "--json", tmp_path / "gpu.json"], env=environment, check=True)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    sides = {(row["op"], row["side"]) for row in rows}
    for op in ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "flow_euler_step", "linear gate residual"):
        assert {(op, "eager"), (op, "triton exact"), (op, "triton close")} <= sides
    assert {(op, "triton close") for op in ("attention", "joint_attention", "group_norm_silu")} <= sides
    assert all(row["difference"] < 0.1 for row in rows)
    assert all(row["difference"] == 0 for row in rows if row["side"] == "triton exact")
