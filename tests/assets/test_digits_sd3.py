"""The embedded pipeline: unmodified diffusers loads it, it fits its budget, and it draws what the prompt says."""

import copy
import json
from pathlib import Path

import pytest
import torch

from tests import tolerance

diffusers = pytest.importorskip("diffusers")
FOLDER = Path(__file__).parents[2] / "assets" / "digits-sd3"


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, steps, **options):
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    return pipe(prompts, height=32, width=32, num_inference_steps=steps, guidance_scale=4.0, generator=seeds, output_type="pt", **options).images


def test_files_fit_the_budget_and_hold_no_pickles_or_machine_paths():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    for path in files:
        if path.suffix == ".json":
            text = path.read_text()
            json.loads(text)
            assert "_name_or_path" not in text and "/tmp" not in text, path


def test_loads_as_float32_with_every_part(pipe):
    assert pipe.text_encoder_3 is None and pipe.tokenizer_3 is None
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        assert {p.dtype for p in part.parameters()} == {torch.float32}, type(part)
    assert pipe.transformer.config.qk_norm == "rms_norm" and list(pipe.transformer.config.dual_attention_layers) == [0]


def test_a_picture_is_finite_and_the_seed_decides_it(pipe):
    one = draw(pipe, ["a handwritten red seven on white paper"], steps=2)
    assert one.shape == (1, 3, 32, 32) and one.isfinite().all() and one.std() > 0.05
    assert torch.equal(one, draw(pipe, ["a handwritten red seven on white paper"], steps=2))


@pytest.mark.parametrize("zeros, steps", [(0, 28), (256, 10)])
def test_it_draws_the_prompted_digits_and_colours(pipe, zeros, steps):
    """One picture of each digit, without and with the rows of zeros that stand for T5; one slip in each is let pass."""
    safetensors = pytest.importorskip("safetensors.torch")
    from examples.digits import data, reader

    concepts = [data.Concept(d, d % len(data.INKS), d % len(data.PAPERS)) for d in range(10)]
    prompts = [data.caption(data.TEMPLATES[c.digit % len(data.TEMPLATES)], c, numeral=c.digit % 2 == 1) for c in concepts]
    x = draw(pipe, prompts, steps=steps, max_sequence_length=zeros) * 2 - 1
    model = reader.Reader().eval()
    model.load_state_dict(safetensors.load_file(FOLDER / "reader.safetensors"))
    ink, paper = reader.read_colours(x)
    with torch.inference_mode():
        digits = model(x).argmax(1)
    assert sum(d == c.digit for d, c in zip(digits.tolist(), concepts)) >= 9
    assert sum((i, p) == (c.ink, c.paper) for i, p, c in zip(ink.tolist(), paper.tolist(), concepts)) >= 9


def test_our_model_takes_the_weights_and_gives_the_same_velocity(pipe):
    from fusewire.models.mmdit import MMDiT, MMDiTConfig
    from tests.models.stock_sd3 import in_float64

    model = MMDiT(MMDiTConfig.from_dict(pipe.transformer.config)).double()
    model.load_state_dict(pipe.transformer.state_dict())
    stock = in_float64(copy.deepcopy(pipe.transformer))
    embeds, _, pooled, _ = pipe.encode_prompt("a blue 3 on pink paper", None, None, do_classifier_free_guidance=False, max_sequence_length=5)
    inputs = dict(hidden_states=torch.randn(1, 4, 16, 16, dtype=torch.float64), encoder_hidden_states=embeds.double(),
                  pooled_projections=pooled.double(), timestep=torch.tensor([700.0], dtype=torch.float64))
    with torch.inference_mode():
        want = stock(**inputs).sample
        tolerance.assert_close(model(**inputs), want, want)
