"""What the tests of the command line share."""

import pytest

from tests.tiny import tiny_pipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A tiny pipeline, saved."""
    path = tmp_path_factory.mktemp("pipes") / "tiny-sd3"
    tiny_pipeline().save_pretrained(path)
    return str(path)
