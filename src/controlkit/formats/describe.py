"""What a control's file is, what a base is, and what a system would be for a base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.families import KNOWN_BASES, known_by_shape
from controlkit.bases.load import HUB_ID, NANO, SINGLE_FILES, load_base
from controlkit.bases.meta import build_meta_base, family_and_configurations, meta_base
from controlkit.bases.single_file import read_single_file
from controlkit.controls.control import (
    Acts,
    Control,
    Input,
    Reads,
    takes_one_image,
    words_of_inputs,
    words_of_reads,
)
from controlkit.controls.file_format import Checkpoint
from controlkit.controls.registry import companion_role, find, registry, role_of
from controlkit.errors import UserError, nearest
from controlkit.formats.companions import SUFFIXES
from controlkit.formats.convert import reference_for
from controlkit.formats.cost import base_flops, cost_of, cost_without_base, is_countable
from controlkit.formats.detect import Detected, detect
from controlkit.formats.load import find_control, shipped_controls

_SIZES = {768: 512, 1024: 768, 2048: 1024}
"""Width of the text that a control reads -> side of the images of its base, where its file does not say it."""


def describe(name: str, base: str | None = None, size: int | None = None) -> dict[str, Any]:
    """Facts about a control that ships, a control's file in any format, or another file of tensors.

    Args:
        base: that it was made for, as `convert` takes it; for files that leave something to their base.
        size: side in pixels of the image that operations are counted for; default: that of its training, if the
            file says it, else of its family.

    Raises:
        UserError: there is nothing of that name, it cannot be read, or it is not what it looks like.
    """
    path = find_control(name)
    found = detect(path)
    if found.control is None or found.format is None or found.format.read is None:
        return {
            "kind": "none: no control that is read",
            "what": found.says,
            "path": str(path),
            **({} if path.is_dir() and not found.file.tensors else _counts(found.file.tensors)),
            **_end(found),
        }
    alone = base is None and found.format.needs_base
    read = None if alone else found.format.read(found.control, found.file, reference_for(base), found.says)
    counts = _counts(found.file.tensors if read is None else read.tensors)
    facts: dict[str, Any] = {
        "kind": found.kind,
        "layout": found.layout,
        "what": found.says,
        "path": str(path),
        **counts,
        "trainable": counts["parameters"],
        **_inputs(found.control),
        "reads": words_of_reads(found.control),
        "enters at": found.control.enters,
    }
    if read is not None:
        facts["trainable"] = _trainable(_on_meta(found.control, read).requires_grad_(True))
        facts |= _operations(found.control, read, base, size)
    facts["needs"] = _needs(found.control, read)
    facts["condition"] = found.file.metadata.get("control.condition") or "not said"
    if read is not None and "rank" in read.config:
        facts["rank"] = read.config["rank"]
    if read is not None and read.notes:
        facts["notes"] = "; ".join(read.notes)
    return {**facts, **_end(found)}


def is_base(name: str) -> bool:
    """Whether `name` means a base that `describe_base` can tell about, and no control."""
    path = Path(name)
    if name == NANO or known_by_shape(name) or _is_base_folder(path):
        return True
    if not path.exists():
        return bool(HUB_ID.fullmatch(name)) and path.suffix not in SUFFIXES and name not in shipped_controls()
    if path.is_dir() or path.suffix not in SINGLE_FILES or path.stat().st_size == 0:
        return False
    try:
        return detect(path).kind is None and bool(read_single_file(path))
    except UserError:
        return False


_PARTS = {"vae": "autoencoder"}
"""Component of a base -> what a table calls it, where that is not its name."""


def _is_base_folder(path: Path) -> bool:
    return any((path / component / "config.json").is_file() for component in ("unet", "transformer"))


def describe_base(name: str, size: int | None = None) -> dict[str, Any]:
    """Facts about a base: `nano`, a diffusers folder, a single file, an id on the hub, or one of `KNOWN_BASES`, whose
    shape is enough.

    Args:
        size: side in pixels of the image that operations are counted for; default: the base's own.

    Raises:
        UserError: there is no such base, or the size does not fit it.
    """
    on_meta = meta_base(name)
    side = _side(on_meta, size)
    if known_by_shape(name):
        facts: dict[str, Any] = {"kind": "base", "weights": "none: known by its shape", **_parts(on_meta)}
        facts["prediction"] = on_meta.prediction_type
    else:
        base = load_base(name)
        facts = {"kind": "base", "prediction": base.prediction_type, "fingerprint": base.fingerprint, **_parts(base)}
    facts |= {"trainable": 0, "memory": memory_of(facts["parameters"])}
    facts["latent"] = f"{on_meta.latent_channels} channels, {on_meta.factor} pixels to one"
    facts["own size"] = f"{on_meta.size} x {on_meta.size}"
    facts |= on_meta.sites_in_words()
    facts[f"GFLOP at {side} x {side}"] = base_flops(on_meta, side)
    return facts


def describe_system(system: str, base: str, rank: int | None = None, size: int | None = None) -> dict[str, Any]:
    """What a system would be for `base`: its tensors, operations, and what it reads and needs.

    Args:
        system: a kind of the registry.
        base: as `describe_base` takes it; its configuration is enough.
        rank: of a system that has one.
        size: side in pixels of the image that operations are counted for; default: the base's own.

    Raises:
        UserError: the system or the base is not known, or the size does not fit.
    """
    if system not in registry():
        raise UserError(f"there is no system called {system!r}{nearest(system, list(registry()))}")
    if rank is not None and rank < 1:
        raise UserError(f"the rank is {rank}; it must be 1 or more")
    kind, on_meta = find(system), meta_base(base)
    side = _side(on_meta, size)
    with torch.device("meta"):
        variants = kind.variants(on_meta, **({} if rank is None else {"rank": rank}))
    facts: dict[str, Any] = {"kind": system, "title": kind.title, "paper": kind.paper, "base": base}
    for name, control in variants.items():
        if name:
            facts[name] = _trained(control)
        else:
            facts |= _trained(control)
    first = next(iter(variants.values()))
    config = first.config()
    facts |= kind.facts(config)
    needs = kind.needs(config)
    if kind.companion is not None:
        needs = f"{role_of(kind)}: its {companion_role(kind)}; both: {needs}"
    facts["needs"] = needs
    if is_countable(first):
        facts[f"GFLOP at {side} x {side}"] = cost_of(first, on_meta, side).to_json()
    facts |= _inputs(kind)
    return {**facts, "reads": words_of_reads(kind), "enters at": kind.enters}


def memory_of(parameters: int) -> str:
    """What so many weights take."""
    return f"{2 * parameters / 2**20:,.0f} MiB in fp16, {4 * parameters / 2**20:,.0f} MiB in fp32"


def _side(base: Base, size: int | None) -> int:
    side = base.size if size is None else size
    step = base.size_multiple
    if side < step or side % step:
        raise UserError(f"the size {side} does not fit; it must be a multiple of {step}")
    return side


def _parts(base: Base) -> dict[str, Any]:
    counts = {_PARTS.get(name, name.replace("_", " ")): _count(part) for name, part in base.named_networks().items()}
    return {"parameters": sum(count["parameters"] for count in counts.values()), **counts}


def _count(network: nn.Module) -> dict[str, int]:
    parameters = list(network.parameters())
    return {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)}


def _trained(control: Control) -> dict[str, Any]:
    """Counts of a control, of what training changes of it, and its memory."""
    counts = control.parameter_counts()
    return {
        "tensors": len(control.file_state()),
        **counts,
        "trainable": _trainable(control),
        "memory": memory_of(counts["parameters"]),
    }


def _trainable(control: Control) -> int:
    return sum(parameter.numel() for parameter in control.trainable_parameters())


def _on_meta(kind: type[Control], read: Checkpoint) -> Control:
    with torch.device("meta"):
        return kind.from_config(read.config)


def _counts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    parameters = sum(value.numel() for value in tensors.values())
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    return {"tensors": len(tensors), "parameters": parameters, "dtypes": dtypes, "memory": memory_of(parameters)}


def _end(found: Detected) -> dict[str, Any]:
    size = {"bytes": found.path.stat().st_size} if found.path.is_file() else {}
    return {**size, "metadata": {key: _plain(value) for key, value in found.file.metadata.items()}}


def _operations(kind: type[Control], read: Checkpoint, base: str | None, size: int | None) -> dict[str, Any]:
    """Operations at a size, under a key that names the size; none where no base is known that it fits."""
    if not is_countable(kind):
        return {}
    on_meta = _base_of(kind, read, base)
    said = read.metadata.get("modelspec.resolution", "").partition("x")[0]
    known = int(said) if said.isdigit() else _SIZES.get(read.config.get("cross_attention_dim", 0))
    control = _on_meta(kind, read)
    if on_meta is not None:
        side = _side(on_meta, size or known or on_meta.size)
        return {f"GFLOP at {side} x {side}": cost_of(control, on_meta, side).to_json()}
    side = size or known or 512
    if kind.acts is not Acts.RESIDUALS or kind.reads is not Reads.NOTHING or not takes_one_image(kind):
        return {}
    with suppress(AttributeError):  # it looks at the base, of which nothing is known
        return {f"GFLOP at {side} x {side}": cost_without_base(control, side).to_json()}
    return {}


def _inputs(kind: type[Control]) -> dict[str, str]:
    """What it is given, where that is not one condition image."""
    return {} if kind.inputs == (Input(),) else {"inputs": words_of_inputs(kind)}


def _base_of(kind: type[Control], read: Checkpoint, base: str | None) -> Base | None:
    """The base that was given or that the file names, or a known one that the control fits, on the meta device."""
    said = read.metadata.get("control.base", "")
    told = [said] if said == NANO or Path(said).is_dir() else []  # one on the hub is not fetched for its settings
    for name in filter(None, (base, *told, *KNOWN_BASES)):
        try:
            on_meta = build_meta_base(name, *family_and_configurations(name))
            if _on_meta(kind, read).incompatibility(on_meta) is None:
                return on_meta
        except UserError:
            continue
    return None


def _needs(kind: type[Control], read: Checkpoint | None) -> str:
    if read is None:
        return "its base with its weights (--base), to which it is a change"
    base = kind.needs(read.config)
    if kind.companion is None or read.companion is not None:
        return base
    name = read.metadata.get(kind.companion_key)
    mark = read.metadata.get(f"{kind.companion_key}_fingerprint")
    role = companion_role(kind)
    return (
        f"{f'its {role} {name} ({mark})' if name and mark else f'its {role}, which the file does not name'}, and {base}"
    )


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value
