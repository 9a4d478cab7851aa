"""The registry of base families. A new family is one file beside this one, and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlkit.bases.base import Base
from controlkit.bases.component import Configurations
from controlkit.bases.sd3 import StableDiffusion3
from controlkit.bases.sdxl import StableDiffusionXL
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.errors import UserError
from controlkit.files import read_json

FAMILIES: tuple[type[Base], ...] = (StableDiffusion3, StableDiffusionXL, StableDiffusion)
"""In the order in which each is asked whether a folder or a file is its own."""

KNOWN_BASES: Mapping[str, tuple[type[Base], Configurations]] = {
    name: (family, configurations) for family in reversed(FAMILIES) for name, configurations in family.known.items()
}
"""Name of a well-known model -> its family and configurations: enough to build and count it with no download."""


def known_by_shape(name: str) -> bool:
    """Whether `name` means one of `KNOWN_BASES`, and no folder here that is called so."""
    return name in KNOWN_BASES and not Path(name).is_dir()


def family_of_folder(folder: Path) -> type[Base] | None:
    """The family of a diffusers folder, by the configurations in it; None if it is of none.

    Raises:
        UserError: a configuration is not JSON.
    """
    found = configurations_in(folder)
    return next((family for family in FAMILIES if family.is_folder_of(found)), None)


def configurations_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Component -> its configuration, of those that lie in a diffusers folder.

    Raises:
        UserError: one is not JSON, or holds something else.
    """
    made = {}
    for component in {one.name: one for family in FAMILIES for one in family.components}.values():
        path = folder / component.config_file
        if component.is_tokenizer or not path.is_file():
            continue
        made[component.name] = read_json(path)
        if not isinstance(made[component.name], dict):
            raise UserError(f"{path} is not the configuration of a network; it is not whole")
    return made


def family_of_file(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[type[Base], str]:
    """The family of a single file in the original layout, and which of its known models it is.

    Args:
        shapes: of its tensors, by their names.
        name: what errors call it.

    Raises:
        UserError: it is no whole model of any.
    """
    for family in FAMILIES:
        if (kind := family.recognise(shapes, name)) is not None:
            return family, kind
    raise UserError(
        f"{name} is not a whole Stable Diffusion model in the original layout: no name of its {len(shapes)} tensors"
        f" begins with model.diffusion_model. (they are called such as {next(iter(sorted(shapes)), 'nothing')});"
        f" `controlkit inspect {name}` says what it seems to be"
    )
