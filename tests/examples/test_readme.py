"""The README's code runs as it stands, in the order in which it stands, and what it links to is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_python_blocks(tmp_path):
    pytest.importorskip("diffusers")
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 8
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "swapped  adaln_modulate" in done.stdout and "eager:" in done.stdout


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links(page):
    targets = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    missing = [target for target in targets if not target.startswith("http") and not (page.parent / target).exists()]
    assert not missing, missing
    assert page.name != "README.md" or len(targets) > 8


def test_commands_of_the_makefile_and_the_command_line():
    from fusewire import cli

    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in re.findall(r"make (?:clean )?(\w+)(?=[ `])", README))
    named = re.search(r"`fusewire ([a-z]+ \| [a-z| ]+)`", README).group(1).split(" | ")
    assert cli.CODES.rstrip(".") in README
    assert {command.callback.__name__ for command in cli.app.registered_commands} == set(named)
