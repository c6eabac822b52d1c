"""tests/own_suites.py swaps what a suite makes, and tells what fails swapped alone. (That diffusers' own tests pass is `make own-suites`.)"""

import subprocess
import sys

import pytest

from tests import own_suites

SUITE = """
import torch
from diffusers import DDIMScheduler

def test_both():
    assert DDIMScheduler().config.num_train_timesteps == 1000

def test_neither():
    assert DDIMScheduler() is None

def test_of_the_class():
    assert type(DDIMScheduler()) is DDIMScheduler

def test_loaded(tmp_path):
    DDIMScheduler().save_pretrained(tmp_path)
    assert type(DDIMScheduler.from_pretrained(tmp_path)) is not DDIMScheduler

def test_step():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    scheduler.step(torch.zeros(1, 4), scheduler.timesteps[0], torch.zeros(1, 4))
"""


def outcome(result="passed", fused=0, message=""):
    return dict(outcome=result, fused=fused, message=message)


@pytest.mark.slow  # two runs of a suite, each in processes of its own
def test_a_small_suite(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_small.py").write_text(SUITE)
    outcomes, page = tmp_path / "outcomes.jsonl", tmp_path / "page.md"
    command = [sys.executable, own_suites.__file__, str(tmp_path), "test_small.py", "--outcomes", str(outcomes), "--numerics", "exact"]
    subprocess.run([*command, "--numerics", "stock", "--source", "small", "--write", str(page)], check=True, capture_output=True)
    found = {test.split("::")[1]: {numerics: result["outcome"] for numerics, result in results.items()}
             for test, results in own_suites.read(outcomes).items()}
    assert found == {"test_both": {"exact": "passed"}, "test_neither": {"exact": "failed", "stock": "failed"},
                     "test_of_the_class": {"exact": "failed", "stock": "passed"}, "test_loaded": {"exact": "passed"}, "test_step": {"exact": "passed"}}
    text = page.read_text()
    assert "| test_small.py | 5 | 3 | 1 | – | 1 | 0 | 1 | – |" in text and "`test_small.py::test_of_the_class`, exact: **not explained**" in text
    before = outcomes.read_text()
    subprocess.run(command, check=True, capture_output=True)
    assert outcomes.read_text() == before  # what has an outcome is not run again


def test_a_test_that_was_not_run_stock_is_not_passed_over():
    outcomes = {"tests/a.py::b": {"exact": outcome("failed")}}
    with pytest.raises(ValueError, match="has not been run stock"):
        own_suites.page(outcomes, {})
    outcomes["tests/a.py::b"]["stock"] = outcome("failed")
    outcomes["tests/a.py::c"] = {"exact": outcome(fused=3), "close": outcome("failed"), "stock": outcome()}
    text = own_suites.page(outcomes, {"suite": "the suite"})
    assert "| a.py | 2 | 1 | 1 | – | 1 | 0 | 0 | – |" in text and "`a.py::c`, close" in text and "the suite" in text and "Not run: " in text
    outcomes["tests/a.py::b"]["close"] = outcome()
    assert "| a.py | 2 | 1 | 1 | 1 | 1 | 0 | 0 | 1 |" in own_suites.page(outcomes, {})


def test_the_page_keeps_what_was_not_run_again():
    first = own_suites.page({"tests/a.py::b": {"exact": outcome(fused=2)}, "tests/c.py::d": {"exact": outcome(), "close": outcome()}}, {"suite": "one"})
    again = {"tests/a.py::b": {"exact": outcome(fused=2), "close": outcome()}}
    text = own_suites.page(again, {"suite": "one"}, first)
    assert "| a.py | 1 | 1 | 1 | 1 | 0 | 0 | 0 | 0 |" in text and "| c.py | 1 | 1 | 0 | 1 | 0 | 0 | 0 | 0 |" in text and "| **all** | 2 | 2 | 1 | 2 |" in text
    assert own_suites.page(again, {"suite": "one"}, text) == text
    assert "| c.py" not in own_suites.page(again, {"suite": "another"}, first)


@pytest.mark.parametrize("swapped, stock, row", [("failed", "skipped", "0 | 1 | 1"), ("skipped", "failed", "1 | 0 | 1"), ("failed", "failed", "1 | 0 | 0")])
def test_what_fails_swapped_fails_stock(swapped, stock, row):
    text = own_suites.page({"tests/a.py::b": {"exact": outcome(swapped), "stock": outcome(stock)}}, {})
    assert f"| a.py | 1 | 0 | 0 | – | {row} | – |" in text and ("`a.py::b`, exact" in text) is (swapped != stock)


@pytest.mark.parametrize("exact, listed", [("at 0x7f01: 0.25", False), ("at 0x7f02: 0.26", True), ("ImportError", True)])
def test_in_exact_it_fails_with_the_same_message(exact, listed):
    """A test that fails stock cannot hide that it fails otherwise swapped; what differs from process to process does not count."""
    text = own_suites.page({"tests/a.py::b": {"exact": outcome("failed", 0, exact), "stock": outcome("failed", 0, "at 0x7f00: 0.25")}}, {})
    assert ("but for:\n\n- `a.py::b`: **not explained**" in text) is listed


def test_tokenizers_stand_in_alike_in_each_process(tmp_path):
    """Otherwise a picture that a prompt makes differs between the run stock and the run swapped."""
    command = [sys.executable, "-c", "import sys; from pathlib import Path; from tests.own_suites import stand_ins; stand_ins(Path(sys.argv[1]))"]
    subprocess.run([*command, str(tmp_path / "one")], check=True, capture_output=True, cwd=own_suites.ROOT)
    own_suites.stand_ins(tmp_path / "two")
    one, two = ({file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*") if file.is_file()} for name in ("one", "two"))
    assert len(one) >= 10 and one == two


def test_the_page_has_nothing_unexplained():
    text = (own_suites.ROOT / "docs" / "own-suites.md").read_text()
    assert "| **all** |" in text and "not explained" not in text, "make own-suites"
