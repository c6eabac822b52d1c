"""A pipeline with FaceID's IP-Adapter and its LoRA, as ``load_ip_adapter`` puts them there, before the swap and after it."""

from __future__ import annotations

import copy

import pytest
import torch

import fusewire
from fusewire import ops
from tests.compat.families import FAMILIES
from tests.compat.test_matrix import BOTH, calls, same
from tests.compat.test_pipelines import BOUND, denoiser, generate
from tests.models.test_ip_adapter_face import FACE, PICTURE, face_checkpoint


@pytest.mark.parametrize("kind", ["face", "face plus"])
@pytest.mark.parametrize("order", ["before", "after"])
@BOTH
def test_face_id(order, kind, numerics):
    torch.manual_seed(6)
    pipe = FAMILIES["SD1.5"].pipe(torch.float32)
    model, plain = denoiser(pipe), generate("SD1.5", pipe)
    given, pictures = face_checkpoint(kind, model, 24), torch.randn(2, 1, 5, PICTURE)
    image = dict(ip_adapter_image_embeds=[torch.randn(2, 1, FACE)])

    def put():
        pipe.load_ip_adapter(copy.deepcopy(given), subfolder=None, weight_name=None, image_encoder_folder=None)
        if kind == "face plus":
            model.encoder_hid_proj.image_projection_layers[0].clip_embeds = pictures

    def take():
        pipe.unload_ip_adapter()
        pipe.unload_lora_weights()

    put()
    want = generate("SD1.5", pipe, **image)
    assert not same(want, plain, "close", 1e-3)
    if order == "after":
        take()
    with fusewire.swapped(pipe, numerics):
        if order == "after":
            put()
        ops.reset_stats()
        assert same(generate("SD1.5", pipe, **image), want, numerics, BOUND) and calls()
        if order == "after":
            take()
            assert same(generate("SD1.5", pipe), plain, numerics, BOUND)
    if order == "before":
        assert torch.equal(generate("SD1.5", pipe, **image), want)
        take()
    assert torch.equal(generate("SD1.5", pipe), plain)
