"""CLIP's tokenizer for Stable Diffusion 1, 2, XL and 3, from the byte-pair merges that ship here."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

_BYTES, _SPECIAL, _VOCABULARY = 256, 2, 49408


def clip_tokenizer(pad_token: str = "<|endoftext|>", **settings: Any) -> CLIPTokenizer:
    """The tokenizer of CLIP ViT-L/14 and OpenCLIP: 49,408 tokens, 77 per prompt.

    Ids are those of openai/CLIP (clip/simple_tokenizer.py): the 256 bytes, the same at the end of a word, one token per
    merge, then the two special tokens.

    Args:
        pad_token: `!` for OpenCLIP's text encoders of Stable Diffusion 2 and XL.
    """
    path = Path(str(files("controlkit") / "assets" / "clip" / "bpe_merges.txt.gz"))
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    count = _VOCABULARY - 2 * _BYTES - _SPECIAL
    merges = [tuple(line.split()) for line in lines[1 : 1 + count]]  # the first line is a version
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=77,
        pad_token=pad_token,
        **settings,
    )


def _byte_letters() -> list[str]:
    """The character that represents each byte in the vocabulary, printable bytes first (as in GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unprintable = [byte for byte in range(_BYTES) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(_BYTES + place) for place in range(len(unprintable))]
