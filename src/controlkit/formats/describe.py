"""Facts about a control file, a base, and a system for a base (`controlkit inspect`)."""

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
from controlkit.bases.folders import NANO, SINGLE_FILES
from controlkit.bases.load import denoiser_fingerprint
from controlkit.bases.meta import build_meta_base, family_and_configurations, meta_base
from controlkit.bases.single_file import read_single_file
from controlkit.bases.weight_files import HUB_ID
from controlkit.controls.control import Acts, Control, Reads, words_of_reads
from controlkit.controls.file_format import Checkpoint
from controlkit.controls.inputs import Input, takes_one_image, words_of_inputs
from controlkit.controls.registry import companion_role, find, registry, role_of
from controlkit.errors import UserError, nearest
from controlkit.formats.companions import SUFFIXES, check_companion, read_checkpoint, read_companion
from controlkit.formats.convert import check_base, reference_for
from controlkit.formats.cost import base_flops, cost_of, cost_without_base, is_countable, residual_sites_of
from controlkit.formats.detect import Detected, detect
from controlkit.formats.load import find_control, require_companion, shipped_controls, split_pair

_SIZES = {768: 512, 1024: 768, 2048: 1024}
"""Text width of a control -> native image size of its base, if the file does not record it."""


def describe(name: str, base: str | None = None, size: int | None = None) -> dict[str, Any]:
    """Facts about a shipped control, a control file in any format, or another file of tensors.

    Of `ADAPTER+BASE`, facts about the adapter, after a check that it was trained on that base control.

    Args:
        base: that it was made for, as in `convert`; for files that depend on their base, and for FLOPs.
        size: side of the image for FLOPs, in pixels; default: that of its training if the file records it, else of its
            family.

    Raises:
        UserError: there is no such file, it cannot be read, its content is inconsistent, or the base does not fit it.
    """
    control_name, companion = split_pair(name)
    path = find_control(control_name)
    detected = detect(path)
    if companion is not None:
        require_companion(control_name, detected.control)
    if detected.control is None or detected.format is None or detected.format.read is None:
        if base is not None:
            raise UserError(f"--base {base} is for controls; {path} is {detected.description}", "contradiction")
        _check_size_counts(name, {}, size)
        return {
            "kind": "none: not a supported control",
            "what": detected.description,
            "path": str(path),
            **({} if path.is_dir() and not detected.file.tensors else _tensor_counts(detected.file.tensors)),
            **_file_facts(detected),
        }
    lacks_base = base is None and detected.format.needs_base
    checkpoint = (
        None
        if lacks_base
        else detected.format.read(detected.control, detected.file, reference_for(base), detected.description)
    )
    if checkpoint is not None and base is not None:
        check_base(detected.control, checkpoint, base)
    if checkpoint is not None and companion is not None:
        assert detected.control.companion is not None
        check_companion(path, checkpoint, companion, read_companion(detected.control.companion, companion))
    counts = _tensor_counts(detected.file.tensors if checkpoint is None else checkpoint.tensors)
    facts: dict[str, Any] = {
        "kind": detected.kind,
        "layout": detected.format_name,
        "what": detected.description,
        "path": str(path),
        **counts,
        "trainable": counts["parameters"],
        **_input_facts(detected.control),
        "reads": words_of_reads(detected.control),
        "enters at": detected.control.enters,
    }
    if checkpoint is not None:
        on_meta = _on_meta(detected.control, checkpoint).requires_grad_(True)
        facts |= {"trainable": _trainable(on_meta), "reads": words_of_reads(on_meta), **_input_facts(on_meta)}
        facts |= _flops(detected.control, checkpoint, base, size)
        facts |= detected.control.facts(checkpoint.config)
    _check_size_counts(name, facts, size)
    facts["needs"] = _needs(detected.control, checkpoint)
    facts["condition"] = detected.file.metadata.get("control.condition") or "not recorded"
    if checkpoint is not None and "rank" in checkpoint.config:
        facts["rank"] = checkpoint.config["rank"]
    if checkpoint is not None and checkpoint.notes:
        facts["notes"] = "; ".join(checkpoint.notes)
    return {**facts, **_file_facts(detected)}


def is_base(name: str) -> bool:
    """Whether `name` is a base that `describe_base` accepts, and not a control."""
    path = Path(name)
    if name == NANO or known_by_shape(name) or _is_base_folder(path):
        return True
    if not path.exists():
        shipped = {control.partition("/")[0] for control in shipped_controls()}
        return bool(HUB_ID.fullmatch(name)) and path.suffix not in SUFFIXES and path.parts[0] not in shipped
    if path.is_dir() or path.suffix not in SINGLE_FILES or path.stat().st_size == 0:
        return False
    try:
        return detect(path).kind is None and bool(read_single_file(path))
    except UserError:
        return False


_LABELS = {"vae": "autoencoder"}
"""Component of a base -> label in tables, if it is not the name."""


def _is_base_folder(path: Path) -> bool:
    return any((path / component / "config.json").is_file() for component in ("unet", "transformer"))


def describe_base(name: str, size: int | None = None) -> dict[str, Any]:
    """Facts about a base: `nano`, a diffusers folder, a single file, a hub id, or one of `KNOWN_BASES`, whose
    configuration suffices.

    Args:
        size: side of the image for FLOPs, in pixels; default: the base's native size.

    Raises:
        UserError: there is no such base, or the size does not fit it.
    """
    on_meta = meta_base(name)
    side = _side(on_meta, size)
    if known_by_shape(name):
        facts: dict[str, Any] = {
            "kind": "base",
            "weights": "none: only the architecture is known",
            **_network_counts(on_meta),
        }
        facts["prediction"] = on_meta.prediction_type
    else:
        facts = {
            "kind": "base",
            "prediction": on_meta.prediction_type,
            "fingerprint": denoiser_fingerprint(name),
            **_network_counts(on_meta),
        }
    facts |= {"trainable": 0, "memory": memory_of(facts["parameters"])}
    facts["latent"] = f"{on_meta.latent_channels} channels, 1/{on_meta.factor} of the image's size"
    facts["own size"] = f"{on_meta.size} x {on_meta.size}"
    facts |= on_meta.sites_in_words()
    facts[f"{_COUNTED} {side} x {side}"] = base_flops(on_meta, side)
    return facts


def describe_system(
    system: str, base: str | None = None, rank: int | None = None, size: int | None = None
) -> dict[str, Any]:
    """Facts about a system for `base`: its tensors, FLOPs, inputs and requirements.

    Args:
        system: a kind of the registry.
        base: as in `describe_base`; its configuration suffices. Default: `nano`, or the first well-known base that the
            system is made for.
        rank: of a system that has one.
        size: side of the image for FLOPs, in pixels; default: the base's native size.

    Raises:
        UserError: the system or the base is unknown, or the size does not fit.
    """
    if system not in registry():
        raise UserError(f"there is no control system {system!r}{nearest(system, list(registry()))}", "unknown-name")
    if rank is not None and rank < 1:
        raise UserError(f"rank is {rank}; expected 1 or more", "out-of-range")
    kind = find(system)
    if base is None:
        base = next((name for name in (NANO, *KNOWN_BASES) if can_be_made(kind, meta_base(name))), NANO)
    on_meta = meta_base(base)
    side = _side(on_meta, size)
    with torch.device("meta"):
        variants = kind.variants(on_meta, **({} if rank is None else {"rank": rank}))
    facts: dict[str, Any] = {"kind": system, "title": kind.title, "paper": kind.paper, "base": base}
    for name, control in variants.items():
        if name:
            facts[name] = _control_counts(control)
        else:
            facts |= _control_counts(control)
    first = next(iter(variants.values()))
    if not is_countable(first):
        _check_size_counts(system, facts, size)
    config = first.config()
    facts |= kind.facts(config)
    needs = kind.needs(config)
    if kind.companion is not None:
        needs = f"{role_of(kind)}: its {companion_role(kind)}; both: {needs}"
    facts["needs"] = needs
    if is_countable(first):
        facts[f"{_COUNTED} {side} x {side}"] = cost_of(first, on_meta, side).to_json()
    facts |= _input_facts(kind)
    return {**facts, "reads": words_of_reads(first), "enters at": kind.enters}


def can_be_made(kind: type[Control], base: Base) -> bool:
    """Whether `base` supports a system, possibly with other options than the defaults."""
    try:
        with torch.device("meta"):
            kind.for_base(base)
    except UserError as error:
        return error.code == "out-of-range"
    return True


def memory_of(parameters: int) -> str:
    """Memory of this many weights, as text."""
    return f"{2 * parameters / 2**20:,.0f} MiB in fp16, {4 * parameters / 2**20:,.0f} MiB in fp32"


_COUNTED = "GFLOP at"
"""Start of the fact that depends on the size."""


def _check_size_counts(name: str, facts: Mapping[str, Any], size: int | None) -> None:
    """Refuse a size where nothing is counted at it."""
    if size is not None and not any(fact.startswith(_COUNTED) for fact in facts):
        raise UserError(
            f"--size {size} has no effect on {name}, whose operations are not counted; remove it, or name a base that"
            " it fits (--base)",
            "contradiction",
        )


def _side(base: Base, size: int | None) -> int:
    side = base.size if size is None else size
    multiple = base.size_multiple
    if side < multiple or side % multiple:
        raise UserError(f"size {side} does not fit: it must be a multiple of {multiple}", "wrong-size")
    return side


def _network_counts(base: Base) -> dict[str, Any]:
    counts = {
        _LABELS.get(name, name.replace("_", " ")): _parameter_counts(network)
        for name, network in base.named_networks().items()
    }
    return {"parameters": sum(count["parameters"] for count in counts.values()), **counts}


def _parameter_counts(network: nn.Module) -> dict[str, int]:
    parameters = list(network.parameters())
    return {"tensors": len(parameters), "parameters": sum(parameter.numel() for parameter in parameters)}


def _control_counts(control: Control) -> dict[str, Any]:
    """Tensors, parameters, trainable parameters and memory of a control."""
    counts = control.parameter_counts()
    return {
        "tensors": len(control.file_state()),
        **counts,
        "trainable": _trainable(control),
        "memory": memory_of(counts["parameters"]),
    }


def residual_sites(name: str, base: str) -> tuple[str, ...] | None:
    """Sites of the residuals of a control's file on a base, in order, from configurations alone.

    Returns:
        None if those do not tell, or the control or the base cannot be read: loading them says why.
    """
    try:
        detected = detect(find_control(name))
        kind = detected.control
        if kind is None or kind.acts is not Acts.RESIDUALS or not is_countable(kind):
            return None
        on_meta, control = meta_base(base), _on_meta(kind, read_checkpoint(detected.path))
        return None if control.incompatibility(on_meta) is not None else residual_sites_of(control, on_meta)
    except (UserError, RuntimeError):  # RuntimeError: an operation that needs the values of tensors
        return None


def _trainable(control: Control) -> int:
    return sum(parameter.numel() for parameter in control.trainable_parameters())


def _on_meta(kind: type[Control], checkpoint: Checkpoint) -> Control:
    with torch.device("meta"):
        return kind.from_config(checkpoint.config)


def _tensor_counts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    parameters = sum(value.numel() for value in tensors.values())
    dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    return {"tensors": len(tensors), "parameters": parameters, "dtypes": dtypes, "memory": memory_of(parameters)}


def _file_facts(detected: Detected) -> dict[str, Any]:
    size = {"bytes": detected.path.stat().st_size} if detected.path.is_file() else {}
    return {**size, "metadata": {key: _parse_json(value) for key, value in detected.file.metadata.items()}}


def _flops(kind: type[Control], checkpoint: Checkpoint, base: str | None, size: int | None) -> dict[str, Any]:
    """GFLOPs at a size, with a key that names the size; empty if no fitting base is known."""
    if not is_countable(kind):
        return {}
    on_meta = _fitting_base(kind, checkpoint, base)
    recorded = checkpoint.metadata.get("modelspec.resolution", "").partition("x")[0]
    native = int(recorded) if recorded.isdecimal() else _SIZES.get(checkpoint.config.get("cross_attention_dim", 0))
    control = _on_meta(kind, checkpoint)
    if on_meta is not None:
        if native is not None and (native < on_meta.size_multiple or native % on_meta.size_multiple):
            native = None  # other tools may have written anything
        side = _side(on_meta, size or native or on_meta.size)
        return {f"{_COUNTED} {side} x {side}": cost_of(control, on_meta, side).to_json()}
    side = size or native or 512
    if kind.acts is not Acts.RESIDUALS or control.reading is not Reads.NOTHING or not takes_one_image(kind):
        return {}
    with suppress(AttributeError):  # it reads the base, which is unknown
        return {f"{_COUNTED} {side} x {side}": cost_without_base(control, side).to_json()}
    return {}


def _input_facts(kind: type[Control] | Control) -> dict[str, str]:
    """Its inputs, if they are not one condition image."""
    return {} if kind.inputs == (Input(),) else {"inputs": words_of_inputs(kind)}


def _fitting_base(kind: type[Control], checkpoint: Checkpoint, base: str | None) -> Base | None:
    """The base passed or recorded in the file, or a known one that the control fits, on the meta device."""
    recorded = checkpoint.metadata.get("control.base", "")
    local = (
        [recorded] if recorded == NANO or Path(recorded).is_dir() else []
    )  # one on the hub is not downloaded for its settings
    for name in filter(None, (base, *local, *KNOWN_BASES)):
        try:
            on_meta = build_meta_base(name, *family_and_configurations(name))
            if _on_meta(kind, checkpoint).incompatibility(on_meta) is None:
                return on_meta
        except UserError:
            continue
    return None


def _needs(kind: type[Control], checkpoint: Checkpoint | None) -> str:
    if checkpoint is None:
        return "its base with its weights (--base), of which it stores the difference"
    base = kind.needs(checkpoint.config)
    if kind.companion is None or checkpoint.companion is not None:
        return base
    name = checkpoint.metadata.get(kind.companion_key)
    fingerprint = checkpoint.metadata.get(f"{kind.companion_key}_fingerprint")
    role = companion_role(kind)
    companion = f"its {role} {name} ({fingerprint})" if name and fingerprint else f"its {role}, which the file omits"
    return f"{companion}, and {base}"


def _parse_json(value: str) -> Any:
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value
