"""Where the time goes: by kind of operation (from the profiler's self times) and by stage of a pipeline (from clocks on its parts)."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fusewire.machine import synchronise

KINDS = ("attention", "linears", "convolutions", "norms and modulation", "other")
# Substrings of operator names, tried in this order; "other" is what is left: activations, copies, concatenations, embeddings.
_NAMES = {
    "attention": ("attention", "softmax"),
    "norms and modulation": ("norm", "adaln", "gate_residual", "aten::mul", "aten::add", "aten::sub", "aten::div", "aten::rsqrt", "aten::pow",
                             "aten::mean", "aten::square"),
    "linears": ("addmm", "::mm", "::bmm", "baddbmm", "linear", "matmul", "geglu", "swiglu", "gated_mlp"),
    "convolutions": ("conv",),
}
STAGES = ("text encoders", "denoiser", "scheduler", "VAE", "other")


def kind_of(operator: str) -> str:
    """``"aten::addmm"`` -> ``"linears"``."""
    for kind, names in _NAMES.items():
        # addmm is a product, though its name starts as a sum's
        if any(name in operator for name in names) and not (kind == "norms and modulation" and "addmm" in operator):
            return kind
    return "other"


def by_kind(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Share of the time, 0 to 1, of each kind in one call. A fused op counts where its main part belongs."""
    gpu = device.type == "cuda"
    with muted(), torch.autograd.profiler.profile(use_device="cuda" if gpu else None) as found:
        call()
        synchronise(device)
    spent = dict.fromkeys(KINDS, 0.0)
    for event in found.key_averages():
        if "::" in event.key:
            spent[kind_of(event.key)] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    return {kind: value / total for kind, value in spent.items()}


@contextmanager
def muted() -> Iterator[None]:
    """PyTorch's profiler writes notes of its own to file descriptor 2 and has no switch for them: they go nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class StageClock:
    """Clocks on the parts of a pipeline: seconds of each stage, run by run. Used as a context manager around the timed runs."""

    def __init__(self, pipe):
        self.pipe, self.runs, self.handles = pipe, [], []
        device = next(part for part in pipe.components.values() if isinstance(part, nn.Module)).device
        self.synchronise = lambda: synchronise(torch.device(device))

    def __enter__(self):
        for name, part in self.pipe.components.items():
            stage = {"transformer": "denoiser", "unet": "denoiser", "prior": "denoiser"}.get(name)
            if isinstance(part, nn.Module) and name.startswith("text_encoder"):
                stage = "text encoders"
            if stage:
                self._clock_module(part, stage)
        self._clock_method(getattr(self.pipe, "vae", None), "decode", "VAE")
        self._clock_method(getattr(self.pipe, "scheduler", None), "step", "scheduler")
        return self

    def __exit__(self, *error):
        for undo in self.handles:
            undo()

    def start(self) -> None:
        """Begin a run."""
        self.runs.append(dict.fromkeys(STAGES[:-1], 0.0))
        self.synchronise()
        self.began = time.perf_counter()

    def stop(self) -> None:
        """End a run; what no clock saw is ``other``."""
        self.synchronise()
        total = time.perf_counter() - self.began
        self.runs[-1]["other"] = max(0.0, total - sum(self.runs[-1].values()))

    def medians(self, last: int) -> dict[str, float]:
        """Median seconds of each stage over the ``last`` runs."""
        return {stage: statistics.median(run[stage] for run in self.runs[-last:]) for stage in STAGES}

    def _clock_module(self, module: nn.Module, stage: str) -> None:
        began: list[float] = []

        def enter(*_):
            self.synchronise()
            began.append(time.perf_counter())

        def leave(*_):
            self.synchronise()
            self._add(stage, time.perf_counter() - began.pop())

        self.handles += [module.register_forward_pre_hook(enter).remove, module.register_forward_hook(leave).remove]

    def _clock_method(self, owner, name: str, stage: str) -> None:
        if owner is None:
            return
        plain = getattr(owner, name)

        def timed(*args, **kwargs):
            self.synchronise()
            began = time.perf_counter()
            out = plain(*args, **kwargs)
            self.synchronise()
            self._add(stage, time.perf_counter() - began)
            return out

        setattr(owner, name, timed)
        self.handles.append(lambda: delattr(owner, name))

    def _add(self, stage: str, spent: float) -> None:
        if self.runs:
            self.runs[-1][stage] += spent
