"""A model card beside every trained control: what it is, on what, how it was made, how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlkit.bases.load import NANO
from controlkit.controls.registry import companion_role, find, registry
from controlkit.errors import UserError
from controlkit.files import write_atomically
from controlkit.formats.metadata import made_of, read_metadata


def card_of(
    path: str | Path,
    *,
    scores: str = "",
    image: str | Path | None = None,
    seconds: float | None = None,
    licence: str | None = None,
) -> str:
    """The card of a control's file, in Markdown with the header that the Hugging Face hub reads.

    Args:
        scores: a table in Markdown.
        image: shown in the card; its path from the card's folder.
        seconds: how long the training took.
        licence: of the control, by the hub's names (`apache-2.0`, `openrail`, ...).

    Raises:
        UserError: the file has no metadata of ours.
    """
    path = Path(path)
    facts = read_metadata(path)
    if facts.get("control.kind", "") not in registry():
        raise UserError(f"{path} does not say what it is (control.kind), so no card can be written for it")
    kind = find(facts["control.kind"])
    made = made_of(facts)
    condition = facts.get("control.condition") or "not said"
    tags = [kind.tag or kind.kind, "spatial-control", *([condition] if condition != "not said" else [])]
    head = {
        "library_name": "controlkit",
        "pipeline_tag": "text-to-image",
        "tags": json.dumps(tags),
        **({"license": licence} if licence else {}),
    }
    lines = ["---", *(f"{key}: {value}" for key, value in head.items()), "---", "", f"# {path.stem}", ""]
    title = f"{kind.title[0].upper()}{kind.title[1:]}"
    lines += [f"{title} for the base `{facts.get('control.base', '')}`.", "", *_table(_facts(facts, seconds))]
    if made:
        lines += ["", "## How it was made", "", *_table(made)]
    if scores:
        lines += ["", "## How good it is", "", scores]
    if image is not None:
        lines += ["", f"![what was given, what came out, the truth]({image})"]
    lines += ["", "## How to use it", "", *kind.usage(path.name, facts.get("control.base", NANO))]
    if kind.companion is not None:
        role = companion_role(kind)
        lines += ["", f"Its {role}, `{facts.get(kind.companion_key)}`, must lie beside it, or be named:"]
        lines += [f"`--control {path.name}+{role.upper().replace(' ', '_')}=IMAGE`."]
    return "\n".join(lines) + "\n"


def write_card(path: str | Path, **known: Any) -> Path:
    """Write `card_of(path, **known)` beside the file, as `NAME.md`."""
    card = Path(path).with_suffix(".md")
    text = card_of(path, **known)
    write_atomically(card, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return card


def _facts(facts: Mapping[str, str], seconds: float | None) -> dict[str, Any]:
    shown = {
        "condition": facts.get("control.condition") or "not said",
        "base": facts.get("control.base", ""),
        "base's fingerprint": facts.get("control.base_fingerprint", ""),
        "resolution": facts.get("modelspec.resolution", ""),
        "condition images": f"RGB in {facts.get('control.hint_range', '[0, 1]')}",
    }
    if "control.rank" in facts:
        shown["rank"] = facts["control.rank"]
    kind = find(facts["control.kind"])
    if kind.companion is not None:
        mark = facts.get(f"{kind.companion_key}_fingerprint")
        shown[companion_role(kind)] = f"{facts.get(kind.companion_key)} ({mark})"
    if seconds is not None:
        shown["trained for"] = f"{seconds / 60:.1f} minutes"
    return shown


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items())]
