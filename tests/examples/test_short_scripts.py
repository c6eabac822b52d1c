"""The short scripts run as they stand, on a folder of the user's."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_pipeline

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("examples") / "tiny-sd3"
    tiny_pipeline().save_pretrained(path)
    return str(path)


def output(name, folder, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [name, folder])
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
    return capsys.readouterr().out


def test_swap(folder, monkeypatch, capsys):
    text = output("swap.py", folder, monkeypatch, capsys)
    assert "the same bits as stock: True" in text and "the same bits after restoring: True" in text


def test_parity(folder, monkeypatch, capsys):
    assert "every verdict holds: True" in output("parity.py", folder, monkeypatch, capsys)


def test_profile(folder, monkeypatch, capsys):
    text = output("profile_pipeline.py", folder, monkeypatch, capsys)
    assert "text encoders" in text and "close" in text


def test_read_swapped_digits(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["read_swapped_digits.py", "--count", "2", "--steps", "2"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "read_swapped_digits.py"), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert [(row["dtype"], row["numerics"]) for row in report["rows"]] == [(d, n) for d in ("float32", "bfloat16") for n in ("exact", "close")]
    assert all(row["equal"] for row in report["rows"] if row["numerics"] == "exact")
    assert stop.value.code == (0 if all(row["read the same"] == 2 for row in report["rows"]) else 1)
