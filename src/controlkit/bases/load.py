"""A name or a folder -> a `Base`."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path

import torch

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
        UserError: the folder is missing, incomplete, or of another kind of model.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    folder = base_folder(name)
    dtype = dtype or torch.float32
    shown = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        base = Base(
            name=str(name),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
            vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, use_safetensors=True),
            unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, use_safetensors=True),
            scheduler_config=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the base {name} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(shown)
    return base.to(device=device)


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
