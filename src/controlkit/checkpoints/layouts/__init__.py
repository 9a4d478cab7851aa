"""The layouts in which controls are kept, one file each; `LAYOUTS` has them by name.

A layout is read into a `Content` and written from one, so any two that can carry the same content convert.
"""

from __future__ import annotations

from controlkit.checkpoints.content import Content, Options
from controlkit.checkpoints.layouts import (
    control_lora,
    controlkit,
    difference,
    diffusers,
    full,
    merged,
    original,
    peft,
)
from controlkit.checkpoints.layouts.layout import Layout
from controlkit.checkpoints.recognise import Found, known

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        controlkit.LAYOUT,
        diffusers.LAYOUT,
        original.LAYOUT,
        original.BARE,
        full.LAYOUT,
        difference.LAYOUT,
        control_lora.LAYOUT,
        peft.LAYOUT,
        merged.LAYOUT,
    )
}


def read_content(found: Found, options: Options | None = None) -> Content:
    """What a recognised file or folder holds.

    Raises:
        UserError: it is no control, or does not hold exactly what such a file should, or needs a base.
    """
    reads = LAYOUTS[known(found).layout or ""].reads
    assert reads is not None
    return reads(found, options or Options())


__all__ = ["LAYOUTS", "Layout", "read_content"]
