"""docs/bug-classes.md is what its script makes of the tests, and each class and op in it has a test or a reason."""

import pytest

from tests import bug_classes, reached


def test_page_is_up_to_date():
    page = bug_classes.ROOT / "docs" / "bug-classes.md"
    assert page.read_text() == bug_classes.page(), "make bug-classes"


def test_every_cell_has_a_test_or_a_reason():
    assert not bug_classes.faults(bug_classes.table())
    given = [(row, op) for rows, ops, _ in bug_classes.HOLES for row in rows for op in ops]
    assert len(given) == len(set(given)) and all(row in bug_classes.CLASSES and op in bug_classes.OPS for row, op in given)
    assert all(reason for *_, reason in bug_classes.HOLES)


def test_a_cell_without_either_is_found():
    found = bug_classes.table()
    found["tail"]["linear"], found["head-dim"]["linear"] = [], ["tests/none.py::test_none"]
    assert bug_classes.faults(found) == ["head-dim, linear: a reason and tests", "tail, linear: no test and no reason"]


def test_classes_of_the_whole_project_have_tests():
    assert all(bug_classes.ids()[row] for row in bug_classes.OF_THE_WHOLE)


def test_what_is_recorded_is_there():
    """Every test of a class has an entry, and every entry a test: `make bug-classes` runs those that have none."""
    assert {path: set(tests) for path, tests in reached.load().items()} == bug_classes.with_classes(), "make bug-classes"


def test_every_public_op_is_a_column():
    from tests.kernels.test_backends import CALLS

    assert set(bug_classes.OPS) == set(CALLS) and sorted(op for _, ops in bug_classes.TABLES for op in ops) == sorted(bug_classes.OPS)
    assert {counted: reached.public(counted) for *_, counted in CALLS.values()} == {counted: name for name, (*_, counted) in CALLS.items()}


@pytest.mark.parametrize("name, op", [("attention_varlen_backward_triton", "attention_varlen"), ("attention_softmax", "attention"), ("linear", "linear"),
                                      ("bias_activation_backward", "linear"), ("flow_euler_step_cuda", "sampler_step"), ("conv_patches", None)])
def test_public(name, op):
    assert reached.public(name) == op


def test_what_is_read(tmp_path, monkeypatch):
    """A test's own names, those of what it uses, in its file and in others, and no others."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "cases.py").write_text("def call(x):\n    return ops.linear(x)\n\ndef other(x):\n    return ops.attention(x)\n")
    (tmp_path / "tests" / "test_x.py").write_text(
        "from tests.cases import call, other\nNAMES = ['rms_norm', 'nothing']\n\ndef unused():\n    ops.geglu(1)\n\n"
        "def test_x():\n    for name in NAMES:\n        call(getattr(ops, name))\n    torch.ops.fusewire.swiglu_backward\n    'quick_gelu_triton'\n")
    monkeypatch.setattr(reached, "ROOT", tmp_path)
    assert reached.read(tmp_path / "tests" / "test_x.py", "test_x") == {"linear", "rms_norm", "swiglu", "quick_gelu"}


def test_what_is_listed_by_hand_is_there():
    there = {(path, name) for path, name, _ in bug_classes.tests()}
    assert all((path, name) in there for listed in (bug_classes.ALSO, reached.BEHIND) for path, names in listed.items() for name in names)
    rows = {*bug_classes.CLASSES, *bug_classes.OF_THE_WHOLE}
    assert all(row in rows for listed in bug_classes.ALSO.values() for named in listed.values() for row in named.split())


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
