"""Notes on prompts before training: how many are empty, and how many exceed the token limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controlkit.errors import UserError

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class PromptLimit:
    """Token limit of a text encoder."""

    reader: str
    """Its name in notes: `nano`, `this base`."""
    tokens: int
    """Maximum number of tokens, including begin and end markers."""
    cut_from: Callable[[str], str]
    """Prompt -> its truncated end; empty if it fits."""

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt is truncated."""
        if prompt.isascii() and len(prompt) <= self.tokens - 2:
            return False  # byte-pair tokens are never more than the letters
        try:
            return bool(self.cut_from(prompt))
        except UserError:  # invalid text, which readers of pairs report
            return False


def count_note(prompts: Sequence[tuple[str, str]], limit: PromptLimit) -> list[str]:
    """A note on prompts that are too long.

    Args:
        prompts: (where it is listed, text).
    """
    truncated = {text: limit.cuts(text) for text in {text for _, text in prompts}}
    long = [where for where, text in prompts if truncated[text]]
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
    """Whether a prompt is empty or only white space."""
    return not prompt.strip()
