"""CtrLoRA's two kinds of files: the base control, and an adapter that names the base control it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from controlkit.bases.base import Base, hash_of_halves
from controlkit.checkpoints.content import CTRLORA_BASE, HEADS, Content, Options, require_heads
from controlkit.checkpoints.files import control_metadata, read_metadata, write_tensors
from controlkit.checkpoints.layouts import read_content
from controlkit.checkpoints.recognise import recognise
from controlkit.checkpoints.tensors import as_float32, on_one_line
from controlkit.controls.base_control import BaseControl, build_base_control
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.errors import UserError

BASE_KIND = CTRLORA_BASE
"""`control.kind` of a base control's file; an adapter's is `ctrlora`."""

_TRANSFERRED = "control.transferred_from"
"""Key of the fingerprints, with commas between them, that a base control had before it was moved to another base."""

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
"""Of files that are looked at when a base control is sought. What they are, their content says."""


def save_base_control(
    path: str | Path,
    control: BaseControl,
    base: Base,
    *,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write the shared network, without adapters; its fingerprint is that of the weights in the file."""
    metadata = control_metadata(
        path,
        base,
        kind=BASE_KIND,
        architecture="ctrlora-base",
        config=control.config(),
        condition=control.condition,
        made=made,
    )
    if control.transferred_from:
        metadata[_TRANSFERRED] = ",".join(control.transferred_from)
    state = control.base_state_dict()
    metadata["control.fingerprint"] = hash_of_halves(value.to(dtype) for value in state.values())
    return write_tensors(path, state, metadata, dtype)


def save_adapter(
    path: str | Path,
    control: CtrLoRA,
    base: Base,
    base_control: str,
    *,
    made: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write one adapter.

    Args:
        base_control: what the file of its base control is called, without `.safetensors`; where it is looked for
            first. What counts is its fingerprint.
    """
    metadata = control_metadata(
        path,
        base,
        kind=CtrLoRA.kind,
        architecture="ctrlora",
        config=control.config(),
        condition=control.condition,
        made=made,
    )
    metadata["control.rank"] = str(control.base_control.adapters[control.adapter].rank)
    metadata["control.base_control"] = base_control
    metadata["control.base_control_fingerprint"] = control.base_control.fingerprint()
    return write_tensors(path, control.base_control.adapter_state_dict(control.adapter), metadata, dtype)


def build_base(path: Path, content: Content) -> BaseControl:
    """The base control of a file that was read.

    Raises:
        UserError: the number of its attention heads is nowhere said.
    """
    require_heads(path, content.config)
    control = build_base_control(content.config, as_float32(content.tensors))
    control.condition = content.condition
    control.transferred_from = transferred_from(content.metadata)
    return control.requires_grad_(False)


def build_adapter(
    path: Path,
    content: Content,
    shared: dict[str, BaseControl],
    elsewhere: Iterable[Path],
    *,
    base_file: Path | None = None,
    options: Options | None = None,
) -> CtrLoRA:
    """The adapter of a file that was read, on its base control.

    Args:
        shared: loaded base controls, by fingerprint and by file; the adapter's own is added.
        elsewhere: files that may be its base control, besides those beside it.
        base_file: of its base control, if it was named.
        options: what reading the base control's file may need.

    Raises:
        UserError: its base control is not to be found, or the adapter does not fit it.
    """
    base_control = _base_control(path, content, shared, elsewhere, base_file, options)
    name = path.stem
    while name in base_control.adapters:
        name += "'"
    rank = content.metadata.get("control.rank")
    try:
        base_control.load_adapter(name, as_float32(content.tensors), rank=None if rank is None else int(rank))
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {on_one_line(error)}") from error
    return CtrLoRA(base_control, name, content.condition)


def find_base_control(path: Path, content: Content, elsewhere: Iterable[Path]) -> Path:
    """The file of the base control that an adapter was made on.

    A file of ours says which; its name is tried first, then every other file beside it, then one that was moved from it
    to another base (`transfer`). The reference's files say nothing: then the one base control beside the adapter is
    taken.

    Raises:
        UserError: there is none, or more than one that it could be.
    """
    wanted = content.metadata.get("control.base_control_fingerprint")
    if not wanted:
        beside = list(base_controls_beside(path))
        if len(beside) == 1:
            return beside[0]
        found = (
            f"beside it are {len(beside)}: {', '.join(one.name for one in beside)}" if beside else "none is beside it"
        )
        raise UserError(
            f"{path} is an adapter of CtrLoRA and does not say on which base control it was made, and {found};"
            " name it as ADAPTER+BASE (convert: --base-control)"
        )
    name = content.metadata.get("control.base_control", "base")
    beside_it = [path.with_name(f"{name}.safetensors")] if name and name == Path(name).name else []
    for candidate in (*beside_it, *elsewhere):
        # A file that cannot be read is none that was made on; the one that is may lie beside it.
        with suppress(UserError):
            if candidate.is_file() and read_metadata(candidate).get("control.fingerprint") == wanted:
                return candidate
    for candidate in base_controls_beside(path):
        with suppress(UserError):
            if fingerprint_in(candidate) == wanted:
                return candidate
    for candidate in base_controls_beside(path):
        if wanted in transferred_from(read_metadata(candidate)):
            return candidate
    raise UserError(
        f"{path} is an adapter of the base control {name!r} ({wanted}), which is neither beside it nor ships;"
        f" put its file into {path.parent}, or name both files as ADAPTER+BASE (convert: --base-control)"
    )


def read_base_control(path: Path, options: Options | None = None) -> Content:
    """The content of a base control's file.

    Raises:
        UserError: it is something else.
    """
    found = recognise(path)
    if found.kind != BASE_KIND:
        raise UserError(f"{path} is no base control of CtrLoRA; it seems to be {found.says}")
    return read_content(found, options)


def _base_control(
    path: Path,
    content: Content,
    shared: dict[str, BaseControl],
    elsewhere: Iterable[Path],
    base_file: Path | None,
    options: Options | None,
) -> BaseControl:
    if content.base_control is not None:
        return build_base(path, content.base_control)
    wanted = content.metadata.get("control.base_control_fingerprint", "")
    if base_file is None and wanted in shared:
        return shared[wanted]
    file = base_file or find_base_control(path, content, elsewhere)
    # The reference's adapters do not say which base control is theirs; those of one file share what it holds.
    key = f"file:{file.resolve()}"
    if wanted:
        read = read_base_control(file, options)
        key = said_fingerprint(read)
        if wanted not in (key, *transferred_from(read.metadata)):
            raise UserError(f"{path} was made on another base control ({wanted}) than {file} ({key})")
    if key not in shared:
        shared[key] = build_base(file, read_base_control(file, options))
    return shared[key]


def base_controls_beside(path: Path) -> Iterator[Path]:
    """Files of base controls in the folder of an adapter."""
    folder = path if path.is_dir() else path.parent
    for candidate in sorted(folder.iterdir()):
        if candidate != path and candidate.suffix in SUFFIXES and candidate.is_file():
            with suppress(UserError):
                if recognise(candidate).kind == BASE_KIND:
                    yield candidate


def fingerprint_in(path: Path) -> str:
    """The fingerprint of the base control in a file: what it says, or else what its weights give.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    said = read_metadata(path).get("control.fingerprint")
    return said if said is not None else fingerprint_of(read_base_control(path))


def said_fingerprint(content: Content) -> str:
    """The fingerprint of a base control that was read: what its file says, or else what its weights give."""
    return content.metadata.get("control.fingerprint") or fingerprint_of(content)


def transferred_from(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The fingerprints that a base control had before it was moved to another base; none if it was not."""
    return tuple(filter(None, metadata.get(_TRANSFERRED, "").split(",")))


def fingerprint_of(content: Content) -> str:
    """The fingerprint of a base control that is not built."""
    settings = {**content.config, HEADS: content.config.get(HEADS) or content.config["block_out_channels"][0]}
    return build_base_control(settings, as_float32(content.tensors)).fingerprint()
