"""A base on the meta device, from its configurations alone: to count parameters and operations without weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from controlkit.bases.base import Base
from controlkit.bases.component import Configurations
from controlkit.bases.families import KNOWN_BASES, configurations_in, family_of_folder, known_by_shape
from controlkit.bases.folders import (
    NANO,
    SINGLE_FILES,
    base_folder,
    check_family,
    defaults_of,
    folder_without_weights,
    load_tokenizer,
)
from controlkit.bases.load import loading
from controlkit.bases.single_file import read_single_file
from controlkit.bases.text import Text
from controlkit.bases.weight_files import HUB_ID
from controlkit.errors import UserError


def meta_base(name: str) -> Base:
    """A base as `load_base` takes it, or one of `KNOWN_BASES`, on the meta device, without tokenizers.

    Raises:
        UserError: there is no such base, or its configuration is incomplete.
    """
    return build_meta_base(name, *family_and_configurations(name))


def family_and_configurations(name: str) -> tuple[type[Base], Configurations]:
    """The family of a base and the configurations of its components; no other files are read.

    Raises:
        UserError: there is no such base, or its configuration is incomplete.
    """
    if known_by_shape(name):
        return KNOWN_BASES[name]
    if Path(name).suffix in SINGLE_FILES and not Path(name).is_dir():
        file = read_single_file(Path(name))
        return file.family, file.configurations
    folder = base_folder(name)
    family = check_family(family_of_folder(folder), folder, name)
    parts = configurations_in(folder)
    for part, required in family.required_settings.items():
        lacking = [key for key in required if part in parts and key not in parts[part]]
        if lacking:
            raise UserError(
                f"{folder / part / 'config.json'} is incomplete: it lacks {', '.join(lacking)}", "damaged-file"
            )
    return family, parts


def build_meta_base(name: str, family: type[Base], configurations: Configurations) -> Base:
    """A base on the meta device, from its configurations, without tokenizers."""
    defaults: dict[str, Any] = {}
    if Path(name).suffix in SINGLE_FILES and not Path(name).is_dir():
        defaults = defaults_of(Path(name).with_suffix(""))  # the folder beside the file, if there is one
    elif name == NANO or Path(name).is_dir() or (not known_by_shape(name) and HUB_ID.fullmatch(name) is not None):
        defaults = defaults_of(base_folder(name))
    return _on_meta(name, family, configurations, {}, defaults)


def _on_meta(
    name: str,
    family: type[Base],
    configurations: Configurations,
    tokenizers: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Base:
    parts: dict[str, Any] = {component.name: None for component in family.components if component.is_tokenizer}
    parts |= tokenizers
    with torch.device("meta"):
        for component in family.components:
            if component.is_network and component.name in configurations:
                parts[component.name] = component.build(configurations[component.name])
    return family(name=name, scheduler_config=configurations["scheduler"], defaults=defaults, **parts)


def prompt_reader(name: str) -> Base:
    """A base on the meta device with its tokenizers, to see how much of a prompt it reads; no weights are needed.

    Args:
        name: as of `load_base`. Of a model on the hub only configurations and tokenizers are fetched.

    Raises:
        UserError: there is no such base, its configuration is incomplete, or a tokenizer is missing.
    """
    with loading(name):
        return _prompt_reader(name)


def _prompt_reader(name: str) -> Base:
    tokenizers: dict[str, Any] = {}
    folder: Path | None
    if Path(name).suffix in SINGLE_FILES and not Path(name).is_dir():
        file = read_single_file(Path(name))
        family, configurations, folder = file.family, file.configurations, file.companion
    else:
        folder = folder_without_weights(name)
        family = check_family(family_of_folder(folder), folder, name)
        configurations = configurations_in(folder)
    left_out = {
        part.name for part in family.components if part.optional and part.is_network and part.name not in configurations
    }
    for component in family.components:
        if not component.is_tokenizer or component.name.replace("tokenizer", "text_encoder") in left_out:
            continue
        if folder is None:
            tokenizers[component.name] = family.tokenizer_for(component, configurations)
        else:
            tokenizers[component.name] = load_tokenizer(component, folder, name)
    return _on_meta(name, family, configurations, tokenizers, {})


def meta_text(base: Base) -> Text:
    """The text input of a base's denoiser for one prompt, on the meta device."""
    with torch.device("meta"):
        return base.zero_text()
