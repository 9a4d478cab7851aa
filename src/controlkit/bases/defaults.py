"""What a base's folder says to do where nothing is asked for, and nano's own defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NANO_DEFAULTS: dict[str, Any] = {
    "guidance": 3.0,
    "mode": "control",
    "adapter": {"rank": 4, "learning_rate": 1e-3, "batch_size": 16},
}
"""What nano, and bases that are trained by its recipes, do where nothing is asked for (docs/nano.md, docs/ctrlora.md):
the scale of guidance, on which halves of it a control acts, and settings of an adapter's training."""

DEFAULTS_KEY = "_controlkit"
"""Of `model_index.json`, under which a folder says its defaults; diffusers leaves names with a line in front alone."""


def defaults_in(folder: Path) -> dict[str, Any]:
    """What a base's folder says (in `model_index.json`) to do where nothing is asked for; empty if it says nothing."""
    try:
        said = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[DEFAULTS_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}
