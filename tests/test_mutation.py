"""The mutants of tests/mutants can still be applied, and docs/mutation.md is about them. (That tests kill them is `make mutation`.)"""

import os
import subprocess

import pytest

from tests import mutation
from tests.mutation import ROOMS

EVERY = [(room, mutant) for room in ROOMS for mutant in mutation.mutants(room)]


@pytest.mark.parametrize("room", ROOMS)
def test_every_old_text_occurs_exactly_once(room):
    found = mutation.mutants(room)
    for mutant in found:
        text = mutation.mutated(mutant)
        if not mutant.native:
            compile(text, mutant.file, "exec")
    assert len({mutant.what for mutant in found}) == len(found) and sum(not mutant.native for mutant in found) >= 8


@pytest.mark.parametrize("room", ROOMS)
def test_every_killer_is_there(room):
    for mutant in mutation.mutants(room):
        assert mutant.tests and all((mutation.ROOT / mutation.tests_of(room) / test).is_file() for test in mutant.tests), mutant.what


def test_the_page_is_what_the_results_make():
    results = mutation.finished(mutation.ROOT / "tests" / "mutants" / "results.json")
    assert results and (mutation.ROOT / "docs" / "mutation.md").read_text() == mutation.page(results), "make mutation"


def test_most_are_killed():
    """Four fifths of those that ran and are not equivalent: docs/mutation.md names the others."""
    equivalent = {(room, mutant.what) for room, mutant in EVERY if mutant.equivalent}
    results = mutation.finished(mutation.ROOT / "tests" / "mutants" / "results.json")
    counted = [r["result"] == "killed" for r in results if r["result"] == "killed" or (r["room"], r["what"]) not in equivalent]
    assert len(counted) >= 100 and sum(counted) >= 0.8 * len(counted)


def test_a_text_that_is_gone_is_an_error():
    mutant = EVERY[0][1]
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutation.mutated(mutant._replace(old="what is not there"))
    with pytest.raises(ValueError, match="times"):
        mutation.mutated(mutant._replace(old="import"))


def test_a_copy_that_is_kept(tmp_path, monkeypatch):
    """Only what differs is written again, so that a build there compiles no more than that."""
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    for name in ("same.cpp", "mutated.cpp", "edited.cpp", "gone.cpp"):
        (checkout / "csrc").mkdir(exist_ok=True)
        (checkout / "csrc" / name).write_text(name)
    monkeypatch.setattr(mutation, "ROOT", checkout)
    mutation.copy_of_the_checkout(copy)
    (copy / "csrc" / "mutated.cpp").write_text("a mutant")
    for path in copy.rglob("*.cpp"):
        os.utime(path, (1, 1))
    (checkout / "csrc" / "edited.cpp").write_text("edited")
    (checkout / "csrc" / "gone.cpp").unlink()
    mutation.copy_of_the_checkout(copy)
    assert {path.name: path.read_text() for path in copy.rglob("*.cpp")} == {"same.cpp": "same.cpp", "mutated.cpp": "mutated.cpp", "edited.cpp": "edited"}
    assert [path.name for path in copy.rglob("*.cpp") if path.stat().st_mtime == 1] == ["same.cpp"]


def test_a_mutant_of_csrc_is_not_there_for_the_next(tmp_path, monkeypatch):
    """What follows it, of Python or to prove it, runs with a library that is built of the sources as they are."""
    native, python = (next(mutant for _, mutant in EVERY if mutant.native is wanted) for wanted in (True, False))
    path, seen = tmp_path / native.file, []
    for mutant in (native, python):
        (tmp_path / mutant.file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / mutant.file).write_text((mutation.ROOT / mutant.file).read_text())
    plain = path.read_text()
    monkeypatch.setattr(mutation, "copy_of_the_checkout", lambda folder: folder)
    tree = mutation.Tree(tmp_path, True)
    monkeypatch.setattr(tree, "build", lambda: seen.append("plain" if path.read_text() == plain else "mutated") or True)
    monkeypatch.setattr(tree, "run", lambda tests: seen.append("run") or ("passed", ""))
    tree.outcome("adaln", native._replace(tests=native.tests[:1]))
    tree.outcome("adaln", python._replace(tests=python.tests[:1]))
    tree.outcome("adaln", python._replace(tests=python.tests[:1]))
    assert seen == ["mutated", "run", "plain", "run", "run"]
