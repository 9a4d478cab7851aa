"""A base of its configuration alone, on the meta device: for counting, without weights and without memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit.bases.base import Base, Text
from controlkit.bases.known import KNOWN_BASES, SD15_TEXT_ENCODER, known_by_shape
from controlkit.bases.load import SINGLE_FILES, base_folder
from controlkit.bases.sdxl import SDXLBase
from controlkit.bases.single_file import family_of_file
from controlkit.errors import UserError
from controlkit.files import read_json

_TOKENS = 77
_UNET_KEYS = ("block_out_channels", "in_channels", "cross_attention_dim", "sample_size")


def meta_base(name: str) -> Base:
    """The base of this name, as `load_base` takes it, or a well-known one (`sd15`, `sd21`, `sdxl`), on the meta device.

    Its text encoder is that of Stable Diffusion 1 where a folder's is not looked at; its tokenizer is missing.

    Raises:
        UserError: there is no such base, or its configuration is not whole.
    """
    return build_meta_base(name, configurations(name))


def configurations(name: str) -> dict[str, dict[str, Any]]:
    """The configuration of each part of a base; a folder's files are read, and nothing else of it.

    Raises:
        UserError: there is no such base, or its configuration is not whole.
    """
    of_file = Path(name).suffix in SINGLE_FILES and not Path(name).is_dir()
    if of_file or known_by_shape(name):
        return KNOWN_BASES[family_of_file(Path(name)) if of_file else name]
    folder = base_folder(name)
    parts = {part: read_json(folder / part / "config.json") for part in ("unet", "vae")}
    for part, wanted in (("unet", _UNET_KEYS), ("vae", ("block_out_channels",))):
        config = parts[part]
        lacks = [key for key in wanted if not isinstance(config, dict) or key not in config]
        if lacks:
            raise UserError(f"{folder / part / 'config.json'} does not say {', '.join(lacks)}; it is not whole")
    return {**parts, "text_encoder": SD15_TEXT_ENCODER, "scheduler": {}}


def build_meta_base(name: str, parts: Mapping[str, Mapping[str, Any]]) -> Base:
    """The base of configurations, on the meta device."""
    with torch.device("meta"):
        made: dict[str, Any] = {
            "name": name,
            "tokenizer": None,
            "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])),
            "vae": AutoencoderKL(**_plain(parts["vae"])),
            "unet": UNet2DConditionModel(**_plain(parts["unet"])),
            "scheduler_config": dict(parts["scheduler"]),
        }
        if "text_encoder_2" not in parts:
            return Base(**made)
        made["tokenizer_2"] = None
        second = CLIPTextModelWithProjection(CLIPTextConfig(**parts["text_encoder_2"]))
        return SDXLBase(**made, text_encoder_2=second)


def meta_text(base: Base) -> Text:
    """What the UNet of a base is told of one prompt, on the meta device."""
    config = base.unet.config
    with torch.device("meta"):
        tokens = torch.empty(1, _TOKENS, config["cross_attention_dim"])
        if config.get("addition_embed_type") != "text_time":
            return Text(tokens)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return Text(tokens, torch.empty(1, pooled), torch.empty(1, 6))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
