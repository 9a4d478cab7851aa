"""A name, a folder, a hub id or a single file -> a `Base`."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251, for the name of the error that torch raises
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from controlkit.bases.base import Base, needs_float32
from controlkit.bases.defaults import defaults_in
from controlkit.bases.families import FAMILIES, KNOWN_BASES, configurations_in, family_of_folder
from controlkit.bases.weight_files import unsafe_pickle_error, weight_files
from controlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

NANO = "nano"
SINGLE_FILES = (".safetensors", ".ckpt")
"""What a checkpoint of a whole model in one file is called."""

PRECISIONS = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Names of what weights can be stored in while images are drawn."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""What a model on the Hugging Face hub is called."""
_HUB_FOLDERS = tuple(dict.fromkeys(one.name for family in reversed(FAMILIES) for one in family.components))
_WANTED_FROM_HUB = ["model_index.json"] + [
    f"{folder}/*.{suffix}" for folder in _HUB_FOLDERS for suffix in ("json", "txt", "safetensors", "model")
]
"""Nothing of the root, where many repositories keep the whole model once more in one file."""
_HALVES = ["*fp16*", "*bf16*"]
_UNWANTED_FROM_HUB = [*_HALVES, "*non_ema*", "*ema_only*", "*/onnx*"]


def nano_folder() -> Path:
    """The folder of the embedded base: an ordinary diffusers folder.

    The environment variable `CONTROLKIT_NANO` puts another one in its place, to try a retrained nano.
    """
    override = os.environ.get("CONTROLKIT_NANO")
    return Path(override) if override else Path(str(files("controlkit") / "assets" / "nano"))


def load_base(
    name: str | Path = NANO,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    text_device: str | torch.device | None = None,
    random_weights: bool = False,
) -> Base:
    """Load a base, frozen: Stable Diffusion 1.x, 2.x, XL and 3, and whatever has their shape.

    Args:
        name: `nano`; a diffusers folder; a single `.safetensors` or `.ckpt` file; an id on the Hugging Face hub; or,
            with `random_weights`, one of `KNOWN_BASES`.
        device: a torch device, or `auto` for the best that is there.
        dtype: float32 by default, whatever the files hold.
        text_device: where text encoders stay, such as `cpu` for large ones; default: with the other networks.
        random_weights: of a known model without its files, for measuring speed and memory.

    Raises:
        UserError: it is missing, incomplete, or another kind of model, or there is no such device.
    """
    dtype = dtype or torch.float32
    device = choose_device(device) if isinstance(device, str) else device
    _check_device(device)
    path = Path(name)
    try:
        with _quiet():
            if random_weights:
                from controlkit.bases.random import random_base

                base = random_base(str(name), dtype)
            elif path.suffix in SINGLE_FILES and not path.is_dir():
                from controlkit.bases.single_file import load_single_file

                base = load_single_file(path, dtype)
            else:
                base = _load_folder(base_folder(name), str(name), dtype)
            taken, made = base.latents.channels, base.vae.config["latent_channels"]
            if taken != made:
                raise UserError(
                    f"the network of {name} takes {taken} channels and its latents have {made}: it is a model for"
                    " inpainting or for editing, which is also given an image; text-to-image models are run here"
                )
            if dtype == torch.bfloat16 and not random_weights:  # which changes what the base is known by
                base.original = lambda: load_base(name)
            return base.to(device=device, text_device=text_device)
    except pickle.UnpicklingError as error:
        raise UserError(f"the base {name} cannot be loaded: {unsafe_pickle_error(path, error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the base {name} cannot be loaded: {reason}") from error


def load_tokenizer(name: str | Path) -> CLIPTokenizer:
    """The tokenizer of a base alone, by the names that `load_base` takes; none of its weights are read.

    Raises:
        UserError: it is missing.
    """
    from transformers import CLIPTokenizer

    from controlkit.bases.clip_tokenizer import clip_tokenizer

    path = Path(name)
    if path.suffix in SINGLE_FILES and not path.is_dir():
        if not path.is_file():
            raise UserError(f"there is no base at {name}")
        return clip_tokenizer()  # single files hold none, and are all read with this one
    folder = nano_folder() if str(name) == NANO else path
    try:
        if not folder.exists() and HUB_ID.fullmatch(str(name)):
            return CLIPTokenizer.from_pretrained(str(name), subfolder="tokenizer")
        return CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"there is no tokenizer of a base at {name} ({reason}); give `nano`, the path of a diffusers folder or of a"
            " single file, or a hub id"
        ) from error


def base_folder(name: str | Path) -> Path:
    """The whole diffusers folder that `name` means; one on the hub is fetched, or found where it was kept before.

    Raises:
        UserError: it is missing or incomplete.
    """
    if str(name) == NANO:
        folder = nano_folder()
    elif not Path(name).exists() and HUB_ID.fullmatch(str(name)):
        folder = _from_hub(str(name))
    else:
        folder = Path(name)
    _check_folder(folder, str(name))
    return folder


def base_path(name: str | Path) -> Path:
    """The file or folder that `load_base` reads for `name`; one on the hub as in `base_folder`.

    Raises:
        UserError: it is missing or incomplete.
    """
    path = Path(name)
    return path if path.suffix in SINGLE_FILES and not path.is_dir() else base_folder(name)


def base_files(name: str | Path) -> list[Path]:
    """The files that `load_base` read for `name`, in order: the single file, or those of its folder.

    The hub is not asked: what was loaded is in its cache.

    Raises:
        UserError: it is missing or incomplete.
    """
    on_hub = str(name) != NANO and not Path(name).exists() and HUB_ID.fullmatch(str(name))
    path = _from_hub(str(name), local_files_only=True) if on_hub else base_path(name)
    if not path.is_dir():
        return [path]
    files = {file for pattern in _WANTED_FROM_HUB for file in path.glob(pattern)}
    return sorted(file for file in files if not any(file.match(pattern) for pattern in _UNWANTED_FROM_HUB))


def choose_device(name: str) -> torch.device:
    """`auto` => CUDA, then MPS, then the CPU; else the torch device of that name.

    Of several processes on a machine each has a GPU of its own, before anything is loaded onto one.

    Raises:
        UserError: torch knows no such device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return _own_gpu()
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not one that torch knows (cpu, cuda, cuda:1, mps, auto)") from error


def _own_gpu() -> torch.device:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights that only draw: `auto` => float16 on CUDA, float32 elsewhere.

    Raises:
        UserError: it is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision] or (torch.float16 if device.type == "cuda" else torch.float32)


def check_family(family: type[Base] | None, folder: Path, name: str) -> type[Base]:
    """Refuse a folder that is of no family, or lacks parts of its own.

    Raises:
        UserError: it does.
    """
    if family is None:
        configurations = configurations_in(folder)
        networks = list(dict.fromkeys(one.denoiser_component() for one in FAMILIES))
        known = " or ".join(f"{one.class_name} in {one.config_file}" for one in networks)
        found = next((configurations[one.name] for one in networks if one.name in configurations), None)
        what = (
            f"missing: {known}" if found is None else f"its network is a {found.get('_class_name')}; expected {known}"
        )
        raise UserError(f"{name} is not a whole diffusers folder of a base that is known here; {what}")
    wanted = [one for one in family.components if not one.is_tokenizer and not one.optional]
    missing = [one.config_file for one in wanted if not (folder / one.config_file).is_file()]
    if missing:
        needs = ", ".join(one.name for one in family.components if not one.optional)
        raise UserError(f"{name} is not a whole diffusers folder: {', '.join(missing)} missing; it needs {needs}")
    return family


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> Base:
    family = check_family(family_of_folder(folder), folder, name)
    parts: dict[str, Any] = {}
    for component in family.components:
        where = folder / component.name
        if component.is_scheduler or (component.optional and not where.is_dir()):
            continue
        kind = component.load_class()
        if component.is_tokenizer:
            parts[component.name] = kind.from_pretrained(where)
        else:
            argument = "dtype" if component.library == "transformers" else "torch_dtype"
            parts[component.name] = _whole(kind, where, **{argument: dtype})
    if dtype == torch.float16 and needs_float32(parts["vae"], family.upcasts_vae):
        parts["vae"].to(torch.float32)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return family(
        name=name, scheduler_config=schedule, defaults=defaults_in(folder), **family.settings_in(folder), **parts
    )


def _whole(kind: Any, folder: Path, **options: Any) -> Any:
    """A network of diffusers or transformers with every weight from its file, none filled in at random."""
    files = weight_files(folder)
    if files is None:
        raise ValueError(f"{folder.name} has no weights")
    # Both libraries read files of torch as data alone (weights_only).
    which = {"variant": files.variant, "use_safetensors": files.safetensors}
    network, told = kind.from_pretrained(folder, output_loading_info=True, **which, **options)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{folder.name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return network


def _from_hub(name: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted: dict[str, Any] = {"allow_patterns": _WANTED_FROM_HUB, "ignore_patterns": _UNWANTED_FROM_HUB}
        kept = Path(snapshot_download(name, **wanted, **options))
        if bare := [
            part for part in _HUB_FOLDERS if (kept / part / "config.json").is_file() and not _has_any(kept / part)
        ]:
            # A repository that has these in half precision only, or as files of torch.
            also = [f"{part}/*.{suffix}" for part in bare for suffix in ("json", "safetensors", "bin")]
            unwanted = [pattern for pattern in _UNWANTED_FROM_HUB if pattern not in _HALVES]
            snapshot_download(name, allow_patterns=also, ignore_patterns=unwanted, **options)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"there is no folder {name}, and no model {name} came from the Hugging Face hub ({reason});"
            " check the name and the connection, log in if it is gated, or give the path of a diffusers folder"
        ) from error
    return kept


def _has_any(folder: Path) -> bool:
    """Whether there are weights, or an index of some."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _check_device(device: str | torch.device) -> None:
    try:
        if torch.empty(0, device=device).device.type == "meta":
            raise RuntimeError("it holds shapes and no numbers")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the device {device} cannot be used here ({reason}); cpu always can") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep both libraries from printing what is said better in an error."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    for library, _ in before:
        library.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)


def _check_folder(folder: Path, name: str) -> None:
    if folder.is_file():
        raise UserError(
            f"{name} is not a base: the file of a whole model ends in {' or '.join(SINGLE_FILES)};"
            f" `controlkit inspect {name}` says what it seems to be"
        )
    if not folder.is_dir():
        known = f"; of {name} only the shape is known here, which `controlkit inspect {name}` tells, and no weights"
        raise UserError(
            f"there is no base at {name}; give `nano`, the path of a diffusers folder or of a single file, or a hub id"
            f"{known if name in KNOWN_BASES else ''}"
        )
    family = check_family(family_of_folder(folder), folder, name)
    for one in family.components:
        if one.is_network and (folder / one.name).is_dir() and weight_files(folder / one.name) is None:
            raise UserError(
                f"{name}/{one.name} has no weights: expected diffusion_pytorch_model or model, as .safetensors or .bin,"
                " whole or of a variant (.fp16, .bf16), or an index of such files"
            )
