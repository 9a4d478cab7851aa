"""Companions: the control that another one depends on (an adapter's base control), found by its fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from controlkit.controls.control import Control
from controlkit.controls.file_format import Checkpoint, Reference
from controlkit.controls.registry import companion_role, find, role_of
from controlkit.errors import UserError
from controlkit.formats.detect import detect, known
from controlkit.formats.metadata import read_metadata
from controlkit.formats.native import require_settings

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Suffixes of files searched for a companion; detection goes by content."""

FINGERPRINT = "control.fingerprint"
"""Metadata with the fingerprint of a companion's weights."""
_EARLIER = "control.transferred_from"
"""Metadata with its fingerprints before transfers and casts, separated by commas."""


def read_checkpoint(path: Path, reference: Reference | None = None) -> Checkpoint:
    """The control in a file or folder of any format.

    Raises:
        UserError: it is not a control, is damaged, or needs a base.
    """
    detected = known(detect(path))
    assert detected.control is not None and detected.format is not None and detected.format.read is not None
    return detected.format.read(detected.control, detected.file, reference or Reference(), detected.description)


def read_companion(kind: str, path: Path, reference: Reference | None = None) -> Checkpoint:
    """The checkpoint of a companion's file.

    Args:
        kind: that the companion must have.

    Raises:
        UserError: it is something else.
    """
    detected = detect(path)
    if detected.kind != kind:
        title = find(kind).title.partition(" ")[2]
        raise UserError(f"{path} is not a {title}; it appears to be {detected.description}", "wrong-kind")
    return read_checkpoint(path, reference)


def load_companion(
    path: Path,
    checkpoint: Checkpoint,
    shared: dict[str, Control],
    elsewhere: Iterable[Path],
    *,
    file: Path | None = None,
    reference: Reference | None = None,
) -> Control:
    """The companion of a control that was read from `path`.

    Args:
        shared: loaded companions, by fingerprint and by file; extended by what is loaded.
        elsewhere: candidate files besides those in the control's folder.
        file: of the companion, if it was passed explicitly.
        reference: for reading its file.

    Raises:
        UserError: it is not found, or is not the one that the control was trained on.
    """
    kind = find(checkpoint.kind).companion
    assert kind is not None
    if checkpoint.companion is not None:
        return _build(checkpoint.companion)
    fingerprint = required_fingerprint(checkpoint) or ""
    if file is None and fingerprint in shared:
        return shared[fingerprint]
    file = file or find_companion(path, checkpoint, elsewhere)
    # The reference's adapters do not record their base control; adapters with the same file share it.
    key = f"file:{file.resolve()}"
    if fingerprint or key not in shared:
        companion = read_companion(kind, file, reference)
        found = check_companion(path, checkpoint, file, companion)
        key = found if fingerprint else key
        if key not in shared:
            shared[key] = _build(companion)
    return shared[key]


def required_fingerprint(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of the companion that a control was trained on, if its file records it."""
    return checkpoint.metadata.get(f"{find(checkpoint.kind).companion_key}_fingerprint")


def check_companion(
    path: Path, checkpoint: Checkpoint, file: Path, companion: Checkpoint, fingerprint: str | None = None
) -> str:
    """The fingerprint of a companion, which must be the one that the control was trained on.

    Args:
        fingerprint: computed from the companion's weights, to override what its file records.

    Raises:
        UserError: it is another.
    """
    found, expected = fingerprint or fingerprint_of(companion), required_fingerprint(checkpoint)
    if expected is None and companion.condition is not None:
        raise UserError(
            f"{file} is a control of {companion.condition}, not the {role_of(find(companion.kind))} that {path} was"
            " trained on",
            "wrong-kind",
        )
    if expected is not None and expected not in (found, *_earlier_fingerprints(companion.metadata)):
        raise UserError(
            f"{path} was trained on another {role_of(find(companion.kind))} ({expected}) than {file} ({found})",
            "incompatible",
        )
    return found


def find_companion(path: Path, checkpoint: Checkpoint, elsewhere: Iterable[Path]) -> Path:
    """The file of the companion that a control was trained on.

    A controlkit file records it; its name is tried first, then all other files in the folder, then one transferred from
    it to another base (`transfer`) or cast to another dtype (`convert`). Other tools record nothing: then the only
    companion in the folder is used.

    Raises:
        UserError: there is none, or there are several candidates.
    """
    control = find(checkpoint.kind)
    assert control.companion is not None
    title = companion_role(control)
    fingerprint = required_fingerprint(checkpoint)
    if not fingerprint:
        # A control of a condition, such as a merged adapter, is not what an adapter was trained on.
        beside = companions_beside(path, control.companion)
        candidates = [file for file in beside if not read_metadata(file).get("control.condition")]
        if len(candidates) == 1:
            return candidates[0]
        names = ", ".join(file.name for file in candidates)
        found = f"its folder has {len(candidates)}: {names}" if candidates else "its folder has none"
        raise UserError(
            f"{path} is {control.title} that does not record its {title}, and {found}; pass both files as"
            " ADAPTER+BASE (convert: --base-control)",
            "missing-companion",
        )
    name = checkpoint.metadata.get(control.companion_key, "base")
    named = [path.with_name(f"{name}.safetensors")] if name and name == Path(name).name else []
    for candidate in (*named, *elsewhere):
        # Skip unreadable files; the companion may be another one.
        with suppress(UserError):
            if candidate.is_file() and read_metadata(candidate).get(FINGERPRINT) == fingerprint:
                return candidate
    for candidate in companions_beside(path, control.companion):
        with suppress(UserError):
            if fingerprint_in(candidate) == fingerprint:
                return candidate
    for candidate in companions_beside(path, control.companion):
        if fingerprint in _earlier_fingerprints(read_metadata(candidate)):
            return candidate
    raise UserError(
        f"{path} is an adapter of the {title} {name!r} ({fingerprint}), which is neither in its folder nor"
        f" shipped; put its file into {path.parent}, or pass both files as ADAPTER+BASE (convert:"
        " --base-control)",
        "missing-companion",
    )


def companions_beside(path: Path, kind: str) -> Iterator[Path]:
    """Files of this kind in the folder of a control."""
    folder = path if path.is_dir() else path.parent
    for candidate in sorted(folder.iterdir()):
        if candidate != path and candidate.suffix in SUFFIXES and candidate.is_file():
            with suppress(UserError):
                if detect(candidate).kind == kind:
                    yield candidate


def fingerprint_in(path: Path) -> str:
    """The fingerprint of the control in a file: recorded, or else computed from its weights.

    Raises:
        UserError: the file is damaged or something else.
    """
    recorded = read_metadata(path).get(FINGERPRINT)
    return recorded if recorded is not None else fingerprint_of(read_checkpoint(path))


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """The fingerprint of a companion's checkpoint: recorded, or else computed from its weights."""
    return checkpoint.metadata.get(FINGERPRINT) or find(checkpoint.kind).fingerprint_of(checkpoint)


def renew_fingerprint(checkpoint: Checkpoint) -> None:
    """Record the fingerprint of a companion whose weights were cast; controls that were trained on it still load."""
    former, now = checkpoint.metadata[FINGERPRINT], find(checkpoint.kind).fingerprint_of(checkpoint)
    if now == former:
        return
    checkpoint.metadata[FINGERPRINT] = now
    checkpoint.metadata[_EARLIER] = ",".join([*_earlier_fingerprints(checkpoint.metadata), former])


def _build(checkpoint: Checkpoint) -> Control:
    require_settings(checkpoint)
    return find(checkpoint.kind).from_checkpoint(checkpoint)


def _earlier_fingerprints(metadata: dict[str, str]) -> list[str]:
    """The fingerprints before its transfers to other bases and its casts; empty without any."""
    return [fingerprint for fingerprint in metadata.get(_EARLIER, "").split(",") if fingerprint]
