"""The image that a request starts from (img2img), and the part of it that is inpainted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from controlkit.errors import UserError
from controlkit.ui.files import base64_png, flattened, painted

_CANVAS = 512
"""Side in pixels; the brush is 40."""
_PADDING = 32
"""Pixels of the image around the mask (A1111's default)."""


class StartFields:
    """An image to upload and to paint a mask on, and how much of it remains."""

    def __init__(self) -> None:
        with gr.Accordion("Start image", open=False, elem_id="start"):
            self.image = gr.ImageEditor(
                type="pil",
                format="png",
                label="Paint what is to be replaced",
                canvas_size=(_CANVAS, _CANVAS),
                height=340,
                layers=False,
                sources=("upload", "clipboard"),
                transforms=(),
                brush=gr.Brush(colors=["#e11d48"], default_color="#e11d48", default_size=40, color_mode="fixed"),
                elem_id="start-image",
                buttons=[],
            )
            self.take = gr.Button("Use the selected result", size="sm", elem_id="start-take")
            with gr.Row():
                self.strength = gr.Slider(
                    0, 1, 0, step=0.05, label="Strength", info="higher changes more; 0: 0.8, or 1 with a mask",
                    elem_id="start-strength", min_width=180,
                )  # fmt: skip
                self.blur = gr.Number(0, label="Mask blur", info="in pixels", elem_id="start-blur", min_width=110)
            with gr.Row():
                self.only = gr.Checkbox(
                    False, label="Only masked", info="sample the part around the mask alone, and put it back",
                    elem_id="start-only", min_width=180,
                )  # fmt: skip
                self.padding = gr.Number(
                    _PADDING, label="Padding", info="of that part, in pixels", precision=0, min_width=110
                )

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What `body` reads."""
        return (self.image, *self.settings)

    @property
    def settings(self) -> tuple[Any, ...]:
        """What `updates` sets, in its order."""
        return (self.strength, self.blur, self.only, self.padding)

    def body(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """The fields of a request's body; empty without an image.

        Raises:
            UserError: something is painted, but there is no image.
        """
        editor = values[self.image]
        image, mask = flattened((editor or {}).get("background")), painted(editor)
        if image is None:
            if mask is not None:
                raise UserError("the start image has a mask but no image; upload one", "missing-setting")
            return {}
        found: dict[str, Any] = {"image": base64_png(image), "strength": values[self.strength] or None}
        if mask is None:
            return found
        return {
            **found,
            "mask": base64_png(mask.resize(image.size, Image.Resampling.NEAREST)),
            "mask_blur": values[self.blur] or 0,
            "only_masked": (values[self.padding] or 0) if values[self.only] else None,
        }

    def updates(self, stored: Mapping[str, Any]) -> list[Any]:
        """Updates that restore the settings of a request; its image stays as it is."""
        padding = stored["only_masked"]
        return [
            *(stored["strength"] or 0, stored["mask_blur"], padding is not None),
            _PADDING if padding is None else padding,
        ]

    def taken(self, path: str | Path) -> dict[str, Any]:
        """The value of the editor with a result in it, enlarged to the size for which its brush is made."""
        image = Image.open(path).convert("RGB")
        factor = max(1, _CANVAS // max(image.size))
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        return {"background": image, "layers": [], "composite": image}
