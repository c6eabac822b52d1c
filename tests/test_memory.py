"""keep_memory: freed memory is not handed back, in a process of its own (it cannot be taken back)."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
import fusewire

kept = len(sys.argv) > 1 and fusewire.keep_memory()

def faults(calls=8, megabytes=64):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.ones(megabytes << 18)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls

faults(16)  # until a hole is large enough for the next tensor with its alignment
print(int(kept), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_used_again():
    def run(*arguments):
        return map(float, subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True, text=True).stdout.split())

    told, faults = run("keep")
    _, stock = run()
    pages = 64 << 8
    if not told:
        pytest.skip("the C library is not glibc")
    assert faults < pages / 100
    assert stock > faults  # where glibc is not told, every page, or one for each huge page
