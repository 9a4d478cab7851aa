"""Limits of requests."""

from __future__ import annotations

from dataclasses import dataclass, fields

from controlkit.errors import UserError

TEXT = 10_000
"""Most characters of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests. Most are checked before a request is queued, the others before anything is sampled.

    Raises:
        UserError: a limit is not above 0.
    """

    body: int = 32
    """Size of a request's body in megabytes (10^6 bytes)."""
    pixels: int = 2048 * 2048
    """Width times height of a result, after the second pass if there is one."""
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
    seconds: float = 900.0
    """Time of one request in seconds, including loading models."""
    kept: int = 256
    """Finished requests whose results are kept; the oldest are removed."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(
                    f"the limit {field.name} is {getattr(self, field.name)}; expected more than 0", "out-of-range"
                )

    def check(self, name: str, value: int) -> None:
        """Check a number against a limit.

        Args:
            name: a field of this class.

        Raises:
            UserError: `value` is above the limit.
        """
        if value > getattr(self, name):
            raise UserError(f"{name} is {value}; this server allows {getattr(self, name)}", "out-of-range")

    def check_size(self, width: int, height: int, hires: float | None) -> None:
        """Check the size of a result.

        Args:
            width: in pixels, as is `height`.
            hires: factor of the second pass, or None.

        Raises:
            UserError: it has too many pixels.
        """
        pixels = width * height * (hires or 1) ** 2
        if pixels > self.pixels:
            what = f"{width} x {height}" + (f", enlarged {hires:g} times," if hires else "")
            raise UserError(
                f"{what} is {pixels / 1e6:.2f} megapixels; this server allows {self.pixels / 1e6:.2f}", "out-of-range"
            )
