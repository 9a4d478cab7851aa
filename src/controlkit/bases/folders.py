"""Diffusers folders of bases: found, checked, fetched from the hub, and loaded part by part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from controlkit.bases.base import Base
from controlkit.bases.component import Component, model_index
from controlkit.bases.defaults import NANO_DEFAULTS, defaults_in
from controlkit.bases.families import FAMILIES, KNOWN_BASES, check_configurations, configurations_in, family_of_folder
from controlkit.bases.latent_rgb import NANO_LATENT_RGB
from controlkit.bases.networks import needs_float32
from controlkit.bases.weight_files import HUB_ID, weight_files
from controlkit.errors import UserError

NANO = "nano"
SINGLE_FILES = (".safetensors", ".ckpt")
"""Suffixes of single-file models."""
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


def base_folder(name: str | Path) -> Path:
    """The complete diffusers folder for `name`; one on the hub is downloaded, or found in the cache.

    Raises:
        UserError: it is missing or incomplete.
    """
    if str(name) == NANO:
        folder = nano_folder()
    elif not Path(name).exists() and HUB_ID.fullmatch(str(name)):
        folder = from_hub(str(name))
    else:
        folder = Path(name)
    _check_folder(folder, str(name))
    return folder


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
        return from_hub(str(name), weights=False)
    if not path.is_dir():
        raise UserError(
            f"there is no base at {name}; pass `nano`, a diffusers folder, a single file, or a hub id", "missing-file"
        )
    return path


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


def load_folder(folder: Path, name: str, dtype: torch.dtype) -> Base:
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
    listed = model_index(folder).get(component.name)
    if listed and any(listed):
        raise UserError(
            f"{name} is an incomplete diffusers folder: model_index.json lists {component.name}, which is missing;"
            " download it, or set its entry to [null, null] to do without",
            "missing-file",
        )
    encoder = component.name.replace("tokenizer", "text_encoder")
    if component.is_tokenizer and (folder / encoder).is_dir():
        raise UserError(f"{name} has {encoder} without {component.name}, which it needs", "missing-file")


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


def files_of(folder: Path, networks: Iterable[str]) -> list[Path]:
    """Configurations and tokenizers of a diffusers folder, and the weights of these networks."""
    files = {file for pattern in _WANTED_FROM_HUB for file in folder.glob(pattern) if file.suffix != ".safetensors"}
    for network in networks:
        if (weights := weight_files(folder / network)) is not None:
            files |= set(weights.files)
    return sorted(files)


def from_hub(name: str, *, weights: bool = True, **options: Any) -> Path:
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
