"""Weights of a control's residuals by injection site: guidance modes, layers and masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.nn import functional

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.controls.control import Acts, Control
from controlkit.errors import UserError

SOFT_RATIO = 0.825
"""Ratio of neighbouring soft weights at Stable Diffusion's 13 decoder sites (12 skips and the middle), in the authors'
code of Zhang et al. 2023 and in A1111."""
_SOFT_STAGES = (0.25, 0.62, 0.825, 1.0)
"""Soft weights of four encoder stages, in A1111."""


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """Factors of a control's residuals, besides its one weight."""

    sites: Mapping[str, tuple[int, int]]
    """`Base.sites`."""
    by_site: Mapping[str, float] | None = None
    """Factor of each site; None is 1 everywhere."""
    layers: tuple[float, ...] | None = None
    """Factor of each residual, in their order; None is 1 everywhere."""
    mask: Tensor | None = None
    """`[1, 1, H, W]` in [0, 1], in pixels of the image; None is 1 everywhere."""
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        mode: str,
        base: Base,
        control: Control,
        *,
        layers: Sequence[float] | None = None,
        mask: Tensor | None = None,
    ) -> Weighting | None:
        """The weighting of `control` on `base`; None if all factors are 1.

        Args:
            mode: one of `uses.MODES`.
            layers: one factor per residual.
            mask: `[1, 1, H, W]` in [0, 1].

        Raises:
            UserError: the control adds more than residuals, or the sites of the base have one resolution and the mode
                weights them by it.
        """
        check_weighted(mode, base, control, layers=layers is not None, mask=mask is not None)
        by_site = weights_by_site(mode, base)
        mask = None if mask is None or bool((mask == 1).all()) else mask
        mask = None if mask is None else mask.to(base.device)
        layers = None if layers is None else tuple(layers)
        if by_site is None and layers is None and mask is None:
            return None
        return cls(sites=base.sites, by_site=by_site, layers=layers, mask=mask)

    @property
    def is_zero(self) -> bool:
        """Whether nothing is left of the residuals."""
        no_layers = self.layers is not None and not any(self.layers)
        return no_layers or (self.mask is not None and not bool(self.mask.any()))

    def __call__(self, residuals: Residuals) -> Residuals:
        """Residuals times the factors of their sites.

        Raises:
            UserError: the numbers of residuals and of layers differ.
        """
        if self.layers is not None:
            check_number_of_layers(self.layers, list(residuals))
            residuals = residuals.scaled(self.layers)
        if self.by_site is not None:
            residuals = Residuals({site: tensor * self.by_site[site] for site, tensor in residuals.items()})
        if self.mask is not None:
            residuals = Residuals({site: tensor * self._mask_at(site, tensor) for site, tensor in residuals.items()})
        return residuals

    def _mask_at(self, site: str, residual: Tensor) -> Tensor:
        """The mask at the resolution of a site, in the layout of its residual: a map, or tokens `[B, h * w, C]`."""
        assert self.mask is not None
        factor = self.sites[site][1]
        key = (factor, residual.ndim, residual.dtype, residual.device)
        if key not in self._masks:
            # The sides of the site, not of the residual, which may be pooled to one value. UNets round up.
            size = [-(-side // factor) for side in self.mask.shape[-2:]]
            mask = functional.interpolate(self.mask, size, mode="area").to(residual.device, residual.dtype)
            self._masks[key] = mask if residual.ndim == 4 else mask.flatten(2).transpose(1, 2)
        return self._masks[key]


def check_number_of_layers(layers: Sequence[float], sites: Sequence[str]) -> None:
    """Check that there is one layer weight for each residual.

    Args:
        sites: of the residuals, in order.

    Raises:
        UserError: the numbers differ.
    """
    if len(layers) != len(sites):
        raise UserError(
            f"got {len(layers)} layers for {len(sites)} residuals; expected one number for each of {', '.join(sites)}",
            "out-of-range",
        )


def check_weighted(mode: str, base: Base, control: Control, *, layers: bool = False, mask: bool = False) -> None:
    """Check that residuals of `control` can be weighted by site as asked.

    Raises:
        UserError: they cannot, see `Weighting.of`.
    """
    asked = (f"mode {mode}", "a mask", "layers")
    weighted = [what for what, is_asked in zip(asked, (mode in _WEIGHTS, mask, layers), strict=True) if is_asked]
    if weighted and control.acts != Acts.RESIDUALS:
        raise UserError(
            f"{control.title} adds more than residuals, or none, so {' and '.join(weighted)} cannot weight it by"
            " injection site; use mode balanced or control, and a weight",
            "unsupported",
        )
    if mode in _WEIGHTS and len(set(_factors(base))) == 1:
        raise UserError(
            f"mode {mode} weights injection sites by their resolution, and those of {base.name} have one; use mode"
            " balanced or control",
            "incompatible",
        )


def weights_by_site(mode: str, base: Base) -> dict[str, float] | None:
    """The factor of every site of `base` in `mode`; None where all are 1."""
    return _WEIGHTS[mode](base.sites) if mode in _WEIGHTS else None


def soft_weights(sites: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """Soft weights: they grow geometrically by depth, up to 1 at the middle.

    For n + 1 decoder sites (n skips and the middle), site i has 0.825^(12 (1 - i / n)): 0.825^(12 - i) for Stable
    Diffusion 1 and 2, and from 0.0994 to 1 on any UNet. diffusers' `guess_mode` goes from 0.1 to 1 (logspace); no
    weight differs by more than 0.6 %. Encoder blocks have the weights of their skips. Encoder stages have those of
    A1111, interpolated if there are not four.
    """
    counts = {family: sum(site.startswith(f"{family}.") for site in sites) for family in ("skip", "encoder", "stage")}

    def weight(site: str) -> float:
        family, _, number = site.partition(".")
        # The last stage is the middle block.
        last = counts[family] - (2 if family == "stage" else 0) if number else 1
        depth = min(int(number) / max(last, 1), 1.0) if number else 1.0
        if family == "stage":
            return float(np.interp(depth, np.linspace(0, 1, len(_SOFT_STAGES)), _SOFT_STAGES))
        return SOFT_RATIO ** (12 * (1 - depth))

    return {site: weight(site) for site in sites}


def resolution_weights(sites: Mapping[str, tuple[int, int]], *, normalised: bool = False) -> dict[str, float]:
    """CFG resolution weighting (Zhang et al. 2023, section 3.4): 64 / h at a site of height h.

    64 is the height of the finest sites of Stable Diffusion at 512 x 512. Here it is that of the base's finest site, so
    weights depend on the base and not on the size of the image: 1, 2, 4 and 8 at the four resolutions of Stable
    Diffusion 1. The formula amplifies deep residuals, though the paper introduces it to weaken guidance.

    Args:
        normalised: divide by the largest weight: 1/8, 1/4, 1/2 and 1.
    """
    factors = {site: factor for site, (_, factor) in sites.items()}
    unit = max(factors.values()) if normalised else min(factors.values())
    return {site: factor / unit for site, factor in factors.items()}


def _normalised(sites: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    return resolution_weights(sites, normalised=True)


_WEIGHTS = {
    "soft": soft_weights,
    "guess": soft_weights,
    "cfg-rw": _normalised,
    "cfg-rw-literal": resolution_weights,
}
"""Mode -> weights of the sites of a base."""


def _factors(base: Base) -> Iterable[int]:
    return (factor for _, factor in base.sites.values())
