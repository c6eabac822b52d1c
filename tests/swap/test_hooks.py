"""Modules that carry hooks: torch's, accelerate's and diffusers', put there before and after the swap. Both the hook and the fused forward run."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_group_offloading, apply_layer_skip, apply_layerwise_casting
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import JointTransformerBlock

import fusewire
from fusewire import ops
from tests.swap.tiny import generate, inputs, run, stock_model, tiny_pipeline
from tests.tolerance import AUTOCAST, MODEL_FLOAT32, PIPELINE_FLOAT32

PARTS = ["transformer_blocks.0", "transformer_blocks.0.norm1", "transformer_blocks.0.norm1.norm", "transformer_blocks.0.norm1.linear",
         "transformer_blocks.0.attn", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.norm_q", "transformer_blocks.0.attn.to_out.0",
         "transformer_blocks.0.attn.to_out.1", "transformer_blocks.0.attn2", "transformer_blocks.0.norm2", "transformer_blocks.0.ff",
         "transformer_blocks.0.ff.net.0", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.1", "transformer_blocks.0.ff.net.2",
         "transformer_blocks.0.norm2_context", "norm_out"]


def fused_calls() -> int:
    return sum(sum(served.values()) for served in ops.stats().values())


def doubled(output):
    return tuple(2 * part if isinstance(part, torch.Tensor) else part for part in output) if isinstance(output, tuple) else 2 * output


class Doubling(ModelHook):
    def __init__(self):
        self.calls = 0

    def post_forward(self, module, output):
        self.calls += 1
        return doubled(output)


class DiffusersDoubling(DiffusersHook):
    calls = 0

    def post_forward(self, module, output):
        self.calls += 1
        return doubled(output)


class Torch:
    """A forward hook of torch."""

    def __init__(self, module):
        self.calls = 0
        self.handle = module.register_forward_hook(self.hook)

    def hook(self, module, arguments, output):
        self.calls += 1
        return doubled(output)

    def remove(self):
        self.handle.remove()


class Accelerate:
    def __init__(self, module):
        self.module, self.hook = module, Doubling()
        add_hook_to_module(module, self.hook)

    @property
    def calls(self):
        return self.hook.calls

    def remove(self):
        remove_hook_from_module(self.module)


class Diffusers:
    def __init__(self, module):
        self.registry, self.hook = HookRegistry.check_if_exists_or_initialize(module), DiffusersDoubling()
        self.registry.register_hook(self.hook, "doubling")

    @property
    def calls(self):
        return self.hook.calls

    def remove(self):
        self.registry.remove_hook("doubling", recurse=False)


KINDS = [Torch, Accelerate, Diffusers]


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_and_the_fused_forward_both_run(kind, order, numerics):
    model = stock_model("sd3.5")
    data = inputs()
    plain = run(model, data)
    for part in PARTS:
        module = model.get_submodule(part)
        hook = kind(module)
        want = run(model, data)
        assert hook.calls == 1 and not torch.equal(want, plain), part
        if order == "after":
            hook.remove()
        with fusewire.swapped(model, numerics):
            if order == "after":
                hook = kind(module)
            calls = hook.calls
            ops.reset_stats()
            got = run(model, data)
            assert hook.calls == calls + 1, part
            assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= PIPELINE_FLOAT32, part
            assert ops.stats()["adaln_modulate"] and fused_calls()
            if order == "after":
                hook.remove()
                ops.reset_stats()
                got = run(model, data)
                assert torch.equal(got, plain) if numerics == "exact" else (got - plain).abs().max() <= PIPELINE_FLOAT32, part
        if order == "before":
            hook.remove()
        ops.reset_stats()
        assert torch.equal(run(model, data), plain) and not fused_calls(), part


@pytest.mark.parametrize("kind", KINDS)
def test_hooked_before_and_the_block_itself_is_fused(kind):
    """With every block hooked, the fused block forward runs inside the hook (not stock's, which the hook had wrapped)."""
    model = stock_model("sd3")
    hooks = [kind(block) for block in model.transformer_blocks]
    with fusewire.swapped(model):
        run(model, inputs())
        assert sum(ops.stats()["gate_residual_adaln"].values()) == 3  # image twice, text once: the last block has no text
    assert [hook.calls for hook in hooks] == [1, 1]


@pytest.mark.parametrize("kind", [Accelerate, Diffusers])
def test_hooked_after_the_swap_and_restored_under_the_hook(kind):
    model = stock_model("sd3.5")
    data = inputs()
    plain = run(model, data)
    handle = fusewire.swap(model)
    hook = kind(model.transformer_blocks[0])
    want = run(model, data)
    handle.restore()
    ops.reset_stats()
    assert torch.equal(run(model, data), want) and not fused_calls() and hook.calls == 2
    hook.remove()
    assert torch.equal(run(model, data), plain) and type(model.transformer_blocks[0]) is JointTransformerBlock and not fused_calls()


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_offload(order, numerics):
    """accelerate keeps the weights elsewhere and brings them for each call: nothing may be read outside a call."""
    model = stock_model("sd3.5")
    data = inputs()
    want = run(model, data)
    if order == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.proj_out.weight.is_meta
    handle = fusewire.swap(model, numerics)
    if order == "after":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    got = run(model, data)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= MODEL_FLOAT32
    assert fused_calls()
    handle.restore()
    assert torch.equal(run(model, data), want)


def test_model_offload_hook_on_the_whole_transformer():
    pipe = tiny_pipeline()
    want = generate(pipe)
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    with fusewire.swapped(pipe):
        assert torch.equal(generate(pipe), want) and fused_calls()
    hook.remove()
    assert torch.equal(generate(pipe), want)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind, order, numerics):
    model = stock_model("sd3.5")
    data = inputs()
    want = run(model, data)

    def offload():
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **blocks)

    if order == "before":
        offload()
    handle = fusewire.swap(model, numerics)
    if order == "after":
        offload()
    got = run(model, data)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= MODEL_FLOAT32
    assert fused_calls()
    handle.restore()
    assert torch.equal(run(model, data), want)


@pytest.mark.parametrize("numerics", ["exact", "close"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_layerwise_casting(order, numerics):
    """Weights stored in float8, cast to bfloat16 around each call of their module."""
    dtype = torch.bfloat16
    model, twin = stock_model("sd3.5", dtype), stock_model("sd3.5", dtype)
    twin.load_state_dict(model.state_dict())
    data = inputs(dtype=dtype)
    casting = dict(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    apply_layerwise_casting(twin, **casting, skip_modules_pattern=("pos_embed", "norm"))
    want = run(twin, data)
    assert not torch.equal(want, run(model, data))
    if order == "before":
        apply_layerwise_casting(model, **casting, skip_modules_pattern=("pos_embed", "norm"))
    handle = fusewire.swap(model, numerics)
    if order == "after":
        apply_layerwise_casting(model, **casting, skip_modules_pattern=("pos_embed", "norm"))
    got = run(model, data)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= AUTOCAST
    assert fused_calls() and model.transformer_blocks[0].attn.to_q.weight.dtype is torch.float8_e4m3fn
    handle.restore()
    assert torch.equal(run(model, data), want)


@pytest.mark.parametrize("order", ["before", "after"])
def test_layer_skip(order):
    """diffusers' hook on the feed-forwards of a block decides for itself whether their forward is called."""
    model = stock_model("sd3.5")
    data = inputs()
    plain = run(model, data)
    config = LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=False)
    apply_layer_skip(model, config)
    want = run(model, data)
    assert not torch.equal(want, plain)
    if order == "after":
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("layer_skip_hook")
    with fusewire.swapped(model):
        if order == "after":
            apply_layer_skip(model, config)
        assert torch.equal(run(model, data), want) and fused_calls()
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("layer_skip_hook")
    assert torch.equal(run(model, data), plain)


def test_block_hooks_find_the_fused_class_in_their_registry():
    stock = TransformerBlockRegistry.get(JointTransformerBlock)
    model = stock_model("sd3")
    for numerics in ("exact", "close"):
        fusewire.swap(model, numerics)
        found = TransformerBlockRegistry.get(type(model.transformer_blocks[0]))
        assert found.return_hidden_states_index == stock.return_hidden_states_index and found is not stock
        assert found._get_parameter_from_args_kwargs("encoder_hidden_states", (1, 2, 3)) == 2
    assert TransformerBlockRegistry.get(JointTransformerBlock) is stock and stock._cls is JointTransformerBlock


class SkipScores(torch.overrides.TorchFunctionMode):
    """What diffusers' perturbed attention guidance does: values in place of attention."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[2] if function is torch.nn.functional.scaled_dot_product_attention else function(*args, **(kwargs or {}))


class SkipScoresHook(DiffusersHook):
    def new_forward(self, module, *args, **kwargs):
        with SkipScores():
            return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_a_hook_that_intercepts_scaled_dot_product_attention(numerics):
    model = stock_model("sd3.5")
    data = inputs()
    plain = run(model, data)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0].attn).register_hook(SkipScoresHook(), "scores")
    want = run(model, data)
    assert (want - plain).abs().max() > 1e-3
    with fusewire.swapped(model, numerics):
        got = run(model, data)
    assert torch.equal(got, want) if numerics == "exact" else (got - want).abs().max() <= MODEL_FLOAT32


def gradients_of(model, given) -> list[torch.Tensor]:
    model.zero_grad()
    model(**given).sample.sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_global_backward_hooks_see_every_norm():
    """One that changes what passes a LayerNorm changes exact's gradients as stock's."""
    model, given = stock_model("sd3.5"), inputs(2, 16, 12)
    handle = torch.nn.modules.module.register_module_full_backward_hook(
        lambda module, grads, _: tuple(grad / 2 for grad in grads) if type(module) is torch.nn.LayerNorm else None)
    try:
        want = gradients_of(model, given)
        with fusewire.swapped(model):
            assert all(map(torch.equal, gradients_of(model, given), want)) and fused_calls()
    finally:
        handle.remove()
