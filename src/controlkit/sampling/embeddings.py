"""Read textual inversions: learned embeddings of a word (Gal et al. 2022, arXiv 2208.01618)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.prompt_encoding import Embedding
from controlkit.bases.weight_files import torch_load_error
from controlkit.errors import UserError
from controlkit.formats.tensors import read_tensor_file
from controlkit.sampling.request import GenerateRequest

_OF_ENCODER = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Tensors of a file for Stable Diffusion XL (kohya, ComfyUI) -> component."""


def embedding_file(entry: str) -> tuple[str, Path]:
    """Word and file of `[WORD=]FILE`; the name of a file that exists may contain an equals sign."""
    word, equals, file = entry.partition("=")
    if not equals or os.path.exists(entry):
        return Path(entry).stem, Path(entry)
    return word, Path(file)


def read_embeddings(entries: Sequence[str], base: Base) -> list[Embedding]:
    """Read textual inversions for a base.

    Args:
        entries: each `[WORD=]FILE`. Files of A1111 (`string_to_param`), diffusers (one tensor) and, for two encoders,
            kohya (`clip_l`, `clip_g`); torch files are read with `weights_only`.

    Raises:
        UserError: a file is missing, damaged, no textual inversion, or of another base; two have one word; or the base
            takes none.
    """
    if entries and not base.learns_words:
        raise UserError(
            f"textual inversions are not supported for {base.name}, whose network is a"
            f" {type(base.denoiser).__name__}; leave them out",
            "unsupported",
        )
    widths = {
        name: getattr(base, name).get_input_embeddings().weight.shape[1]
        for name in base.named_networks()
        if name.startswith("text_encoder")
    }
    embeddings: dict[str, Embedding] = {}
    for entry in entries:
        word, file = embedding_file(entry)
        if not word.strip():
            raise UserError(f"--embedding {entry}: the word is empty; expected [WORD=]FILE", "usage")
        if word.lower() in embeddings:
            raise UserError(f"two embeddings are called {word!r}; name one of them: WORD=FILE", "contradiction")
        embeddings[word.lower()] = Embedding(word, _fitted(_read(file), widths, file, base))
    return list(embeddings.values())


_UNUSED = "is not used: its word is in neither prompt"


def is_unused(note: str) -> bool:
    """Whether a note says that an embedding is not used."""
    return note.endswith(_UNUSED)


def embedding_notes(embeddings: Sequence[Embedding], request: GenerateRequest) -> list[str]:
    """Notes on embeddings whose word is in no prompt."""
    prompts = f"{request.prompt}\n{request.negative_prompt}"
    return [
        f"the embedding {each.name} {_UNUSED}"
        for each in embeddings
        if not re.search(rf"(?<!\w){re.escape(each.name)}(?!\w)", prompts, re.IGNORECASE)
    ]


def _read(file: Path) -> dict[str, Tensor]:
    """The vectors of a file by name, each `[n, D]`."""
    if not file.is_file():
        raise UserError(f"there is no embedding at {file}", "missing-file")
    content: Any
    if file.suffix == ".safetensors":
        content = read_tensor_file(file).tensors
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises pickle's errors, of a module that is not imported here
            raise torch_load_error(file, error) from error
    if isinstance(content, Tensor):
        content = {"": content}
    if isinstance(content, Mapping):
        content = content.get("string_to_param", content)
    vectors = {
        str(name): (value[None] if value.ndim == 1 else value).detach().float()
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (1, 2)
    }
    if not vectors or (len(vectors) > 1 and not set(vectors) <= set(_OF_ENCODER)):
        raise UserError(
            f"{file} is no textual inversion: expected one tensor of learned vectors, or clip_l and clip_g",
            "wrong-kind",
        )
    return vectors


def _fitted(vectors: Mapping[str, Tensor], widths: Mapping[str, int], file: Path, base: Base) -> dict[str, Tensor]:
    """Component -> vectors.

    Raises:
        UserError: an encoder of the base gets none, or vectors of another width.
    """
    by_encoder = {_OF_ENCODER.get(name, "text_encoder"): value for name, value in vectors.items()}
    given = ", ".join(str(value.shape[1]) for value in vectors.values())
    if {name: value.shape[1] for name, value in by_encoder.items()} != dict(widths):
        raise UserError(
            f"{file} has vectors of width {given}; the text encoders of {base.name} take"
            f" {', '.join(map(str, widths.values()))}: it was trained for another base",
            "incompatible",
        )
    if len(counts := {len(value) for value in by_encoder.values()}) > 1:
        raise UserError(f"{file} has different numbers of vectors for its encoders: {sorted(counts)}", "damaged-file")
    return by_encoder
