"""Companions: the control that another one is nothing without (an adapter's base control), found by its fingerprint."""

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
"""Of files that are looked at when a companion is sought. What they are, their content says."""

_TRANSFERRED = "control.transferred_from"
_FINGERPRINT = "control.fingerprint"


def read_checkpoint(path: Path, reference: Reference | None = None) -> Checkpoint:
    """The control in a file or folder, whatever its format.

    Raises:
        UserError: it is no control, or does not hold exactly what such a file should, or needs a base.
    """
    detected = known(detect(path))
    assert detected.control is not None and detected.format is not None and detected.format.read is not None
    return detected.format.read(detected.control, detected.file, reference or Reference(), detected.says)


def read_companion(kind: str, path: Path, reference: Reference | None = None) -> Checkpoint:
    """The checkpoint of a companion's file.

    Args:
        kind: that the companion has to have.

    Raises:
        UserError: it is something else.
    """
    detected = detect(path)
    if detected.kind != kind:
        title = find(kind).title.partition(" ")[2]
        raise UserError(f"{path} is no {title}; it seems to be {detected.says}")
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
        shared: loaded companions, by fingerprint and by file; what is loaded is added.
        elsewhere: files that may be it, besides those beside the control.
        file: of the companion, if it was named.
        reference: what reading its file may need.

    Raises:
        UserError: it is not to be found, or is another than the control was made on.
    """
    kind = find(checkpoint.kind).companion
    assert kind is not None
    if checkpoint.companion is not None:
        return _built(checkpoint.companion)
    wanted = wanted_fingerprint(checkpoint) or ""
    if file is None and wanted in shared:
        return shared[wanted]
    file = file or find_companion(path, checkpoint, elsewhere)
    # The reference's adapters do not say which base control is theirs; those of one file share what it holds.
    key = f"file:{file.resolve()}"
    if wanted:
        key = check_companion(path, checkpoint, file, read_companion(kind, file, reference))
    if key not in shared:
        shared[key] = _built(read_companion(kind, file, reference))
    return shared[key]


def wanted_fingerprint(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of the companion that a control was made on, if its file says it."""
    return checkpoint.metadata.get(f"{find(checkpoint.kind).companion_key}_fingerprint")


def check_companion(
    path: Path, checkpoint: Checkpoint, file: Path, companion: Checkpoint, fingerprint: str | None = None
) -> str:
    """The fingerprint of a companion, which must be the one that the control was made on.

    Args:
        fingerprint: of the companion's weights, if that is to be trusted in the place of what its file says.

    Raises:
        UserError: it is another.
    """
    found, wanted = fingerprint or said_fingerprint(companion), wanted_fingerprint(checkpoint)
    if wanted is not None and wanted not in (found, *_earlier(companion.metadata)):
        raise UserError(f"{path} was made on another {role_of(find(companion.kind))} ({wanted}) than {file} ({found})")
    return found


def find_companion(path: Path, checkpoint: Checkpoint, elsewhere: Iterable[Path]) -> Path:
    """The file of the companion that a control was made on.

    A file of ours says which; its name is tried first, then every other file beside it, then one that was moved from it
    to another base (`transfer`). Files of other tools say nothing: then the one companion beside the control is taken.

    Raises:
        UserError: there is none, or more than one that it could be.
    """
    control = find(checkpoint.kind)
    assert control.companion is not None
    title = companion_role(control)
    wanted = wanted_fingerprint(checkpoint)
    if not wanted:
        beside = list(companions_beside(path, control.companion))
        if len(beside) == 1:
            return beside[0]
        found = (
            f"beside it are {len(beside)}: {', '.join(one.name for one in beside)}" if beside else "none is beside it"
        )
        raise UserError(
            f"{path} is {control.title} and does not say on which {title} it was made, and {found};"
            " name it as ADAPTER+BASE (convert: --base-control)"
        )
    name = checkpoint.metadata.get(control.companion_key, "base")
    beside_it = [path.with_name(f"{name}.safetensors")] if name and name == Path(name).name else []
    for candidate in (*beside_it, *elsewhere):
        # A file that cannot be read is none that was made on; the one that is may lie beside it.
        with suppress(UserError):
            if candidate.is_file() and read_metadata(candidate).get(_FINGERPRINT) == wanted:
                return candidate
    for candidate in companions_beside(path, control.companion):
        with suppress(UserError):
            if fingerprint_in(candidate) == wanted:
                return candidate
    for candidate in companions_beside(path, control.companion):
        if wanted in _earlier(read_metadata(candidate)):
            return candidate
    raise UserError(
        f"{path} is an adapter of the {title} {name!r} ({wanted}), which is neither beside it nor ships;"
        f" put its file into {path.parent}, or name both files as ADAPTER+BASE (convert: --base-control)"
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
    """The fingerprint of the control in a file: what it says, or else what its weights give.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    said = read_metadata(path).get(_FINGERPRINT)
    return said if said is not None else said_fingerprint(read_checkpoint(path))


def said_fingerprint(checkpoint: Checkpoint) -> str:
    """The fingerprint of a companion that was read: what its file says, or else what its weights give."""
    return checkpoint.metadata.get(_FINGERPRINT) or find(checkpoint.kind).fingerprint_of(checkpoint)


def _built(checkpoint: Checkpoint) -> Control:
    require_settings(checkpoint)
    return find(checkpoint.kind).from_checkpoint(checkpoint)


def _earlier(metadata: dict[str, str]) -> list[str]:
    """The fingerprints that it had before it was moved to another base; none if it was not."""
    return [one for one in metadata.get(_TRANSFERRED, "").split(",") if one]
