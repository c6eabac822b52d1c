"""A kernel that is wrong on purpose: a check that does not notice it is worth nothing."""

from __future__ import annotations

from fusewire.kernels import dispatch


def spoil(monkeypatch, op: str, change) -> None:
    """Make backend ``cpu`` of an op return ``change(what the reference returns)``, whether or not a library is built here."""
    table = dispatch.TABLES[op]
    reference = next(row for row in table.rows if row.name == "reference")
    monkeypatch.setattr(table, "rows", [dispatch.Backend("cpu", dispatch.always, lambda *args: change(reference.run(*args))), reference])
    monkeypatch.setattr(table, "calls", {"cpu": 0, "reference": 0})
