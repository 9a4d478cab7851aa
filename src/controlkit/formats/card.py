"""Model cards: what a control is, its base, its training, and its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlkit.controls.control import Control
from controlkit.controls.file_format import declared_config
from controlkit.controls.registry import companion_role, find, registry
from controlkit.errors import UserError
from controlkit.files import write_atomically
from controlkit.formats.load import shipped_controls
from controlkit.formats.metadata import provenance_of, read_metadata


def card_of(
    path: str | Path,
    *,
    scores: str = "",
    image: str | Path | None = None,
    seconds: float | None = None,
    licence: str | None = None,
) -> str:
    """The model card of a control file: Markdown with the YAML header of the Hugging Face hub.

    Args:
        scores: a Markdown table.
        image: to show in the card; path relative to the card's folder.
        seconds: duration of the training.
        licence: of the control, in the hub's terms (`apache-2.0`, `openrail`, ...).

    Raises:
        UserError: the file has no controlkit metadata.
    """
    path = Path(path)
    facts = read_metadata(path)
    if facts.get("control.kind", "") not in registry():
        raise UserError(
            f"{path} does not record its control system (control.kind), so it cannot have a card; convert it"
            " to the format controlkit first",
            "wrong-kind",
        )
    kind = find(facts["control.kind"])
    system = kind.class_of(declared_config(facts))
    provenance = provenance_of(facts)
    condition = facts.get("control.condition")
    tags = [kind.tag or kind.kind, "spatial-control", *([condition] if condition else [])]
    header = {
        "library_name": "controlkit",
        "pipeline_tag": "text-to-image",
        "tags": json.dumps(tags),
        **({"license": licence} if licence else {}),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in header.items()), "---", "", f"# {path.stem}", ""]
    title = f"{kind.title[0].upper()}{kind.title[1:]}"
    lines += [f"{title} for {_base_of(facts)}.", "", *_table(_fact_rows(facts, seconds))]
    if provenance:
        lines += ["", "## Training", "", *_table(provenance)]
    if scores:
        lines += ["", "## Evaluation", "", scores]
    if image is not None:
        lines += ["", f"![condition image, generated image, target]({image})"]
    lines += ["", "## Usage", "", *system.usage(path.name, facts.get("control.base") or "BASE", condition)]
    if kind.companion is not None:
        lines += ["", *_companion_usage(path.name, kind, facts)]
    return "\n".join(lines) + "\n"


def _base_of(facts: Mapping[str, str]) -> str:
    """The base of a control, or else its architecture, in words."""
    if base := facts.get("control.base"):
        return f"the base `{base}`"
    architecture = facts.get("modelspec.architecture", "").partition("/")[0]
    return f"a base of `{architecture}`" if architecture not in ("", "unknown") else "a base that is not recorded"


def _recorded_companion(kind: type[Control], facts: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Name and fingerprint of a control's companion, as far as its file records them."""
    return facts.get(kind.companion_key), facts.get(f"{kind.companion_key}_fingerprint")


def _companion_usage(file: str, kind: type[Control], facts: Mapping[str, str]) -> list[str]:
    """Lines that say where the companion of a control is found."""
    role, (name, fingerprint) = companion_role(kind), _recorded_companion(kind, facts)
    passed = f"`--control {file}+{role.upper().replace(' ', '_')}=IMAGE`."
    if not (recorded := name or fingerprint):
        return [f"Its {role} is not recorded; pass it:", passed]
    if _ships(fingerprint):
        return [f"Its {role}, `{recorded}`, ships with controlkit and is found there."]
    return [f"Its {role}, `{recorded}`, must be in the same folder, or be passed:", passed]


def _ships(fingerprint: str | None) -> bool:
    """Whether a control with this fingerprint ships with controlkit."""
    recorded = (read_metadata(path).get("control.fingerprint") for path in shipped_controls().values())
    return fingerprint is not None and fingerprint in recorded


def write_card(path: str | Path, **known: Any) -> Path:
    """Write `card_of(path, **known)` next to the file, as `NAME.md`."""
    card = Path(path).with_suffix(".md")
    text = card_of(path, **known)
    write_atomically(card, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return card


def _fact_rows(facts: Mapping[str, str], seconds: float | None) -> dict[str, Any]:
    recorded = {
        "base": facts.get("control.base"),
        "base's fingerprint": facts.get("control.base_fingerprint"),
        "resolution": facts.get("modelspec.resolution"),
    }
    rows = {
        "condition": facts.get("control.condition") or "not recorded",
        **{name: fact for name, fact in recorded.items() if fact},
        "condition images": f"RGB in {facts.get('control.hint_range', '[0, 1]')}",
    }
    if "control.rank" in facts:
        rows["rank"] = facts["control.rank"]
    kind = find(facts["control.kind"])
    if kind.companion is not None:
        name, fingerprint = _recorded_companion(kind, facts)
        if recorded_companion := name or fingerprint:
            rows[companion_role(kind)] = f"{name} ({fingerprint})" if name and fingerprint else recorded_companion
    if (config := declared_config(facts)) is not None:
        rows |= kind.facts(config)
    if seconds is not None:
        rows["trained for"] = f"{seconds / 60:.1f} minutes"
    return rows


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items())]
