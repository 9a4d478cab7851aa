"""Previews in control training: sampling settings, images and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from controlkit.bases.base import Base
from controlkit.bases.text import Text
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint
from controlkit.files import with_null
from controlkit.images import contact_sheet, to_images, write_png
from controlkit.sampling.graphs import NetworkCalls
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.settings import sampling_settings

_STEPS = 10


def preview_settings(base: Base, control: Control) -> dict[str, Any]:
    """Settings of `preview_images`: the base's default mode and guidance, as in `evaluate`, with fewer steps."""
    mode = ActiveControl.mode_in(None, base, control)
    return {"mode": mode, "weight": 1.0, **sampling_settings(base, steps=_STEPS)}


def preview_images(
    base: Base, control: Control, hint: Hint, prompts: Sequence[str], encode_text: Callable[..., Text] | None = None
) -> list[Image.Image]:
    """One image per prompt and row of `hint`; image i has seed i.

    Args:
        encode_text: in place of the base's.
    """
    batches = sample_prompts(
        base,
        prompts=prompts,
        seeds=range(len(prompts)),
        uses=[ActiveControl.in_mode(None, base, control=control, hint=hint)],
        steps=_STEPS,
        encode_text=encode_text,
        calls=NetworkCalls(base, "off"),  # graphs would hold memory beside the training
    )
    return [image for batch in batches for image in to_images(batch)]


def write_preview(
    folder: Path,
    step: int,
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str],
    scores: Mapping[str, float],
    settings: Mapping[str, Any],
) -> None:
    """Write `STEP.png`, with scores and sampling settings in the PNG text chunk `preview`."""
    values = {"step": step, "scores": dict(scores), "settings": dict(settings)}
    text = json.dumps(with_null(values), allow_nan=False)
    write_png(folder / f"{step:07d}.png", contact_sheet(rows, row_titles=titles, cell=96), {"preview": text})
