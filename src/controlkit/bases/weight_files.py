"""Weight files of a network in a diffusers folder: single or sharded, by container and variant."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from controlkit.errors import UserError
from controlkit.files import read_json

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""Pattern of an id on the Hugging Face hub."""
VARIANTS = (None, "fp16", "bf16")
"""In order of preference: full precision first."""
STEMS = {"safetensors": ("diffusion_pytorch_model", "model"), "bin": ("diffusion_pytorch_model", "pytorch_model")}
"""Container -> file names of diffusers and transformers, without suffix."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one network."""

    files: tuple[Path, ...]
    """One file, or the shards of an index."""
    variant: str | None
    """As in `from_pretrained`: None, `fp16` or `bf16`."""
    safetensors: bool
    """Whether they are safetensors; else torch files, read with `weights_only`."""


def weight_files(folder: Path, *stems: str) -> WeightFiles | None:
    """The weights in a folder, safetensors before torch files and full precision before half; None if there are none.

    Args:
        stems: file names without suffix; default: those of diffusers and transformers.

    Raises:
        UserError: an index is invalid, or a file that it names is missing.
    """
    for container, default_stems in STEMS.items():
        for variant in VARIANTS:
            for stem in stems or default_stems:
                if found := _find(folder, stem, container, variant):
                    return WeightFiles(found, variant, container == "safetensors")
    return None


def _find(folder: Path, stem: str, container: str, variant: str | None) -> tuple[Path, ...]:
    middle = f".{variant}" if variant else ""
    if (single := folder / f"{stem}{middle}.{container}").is_file():
        return (single,)
    index = folder / f"{stem}.{container}.index{middle}.json"
    if not index.is_file():
        return ()
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index} lists no weight files (weight_map)", "damaged-file")
    for shard in shard_of.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index} names {shard!r}, which is not a file of its folder", "damaged-file")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise UserError(
                f"{index} names {shard}, which is missing ({len(shards)} shards in all); download it again",
                "missing-file",
            )
    return tuple(folder / shard for shard in shards)


def torch_load_error(path: Path, error: Exception) -> UserError:
    """Why `torch.load(weights_only=True)` failed: `unsafe-pickle` or `damaged-file`.

    torch's own message recommends `weights_only=False`, which would run the code in the file.
    """
    words = " ".join(str(error).split())
    wanted = re.search(r"(?:GLOBAL|global|class|function) ([A-Za-z_][\w]*(?:\.\w+)+)", words)
    if "weights_only" in words or "Weights only" in words or "WeightsUnpickler" in words:
        reason = f"asks for {wanted[1]}" if wanted else "contains more than tensors"
        return UserError(
            f"{path} is refused: the pickle {reason}, and loading it would run the code in it; use a safetensors"
            " version, or have its author save only the state dict",
            "unsafe-pickle",
        )
    reason = re.sub(r"^\[[^]]*\][ .]*", "", words)[:120]
    return UserError(f"{path} is not a complete file of torch.save ({reason})", "damaged-file")
