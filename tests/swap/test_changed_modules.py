"""Models whose modules a user has changed, before the swap or after it: pruned and normalised linears, dropouts replaced, one conditioning for a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import fusewire
from fusewire import ops
from fusewire.kernels.library import CPU
from tests.models import stock_flux, stock_sd3, stock_unet

FAMILIES = {
    "SD3.5": (lambda: stock_sd3.stock_model("sd3.5"), lambda: stock_sd3.inputs(2, 16, 12), ("timestep", "pooled_projections"),
              lambda model: model.transformer_blocks[0].attn.to_q),
    "Flux": (lambda: stock_flux.stock_model("dev"), lambda: stock_flux.inputs("dev", 2, 8, 7), ("timestep", "pooled_projections", "guidance"),
             lambda model: model.transformer_blocks[0].attn.to_q),
    "DiT": (lambda: stock_unet.dit(), lambda: stock_unet.dit_inputs(2, size=16), ("timestep", "class_labels"), lambda model: model.transformer_blocks[0].ff.net[2]),
}
families = pytest.mark.parametrize("family", FAMILIES)
both = pytest.mark.parametrize("numerics", ("exact", "close"))


@torch.no_grad()
def output(model, given) -> torch.Tensor:
    return model(**given, return_dict=False)[0]


def check(got: torch.Tensor, want: torch.Tensor, numerics: str) -> None:
    assert not CPU.loaded or ops.stats()["adaln_modulate"]["cpu"]  # the swapped run was fused
    if numerics == "exact":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@both
@families
@pytest.mark.parametrize("first", (True, False), ids=("before", "after"))
@pytest.mark.parametrize("change", (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), weight_norm, spectral_norm), ids=("pruned", "weight_norm", "spectral_norm"))
def test_linears_whose_weight_is_computed(change, first, family, numerics):
    make, inputs, _, part = FAMILIES[family]
    model, given = make().eval(), inputs()
    plain = output(model, given)
    if not first:
        handle = fusewire.swap(model, numerics)
    change(part(model))
    if first:
        handle = fusewire.swap(model, numerics)
    got = output(model, given)
    handle.restore()
    want = output(model, given)
    assert change is weight_norm or not torch.equal(want, plain)
    check(got, want, numerics)


@both
@families
def test_dropouts_replaced(family, numerics):
    make, inputs, *_ = FAMILIES[family]
    model, given = make(), inputs()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, nn.Identity())
    want = output(model, given)
    with fusewire.swapped(model, numerics):
        check(output(model, given), want, numerics)


@both
@families
def test_one_conditioning_for_all_pictures(family, numerics):
    make, inputs, conditioning, _ = FAMILIES[family]
    model, given = make(), inputs()
    given |= {name: given[name][:1] for name in conditioning}
    want = output(model, given)
    with fusewire.swapped(model, numerics):
        check(output(model, given), want, numerics)


@both
@pytest.mark.parametrize("family, stream", [("SD3.5", "hidden_states"), ("SD3.5", "encoder_hidden_states"), ("Flux", "hidden_states"),
                                            ("Flux", "encoder_hidden_states"), ("DiT", "hidden_states")])
def test_one_stream_for_all_conditionings(family, stream, numerics):
    """As diffusers' training scripts give one prompt to several pictures: stock's modulation broadcasts it. Gradients too."""
    make, inputs, *_ = FAMILIES[family]
    model, given = make(), inputs()
    given[stream] = given[stream][:1]
    want = output(model, given)
    model(**given, return_dict=False)[0].square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with fusewire.swapped(model, numerics):
        check(output(model, given), want, numerics)
        model(**given, return_dict=False)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@both
@families
@pytest.mark.parametrize("as_buffer", (True, False))
def test_a_bias_that_is_no_parameter(as_buffer, family, numerics):
    make, inputs, _, part = FAMILIES[family]
    model, given = make(), inputs()
    linear = part(model)
    bias = linear.bias.detach() * 3
    del linear.bias
    if as_buffer:
        linear.register_buffer("bias", bias)
    else:
        linear.bias = bias
    want = output(model, given)
    with fusewire.swapped(model, numerics):
        check(output(model, given), want, numerics)
