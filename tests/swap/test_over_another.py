"""Swaps over swaps: what is in force afterwards, and what each handle undoes, in copies and pickles too."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.swap.fused import stock_of
from tests.models import stock_sd3, stock_unet

MODELS = {"SD3.5": (lambda: stock_sd3.stock_model("sd3.5"), lambda: stock_sd3.inputs(2, 8, 12)),
          "SD": (lambda: stock_unet.unet(), lambda: stock_unet.unet_inputs()),
          "DiT": (stock_unet.dit, lambda: stock_unet.dit_inputs(2, size=16))}
models = pytest.mark.parametrize("model", MODELS)


@torch.no_grad()
def output(model, given) -> torch.Tensor:
    return model(**given, return_dict=False)[0]


def numerics_of(model) -> set[str]:
    return {part.fusewire_how.numerics for part in model.modules() if stock_of(part)}


@models
def test_exact_over_close_is_exact(model):
    make, inputs = MODELS[model]
    model, given = make().eval(), inputs()
    want = output(model, given)
    close = fusewire.swap(model, "close")
    rounded, classes = output(model, given), [type(part) for part in model.modules()]
    assert not torch.equal(rounded, want)
    exact = fusewire.swap(model, "exact")
    ops.reset_stats()
    assert torch.equal(output(model, given), want) and numerics_of(model) == {"exact"}
    assert not CPU.loaded or any(counts["cpu"] for counts in ops.stats().values() if "cpu" in counts)
    assert any(entry.op == "stock again" and "'close'" in entry.reason for entry in exact.report.noted)
    exact.restore()
    assert [type(part) for part in model.modules()] == classes and torch.equal(output(model, given), rounded)
    close.restore()
    assert not numerics_of(model) and not any("fusewire" in key for part in model.modules() for key in vars(part))
    assert torch.equal(output(model, given), want)


def test_only_some_ops_in_exact_leave_the_others_in_close():
    model = MODELS["SD3.5"][0]()
    fusewire.swap(model, "close", only="attention")
    fusewire.swap(model, "exact", only="adaln_modulate")
    assert numerics_of(model) == {"close", "exact"}
    fusewire.restore(model)
    assert not any("fusewire" in key for part in model.modules() for key in vars(part))


@pytest.mark.parametrize("nested", (False, True))
def test_copies_within_the_model_are_restored_with_it(nested):
    """peft's modules_to_save are deep copies beside what was swapped."""
    def adapt(model):
        torch.manual_seed(1)
        return inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["ff", "norm1"]), model, "a")

    make, inputs = MODELS["DiT"]
    model, other, given = make().eval(), make().eval(), inputs()
    other.load_state_dict(model.state_dict())
    want = output(adapt(other), given)
    before = fusewire.swap(model, "exact") if nested else None
    with fusewire.swapped(model, "close"):
        adapt(model)
    copies = [part for name, part in model.named_modules() if "modules_to_save.a" in name and stock_of(part)]
    assert bool(copies) is nested and numerics_of(model) == ({"exact"} if nested else set())
    if nested:
        before.restore()
    assert not numerics_of(model) and torch.equal(output(model, given), want)


PICKLED = """
import pickle, sys
import fusewire
from tests.models import stock_unet

model = stock_unet.dit()
for _ in range(3):
    with fusewire.swapped(model, "close"):
        pass
fusewire.swap(model, "exact")
sys.stdout.buffer.write(pickle.dumps(model))
"""


@pytest.mark.slow
def test_swaps_of_an_unpickled_model_are_its_own():
    """The numbers of swaps that it came with are those of no swap here."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PICKLED], cwd=root, capture_output=True, check=True,
                          env=os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}"})
    for model in (pickle.loads(done.stdout), copy.deepcopy(pickle.loads(done.stdout))):
        for _ in range(5):
            with fusewire.swapped(model, "close"), fusewire.swapped(model, "exact"):
                pass
            assert numerics_of(model) == {"exact"}
        fusewire.restore(model)
        assert not numerics_of(model)
