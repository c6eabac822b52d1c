"""Two processes give what one does: training under DDP and FSDP2, diffusers' context parallelism, a prompt on each rank. Columns of the matrix.

torchrun is started once, for all of them (tests/compat/ranks.py); everything here compares with this process, where nothing is swapped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusewire
from fusewire.swap import custom
from tests.compat import ranks
from tests.compat.families import FAMILIES, call
from tests.compat.test_matrix import BOTH, column, same
from tests.tolerance import PIPELINE_FLOAT32

pytestmark = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(Path(fusewire.__file__).parents[1])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks.RANKS), "-m", ranks.__name__, str(out)]
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=paths, OMP_NUM_THREADS="1"), cwd=root, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def of(found, *key):
    assert not isinstance(found[key], str), found[key]
    return found[key]


def check_gradients(got, family):
    """DDP and FSDP2 average over the ranks, as the loss averages over pictures: a sum in another order."""
    want = ranks.step(*ranks.example(family))
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert (gradient - want[name]).abs().max() <= PIPELINE_FLOAT32 * want[name].abs().max() + 1e-6, name


@column("DDP, two ranks")
@BOTH
def test_ddp(family, numerics, found):
    check_gradients(of(found, "ddp", family, numerics), family)


@column("FSDP2, two ranks")
@BOTH
def test_fsdp(family, numerics, found):
    check_gradients(of(found, "fsdp_after_swap", family, numerics), family)


@column("FSDP2 before the swap")
def test_fsdp_before_the_swap(family, found, record_property):
    """Sharded modules have another class and stay stock, named in the report; where that is all there is, ``swap`` refuses with the same words."""
    got = found["fsdp_before_swap", family, "exact"]
    if isinstance(got, str):
        assert "NothingToDo" in got and "with nothing to swap" in got and custom.SHARDED in got, got
    else:  # other parts were swapped; DiT is sharded as a whole, so that its blocks keep their classes
        reasons, gradients = got
        check_gradients(gradients, family)
        assert reasons == (set() if family == "DiT" else {custom.SHARDED})
    if family != "DiT":
        record_property("refused", custom.SHARDED)


def test_fsdp_restored(family, found):
    still_sharded, gradients = of(found, "fsdp_restored", family, "exact")
    check_gradients(gradients, family)
    assert still_sharded


@column("a prompt on each rank, by torchrun")
@BOTH
def test_prompts(family, numerics, found):
    torch.manual_seed(0)
    pipe = FAMILIES[family].pipe(torch.float32)
    want = [FAMILIES[family].generate(pipe, seed=seed) for seed in range(ranks.RANKS)]
    assert not same(want[0], want[1], "close", 1e-2)
    assert all(same(got, latents, numerics, 2e-4) for got, latents in zip(of(found, "prompts", family, numerics), want, strict=True))


@column("context parallelism, two ranks")
@BOTH
def test_context_parallel(family, numerics, found):
    if family != "Flux.1":
        pytest.skip("diffusers has no plan of it for this family")
    stock, got = of(found, "context_parallel", family, None), of(found, "context_parallel", family, numerics)
    assert same(got, stock, numerics)
    model, _ = ranks.example(family)
    with torch.no_grad():
        want = call(model, ranks.even_inputs())
    assert same(got, want, "close")
