"""Bases that read prompts by a language model: what FLUX.2, Z-Image, Qwen-Image and Sana share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from controlkit.bases.component import Component, Configurations
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.text import Text, TokenizedPrompts
from controlkit.bases.transformer import TransformerBase
from controlkit.errors import UserError
from controlkit.files import valid_text

PROMPT_TOKENS = 512
"""Tokens of a prompt that the network reads, in diffusers' pipelines (`max_sequence_length`)."""


class LanguageModelBase(TransformerBase):
    """A base whose text encoder is a causal language model."""

    left_out: ClassVar[int] = 0
    """First tokens of the chat, whose states the network does not read."""
    tokens_read: ClassVar[int] = PROMPT_TOKENS
    """Maximum length of a prompt."""
    tokenizer_title: ClassVar[str]
    """Its tokenizer in text."""
    padding_side: ClassVar[str] = "right"

    @abstractmethod
    def chat(self, prompt: str) -> str:
        """A prompt in the chat template."""

    @abstractmethod
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask `[B, L]` => the states of the language model that the network reads, `[B, L, D]`."""

    @property
    @abstractmethod
    def text_width(self) -> int:
        """Channels of those states."""

    @property
    def text_settings(self) -> tuple[Any, ...]:
        return (type(self).__name__, self.text_width, self.chat(""))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        length = self.left_out + self.tokens_read
        known = prompts.ids_of(self.tokenizer, length) if isinstance(prompts, TokenizedPrompts) else None
        if known is not None:
            return (known,)
        made = self.tokenizer(
            [self.chat(valid_text(prompt, "the prompt")) for prompt in prompts],
            padding="max_length",
            padding_side=self.padding_side,
            max_length=length,
            truncation=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return (made.input_ids,)

    def is_of_prompt(self, ids: Tensor) -> Tensor:
        """Which tokens `bool [B, L]` are not padding, which begins or ends every row."""
        own = ids != self.tokenizer.pad_token_id
        if self.padding_side == "left":
            return own.cummax(1).values
        return own.flip(1).cummax(1).values.flip(1)

    def zero_text(self) -> Text:
        return Text(torch.zeros(1, self.tokens_read, self.text_width))

    @property
    def prompt_tokens(self) -> int:
        return self.tokens_read

    def cut_from(self, prompt: str) -> str:
        before = self.chat("\0").partition("\0")[0]
        room = self.left_out + self.tokens_read - len(self.tokenizer(before, add_special_tokens=False).input_ids)
        ids = self.tokenizer(valid_text(prompt, "the prompt"), add_special_tokens=False, verbose=False).input_ids
        return self.tokenizer.decode(ids[room:]).strip()

    @classmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> Any:
        """None ships.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"controlkit does not ship {cls.tokenizer_title}; pass the base as a diffusers folder", "missing-file"
        )


class MaskedPromptBase(LanguageModelBase):
    """One whose network reads no padding of prompts, or its own.

    All prompts have one length and a mask, `Text["mask"]` `bool [B, tokens_read]`: which tokens are of the prompt.
    `fitted` leaves out what no prompt of a run needs.
    """

    def padded_length(self, mask: Tensor) -> Tensor:
        """Number of tokens of prompts `bool [B, L]` with the padding that the network reads, `[B]`."""
        return mask.sum(1)

    @torch.no_grad()
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """Prompts => states `[B, tokens_read, D]`, zero after the prompt, and `mask`.

        Weighted prompts, textual inversions and other layers are not supported, because the encoder is a language model
        that reads the prompt in a chat template.

        Raises:
            UserError: `options` asks for them.
        """
        self.check_plain(options)
        (ids,) = self.tokenize(prompts)
        mask = self.is_of_prompt(ids)
        longest = int(mask.sum(1).max())
        device = self.text_encoder.device
        states = self.states(ids[:, :longest].to(device), mask[:, :longest].to(device))
        states = (states * mask[:, :longest, None].to(states))[:, self.left_out :]
        tokens = pad(states, (0, 0, 0, self.tokens_read - states.shape[1]))
        return Text(tokens.to(self.device, self.dtype), mask=mask[:, self.left_out :].to(self.device))

    def fitted(self, *texts: Text) -> list[Text]:
        """As `Base.fitted`: without the padding that no prompt needs, and `even` (`[B, 0]`) if all then have the same
        length, so that attention needs no mask."""
        if any(text["mask"].is_meta for text in texts):
            return list(texts)
        lengths = torch.cat([self.padded_length(text["mask"]) for text in texts]).tolist()
        longest = max(lengths)
        made = []
        for text in texts:
            even = {"even": text.tokens.new_zeros(len(text), 0)} if min(lengths) == longest else {}
            made.append(Text(text.tokens[:, :longest], mask=text["mask"][:, :longest], **even))
        return made

    def zero_text(self) -> Text:
        mask = torch.ones(1, self.tokens_read, dtype=torch.bool)
        return Text(super().zero_text().tokens, mask=mask)


def arranged(tokens: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with further ones (`Text.extended`) moved from the end of all rows to that of each row's prompt, so that
    their positions depend on no other prompt.

    Args:
        tokens: `[B, L + n, D]`, the last n of which are further ones.
        mask: which of the first L are of the prompt, `bool [B, L]`.
        lengths: number of tokens of each prompt that are read, `[B]`.

    Returns:
        The tokens; which of them are of the prompt or further ones, `bool [B, L + n]`; and which are read.
    """
    more = tokens.shape[1] - mask.shape[1]
    places = torch.arange(tokens.shape[1], device=tokens.device)
    after = places - lengths[:, None]
    if not more:
        return tokens, mask, after < 0
    source = torch.where(after < 0, places, torch.where(after < more, mask.shape[1] + after, places - more))
    moved = tokens.gather(1, source[..., None].expand(-1, -1, tokens.shape[2]))
    return moved, pad(mask, (0, more), value=True).gather(1, source), after < more
