"""Ctrl-C loses nothing: what is complete is shown or written, one line says so, and the exit code is 130."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import fusewire
from fusewire import targets
from fusewire.interrupt import undisturbed
from tests.cli.runner import run

# A shell's background job, such as these tests may be part of, hands on SIGINT as ignored
CODE = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from fusewire.cli import main; print('ready', flush=True); main()"
SHORT = ("--preset", "sd3.5-tiny", "--dtype", "fp32", "--steps", "2", "--seeds", "1", "--rounds", "1", "--no-compile")
OTHERS = ["profile of tiny-sd3, float32", "parity of sd3.5-tiny, float32", "profile of sd3.5-tiny, float32"]


def interrupt(monkeypatch, name, at=1):
    """Ctrl-C in the ``at``-th call of the function ``name``."""
    module, _, function = name.rpartition(".")
    genuine, count = getattr(sys.modules[module], function), iter(range(1, 10**6))

    def call(*args, **kwargs):
        if next(count) >= at:
            raise KeyboardInterrupt
        return genuine(*args, **kwargs)

    monkeypatch.setattr(sys.modules[module], function, call)


def one_line(result, *words):
    assert result.exit_code == 130 and result.stderr.startswith("fusewire: interrupted") and result.stderr.count("\n") == 1, result.output
    assert all(word in result.stderr for word in words), result.stderr


def untimed(row):
    return {key: value for key, value in row.items() if not key.endswith("_us") and not key.startswith("against_")}


@pytest.mark.parametrize("command, name, at, complete", [
    (("parity", "sd3-tiny"), "fusewire.parity.ops.measure", 4, 3),
    (("parity", "sd3-tiny", "--level", "block"), "fusewire.parity.blocks.measure", 2, 1),
    (("parity", "sd3-tiny", "--level", "model"), "fusewire.parity.blocks.measure", 2, 1),
    (("bench", "sd3-tiny", "--op", "adaln_modulate", "--rounds", "1"), "fusewire.profile.bench._rows", 2, 1)])
def test_complete_rows_are_kept(monkeypatch, command, name, at, complete):
    import fusewire.profile.bench  # noqa: F401  (sys.modules has it)

    whole = json.loads(run(*command, "--json").stdout)
    interrupt(monkeypatch, name, at)
    result = run(*command, "--json")
    data = json.loads(result.stdout)
    one_line(result, f"{complete} rows")
    assert data["interrupted"] is True and data["ok"] is False and whole["interrupted"] is False and whole["ok"] is True
    assert len(data["rows"]) == complete < len(whole["rows"])
    assert [untimed(row) for row in data["rows"]] == [untimed(row) for row in whole["rows"][:complete]]
    assert data["machine"]["threads"] == whole["machine"]["threads"]


def test_complete_rows_are_shown(monkeypatch):
    interrupt(monkeypatch, "fusewire.parity.ops.measure", 3)
    result = run("parity", "sd3-tiny")
    one_line(result, "2 rows")
    assert "Parity: sd3-tiny" in result.stdout and result.stdout.count("holds") == 2


@pytest.mark.parametrize("name, at, rounds, kinds", [
    ("fusewire.profile.timing.seconds", 3 + 2 * 3 + 2, 2, []),  # three sides warm up; the second of them in the third round
    ("fusewire.profile.peak_of_call", 1, 4, ["eager"]), ("fusewire.profile.floor_of", 1, 4, ["eager", "exact", "close"])])
def test_a_profile_keeps_its_complete_rounds(monkeypatch, name, at, rounds, kinds):
    command = ("profile", "sd3-tiny", "--rounds", "4")
    with monkeypatch.context() as patch:
        interrupt(patch, name, at)
        result = run(*command, "--json")
    data = json.loads(result.stdout)
    one_line(result, f"the medians are of {rounds} of 4 rounds")
    assert data["interrupted"] is True and data["ok"] is False and data["verdicts"] == [] and data["floor"] == {}
    assert data["settings"]["rounds"] == rounds and list(data["kinds"]) == kinds
    assert [row["variant"] for row in data["rows"]] == ["eager", "exact", "close"] and all(row["median_ms"] > 0 for row in data["rows"])
    assert [bool(row["backends"]) for row in data["rows"]] == [False, "exact" in kinds, "close" in kinds]
    interrupt(monkeypatch, name, at)
    shown = run(*command)
    one_line(shown, f"the medians are of {rounds} of 4 rounds")
    assert "Throughput: sd3-tiny" in shown.stdout and "Verdicts" not in shown.stdout and ("Where the time goes" in shown.stdout) is bool(kinds)


@pytest.mark.parametrize("command, name", [
    (("parity", "sd3-tiny"), "fusewire.parity.ops.measure"), (("profile", "sd3-tiny", "--rounds", "1"), "fusewire.profile.alternate"),
    (("bench", "sd3-tiny", "--rounds", "1"), "fusewire.profile.bench._rows"), (("swap", "--dry-run", "sd3-tiny"), "fusewire.trial.swap_copies"),
    (("swap", "sd3-tiny"), "fusewire.targets.load"), (("doctor",), "fusewire.doctor.diagnose")])
def test_nothing_to_keep_is_said(monkeypatch, command, name):
    import fusewire.doctor, fusewire.profile.bench, fusewire.trial  # noqa: E401, F401  (sys.modules has them)

    interrupt(monkeypatch, name)
    result = run(*command)
    one_line(result, "nothing is kept")
    assert result.stdout == ""
    data = json.loads(run(*command, "--json").stdout)
    assert data["interrupted"] is True and data["ok"] is False and data["exit_code"] == 130


def test_the_library_lets_the_interrupt_through(monkeypatch):
    """Python users get their KeyboardInterrupt, with the rows."""
    target = targets.load("sd3-tiny")
    interrupt(monkeypatch, "fusewire.parity.ops.measure", 3)
    with pytest.raises(KeyboardInterrupt) as caught:
        fusewire.parity(target.value, inputs=target.inputs)
    result = caught.value.result
    assert result.interrupted and len(result.rows) == 2 and all(row.holds for row in result.rows) and not result.ok


def test_demo_writes_what_is_finished(monkeypatch, folder, tmp_path):
    import fusewire.demo  # noqa: F401  (sys.modules has it)

    interrupt(monkeypatch, "fusewire.demo.profile")
    out = tmp_path / "report"
    result = run("demo", "--target", folder, *SHORT, "--out", str(out), "--json")
    shown, data, page = json.loads(result.stdout), json.loads((out / "report.json").read_text()), (out / "index.html").read_text()
    assert result.exit_code == 130
    assert result.stderr.rstrip().endswith(f"fusewire: interrupted; what is finished is on the page, {out / 'index.html'}; lacking: {'; '.join(OTHERS)}")
    for report in (shown, data):
        assert report["interrupted"] is True and report["ok"] is False and report["lacking"] == OTHERS
        assert [p["target"] for p in report["parity"]] == ["tiny-sd3"] and report["parity"][0]["ok"] and report["profile"] == []
        assert report["parity"][0]["description"].startswith("StableDiffusion3Pipeline")
    assert "This run was interrupted." in page and all(name in page for name in OTHERS) and "<h2>Throughput</h2>" not in page


def test_demo_of_rows_alone_is_not_finished(monkeypatch, folder, tmp_path):
    """The rows of a parity that was cut short make no page, and no folder."""
    import fusewire.demo  # noqa: F401  (sys.modules has it)

    interrupt(monkeypatch, "fusewire.parity.ops.measure", 3)
    result = run("demo", "--target", folder, *SHORT, "--out", str(tmp_path / "report"))
    one_line(result, "nothing is kept")
    assert not (tmp_path / "report").exists()


def test_a_second_interrupt_does_not_spoil_the_page(monkeypatch, folder, tmp_path):
    import fusewire.report.page as page

    def render(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return genuine(*args, **kwargs)

    genuine = page.render
    monkeypatch.setattr(page, "render", render)
    interrupt(monkeypatch, "fusewire.demo.profile")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run("demo", "--target", folder, *SHORT, "--out", str(tmp_path / "report"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130 and "what is finished is on the page" in result.stderr and (tmp_path / "report" / "index.html").stat().st_size > 10_000


def test_undisturbed_in_another_thread():
    """Only the main thread may set a handler."""
    ran = []

    def work():
        with undisturbed():
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [True]


def in_a_process(arguments, until, pause):
    """(exit code, standard error) of a command that gets SIGINT ``pause`` seconds after a line with ``until``."""
    with subprocess.Popen([sys.executable, "-c", CODE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}) as process:
        try:
            for line in process.stdout:
                if until in line:
                    break
            time.sleep(pause)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, errors


def test_a_signal_is_clean():
    code, errors = in_a_process(["bench", "sd3.5-tiny", "--rounds", "100000"], "ready", 2.0)
    assert code == 130 and errors == "fusewire: interrupted before any result was complete; nothing is kept\n", errors


def test_a_signal_keeps_the_page(folder, tmp_path):
    code, errors = in_a_process(["demo", "--target", folder, *SHORT, "--rounds", "100000", "--out", str(tmp_path)], "Parity: tiny-sd3", 0.5)
    assert code == 130 and errors.count("\n") == 1 and "Traceback" not in errors, errors
    assert json.loads((tmp_path / "report.json").read_text())["lacking"] == OTHERS and (tmp_path / "index.html").is_file()
