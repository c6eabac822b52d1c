"""Folders that are half downloaded, damaged or hostile: one clear error each, and nothing loaded."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusewire import targets
from fusewire.errors import BadInput
from fusewire.folders import check_vocabulary, open_encoder, open_folder, safetensors_header
from tests.cli.runner import run
from tests.swap.whole import clip, vae
from tests.tiny import letters, tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(folder, tmp_path):
    """One that a test may change."""
    return shutil.copytree(folder, tmp_path / "tiny-sd3")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def header_edit(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length:])


def poison(folder):
    weights = load_file(folder / WEIGHTS)
    weights["proj_out.bias"][3] = torch.inf
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def forget(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["proj_out.bias"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def forget_of_encoder(folder):
    path = folder / "text_encoder_2/model.safetensors"
    weights = load_file(path)
    del weights["text_projection.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def lose(*names):
    """The tokenizer as a slow one has it, tokenizer.json given up for vocab.json and merges.txt; then without ``names``."""
    def damage(folder):
        files = folder / "tokenizer"
        vocabulary = json.loads((files / "tokenizer.json").read_text())["model"]
        (files / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
        (files / "merges.txt").write_text("#version: 0.2\n")
        for name in ("tokenizer.json", *names):
            (files / name).unlink()
    return damage


NO_VOCABULARY = "tokenizer has no vocabulary (tokenizer/tokenizer.json, or tokenizer/vocab.json and tokenizer/merges.txt)"


def first(header):
    return next(name for name in header if name != "__metadata__")


def shard_outside(folder):
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def shard_missing(folder):
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}))


def several_that_name_themselves(folder):
    edit(folder / "model_index.json", lambda d: d.update(transformer=["diffusers", "MultiControlNetModel"]))
    edit(folder / "transformer/config.json", lambda d: d.update(_class_name="MultiControlNetModel"))


def truncate(path, count):
    path.write_bytes(path.read_bytes()[:count])


DAMAGE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "neither model_index.json nor config.json"),
    "index is half": (lambda f: truncate(f / "model_index.json", 60), "model_index.json is not valid JSON"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "holds a list"),
    "unknown pipeline": (lambda f: edit(f / "model_index.json", lambda d: d.update(_class_name="NoSuchPipeline")), "'NoSuchPipeline'"),
    "pipeline is no pipeline": (lambda f: edit(f / "model_index.json", lambda d: d.update(_class_name="logging")), "'logging'"),
    "code from elsewhere": (lambda f: edit(f / "model_index.json", lambda d: d.update(transformer=["evil", "Evil"])), "comes from 'evil'"),
    "class of another package": (lambda f: edit(f / "model_index.json", lambda d: d.update(transformer=["stable_diffusion_3", "SD3Transformer2DModel"])),
                                 "cannot be loaded"),
    "class that is no model": (lambda f: edit(f / "model_index.json", lambda d: d.update(transformer=["diffusers", "logging"])), "'logging'"),
    "several models that name themselves": (several_that_name_themselves, "does not describe a MultiControlNetModel"),
    "component missing": (lambda f: shutil.rmtree(f / "vae"), "component folder vae is missing"),
    "config missing": (lambda f: (f / "transformer/config.json").unlink(), "half downloaded"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "transformer has no .safetensors file"),
    "text encoder's weights missing": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "text_encoder has no .safetensors file"),
    "only a pickle": (lambda f: (f / WEIGHTS).rename(f / "transformer/diffusion_pytorch_model.bin"), "a pickle can run code"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "truncated or no safetensors file"),
    "cut off": (lambda f: truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 100), "is truncated"),
    "cut in the header": (lambda f: truncate(f / WEIGHTS, 200), "truncated or no safetensors file"),
    "header claims too much": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "its header claims 9223372036854775808 bytes"),
    "header is noise": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\x00\x01"), "damaged safetensors header"),
    "tensor lies about its shape": (lambda f: header_edit(f / WEIGHTS, lambda h: h[first(h)].update(shape=[10**9, 10**9])), "needs"),
    "negative shape": (lambda f: header_edit(f / WEIGHTS, lambda h: h[first(h)].update(shape=[-1])), "impossible header entry"),
    "offsets beyond the end": (lambda f: header_edit(f / WEIGHTS, lambda h: h[first(h)].update(data_offsets=[0, 10**15])), "its header gives it"),
    "shard missing": (shard_missing, "00001-of-00002.safetensors is missing"),
    "shard outside": (shard_outside, "outside its folder"),
    "another width": (lambda f: edit(f / "transformer/config.json", lambda d: d.update(num_attention_heads=3)), "config.json"),
    "more layers": (lambda f: edit(f / "transformer/config.json", lambda d: d.update(num_layers=3)), "transformer lacks"),
    "one weight missing": (forget, "'proj_out.bias'"),
    "one weight of a text encoder missing": (forget_of_encoder, "text_encoder_2/model.safetensors lacks 1 weights, 'text_projection.weight'"),
    "text encoder of no model": (lambda f: edit(f / "model_index.json", lambda d: d.update(text_encoder=["transformers", "AutoModel"])), "'AutoModel'"),
    "no vocabulary": (lose("vocab.json", "merges.txt"), NO_VOCABULARY),
    "no merges": (lose("merges.txt"), NO_VOCABULARY),
    "half a vocabulary": (lambda f: truncate(f / "tokenizer/tokenizer.json", 200), "cannot be loaded"),
    "infinite weight": (poison, "weight transformer.proj_out.bias holds 1 values that are NaN or infinite"),
    "half tokenizer": (lambda f: truncate(f / "tokenizer/tokenizer_config.json", 30), "tokenizer/tokenizer_config.json is not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    result = run("swap", "--dry-run", str(folder))
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.output, result.stderr
    assert str(folder) not in result.stderr


def test_an_undamaged_folder_loads(folder):
    loaded = targets.load(str(folder), dtype="bf16")
    assert loaded.name == "tiny-sd3" and loaded.value.transformer.dtype is torch.bfloat16 and not loaded.value.transformer.training
    assert not loaded.value.text_encoder.training
    want = tiny_pipeline(torch.bfloat16).text_encoder.state_dict()
    got = loaded.value.text_encoder.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_vocabulary_in_two_files_loads(folder):
    want = targets.load(str(folder)).value.tokenizer("a red 7")["input_ids"]
    lose()(folder)
    got = targets.load(str(folder)).value.tokenizer
    assert got("a red 7")["input_ids"] == want and len(got) == 190


@pytest.mark.parametrize("name, files, complete", [
    ("T5Tokenizer", ["spiece.model"], True), ("T5TokenizerFast", ["tokenizer.json"], True), ("T5Tokenizer", ["vocab.json", "merges.txt"], False),
    ("ByT5Tokenizer", [], True), ("GemmaTokenizer", ["tokenizer.model"], True), ("GemmaTokenizer", [], False), ("CLIPImageProcessor", [], True),
])
def test_which_files_are_a_vocabulary(tmp_path, name, files, complete):
    for file in files:
        (tmp_path / file).touch()
    if complete:
        return check_vocabulary(tmp_path, name)
    with pytest.raises(BadInput, match="has no vocabulary"):
        check_vocabulary(tmp_path, name)


def test_a_weight_under_two_names_is_not_missing(tmp_path):
    """T5 stores its embedding once, and keeps some layers in float32 where all else is float16: as its own loader does."""
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    got, want = open_encoder(tmp_path, "transformers", "T5EncoderModel", torch.float16), T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)
    assert {name: value.dtype for name, value in got.state_dict().items()} == {name: value.dtype for name, value in want.state_dict().items()}
    assert all(torch.equal(value, want.state_dict()[name]) for name, value in got.state_dict().items())


def test_a_denoiser_alone_loads(folder):
    loaded = targets.load(str(folder / "transformer"))
    assert type(loaded.value).__name__ == "SD3Transformer2DModel" and loaded.inputs is None


def test_layers_are_for_presets(folder):
    with pytest.raises(BadInput, match="can be set for presets only"):
        targets.load(str(folder), layers=2)


def test_size_has_to_fit(folder):
    with pytest.raises(BadInput, match="multiple of 4"):
        targets.load(str(folder), size=30)


def test_a_file_is_no_target(folder):
    with pytest.raises(BadInput, match="is a file"):
        targets.load(str(folder / "model_index.json"))


def test_header_of_a_sound_file(folder):
    shapes = safetensors_header(folder / WEIGHTS)
    assert shapes == {name: list(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}


def test_presets_keep_their_seed():
    state = torch.get_rng_state()
    a, b, c = (targets.load("sd3.5-tiny", seed=seed).value.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["proj_out.weight"], c["proj_out.weight"])


def test_layers_and_size_of_presets():
    for layers in (1, 2):
        assert len(targets.load("sd3.5-tiny", layers=layers).value.transformer_blocks) == layers
        assert targets.PRESETS["sd3.5-medium"].depth(layers)["num_layers"] == layers
    with pytest.raises(BadInput, match="--layers is 3; sd3.5-tiny has 2"):
        targets.load("sd3.5-tiny", layers=3)
    large = targets.load("sd3.5-tiny", size=96)
    assert large.size == 96 and large.inputs["hidden_states"].shape[2:] == (12, 12)
    assert targets.load("sd3.5-tiny").inputs["hidden_states"].shape[2:] == (8, 8)
    tokens = []
    block = large.value.transformer_blocks[0]
    with torch.no_grad(), block.register_forward_pre_hook(lambda _, args, kwargs: tokens.append(kwargs["hidden_states"].shape[1]), with_kwargs=True):
        assert large.value(**large.inputs)[0].shape[2:] == (12, 12)
    assert tokens == [36] and len(targets.load("flux-tiny", size=96).inputs["img_ids"]) == 36


def test_the_full_shape_is_that_of_the_published_model():
    config = targets.PRESETS["sd3.5-medium"].config
    assert config["num_attention_heads"] * config["attention_head_dim"] == 1536 == config["caption_projection_dim"]
    preset = targets.PRESETS["sd3.5-medium"]
    assert (preset.size // 16) ** 2 == 1024 and preset.text_tokens == 154 and preset.depth(preset.layers)["dual_attention_layers"] == (0, 1)


def unet_folder(path, cls, **parts):
    from diffusers import DDIMScheduler
    from tests.models import stock_unet

    tokenizer = letters()
    whole = dict(vae=vae(torch.float32), text_encoder=clip(torch.float32, 24, tokenizer), tokenizer=tokenizer, feature_extractor=None, safety_checker=None)
    cls(**(whole | parts), unet=stock_unet.unet("sd"), scheduler=DDIMScheduler(), requires_safety_checker=False).save_pretrained(path)
    return path


def test_a_class_of_diffusers_own_pipelines(tmp_path):
    """SD1's safety checker is neither diffusers' at large nor transformers'; a weight of it that is missing would be drawn at random."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(vision_config=dict(small, image_size=32, patch_size=16), text_config=dict(small, vocab_size=100), projection_dim=16)
    path = unet_folder(tmp_path / "sd", StableDiffusionPipeline, feature_extractor=CLIPImageProcessor(),
                       safety_checker=StableDiffusionSafetyChecker(config))
    assert type(open_folder(path, torch.float32).safety_checker) is StableDiffusionSafetyChecker
    weights = path / "safety_checker/model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name != "concept_embeds"}, weights, {"format": "pt"})
    with pytest.raises(BadInput, match="safety_checker/model.safetensors lacks 1 weights, 'concept_embeds'"):
        open_folder(path, torch.float32)


def test_several_controlnets(tmp_path):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from tests.models import stock_unet

    nets = [ControlNetModel.from_unet(stock_unet.unet("sd"), conditioning_embedding_out_channels=(4, 8)) for _ in range(2)]
    path = unet_folder(tmp_path / "two", StableDiffusionControlNetPipeline, controlnet=nets)
    assert len(open_folder(path, torch.float32).controlnet.nets) == 2
    (path / "controlnet_1/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInput, match="controlnet_1 has no .safetensors file"):
        open_folder(path, torch.float32)


def test_a_folder_of_a_variant_alone(tmp_path):
    """As ``from_pretrained(repository, variant="fp16")`` downloads it: small ones in one file, large ones in shards."""
    pipe = tiny_pipeline(torch.float16)
    pipe.save_pretrained(tmp_path / "whole", variant="fp16")
    pipe.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="40KB")
    assert not list((tmp_path / "whole").glob("*/*model.safetensors")) and list((tmp_path / "shards").glob("transformer/*.index.fp16.json"))
    for name in ("whole", "shards"):
        loaded = targets.load(str(tmp_path / name), dtype="float16").value
        for part in ("transformer", "vae", "text_encoder"):
            for key, weight in getattr(pipe, part).state_dict().items():
                assert torch.equal(getattr(loaded, part).state_dict()[key], weight), (name, part, key)
    assert type(targets.load(str(tmp_path / "whole" / "transformer")).value).__name__ == "SD3Transformer2DModel"


def test_a_variant_beside_the_weights_hides_no_damage(folder):
    """The loader takes the plain file; a stray index of another variant is nobody's."""
    whole = load_file(folder / WEIGHTS)
    beside = (folder / WEIGHTS).with_suffix(".fp16.safetensors")
    save_file({key: value.half() for key, value in whole.items()}, beside, metadata={"format": "pt"})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": {"x": "absent.safetensors"}}))
    loaded = targets.load(str(folder)).value.transformer
    assert all(torch.equal(weight, whole[key]) for key, weight in loaded.state_dict().items() if key in whole)
    forget(folder)
    with pytest.raises(BadInput, match="'proj_out.bias' among them: the checkpoint is incomplete"):
        targets.load(str(folder))


def test_a_folder_by_a_dot(folder, monkeypatch):
    monkeypatch.chdir(folder / "transformer")
    assert targets.load("..").name == folder.name and targets.load(".").name == "transformer"
