"""Limits of what a client may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from controlkit.errors import UserError

TEXT = 10_000
"""Characters of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for; more is refused before it is queued, or before anything is drawn."""

    body: int = 32
    """Megabytes of the body of a request."""
    pixels: int = 2048 * 2048
    """Width times height of an image, of the second pass where there is one."""
    input_pixels: int = 4096 * 4096
    """Width times height of an image that a client sends."""
    steps: int = 150
    """Denoising steps."""
    images: int = 16
    """Images of one request."""
    controls: int = 5
    """Controls of one request."""
    queue: int = 64
    """Requests that wait. A full queue answers 503."""
    seconds: float = 900
    """Time that one request may take, loading of models included."""
    kept: int = 256
    """Finished requests whose results are kept; the oldest are removed."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(
                    f"the limit {field.name} is {getattr(self, field.name)}; expected more than 0", "out-of-range"
                )

    def check(self, name: str, value: int) -> None:
        """Check a number against the limit `name`.

        Raises:
            UserError: it is larger.
        """
        if value > getattr(self, name):
            raise UserError(f"{name} is {value}; this server allows {getattr(self, name)}", "out-of-range")

    def check_size(self, width: int, height: int, hires: float | None) -> None:
        """Check the size of a result in pixels, with the factor of its second pass.

        Raises:
            UserError: it has too many pixels.
        """
        pixels = width * height * (hires or 1) ** 2
        if pixels > self.pixels:
            what = f"{width} x {height}" + (f", enlarged {hires:g} times," if hires else "")
            raise UserError(
                f"{what} is {pixels / 1e6:.2f} megapixels; this server allows {self.pixels / 1e6:.2f}", "out-of-range"
            )
