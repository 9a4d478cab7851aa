"""One control in one call of the base, for training and counting; sampling plans several (`sampling/plan.py`)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, Control
from controlkit.controls.hints import Hint


def predict_under(
    control: Control,
    base: Base,
    x_t: Tensor,
    t: Tensor,
    text: Text,
    hint: Hint,
    predict: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The base's prediction under a control of weight 1, `[B, C, h, w]`; differentiable in the control.

    Args:
        x_t: noisy latents `[B, C, h, w]`.
        t: `[B]`.
        text: of batch `B`.
        hint: of batch `B`.
        predict: in place of `base.predict`, such as a CUDA graph of it.
    """
    extended = text.extended(control.tokens(hint)) if Acts.TOKENS in control.acts else text
    control_text = extended if control.reads_tokens else text
    residuals: Residuals | None = None
    if Acts.RESIDUALS in control.acts:
        residuals = control(x_t, t, control_text, hint)
    taps: dict[str, list[Tap]] = {}
    if Acts.TAPS in control.acts:
        for point, tap in control.taps(base, x_t, t, control_text, hint).items():
            taps[point] = [tap if isinstance(tap, Tap) else Tap(function=tap)]
    with base.replacing(control.replacements()):
        return (predict or base.predict)(x_t, t, extended, residuals, taps)
