"""One control on one call of the base: what training and counting do; sampling plans several (`sampling/plan.py`)."""

from __future__ import annotations

from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, Control
from controlkit.controls.hints import Hint


def predict_under(control: Control, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Tensor:
    """The base's prediction under a control of weight 1, `[B, C, h, w]`; gradients flow to the control.

    Args:
        x_t: noisy latents `[B, C, h, w]`.
        t: `[B]`.
        text: of batch `B`.
        hint: of batch `B`.
    """
    told = text.extended(control.tokens(hint)) if Acts.TOKENS in control.acts else text
    read = told if control.reads_tokens else text
    residuals: Residuals | None = None
    if Acts.RESIDUALS in control.acts:
        residuals = control(x_t, t, read, hint)
    taps: dict[str, list[Tap]] = {}
    if Acts.TAPS in control.acts:
        for point, given in control.taps(base, x_t, t, read, hint).items():
            taps[point] = [given if isinstance(given, Tap) else Tap(function=given)]
    return base.predict(x_t, t, told, residuals, taps)
