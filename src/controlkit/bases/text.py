"""Encoded prompts, and tokenization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from controlkit.errors import UserError
from controlkit.files import valid_text

CLIP_TOKENS = 77
"""Maximum length of a prompt for CLIP, including its begin and end tokens."""


class Text:
    """Encoded prompts and the other conditioning of a base's denoiser: named tensors, batch first.

    Args:
        tokens: `[B, L, D]`, hidden states for cross attention.
        others: more tensors of batch `B`, by name. Stable Diffusion XL has `pooled` `[B, D2]`, one vector per prompt,
            and `time_ids` `[B, 6]`: original size, crop and target size. Stable Diffusion 3 has `pooled`,
            Z-Image, Qwen-Image and Sana `mask` `[B, L]`, which tokens are of the prompt.
    """

    def __init__(self, tokens: Tensor, **others: Tensor) -> None:
        self.named: dict[str, Tensor] = {"tokens": tokens, **others}

    @property
    def tokens(self) -> Tensor:
        """`[B, L, D]`, hidden states for cross attention."""
        return self.named["tokens"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, name: str) -> Tensor:
        return self.named[name]

    def __contains__(self, name: str) -> bool:
        return name in self.named

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """`change` applied to every tensor."""
        return Text(**{name: change(tensor) for name, tensor in self.named.items()})

    def expand(self, batch: int) -> Text:
        """A single prompt expanded to `batch`, without copying."""
        return self.map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return tuple(self.named.values())

    def extended(self, tokens: Tensor) -> Text:
        """With more tokens `[B, n, D]` after those of the prompt."""
        return Text(**{**self.named, "tokens": torch.cat([self.tokens, tokens.to(self.tokens)], 1)})


def concatenate(*texts: Text) -> Text:
    """Texts of one base, concatenated along the batch."""
    return Text(**{name: torch.cat([text[name] for text in texts]) for name in texts[0].named})


def cut_from(tokenizer: Any, prompt: str, limit: int | None = None) -> str:
    """The part of a prompt beyond `limit` tokens (default: the tokenizer's maximum); empty if there is none.

    Raises:
        UserError: the prompt contains half a character (a lone surrogate).
    """
    limit = tokenizer.model_max_length if limit is None else limit
    ids = tokenizer(valid_text(prompt, "the prompt"), verbose=False).input_ids
    truncated = ids[limit - 1 : -1]  # the last position is the end token's
    return tokenizer.decode(truncated).strip() if len(ids) > limit else ""


class TokenizedPrompts(list[str]):
    """Prompts with their token ids, which `Base.encode_text` uses in place of tokenizing them.

    Args:
        prompts: the prompts.
        tokenizers: of the base.
        ids: `[B, L]` of each tokenizer, as of `Base.tokenize`.
    """

    def __init__(self, prompts: Sequence[str], tokenizers: Sequence[Any], ids: Sequence[Tensor]) -> None:
        super().__init__(prompts)
        self._known = list(zip(tokenizers, ids, strict=True))

    def ids_of(self, tokenizer: Any, length: int | None = None) -> Tensor | None:
        """What `token_ids` returns for these prompts, if it is known."""
        wanted = tokenizer.model_max_length if length is None else length
        return next((ids for known, ids in self._known if known is tokenizer and ids.shape[1] == wanted), None)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """Prompts => token ids `[B, L]`, padded or truncated to `length` (default: the tokenizer's maximum).

    Raises:
        UserError: a prompt contains half a character (a lone surrogate).
    """
    if isinstance(prompts, TokenizedPrompts) and (known := prompts.ids_of(tokenizer, length)) is not None:
        return known
    return tokenizer(
        [valid_text(prompt, "the prompt") for prompt in prompts],
        padding="max_length",
        max_length=tokenizer.model_max_length if length is None else length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def clip_states(encoder: Any, ids: Tensor, clip_skip: int | None = None) -> tuple[Tensor, Tensor]:
    """What Stable Diffusion XL and 3 use of a CLIP text encoder: hidden states `[B, L, D]`, by default the penultimate,
    and its first output (the projection `[B, D2]` if it has one).

    Args:
        clip_skip: layer, counted from the last, which is 1.

    Raises:
        UserError: the encoder has no such layer.
    """
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-_layer(encoder, 2 if clip_skip is None else clip_skip)], output[0]


def normed_clip_states(encoder: Any, ids: Tensor, clip_skip: int | None = None) -> tuple[Tensor, Tensor]:
    """What Stable Diffusion 1 and 2 use of a CLIP text encoder: the last hidden states `[B, L, D]`, or those of an
    earlier layer, after the final norm; and its pooled vectors.

    Args:
        clip_skip: layer, counted from the last, which is 1.

    Raises:
        UserError: the encoder has no such layer.
    """
    if clip_skip is None or _layer(encoder, clip_skip) == 1:
        output = encoder(ids.to(encoder.device))
        return output[0], output[1]
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm(output.hidden_states[-clip_skip]), output[1]


def _layer(encoder: Any, clip_skip: int) -> int:
    layers = encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise UserError(
            f"clip_skip is {clip_skip}; this base's text encoder has {layers} layers, of which 1 is the last",
            "out-of-range",
        )
    return clip_skip
