"""Load an autoencoder in place of a base's own: from a diffusers folder, a single file, or a repository on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from controlkit.bases.families import family_of_file
from controlkit.bases.weight_files import HUB_ID, WeightFiles, torch_load_error, weight_files
from controlkit.errors import UserError
from controlkit.files import read_json

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_ORIGINAL_PREFIX = "first_stage_model."
"""Prefix of the autoencoder's tensors in a whole model in the original format."""
_FORMER_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_FROM_HUB = [f"{folder}{file}" for folder in ("", "vae/") for file in ("config.json", "diffusion_pytorch_model*")]


def vae_files(name: str, *, download: bool = False) -> tuple[Path, ...]:
    """The weight files of an autoencoder.

    Args:
        name: a single file (.safetensors, .ckpt, .pt, .bin) of an autoencoder or a whole model, in the original format
            or that of diffusers; a diffusers folder of an autoencoder or a model; or an id on the hub.
        download: whether a repository on the hub is downloaded; else it is looked up in the local cache.

    Raises:
        UserError: there are none, or the hub has no such repository.
    """
    path = Path(name)
    return (path,) if path.is_file() else _weights(_folder(name, download), name).files


def load_vae(name: str, own: Any, dtype: torch.dtype) -> Any:
    """Load an autoencoder for a base. All of its weights must be in its files.

    Args:
        name: as in `vae_files`; a repository on the hub is downloaded.
        own: the base's own autoencoder, whose configuration is used for a single file.
        dtype: of the weights.

    Returns:
        The autoencoder, on the CPU.

    Raises:
        UserError: it is missing, damaged or of another class, or its latents differ from those of `own` in channels,
            scaling, shift or resolution.
    """
    path = Path(name)
    if path.is_file():
        return _of_file(path, own, dtype)
    folder = _folder(name, download=True)
    weights = _weights(folder, name)
    config = read_json(folder / "config.json")
    given, kind = config.get("_class_name") if isinstance(config, dict) else None, type(own)
    if given != kind.__name__:
        raise UserError(f"--vae {name} is of the class {given}; expected {kind.__name__}", "wrong-kind")
    _check_latents(name, kind.from_config(config).config, own)
    variant: dict[str, Any] = {"variant": weights.variant, "use_safetensors": weights.safetensors}
    try:
        vae, loaded = kind.from_pretrained(folder, output_loading_info=True, torch_dtype=dtype, **variant)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--vae {name} cannot be loaded: {' '.join(str(error).split())[:200]}", "damaged-file"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"--vae {name} lacks {len(missing)} of its weights, such as {missing[0]}", "damaged-file")
    _check_statistics(name, vae, own)
    return vae


def _folder(name: str, download: bool) -> Path:
    """The folder with the configuration of the autoencoder."""
    path = Path(name)
    if not path.exists() and HUB_ID.fullmatch(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(name, allow_patterns=_FROM_HUB, local_files_only=not download))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(
                f"there is no file or folder {name}, and the Hugging Face hub did not provide one of this name; check"
                " the name and the connection, or pass a path",
                "download-failed",
            ) from error
    for folder in (path / "vae", path):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"--vae {name}: expected a .safetensors, .ckpt, .pt or .bin file, or a diffusers folder of an autoencoder or of"
        " a model (with a config.json)",
        "missing-file",
    )


def _weights(folder: Path, name: str) -> WeightFiles:
    if (found := weight_files(folder)) is None:
        raise UserError(f"--vae {name} has no weights in {folder}", "missing-file")
    return found


def _of_file(path: Path, own: Any, dtype: torch.dtype) -> AutoencoderKL:
    if not isinstance(own, AutoencoderKL):
        raise UserError(
            f"--vae {path} is a single file, which is not supported for the class {type(own).__name__}; pass the"
            " autoencoder as a diffusers folder",
            "unsupported",
        )
    tensors = _tensors(path)
    for config in (_config_beside(path), _config_of_model(tensors, path)):
        if config is not None:
            _check_latents(str(path), AutoencoderKL.from_config(config).config, own)
    tensors = _renamed(_autoencoder_in(tensors))
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(own.config)
    if not any(key.startswith("encoder.down_blocks.") for key in tensors):
        tensors = convert_ldm_vae_checkpoint(tensors, dict(own.config)) if "encoder.conv_in.weight" in tensors else {}
    expected = {key: value.shape for key, value in vae.state_dict().items()}
    differing = [key for key, shape in expected.items() if key not in tensors or tensors[key].shape != shape]
    if differing or len(tensors) != len(expected):
        first = differing[0] if differing else next(key for key in tensors if key not in expected)
        raise UserError(
            f"--vae {path} does not have the autoencoder of this base: {len(differing)} of its {len(expected)} tensors"
            f" are missing or of another shape (such as {first}); use one made for the base's family",
            "incompatible",
        )
    vae.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
    return vae


def _config_beside(path: Path) -> dict[str, Any] | None:
    """The configuration of an autoencoder in the folder of its file, which the file alone does not have."""
    beside = path.with_name("config.json")
    config = read_json(beside) if beside.is_file() else None
    return config if isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL" else None


def _config_of_model(tensors: dict[str, Tensor], path: Path) -> dict[str, Any] | None:
    """The configuration of the autoencoder of a whole model in the original format, which its other networks tell."""
    try:
        family, kind = family_of_file({key: tuple(value.shape) for key, value in tensors.items()}, str(path))
    except UserError:  # an autoencoder alone, or of no known family: its shapes are compared
        return None
    return dict(family.known[kind]["vae"])


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of today's diffusers; older files name those of the attention otherwise."""
    renamed = {}
    for key, value in tensors.items():
        head, attention, tail = key.partition(".attentions.")
        for former, name in _FORMER_ATTENTION.items() if attention else ():
            tail = tail.replace(former, name)
        renamed[head + attention + tail] = value
    return renamed


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except SafetensorError as error:
        raise UserError(f"--vae {path} is not a complete safetensors file ({error})", "damaged-file") from error
    except Exception as error:  # torch raises pickle's errors, of a module that is not imported here
        raise torch_load_error(path, error) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {str(key): value for key, value in pairs if isinstance(value, Tensor)}


def _autoencoder_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the autoencoder, without prefix."""
    prefix = _ORIGINAL_PREFIX if any(key.startswith(_ORIGINAL_PREFIX) for key in tensors) else ""
    named = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return {key: value for key, value in named.items() if key.startswith(_PARTS)}


def _check_latents(name: str, config: Any, own: Any) -> None:
    for key in (
        "latent_channels",
        "z_dim",
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
        "patch_size",
        "batch_norm_eps",
    ):
        expected, given = (_plain(each.get(key)) for each in (own.config, config))
        if given != expected:
            raise UserError(
                f"--vae {name} has {key} {given}, and that of the base {expected}: it is of another family, and its"
                " latents mean something else",
                "incompatible",
            )
    expected, given = (_factor(each) for each in (own.config, config))
    if given != expected:
        raise UserError(
            f"--vae {name} has {given} pixels per latent position, and that of the base {expected}", "incompatible"
        )


def _plain(value: Any) -> Any:
    """A setting with lists for tuples, as JSON has them."""
    return list(value) if isinstance(value, tuple) else value


def _check_statistics(name: str, vae: Any, own: Any) -> None:
    """Check that latents that a batch norm normalises have the same statistics.

    Raises:
        UserError: they have not.
    """
    given = dict(vae.named_buffers())
    for key, expected in own.named_buffers():
        if key.endswith(("running_mean", "running_var")) and not torch.allclose(
            given[key].float(), expected.float(), rtol=0.02, atol=1e-3
        ):
            raise UserError(
                f"--vae {name} has another {key} than that of the base: its latents mean something else", "incompatible"
            )


def _factor(config: Any) -> int:
    """Pixels per latent position, along each side."""
    halvings = config.get("temperal_downsample")
    if not halvings:
        halvings = config.get("block_out_channels", config.get("encoder_block_out_channels"))[1:]
    return int(2 ** len(halvings))
