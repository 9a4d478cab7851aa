"""Registry of base families. A new family is one file beside this one and one line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from controlkit.bases.base import Base
from controlkit.bases.component import Configurations
from controlkit.bases.flux import Flux
from controlkit.bases.flux2 import Flux2, Flux2Klein
from controlkit.bases.qwen_image import QwenImage
from controlkit.bases.sana import Sana
from controlkit.bases.sd3 import StableDiffusion3
from controlkit.bases.sdxl import StableDiffusionXL
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.z_image import ZImage
from controlkit.errors import UserError
from controlkit.files import read_json

FAMILIES: tuple[type[Base], ...] = (
    QwenImage,
    ZImage,
    Sana,
    Flux2Klein,
    Flux2,
    Flux,
    StableDiffusion3,
    StableDiffusionXL,
    StableDiffusion,
)
"""In the order in which they are tried on a folder or a file."""

KNOWN_BASES: Mapping[str, tuple[type[Base], Configurations]] = {
    name: (family, configurations) for family in reversed(FAMILIES) for name, configurations in family.known.items()
}
"""Name of a well-known model -> its family and configurations: enough to build and count it without a download."""


def known_by_shape(name: str) -> bool:
    """Whether `name` is one of `KNOWN_BASES` and not a folder of that name."""
    return name in KNOWN_BASES and not Path(name).is_dir()


def family_of_folder(folder: Path) -> type[Base] | None:
    """The family of a diffusers folder, from its configurations; None if there is none.

    Raises:
        UserError: a configuration is not JSON.
    """
    found = configurations_in(folder)
    return next((family for family in FAMILIES if family.is_folder_of(found)), None)


def configurations_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Component -> configuration, for the components in a diffusers folder.

    Raises:
        UserError: one is not a JSON object.
    """
    configurations = {}
    for component in {component.name: component for family in FAMILIES for component in family.components}.values():
        path = folder / component.config_file
        if component.is_tokenizer or not path.is_file():
            continue
        configurations[component.name] = read_json(path)
        if not isinstance(configurations[component.name], dict):
            raise UserError(f"{path} is not the configuration of a network: expected a JSON object", "damaged-file")
    return configurations


def check_configurations(configurations: Configurations, name: str) -> None:
    """Check that the parts of a base are of a kind that is supported.

    Raises:
        UserError: they are not.
    """
    for reason, advice in _unsupported(configurations):
        raise UserError(f"{name} {reason}, which is not supported; use {advice}", "unsupported")


def _unsupported(configurations: Configurations) -> Iterator[tuple[str, str]]:
    """What of these configurations is not supported, and what to use instead."""
    scheduler, vae, unet = (configurations.get(part, {}) for part in ("scheduler", "vae", "unet"))
    if quantised := [part for part, config in configurations.items() if config.get("quantization_config")]:
        yield f"has quantised weights ({', '.join(quantised)})", "the folder of the model in float16 or bfloat16"
    for key in ("class_embed_type", "num_class_embeds"):
        if unet.get(key) is not None:
            reason = f"has a UNet that is conditioned on a class or an image ({key}), as that of Stable unCLIP"
            yield reason, "a text-to-image model"
    for part, config in configurations.items():
        if config.get("use_attention_mask"):
            reason = f"masks the padding of prompts in its {part} (use_attention_mask)"
            yield reason, "a model without it, as the released ones of Stable Diffusion"
    kind = str(scheduler.get("_class_name", ""))
    if kind.startswith("EDM") or "sigma_data" in scheduler:
        reason = f"has a noise schedule of EDM ({kind or 'with sigma_data'}), as Playground v2.5 and CosXL"
        yield reason, "a model with a variance preserving schedule, such as the Stable Diffusion XL base"
    normalised = [key for key in ("latents_mean", "latents_std") if vae.get(key) is not None]
    if normalised and vae.get("_class_name", "AutoencoderKL") == "AutoencoderKL":
        reason = f"has an autoencoder that normalises its latents by {' and '.join(normalised)}"
        yield reason, "a model whose latents have a scaling_factor alone, such as the Stable Diffusion XL base"


def family_of_file(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[type[Base], str]:
    """The family of a single file in the original format, and the known model that it matches.

    Args:
        shapes: name -> shape of its tensors.
        name: of the file, for errors.

    Raises:
        UserError: it is not a complete model of any family.
    """
    for family in FAMILIES:
        if (kind := family.recognise(shapes, name)) is not None:
            return family, kind
    raise UserError(
        f"{name} is not a complete Stable Diffusion model in the original format: none of its"
        f" {len(shapes)} tensors is named model.diffusion_model.* (the first is"
        f" {next(iter(sorted(shapes)), 'missing')}); `controlkit inspect {name}` shows what it contains",
        "wrong-kind",
    )
