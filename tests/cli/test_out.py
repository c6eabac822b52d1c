"""What cannot be written is said in one line: before the work where a folder is named, and whenever a disk is full."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.demo import check_out
from fusewire.errors import BadInput
from tests.cli.runner import run


def one_line(result, *words):
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert result.stderr.startswith("fusewire: ") and result.stderr.count("\n") == 1 and all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("place", ["file", "file/x", "file/x/y", "taken", "link", pytest.param("/proc/foo/bar", marks=pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="there is no /proc"))])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(monkeypatch, tmp_path, place):
    monkeypatch.setattr("fusewire.demo._measure", lambda *args: pytest.fail("the work began"))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.rglob("*"))
    result = run("demo", "--preset", "sd3-tiny", "--out", str(tmp_path / place))
    one_line(result, f"--out is {str(tmp_path / place)!r}", "it should be a folder that is there or can be made")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


def test_trying_a_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "report.json").write_text("of before")
    for out in (tmp_path / "a" / "b" / "c", Path("d/e"), Path("there"), Path("there/f"), Path(".")):
        check_out(out)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "there", tmp_path / "there" / "report.json"]
    assert (tmp_path / "there" / "report.json").read_text() == "of before"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="--out is .*Permission denied"):
        check_out(tmp_path / "report")
    tmp_path.chmod(0o700)


def test_a_disk_that_fills_up_meanwhile(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fusewire.demo._measure", lambda *args: None)
    monkeypatch.setattr("fusewire.report.page.write", full)
    one_line(run("demo", "--preset", "sd3-tiny", "--out", str(tmp_path)), f"--out is {str(tmp_path)!r}", "No space left on device")


def test_any_other_file_is_named(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "some/file")

    monkeypatch.setattr("fusewire.targets.load", full)
    one_line(run("parity", "sd3-tiny"), "some/file: Read-only file system")


def test_bad_dtypes_are_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr("fusewire.demo._measure", lambda *args: pytest.fail("the work began"))
    one_line(run("demo", "--preset", "sd3-tiny", "--dtype", "float32", "--dtype", "int8", "--out", str(tmp_path / "x")), "dtype is 'int8'")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.slow
def test_standard_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "fusewire", "swap", "--dry-run", "sd3-tiny"], stdout=full, stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, timeout=120)
    assert done.returncode == 2 and done.stderr == "fusewire: a file or standard output cannot be written: No space left on device\n", done.stderr
