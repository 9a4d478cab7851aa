"""A name or a folder -> a `Base`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from controlkit.bases.base import Base
from controlkit.errors import UserError

NANO = "nano"


def nano_folder() -> Path:
    """The folder of the embedded base: an ordinary diffusers folder.

    The environment variable `CONTROLKIT_NANO` puts another one in its place, to try a retrained nano.
    """
    override = os.environ.get("CONTROLKIT_NANO")
    return Path(override) if override else Path(str(files("controlkit") / "assets" / "nano"))


def load_base(name: str | Path = NANO, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Base:
    """Load `nano` or a diffusers folder of a Stable Diffusion 1.x shaped model, frozen.

    Args:
        name: `nano` or a path.
        dtype: float32 by default, whatever the files hold.

    Raises:
        UserError: the folder is missing, incomplete, or of another kind of model, or there is no such device.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = base_folder(name)
    dtype = dtype or torch.float32
    _check_device(device)
    try:
        with _quiet():
            return Base(
                name=str(name),
                tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                text_encoder=_whole(CLIPTextModel, folder / "text_encoder", dtype=dtype),
                vae=_whole(AutoencoderKL, folder / "vae", torch_dtype=dtype),
                unet=_whole(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
                scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
            ).to(device=device)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the base {name} cannot be loaded: {reason}") from error


def _whole(kind: Any, folder: Path, **options: Any) -> Any:
    """A network of diffusers or transformers with every weight from its file, none filled in at random."""
    network, told = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{folder.name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return network


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
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
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)


def base_folder(name: str | Path) -> Path:
    """The whole diffusers folder that `name` means.

    Raises:
        UserError: it is missing or incomplete.
    """
    folder = nano_folder() if str(name) == NANO else Path(name)
    _check_folder(folder, str(name))
    return folder


def _check_folder(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise UserError(f"there is no base at {name}; give `nano` or the path of a diffusers folder")
    missing = [
        part
        for part in (
            "unet/config.json",
            "vae/config.json",
            "text_encoder/config.json",
            "scheduler/scheduler_config.json",
        )
        if not (folder / part).is_file()
    ]
    if missing:
        raise UserError(
            f"{name} is not a whole diffusers folder: {', '.join(missing)} missing;"
            " it needs unet, vae, text_encoder, tokenizer and scheduler"
        )
    for part in ("unet", "vae", "text_encoder"):
        if not list((folder / part).glob("*.safetensors")):
            raise UserError(f"{name}/{part} has no .safetensors file; other formats are not read")
