"""docs/own-suites.md: the test suites of diffusers and of transformers, as these projects ship them, with everything swapped.

    python tests/own_suites.py SUITE [FILE ...] [--numerics exact|close|stock] [--seconds S] [--outcomes FILE] [--source TEXT] [--write docs/own-suites.md]

SUITE is a folder with the ``tests`` folder of either project. Every model and scheduler that a test makes is swapped as soon as it has been made or
loaded; what does not pass then is run stock. A test that passes stock alone is an error of ours. Outcomes are kept in FILE as they come and a test that
has one is not run again, so that a run can be interrupted, or be cut by ``--seconds``, and go on; delete FILE to begin anew. diffusers' tests need the
packages parameterized, requests-mock and torchsde, transformers' parameterized and httpx. The page keeps its rows of files that have no outcome in FILE, if
it was made with the same versions of everything.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OUTCOMES, HUB = ROOT / "build" / "own-suites.jsonl", ROOT / "build" / "own-suites-hub"
STOCK, NUMERICS = "stock", ("exact", "close")
PASSED = ("passed", "xfailed")
COLUMNS = ("tests", "exact", "fused", "close", "failed", "skipped", "exact alone", "close alone")  # of the page, after the file
NOT_RUN = "–"
KNOWN: dict[str, str] = {}  # part of a test's id -> why it fails swapped alone, and may
ENOUGH = 3  # exit code: the time was up before all tests had run

TRANSFORMERS = ("models/clip/test_modeling_clip.py", "models/t5/test_modeling_t5.py")
DIFFUSERS = (
    *(f"models/transformers/test_models_{name}.py" for name in ("transformer_sd3", "transformer_flux", "dit_transformer2d", "pixart_transformer2d")),
    *(f"models/unets/test_{name}.py" for name in ("models_unet_2d_condition", "models_unet_2d", "unet_2d_blocks")),
    "models/autoencoders/test_models_autoencoder_kl.py", "models/test_layers_utils.py", "models/test_attention_processor.py",
    *(f"schedulers/test_scheduler_{name}.py" for name in ("ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpm_multi", "lcm", "lms", "pndm", "unipc",
                                                          "dpm_single", "deis", "edm_euler", "edm_dpmsolver_multistep")),
    "schedulers/test_schedulers.py",
    *(f"models/autoencoders/test_models_{name}.py" for name in ("asymmetric_autoencoder_kl", "vq")), "models/unets/test_models_unet_controlnetxs.py",
    "models/test_modeling_common.py", "models/test_models_auto.py", "others/test_training.py", "others/test_config.py", "hooks/test_group_offloading.py",
    *(f"pipelines/{name}.py" for name in ("test_pipelines", "ddim/test_ddim", "ddpm/test_ddpm", "pndm/test_pndm", "consistency_models/test_consistency_models",
                                         "latent_diffusion/test_latent_diffusion", "latent_diffusion/test_latent_diffusion_superresolution",
                                         "stable_diffusion_image_variation/test_stable_diffusion_image_variation")),
    *(f"pipelines/stable_unclip/test_stable_unclip{name}.py" for name in ("", "_img2img")),
    *(f"pipelines/ledits_pp/test_ledits_pp_stable_diffusion{name}.py" for name in ("", "_xl")),
    *(f"pipelines/marigold/test_marigold_{name}.py" for name in ("depth", "normals", "intrinsics")),
    *(f"pipelines/visualcloze/test_pipeline_visualcloze_{name}.py" for name in ("combined", "generation")),
    *(f"pipelines/stable_diffusion/test_stable_diffusion{name}.py" for name in ("", "_img2img", "_inpaint", "_instruction_pix2pix")),
    *(f"pipelines/stable_diffusion_2/test_stable_diffusion{name}.py" for name in ("", "_depth", "_inpaint", "_latent_upscale", "_upscale", "_v_pred")),
    *(f"pipelines/stable_diffusion_xl/test_stable_diffusion_xl{name}.py" for name in ("", "_img2img", "_inpaint", "_adapter", "_instruction_pix2pix")),
    "pipelines/stable_diffusion_adapter/test_stable_diffusion_adapter.py",
    *(f"pipelines/stable_diffusion_3/test_pipeline_stable_diffusion_3{name}.py" for name in ("", "_img2img", "_inpaint")),
    *(f"pipelines/flux/test_pipeline_flux{name}.py" for name in ("", "_img2img", "_inpaint", "_fill", "_kontext", "_kontext_inpaint", "_control",
                                                                "_control_img2img", "_control_inpaint", "_redux")),
    "pipelines/dit/test_dit.py", "pipelines/pixart_alpha/test_pixart.py", "pipelines/pixart_sigma/test_pixart.py",
    *(f"pipelines/controlnet/test_controlnet{name}.py" for name in ("", "_img2img", "_inpaint", "_sdxl", "_sdxl_img2img", "_inpaint_sdxl")),
    *(f"pipelines/controlnet_sd3/test_controlnet_{name}.py" for name in ("sd3", "inpaint_sd3")),
    *(f"pipelines/controlnet_flux/test_controlnet_flux{name}.py" for name in ("", "_img2img", "_inpaint")),
    *(f"pipelines/latent_consistency_models/test_latent_consistency_models{name}.py" for name in ("", "_img2img")),
    *(f"pipelines/pag/test_pag_{name}.py" for name in ("sd", "sd_img2img", "sd_inpaint", "sdxl", "sdxl_img2img", "sdxl_inpaint", "sd3", "sd3_img2img",
                                                        "pixart_sigma", "controlnet_sd", "controlnet_sd_inpaint", "controlnet_sdxl",
                                                        "controlnet_sdxl_img2img")),
    "pipelines/ip_adapters/test_ip_adapter_stable_diffusion.py",
    *(f"lora/test_lora_layers_{name}.py" for name in ("sd", "sdxl", "sd3", "flux")),
)


def stand_ins(folder: Path) -> None:
    """What nearly every pipeline's tests fetch from the hub, in the layout of its cache: two tiny tokenizers and text encoders of random weights, of our
    own making, so that these tests run without a network; so do two U-Nets of Guided Diffusion's form and an image processor. Tests with expected pictures
    see others there and fail, stock and swapped."""
    from diffusers import UNet2DModel
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, DPTImageProcessor, PreTrainedTokenizerFast, T5Config,
                              T5EncoderModel)

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # it comes in another order in each process
    special = ["<|startoftext|>", "<|endoftext|>"]
    clip = CLIPTokenizer({token: i for i, token in enumerate([*letters, *(letter + "</w>" for letter in letters), *special])}, [], model_max_length=77)
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    unigram = Tokenizer(models.Unigram([(piece, -float(i > 2)) for i, piece in enumerate(pieces)], unk_id=2))
    unigram.normalizer, unigram.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    t5 = PreTrainedTokenizerFast(tokenizer_object=unigram, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512)
    config = T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, relative_attention_num_buckets=8)
    torch.manual_seed(0)
    text = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=1000, hidden_size=32, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4,
                                                      projection_dim=32, hidden_act="gelu"))
    encoder = T5EncoderModel(config)
    unet = dict(sample_size=32, layers_per_block=1, block_out_channels=(32, 64), attention_head_dim=8, resnet_time_scale_shift="scale_shift",
                down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
                downsample_type="resnet", upsample_type="resnet")
    revision = "0" * 40  # diffusers takes nothing else for a commit
    for name, parts in (("hf-internal-testing/tiny-random-clip", {"": (clip,)}), ("hf-internal-testing/tiny-random-t5", {"": (t5, encoder)}),
                        ("peft-internal-testing/tiny-clip-text-2", {"": (clip, text)}), ("hf-internal-testing/tiny-sd3-text_encoder", {"": (text,)}),
                        ("hf-internal-testing/tiny-sd3-text_encoder-2", {"": (text,)}),
                        ("hf-internal-testing/tiny-random-DPTForDepthEstimation", {"": (DPTImageProcessor(size=dict(height=32, width=32)),)}),
                        ("diffusers/consistency-models-test", {"test_unet": (UNet2DModel(**unet),),
                                                               "test_unet_class_cond": (UNet2DModel(**unet, num_class_embeds=1000),)})):
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        for subfolder, several in parts.items():
            for part in several:
                part.save_pretrained(repository / "snapshots" / revision / subfolder)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(revision)


class Swapping:
    """A pytest plugin: what a test makes of the classes below is swapped at the end of the outermost ``__init__`` or ``from_pretrained``."""

    def __init__(self, numerics: str):
        self.numerics, self._within = numerics, threading.local()

    def pytest_configure(self):
        from diffusers import ModelMixin, SchedulerMixin
        from diffusers.loaders import FromOriginalModelMixin
        from transformers import PreTrainedModel

        for root in (ModelMixin, SchedulerMixin, PreTrainedModel):
            self._watch(root)
        for root, name in ((ModelMixin, "from_pretrained"), (PreTrainedModel, "from_pretrained"), (FromOriginalModelMixin, "from_single_file")):
            setattr(root, name, classmethod(self._swapping(getattr(root, name).__func__)))

    def _watch(self, root: type) -> None:
        """This class, all derived from it, and all that will be."""
        own, waiting = vars(root).get("__init_subclass__"), [root]
        while waiting:
            cls = waiting.pop()
            waiting += cls.__subclasses__()
            self._wrap(cls)

        def watched(derived, **keywords):
            (super(root, derived).__init_subclass__ if own is None else own.__get__(None, derived))(**keywords)
            self._wrap(derived)

        root.__init_subclass__ = classmethod(watched)

    def _wrap(self, cls: type) -> None:
        if "__init__" in vars(cls) and not hasattr(cls.__init__, "swaps"):
            cls.__init__ = self._swapping(cls.__init__)
            cls.__init__.swaps = True

    def _swapping(self, function):
        @functools.wraps(function)
        def wrapper(first, *args, **kwargs):
            depth = self._within.__dict__.get("depth", 0)
            self._within.depth = depth + 1
            try:
                made = function(first, *args, **kwargs)
            finally:
                self._within.depth = depth
            if depth == 0:
                self._swap(first if made is None else made[0] if isinstance(made, tuple) else made)
            return made

        return wrapper

    def _swap(self, made) -> None:
        import fusewire
        from fusewire.errors import NothingToDo
        from fusewire.swap.report import SwapWarning

        if any(parameter.is_meta for parameter in getattr(made, "parameters", tuple)()):
            return  # a skeleton that a test fills itself
        if not hasattr(made, "parameters") and not hasattr(made, "set_timesteps"):
            return  # what a test gives out as a scheduler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SwapWarning)
            try:
                fusewire.swap(made, numerics=self.numerics)
            except NothingToDo:
                pass


class Recording:
    """A pytest plugin: leaves out what has an outcome, writes down each as it comes, and stops when the time is up."""

    def __init__(self, file: Path, numerics: str, seconds: float):
        self.file, self.numerics, self.until = file, numerics, time.monotonic() + seconds
        self.wanted = None  # or the ids of the tests to run
        self.over = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        known = {test for test, outcomes in read(self.file).items() if self.numerics in outcomes}
        left = [item for item in items if item.nodeid not in known and (self.wanted is None or item.nodeid in self.wanted)]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.outcome, self.message = "passed", ""
        ops = sys.modules.get("fusewire.ops")
        if ops is not None:
            ops.reset_stats()
        began = time.monotonic()
        result = yield
        calls = sum(sum(counts.values()) for counts in ops.stats().values()) if ops is not None else 0
        with self.file.open("a") as out:
            out.write(json.dumps(dict(test=item.nodeid, numerics=self.numerics, outcome=self.outcome, fused=calls,
                                      seconds=round(time.monotonic() - began, 1), message=self.message)) + "\n")
        if nextitem is not None and time.monotonic() > self.until:
            self.over = True
            item.session.shouldstop = "the time is up"
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed or report.skipped and self.outcome == "passed":
            self.outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            self.message = report.longreprtext.strip().splitlines()[-1][:300] if report.failed and report.longreprtext.strip() else ""


def read(file: Path) -> dict[str, dict[str, dict]]:
    """{test: {numerics: its last outcome}}."""
    outcomes: dict[str, dict[str, dict]] = defaultdict(dict)
    for line in file.read_text().splitlines() if file.is_file() else ():
        outcome = json.loads(line)
        outcomes[outcome["test"]][outcome["numerics"]] = outcome
    return outcomes


def page(outcomes: dict[str, dict[str, dict]], sources: dict[str, str], before: str = "") -> str:
    """The table. ``before``: the page so far. ValueError for a test that did not pass swapped and has not been run stock."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "transformers", "torch"))
    made = f"Made by `make own-suites TESTS=folder` with {versions}; the suites: {'; '.join(sources.values())}."
    lines = ["# diffusers' and transformers' own tests, swapped", "",
             "The test suites that these projects ship, run on the CPU with everything swapped: each model and scheduler that a test makes or loads is given",
             "to `fusewire.swap` as soon as it exists, and whatever does not pass then is run stock. *Fused*: of the tests that pass in `exact`, those in which",
             "fused ops ran. *Fail stock too*: they want files from the network, or expect the picture of a prompt in the tokens of a tokenizer that the network",
             "has (small ones stand in for it). *Skipped*: most want a GPU or a quantisation library. *Alone*: fail swapped and do not fail stock. Left out are",
             "`single_file` and `modular_pipelines`, whose tests load checkpoints from the network.", "",
             made, "",
             "| file | tests | passed, `exact` | fused | passed, `close` | fail stock too | skipped | alone, `exact` | alone, `close` |", "|---|---|---|---|---|---|---|---|---|"]
    files: dict[str, list[tuple[str, dict]]] = defaultdict(list)
    for test, found in outcomes.items():
        files[test.split("::")[0].removeprefix("tests/")].append((test, found))
    alone, otherwise, totals = [], [], Counter()
    kept = {row[0]: row for row in map(_cells, before.splitlines()) if row and row[0].endswith(".py")} if made in before else {}
    for file in sorted({*files, *kept}):
        if file not in files:
            row = Counter({name: int(cell) for name, cell in zip(COLUMNS, kept[file][1:]) if cell != NOT_RUN})
            row["close ran"] = kept[file][4] != NOT_RUN
            totals.update(row)
            lines.append(_row(file, row))
            continue
        tests = files[file]
        row = Counter(tests=len(tests))
        for test, found in tests:
            stock = found.get(STOCK, {}).get("outcome")
            row["fused"] += found.get("exact", {}).get("outcome") == "passed" and found["exact"]["fused"] > 0
            row["skipped"] += stock == "skipped"
            row["failed"] += stock == "failed"
            for numerics in NUMERICS:
                outcome = found.get(numerics, {}).get("outcome")
                row[numerics] += outcome in PASSED
                row[f"{numerics} ran"] += outcome is not None
                if outcome in (None, *PASSED):
                    continue
                if stock is None:
                    raise ValueError(f"{test} is {outcome} in {numerics} and has not been run stock")
                if outcome != stock:
                    row[f"{numerics} alone"] += 1
                    alone.append(f"- `{test.removeprefix('tests/')}`, {numerics}: {known(test)}")
                elif numerics == "exact" and _message(found["exact"]) != _message(found[STOCK]):
                    otherwise.append(f"- `{test.removeprefix('tests/')}`: {known(test)}")
        if row["close ran"] < len(tests):  # a file that was run in part
            row["close ran"] = row["close"] = row["close alone"] = 0
        totals.update(row)
        lines.append(_row(file, row))
    lines += [_row("**all**", totals), "", *(["Alone:", "", *alone] if alone else ["No test fails swapped alone."])]
    same = "What fails stock too fails in `exact` with the same message, the numbers of a picture included"
    lines += ["", f"{same}, but for:", "", *otherwise] if otherwise else ["", f"{same}."]
    if left := [file for file in (*DIFFUSERS, *TRANSFORMERS) if file not in files and file not in kept]:
        lines += ["", f"Not run: {', '.join(f'`{file}`' for file in left)}."]
    return "\n".join([*lines, ""])


def _row(name: str, row: Counter) -> str:
    cells = (NOT_RUN if column.startswith("close") and not row["close ran"] else row[column] for column in COLUMNS)
    return "| " + " | ".join(map(str, (name, *cells))) + " |"


def _cells(line: str) -> list[str]:
    """Of a row of the page's table; none of another line."""
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") and line.count("|") == len(COLUMNS) + 2 else []


def _message(run: dict) -> str:
    """What a test failed with, without the addresses and paths that differ from process to process."""
    return re.sub(r"0x[0-9a-f]+|/\S+", "", run.get("message", ""))


def known(test: str) -> str:
    return next((reason for part, reason in KNOWN.items() if part in test), "**not explained**")


def child(arguments) -> int:
    """Files of the suite in one kind of numerics."""
    recording = Recording(arguments.outcomes, arguments.numerics[0], arguments.seconds)
    if arguments.numerics[0] == STOCK:
        recording.wanted = {test for test, found in read(arguments.outcomes).items() if any(run["outcome"] != "passed" for run in found.values())}
    plugins = [recording] if arguments.numerics[0] == STOCK else [Swapping(arguments.numerics[0]), recording]
    status = pytest.main(["-q", "--no-header", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short", "--disable-warnings", f"--rootdir={arguments.suite}",
                          *arguments.files], plugins=plugins)
    return ENOUGH if recording.over else 0 if status in (0, 1, 2, 5) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="a folder with the tests folder of diffusers or transformers")
    parser.add_argument("files", nargs="*", help="files below its tests folder; all that concern us unless given")
    parser.add_argument("--numerics", action="append", choices=(STOCK, *NUMERICS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no test after so long")
    parser.add_argument("--outcomes", type=Path, default=OUTCOMES)
    parser.add_argument("--source", help="what the suite is, for the page")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.outcomes, arguments.suite = arguments.outcomes.resolve(), arguments.suite.resolve()
    if arguments.child:
        return child(arguments)
    arguments.outcomes.parent.mkdir(parents=True, exist_ok=True)
    files = arguments.files or (DIFFUSERS if (arguments.suite / "tests" / "schedulers").is_dir() else TRANSFORMERS)
    until = time.monotonic() + arguments.seconds
    stamp, made = HUB / "made-by", hashlib.sha256(inspect.getsource(stand_ins).encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != made:  # it takes ten seconds
        stand_ins(HUB)
        stamp.write_text(made)
    environment = dict(os.environ, HF_HOME=str(HUB), HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))))
    for numerics in arguments.numerics or (*NUMERICS, STOCK):
        command = [sys.executable, __file__, "--child", str(arguments.suite), *(f"tests/{file}" for file in files), "--numerics", numerics,
                   "--outcomes", str(arguments.outcomes), "--seconds", str(until - time.monotonic())]
        if status := subprocess.run(command, cwd=arguments.suite, env=environment).returncode:
            return status
    ran = {test.split("::")[0].removeprefix("tests/") for test in read(arguments.outcomes)}
    if uncollected := [file for file in files if file not in ran]:
        print(f"no test of these files was found; the lines above say why: {', '.join(uncollected)}", file=sys.stderr)
        return 1
    if arguments.write:
        sources = arguments.outcomes.with_suffix(".sources.json")
        known_sources = json.loads(sources.read_text()) if sources.is_file() else {}
        known_sources[arguments.suite.name] = arguments.source or str(arguments.suite.name)
        sources.write_text(json.dumps(known_sources))
        before = arguments.write.read_text() if arguments.write.is_file() else ""
        arguments.write.write_text(page(read(arguments.outcomes), known_sources, before))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
