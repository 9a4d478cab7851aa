"""A base of its configurations alone, on the meta device: for counting, without weights and without memory."""

from __future__ import annotations

from pathlib import Path

import torch

from controlkit.bases.base import Base
from controlkit.bases.component import Configurations
from controlkit.bases.families import KNOWN_BASES, configurations_in, family_of_folder, known_by_shape
from controlkit.bases.load import SINGLE_FILES, base_folder, check_family
from controlkit.bases.single_file import read_single_file
from controlkit.bases.text import Text
from controlkit.errors import UserError

_WANTED = {
    "unet": ("block_out_channels", "in_channels", "cross_attention_dim", "sample_size"),
    "transformer": ("in_channels", "sample_size", "patch_size", "num_layers", "joint_attention_dim"),
    "vae": ("block_out_channels",),
}
"""Network -> what its configuration has to say."""


def meta_base(name: str) -> Base:
    """The base of this name, as `load_base` takes it, or one of `KNOWN_BASES`, on the meta device, without tokenizers.

    Raises:
        UserError: there is no such base, or its configuration is not whole.
    """
    return build_meta_base(name, *family_and_configurations(name))


def family_and_configurations(name: str) -> tuple[type[Base], Configurations]:
    """The family of a base, and the configuration of each of its components; nothing else of its files is read.

    Raises:
        UserError: there is no such base, or its configuration is not whole.
    """
    if known_by_shape(name):
        return KNOWN_BASES[name]
    if Path(name).suffix in SINGLE_FILES and not Path(name).is_dir():
        found = read_single_file(Path(name))
        return found.family, found.configurations
    folder = base_folder(name)
    family = check_family(family_of_folder(folder), folder, name)
    parts = configurations_in(folder)
    for part, wanted in _WANTED.items():
        lacks = [key for key in wanted if part in parts and key not in parts[part]]
        if lacks:
            raise UserError(f"{folder / part / 'config.json'} does not say {', '.join(lacks)}; it is not whole")
    return family, parts


def build_meta_base(name: str, family: type[Base], configurations: Configurations) -> Base:
    """The base of configurations, on the meta device."""
    made = {component.name: None for component in family.components if component.is_tokenizer}
    with torch.device("meta"):
        for component in family.components:
            if component.is_network and component.name in configurations:
                made[component.name] = component.build(configurations[component.name])
    return family(name=name, scheduler_config=configurations["scheduler"], **made)


def meta_text(base: Base) -> Text:
    """What the denoising network of a base is told of one prompt, on the meta device."""
    with torch.device("meta"):
        return base.zero_text()
