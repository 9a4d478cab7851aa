"""Which files of a diffusers folder hold the weights of a network: one or several, of a precision, in a container."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from controlkit.errors import UserError
from controlkit.files import read_json

VARIANTS = (None, "fp16", "bf16")
"""In the order in which they are preferred: all digits first."""
STEMS = {"safetensors": ("diffusion_pytorch_model", "model"), "bin": ("diffusion_pytorch_model", "pytorch_model")}
"""Container -> what diffusers and transformers call files of it."""


@dataclass(frozen=True)
class WeightFiles:
    """The files of one network."""

    files: tuple[Path, ...]
    """One, or the shards that an index lists."""
    variant: str | None
    """As `from_pretrained` takes it: None, `fp16` or `bf16`."""
    safetensors: bool
    """Whether they are safetensors; else files of torch, which are read as data."""


def weight_files(folder: Path, *stems: str) -> WeightFiles | None:
    """The weights in a folder: safetensors before files of torch, and those of all digits before halves; None if there
    are none.

    Args:
        stems: names of the files without their endings; by default those of diffusers and of transformers.

    Raises:
        UserError: an index names a file that is missing, or none of the folder.
    """
    for container, usual in STEMS.items():
        for variant in VARIANTS:
            for stem in stems or usual:
                if found := _of(folder, stem, container, variant):
                    return WeightFiles(found, variant, container == "safetensors")
    return None


def _of(folder: Path, stem: str, container: str, variant: str | None) -> tuple[Path, ...]:
    middle = f".{variant}" if variant else ""
    if (single := folder / f"{stem}{middle}.{container}").is_file():
        return (single,)
    index = folder / f"{stem}.{container}.index{middle}.json"
    if not index.is_file():
        return ()
    told = read_json(index)
    listed = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{index} lists no files of weights (weight_map)")
    parts = sorted(set(listed.values()))
    for part in parts:
        if not isinstance(part, str) or Path(part).name != part:
            raise UserError(f"{index} names {part!r}, which is not a file of the folder")
        if not (folder / part).is_file():
            raise UserError(f"{index} names {part}, which is missing; {len(parts)} files belong to it")
    return tuple(folder / part for part in parts)


def unsafe_pickle_error(path: Path, error: Exception) -> str:
    """Why `torch.load(weights_only=True)` did not read a file, as one sentence.

    torch's own message recommends to read the file as a program, which is never done here.
    """
    words = " ".join(str(error).split())
    wanted = re.search(r"(?:GLOBAL|global|class|function) ([A-Za-z_][\w]*(?:\.\w+)+)", words)
    if "weights_only" in words or "Weights only" in words or "WeightsUnpickler" in words:
        what = f"it asks for {wanted[1]}" if wanted else "it holds more than tensors"
        return (
            f"{path} is refused: {what}, and a pickle is read for its tensors alone, because more would run the"
            " program in it; look for a safetensors version, or have its maker save only the state dict"
        )
    reason = re.sub(r"^\[[^]]*\][ .]*", "", words)[:120]
    return f"{path} is not a whole file of torch.save ({reason})"
