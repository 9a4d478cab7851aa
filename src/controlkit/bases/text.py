"""Encoded prompts, and the tokenizers' side of encoding them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from controlkit.files import valid_text

CLIP_TOKENS = 77
"""Tokens of a prompt that CLIP reads, with those that mark its begin and end."""


class Text:
    """Encoded prompts, and whatever else the networks of a base are told besides x_t and t: named tensors, batch first.

    Args:
        tokens: `[B, L, D]`, the hidden states that the base attends to.
        others: more tensors of batch `B`, by name. Stable Diffusion XL has `pooled` `[B, D2]`, one vector for each
            prompt, and `time_ids` `[B, 6]`: original size, crop and target size of the image. Stable Diffusion 3 has
            `pooled`.
    """

    def __init__(self, tokens: Tensor, **others: Tensor) -> None:
        self.named: dict[str, Tensor] = {"tokens": tokens, **others}

    @property
    def tokens(self) -> Tensor:
        """`[B, L, D]`, the hidden states that the base attends to."""
        return self.named["tokens"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, name: str) -> Tensor:
        return self.named[name]

    def __contains__(self, name: str) -> bool:
        return name in self.named

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The same change to every tensor."""
        return Text(**{name: change(tensor) for name, tensor in self.named.items()})

    def expand(self, batch: int) -> Text:
        """One prompt repeated `batch` times, without copying."""
        return self.map(lambda part: part.expand(batch, *part.shape[1:]))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(self.named.values())

    def extended(self, tokens: Tensor) -> Text:
        """The same with more tokens `[B, n, D]` after those of the prompt."""
        return Text(**{**self.named, "tokens": torch.cat([self.tokens, tokens.to(self.tokens)], 1)})


def concatenate(*texts: Text) -> Text:
    """Texts of one base, one after another along the batch."""
    return Text(**{name: torch.cat([text[name] for text in texts]) for name in texts[0].named})


def cut_from(tokenizer: Any, prompt: str, most: int | None = None) -> str:
    """The end of a prompt beyond `most` tokens (default: the tokenizer's own length); empty if there is none.

    Raises:
        UserError: the prompt holds half a character, as cut text does.
    """
    most = tokenizer.model_max_length if most is None else most
    ids = tokenizer(valid_text(prompt, "the prompt"), verbose=False).input_ids
    beyond = ids[most - 1 : -1]  # the last that is kept marks the end
    return tokenizer.decode(beyond).strip() if len(ids) > most else ""


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """Prompts => token ids `[B, L]`, padded or cut to `length` (default: the tokenizer's own).

    Raises:
        UserError: a prompt holds half a character, as cut text does.
    """
    return tokenizer(
        [valid_text(prompt, "the prompt") for prompt in prompts],
        padding="max_length",
        max_length=tokenizer.model_max_length if length is None else length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def clip_states(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What Stable Diffusion XL and 3 read of a CLIP text encoder: its last hidden states but one `[B, L, D]`, and its
    first output (the projection `[B, D2]` of a model that has one)."""
    made = encoder(ids.to(encoder.device), output_hidden_states=True)
    return made.hidden_states[-2], made[0]
