"""What systems with a hint network have in common: its size follows from the base's autoencoder."""

from __future__ import annotations

import pytest

from controlkit.bases.unet import UNetBase
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.controlnet_lite import ControlNetLite
from controlkit.controls.controlnet_mlp import ControlNetMLP
from controlkit.controls.controlnet_precomputed import PrecomputedControlNet
from controlkit.controls.controlnet_xs import ControlNetXS
from controlkit.controls.unicontrol import UniControl
from refusals import refused

SYSTEMS = (ControlNet, ControlNetLite, ControlNetMLP, ControlNetXS, PrecomputedControlNet, UniControl)


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_autoencoder_that_no_hint_network_fits_is_refused(system, tiny_base, monkeypatch):
    options = {"size_ratio": 0.5} if system is ControlNetXS else {}
    control = system.for_base(tiny_base, "canny", **options)
    assert control.incompatibility(tiny_base) is None
    monkeypatch.setattr(UNetBase, "factor", 32)
    assert "the base's autoencoder by 32" in control.incompatibility(tiny_base)
    with refused("incompatible", "downsamples by 32"):
        system.for_base(tiny_base, "canny", **options)
