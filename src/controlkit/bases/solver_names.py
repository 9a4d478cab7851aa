"""Names of solvers, ours and those of A1111, ComfyUI and diffusers. Imports no torch."""

from __future__ import annotations

import re

from controlkit.errors import UserError, nearest

SOLVERS = (
    *("ddim", "dpm++", "dpm++-karras", "dpm++-2m-sde", "dpm++-2m-sde-karras", "unipc", "plms"),
    *("euler", "euler-karras", "euler-a", "heun", "heun-karras", "dpm2", "dpm2-karras", "dpm2-a", "dpm2-a-karras"),
    *("ddpm", "lcm"),
)
"""Names of all solvers."""

_ALIASES = {
    "dpm++-2m": "dpm++",
    "dpm++-2m-sde-gpu": "dpm++-2m-sde",
    "dpm-2": "dpm2",
    "dpm-2-ancestral": "dpm2-a",
    "dpm2-ancestral": "dpm2-a",
    "euler-ancestral": "euler-a",
    "uni-pc": "unipc",
    "pndm": "plms",
    "dpmsolvermultistep": "dpm++",
    "eulerdiscrete": "euler",
    "eulerancestraldiscrete": "euler-a",
    "heundiscrete": "heun",
    "kdpm2discrete": "dpm2",
    "kdpm2ancestraldiscrete": "dpm2-a",
    "unipcmultistep": "unipc",
}
"""Names of others, as `_normalised`, without `-karras`."""
_OTHERS = {
    "dpm++-sde": "dpm++-2m-sde",
    "dpm++-2s-a": "dpm2-a",
    "dpm++-2s-ancestral": "dpm2-a",
    "dpm++-3m-sde": "dpm++-2m-sde",
    "dpm++-2m-sde-heun": "dpm++-2m-sde",
    "dpm": "dpm++",
    "dpm-fast": "dpm++",
    "dpm-adaptive": "dpm++",
    "lms": "dpm++",
    "restart": "heun",
    "ddim-cfg++": "ddim",
    "ipndm": "plms",
    "deis": "dpm++",
    "deismultistep": "dpm++",
}
"""Solvers of others that do not exist here -> the closest."""


def solver_name(name: str) -> str:
    """The solver of this name, which may be that of A1111 (`DPM++ 2M Karras`), ComfyUI (`euler_ancestral`) or diffusers
    (`EulerAncestralDiscreteScheduler`).

    Raises:
        UserError: there is none.
    """
    plain, karras = _normalised(name)
    found = _ALIASES.get(plain, plain)
    if (known := f"{found}{karras}") in SOLVERS:
        return known
    if found in SOLVERS:
        raise UserError(
            f"there is no sampler {name!r}: {found} has no Karras spacing here; use {found}", "unknown-name"
        )
    if found in _OTHERS:
        raise UserError(f"there is no sampler {name!r}; did you mean {_OTHERS[found]}?", "unknown-name")
    raise UserError(f"there is no sampler {name!r}{nearest(name, SOLVERS)}", "unknown-name")


def _normalised(name: str) -> tuple[str, str]:
    """A name in lower case, joined by hyphens, without Karras; and `-karras` if it had that."""
    plain = re.sub(r"[\s_-]+", "-", name.strip().lower()).removesuffix("scheduler").removesuffix("-")
    plain = re.sub("^(k-|sample-)", "", plain).replace("dpmpp", "dpm++")
    without = plain.removesuffix("-karras")
    return without, plain[len(without) :]
