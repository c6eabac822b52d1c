"""Opening a diffusers folder that may be half downloaded, damaged or hostile: looked through before anything is loaded.

Only safetensors are read, no code that lies in the folder is run, and what a file claims about itself is checked against its size.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from fusewire.errors import BadInput

LARGEST_HEADER = 100 * 2**20  # the safetensors format's own limit, bytes
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}
WEIGHTS = ("diffusion_pytorch_model", "model")  # diffusers' name of a model's weights, and transformers'
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json", "guider_config.json")


def needs(library: str) -> ModuleType:
    """The package ``library``, diffusers or transformers; ``BadInput`` with the command that installs it where it is missing."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as missing:
        raise BadInput(f"{missing.name} is not installed, and this target needs it: pip install 'fusewire[diffusers]'") from None


def read_json(path: Path) -> dict:
    """A JSON object from ``path``; ``BadInput`` where it is missing or is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{label(path)} is missing: the folder is incomplete, download it again") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise BadInput(f"{label(path)} is not valid JSON: the file is damaged or half downloaded") from None
    if not isinstance(found, dict):
        raise BadInput(f"{label(path)} holds a {type(found).__name__}; it should hold an object")
    return found


def label(path: Path) -> str:
    """The last two parts of a path: enough to find the file, and no path of this machine."""
    return "/".join(path.parts[-2:])


def safetensors_header(path: Path) -> dict[str, list[int]]:
    """{tensor name: shape} of a safetensors file whose header, offsets and size agree; ``BadInput`` otherwise."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(LARGEST_HEADER, size - 8):
            raise BadInput(f"{label(path)} is truncated or no safetensors file: its header claims {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: (entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items() if name != "__metadata__"}
    except (UnicodeDecodeError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadInput(f"{label(path)} has a damaged safetensors header") from None
    shapes, end = {}, 0
    for name, (dtype, shape, begin, stop) in sorted(tensors.items(), key=lambda item: str(item[1][2])):
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)) or dtype not in BYTES:
            raise BadInput(f"{label(path)}: tensor {name!r} has an impossible header entry ({dtype}, {shape})")
        count = 1
        for n in shape:
            count *= n
        if stop - begin != count * BYTES[dtype]:
            raise BadInput(f"{label(path)}: tensor {name!r} of shape {shape} needs {count * BYTES[dtype]} bytes, its header gives it {stop - begin}")
        shapes[name], end = list(shape), max(end, stop)
    if 8 + length + end != size:
        raise BadInput(f"{label(path)} is truncated: its header describes {8 + length + end} bytes, the file has {size}")
    return shapes


def variant_of(folder: Path) -> str:
    """``"fp16"`` where a component holds that variant of its weights alone, as ``from_pretrained(variant="fp16")`` downloads it; ``""`` for plain ones."""
    for name in WEIGHTS:
        if (folder / f"{name}.safetensors").is_file() or (folder / f"{name}.safetensors.index.json").is_file():
            return ""
    for name in WEIGHTS:
        for pattern in (rf"{name}\.(\w+)\.safetensors", rf"{name}\.safetensors\.index\.(\w+)\.json"):
            found = sorted(match[1] for path in folder.glob(f"{name}.*") if (match := re.fullmatch(pattern, path.name)))
            if found:
                return found[0]
    return ""


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """{tensor name: shape} over all weight files of one component, every shard named by an index present. Those that its loader takes, where there are
    others beside them."""
    suffix = f".{variant}" if (variant := variant_of(folder)) else ""
    own = [name for name in WEIGHTS if (folder / f"{name}{suffix}.safetensors").is_file()]
    indexes = [path for name in WEIGHTS if (path := folder / f"{name}.safetensors.index{suffix}.json").is_file()]
    if not own and not indexes:
        indexes = sorted(folder.glob("*.safetensors.index*.json"))
    if indexes:
        weight_map = read_json(indexes[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise BadInput(f"{label(indexes[0])} has no weight_map from tensors to files")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise BadInput(f"{label(indexes[0])} names a shard outside its folder: {shard!r}")
            if not (folder / shard).is_file():
                raise BadInput(f"{folder.name}/{shard} is missing: the checkpoint is half downloaded ({len(shards)} shards are listed)")
        files = [folder / shard for shard in shards]
    else:
        files = [folder / f"{name}{suffix}.safetensors" for name in own] or sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"; {other[0]} is not read, because a pickle can run code" if other else ": the checkpoint is half downloaded"
        raise BadInput(f"{folder.name} has no .safetensors file{hint}")
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes.update(safetensors_header(file))
    return shapes


def check_component(folder: Path, library: str, class_name: str) -> None:
    """One component of a pipeline: its folder, configuration, vocabulary and weights are all there and agree."""
    if not folder.is_dir():
        raise BadInput(f"component folder {folder.name} is missing: the checkpoint is half downloaded")
    module = module_of(library, folder.name)
    if not any((folder / name).is_file() for name in CONFIGS):
        raise BadInput(f"{folder.name} has none of {', '.join(CONFIGS)}: the checkpoint is half downloaded")
    for name in CONFIGS:
        if (folder / name).is_file():
            read_json(folder / name)
    if library == "transformers":
        check_vocabulary(folder, class_name)
    if not (folder / "config.json").is_file():
        return  # a scheduler, a tokenizer or an image processor: no weights
    model = getattr(module, class_name, None) if library == "diffusers" else None
    if isinstance(model, type) and issubclass(model, torch.nn.Module) and not hasattr(model, "from_config"):  # several models, in folders of their own
        for part in (folder, *sorted(folder.parent.glob(f"{folder.name}_*[0-9]"))):
            check_against_config(part, str(read_json(part / "config.json").get("_class_name")), weight_shapes(part))
        return
    shapes = weight_shapes(folder)
    if library == "diffusers":
        check_against_config(folder, class_name, shapes)


def module_of(library: str, component: str) -> ModuleType:
    """Where diffusers looks for a component's class: diffusers, transformers, or a package of diffusers' own pipelines. BadInput for any other."""
    if library in ("diffusers", "transformers"):
        return needs(library)
    package = getattr(needs("diffusers").pipelines, library, None) if library.isidentifier() else None
    if not isinstance(package, ModuleType):
        raise BadInput(f"component {component} comes from {library!r}; only diffusers and transformers classes are loaded, never code from a folder")
    return package


def check_vocabulary(folder: Path, class_name: str) -> None:
    """A tokenizer has the files of its vocabulary: without them transformers makes an empty one in silence."""
    transformers = needs("transformers")
    tokenizer = getattr(transformers, class_name, None)
    if not (isinstance(tokenizer, type) and issubclass(tokenizer, transformers.PreTrainedTokenizerBase)):
        return
    files = dict(tokenizer.vocab_files_names or {})
    if not files:
        return  # ByT5's tokens are bytes
    whole = files.pop("tokenizer_file", "tokenizer.json")
    choices = [[whole], list(files.values()) or ["tokenizer.model"]]
    if not any(all((folder / name).is_file() for name in names) for names in choices):
        wanted = ", or ".join(" and ".join(f"{folder.name}/{name}" for name in names) for names in choices)
        raise BadInput(f"{folder.name} has no vocabulary ({wanted}): the checkpoint is half downloaded")


def open_encoder(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model of transformers' kind; ``BadInput`` where a weight is missing, which its loader would draw at random with no more than a warning."""
    model = getattr(module_of(library, folder.name), class_name, None)
    if not is_pretrained(model):
        raise BadInput(f"component {folder.name} is of the class {class_name!r}, which is no model of this transformers")
    loaded, info = model.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True,
                                         variant=variant_of(folder) or None)
    missing = sorted(info["missing_keys"])
    if missing:
        files = [label(file) for file in sorted(folder.glob("*.safetensors"))]
        raise BadInput(f"{files[0] if len(files) == 1 else folder.name} lacks {len(missing)} weights, {missing[0]!r} among them: "
                       "the checkpoint is incomplete")
    return loaded


def is_pretrained(cls) -> bool:
    return isinstance(cls, type) and issubclass(cls, needs("transformers").PreTrainedModel)


def check_against_config(folder: Path, class_name: str, shapes: dict[str, list[int]]) -> None:
    """The weights are those that a diffusers model of this configuration has: no key missing, every shape the same."""
    model = getattr(needs("diffusers"), class_name, None)
    if not (isinstance(model, type) and issubclass(model, torch.nn.Module)):
        raise BadInput(f"{folder.name}/config.json names the class {class_name!r}, which this diffusers does not have")
    try:
        with torch.device("meta"):
            wanted = {name: list(t.shape) for name, t in model.from_config(read_json(folder / "config.json")).state_dict().items()}
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise BadInput(f"{folder.name}/config.json does not describe a {class_name}: {first_line(error)}") from None
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise BadInput(f"{folder.name} lacks {len(missing)} of {len(wanted)} weights, {missing[0]!r} among them: the checkpoint is incomplete")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise BadInput(f"{folder.name}: weight {name!r} has shape {shapes[name]}; by config.json it should have {shape}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@contextmanager
def silent() -> Iterator[None]:
    """diffusers and transformers load without bars and notes of their own; afterwards both are as they were."""
    import diffusers.utils.logging as theirs
    import transformers.utils.logging as others

    before = [(module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in (theirs, others)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for module, _, _ in before:
                module.set_verbosity_error()
                module.disable_progress_bar()
            yield
        finally:
            for module, verbosity, bar in before:
                module.set_verbosity(verbosity)
                if bar:
                    module.enable_progress_bar()


def open_folder(folder: Path, dtype: torch.dtype):
    """The pipeline, or the denoiser, that lies in ``folder``, in ``dtype``, on the CPU, in evaluation mode. ``BadInput`` if it is damaged."""
    diffusers = needs("diffusers")
    absent, encoders = {}, {}
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        class_name = index.get("_class_name")
        cls = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
        if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
            raise BadInput(f"model_index.json names the class {class_name!r}, which is no pipeline of this diffusers")
        parameters = inspect.signature(cls.__init__).parameters
        for name, entry in index.items():
            if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
                check_component(folder / name, *entry)
                theirs = entry[0] == "transformers" or is_pretrained(getattr(module_of(entry[0], name), entry[1], None))
                if theirs and (folder / name / "config.json").is_file() and name in parameters:
                    encoders[name] = entry
        # Stable Diffusion 3 may come without its third, largest text encoder; its folder then names it as null, or not at all.
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3")
                  if name in parameters and index.get(name) in (None, [None, None])}
    elif (folder / "config.json").is_file():
        class_name = read_json(folder / "config.json").get("_class_name", "")
        check_component(folder, "diffusers", class_name)
        cls = getattr(diffusers, class_name)
    else:
        raise BadInput(f"{folder.name} has neither model_index.json nor config.json: it is no diffusers folder, or half downloaded")
    # What is left to go wrong lies inside the loaders, which raise what they like; a folder is input, so all of it is bad input.
    try:
        with silent():
            parts = {name: open_encoder(folder / name, *encoder, dtype) for name, encoder in encoders.items()}
            variants = {variant for part in (folder, *folder.iterdir()) if part.is_dir() and (variant := variant_of(part))}
            value = cls.from_pretrained(folder, local_files_only=True, use_safetensors=True, torch_dtype=dtype, variant=min(variants, default=None),
                                        **absent, **parts)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{folder.name} cannot be loaded as {class_name}: {first_line(error)}") from error
    if hasattr(value, "set_progress_bar_config"):
        value.set_progress_bar_config(disable=True)
    else:
        value.eval().requires_grad_(False)
    return value
