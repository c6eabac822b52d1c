"""``fusewire.parity`` on a whole tiny pipeline: what holds, what must fail, and what is refused."""

import inspect
import json

import numpy as np
import pytest
import torch
from torch import nn

import fusewire
from fusewire.errors import BadInput, NothingToDo
from fusewire.kernels.library import CPU
from fusewire.parity.pictures import float64_trajectory, generate, judge_pictures, plan
from fusewire.presets import inputs_for
from fusewire.profile.bench import bench
from tests.spoil import spoil
from tests.tiny import CALL, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def prove(pipe, **kwargs):
    return fusewire.parity(pipe, **{**dict(prompts=["a red 7"], seeds=(0, 1), steps=3, call=CALL), **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_level_holds(dtype):
    pipe = tiny_pipeline(dtype)
    result = prove(pipe)
    assert result.ok, result.failed
    levels = {(row.level, row.numerics) for row in result.rows}
    assert levels == {(level, numerics) for level in ("op", "block", "model", "picture") for numerics in ("exact", "close")}
    assert all(row.backend != "none" for row in result.rows if row.level in ("op", "model"))
    exact = [row for row in result.rows if row.numerics == "exact"]
    assert all(row.equal and row.mismatch == 0 for row in exact)
    assert {row.name for row in exact if row.level == "block"} >= {"transformer_blocks.0", "transformer_blocks.1"}
    assert len([row for row in exact if row.level == "picture"]) == 2
    assert result.curves["exact against stock"] == [0.0, 0.0, 0.0]
    assert all(error > 0 for error in result.curves["stock against float64"])
    assert result.pictures.variants["close"].shape == (2, 3, 16, 16)
    json.loads(json.dumps(result.to_dict(), allow_nan=False))


def test_the_pipeline_is_left_alone(pipe):
    classes = [type(m) for m in pipe.transformer.modules()]
    before = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    prove(pipe, levels=["block"])
    assert classes == [type(m) for m in pipe.transformer.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    assert all(torch.equal(t, before[name]) for name, t in pipe.transformer.state_dict().items())


def test_a_perturbed_kernel_fails_at_every_level(pipe, monkeypatch):
    spoil(monkeypatch, "gate_residual_adaln", lambda out: (out[0], out[1] * 2))
    result = prove(pipe)
    assert not result.ok
    for numerics in ("exact", "close"):
        assert {row.level for row in result.failed if row.numerics == numerics} == {"op", "block", "model", "picture"}


def test_a_kernel_of_the_autoencoder_alone_fails(pipe, monkeypatch):
    """The latents are stock's: it shows in its own calls, in both halves of the autoencoder, and in the decoded picture."""
    spoil(monkeypatch, "group_norm_silu", lambda out: out * 1.3)
    result = prove(pipe)
    for numerics in ("exact", "close"):
        failed = {(row.level, row.name.partition(" ")[0]) for row in result.failed if row.numerics == numerics}
        assert failed >= {("op", "group_norm_silu"), ("model", "vae.decoder"), ("model", "vae.encoder")} and all(level != "block" for level, _ in failed)
    assert any("decoded picture" in row.reason for row in result.failed if row.numerics == "exact" and row.level == "picture")


def test_every_text_encoder_has_a_verdict(pipe):
    result = prove(pipe, levels=["model"], numerics="exact")
    assert result.ok, result.failed
    encoders = {row.name for row in result.rows if row.name.startswith("text_encoder")}
    assert encoders == {f"{name} ({type(part).__name__})" for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None}


def test_parts_around_the_denoiser_are_judged_against_stock(pipe):
    """The weight of one norm of one copy differs by a hair, and its model alone fails."""
    from fusewire.parity import around, blocks

    swapped, component = fusewire.parity.swap_copies(pipe, ("close",)), "transformer"
    run = plan(pipe, ["a red 7"], [0], 1, 4.0, None, CALL)
    with around.watching(pipe, swapped[1], component) as parts:
        blocks.captured(pipe.transformer, lambda: generate(pipe, run, decode=False))
    names = [part.name for part in parts]
    assert names[:2] == ["vae.decoder", "vae.encoder"] and "text_encoder" in names and component not in names
    assert not any(module._forward_pre_hooks for name in ("vae", "text_encoder") for module in getattr(pipe, name).modules())
    assert all(row.holds for row in around.judge_parts(parts, pipe, swapped[0], swapped[1], lambda: None))
    wrong = next(module for module in swapped[0]["close"].text_encoder.modules() if isinstance(module, nn.LayerNorm))
    wrong.weight = nn.Parameter(wrong.weight * 1.001)
    assert {row.name.partition(" ")[0] for row in around.judge_parts(parts, pipe, swapped[0], swapped[1], lambda: None) if not row.holds} == {"text_encoder"}


def test_half_an_autoencoder_that_overflows_is_left_out():
    from fusewire.parity import around

    pipe = tiny_pipeline(torch.float16)
    assert [part.name for part in around._halves(pipe, "vae", pipe.vae)] == ["vae.decoder", "vae.encoder"]
    pipe.vae.decoder.conv_in.weight.data *= 60000
    assert [part.name for part in around._halves(pipe, "vae", pipe.vae)] == ["vae.encoder"]


def test_a_kernel_one_bit_off_fails_exact_only(pipe, monkeypatch):
    """The last bit of one element: ``close`` allows it, ``exact`` must not."""
    def one_bit(out):
        flat = out[0].clone().view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
        return flat.view_as(out[0]), out[1]

    spoil(monkeypatch, "gate_residual_adaln", one_bit)
    result = prove(pipe, levels=["op", "block"])
    assert {row.numerics for row in result.failed} == {"exact"} and {row.level for row in result.failed} == {"op", "block"}


def test_a_swap_that_runs_nothing_fails(pipe, monkeypatch):
    from fusewire.parity import blocks

    monkeypatch.setattr(blocks.dispatch, "stats", lambda: {})
    result = prove(pipe, levels=["model"])
    assert result.failed and all("no fused op" in row.reason for row in result.failed)


def test_a_denoiser_alone(pipe):
    result = fusewire.parity(pipe.transformer, levels=["op", "model"], numerics="exact")
    assert result.ok and {row.level for row in result.rows} == {"op", "model"} and result.pictures is None


def test_a_compiled_denoiser_is_judged_as_the_one_inside():
    """``pipe.transformer = torch.compile(pipe.transformer)``: in compiled graphs nobody counts who served."""
    pipe = tiny_pipeline()
    rows = {(row.level, row.name) for row in prove(pipe, numerics="exact").rows}
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    result = prove(pipe, numerics="exact")
    assert result.ok and {(row.level, row.name) for row in result.rows} == rows


def test_the_float64_trajectory_is_stocks(pipe):
    """Stock in float32 follows it closely: the written-out loop is that of the pipeline."""
    run = plan(pipe, ["a red 7"], [0], 4, 4.0, None, CALL)
    stock, true = generate(pipe, run), float64_trajectory(pipe, run)
    assert len(true.latents) == len(stock.latents) == 4
    assert all((a - b).norm() / b.norm() < 1e-5 for a, b in zip(stock.latents, true.latents))
    unguided = plan(pipe, ["a red 7"], [0], 2, 1.0, None, CALL)
    assert (float64_trajectory(pipe, unguided).latents[-1] - generate(pipe, unguided).latents[-1]).abs().max() < 1e-4


def test_a_pipeline_that_wants_more_is_told_so(pipe):
    class Wants(type(pipe)):
        def __call__(self, *args, image=None, **kwargs):
            if image is None:
                raise TypeError("image must be passed")
            return super().__call__(*args, **kwargs)

    wants = Wants(**pipe.components)
    for call in (lambda: fusewire.parity(wants, steps=1, seeds=[0], call=CALL), lambda: fusewire.profile(wants, steps=1, rounds=1, call=CALL)):
        with pytest.raises(BadInput, match=r"call=\{...\} adds to it\) does not fit Wants, whose call said: TypeError: image must be passed"):
            call()
    assert fusewire.parity(wants, steps=1, seeds=[0], levels=["picture"], call=CALL | dict(image=0)).ok


def test_one_prompt_is_no_list_of_letters(pipe):
    assert plan(pipe, "a red 7", [0, 1], 1, 4.0, None, CALL).prompts == ["a red 7"] * 2


@pytest.mark.parametrize("arguments, message", [
    (dict(numerics="fast"), "numerics is 'fast'"), (dict(levels=["pixel"]), "levels is"), (dict(levels=[]), "levels is"),
    (dict(seeds=()), "seeds is"), (dict(steps=0), "steps is 0"), (dict(steps=1.5), "steps is 1.5"), (dict(guidance="4"), "guidance is '4'"),
    (dict(seeds=["a"]), "seeds is"), (dict(seeds=[2**70]), "seeds is"), (dict(guidance=float("nan")), "guidance is nan"),
    (dict(seeds=[True]), "seeds is"), (dict(seeds=3), "seeds is 3; it should be a list"), (dict(levels="op"), "levels is 'op'; it should be a list"), (dict(call="x"), "call is a str"),
    (dict(call=dict(height=16)), "call has 'height', which every run is given by size="), (dict(call=dict(output_type="np")), "call has 'output_type'")])
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(BadInput, match=message):
        prove(pipe, **arguments)


def test_numbers_of_numpys(pipe):
    numbers = dict(seeds=list(np.arange(2)), steps=np.int64(2), guidance=np.float32(3.0))
    result = prove(pipe, levels=["picture"], **numbers)
    assert result.ok and result.settings["seeds"] == [0, 1] and json.dumps(result.to_dict())


def test_dropout_is_off():
    """A model in training mode: two calls of it differ, stock or not. It stays as it was."""
    pipe = tiny_pipeline()
    block = pipe.transformer.transformer_blocks[0]
    block.ff.net[1].p = 0.5
    pipe.transformer.train()
    result = prove(pipe, levels=["block", "model"])
    assert result.ok and {row.backend for row in result.rows if row.level == "model"} >= ({"cpu"} if CPU.loaded else set())
    assert block.training and block.ff.net[1].training


def test_embeddings_in_place_of_prompts():
    """A pipeline whose text encoders were taken away once the prompts were encoded."""
    pipe = tiny_pipeline()
    text, negative, pooled, negative_pooled = pipe.encode_prompt(["a red 7"], None, None, max_sequence_length=8)
    given = dict(prompt_embeds=text, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
        setattr(pipe, name, None)
    result = fusewire.parity(pipe, seeds=[0], steps=2, call=given)
    assert result.ok and {row.level for row in result.rows} == {"op", "block", "model", "picture"}
    assert fusewire.profile(pipe, rounds=1, steps=1, call=given).rows


def test_a_pipeline_that_takes_no_latents(pipe):
    class Other(type(pipe)):
        def __call__(self, class_labels):
            return None

    with pytest.raises(BadInput, match="Other takes no callback_on_step_end and no latents, .* give its denoiser, pipe.transformer"):
        fusewire.parity(Other(**pipe.components), steps=1, seeds=[0])


def test_pictures_without_a_number(pipe):
    """An autoencoder that overflows in float16, as SDXL's does: the latents are finite, stock's picture is not."""
    run = plan(pipe, ["a red 7"], [0], 2, 4.0, None, CALL)
    stock, other = generate(pipe, run), generate(pipe, run)
    stock.pictures[0, 0, 0, 0] = other.pictures[0, 0, 0, 0] = torch.nan
    [row] = judge_pictures(run, stock, {"close": other})
    assert not row.holds and row.reason == "NaN or infinity in the decoded picture, and in stock’s"
    other.latents[-1][0, 0, 0, 0] = torch.inf
    [row] = judge_pictures(run, stock, {"close": other})
    assert row.reason == "NaN or infinity in the final latents"


def test_bad_targets(pipe):
    with pytest.raises(BadInput, match="pipe_or_module is the class StableDiffusion3Pipeline"):
        fusewire.parity(type(pipe))
    with pytest.raises(TypeError, match="pipe_or_module is the class"):
        fusewire.swap(type(pipe.scheduler))
    with pytest.raises(NothingToDo, match="pictures need a pipeline"):
        fusewire.parity(pipe.transformer, levels=["picture"])
    with pytest.raises(BadInput, match="pipe_or_module is a str"):
        fusewire.parity("pipe")
    with pytest.raises(BadInput, match="inputs is None"):
        fusewire.parity(pipe.transformer.transformer_blocks[0], levels=["model"])
    for inputs in (dict(input=torch.ones(1, 3)), None):
        with pytest.raises(NothingToDo):
            fusewire.parity(nn.Linear(3, 3), inputs=inputs)
    handle = fusewire.swap(pipe)
    try:
        with pytest.raises(BadInput, match="swapped already"):
            prove(pipe)
    finally:
        handle.restore()


@pytest.mark.parametrize("run", (lambda model, inputs: fusewire.parity(model, inputs=inputs, levels=["model"]),
                                 lambda model, inputs: fusewire.profile(model, inputs=inputs, rounds=1),
                                 lambda model, inputs: bench(model, inputs=inputs, rounds=1)), ids=("parity", "profile", "bench"))
@pytest.mark.parametrize("change, message", [
    (lambda given: {**given, "hidden_states": torch.zeros(2, 3, 5)}, "inputs does not fit SD3Transformer2DModel, whose call said: "),
    (lambda given: {**given, "timestep": given["timestep"].to("meta")}, "inputs does not fit SD3Transformer2DModel, whose call said: "),
    (lambda given: {**given, "foo": 1}, "inputs does not fit SD3Transformer2DModel, whose call said: TypeError: .*foo"),
    (lambda given: list(given), "inputs is a list; it should be a dictionary")], ids=("rank", "device", "name", "list"))
def test_inputs_that_do_not_fit(pipe, run, change, message):
    with pytest.raises(BadInput, match=message):
        run(pipe.transformer, change(inputs_for(pipe.transformer)))


def test_weights_that_are_not_finite():
    pipe = tiny_pipeline()
    pipe.transformer.proj_out.weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="transformer.proj_out.weight holds 1 value"):
        prove(pipe)


def test_the_package_can_be_called():
    import fusewire.parity.verdict  # binds fusewire.parity to the package

    assert callable(fusewire.parity) and "numerics" in inspect.signature(fusewire.parity).parameters
    assert fusewire.parity.verdict.MAX_FACTOR == 2.0
