"""Files of ShihaoZhaoZSH/Uni-ControlNet: tensors `local_adapter.*` or `global_adapter.*`; the same without prefix; or a
full Stable Diffusion checkpoint that contains one or both."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial

from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.encoder_copy.names import Structure
from controlkit.controls.encoder_copy.original import BARE_DESCRIPTION, is_of_stable_diffusion
from controlkit.controls.file_format import (
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    Written,
    checkpoint_of_names,
)
from controlkit.errors import UserError

NETWORK, FEATURES = "network", "feature_extractor"
"""First parts of the tensor names of a local adapter here."""
GLOBAL_MODULES = frozenset({"ff1", "ff2", "norm1", "norm2"})
"""First parts of the tensor names of a global adapter, the same here and in the original."""
_LOCAL, _GLOBAL = "local_adapter.", "global_adapter."
_NORMS = {".in_layers.0.conv_": ".norm_in.conv_", ".out_layers.0.conv_": ".norm_out.conv_"}
"""Part of a denormalisation's tensor name -> the original's. Here it has the place of the norm that it replaces, in the
original one of its own."""

Names = Callable[[Collection[str]], Mapping[str, str]]


def copied_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the copy, with diffusers' names."""
    prefix = f"{NETWORK}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def local_names(names: Collection[str]) -> dict[str, str]:
    """Names of a local adapter here -> those of the original code.

    Raises:
        ValueError: they are not those of such a network.
    """
    prefix = f"{NETWORK}."
    rename = Structure.of_diffusers([name.removeprefix(prefix) for name in names]).to_original()
    renamed: dict[str, str] = {}
    for name in names:
        new = name if name.startswith(f"{FEATURES}.") else rename(name.removeprefix(prefix))
        if new is None:
            raise ValueError(f"the original code has no {name}")
        renamed[name] = _replaced(new, _NORMS)
    return renamed


def own_local_names(names: Collection[str]) -> dict[str, str]:
    """Names of a local adapter in the original code -> those here; unknown ones are left out.

    Raises:
        ValueError: they are not those of such a network.
    """
    rename = Structure.of_original(names).to_diffusers()
    norms = {original: own for own, original in _NORMS.items()}
    renamed: dict[str, str] = {}
    for name in names:
        if name.startswith(f"{FEATURES}."):
            renamed[name] = name
        elif (new := rename(_replaced(name, norms))) is not None:
            renamed[name] = f"{NETWORK}.{new}"
    return renamed


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for part, new in parts.items():
        name = name.replace(part, new)
    return name


def _same(names: Collection[str]) -> dict[str, str]:
    return {name: name for name in names}


def _is_local(names: Collection[str]) -> bool:
    return any(re.match(rf"{FEATURES}\.(pre_extractor|extractors|zero_convs)\.", name) for name in names) and any(
        name.startswith(("input_blocks.", "zero_convs.")) for name in names
    )


def _is_global(names: Collection[str]) -> bool:
    return {name.partition(".")[0] for name in names} == GLOBAL_MODULES


def _inside(file: TensorFile, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in file.tensors.items() if name.startswith(prefix)}


def _formats(
    prefix: str,
    other: str,
    is_own: Callable[[Collection[str]], bool],
    to_own: Names,
    to_original: Names,
) -> tuple[FileFormat, ...]:
    """The formats of one adapter: `original`, `bare` and `full`.

    Args:
        prefix: prefix of its tensors.
        other: prefix of the other adapter's tensors, which the same file may contain.
        is_own: whether names without the prefix are its own.
        to_own: names of the original code -> names here.
        to_original: names here -> names of the original code.
    """

    def detect(file: TensorFile, *, prefix: str, full: bool) -> str | None:
        has_others = any(not name.startswith(prefix) for name in file.tensors)
        fits = has_others == full and is_own(_inside(file, prefix))
        part = "global" if is_own is _is_global else "local"
        return f"a {part} adapter of Uni-ControlNet under the names of the original code" if fits else None

    def read(
        kind: type[Control], file: TensorFile, reference: Reference, description: str, *, prefix: str
    ) -> Checkpoint:
        tensors = _inside(file, prefix)
        outside = [name for name in file.tensors if not name.startswith(prefix)]
        joined = any(name.startswith(other) for name in outside)
        if joined and reference.kind is None:
            raise UserError(
                f"{file.path} contains two controls, {prefix}* and {other}*; take each out of it: controlkit convert"
                f" {file.path} OUT --to controlkit --kind {kind.kind}",
                "wrong-kind",
            )
        unknown = [name for name in outside if not name.startswith(other) and not is_of_stable_diffusion(name)]
        checkpoint = checkpoint_of_names(
            kind,
            file,
            tensors,
            reference,
            to_own=to_own,
            to_original=to_original,
            others=(*unknown, *file.others),
            prefix=prefix,
        )
        if joined:
            checkpoint.notes.append(f"the file also contains {other}*, another control")
        if len(outside) > sum(name.startswith(other) for name in outside):
            checkpoint.notes.append("the file also contains all of Stable Diffusion; only the control is used")
        return checkpoint

    def write(checkpoint: Checkpoint, reference: Reference, *, prefix: str) -> Written:
        names = to_original(checkpoint.tensors)
        return Written(tensors={f"{prefix}{names[name]}": value for name, value in checkpoint.tensors.items()})

    return (
        FileFormat(
            name="original",
            description=f"the names of ShihaoZhaoZSH/Uni-ControlNet ({prefix}*)",
            detect=partial(detect, prefix=prefix, full=False),
            read=partial(read, prefix=prefix),
            write=partial(write, prefix=prefix),
        ),
        FileFormat(
            name="bare",
            description=BARE_DESCRIPTION,
            detect=partial(detect, prefix="", full=False),
            read=partial(read, prefix=""),
            write=partial(write, prefix=""),
        ),
        FileFormat(
            name="full",
            description="an adapter of Uni-ControlNet with the other one, or inside a full Stable Diffusion checkpoint",
            detect=partial(detect, prefix=prefix, full=True),
            read=partial(read, prefix=prefix),
        ),
    )


LOCAL_FORMATS = _formats(_LOCAL, _GLOBAL, _is_local, own_local_names, local_names)
GLOBAL_FORMATS = _formats(_GLOBAL, _LOCAL, _is_global, _same, _same)
