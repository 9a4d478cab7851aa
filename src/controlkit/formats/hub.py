"""Share a control on the Hugging Face hub."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from controlkit.controls.registry import registry
from controlkit.data.sources import SUFFIXES
from controlkit.errors import UserError
from controlkit.formats.card import card_of, write_card
from controlkit.formats.card_links import images_in, links_in
from controlkit.formats.companions import companions_beside, fingerprint_in
from controlkit.formats.load import find_control, shipped_controls
from controlkit.formats.metadata import read_metadata


def push(file: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a control, its card as README.md, and the images in the card; returns the URL.

    An adapter's base control is uploaded too if it is in the same folder, by its fingerprint. `left_out` names
    files that the card links to and that are not uploaded.

    Raises:
        UserError: the file is not a controlkit control, the name is none of a repository, or the upload fails.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    path = _file_of(file)
    uploads = uploads_of(path)
    checked_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"cannot upload {path.name}: HF_HUB_OFFLINE is set; unset it, or see what would be uploaded with --dry-run",
            "upload-failed",
        )
    card = uploads["README.md"]
    if not card.is_file():
        write_card(path)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        for name, source in uploads.items():
            api.upload_file(path_or_fileobj=str(source), path_in_repo=name, repo_id=repository)
    except Exception as error:  # refusals of the hub, and HTTP errors of its library
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, HfHubHTTPError | ValueError):
            what, advice = f"the hub refused {path.name} for {repository}", "check the name and your login"
        else:
            what, advice = f"cannot reach the hub to upload {path.name} to {repository}", "check the connection"
        raise UserError(f"{what}: {reason}; {advice}", "upload-failed") from error
    return str(address)


def checked_repository(name: str) -> str:
    """The name of a repository on the hub.

    Raises:
        UserError: the hub does not allow it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is not the name of a repository; expected NAME/REPOSITORY of letters, digits, -, _ and .",
            "usage",
        ) from error
    return name


def uploads_of(file: str | Path) -> dict[str, Path]:
    """What `push` uploads: name in the repository -> file. The card need not exist yet.

    Args:
        file: a path, or the name of a control that was trained in this folder.

    Raises:
        UserError: there is no such file, it is not a controlkit control, or its card is not UTF-8.
    """
    path = _file_of(file)
    text = _card_text(path)
    uploads = {path.name: path, "README.md": path.with_suffix(".md")}
    if (companion := _companion_of(path)) is not None:
        uploads[companion.name] = companion
    for link in images_in(text):
        image = (path.parent / link).resolve()
        if _obstacle(image, path.parent) is None:
            uploads[image.relative_to(path.parent.resolve()).as_posix()] = image
    return uploads


def left_out(file: str | Path) -> list[str]:
    """Notes on local files that the card links to and that `push` does not upload.

    Raises:
        UserError: as `uploads_of`.
    """
    path, uploads = _file_of(file), uploads_of(file).values()
    text, sent = _card_text(path), [source.resolve() for source in uploads]
    images = images_in(text)
    # Other links may lead to files of the repository that are not here.
    links = [*images, *(link for link in links_in(text) if os.path.isfile(path.parent / link))]
    return [
        f"the card {'shows' if link in images else 'links to'} {link}, which is not uploaded:"
        f" {_obstacle(target, path.parent) or 'it is not shown as an image'}"
        for link in dict.fromkeys(links)
        if (target := (path.parent / link).resolve()) not in sent
    ]


def _obstacle(image: Path, folder: Path) -> str | None:
    """Why an image of a card is not uploaded; None if it is.

    Args:
        image: resolved.
        folder: of the card.
    """
    # Security: a card from elsewhere must not select arbitrary local files for upload.
    if not image.is_relative_to(folder.resolve()):
        return f"it is outside the card's folder {folder}"
    if not os.path.isfile(image):
        return "it does not exist"
    return None if image.suffix.lower() in SUFFIXES else f"its suffix is none of {', '.join(SUFFIXES)}"


def _card_text(path: Path) -> str:
    """The text of a control's card, as it exists or would be written.

    Raises:
        UserError: the file is not a controlkit control, or its card is not UTF-8.
    """
    card = path.with_suffix(".md")
    text = card_of(path)  # refuses what is no control, also where a card exists
    if not card.is_file():
        return text
    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the card {card} is not UTF-8 text ({error}); save it as UTF-8", "damaged-file") from error


def _file_of(name: str | Path) -> Path:
    """The file of a control of one's own.

    Raises:
        UserError: there is none, it is a folder, or it ships with controlkit.
    """
    path = find_control(name)
    if path.is_dir():
        raise UserError(f"{path} is a folder; pass a .safetensors file (`controlkit convert` makes one)", "wrong-kind")
    if path in shipped_controls().values():
        raise UserError(f"{name} ships with controlkit ({path}); pass the file of a control of your own", "unsupported")
    return path


def _companion_of(path: Path) -> Path | None:
    """The companion's file in the folder of a control, preferably with the recorded name; None without one."""
    metadata = read_metadata(path)
    kind = registry().get(metadata.get("control.kind", ""))
    if kind is None or kind.companion is None or not (fingerprint := metadata.get(f"{kind.companion_key}_fingerprint")):
        return None
    name = metadata.get(kind.companion_key, "")
    for candidate in sorted(companions_beside(path, kind.companion), key=lambda path: path.stem != name):
        with suppress(UserError):
            if fingerprint_in(candidate) == fingerprint:
                return candidate
    return None
