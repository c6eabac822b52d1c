"""A command in this process."""

from typer.testing import CliRunner

from fusewire.cli import app


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))
