"""What to tell of prompts before training: how many are empty, and how many are longer than a base reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controlkit.errors import UserError

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class PromptLimit:
    """How much of a prompt is read."""

    reader: str
    """What reads it: `nano`, `this base`."""
    tokens: int
    """The most tokens, with those that mark begin and end."""
    cut_from: Callable[[str], str]
    """The end of a prompt that is not read; empty if all of it is."""

    def cuts(self, prompt: str) -> bool:
        """Whether the end of the prompt is not read."""
        if prompt.isascii() and len(prompt) <= self.tokens - 2:
            return False  # tokens are pairs of bytes: never more than there are letters
        try:
            return bool(self.cut_from(prompt))
        except UserError:  # half a character, which whoever lists the pairs has said
            return False


def count_note(prompts: Sequence[tuple[str, str]], limit: PromptLimit) -> list[str]:
    """A note on prompts that are too long.

    Args:
        prompts: where each is listed, and its text.
    """
    known = {text: limit.cuts(text) for text in {text for _, text in prompts}}
    long = [where for where, text in prompts if known[text]]
    if not long:
        return []
    more = ", ..." if len(long) > _SHOWN else ""
    places = f" ({', '.join(long[:_SHOWN])}{more})" if any(long) else ""
    return [
        f"{len(long)} of {len(prompts)} prompts are longer than the {limit.tokens} tokens that {limit.reader} reads;"
        f" the rest is cut{places}"
    ]


def empty_note(empty: int, total: int) -> list[str]:
    """A note on prompts that are empty."""
    return [f"{empty} of {total} prompts are empty"] if empty else []


def is_empty(prompt: str) -> bool:
    """Whether a prompt says nothing."""
    return not prompt.strip()
