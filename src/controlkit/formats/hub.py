"""Sharing a control on the Hugging Face hub."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from controlkit.controls.registry import registry
from controlkit.data.sources import SUFFIXES
from controlkit.errors import UserError
from controlkit.formats.card import write_card
from controlkit.formats.companions import companions_beside, fingerprint_in
from controlkit.formats.metadata import read_metadata

_IMAGE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


def push(file: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a control, its card as README.md, and the images that the card shows; returns the address.

    An adapter's base control goes with it if it lies beside it, by its fingerprint: the adapter is nothing without.

    Raises:
        UserError: the file is not a control of ours, or the hub refuses.
    """
    from huggingface_hub import HfApi

    path = Path(file)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"{path} {what}; give the .safetensors file of a control (a folder: convert it first)")
    card = path.with_suffix(".md")
    if not card.is_file():
        card = write_card(path)
    wanted = {path.name: path, "README.md": card}
    if (companion := _companion_of(path)) is not None:
        wanted[companion.name] = companion
    for shown in _IMAGE.findall(card.read_text(encoding="utf-8")):
        image = (path.parent / shown).resolve()
        # A card may come from anyone, and must not be what picks files of this machine for the hub.
        if image.is_relative_to(path.parent.resolve()) and image.suffix in SUFFIXES and image.is_file():
            wanted[image.relative_to(path.parent.resolve()).as_posix()] = image
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        for name, source in wanted.items():
            api.upload_file(path_or_fileobj=str(source), path_in_repo=name, repo_id=repository)
    except Exception as error:  # what the hub refuses, and whatever its library for HTTP raises without a connection
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the hub did not take {path.name} for {repository}: {reason}; are you logged in, and"
            " is there a connection?"
        ) from error
    return str(address)


def _companion_of(path: Path) -> Path | None:
    """The file beside a control of ours that it is nothing without; one of the name that it gives comes first."""
    said = read_metadata(path)
    kind = registry().get(said.get("control.kind", ""))
    if kind is None or kind.companion is None or not (wanted := said.get(f"{kind.companion_key}_fingerprint")):
        return None
    name = said.get(kind.companion_key, "")
    for candidate in sorted(companions_beside(path, kind.companion), key=lambda one: one.stem != name):
        with suppress(UserError):
            if fingerprint_in(candidate) == wanted:
                return candidate
    return None
