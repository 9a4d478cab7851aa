"""Made-up controls of few lines: one for each way to act, with weights that are not zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Tap
from controlkit.controls.control import Acts, Control, Reads


class MadeUp(Control):
    """What all of them are. The hint is the mean of the image, `[B, 1]`; `runs` has the rows of each run."""

    kind = "made-up"
    title = "a made-up control"
    enters = "everywhere"
    condition = None
    reads = Reads.NOTHING

    def __init__(self, **settings) -> None:
        super().__init__()
        self.runs: list[int] = []
        for name, value in settings.items():
            setattr(self, name, value)

    def encode(self, inputs, base):
        return inputs.mean((1, 2, 3))[:, None]

    def trainable_parameters(self):
        return list(self.parameters())

    def config(self):
        return {}

    @classmethod
    def from_config(cls, config, condition=None):
        return cls()

    @classmethod
    def for_base(cls, base, condition=None, **options):
        return cls()


def value_of(hint: Tensor | Mapping[str, Tensor], t: Tensor | None, text, reads: Reads) -> Tensor:
    """One number a row, `[B, 1, 1, 1]`, of all that a control reads besides the noise."""
    tensors = [hint] if isinstance(hint, Tensor) else list(hint.values())
    value = sum(tensor.flatten(1).mean(1) * (place + 1) for place, tensor in enumerate(tensors))
    if Reads.TIME in reads:
        value = value + torch.sin(t / 100)
    if Reads.TEXT in reads:
        # Not a mean: tokens of zeros are to change nothing, and their number neither.
        value = value + text.tokens.flatten(1).abs().sum(1) / 100
    return value[:, None, None, None]


class Adding(MadeUp):
    """Residuals at `sites` of a base."""

    acts = Acts.RESIDUALS

    def __init__(self, base: Base, sites=("skip.1", "middle"), reads=Reads.TIME, scale=0.5, **settings) -> None:
        super().__init__(sites=sites, reads=reads, scale=scale, **settings)
        self.shapes = {site: base.sites[site] for site in sites}
        self.size = base.size

    def forward(self, x_t, t, text, hint):
        self.runs.append(len(t))
        assert (x_t is None) == (Reads.NOISE not in self.reads)
        value = value_of(hint, t, text, self.reads) * self.scale
        if x_t is not None:
            value = value + x_t.mean((1, 2, 3), keepdim=True)
        made = {}
        for number, (site, (channels, pixels)) in enumerate(self.shapes.items()):
            side = self.size // pixels
            made[site] = value * torch.linspace(-1, 1 + number, channels)[:, None, None].expand(-1, side, side)
        return Residuals(made)


class Tapping(MadeUp):
    """`act(stream, own value)` at each of `at`; it notes what it saw and for how many rows it was asked."""

    acts = Acts.TAPS

    def __init__(self, *at: str, act=None, replaces=False, reads=Reads.TIME | Reads.TEXT, **settings) -> None:
        super().__init__(reads=reads, **settings)
        self.at = at
        self.act = act or (lambda stream, value: stream * 0.3 + value)
        self.replaces = replaces
        self.seen: list[Tensor] = []

    def taps(self, base, x_t, t, text, hint):
        self.runs.append(len(x_t))
        assert len(x_t) == len(t) == len(text) == len(next(iter(hint.values())) if isinstance(hint, Mapping) else hint)
        value = value_of(hint, t, text, self.reads)

        def act(stream):
            self.seen.append(stream.detach().clone())
            return self.act(stream, value)

        return {point: Tap(function=act, replaces=self.replaces) for point in self.at}


class Telling(MadeUp):
    """Two tokens made of the hint."""

    acts = Acts.TOKENS

    def __init__(self, base: Base, scale=1.0, **settings) -> None:
        super().__init__(scale=scale, **settings)
        self.width = base.unet.config.cross_attention_dim

    def tokens(self, hint):
        return hint[:, :, None] * self.scale * torch.linspace(1, 3, 2 * self.width).view(1, 2, self.width)


class Stateful(MadeUp):
    """Two taps with a state of one call, as a small encoder that runs along: the second reads what the first wrote."""

    acts = Acts.TAPS
    reads = Reads.NOISE

    def __init__(self, base: Base, first: str, second: str, replaces=False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.at = (first, second)
        self.replaces = replaces
        wide, wide_too = (base.sites[point][0] for point in self.at)
        self.first = nn.Conv2d(wide, 8, 3, padding=1)
        self.second = nn.Conv2d(wide_too + 8, wide_too, 3, padding=1)

    def taps(self, base, x_t, t, text, hint):
        state: dict[str, Tensor] = {}

        def first(stream):
            state["features"] = self.first(stream).sin() * hint[:, :, None, None]
            return state["features"].mean(1, keepdim=True).expand_as(stream)

        def second(stream):
            features = nn.functional.adaptive_avg_pool2d(state["features"], stream.shape[2:])
            made = self.second(torch.cat([stream, features], 1)).tanh()
            return stream + made if self.replaces else made

        return {self.at[0]: first, self.at[1]: Tap(function=second, replaces=self.replaces)}


class Member(Adding):
    """One of a family with a shared network, of which several run in one pass."""

    def __init__(self, base: Base, network: nn.Module, factor: float, **settings) -> None:
        super().__init__(base, **settings)
        object.__setattr__(self, "network", network)
        self.factor = factor

    @property
    def shared_network(self):
        return self.network

    def forward(self, x_t, t, text, hint):
        return self.forward_together([self], x_t, t, text, [hint])[0]

    @classmethod
    def forward_together(cls, controls, x_t, t, text, hints):
        first = controls[0]
        first.network.passes.append(len(controls) * len(t))
        values = torch.cat([value_of(hint, t, text, first.reads) for hint in hints])
        if x_t is not None:
            values = values + x_t.mean((1, 2, 3), keepdim=True).repeat(len(controls), 1, 1, 1)
        made = []
        for one, value in zip(controls, values.chunk(len(controls)), strict=True):
            side = {site: (channels, one.size // pixels) for site, (channels, pixels) in one.shapes.items()}
            made.append(
                Residuals({site: (value * one.factor).expand(-1, wide, s, s) for site, (wide, s) in side.items()})
            )
        return made
