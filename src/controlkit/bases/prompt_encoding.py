"""Encode prompts by a CLIP text encoder: weights, chunks beyond the tokenizer's length, learned embeddings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from controlkit.bases.prompt_syntax import Span, check_syntax, parse_weighted
from controlkit.bases.text import Text, token_ids
from controlkit.errors import UserError
from controlkit.files import valid_text

_BACKTRACK = 20 / 75
"""A chunk that is full ends at its last comma, if that lies within this fraction of its end (A1111: 20 of 75)."""

_LARGEST_RATIO = 2.0
"""Of means, up to which they are restored. Encoders whose states have a mean of almost zero, such as nano's, may exceed
it; scaling by the quotient of two such numbers would be arbitrary."""


@dataclass(frozen=True)
class Embedding:
    """A textual inversion (Gal et al. 2022, arXiv 2208.01618): vectors in place of a word's token embeddings."""

    name: str
    """The word that stands for it in prompts, in any case."""
    vectors: Mapping[str, Tensor]
    """Component (`text_encoder`, `text_encoder_2`) -> `[n, D]`, with one n for all."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How prompts are encoded."""

    syntax: str = "plain"
    """One of `prompt_syntax.SYNTAXES`."""
    clip_skip: int | None = None
    """Layer of the CLIP encoders whose states are used, counted from the last, which is 1. Default: the base's own."""
    embeddings: Sequence[Embedding] = ()
    """Learned words."""
    negative: bool = False
    """Whether the prompt is a negative one, before which Sana's text encoder reads no instruction."""

    def __post_init__(self) -> None:
        check_syntax(self.syntax)

    @property
    def by_chunks(self) -> bool:
        """Whether prompts are tokenized here: else they are the tokenizer's, padded or truncated to its length."""
        return self.syntax != "plain" or bool(self.embeddings)


PLAIN = TextOptions()
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Token ids `[B, L]` => hidden states `[B, L, D]` and pooled vectors `[B, D2]`."""


def encode_prompts(
    tokenizer: Any, encoder: Any, component: str, prompts: Sequence[str], options: TextOptions, encode: Encode
) -> tuple[Tensor, Tensor]:
    """Encode prompts by one text encoder.

    A weight multiplies the hidden states of its tokens; then those of the chunk are scaled to their former mean, as in
    A1111 (unless that is almost zero). Chunks are encoded one by one and concatenated. The pooled vector is that of the
    first chunk, without weights. Prompts of fewer chunks are repeated to the least common multiple, which leaves cross
    attention as it was.

    Args:
        component: name of the encoder in `Embedding.vectors`.
        encode: runs the encoder.

    Returns:
        Hidden states `[B, chunks * L, D]`, and pooled vectors `[B, D2]`.

    Raises:
        UserError: a prompt contains half a character, or syntax that is not supported.
    """
    if not options.by_chunks:
        return encode(token_ids(tokenizer, prompts))
    words = _Words(tokenizer, component, options.embeddings)
    chunked = [_chunks(words, prompt, options.syntax) for prompt in prompts]
    chunks = [chunk for of_prompt in chunked for chunk in of_prompt]
    ids = torch.stack([_ids(tokenizer, chunk) for chunk in chunks])
    with _embedded(encoder, ids, words.vectors) as ordinary:
        states, pooled = encode(ordinary)
    states = _weighted(states, chunks)
    counts = [len(of_prompt) for of_prompt in chunked]
    firsts = [sum(counts[:place]) for place in range(len(counts))]
    joined = [part.flatten(0, 1)[None] for part in states.split(counts)]
    return torch.cat(_one_length(joined)), pooled[firsts]


def cut_from_plain(tokenizer: Any, prompt: str, embeddings: Sequence[Embedding]) -> str:
    """The part of a plain prompt with learned words that encoders do not read; empty if there is none.

    Raises:
        UserError: the prompt contains half a character (a lone surrogate).
    """
    # All encoders have as many vectors for a word.
    words = _Words(tokenizer, next(iter(embeddings[0].vectors)), embeddings)
    units = list(words.units(prompt))
    ends = accumulate(map(len, units))
    unread = [unit for unit, end in zip(units, ends, strict=True) if end > words.length]
    parts: list[str] = []
    for learned, group in groupby(unread, lambda unit: unit[0] in words.vectors):
        if learned:
            parts += map(words.name_of, group)
        else:
            parts.append(tokenizer.decode([token for unit in group for token in unit]))
    return " ".join(filter(None, map(str.strip, parts)))


def same_length(texts: Sequence[Text]) -> list[Text]:
    """Texts with hidden states of one length: repeated to the least common multiple, which leaves cross attention as it
    was."""
    tokens = _one_length([text.tokens for text in texts])
    return [Text(**{**text.named, "tokens": repeated}) for text, repeated in zip(texts, tokens, strict=True)]


def _one_length(states: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states `[B, L, D]` => the same with the least common multiple of all L, by repetition."""
    longest = math.lcm(*(each.shape[1] for each in states))
    return [each.repeat(1, longest // each.shape[1], 1) for each in states]


@dataclass
class _Chunk:
    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


class _Words:
    """A tokenizer that knows learned words: their ids lie beyond its vocabulary."""

    def __init__(self, tokenizer: Any, component: str, embeddings: Sequence[Embedding]) -> None:
        self._tokenizer = tokenizer
        self.length = tokenizer.model_max_length - 2
        self.comma = next(iter(self._plain(",")), None)
        self.vectors: dict[int, Tensor] = {}
        self._ids: dict[str, list[int]] = {}
        for embedding in embeddings:
            ids = [len(tokenizer) + len(self.vectors) + place for place in range(len(embedding.vectors[component]))]
            self.vectors |= dict(zip(ids, embedding.vectors[component], strict=True))
            self._ids[embedding.name.lower()] = ids
        names = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._names = re.compile(rf"(?<!\w)({'|'.join(names)})(?!\w)", re.IGNORECASE) if names else None

    def units(self, text: str) -> Iterator[list[int]]:
        """Token ids that must not be separated: one, or all of a learned word."""
        pieces = [text] if self._names is None else self._names.split(text)
        for place, piece in enumerate(pieces):
            if place % 2:
                yield self._ids[piece.lower()]
            else:
                yield from ([token] for token in self._plain(piece))

    def name_of(self, unit: list[int]) -> str:
        """The word with these ids."""
        return next(name for name, ids in self._ids.items() if ids == unit)

    def _plain(self, text: str) -> list[int]:
        text = valid_text(text, "the prompt")
        return self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text.strip() else []


def _chunks(words: _Words, prompt: str, syntax: str) -> list[_Chunk]:
    """Chunks of a prompt, each of at most `words.length` tokens; one, truncated, if its syntax is plain."""
    if syntax == "plain":
        tokens = [token for unit in words.units(prompt) for token in unit][: words.length]
        return [_Chunk(tokens, [1.0] * len(tokens))]
    chunks: list[_Chunk] = []
    parts = parse_weighted(prompt)
    for number, part in enumerate(parts):
        filled = list(_filled(words, part))
        # A trailing BREAK adds no empty chunk, as in A1111.
        if filled or number + 1 < len(parts) or not chunks:
            chunks += filled or [_Chunk()]
    return chunks


def _filled(words: _Words, spans: Sequence[Span]) -> Iterator[_Chunk]:
    """Chunks of the words between two breaks."""
    chunk, after_comma = _Chunk(), 0
    for span in spans:
        for unit in words.units(span.text):
            if len(unit) > words.length:
                raise UserError(
                    f"a learned word has {len(unit)} vectors; this base takes at most {words.length}", "incompatible"
                )
            while len(chunk.tokens) + len(unit) > words.length:
                full = len(chunk.tokens)
                cut = full
                if after_comma and full - after_comma < round(_BACKTRACK * words.length) and unit != [words.comma]:
                    cut = after_comma
                yield _Chunk(chunk.tokens[:cut], chunk.weights[:cut])
                chunk, after_comma = _Chunk(chunk.tokens[cut:], chunk.weights[cut:]), 0
            chunk.tokens += unit
            chunk.weights += [span.weight] * len(unit)
            if unit == [words.comma]:
                after_comma = len(chunk.tokens)
    if chunk.tokens:
        yield chunk


def _ids(tokenizer: Any, chunk: _Chunk) -> Tensor:
    """Token ids `[L]` of a chunk, with begin and end tokens and padding as the tokenizer's own."""
    ids = [tokenizer.bos_token_id, *chunk.tokens, tokenizer.eos_token_id]
    return torch.tensor(ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids)))


@contextmanager
def _embedded(encoder: Any, ids: Tensor, vectors: Mapping[int, Tensor]) -> Iterator[Tensor]:
    """A context in which the encoder reads `vectors` in place of the ids beyond its vocabulary; yields the ids to pass.

    Those are replaced by the begin token's, as CLIP finds the end of a prompt by its largest id.
    """
    learned = [
        ((row, column), vectors[token])
        for row, tokens in enumerate(ids.tolist())
        for column, token in enumerate(tokens)
        if token in vectors
    ]
    ordinary = ids.clone()
    for place, _ in learned:
        ordinary[place] = ids[place[0], 0]

    def replace(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for place, vector in learned:
            output[place] = vector.to(output)
        return output

    handle = encoder.get_input_embeddings().register_forward_hook(replace) if learned else None
    try:
        yield ordinary
    finally:
        if handle is not None:
            handle.remove()


def _weighted(states: Tensor, chunks: Sequence[_Chunk]) -> Tensor:
    """Hidden states `[B, L, D]` times the weights of their tokens, each chunk scaled to its former mean."""
    weights = torch.ones(states.shape[:2])
    for row, chunk in enumerate(chunks):
        weights[row, 1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights)
    if bool((weights == 1).all()):
        return states
    before = states.float()
    after = before * weights.to(before)[..., None]
    ratio = before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True)
    ratio = torch.where((ratio > 1 / _LARGEST_RATIO) & (ratio < _LARGEST_RATIO), ratio, 1.0)
    return (after * ratio).to(states)
