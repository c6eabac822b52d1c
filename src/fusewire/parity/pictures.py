"""Whole pictures: the same seeds through the stock and the swapped pipelines, step by step, and through a float64 trajectory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fusewire.copies import denoiser_of
from fusewire.errors import BadInput
from fusewire.parity.result import Row, name_of
from fusewire.parity.twin import float64_twin
from fusewire.parity.verdict import PSNR_FLOOR, psnr

PROMPTS = ("a handwritten red seven on white paper", "a handwritten blue three on yellow paper",
           "a handwritten black eight on pink paper", "a handwritten green five on white paper")
# What ``generate`` gives each run, and the argument that tells it.
SET = {"prompt": "prompts", "num_inference_steps": "steps", "guidance_scale": "guidance", "height": "size", "width": "size", "output_type": "",
       "callback_on_step_end": ""}
GIVEN = "what a pipeline is tried with (prompt, latents, steps, guidance and size; call={...} adds to it)"  # for ``blaming`` stock's first call


@dataclass
class Run:
    """What every run of a comparison shares. noise: [N, C, h, w] (Flux: [N, tokens, C]), one row per seed, in the denoiser's dtype."""

    prompts: list[str]
    seeds: list[int]
    steps: int
    guidance: float
    size: int | None
    noise: torch.Tensor
    call: dict  # more keyword arguments of the pipeline


@dataclass
class Trajectory:
    """latents: one [N, C, h, w] after each step, on the CPU. pictures: [N, 3, H, W] float32 in 0..1, or None."""

    latents: list[torch.Tensor]
    pictures: torch.Tensor | None


def plan(pipe, prompts, seeds, steps: int, guidance: float, size: int | None, call: dict | None) -> Run:
    """Prompts and noise for ``pipe``: one picture per seed, the prompts taken in turn. The noise of a seed is the same in every dtype. ``latents`` in
    ``call`` are taken instead. BadInput where nothing tells the latents' shape."""
    component, model = denoiser_of(pipe)
    if call is not None and not isinstance(call, Mapping):
        raise BadInput(f"call is a {type(call).__name__}; it should be a dictionary of more keyword arguments of the pipeline's call")
    call = dict(call or {})
    for key, instead in SET.items():
        if key in call:
            raise BadInput(f"call has {key!r}, which every run is given{f' by {instead}=' if instead else ''}")
    taken = inspect.signature(pipe.__call__).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    if not open_ended and (lacking := sorted({"latents", "callback_on_step_end"} - taken.keys())):
        raise BadInput(f"{type(pipe).__name__} takes no {' and no '.join(lacking)}, so that its runs cannot be compared; give its denoiser, pipe.{component}")
    noise = call.pop("latents", None)
    if noise is None:
        shape = _latents_of(pipe, model, size)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])
    prompts = [prompts] if isinstance(prompts, str) else list(prompts or PROMPTS)
    return Run([prompts[i % len(prompts)] for i in range(len(seeds))], [int(seed) for seed in seeds], int(steps), float(guidance), size, noise.to(model.device, model.dtype), call)


def _latents_of(pipe, model, size: int | None) -> tuple[int, ...]:
    """The shape of a sample's latents."""
    factor, config = getattr(pipe, "vae_scale_factor", None), model.config
    flux = type(model).__name__ == "FluxTransformer2DModel"  # 2 x 2 latents are a token
    known = getattr(pipe, "default_sample_size", None) if flux else getattr(config, "sample_size", None)
    side = known if size is None else size // factor if factor else None
    if side is None:
        raise BadInput(f"{type(pipe).__name__} does not tell the size of its latents; call={{'latents': ...}} does")
    height, width = (side, side) if isinstance(side, int) else side
    own = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", None) or config.in_channels
    if flux:
        return (height // 2) * (width // 2), min(config.in_channels, 4 * own)
    return min(config.in_channels, own), height, width  # a denoiser may take others beside them: a mask, a picture


@contextmanager
def _same_noise(run: Run) -> Iterator[dict]:
    """Whatever draws noise draws the same in every run, and the user's random state is left alone; yields ``run.call`` with copies of its generators."""
    device, seed = run.noise.device, run.seeds[0]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield {key: _begun_anew(value) for key, value in run.call.items()}


def _begun_anew(value):
    if isinstance(value, list):
        return [_begun_anew(part) for part in value]
    if not isinstance(value, torch.Generator):
        return value
    generator = torch.Generator(value.device)
    generator.set_state(value.get_state())
    return generator


def generate(pipe, run: Run, *, decode: bool = True, steps: int | None = None, tick=lambda: None) -> Trajectory:
    """Run ``pipe`` from the noise of ``run``; the latents after each step, and the decoded pictures. BadInput for a pipeline that calls nothing back."""
    latents: list[torch.Tensor] = []

    def keep(_, step, timestep, tensors):
        latents.append(tensors["latents"].detach().cpu().clone())
        tick()
        return tensors

    prompts = {} if "prompt_embeds" in run.call else dict(prompt=run.prompts)
    with _same_noise(run) as call:
        images = pipe(**prompts, num_inference_steps=steps or run.steps, guidance_scale=run.guidance, height=run.size, width=run.size,
                      latents=run.noise.clone(), output_type="pt" if decode else "latent", callback_on_step_end=keep, **call).images
    if not latents:
        raise BadInput(f"{type(pipe).__name__} calls nothing back after its steps (callback_on_step_end), so that there are no latents to compare")
    return Trajectory(latents, images.detach().float().cpu() if decode else None)


def has_float64_trajectory(pipe) -> bool:
    """True for Stable Diffusion 3 with the flow-matching Euler scheduler and no noise on the way, whose loop ``float64_trajectory`` writes out."""
    return (type(pipe).__name__ == "StableDiffusion3Pipeline" and type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
            and not pipe.scheduler.config.stochastic_sampling)


@torch.inference_mode()
def float64_trajectory(pipe, run: Run, tick=lambda: None) -> Trajectory:
    """The flow-matching Euler loop with classifier-free guidance in float64, from the same noise, embeddings and weights.

    x_(t+1) = x_t + (sigma_(t+1) - sigma_t) * v, v = v_uncond + guidance * (v_text - v_uncond). Esser et al. (2024), "Scaling Rectified Flow
    Transformers for High-Resolution Image Synthesis"; the sigmas are those of the pipeline's own scheduler.
    """
    guided = run.guidance > 1
    options = {key: value for key, value in run.call.items() if key == "max_sequence_length"}
    text, negative, pooled, negative_pooled = pipe.encode_prompt(run.prompts, None, None, do_classifier_free_guidance=guided, **options)
    if guided:
        text, pooled = torch.cat([negative, text]), torch.cat([negative_pooled, pooled])
    text, pooled = text.double(), pooled.double()
    twin = float64_twin(pipe.transformer)
    pipe.scheduler.set_timesteps(run.steps, device=run.noise.device)
    sigmas, x, latents = pipe.scheduler.sigmas.double(), run.noise.double(), []
    for i, t in enumerate(pipe.scheduler.timesteps):
        both = torch.cat([x, x]) if guided else x
        v = twin(hidden_states=both, timestep=t.expand(len(both)), encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0]
        if guided:
            without, with_text = v.chunk(2)
            v = without + run.guidance * (with_text - without)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
        latents.append(x.cpu())
        tick()
    return Trajectory(latents, None)


def relative_errors(trajectory: Trajectory, other: Trajectory) -> list[float]:
    """||x - y|| / ||y|| after each step, over all pictures."""
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(trajectory.latents, other.latents)]


def curves(stock: Trajectory, swapped: dict[str, Trajectory], true: Trajectory | None) -> dict[str, list[float]]:
    """Error after each step: every variant against stock, and every variant, stock included, against float64."""
    found = {f"{numerics} against stock": relative_errors(t, stock) for numerics, t in swapped.items()}
    if true is not None:
        found |= {f"{name} against float64": relative_errors(t, true) for name, t in {"stock": stock, **swapped}.items()}
    return found


def judge_pictures(run: Run, stock: Trajectory, swapped: dict[str, Trajectory]) -> list[Row]:
    """One row for each seed and numerics. ``exact``: the final latents and the decoded picture are torch.equal; ``close``: PSNR of the picture."""
    rows, dtype = [], stock.latents[-1].dtype
    for numerics, trajectory in swapped.items():
        for i, seed in enumerate(run.seeds):
            got, want = trajectory.latents[-1][i], stock.latents[-1][i]
            parts = {"final latents are": torch.equal(got, want), "decoded picture is": torch.equal(trajectory.pictures[i], stock.pictures[i])}
            equal, decibel = all(parts.values()), psnr(trajectory.pictures[i], stock.pictures[i])
            if numerics == "exact":
                rule, holds = "exact", equal
                reason = next((f"{what} not torch.equal to stock's" for what, same in parts.items() if not same), "")
            else:
                floor = PSNR_FLOOR[dtype]
                rule, holds = f"PSNR >= {floor:g} dB", decibel >= floor
                reason = "" if holds else f"PSNR {decibel:.1f} dB is under {floor:g} dB"
            broken = "final latents" if not torch.isfinite(got).all() else "decoded picture" if math.isnan(decibel) else ""
            if broken:
                there = torch.isfinite(want if broken == "final latents" else stock.pictures[i]).all()
                holds, reason = False, f"NaN or infinity in the {broken}{'' if there else ', and in stock’s'}"
            difference = (got.double() - want.double()).abs()
            rows.append(Row("picture", f"seed {seed}, {run.steps} steps", numerics, name_of(dtype), "", "x".join(map(str, got.shape)), rule,
                            holds, equal, reason, max_difference=difference.max().item(), mean_difference=difference.mean().item(),
                            mismatch=(got != want).double().mean().item(), psnr=decibel))
    return rows
