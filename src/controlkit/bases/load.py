"""Load a base by name, folder, hub id or single file."""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251, for the name of the error that torch raises
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from controlkit.bases.base import Base
from controlkit.bases.component import Component
from controlkit.bases.defaults import NANO_DEFAULTS, defaults_in
from controlkit.bases.families import (
    FAMILIES,
    KNOWN_BASES,
    check_configurations,
    configurations_in,
    family_of_folder,
)
from controlkit.bases.identity import hash_of_halves
from controlkit.bases.latent_rgb import NANO_LATENT_RGB
from controlkit.bases.networks import needs_float32
from controlkit.bases.vae import load_vae
from controlkit.bases.weight_files import HUB_ID, torch_load_error, weight_files
from controlkit.errors import UserError
from controlkit.files import read_json

NANO = "nano"
SINGLE_FILES = (".safetensors", ".ckpt")
"""Suffixes of single-file models."""

PRECISIONS = {"auto": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Name -> dtype of the weights for inference."""

_HUB_FOLDERS = tuple(dict.fromkeys(component.name for family in reversed(FAMILIES) for component in family.components))
_WANTED_FROM_HUB = ["model_index.json"] + [
    f"{folder}/*.{suffix}" for folder in _HUB_FOLDERS for suffix in ("json", "txt", "jinja", "safetensors", "model")
]
"""Nothing of the root, where many repositories keep a second copy of the model in one file."""
_VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model")
"""Files of a tokenizer that are its whole vocabulary."""
_HALF_PRECISION = ["*fp16*", "*bf16*"]
_UNWANTED_FROM_HUB = [*_HALF_PRECISION, "*non_ema*", "*ema_only*", "*/onnx*"]


def nano_folder() -> Path:
    """The embedded base, an ordinary diffusers folder.

    The environment variable `CONTROLKIT_NANO` overrides it, to try a retrained nano.
    """
    override = os.environ.get("CONTROLKIT_NANO")
    return Path(override) if override else Path(str(files("controlkit") / "assets" / "nano"))


def load_base(
    name: str | Path = NANO,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    text_device: str | torch.device | None = None,
    vae: str | None = None,
    random_weights: bool = False,
    denoiser_aside: bool = False,
) -> Base:
    """Load a base, frozen: Stable Diffusion 1.x, 2.x, XL and 3, FLUX.1, FLUX.2, Z-Image, Qwen-Image, and models of
    the same architectures.

    Inpainting models (UNets of 9 input channels) only generate, from an image and a mask (`Base.is_inpainting`).

    Args:
        name: `nano`; a diffusers folder; a single `.safetensors` or `.ckpt` file; an id on the Hugging Face hub; or,
            with `random_weights`, one of `KNOWN_BASES`.
        device: a torch device, or `auto` for the best available, as `GenerateRequest` has it.
        dtype: a torch dtype, or a name of `PRECISIONS`, such as `auto`, as `GenerateRequest.precision` has it. Default:
            float32, whatever the files contain.
        text_device: of the text encoders, such as `cpu` for large ones; default: `device`.
        vae: an autoencoder in place of the base's own, as in `bases.vae.load_vae`.
        random_weights: build a known model without its files, to measure speed and memory.
        denoiser_aside: leave the denoiser on the CPU until `Base.place_denoiser`, to cast it first.

    Raises:
        UserError: it is missing, incomplete or another kind of model, or the device is not available.
    """
    device = choose_device(device) if isinstance(device, str) else device
    dtype = choose_dtype(dtype, device) if isinstance(dtype, str) else dtype or torch.float32
    check_device(device)
    path = Path(name)
    with loading(name):
        if random_weights:
            from controlkit.bases.random import random_base

            base = random_base(str(name), dtype)
        elif path.suffix in SINGLE_FILES and not path.is_dir():
            from controlkit.bases.single_file import load_single_file

            base = load_single_file(path, dtype)
        else:
            base = _load_folder(base_folder(name), str(name), dtype)
        if vae is not None:
            other = load_vae(vae, base.vae, dtype)
            base.vae = other.to(torch.float32) if base.keeps_float32(other, dtype) else other
            base.vae.eval().requires_grad_(False)
            base.vae_name = vae
        network_channels, latent_channels = base.denoiser_channels, base.vae_channels
        if network_channels != latent_channels and not base.is_inpainting:
            raise UserError(
                f"{name} is neither a text-to-image nor an inpainting model: its network takes {network_channels}"
                f" channels, its latents have {latent_channels}; use another model",
                "unsupported",
            )
        if dtype == torch.bfloat16 and not random_weights:  # which changes the base's fingerprint
            base.original = lambda: load_base(name, vae=vae)
        return base.to(device=device, text_device=text_device, denoiser_aside=denoiser_aside)


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """A block that loads a base, or parts of it; what the libraries raise becomes one sentence."""
    path = Path(name)
    try:
        with _quiet_libraries():
            yield
    except (pickle.UnpicklingError, OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        if (unsafe := _unpickling_error(error)) is not None:
            cause = torch_load_error(path, unsafe)
            raise UserError(f"the base {name} cannot be loaded: {cause}", cause.code) from error
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the base {name} cannot be loaded: {reason}", "damaged-file") from error


def _unpickling_error(error: BaseException | None) -> pickle.UnpicklingError | None:
    """The error of torch's unpickler behind `error`: diffusers replaces it by an OSError."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error


def denoiser_fingerprint(name: str | Path) -> str:
    """`Base.fingerprint` of a base; of a folder only the denoising network is read, in float16.

    Raises:
        UserError: it is missing, incomplete or damaged.
    """
    path = Path(name)
    if path.suffix in SINGLE_FILES and not path.is_dir():
        return load_base(name, dtype=torch.float16).fingerprint
    folder = base_folder(name)
    component = check_family(family_of_folder(folder), folder, str(name)).denoiser_component()
    with loading(name):
        network = load_network(component, folder / component.name, torch.float16)
    return hash_of_halves(network.state_dict().values())


def load_tokenizer(component: Component, folder: Path, name: str) -> Any:
    """A tokenizer of a diffusers folder.

    Raises:
        UserError: its folder has no vocabulary; transformers would make an empty tokenizer of it.
    """
    where = folder / component.name
    of_pairs = all((where / file).is_file() for file in ("vocab.json", "merges.txt"))
    if not of_pairs and not any((where / file).is_file() for file in _VOCABULARIES):
        raise UserError(
            f"{name}/{component.name} has no vocabulary: expected vocab.json with merges.txt, or"
            f" {' or '.join(_VOCABULARIES)}; the download may be incomplete",
            "missing-file",
        )
    return component.load_class().from_pretrained(where, local_files_only=True)


def folder_without_weights(name: str | Path) -> Path:
    """The diffusers folder for `name`, of which configurations and tokenizers are needed: of a model on the hub only
    these are fetched.

    Raises:
        UserError: there is none.
    """
    if str(name) == NANO:
        return nano_folder()
    path = Path(name)
    if not path.exists() and HUB_ID.fullmatch(str(name)):
        return _from_hub(str(name), weights=False)
    if not path.is_dir():
        raise UserError(
            f"there is no base at {name}; pass `nano`, a diffusers folder, a single file, or a hub id", "missing-file"
        )
    return path


def base_folder(name: str | Path) -> Path:
    """The complete diffusers folder for `name`; one on the hub is downloaded, or found in the cache.

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
    """The file or folder that `load_base` reads for `name`; hub ids as in `base_folder`.

    Raises:
        UserError: it is missing or incomplete.
    """
    path = Path(name)
    return path if path.suffix in SINGLE_FILES and not path.is_dir() else base_folder(name)


def base_files(name: str | Path) -> list[Path]:
    """The files that `load_base` reads for `name`, in order: those of its folder, or the single file with what it needs
    of the folder beside it.

    Hub ids are looked up in the local cache only.

    Raises:
        UserError: it is missing or incomplete.
    """
    on_hub = str(name) != NANO and not Path(name).exists() and HUB_ID.fullmatch(str(name))
    path = _from_hub(str(name), local_files_only=True) if on_hub else base_path(name)
    if not path.is_dir():
        from controlkit.bases.single_file import read_single_file

        file = read_single_file(path)
        return [path] if file.companion is None else [path, *_files_of(file.companion, file.beside)]
    family = check_family(family_of_folder(path), path, str(name))
    return _files_of(path, [component.name for component in family.components if component.is_network])


def _files_of(folder: Path, networks: Iterable[str]) -> list[Path]:
    """Configurations and tokenizers of a diffusers folder, and the weights of these networks."""
    files = {file for pattern in _WANTED_FROM_HUB for file in folder.glob(pattern) if file.suffix != ".safetensors"}
    for network in networks:
        if (weights := weight_files(folder / network)) is not None:
            files |= set(weights.files)
    return sorted(files)


def choose_device(name: str) -> torch.device:
    """`auto` => CUDA, then MPS, then the CPU; else the torch device of that name.

    With several processes on a machine, each gets its own GPU before anything is loaded.

    Raises:
        UserError: torch does not know the device.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return _local_gpu()
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"device {name!r} is unknown to torch; expected cpu, cuda, cuda:1, mps or auto", "device-unavailable"
        ) from error


def _local_gpu() -> torch.device:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype for inference: `auto` => float16 on CUDA, float32 elsewhere.

    Raises:
        UserError: it is none of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}", "unknown-name")
    return PRECISIONS[precision] or (torch.float16 if device.type == "cuda" else torch.float32)


def check_family(family: type[Base] | None, folder: Path, name: str) -> type[Base]:
    """The family of a complete diffusers folder.

    Raises:
        UserError: `family` is None, or a component is missing.
    """
    if family is None:
        configurations = configurations_in(folder)
        networks = list(dict.fromkeys(known.denoiser_component() for known in FAMILIES))
        expected = " or ".join(f"{network.class_name} in {network.config_file}" for network in networks)
        config = next((configurations[network.name] for network in networks if network.name in configurations), None)
        reason = (
            f"missing: {expected}"
            if config is None
            else f"its network is a {config.get('_class_name')}; expected {expected}"
        )
        raise UserError(f"{name} is not a diffusers folder of a supported base; {reason}", "wrong-kind")
    required = [part for part in family.components if not part.is_tokenizer and not part.optional]
    missing = [part.config_file for part in required if not (folder / part.config_file).is_file()]
    if missing:
        needs = ", ".join(part.name for part in family.components if not part.optional)
        raise UserError(
            f"{name} is an incomplete diffusers folder: {', '.join(missing)} missing; it needs {needs}", "missing-file"
        )
    return family


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> Base:
    family = check_family(family_of_folder(folder), folder, name)
    parts: dict[str, Any] = {}
    for component in family.components:
        where = folder / component.name
        if component.is_scheduler:
            continue
        if not where.is_dir():
            _check_left_out(component, family, folder, name)
            continue
        if component.is_tokenizer:
            parts[component.name] = load_tokenizer(component, folder, name)
        else:
            parts[component.name] = load_network(component, where, dtype)
    if dtype == torch.float16 and needs_float32(parts["vae"], family.upcasts_vae):
        parts["vae"].to(torch.float32)
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    base = family(
        name=name, scheduler_config=schedule, defaults=defaults_of(folder), **family.settings_in(folder), **parts
    )
    _ = base.schedule  # cached_property: an unknown setting is an error now
    return base


def defaults_of(folder: Path) -> dict[str, Any]:
    """The defaults of a base's folder (`Base.defaults`)."""
    # A file of nano may be older than some of its defaults.
    nano = {**NANO_DEFAULTS, "latent_rgb": NANO_LATENT_RGB} if folder == nano_folder() else {}
    return {**nano, **defaults_in(folder)}


def load_network(component: Component, folder: Path, dtype: torch.dtype) -> Any:
    """A diffusers or transformers network; every weight comes from its files, none is initialised at random.

    Raises:
        ValueError: weights are missing.
    """
    files = weight_files(folder)
    if files is None:
        raise ValueError(f"{folder.name} has no weights")
    # Both libraries load torch files with weights_only.
    selected: dict[str, Any] = {"variant": files.variant, "use_safetensors": files.safetensors}
    selected["dtype" if component.library == "transformers" else "torch_dtype"] = dtype
    network, loading_info = component.load_class().from_pretrained(folder, output_loading_info=True, **selected)
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"{folder.name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return network


def _check_left_out(component: Component, family: type[Base], folder: Path, name: str) -> None:
    """Check that a base can do without a component whose folder is missing, as Stable Diffusion 3 without T5.

    Raises:
        UserError: it is not optional, it is listed in `model_index.json`, or it is the tokenizer of a text encoder that
            is there.
    """
    if not component.optional:
        raise UserError(
            f"{name} is an incomplete diffusers folder: {component.name} is missing; it needs"
            f" {', '.join(part.name for part in family.components if not part.optional)}",
            "missing-file",
        )
    index = folder / "model_index.json"
    content = read_json(index) if index.is_file() else {}
    listed = content.get(component.name) if isinstance(content, dict) else None
    if listed and any(listed):
        raise UserError(
            f"{name} is an incomplete diffusers folder: {index.name} lists {component.name}, which is missing; download"
            " it, or set its entry to [null, null] to do without",
            "missing-file",
        )
    encoder = component.name.replace("tokenizer", "text_encoder")
    if component.is_tokenizer and (folder / encoder).is_dir():
        raise UserError(f"{name} has {encoder} without {component.name}, which it needs", "missing-file")


def _from_hub(name: str, *, weights: bool = True, **options: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [each for each in _WANTED_FROM_HUB if weights or not each.endswith(".safetensors")]
        wanted: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": _UNWANTED_FROM_HUB}
        folder = Path(snapshot_download(name, **wanted, **options))
        if weights and (
            without_weights := [
                part
                for part in _HUB_FOLDERS
                if (folder / part / "config.json").is_file() and not _has_weights(folder / part)
            ]
        ):
            # The repository has these in half precision only, or as torch files.
            more = [f"{part}/*.{suffix}" for part in without_weights for suffix in ("json", "safetensors", "bin")]
            unwanted = [pattern for pattern in _UNWANTED_FROM_HUB if pattern not in _HALF_PRECISION]
            snapshot_download(name, allow_patterns=more, ignore_patterns=unwanted, **options)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"there is no folder {name}, and the Hugging Face hub did not provide a model {name} ({reason});"
            " check the name and the connection, log in if the model is gated, or pass the path of a"
            " diffusers folder",
            "download-failed",
        ) from error
    return folder


def _has_weights(folder: Path) -> bool:
    """Whether a folder has weight files."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def check_device(device: str | torch.device) -> None:
    """Check that tensors can be made on a device.

    Raises:
        UserError: they cannot.
    """
    try:
        if torch.empty(0, device=device).device.type == "meta":
            raise RuntimeError("it has shapes but no data")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device} cannot be used here ({reason}); try cpu", "device-unavailable") from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence diffusers and transformers, whose warnings are turned into errors here."""
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
            f"{name} is not a base: single-file models end in {' or '.join(SINGLE_FILES)}; `controlkit"
            f" inspect {name}` shows what it contains",
            "wrong-kind",
        )
    if not folder.is_dir():
        known = (
            f" (controlkit knows the architecture of {name}, shown by `controlkit inspect {name}`, but has no weights)"
        )
        raise UserError(
            f"there is no base at {name}{known if name in KNOWN_BASES else ''}; pass `nano`, a diffusers"
            " folder, a single file, or a hub id",
            "missing-file",
        )
    family = check_family(family_of_folder(folder), folder, name)
    check_configurations(configurations_in(folder), name)
    for component in family.components:
        path = folder / component.name
        if component.is_network and path.is_dir() and weight_files(path) is None:
            raise UserError(
                f"{name}/{component.name} has no weights: expected diffusion_pytorch_model or model as"
                " .safetensors or .bin, with or without a variant (.fp16, .bf16), or an index of shards",
                "missing-file",
            )
