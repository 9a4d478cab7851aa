"""Resolved settings that images depend on, as plain values for JSON and as text for tables."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from controlkit._version import __version__
from controlkit.bases.base import Base
from controlkit.bases.devices import PRECISIONS

_PACKAGES = ("torch", "diffusers", "transformers")


def base_settings(base: Base) -> dict[str, Any]:
    """The base, its device and precision, and package versions."""
    return {
        "base": {"name": base.name, "fingerprint": base.fingerprint, "content": base.content, "size": base.size},
        "device": str(base.device),
        "precision": next((name for name, dtype in PRECISIONS.items() if dtype == base.dtype), str(base.dtype)),
        "versions": versions(),
    }


def sampling_settings(
    base: Base, *, steps: int, guidance: float | None = None, sampler: str | None = None
) -> dict[str, Any]:
    """`steps`, `guidance` and `sampler`; None is replaced by the default of the base."""
    scale = base.default_guidance if guidance is None else guidance
    return {"steps": steps, "guidance": float(scale), "sampler": sampler or base.default_sampler}


def in_words(settings: dict[str, Any]) -> str:
    """Sampling settings as text: `mode control, weight 1, guidance 3, 20 ddim steps`.

    Args:
        settings: from `sampling_settings`, with `mode` and `weight` of a control.
    """
    parts = [f"mode {settings['mode']}"] if "mode" in settings else []
    parts += [f"weight {settings['weight']:g}"] if "weight" in settings else []
    parts += [f"guidance {settings['guidance']:g}", f"{settings['steps']} {settings['sampler']} steps"]
    return ", ".join(parts)


def versions() -> dict[str, str]:
    """Versions of controlkit and of the packages that results depend on."""
    found = {"controlkit": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
