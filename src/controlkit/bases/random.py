"""A known base with random weights, in full size: for measuring speed and memory without its files."""

from __future__ import annotations

import torch

from controlkit.bases.base import Base, needs_float32
from controlkit.bases.families import KNOWN_BASES
from controlkit.errors import UserError, nearest


def random_base(name: str, dtype: torch.dtype) -> Base:
    """One of `KNOWN_BASES` with random weights; its images are noise. Optional components that need files of their own
    are left out.

    Raises:
        UserError: the name is none of these.
    """
    if name not in KNOWN_BASES:
        raise UserError(f"only known bases can have random weights, not {name!r}{nearest(name, list(KNOWN_BASES))}")
    family, configurations = KNOWN_BASES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        parts = {}
        for component in family.components:
            if component.is_tokenizer and not component.optional:
                parts[component.name] = family.tokenizer_for(component, configurations)
            elif component.is_network and not component.optional:
                parts[component.name] = component.build(configurations[component.name])
        if dtype == torch.float16 and needs_float32(parts["vae"], family.upcasts_vae):
            parts["vae"].to(torch.float32)
        return family(name=name, scheduler_config=configurations["scheduler"], **parts)
    finally:
        torch.set_default_dtype(before)
