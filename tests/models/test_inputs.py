"""Inputs of another device or dtype: every model names the argument, and no op has run."""

from __future__ import annotations

import pytest
import torch

from fusewire import ops
from fusewire.models.inputs import check_inputs
from tests.models import (stock_flux, stock_sd3, stock_text, stock_unet, test_adapter, test_controlnet_flux, test_controlnet_sd3, test_flux, test_ip_adapter,
                          test_ip_adapter_sd3, test_mmdit, test_pixart, test_text_encoders, test_unet, test_vae)
from tests.models import test_dit as dit


def unet(variant: str, **more):
    return test_unet.ours(test_unet.stock_model(variant)), test_unet.inputs(variant) | more


def encoder(variant: str):
    ids = stock_text.tokens(2, 9)
    return test_text_encoders.ours(stock_text.stock_model(variant)), dict(input_ids=ids, attention_mask=stock_text.padding(ids))


def adapted(variant: str, adapters: str, **more):
    return test_ip_adapter.ours(variant, test_ip_adapter.stock_model(variant, adapters)[0]), test_ip_adapter.inputs(variant, adapters) | more


def pixart():
    model = test_pixart.ours(test_pixart.stock_model("alpha"))
    return model, test_pixart.inputs("alpha") | dict(attention_mask=torch.ones(2, 16))


def vae():
    model = test_vae.ours(stock_unet.vae(), "close")
    return model.encode, dict(x=test_vae.picture(2, 12, 8))


def decoder():
    model = test_vae.ours(stock_unet.vae(variant="flux"), "close")
    return model.decode, dict(z=torch.randn(1, 16, 4, 4))


# Model and inputs, with every optional tensor somewhere
CASES = {
    "MMDiT": lambda: (test_mmdit.ours("sd3.5", stock_sd3.stock_model("sd3.5")),
                      stock_sd3.inputs() | dict(block_controlnet_hidden_states=[torch.randn(2, 24, 32)] * 2)),
    "Flux": lambda: (test_flux.ours("dev", stock_flux.stock_model("dev")),
                     stock_flux.inputs("dev") | dict(controlnet_block_samples=[torch.randn(2, 15, 32)], controlnet_single_block_samples=[torch.randn(2, 15, 32)])),
    "SD3's ControlNet": lambda: (test_controlnet_sd3.ours(test_controlnet_sd3.stock_model("sd3")), test_controlnet_sd3.inputs("sd3")),
    "Flux's ControlNet": lambda: (test_controlnet_flux.ours(test_controlnet_flux.stock_model("union")), test_controlnet_flux.inputs("union")),
    "DiT": lambda: (dit.ours(stock_unet.dit(), "close"), stock_unet.dit_inputs()),
    "PixArt": pixart,
    "UNet": lambda: unet("sd", encoder_attention_mask=torch.ones(2, 5), mid_block_additional_residual=torch.zeros(2, 32, 4, 6),
                         down_block_additional_residuals=[torch.zeros(1)], down_intrablock_additional_residuals=[torch.zeros(1)]),
    "UNet of SDXL": lambda: unet("sdxl"),
    "UNet, distilled": lambda: unet("distilled"),
    "UNet with IP-Adapters": lambda: adapted("sd", "two", ip_adapter_masks=[torch.zeros(1, 2, 8, 12)] * 2),
    "Flux with an IP-Adapter": lambda: adapted("flux", "one"),
    "MMDiT with an IP-Adapter": lambda: (test_ip_adapter_sd3.one(), test_ip_adapter_sd3.inputs()),
    "VAE's encoder": vae,
    "VAE's decoder": decoder,
    "T2I-Adapter": lambda: (test_adapter.ours(test_adapter.stock_model("light_adapter")), dict(x=test_adapter.picture("light_adapter"))),
    "CLIP": lambda: encoder("CLIP gelu"),
    "T5": lambda: encoder("T5 relu"),
}
MOVED = ("UNet", "timestep")  # a number or a tensor of any device, as in diffusers


def changed(given: dict, change) -> list[tuple[str, dict]]:
    """For every tensor of ``given``: its name, and ``given`` with that one changed."""
    found = []
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            found.append((name, given | {name: change(value)}))
        elif isinstance(value, list):
            found += [(f"{name}[{i}]", given | {name: [*value[:i], change(one), *value[i + 1:]]}) for i, one in enumerate(value)]
        elif isinstance(value, dict):
            for inner, other in changed(value, change):
                key, bracket, index = inner.partition("[")
                found.append((f"{name}[{key!r}]{bracket}{index}", given | {name: other}))
    return found


def other_kind(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex64)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_another_device_or_dtype_is_named(case):
    model, given = CASES[case]()
    tried = 0
    for error, change, words in ((ValueError, lambda t: t.to("meta"), "is on meta; it should be on cpu, where the weights are"),
                                 (TypeError, other_kind, "has dtype torch.complex64; it should be ")):
        for name, arguments in changed(given, change):
            if name == MOVED[1] and case.startswith(MOVED[0]):
                continue
            with pytest.raises(error) as caught:
                model(**arguments)
            assert str(caught.value).startswith(f"{name} {words}"), (name, str(caught.value))
            tried += 1
    assert tried >= 2 and not any(sum(served.values()) for served in ops.stats().values())


@pytest.mark.parametrize("case, name, dtype, wanted", [
    ("MMDiT", "hidden_states", torch.int64, "float32, bfloat16, float16 or float64"), ("MMDiT", "pooled_projections", torch.uint8, "float32"),
    ("Flux", "encoder_hidden_states", torch.bool, "float32"), ("DiT", "class_labels", torch.float32, "int64 or int32"),
    ("UNet", "sample", torch.int32, "float32"), ("VAE's encoder", "x", torch.uint8, "float32"), ("T2I-Adapter", "x", torch.uint8, "float32"),
    ("CLIP", "input_ids", torch.float32, "int64 or int32"), ("T5", "input_ids", torch.bool, "int64 or int32"),
])
def test_dtypes_of_another_kind(case, name, dtype, wanted):
    model, given = CASES[case]()
    with pytest.raises(TypeError, match=f"^{name} has dtype {dtype}; it should be {wanted}"):
        model(**given | {name: given[name].to(dtype)})


def test_no_tensor_and_weights_that_a_hook_moves():
    with pytest.raises(TypeError, match="^timestep is a float; it should be a torch.Tensor"):
        CASES["DiT"]()[0](**stock_unet.dit_inputs() | dict(timestep=3.0))
    layer, x = torch.nn.Linear(3, 3, device="meta"), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="^x is on cpu; it should be on meta, where the weights are"):
        check_inputs(layer, dict(x=x))
    layer.register_forward_pre_hook(lambda *_: None)  # as offloading does: where the weights will be is not known
    check_inputs(layer, dict(x=x))
    with pytest.raises(ValueError, match="^y is on meta; it should be on cpu, where x is"):
        check_inputs(layer, dict(x=x, y=x.to("meta")))


def test_steps_and_labels_of_either_integer_and_steps_of_either_kind():
    model, given = CASES["DiT"]()
    want = model(**given)
    assert torch.equal(model(**given | dict(timestep=given["timestep"].int(), class_labels=given["class_labels"].int())), want)
    assert torch.equal(model(**given | dict(timestep=given["timestep"].float())), want)
