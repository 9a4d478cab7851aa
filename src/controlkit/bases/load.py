"""Load a base by name, folder, hub id or single file."""

from __future__ import annotations

import pickle  # noqa: TID251, for the name of the error that torch raises
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from controlkit.bases.base import Base
from controlkit.bases.devices import check_device, choose_device, choose_dtype
from controlkit.bases.families import family_of_folder
from controlkit.bases.folders import (
    NANO,
    SINGLE_FILES,
    base_folder,
    check_family,
    files_of,
    from_hub,
    load_folder,
    load_network,
)
from controlkit.bases.identity import hash_of_halves
from controlkit.bases.libraries import quiet_libraries
from controlkit.bases.random import random_base
from controlkit.bases.single_file import load_single_file, read_single_file
from controlkit.bases.vae import load_vae
from controlkit.bases.weight_files import HUB_ID, torch_load_error
from controlkit.errors import UserError


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
    """Load a base, frozen: Stable Diffusion 1.x, 2.x, XL and 3, FLUX.1, FLUX.2, Z-Image, Qwen-Image, Sana, and models
    of the same architectures.

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
            base = random_base(str(name), dtype)
        elif path.suffix in SINGLE_FILES and not path.is_dir():
            base = load_single_file(path, dtype)
        else:
            base = load_folder(base_folder(name), str(name), dtype)
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
        with quiet_libraries():
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
    path = from_hub(str(name), local_files_only=True) if on_hub else base_path(name)
    if not path.is_dir():
        file = read_single_file(path)
        return [path] if file.companion is None else [path, *files_of(file.companion, file.beside)]
    family = check_family(family_of_folder(path), path, str(name))
    return files_of(path, [component.name for component in family.components if component.is_network])
