"""Prompts that users edited in the manifest, kept as long as the image and its caption are the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from controlkit.data.input_images import STATE
from controlkit.data.jobs import Outcome
from controlkit.data.readers.columns import captions_of
from controlkit.data.readers.recognise import MANIFEST
from controlkit.errors import UserError, reason_of
from controlkit.files import decode_text, read_json, write_json

Prompt = str | list[str]


class Edits:
    """Edited prompts by what they belong to: the image, its name and its caption (`Outcome.subject`).

    Those of images that are missing, or not what they were, are set aside in a file, for when they are back.

    Args:
        out: the folder of the pairs.
        earlier: outcomes of earlier runs.

    Raises:
        UserError: a line of the manifest cannot be parsed; it is left as it is.
    """

    def __init__(self, out: Path, earlier: Sequence[Outcome]) -> None:
        self._file = out / STATE / "edits.json"
        self.listed = _prompts_in(out / MANIFEST)
        """Key -> prompt in the manifest."""
        self._aside: dict[str, Prompt] = read_json(self._file) if self._file.is_file() else {}
        self._edited: dict[str, Prompt] = {}
        self._perhaps: dict[str, Prompt] = {}
        """Of records of earlier versions, which do not say what was edited."""
        self._keys: dict[str, str] = {}
        for outcome in earlier:
            if outcome.entry is None or outcome.key not in self.listed or (subject := _subject(outcome)) is None:
                continue
            prompt = self.listed[outcome.key]
            if outcome.edited or prompt != (outcome.entry["prompt"] or ""):
                self._edited[subject], self._keys[subject] = prompt, outcome.key
            elif outcome.subject is None:
                self._perhaps[subject] = prompt

    def applied(self, outcome: Outcome) -> Outcome:
        """The outcome with its edited prompt, if there is one."""
        if outcome.entry is None or (subject := _subject(outcome)) is None:
            return outcome
        known = {**self._aside, **self._perhaps, **self._edited}
        if known.get(subject, outcome.entry["prompt"] or "") == (outcome.entry["prompt"] or ""):
            return outcome
        return replace(outcome, entry={**outcome.entry, "prompt": known[subject]}, edited=True)

    def set_aside(self, outcomes: Iterable[Outcome]) -> list[str]:
        """Keep what none of these outcomes has; returns the keys under which the manifest listed it.

        Raises:
            UserError: the folder is not writable.
        """
        present = {_subject(outcome) for outcome in outcomes if outcome.entry is not None}
        kept = {name: prompt for name, prompt in {**self._aside, **self._edited}.items() if name not in present}
        if kept != self._aside:
            write_json(self._file, kept)
        return [key for subject, key in self._keys.items() if subject not in present]


def _subject(outcome: Outcome) -> str | None:
    return outcome.subject or outcome.content


def _prompts_in(manifest: Path) -> dict[str, Prompt]:
    if not manifest.is_file():
        return {}
    prompts: dict[str, Prompt] = {}
    try:
        lines = decode_text(manifest.read_bytes()).split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest} is not UTF-8 ({error}); save it as UTF-8", "damaged-file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions = captions_of(entry["prompt"])
            prompts[str(entry["key"])] = captions[0] if len(captions) == 1 else list(captions)
        except (json.JSONDecodeError, KeyError, TypeError, UserError) as error:
            raise UserError(
                f"line {number} of {manifest} is not a valid entry ({reason_of(error)}); correct it, or remove it"
                " to make the pair again",
                "damaged-file",
            ) from error
    return prompts
