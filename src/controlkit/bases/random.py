"""A known base in full size with random weights: to measure speed and memory without its files."""

from __future__ import annotations

import torch

from controlkit.bases.base import Base
from controlkit.bases.families import KNOWN_BASES
from controlkit.bases.networks import needs_float32
from controlkit.errors import UserError, nearest


def random_base(name: str, dtype: torch.dtype) -> Base:
    """One of `KNOWN_BASES` with random weights; its images are noise. Optional components with files of their own are
    left out.

    Raises:
        UserError: there is no known base of this name.
    """
    if name not in KNOWN_BASES:
        raise UserError(
            f"random weights need a known base, not {name!r}{nearest(name, list(KNOWN_BASES))}", "unknown-name"
        )
    family, configurations = KNOWN_BASES[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        components = {}
        for component in family.components:
            if component.is_tokenizer and not component.optional:
                components[component.name] = family.tokenizer_for(component, configurations)
            elif component.is_network and not component.optional:
                components[component.name] = component.build(configurations[component.name])
        if dtype == torch.float16 and needs_float32(components["vae"], family.upcasts_vae):
            components["vae"].to(torch.float32)
        return family(name=name, scheduler_config=configurations["scheduler"], **components)
    finally:
        torch.set_default_dtype(before)
