"""The training script's parts: resuming gives the same bits, the pictures and captions are what they claim to be."""

from collections import Counter

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
from examples.digits import data, flow, reader, text  # noqa: E402
from examples.digits.stage import Interrupted, Stage, rate_factor  # noqa: E402


def small_stage(folder, steps=12):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    return model, Stage(folder, "small", model, seed=3, steps=steps, lr=1e-2, ema=0.9)


def loss_of(model):
    return lambda random: model(torch.randn(6, 5, generator=random)).square().mean()


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path):
    model, stage = small_stage(tmp_path / "whole")
    stage.run(loss_of(model))

    broken, halted = small_stage(tmp_path / "broken")
    def interrupt(random):
        if halted.step == 4:
            import os
            import signal
            os.kill(os.getpid(), signal.SIGINT)
        return loss_of(broken)(random)
    with pytest.raises(Interrupted, match="step 5 of stage small"):
        halted.run(interrupt)
    resumed, again = small_stage(tmp_path / "broken")
    assert again.step == 5
    again.run(loss_of(resumed))
    assert again.losses == stage.losses and len(stage.losses) == 12
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
        assert torch.equal(stage.average[key], again.average[key]), key


def test_minutes_end_the_schedule_early(tmp_path):
    model, stage = small_stage(tmp_path, steps=100_000)
    stage.minutes = 0.005
    stage.run(loss_of(model))
    assert 0 < stage.step < 100_000 and stage.progress >= 1


def test_learning_rate_is_level_until_the_decay():
    assert rate_factor(0, 0.0) == 0.01 and rate_factor(500, 0.3) == 1.0 and rate_factor(500, 0.85) == pytest.approx(0.5)
    assert rate_factor(999, 0.999) == 0.02


def test_a_fifth_of_each_digits_scans_is_held_out():
    (held_in, digits_in), (held_out, digits_out) = data.split_scans()
    assert (len(held_in), len(held_out)) == (1437, 360)
    counts_in, counts_out = Counter(digits_in.tolist()), Counter(digits_out.tolist())
    assert all(0.18 < counts_out[d] / (counts_out[d] + counts_in[d]) < 0.22 for d in range(10))
    assert not {tuple(s.flatten().tolist()) for s in held_in} & {tuple(s.flatten().tolist()) for s in held_out}


def test_captions_say_what_they_should():
    eight = data.Concept(8, ink=5, paper=0)
    assert data.caption(data.TEMPLATES[0], eight, numeral=False) == "a handwritten orange eight on white paper"
    assert data.caption(data.TEMPLATES[1], eight, numeral=True) == "an orange 8 on white paper"
    assert data.caption(data.OPEN_TEMPLATES[1], data.Concept(1, 1, 0), numeral=False) == "a red one"


def test_every_caption_is_whole_words_and_fits(tmp_path):
    tokenizer = text.write_tokenizer(tmp_path, pad="!")
    captions = text.all_captions()
    ids = tokenizer(captions).input_ids
    assert max(map(len, ids)) <= text.LENGTH
    assert all(t.endswith("</w>") or t in (text.START, text.END) for row in ids for t in tokenizer.convert_ids_to_tokens(row))
    other = tokenizer("Zebra, ink!").input_ids   # unknown words fall into letters, never into the end token
    assert other[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in other[:-1]


def test_pictures_read_back_their_colours():
    (scans, _), _ = data.split_scans()
    ink = torch.arange(24) % len(data.INKS)
    paper = torch.arange(24) // len(data.INKS)
    x = data.render(scans[:24], ink, paper, torch.Generator().manual_seed(0))
    assert x.shape == (24, 3, 32, 32) and x.abs().max() <= 1
    read_ink, read_paper = reader.read_colours(x)
    assert torch.equal(read_ink, ink) and torch.equal(read_paper, paper)


def test_times_follow_the_schedulers_shift():
    t = flow.sample_times(20_000, torch.Generator().manual_seed(0))
    assert 0 < t.min() and t.max() < 1
    # The median of a logit-normal is 1/2, which the scheduler shifts to s / (1 + s).
    assert t.median().item() == pytest.approx(flow.SHIFT / (1 + flow.SHIFT), abs=0.01)


def test_training_conditions_on_what_the_pipeline_feeds(tmp_path):
    """Caption rows, the empty prompt's row and the appended zeros are the pipeline's own, for both halves of guidance."""
    tokenizers = [text.write_tokenizer(tmp_path / "tokenizer", text.END), text.write_tokenizer(tmp_path / "tokenizer_2", "!")]
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from examples.digits import vae

    encoders = text.build(*tokenizers).eval()
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**flow.CONFIG), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.build().eval(),
        text_encoder=encoders[0], tokenizer=tokenizers[0], text_encoder_2=encoders[1], tokenizer_2=tokenizers[1],
        text_encoder_3=None, tokenizer_3=None)
    pipe.vae.register_to_config(shift_factor=0.1, scaling_factor=2.0)
    (scans, digits), _ = data.split_scans()
    cache = flow.fill_cache(pipe, scans, digits, 8, torch.Generator().manual_seed(0))
    assert cache.latents.shape == (8, 4, 16, 16)
    caption = "a handwritten red seven on white paper"
    with torch.inference_mode():
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(caption, None, None, negative_prompt="")
    for want, want_pooled, row in ((embeds, pooled, cache.row[caption]), (negative, negative_pooled, 0)):
        ours = torch.nn.functional.pad(cache.embeds[row], (0, 0, 0, 256))
        torch.testing.assert_close(ours, want[0], rtol=0, atol=1e-5)   # float32, another batch size in the matrix products
        torch.testing.assert_close(cache.pooled[row], want_pooled[0], rtol=0, atol=1e-5)
