"""docs/bug-classes.md is what its script makes of the tests, and every hole in it has a reason."""

import pytest

from tests import bug_classes


def test_page_is_up_to_date():
    page = bug_classes.ROOT / "docs" / "bug-classes.md"
    assert page.read_text() == bug_classes.page(), "python -m tests.bug_classes --write docs/bug-classes.md"


def test_every_hole_has_a_reason():
    assert bug_classes.holes(bug_classes.table()) == set(bug_classes.NOT_YET)


def test_what_is_listed_by_hand_is_there():
    there = {(path, name) for path, name, _ in bug_classes.tests()}
    assert all((path, name) in there for path, listed in bug_classes.ALSO.items() for name in listed)
    assert all(row in bug_classes.CLASSES for listed in bug_classes.ALSO.values() for rows in listed.values() for row in rows.split())


@pytest.mark.parametrize("name, doc, rows", [
    ("test_batch_coupling", "", {"batch-coupling"}),
    ("test_empty", "", {"empty"}),
    ("test_not_empty_handed", "", set()),
    ("test_x", "strided-input, misaligned: the same bits", {"strided-input", "misaligned"}),
    ("test_x", "The tail of an empty stream", set()),
    ("test_x", "An expanded gradient (strided-grad).", {"strided-grad"}),
])
def test_what_belongs_to_a_class(name, doc, rows):
    assert bug_classes.classes_of("tests/kernels/none.py", name, doc) == rows
