"""What *Generate* shows before anything is typed."""

from __future__ import annotations

from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.server.limits import Limits

FIRST_PROMPT = "sailboat, noto style, on a teal background"
FIRST_CONTROL = "canny"


def first_seeds(limits: Limits) -> str:
    """Four seeds, if the server draws as many images."""
    return "0" if limits.images == 1 else f"0-{min(4, limits.images) - 1}"


def first_steps(limits: Limits) -> int:
    """The default of every request, or as many as the server takes."""
    return min(DEFAULT_STEPS, limits.steps)
