"""Swaps over swaps: what is in force afterwards, and what each handle undoes, in copies and pickles too."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from fusewire.swap import engine
from fusewire.swap.fused import stock_of
from fusewire.swap.report import SwapWarning
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


def swapped_parts(model) -> int:
    return sum(stock_of(part) is not None for part in model.modules())


@models
def test_a_handle_undoes_what_was_swapped_since(model):
    """Also what only the later swap has changed: ``close`` swaps more than ``exact``."""
    make, inputs = MODELS[model]
    model, given = make().eval(), inputs()
    want = output(model, given)
    with fusewire.swapped(model):
        fusewire.swap(model, "close")
        assert not torch.equal(output(model, given), want)
    assert not swapped_parts(model) and torch.equal(output(model, given), want)
    first = fusewire.swap(model)
    second = fusewire.swap(model, "close")
    first.restore()
    assert not swapped_parts(model) and not any("fusewire" in key for part in model.modules() for key in vars(part))
    fusewire.swap(model, "close")
    second.restore()  # is not in force any more
    assert numerics_of(model) == {"close"}


def test_a_handle_undoes_nothing_of_other_models():
    one, other = MODELS["DiT"][0](), MODELS["DiT"][0]()
    first = fusewire.swap(one)
    fusewire.swap(other)
    first.restore()
    assert not swapped_parts(one) and swapped_parts(other)
    both = fusewire.swap(torch.nn.ModuleList([one, other]), "close")
    fusewire.swap(other.transformer_blocks[0], "exact")
    both.restore()
    assert not swapped_parts(one) and numerics_of(other) == {"exact"}


def test_threads_take_turns():
    model = MODELS["SD3.5"][0]()

    def work(numerics: str) -> None:
        for _ in range(8):
            fusewire.swap(model, numerics).restore()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ("exact", "close")))
    assert not swapped_parts(model)


def test_warnings_that_are_errors_come_before_any_change():
    model = MODELS["SD"][0]()
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(type("Mine", (AttnProcessor2_0,), {})())
    engine._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SwapWarning)
        for _ in range(2):  # it counts as given when it was
            with pytest.raises(SwapWarning):
                fusewire.swap(model)
            assert not swapped_parts(model)


def test_a_wrapper_put_on_since():
    """accelerate's ``prepare`` wraps the forward on the instance: the model goes on running what it holds, and says so."""
    model = MODELS["DiT"][0]().eval()
    fusewire.swap(model)
    block = model.transformer_blocks[0]
    inner = block.forward
    block.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    report = fusewire.swap(model).report
    assert all(entry.by_choice for entry in report.left) and {entry.reason for entry in report.swapped} == {"already swapped"}
    report = fusewire.swap(model, "close").report
    assert any("take it off first" in entry.reason and entry.name == "transformer_blocks.0" for entry in report.left)
    assert block.fusewire_how.numerics == "exact"


def test_another_model_in_the_pipeline_is_left_alone():
    """What was put there since, and swapped by itself, is no copy of what the handle had swapped."""
    pipe = StableDiffusionPipeline(vae=stock_unet.vae(torch.float32), text_encoder=None, tokenizer=None, unet=MODELS["SD"][0](), scheduler=DDIMScheduler(),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    handle = fusewire.swap(pipe)
    before, pipe.unet = pipe.unet, MODELS["SD"][0]()
    fusewire.swap(pipe.unet)
    handle.restore()
    assert not swapped_parts(before) and not swapped_parts(pipe.vae) and swapped_parts(pipe.unet)
