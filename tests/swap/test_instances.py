"""What must survive a swap: classes, keys, copies, pickles, saved folders; idempotence, nesting, reports and errors."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import json
import pickle
import warnings
import weakref

import pytest
import torch
from diffusers import (DanceDiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, IPNDMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline,
                       UNet1DModel)
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero

import fusewire
from fusewire import ops
from fusewire.errors import BadInput, NothingToDo
from fusewire.swap import engine, families, fused, sd3
from fusewire.swap.report import SwapError, SwapWarning
from tests.models import stock_unet
from tests.swap.tiny import generate, inputs, run, stock_model, tiny_pipeline
from tests.tolerance import MODEL_FLOAT32


def classes(root) -> list[type]:
    return [type(module) for module in root.modules()]


def calls() -> int:
    return sum(sum(served.values()) for served in ops.stats().values())


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_classes_keys_and_processors(numerics):
    pipe = tiny_pipeline()
    model = pipe.transformer
    before, keys, scheduler = classes(model), list(model.state_dict()), pipe.scheduler
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    processors = {name: id(processor) for name, processor in model.attn_processors.items()}
    handle = fusewire.swap(pipe, numerics)
    assert list(model.state_dict()) == keys and {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(processor) for name, processor in model.attn_processors.items()} == processors
    assert [cls.__name__ for cls in classes(model)] == [cls.__name__ for cls in before]
    assert [cls.__module__ for cls in classes(model)] == [cls.__module__ for cls in before]
    assert all(issubclass(now, cls) for now, cls in zip(classes(model), before)) and classes(model) != before
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) and pipe.scheduler is scheduler
    assert f"fusewire: {numerics}" in repr(model)
    generate(pipe, steps=1)
    handle.restore()
    assert classes(model) == before and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert not [key for module in [*model.modules(), pipe.scheduler] for key in vars(module) if "fusewire" in key]
    assert {name: id(processor) for name, processor in model.attn_processors.items()} == processors


def test_other_instances_and_classes_are_untouched():
    one, two = stock_model("sd3"), stock_model("sd3")
    forward = JointTransformerBlock.forward
    with fusewire.swapped(one):
        assert type(two.transformer_blocks[0]) is JointTransformerBlock and JointTransformerBlock.forward is forward
        assert type(JointTransformerBlock(32, 2, 16)) is JointTransformerBlock


def test_deepcopy_keeps_its_own_weights():
    model = stock_model("sd3.5")
    data = inputs()
    want = run(model, data)
    with fusewire.swapped(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.proj_out.weight.mul_(2)
            twin.transformer_blocks[0].norm1.linear.bias.add_(1)
        assert torch.equal(run(model, data), want)
        assert classes(twin) == classes(model)
    assert not torch.equal(run(twin, data), want)
    changed = run(twin, data)
    assert fusewire.restore(twin) and type(twin.transformer_blocks[0]) is JointTransformerBlock
    assert torch.equal(run(twin, data), changed) and fusewire.restore(twin) == 0


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_pickle(numerics):
    pipe = tiny_pipeline()
    data = inputs()
    with fusewire.swapped(pipe, numerics):
        want = run(pipe.transformer, data)
        twins = [pickle.loads(pickle.dumps(pipe.transformer, protocol)) for protocol in (2, 4, 5)]
        buffer = io.BytesIO()
        torch.save(pipe.transformer, buffer)
        buffer.seek(0)
        twins.append(torch.load(buffer, weights_only=False))
        scheduler = pickle.loads(pickle.dumps(pipe.scheduler))
        assert type(scheduler) is type(pipe.scheduler) and scheduler.config == pipe.scheduler.config
        for twin in twins:
            ops.reset_stats()
            assert classes(twin) == classes(pipe.transformer) and torch.equal(run(twin, data), want) and calls()


def test_unpickled_where_diffusers_is_not_one_that_we_know(monkeypatch):
    model = stock_model("sd3")
    data = inputs()
    want = run(model, data)
    with fusewire.swapped(model):
        stored = pickle.dumps(model)
    monkeypatch.delitem(fused.MAKERS, JointTransformerBlock)
    twin = pickle.loads(stored)
    assert type(twin.transformer_blocks[0]) is JointTransformerBlock and torch.equal(run(twin, data), want)


def test_saved_folder_and_components_are_stock(tmp_path):
    pipe = tiny_pipeline()
    with fusewire.swapped(pipe):
        want = generate(pipe)
        again = StableDiffusion3Pipeline(**pipe.components)  # registers libraries and class names anew
        again.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"] and index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    nothing = {name: None for name, part in pipe.components.items() if part is None}
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **nothing)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler and torch.equal(generate(loaded), want)


def test_idempotent():
    model = stock_model("sd3.5")
    before = classes(model)
    first = fusewire.swap(model)
    once = classes(model)
    second = fusewire.swap(model)
    assert classes(model) == once and [entry[:2] for entry in second.report.swapped] == [entry[:2] for entry in first.report.swapped]
    second.restore()
    assert classes(model) == once
    first.restore()
    assert classes(model) == before
    first.restore()
    assert classes(model) == before


@pytest.mark.parametrize("outer_first", [False, True])
def test_nesting(outer_first):
    model = stock_model("sd3.5")
    before = classes(model)
    outer = fusewire.swap(model, "exact")
    exact = classes(model)
    inner = fusewire.swap(model, "close")
    assert classes(model) != exact
    if outer_first:
        outer.restore()
        assert type(model.transformer_blocks[0]) is JointTransformerBlock
        inner.restore()
    else:
        inner.restore()
        assert classes(model) == exact
        outer.restore()
    assert fusewire.restore(model) == 0 and classes(model) == before


def test_a_handle_that_another_undid_touches_no_later_swap():
    model = stock_model("sd3.5")
    before = classes(model)
    first, second = fusewire.swap(model, "exact"), fusewire.swap(model, "close")
    first.restore()
    third = fusewire.swap(model, "close")
    blocks = classes(model.transformer_blocks[0].norm1)
    second.restore()  # what "close" alone swaps is still its own, and goes
    assert classes(model.transformer_blocks[0].norm1) == blocks != [AdaLayerNormZero]
    third.restore()
    assert classes(model) == before
    one, twin = fusewire.swap(model, "exact"), copy.deepcopy(model)
    one.restore()
    assert classes(model) == before != classes(twin)
    assert fusewire.restore(twin) and not any("fusewire" in key for part in twin.modules() for key in vars(part))


def test_what_a_swapped_class_makes_is_stock():
    """``type(pipe.scheduler).from_config`` while swapped: what it makes is in no handle."""
    pipe = tiny_pipeline()
    with fusewire.swapped(pipe):
        block = pipe.transformer.transformer_blocks[0]
        assert type(pipe.scheduler) is not FlowMatchEulerDiscreteScheduler and type(block) is not JointTransformerBlock
        made = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.0)
        assert type(made) is FlowMatchEulerDiscreteScheduler and made.config.shift == 2.0
        assert type(type(block)(32, 2, 16)) is JointTransformerBlock
        assert type(type(pipe.transformer).from_config(pipe.transformer.config)) is type(pipe.transformer)
        assert type(copy.copy(pipe.scheduler)) is type(pipe.scheduler)


def test_context_manager_restores_after_an_error():
    model = stock_model("sd3")
    before = classes(model)
    with pytest.raises(KeyError):
        with fusewire.swapped(model):
            raise KeyError
    assert classes(model) == before


def test_a_change_that_fails_halfway_is_undone(monkeypatch):
    model = stock_model("sd3")
    before, stock_set = classes(model), engine.set_class
    seen = []

    def failing(instance, new):
        seen.append(instance)
        if len(seen) == 4:
            raise KeyboardInterrupt
        stock_set(instance, new)

    monkeypatch.setattr(engine, "set_class", failing)
    with pytest.raises(KeyboardInterrupt):
        fusewire.swap(model)
    assert classes(model) == before


def test_handle_keeps_no_model_alive():
    model = stock_model("sd3")
    handle = fusewire.swap(model)
    reference = weakref.ref(model.transformer_blocks[0])
    del model
    gc.collect()
    assert reference() is None
    handle.restore()


def test_report_of_exact_and_close():
    model = stock_model("sd3.5")
    with fusewire.swapped(model) as handle:
        swapped = {(entry.name, entry.op) for entry in handle.report.swapped}
        left = {(entry.name, entry.op): entry for entry in handle.report.left}
    assert {("transformer_blocks.0", "gate_residual_adaln"), ("transformer_blocks.0.norm1", "adaln_modulate_dual"),
            ("transformer_blocks.1.norm1", "adaln_modulate"), ("transformer_blocks.0.attn2", "qk_norm_rope"), ("norm_out", "adaln_modulate")} <= swapped
    assert "close" in left["transformer_blocks.0.attn", "attention"].reason and "close" in left["transformer_blocks.2.ff", "linear"].reason
    assert "gate_residual_adaln: transformer_blocks.0 and 2 more" in str(handle.report)
    with fusewire.swapped(model, "close", strict=True) as handle:
        assert {entry.op for entry in handle.report.swapped} >= {"attention", "linear", "adaln_modulate"} and not handle.report.left


def test_only():
    model = stock_model("sd3.5")
    with fusewire.swapped(model, only="adaln_modulate") as handle:
        assert {entry.op for entry in handle.report.swapped} == {"adaln_modulate"} and not handle.report.left
        assert type(model.transformer_blocks[0]) is JointTransformerBlock and type(model.transformer_blocks[1].norm1) is not AdaLayerNormZero
    with fusewire.swapped(model, "close", only=["linear"]):
        ops.reset_stats()
        run(model, inputs())
        counts = {op: sum(served.values()) for op, served in ops.stats().items()}
        assert counts["linear"] and not counts["gate_residual"] and not counts.get("joint_attention")
    pipe = tiny_pipeline()
    with fusewire.swapped(pipe, only="sampler_step"):
        assert type(pipe.transformer.transformer_blocks[0]) is JointTransformerBlock and type(pipe.scheduler) is not FlowMatchEulerDiscreteScheduler


def test_every_name_of_the_report_is_one_for_only():
    model = stock_unet.unet("sd")
    with fusewire.swapped(model, "close") as handle:
        names = {entry.op for entry in handle.report.swapped}
    assert {"convolution", "geglu", "group_norm_silu", "attention", "linear"} <= names
    for name in names:
        only = {name, "linear"} if name == "geglu" else {name}
        with fusewire.swapped(model, "close", only=only, strict=True) as handle:
            assert {entry.op for entry in handle.report.swapped} == (only | {"geglu"} if name == "linear" else only)


def test_a_bare_block_and_a_bare_scheduler():
    block = stock_model("sd3").transformer_blocks[0]
    with fusewire.swapped(block) as handle:
        assert type(block) is not JointTransformerBlock and {"block", "norm1"} <= {entry.name for entry in handle.report.swapped}
    scheduler = FlowMatchEulerDiscreteScheduler()
    with fusewire.swapped(scheduler):
        assert type(scheduler) is not FlowMatchEulerDiscreteScheduler
    assert type(scheduler) is FlowMatchEulerDiscreteScheduler


class CustomProcessor(JointAttnProcessor2_0):
    pass


def custom_processor(model):
    model.transformer_blocks[1].attn.set_processor(CustomProcessor())


def own_forward(model):
    module = model.transformer_blocks[1].norm1
    module.forward = lambda *args, **kwargs: AdaLayerNormZero.forward(module, *args, **kwargs)


def layer_norm_of_queries(model):
    model.transformer_blocks[1].attn.norm_q = torch.nn.LayerNorm(16)


@pytest.mark.parametrize("change, name, op, reason", [
    (custom_processor, "transformer_blocks.1.attn", "qk_norm_rope", "its processor CustomProcessor is kept"),
    (own_forward, "transformer_blocks.1.norm1", "adaln_modulate", "its forward was replaced on the instance"),
    (layer_norm_of_queries, "transformer_blocks.1.attn", "qk_norm_rope", "its norm_q is torch's LayerNorm"),
])
def test_what_is_custom_is_left_alone_with_a_reason(change, name, op, reason, monkeypatch):
    monkeypatch.setattr(engine, "_warned", set())
    model = stock_model("sd3.5")
    change(model)
    data, before = inputs(), classes(model)
    want = run(model, data)
    with pytest.raises(SwapError, match=reason):
        fusewire.swap(model, strict=True)
    assert classes(model) == before
    with pytest.warns(SwapWarning, match=reason) as caught:
        handle = fusewire.swap(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [entry for entry in handle.report.left if (entry.name, entry.op) == (name, op) and reason in entry.reason]
    assert torch.equal(run(model, data), want)
    with warnings.catch_warnings():  # once per op and reason
        warnings.simplefilter("error")
        fusewire.swap(model)
    fusewire.restore(model)
    assert classes(model) == before and torch.equal(run(model, data), want)


def test_a_warning_names_the_users_line(monkeypatch):
    model = stock_model("sd3.5")
    custom_processor(model)
    for enter in (lambda: fusewire.swap(model).restore(), lambda: fusewire.swapped(model).__enter__().restore()):
        monkeypatch.setattr(engine, "_warned", set())
        with pytest.warns(SwapWarning) as caught:
            enter()
        assert {one.filename for one in caught} == {__file__}


def test_a_stock_forward_that_was_never_verified(monkeypatch):
    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        return encoder_hidden_states, hidden_states

    monkeypatch.setattr(JointTransformerBlock, "forward", forward)
    monkeypatch.setitem(sd3.BLOCKS, JointTransformerBlock, ({forward: ("f12a42101b07",)}, sd3.BLOCKS[JointTransformerBlock][1]))
    monkeypatch.setattr(engine, "_warned", set())
    model = stock_model("sd3")
    with pytest.warns(SwapWarning, match="is not one that was verified"):
        fusewire.swap(model)
    assert type(model.transformer_blocks[0]) is JointTransformerBlock and type(model.transformer_blocks[0].norm1) is not AdaLayerNormZero


@pytest.mark.parametrize("make, options, error, message", [
    (lambda: "a/folder", {}, TypeError, "^pipe_or_module is a str"),
    (lambda: None, {}, TypeError, "^pipe_or_module is a NoneType"),
    (lambda: stock_model("sd3"), dict(numerics="fast"), ValueError, "^numerics is 'fast'"),
    (lambda: stock_model("sd3"), dict(only="adaln"), ValueError, "^only is \\['adaln'\\]; it should name some of adaln_modulate"),
    (lambda: stock_model("sd3"), dict(only=[]), ValueError, "^only is \\[\\]"),
    (lambda: stock_unet.unet("sd"), dict(numerics="close", only=["geglu", "group_norm_silu"]), ValueError, "geglu only come with the linears .* name 'linear' too"),
    (lambda: stock_model("sd3"), dict(only=3), ValueError, "^only is 3; it should be the name of an op"),
    (lambda: torch.nn.Linear(2, 2), {}, ValueError, "^pipe_or_module is a Linear with nothing to swap"),
    (lambda: FeedForward(8), {}, ValueError, "^pipe_or_module is a FeedForward with nothing to swap"),
    (lambda: stock_model("sd3").to("meta"), {}, ValueError, "^pipe_or_module is not loaded: pos_embed.proj.weight is on the meta device"),
])
def test_bad_input(make, options, error, message):
    target = make()
    with pytest.raises(error, match=message):
        fusewire.swap(target, **options)
    if isinstance(target, torch.nn.Module):
        assert fusewire.restore(target) == 0


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_a_pipeline_of_another_kind(numerics):
    """Sound in one dimension, by a scheduler without a fused step: one error that says so, and the pipeline still works."""
    net = UNet1DModel(sample_size=64, sample_rate=16000, extra_in_channels=16, block_out_channels=(8, 32), down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
                      up_block_types=("UpBlock1D", "UpBlock1DNoSkip"), layers_per_block=1)
    pipe = DanceDiffusionPipeline(net, IPNDMScheduler())
    pipe.set_progress_bar_config(disable=True)
    before = classes(net)

    def sound():
        return torch.from_numpy(pipe(num_inference_steps=2, audio_length_in_s=64 / 16000, generator=torch.Generator().manual_seed(0)).audios)

    want = sound()
    with pytest.raises(NothingToDo, match=f"^pipe_or_module is a DanceDiffusionPipeline with nothing to swap for numerics='{numerics}'; "
                                          "model: UNet1DModel is not a model that we know, nor is a block of it; sampler_step: IPNDMScheduler has no "
                                          "fused step$"):
        fusewire.swap(pipe, numerics)
    assert classes(net) == before and type(pipe.scheduler) is IPNDMScheduler and fusewire.restore(pipe) == 0
    assert torch.equal(sound(), want)


@pytest.mark.parametrize("make, part", [
    (lambda scheduler: StableDiffusion3Pipeline(None, scheduler, *[None] * 7), "transformer"),
    (lambda scheduler: FluxPipeline(scheduler, *[None] * 6), "transformer"),
    (lambda scheduler: StableDiffusionPipeline(*[None] * 4, scheduler, None, None, requires_safety_checker=False), "unet"),
])
def test_a_pipeline_without_its_model(make, part):
    pipe = make(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(BadInput, match=f"^pipe_or_module has {part}=None; it should be a pipeline with its model loaded$"):
        fusewire.swap(pipe)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_processors_set_after_the_swap_do_their_own_work():
    model = stock_model("sd3.5")
    data = inputs()
    handle = fusewire.swap(model)
    seen = []

    class Counting:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            seen.append(attn)
            return JointAttnProcessor2_0()(attn, hidden_states, encoder_hidden_states)

    want = run(model, data)
    model.set_attn_processor(Counting())
    assert torch.equal(run(model, data), want) and len(seen) == 4
    handle.restore()
    assert all(type(processor) is Counting for processor in model.attn_processors.values())
    assert all(type(module) is Attention for module in model.modules() if isinstance(module, Attention))


def test_fused_projections_and_chunked_feed_forwards():
    model = stock_model("sd3.5")
    data = inputs()
    model.enable_forward_chunking(2, dim=1)
    chunked = run(model, dict(data, encoder_hidden_states=data["encoder_hidden_states"][:, :4]))
    with fusewire.swapped(model):
        assert torch.equal(run(model, dict(data, encoder_hidden_states=data["encoder_hidden_states"][:, :4])), chunked)
    model = stock_model("sd3")  # stock's own fused processor cannot do SD3.5's second attention
    want = run(model, data)
    with fusewire.swapped(model):
        model.fuse_qkv_projections()
        assert (run(model, data) - want).abs().max() < MODEL_FLOAT32
        model.unfuse_qkv_projections()
        assert torch.equal(run(model, data), want)


def test_a_family_that_cannot_be_imported(monkeypatch, recwarn):
    """Of a library that moved a class: named. Text encoders without transformers: no news."""
    without = ModuleNotFoundError("No module named 'transformers'", name="transformers")

    def imported(name, real=importlib.import_module):
        if name == "fusewire.swap.text_encoders":
            raise without
        return real(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    monkeypatch.setattr(families, "MODULES", ("fusewire.swap.scheduler", "fusewire.swap.text_encoders"))
    found, missing = families.load.__wrapped__()
    assert [family.name for family in found] == ["schedulers"] and "text_encoders" in missing and not recwarn
    without.name = "transformers.models.clip.modeling_clip"
    with pytest.warns(SwapWarning, match="text_encoders stay stock: No module named"):
        families.load.__wrapped__()
