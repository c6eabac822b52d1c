"""What one of several ranks does: ``torchrun --nproc-per-node 2 -m tests.compat.ranks OUT``, with gloo. Rank 0 writes ``OUT``: for each
(what, family, numerics) the gradients or latents, or the error in words. tests/compat/test_distributed.py compares them with one process.
"""

from __future__ import annotations

import itertools
import sys
import traceback
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fusewire
from tests.compat.families import FAMILIES, SMALLEST, call
from tests.models import stock_flux

RANKS = 2
BATCH = 4


def example(family: str):
    """(model, inputs): the same ones in every process."""
    torch.manual_seed(0)
    model = FAMILIES[family].model(torch.float32, **SMALLEST[family])
    return model, FAMILIES[family].inputs(batch=BATCH)


def even_inputs() -> dict:
    """Of a Flux whose tokens are shared out evenly."""
    torch.manual_seed(0)
    return stock_flux.inputs("dev", BATCH, 8, 7, tokens=8)


def share(value, rank: int):
    """This rank's rows of everything that has one row a picture."""
    if isinstance(value, dict):
        return {key: share(part, rank) for key, part in value.items()}
    mine = isinstance(value, torch.Tensor) and value.dim() and len(value) == BATCH
    return value.chunk(RANKS)[rank] if mine else value


def step(model, inputs) -> dict[str, torch.Tensor]:
    """The gradients of one training step, by the parameter's name."""
    call(model, inputs).square().mean().backward()
    named = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named.items()}


def ddp(family, numerics, rank):
    model, inputs = example(family)
    with fusewire.swapped(model, numerics):
        return step(DistributedDataParallel(model, find_unused_parameters=True), share(inputs, rank))


def shard(model, family):
    for module in list(model.modules()) if family != "DiT" else ():  # DiT calls a part of its first block outside the block
        if FAMILIES[family].block in [cls.__name__ for cls in type(module).__mro__]:
            fully_shard(module)
    return fully_shard(model)


def fsdp_after_swap(family, numerics, rank):
    model, inputs = example(family)
    with fusewire.swapped(model, numerics):
        return step(shard(model, family), share(inputs, rank))


def fsdp_before_swap(family, numerics, rank):
    model, inputs = example(family)
    shard(model, family)
    with fusewire.swapped(model, numerics) as handle:
        return {entry.reason for entry in handle.report.left if not entry.by_choice}, step(model, share(inputs, rank))


def fsdp_restored(family, numerics, rank):
    """(whether the sharded modules are what ``fully_shard`` made of them once the swap is taken back, the gradients of a step then)."""
    model, inputs = example(family)
    handle = fusewire.swap(model, numerics)
    shard(model, family)
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    handle.restore()
    return all(isinstance(module, FSDPModule) for module in sharded), step(model, share(inputs, rank))


def prompts(family, numerics, rank):
    """Each rank its own prompt; rank 0 gets the latents of all."""
    torch.manual_seed(0)
    pipe = FAMILIES[family].pipe(torch.float32)
    with fusewire.swapped(pipe, numerics):
        mine = FAMILIES[family].generate(pipe, seed=rank)
    found = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(found, mine)
    return found


def context_parallel(family, numerics, rank, kind="ulysses"):
    """diffusers splits the tokens over the ranks; ``numerics`` None: stock."""
    model, _ = example(family)
    inputs = even_inputs()
    config = ContextParallelConfig(**{f"{kind}_degree": RANKS})
    with mock.patch("torch.accelerator.device_count", return_value=1):  # it divides by the number of accelerators
        model.enable_parallelism(config=config)
    with torch.no_grad():
        if numerics is None:
            return call(model, inputs)
        with fusewire.swapped(model, numerics):
            return call(model, inputs)


BOTH = ("exact", "close")
JOBS = [*itertools.product([ddp, fsdp_after_swap, prompts], FAMILIES, BOTH),
        *itertools.product([fsdp_before_swap, fsdp_restored], FAMILIES, ["exact"]),
        *itertools.product([context_parallel], ["Flux.1"], (None, *BOTH))]


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, found = dist.get_rank(), {}
    for job, family, numerics in JOBS:
        key = job.__name__, family, numerics
        try:
            found[key] = job(family, numerics, rank)
        except Exception:  # the other jobs have their own tests
            found[key] = traceback.format_exc()
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
