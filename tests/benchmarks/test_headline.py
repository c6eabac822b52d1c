"""The README's table of whole models stands for the result files as they are."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import headline  # noqa: E402


def test_table_is_up_to_date():
    readme = (ROOT / "README.md").read_text()
    assert readme == headline.placed(readme), "python benchmarks/headline.py --write README.md"
    assert all(f"| {model} | {dtype} |" in readme for model in headline.MODELS for dtype in headline.DTYPES)


@pytest.mark.parametrize("name", headline.MODELS.values())
def test_a_row_is_of_one_thing(name):
    """Of one model, depth and size, in all of its files."""
    files = [headline.file_of(folder, name, dtype) for folder in headline.CPUS.values() for dtype in headline.DTYPES]
    asked = {tuple(headline.option(file, option) for option in ("--preset", "--layers", "--size")) for file in files if file.is_file()}
    assert len(asked) == 1, asked


def test_ratio_is_to_the_better_side(tmp_path):
    def ratio(**times):
        file = tmp_path / "rows.json"
        file.write_text(json.dumps({"rows": [{"side": side, "median": time} for side, time in times.items()]}))
        return headline.ratio(file)

    assert ratio(eager=30.0, compile=20.0, close=10.0) == 2.0 and ratio(eager=5.0, compile=9.0, close=10.0) == 0.5
    assert ratio(eager=30.0, close=10.0, openvino=5.0) == 3.0
    assert headline.ratio(tmp_path / "none.json") is None
    with pytest.raises(KeyError):
        ratio(eager=30.0)
