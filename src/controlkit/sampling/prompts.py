"""Prompt modes: no prompt, that of the base, a caption of a first image, or a given one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module

from PIL import Image

from controlkit.bases.base import Base
from controlkit.errors import UserError
from controlkit.plugins import load_entry_points

Captioner = Callable[[Sequence[Image.Image]], list[str]]
"""RGB images => one caption each."""

SHIPPED = ("controlkit.nano.concept_captioner",)
"""Modules of this package that register captioners; imported on first use."""
ENTRY_POINTS = "controlkit.captioners"
"""Entry point group of modules that register captioners."""

_REGISTRY: dict[str, Callable[[], Captioner]] = {}


def register_captioner(name: str, load: Callable[[], Captioner]) -> None:
    """Register a captioner for prompt mode `automatic`.

    Args:
        name: unique name.
        load: loads it; called once per request.

    Raises:
        ValueError: another has this name.
    """
    if name in _REGISTRY:
        raise ValueError(f"the captioner {name!r} is registered already")
    _REGISTRY[name] = load


def find_captioner(name: str | None, base: Base) -> Captioner:
    """Load a captioner.

    Args:
        name: of a registered one, or the folder or hub id of a BLIP model; None is the default of `base`.

    Raises:
        UserError: it is neither, or cannot be loaded.
    """
    from controlkit.data.captions import BLIP
    from controlkit.data.captions import Captioner as Blip

    _load()
    name = captioner_name(name, base)
    if name in _REGISTRY:
        return _REGISTRY[name]()
    return Blip(name or BLIP, str(base.device), asked_by="prompt mode automatic", parameter="--captioner")


def captioner_name(name: str | None, base: Base) -> str:
    """The captioner of this name, or the default of `base` for None."""
    from controlkit.data.captions import BLIP

    return name or base.default_captioner or BLIP


def first_prompt(mode: str, prompt: str, base: Base) -> str:
    """The prompt of a request; in mode `automatic`, that of the first image.

    Args:
        mode: one of `request.PROMPT_MODES`.
        prompt: the given one.

    Raises:
        UserError: the mode is `default`, and the base has no default prompt.
    """
    if mode == "default" and not base.default_prompt:
        raise UserError(
            f"{base.name} has no default prompt, as it knows few words; use prompt mode none, automatic or given",
            "unsupported",
        )
    return {"none": "", "given": prompt}.get(mode, base.default_prompt)


@cache
def _load() -> None:
    for module in SHIPPED:
        import_module(module)
    load_entry_points(ENTRY_POINTS)
