"""The matrix: ``pytest tests/compat --matrix FILE`` puts a Markdown table of what passed, what does not apply and what is refused between two marks
of the file (``make compatibility``: the README). With ``--cells FILE`` the cells of several runs, each of some of the tests, add up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.compat.families import FAMILIES
from tests.one_thread import one_thread  # noqa: F401

MARKS = ("<!-- compatibility -->", "<!-- /compatibility -->")
COMPILED = ("test_two_resolutions", "test_compile", "test_compile_repeated_blocks")
_cells: dict[tuple[str, str], str] = {}
_columns: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--matrix", metavar="FILE", help="write the compatibility matrix there")
    parser.addoption("--cells", metavar="FILE", help="keep the cells there, and begin with those that are there")


def pytest_configure(config):
    config.addinivalue_line("markers", "column(name): the column of the compatibility matrix that a test fills")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tracing SDXL's U-Net takes a third of the compiled columns' time, and SD1.5's is of the same classes: `make test` leaves it to `make compatibility`."""
    for item in items:
        if item.path.name == "test_matrix.py" and item.callspec.params.get("family") == "SDXL" and item.originalname in COMPILED:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_old_graphs():
    yield
    torch._dynamo.reset()


def _add_up(file: Path) -> None:
    """Cells of columns, in the order of the file and then of this run; what ran now stands for what ran before."""
    kept = json.loads(file.read_text()) if file.is_file() else {}
    for (family, column), cell in _cells.items():
        kept.setdefault(column, {})[family] = cell
    file.write_text(json.dumps(kept, indent=1))
    _columns[:] = kept
    _cells.update({(family, column): cell for column, cells in kept.items() for family, cell in cells.items()})


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    marker, family = item.get_closest_marker("column"), getattr(item, "callspec", None) and item.callspec.params.get("family")
    if marker is None or family is None or report.when != "call" and not report.skipped and not report.failed:
        return
    name = marker.args[0]
    if name not in _columns:
        _columns.append(name)
    before = _cells.get((family, name), "yes")
    now = "yes"
    if report.failed:
        now = "**fails**"
    elif report.skipped:
        now = f"–: {report.longrepr[2].removeprefix('Skipped: ')}"
    elif refused := dict(report.user_properties).get("refused"):
        now = f"refused: {refused}"
    _cells[family, name] = "**fails**" if "**fails**" in (before, now) else now if now != "yes" or (family, name) not in _cells else before


def _short(cell: str, notes: dict[str, int]) -> str:
    """A cell whose reason is a numbered note below the table."""
    short, _, reason = cell.partition(": ")
    return f"{short} ({notes.setdefault(reason, len(notes) + 1)})" if reason else cell


def pytest_sessionfinish(session):
    file = session.config.getoption("--matrix")
    if not file or not _cells:  # under xdist the cells are in its workers
        return
    if keep := session.config.getoption("--cells"):
        _add_up(Path(keep))
    families = [name for name in FAMILIES if any(family == name for family, _ in _cells)]
    lines = ["| | " + " | ".join(families) + " |", "|---" * (1 + len(families)) + "|"]
    notes: dict[str, int] = {}
    lines += [f"| {column} | " + " | ".join(_short(_cells.get((family, column), ""), notes) for family in families) + " |" for column in _columns]
    lines += ["", "; ".join(f"({number}) {reason}" for reason, number in notes.items()) + "."] if notes else []
    text = Path(file).read_text()
    before, rest = text.split(MARKS[0], 1)
    Path(file).write_text("\n".join([before + MARKS[0], *lines, MARKS[1]]) + rest.split(MARKS[1], 1)[1])
