"""Residuals of systems that follow the base's encoder have the shapes of their sites, on bases of every size."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from controlkit.bases import meta
from controlkit.bases.meta import meta_text
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Reads
from controlkit.controls.controlnet_lite import SITES, ControlNetLite
from controlkit.controls.controlnet_mlp import ControlNetMLP
from controlkit.controls.controlnet_precomputed import PrecomputedControlNet

meta_base = cache(meta.meta_base)
SYSTEMS = (
    *((ControlNetLite, {"design": design}, sites) for design, sites in SITES.items()),
    (ControlNetMLP, {}, "skip"),
    (PrecomputedControlNet, {}, "skip"),
)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "nano"])
@pytest.mark.parametrize(("system", "options", "sites"), SYSTEMS)
def test_residuals_have_the_shapes_of_their_sites(name, system, options, sites):
    base = meta_base(name)
    side = 16 * base.factor
    with torch.device("meta"):
        control = system.for_base(base, **options)
        assert control.incompatibility(base) is None
        x_t, t = torch.empty(1, 4, 16, 16), torch.ones(1)
        hint = control.encode(torch.empty(1, 3, side, side), base)
        made = control(x_t if Reads.NOISE in control.reading else None, t, None, hint)
        shapes = {site: (one.shape[1], side // one.shape[2]) for site, one in made.items()}
        assert shapes == {site: base.sites[site] for site in made}
        assert sum(site.startswith(f"{sites}.") for site in base.sites) == len(made) - 1
        assert predict_under(control, base, x_t, t, meta_text(base), hint).shape == x_t.shape
