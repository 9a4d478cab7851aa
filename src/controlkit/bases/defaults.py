"""Defaults that a base's folder declares, and those of nano."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NANO_DEFAULTS: dict[str, Any] = {
    "guidance": 3.0,
    "mode": "control",
    "prompt": "",
    "captioner": "concepts",
    "image_encoder": "efficientnet-lite0",
    "adapter": {"rank": 4, "learning_rate": 1e-3, "batch_size": 16},
}
"""Defaults of nano and of bases trained with its recipes (docs/nano.md, docs/ctrlora.md): guidance scale, branches of
CFG on which a control acts, default prompt (none, as nano knows no such words), captioner, encoder of image prompts
(`image_encoders`), and settings of adapter training."""

DEFAULT_PROMPT = "a professional, detailed, high-quality image"
"""Default prompt of bases trained on captions of all kinds (Zhang et al. 2023, arXiv 2302.05543v1, section 4.1)."""

DEFAULTS_KEY = "_controlkit"
"""Key of the defaults in `model_index.json`; diffusers ignores names with a leading underscore."""


def defaults_in(folder: Path) -> dict[str, Any]:
    """The defaults in a base's `model_index.json`; empty if there are none."""
    try:
        defaults = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[DEFAULTS_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return defaults if isinstance(defaults, dict) else {}
