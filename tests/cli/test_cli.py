"""The command line: exit codes, JSON, errors of one line."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fusewire import cli
from fusewire.errors import BadInput
from fusewire.presets import PRESETS
from fusewire.profile.memory import LIMITS
from tests.cli.runner import run
from tests.spoil import spoil

COMMANDS = ("demo", "swap", "parity", "profile", "bench", "doctor")


def answer(result):
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_stands_alone(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Exit codes: 0 all holds" in result.stdout and "--json" in result.stdout
    assert "130 interrupted" in " ".join(result.stdout.split())


def test_help_names_every_preset():
    words = run("profile", "--help").stdout.replace("│", " ").replace(",", " ").replace(".  ", " ").split()
    assert {*PRESETS} <= {word.rstrip(".") for word in words}


def test_no_command_lists_them_all():
    assert all(command in run().output for command in COMMANDS)


def test_parity_of_a_preset():
    result = run("parity", "sd3.5-tiny", "--dtype", "bf16", "--json")
    data = answer(result)
    assert result.exit_code == 0 and data["ok"] and data["kind"] == "parity" and data["target"] == "sd3.5-tiny" and data["dtype"] == "bfloat16"
    row = data["rows"][0]
    assert {"level", "name", "numerics", "backend", "holds", "max_error", "stock_max_error", "mismatch", "psnr"} <= set(row)
    assert {row["level"] for row in data["rows"]} == {"op", "block", "model"}


def test_parity_of_a_folder(folder):
    result = run("parity", folder, "--steps", "2", "--seeds", "1", "--prompt", "a red 7", "--level", "picture", "--level", "model")
    assert result.exit_code == 0, result.output
    assert "seed 0, 2 steps" in result.stdout and "Swap report: tiny-sd3" in result.stdout and "FAILS" not in result.stdout


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_a_perturbed_kernel_exits_1(monkeypatch, numerics):
    spoil(monkeypatch, "gate_residual_adaln", lambda out: (out[0], out[1] * 1.02))
    result = run("parity", "sd3-tiny", "--numerics", numerics, "--json")
    assert result.exit_code == 1 and answer(result)["ok"] is False
    assert run("bench", "sd3-tiny", "--op", "gate_residual_adaln", "--rounds", "1").exit_code == 1


def test_profile_of_a_preset():
    result = run("profile", "sd3-tiny", "--rounds", "2", "--json")
    data = answer(result)
    assert result.exit_code == (0 if data["ok"] else 1)
    assert [row["variant"] for row in data["rows"]] == ["eager", "exact", "close"] and data["machine"]["threads"] == torch.get_num_threads()


def test_too_much_memory_exits_1(monkeypatch):
    """The table, its verdict and the exit code."""
    monkeypatch.setitem(LIMITS, "exact", 0.5)
    result = run("profile", "sd3-tiny", "--rounds", "1", "--numerics", "exact")
    assert result.exit_code == 1 and "Peak memory, MiB" in result.stdout and "exact: peak memory" in result.stdout and "FAILS" in result.stdout


def test_a_failed_verdict_of_profile_exits_1(monkeypatch):
    monkeypatch.setattr("fusewire.profile.FIRST_CALL_LIMIT", -1e9)
    result = run("profile", "sd3-tiny", "--rounds", "1", "--numerics", "close")
    assert result.exit_code == 1 and "FAILS" in result.stdout


def test_bench():
    result = run("bench", "sd3-tiny", "--op", "adaln_modulate", "--rounds", "1", "--numerics", "close", "--json")
    assert result.exit_code == 0 and {row["op"] for row in answer(result)["rows"]} == {"adaln_modulate"}


def test_swap(folder):
    dry, wet = run("swap", "--dry-run", folder, "--json"), run("swap", "sd3.5-tiny", "--numerics", "close", "--json")
    assert dry.exit_code == 0 and answer(dry)["restored"] is None and answer(dry)["swapped"] and answer(dry)["left"]
    assert wet.exit_code == 0 and answer(wet)["restored"] is True and answer(wet)["ran"] not in ("", "none")


def test_swap_that_cannot_be_taken_back_exits_1(monkeypatch):
    import fusewire.swap

    def spoilt(target, **kwargs):
        handle = genuine(target, **kwargs)
        plain = handle.restore

        def restore():
            plain()
            target.proj_out.weight.data += 1

        handle.restore = restore
        return handle

    genuine = fusewire.swap.swap
    monkeypatch.setattr(fusewire.swap, "swap", spoilt)
    result = run("swap", "sd3-tiny")
    assert result.exit_code == 1 and "NOT those before" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (("parity", "no-such-thing"), "TARGET 'no-such-thing' does not exist"),
    (("parity", "sd3-tiny", "--dtype", "int8"), "dtype is 'int8'"),
    (("parity", "sd3-tiny", "--numerics", "fast"), "numerics is 'fast'"),
    (("parity", "sd3-tiny", "--level", "pixel"), "levels is ['pixel']"),
    (("parity", "sd3-tiny", "--layers", "0"), "layers is 0"),
    (("parity", "sd3-tiny", "--layers", "99"), "--layers is 99"),
    (("parity", "sd3-tiny", "--size", "100"), "--size is 100"),
    (("parity", "sd3-tiny", "--threads", "0"), "--threads is 0"),
    (("parity", "sd3-tiny", "--threads", "99999999999"), "--threads is 99999999999"),
    (("parity", "sd-tiny", "--size", "1000000000"), "not enough memory (it tried to allocate "),
    (("parity", "sd3-tiny", "--seeds", "0"), "--seeds is 0"),
    (("profile", "sd3-tiny", "--rounds", "0"), "rounds is 0"),
    (("bench", "sd3-tiny", "--op", "nonsense"), "op is 'nonsense'"),
    (("swap", "sd3-tiny", "--numerics", "both"), "numerics is 'both'"),
    (("demo", "--preset", "sd9"), "--preset is 'sd9'"),
    (("demo", "--target", "no-such-thing"), "TARGET 'no-such-thing' does not exist")])
def test_bad_input_exits_2_with_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert message in result.stderr and result.stderr.startswith("fusewire: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output and not list(tmp_path.iterdir())


def test_bad_input_in_json():
    result = run("parity", "sd3-tiny", "--dtype", "int8", "--json")
    assert result.exit_code == 2 and answer(result)["ok"] is False and "int8" in answer(result)["error"]


@pytest.mark.parametrize("arguments, message", (
    (("--rounds", "0"), "rounds is 0"), (("--preset", "dit-tiny", "--layers", "99"), "--layers is 99"), (("--size", "7"), "--size is 7"),
    (("--steps", "0"), "steps is 0")))
def test_demo_looks_at_everything_first(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr("fusewire.demo._measure", lambda *args: pytest.fail("it has begun"))
    result = run("demo", "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "out").exists()


def test_what_demo_has_finished_is_not_lost(folder, tmp_path, monkeypatch):
    """A target that turns out to be damaged after the first one was measured."""
    from fusewire import demo

    real = demo._measure

    def measure(name, dtype, plan, outcome, bars, show):
        if outcome.parities:
            raise BadInput("weight x holds NaN")
        real(name, dtype, plan, outcome, bars, show)

    monkeypatch.setattr(demo, "_measure", measure)
    result = run("demo", "--target", str(folder), "--preset", "dit-tiny", "--dtype", "float32", "--out", str(tmp_path / "o [v1]"), "--steps", "2", "--seeds",
                 "1", "--rounds", "1", "--no-compile")
    assert result.exit_code == 2 and "weight x holds NaN; what was finished before is on the page" in result.stderr
    assert (tmp_path / "o [v1]" / "index.html").is_file()


def test_the_command_is_named_without_paths(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fusewire", "demo", "--out=/a/b/o 1", "/c/d/model", "--prompt", "a red 7"])
    assert cli._command() == "fusewire demo '--out=o 1' model --prompt 'a red 7'"


@pytest.mark.parametrize("variable, value, arguments", (("FUSEWIRE_BACKEND", "gpu", ("doctor",)), ("FUSEWIRE_NATIVE", "maybe", ("doctor",)),
                                                        ("FUSEWIRE_CPU_ISA", "avx9", ("doctor",)),
                                                        ("FUSEWIRE_BACKEND", "triton", ("parity", "dit-tiny", "--level", "model"))))
def test_variables_that_mean_nothing_here(variable, value, arguments):
    done = subprocess.run([sys.executable, "-m", "fusewire", *arguments], env=os.environ | {variable: value}, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fusewire: ")]
    assert done.returncode == 2 and len(lines) == 1 and value in lines[0] and "Traceback" not in done.stderr


def test_an_encoding_without_bars_and_frames():
    done = subprocess.run([sys.executable, "-m", "fusewire", "profile", "dit-tiny", "--rounds", "1", "--numerics", "exact"],
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert b"Traceback" not in done.stderr and b"Where the time goes" in done.stdout and b"#" in done.stdout and b"Verdicts" in done.stdout


def test_an_unknown_option_exits_2():
    assert run("parity", "--frobnicate").exit_code == 2


def test_nothing_to_do_exits_3(tmp_path):
    """Models without a norm, an attention or a scheduler that we know."""
    from diffusers import AutoencoderTiny, UNet1DModel

    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
                    latent_channels=4).save_pretrained(tmp_path / "vae")
    UNet1DModel(sample_size=8, block_out_channels=(8, 8, 16), norm_num_groups=4, layers_per_block=1).save_pretrained(tmp_path / "unet")
    for name in ("vae", "unet"):
        result = run("swap", "--dry-run", str(tmp_path / name))
        assert result.exit_code == 3 and result.stderr.count("\n") == 1 and "nothing" in result.stderr, result.output


def test_demo(folder, tmp_path):
    out = tmp_path / "report"
    result = run("demo", "--target", folder, "--preset", "sd3.5-tiny", "--dtype", "float32", "--steps", "2", "--seeds", "1", "--rounds", "1",
                 "--no-compile", "--out", str(out))
    data = json.loads((out / "report.json").read_text())
    assert result.exit_code == (0 if data["ok"] else 1), result.output
    assert all(p["ok"] for p in data["parity"]) and [p["target"] for p in data["profile"]] == ["tiny-sd3", "sd3.5-tiny"]
    assert result.stdout.rstrip().endswith("index.html") and (out / "index.html").is_file()
    for word in ("Swap report", "Parity: tiny-sd3", "Throughput: sd3.5-tiny"):
        assert word in result.stdout
