"""Model cards: what a control is, its base, its training, and its scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlkit.bases.load import NANO
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
    lines += [f"{title} for the base `{facts.get('control.base', '')}`.", "", *_table(_fact_rows(facts, seconds))]
    if provenance:
        lines += ["", "## Training", "", *_table(provenance)]
    if scores:
        lines += ["", "## Evaluation", "", scores]
    if image is not None:
        lines += ["", f"![condition image, generated image, target]({image})"]
    lines += ["", "## Usage", "", *system.usage(path.name, facts.get("control.base", NANO))]
    if kind.companion is not None:
        role = companion_role(kind)
        name = facts.get(kind.companion_key)
        if _ships(facts.get(f"{kind.companion_key}_fingerprint")):
            lines += ["", f"Its {role}, `{name}`, ships with controlkit and is found there."]
        else:
            lines += ["", f"Its {role}, `{name}`, must be in the same folder, or be passed:"]
            lines += [f"`--control {path.name}+{role.upper().replace(' ', '_')}=IMAGE`."]
    return "\n".join(lines) + "\n"


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
    rows = {
        "condition": facts.get("control.condition") or "not recorded",
        "base": facts.get("control.base", ""),
        "base's fingerprint": facts.get("control.base_fingerprint", ""),
        "resolution": facts.get("modelspec.resolution", ""),
        "condition images": f"RGB in {facts.get('control.hint_range', '[0, 1]')}",
    }
    if "control.rank" in facts:
        rows["rank"] = facts["control.rank"]
    kind = find(facts["control.kind"])
    if kind.companion is not None:
        fingerprint = facts.get(f"{kind.companion_key}_fingerprint")
        rows[companion_role(kind)] = f"{facts.get(kind.companion_key)} ({fingerprint})"
    if (config := declared_config(facts)) is not None:
        rows |= kind.facts(config)
    if seconds is not None:
        rows["trained for"] = f"{seconds / 60:.1f} minutes"
    return rows


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items())]
