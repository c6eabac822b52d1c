"""``numerics="exact"``: every output of a swapped model and pipeline is torch.equal to stock's, and stock's again after restore."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3Img2ImgPipeline

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from tests.models.stock_sd3 import SD3, VARIANTS, randomise
from tests.models.test_controlnet_sd3 import CONFIGS
from tests.swap.tiny import generate, inputs, run, stock_model, tiny_pipeline
from tests.tolerance import MODEL_FLOAT32

DTYPES, LARGE = [torch.float32, torch.bfloat16, torch.float16], CONFIGS["sd3.5-large"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformer(variant, dtype, two_threads):
    model = stock_model(variant, dtype)
    # Two resolutions in a row, odd token counts, batch 1 and 3.
    cases = [inputs(1, 8, 12, 5, dtype), inputs(3, 6, 2, 1, dtype), inputs(1, 8, 12, 5, dtype)]
    want = [run(model, data) for data in cases]
    ops.reset_stats()
    handle = fusewire.swap(model)
    assert all(torch.equal(run(model, data), value) for data, value in zip(cases, want))
    counts = {op: sum(calls.values()) for op, calls in ops.stats().items()}
    used = ["adaln_modulate", "gate_residual", "gate_residual_adaln"] + (["adaln_modulate_dual", "qk_norm_rope", "qk_norm_into"] if variant == "sd3.5" else [])
    assert all(counts[op] for op in used) and not counts["linear"] and not counts.get("joint_attention")
    handle.restore()
    ops.reset_stats()
    assert all(torch.equal(run(model, data), value) for data, value in zip(cases, want))
    assert not any(sum(calls.values()) for calls in ops.stats().values())


EXACT_OPS = ["adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "qk_norm_rope", "qk_norm_into", "flow_euler_step"]


@pytest.mark.skipif(not CPU.loaded, reason=CPU.reason)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_runs_on_the_cpu_library(dtype):
    pipe = tiny_pipeline("sd3.5", dtype)
    with fusewire.swapped(pipe):
        ops.reset_stats()
        generate(pipe, steps=1)
    stats = ops.stats()
    for op in EXACT_OPS:
        assert stats[op]["cpu"] and sum(stats[op].values()) == stats[op]["cpu"], (op, stats[op])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_pipeline(variant, dtype):
    pipe = tiny_pipeline(variant, dtype)
    want = generate(pipe, batch=2)
    with fusewire.swapped(pipe):
        assert torch.equal(generate(pipe, batch=2), want)
        assert not torch.equal(generate(pipe, batch=2, seed=1), want)
    assert torch.equal(generate(pipe, batch=2), want)


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_another_dtype_after_the_swap_and_back(numerics):
    """Nothing is kept across dtypes: after each move a swapped pipeline gives what one that was moved first, then swapped, gives."""
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    other = tiny_pipeline()
    with fusewire.swapped(pipe, numerics):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
            pipe.to(dtype)
            other.to(dtype)
            got, stock = generate(pipe), generate(other)
            with fusewire.swapped(other, numerics):
                assert torch.equal(generate(other), got), dtype
            assert got.dtype is dtype and torch.equal(got, stock) is (numerics == "exact"), dtype


def test_pipeline_with_skip_layer_guidance_and_without_guidance():
    pipe = tiny_pipeline()
    for options in (dict(skip_guidance_layers=[1], skip_layer_guidance_stop=0.9), dict(guidance_scale=1.0)):
        want = generate(pipe, **options)
        with fusewire.swapped(pipe):
            assert torch.equal(generate(pipe, **options), want)


def test_image_to_image_pipeline_starts_in_the_middle_of_the_schedule():
    pipe = tiny_pipeline(cls=StableDiffusion3Img2ImgPipeline)
    options = dict(image=torch.rand(1, 3, 16, 24), strength=0.6, steps=5)
    want = generate(pipe, **options)
    with fusewire.swapped(pipe):
        assert torch.equal(generate(pipe, **options), want)


def test_controlnet_residuals_skipped_layers_and_keywords():
    model = stock_model("sd3.5", num_layers=4)
    data = inputs()
    residuals = [torch.randn(2, 24, 32) for _ in range(2)]
    cases = [dict(block_controlnet_hidden_states=residuals), dict(skip_layers=[0, 2]), dict(joint_attention_kwargs={}),
             dict(joint_attention_kwargs={"scale": 0.5}), dict(joint_attention_kwargs={"unused": 1})]
    want = [run(model, data, **case) for case in cases]
    with fusewire.swapped(model):
        assert all(torch.equal(run(model, data, **case), value) for case, value in zip(cases, want))
    assert not torch.equal(want[0], want[2]) and not torch.equal(want[1], want[2])


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_controlnet_model_is_built_of_the_same_blocks(dtype, text):
    """Their outputs go into products, whose bits in 16 bits depend on how they lie in memory: compiled, copied, and swapped in close beside it too.
    Without text they are blocks of one stream, as SD3.5-large's."""
    model = randomise(SD3ControlNetModel(**SD3 if text else LARGE)).eval().to(dtype)
    data = dict(inputs(2, 8, 12, 5, dtype), controlnet_cond=torch.randn(2, 4, 8, 12).to(dtype))
    if not text:
        data |= dict(encoder_hidden_states=None, hidden_states=torch.randn(2, 24, 32).to(dtype))

    def call(model):
        with torch.no_grad():
            return model(**data, return_dict=False)[0]

    def same(got):
        return len(want) == len(got) and all(torch.equal(a, b) for a, b in zip(got, want))

    want = call(model)
    with fusewire.swapped(model) as handle:
        ops.reset_stats()
        assert same(call(model)) and (not CPU.loaded or ops.stats()["gate_residual_adaln"]["cpu"])
        assert same(call(copy.deepcopy(model))) and same(call(pickle.loads(pickle.dumps(model))))
        assert same(call(torch.compile(model, fullgraph=True, backend="eager")))
        with fusewire.swapped(model, "close") as close:
            assert not same(call(model))
        assert {"attention", "linear"} <= {entry.op for entry in close.report.swapped} and same(call(model))
    assert {"gate_residual_adaln", "adaln_modulate"} <= {entry.op for entry in handle.report.swapped}
    assert same(call(model)) and not any("fusewire" in key for part in model.modules() for key in vars(part))


class Derived(SD3ControlNetModel):
    """Somebody's own."""


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.transformer_blocks, lambda model: model.transformer_blocks[0]],
                         ids=["derived", "all blocks", "one block"])
@pytest.mark.parametrize("config", [SD3, LARGE], ids=["text", "no text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_blocks_of_a_controlnet_swapped_by_themselves(dtype, config, part):
    model = randomise(Derived(**config)).eval().to(dtype)
    data = dict(inputs(2, 8, 12, 5, dtype), controlnet_cond=torch.randn(2, 4, 8, 12).to(dtype))
    if config is LARGE:
        data |= dict(encoder_hidden_states=None, hidden_states=torch.randn(2, 24, 32).to(dtype))
    want = model(**data, return_dict=False)[0]
    with fusewire.swapped(part(model)):
        ops.reset_stats()
        assert all(map(torch.equal, model(**data, return_dict=False)[0], want)) and (not CPU.loaded or ops.stats()["gate_residual_adaln"]["cpu"])


def test_the_transformers_blocks_need_no_copies():
    """Its final norm makes the stream contiguous whatever the blocks did: theirs stays as the kernels leave it."""
    model = stock_model("sd3")
    with fusewire.swapped(model):
        assert not any(block.fusewire_how.keeps_layout for block in model.transformer_blocks)
    with fusewire.swapped(model.transformer_blocks):
        assert all(block.fusewire_how.keeps_layout for block in model.transformer_blocks)


def test_gradients_of_a_swapped_model():
    model = stock_model("sd3.5").train()
    data = inputs()

    def gradients():
        model.zero_grad()
        model(**data, return_dict=False)[0].square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    want = gradients()
    for numerics in ("exact", "close"):
        for checkpointing in (False, True):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            with fusewire.swapped(model, numerics):
                got = gradients()
            assert got.keys() == want.keys()
            for name, grad in got.items():
                assert (grad - want[name]).abs().max() <= MODEL_FLOAT32 * want[name].abs().max() + 1e-7, (numerics, name)


def test_first_swapped_call_compiles_nothing():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = stock_model("sd3.5")
    for numerics in ("exact", "close"):
        with fusewire.swapped(model, numerics):
            run(model, inputs())
    assert not torch._dynamo.utils.counters["stats"]
