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
from controlkit.bases.known import KNOWN_BASES, defaults_in
from controlkit.bases.pickles import why_refused
from controlkit.bases.weight_files import weight_files
from controlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

NANO = "nano"
SINGLE_FILES = (".safetensors", ".ckpt")
"""What a checkpoint of a whole model in one file is called."""

PRECISIONS = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Names of what weights can be stored in while pictures are drawn."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""What a model on the Hugging Face hub is called."""
_FOLDER_PARTS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
_HUB_FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_WANTED_FROM_HUB = ["model_index.json"] + [
    f"{folder}/*.{suffix}" for folder in _HUB_FOLDERS for suffix in ("json", "txt", "safetensors")
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
    random_weights: bool = False,
) -> Base:
    """Load a base, frozen: Stable Diffusion 1.x, 2.x and XL, and whatever has their shape.

    Args:
        name: `nano`; a diffusers folder; a single `.safetensors` or `.ckpt` file; an id on the Hugging Face hub; or,
            with `random_weights`, `sd15`, `sd21` or `sdxl`.
        device: a torch device, or `auto` for the best that is there.
        dtype: float32 by default, whatever the files hold.
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
                # bfloat16 would change what the base is known by, which is taken before it is cast.
                read_as = torch.float32 if dtype == torch.bfloat16 else dtype
                base = _load_folder(base_folder(name), str(name), read_as).to(dtype=dtype)
            taken, made = base.unet.config["in_channels"], base.vae.config["latent_channels"]
            if taken != made:
                raise UserError(
                    f"the UNet of {name} takes {taken} channels and its latents have {made}: it is a model for"
                    " inpainting or for editing, which is also given a picture; text-to-image models are run here"
                )
            return base.to(device=device)
    except pickle.UnpicklingError as error:
        raise UserError(f"the base {name} cannot be loaded: {why_refused(path, error)}") from error
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


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> Base:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from controlkit.bases.sdxl import SDXLBase

    vae = _whole(AutoencoderKL, folder / "vae", torch_dtype=dtype)
    if dtype == torch.float16 and needs_float32(vae, xl=(folder / "text_encoder_2").is_dir()):
        vae.to(torch.float32)
    parts: dict[str, Any] = {
        "name": name,
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": _whole(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        "vae": vae,
        "unet": _whole(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        "scheduler_config": json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        "defaults": defaults_in(folder),
    }
    if not (folder / "text_encoder_2").is_dir():
        if parts["unet"].config.get("addition_embed_type") is not None:
            raise UserError(f"the UNet of {name} reads a second text encoder, but there is no {name}/text_encoder_2")
        return Base(**parts)
    return SDXLBase(
        **parts,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_2=_whole(CLIPTextModelWithProjection, folder / "text_encoder_2", dtype=dtype),
        zero_empty=_zeros_for_empty(folder),
    )


def _zeros_for_empty(folder: Path) -> bool:
    index = folder / "model_index.json"
    if not index.is_file():
        return True
    return bool(json.loads(index.read_text(encoding="utf-8")).get("force_zeros_for_empty_prompt", True))


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
    missing = [part for part in _FOLDER_PARTS if not (folder / part).is_file()]
    if missing:
        raise UserError(
            f"{name} is not a whole diffusers folder: {', '.join(missing)} missing;"
            " it needs unet, vae, text_encoder, tokenizer and scheduler"
        )
    encoders = ("text_encoder", "text_encoder_2") if (folder / "text_encoder_2").is_dir() else ("text_encoder",)
    for part in ("unet", "vae", *encoders):
        if weight_files(folder / part) is None:
            raise UserError(
                f"{name}/{part} has no weights: expected diffusion_pytorch_model or model, as .safetensors or .bin,"
                " whole or of a variant (.fp16, .bf16), or an index of such files"
            )
