"""Files of salesforce/UniControl: `control_model.*`, bare, or inside a full Stable Diffusion checkpoint.

Versions 1.0 and 1.1 have the same tensors. 1.1 adds a second convolution to each of two modulated ones; in files of 1.0
it is zero, so one network runs both.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from controlkit.controls.control import Control
from controlkit.controls.encoder_copy.names import Structure
from controlkit.controls.encoder_copy.original import (
    BARE_DESCRIPTION,
    FULL_DESCRIPTION,
    ORIGINAL_DESCRIPTION,
    PREFIX,
    FullCheckpoint,
    Names,
    full_note,
    without_prefix,
)
from controlkit.controls.file_format import (
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    Written,
    checkpoint_of_names,
)
from controlkit.controls.unicontrol.tasks import RELEASED
from controlkit.errors import UserError

_OWN = {
    "hypernet": "task_id_hypernet",
    "zero_scales": "task_id_layernet",
    "task_adapters": "input_hint_block_list_moe",
    "entry": "input_hint_block_zeroconv_0",
    "entry_scales": "task_id_layernet_zeroconv_0",
    "shared_adapter": "input_hint_block_share",
    "exit": "input_hint_block_zeroconv_1",
    "exit_scales": "task_id_layernet_zeroconv_1",
}
"""First part of the names here -> in the original, of what a ControlNet lacks."""
_ORIGINAL = {original: own for own, original in _OWN.items()}
_NETWORK, _ZERO_CONVS, _DIFFUSERS_ZERO_CONVS = "network.", "zero_convs.", "controlnet_down_blocks."


def copied_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a ControlNet has too, with diffusers' names."""
    names = {name: _diffusers_name(name) for name in tensors}
    return {new: tensors[name] for name, new in names.items() if new is not None}


def _diffusers_name(name: str) -> str | None:
    if name.startswith(_NETWORK):
        return name.removeprefix(_NETWORK)
    if name.startswith(_ZERO_CONVS):
        return _DIFFUSERS_ZERO_CONVS + name.removeprefix(_ZERO_CONVS)
    return None


def original_names(names: Collection[str]) -> dict[str, str]:
    """Names here -> those of the original code.

    Raises:
        ValueError: they are not those of such a network.
    """
    rename = Structure.of_diffusers([new for name in names if (new := _diffusers_name(name))]).to_original()
    renamed: dict[str, str] = {}
    for name in names:
        first, dot, rest = name.partition(".")
        diffusers_name = _diffusers_name(name)
        new = f"{_OWN[first]}{dot}{rest}" if first in _OWN else rename(diffusers_name or name)
        if new is None:
            raise ValueError(f"the original code has no {name}")
        renamed[name] = new
    return renamed


def own_names(names: Collection[str]) -> dict[str, str]:
    """Names of the original code -> those here; unknown ones are left out.

    Raises:
        ValueError: they are not those of such a network.
    """
    rename = Structure.of_original(names).to_diffusers()
    renamed: dict[str, str] = {}
    for name in names:
        first, dot, rest = name.partition(".")
        if first in _ORIGINAL:
            renamed[name] = f"{_ORIGINAL[first]}{dot}{rest}"
        elif (new := rename(name)) is not None:
            zero_conv = new.startswith(_DIFFUSERS_ZERO_CONVS)
            renamed[name] = new.replace(_DIFFUSERS_ZERO_CONVS, _ZERO_CONVS) if zero_conv else _NETWORK + new
    return renamed


def _detect(file: TensorFile, *, prefix: str, full: bool) -> str | None:
    names = Names.of(file.tensors)
    own = any(re.match(r"task_id_(hypernet|layernet)|input_hint_block_list_moe", name) for name in names.inside)
    fits = (names.prefix, names.has_stable_diffusion) == (prefix, full)
    return "a UniControl with the names of salesforce/UniControl" if own and fits else None


def _read(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    inside, others, prefix = without_prefix(file)
    return _checkpoint(kind, file, inside, reference, others, prefix)


def _read_full(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    full = FullCheckpoint.of(file)
    checkpoint = _checkpoint(kind, file, full.inside, reference, full.unknown, PREFIX)
    checkpoint.notes.append(full_note(full.stable_diffusion))
    return checkpoint


def _checkpoint(
    kind: type[Control],
    file: TensorFile,
    tensors: Mapping[str, Tensor],
    reference: Reference,
    others: Sequence[str],
    prefix: str,
) -> Checkpoint:
    """`checkpoint_of_names` with the names of this code."""
    return checkpoint_of_names(
        kind,
        file,
        tensors,
        reference,
        to_own=own_names,
        to_original=original_names,
        others=others,
        prefix=prefix,
    )


def _write(checkpoint: Checkpoint, prefix: str) -> Written:
    """Tensors with the original's names.

    Raises:
        UserError: the original code would run it differently.
    """
    if list(dict(checkpoint.config["tasks"])) != list(RELEASED):
        raise UserError(
            f"the original code has {len(RELEASED)} fixed tasks, and this control others; write it as controlkit",
            "unsupported",
        )
    if checkpoint.config["instruction_token"] != "first":
        raise UserError(
            "the original code reads the first token of instructions, and this control was trained with the end token;"
            " write it as controlkit",
            "unsupported",
        )
    names = original_names(checkpoint.tensors)
    return Written(tensors={f"{prefix}{names[name]}": value for name, value in checkpoint.tensors.items()})


FORMATS = (
    FileFormat(
        name="original",
        description=ORIGINAL_DESCRIPTION,
        detect=lambda file: _detect(file, prefix=PREFIX, full=False),
        read=_read,
        write=lambda checkpoint, reference: _write(checkpoint, PREFIX),
    ),
    FileFormat(
        name="bare",
        description=BARE_DESCRIPTION,
        detect=lambda file: _detect(file, prefix="", full=False),
        read=_read,
        write=lambda checkpoint, reference: _write(checkpoint, ""),
    ),
    FileFormat(
        name="full",
        description=FULL_DESCRIPTION,
        detect=lambda file: _detect(file, prefix=PREFIX, full=True),
        read=_read_full,
    ),
)
