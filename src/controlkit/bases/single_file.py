"""A whole model in one file, as communities share them, through diffusers' own conversion.

diffusers looks its configuration up on the hub; here it is written from `known.py`, so that no network is needed.
"""

from __future__ import annotations

import json
import pickle  # noqa: TID251, for the name of the error that torch raises
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from controlkit.bases.base import Base
from controlkit.bases.clip_tokenizer import clip_tokenizer
from controlkit.bases.known import KNOWN_BASES
from controlkit.bases.pickles import why_refused
from controlkit.bases.sdxl import SDXLBase
from controlkit.errors import UserError

_UNET = "model.diffusion_model."
_SD_TEXT = "cond_stage_model."
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_SECOND = {
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
}


def load_single_file(path: Path, dtype: torch.dtype, parts: Mapping[str, dict[str, Any]] | None = None) -> Base:
    """The base in a `.safetensors` or `.ckpt` file of the original layout.

    Args:
        parts: the configuration of each part, if it is not one of `KNOWN_BASES`.

    Raises:
        UserError: it is damaged, needs more than plain tensors, is not a whole model, or lacks weights.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    if not path.is_file():
        raise UserError(f"there is no base at {path}")
    shapes, metadata = _shapes(path)
    kind = detect(shapes, str(path))
    settings = dict(parts or KNOWN_BASES[kind])
    predicts = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    if predicts is None and "v_pred" in shapes:  # an empty tensor of this name is how files for ComfyUI say it
        predicts = "v_prediction"
    if predicts is not None:
        settings["scheduler"] = {**settings["scheduler"], "prediction_type": predicts}
        if "ztsnr" in shapes:
            settings["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if kind == "sd21" and predicts == "epsilon" and parts is None:  # the 512 x 512 models
            settings["unet"] = {**settings["unet"], "sample_size": 64}
    elif kind == "sd21" and parts is None:
        print(f"{path} does not say what it predicts: taken for a 768 x 768 model, which predicts v", file=sys.stderr)
    pipeline = StableDiffusionXLPipeline if "text_encoder_2" in settings else StableDiffusionPipeline
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), settings, pipeline.__name__)
        options = {"config": folder, "local_files_only": True}
        try:
            made = pipeline.from_single_file(str(path), **options)
        except SingleFileComponentError as error:
            raise UserError(
                f"{path} looks like {kind}, but lacks weights of a part: {' '.join(str(error).split())}"
            ) from error
        except (pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{path} is damaged, or needs more than plain tensors to be read: {error}") from error
        except NotImplementedError as error:
            # What torch says when a weight that the configuration asks for was never filled in.
            count = len(shapes)
            raise UserError(
                f"{path} looks like {kind}, but lacks some of its weights (it has {count}): it is cut, or another"
            ) from error
    networks = {name: getattr(made, name) for name in ("unet", "vae", "text_encoder")}
    if pipeline is StableDiffusionXLPipeline:
        networks["text_encoder_2"] = made.text_encoder_2
    for name, network in networks.items():
        _check_whole(path, name, network)
    common: dict[str, Any] = {
        "name": str(path),
        "tokenizer": made.tokenizer,
        "scheduler_config": dict(made.scheduler.config),
        **networks,
    }
    base = SDXLBase(**common, tokenizer_2=made.tokenizer_2) if "text_encoder_2" in networks else Base(**common)
    return base.to(dtype=dtype)


def family_of_file(path: Path) -> str:
    """Which of `KNOWN_BASES` a file is one of, going by the names and shapes in it; no weight is loaded.

    Raises:
        UserError: it is missing, damaged, or not a whole model.
    """
    if not path.is_file():
        raise UserError(f"there is no base at {path}")
    return detect(_shapes(path)[0], str(path))


def detect(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """Which of `KNOWN_BASES` the tensors of a file belong to, going by their names and shapes.

    Raises:
        UserError: they are not those of a whole model.
    """
    if not any(key.startswith(_UNET) for key in shapes):
        raise UserError(
            f"{name} is not a whole Stable Diffusion model in the original layout: no name of its {len(shapes)} tensors"
            f" begins with {_UNET} (they are called such as {next(iter(sorted(shapes)), 'nothing')});"
            f" `controlkit inspect {name}` says what it seems to be"
        )
    if not any(key.startswith("first_stage_model.") for key in shapes):
        raise UserError(f"{name} has a UNet but no autoencoder (first_stage_model...): it is not a whole model")
    if f"{_UNET}label_emb.0.0.weight" in shapes:
        if not any(key.startswith("conditioner.embedders.1.") for key in shapes):
            raise UserError(f"{name} is of Stable Diffusion XL's family without its first text encoder (a refiner?)")
        return "sdxl"
    if not any(key.startswith(_SD_TEXT) for key in shapes):
        raise UserError(f"{name} has no text encoder ({_SD_TEXT}...): it is not a whole model")
    return "sd21" if any(key.startswith(f"{_SD_TEXT}model.") for key in shapes) else "sd15"


def write_config(folder: Path, parts: Mapping[str, dict[str, Any]], pipeline: str) -> None:
    """The configuration files of a diffusers folder, with tokenizers and without weights."""
    classes = {**_CLASSES, **(_SECOND if "text_encoder_2" in parts else {})}
    index: dict[str, Any] = {"_class_name": pipeline, **{name: list(kind) for name, kind in classes.items()}}
    if pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    else:
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for name, (_, kind) in classes.items():
        if name.startswith("tokenizer"):
            opened = name == "tokenizer_2" or parts["text_encoder"]["hidden_size"] == 1024
            clip_tokenizer(pad_token="!" if opened else "<|endoftext|>").save_pretrained(folder / name)
            continue
        config: dict[str, Any] = {"_class_name": kind, **parts[name]}
        if name.startswith("text_encoder"):
            config |= {"model_type": "clip_text_model", "architectures": [kind]}
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config), encoding="utf-8")


def _shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of the tensors of a file, and its metadata, without loading the tensors."""
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.metadata() or {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="meta", weights_only=True)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    except Exception as error:  # the reader's own error class lives in a module that is never imported here
        raise UserError(why_refused(path, error)) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else {}
    pairs = held.items() if isinstance(held, dict) else ()
    return {str(name): tuple(value.shape) for name, value in pairs if isinstance(value, torch.Tensor)}, {}


def _check_whole(path: Path, name: str, network: nn.Module) -> None:
    empty = [key for key, value in network.named_parameters() if value.is_meta]
    if empty:
        raise UserError(f"{path} lacks {len(empty)} weights of its {name}, such as {empty[0]}")
