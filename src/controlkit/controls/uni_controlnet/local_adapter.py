"""The local adapter: a ControlNet whose encoder is modulated by several condition images at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from torch.nn import functional

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from controlkit.controls.control import Control, Reads, Training
from controlkit.controls.encoder_copy.names import config_of
from controlkit.controls.encoder_copy.network import (
    HINT_SETTINGS,
    base_needed,
    checked_config,
    copied_encoder,
    copy_incompatibility,
    hint_incompatibility,
    missing_heads,
    network_of,
    plain_config,
    with_heads,
)
from controlkit.controls.hints import ConditionDrop, Hint
from controlkit.controls.inputs import Input
from controlkit.controls.registry import control
from controlkit.controls.uni_controlnet.formats import FEATURES, LOCAL_FORMATS, NETWORK, copied_tensors
from controlkit.errors import UserError, nearest

RELEASED = ("canny", "mlsd", "hed", "hedsketch", "openpose", "depth", "seg")
"""Conditions of the released checkpoint in the order of their channels (ShihaoZhaoZSH/Uni-ControlNet,
src/test/test.py), by their names here."""
FEATURE_CHANNELS = (192, 256, 384, 512)
"""Channels of the extractor's features at each resolution of Stable Diffusion 1, whose first resolution has 320
channels."""
EXTRACTOR_CHANNELS = {2: (32,), 4: (32, 64), 8: (32, 64, 128), 16: (32, 64, 128, 128)}
"""Downsampling factor of the autoencoder -> channels of the extractor's convolutions before the features (at 8 as in
the original, models/local_adapter.py)."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Recipe settings of a local adapter."""

    name: str = "local"
    """Name of the control and of its file."""
    start: str | None = None
    """Initial weights: a local adapter's file with the same conditions. Default: a copy of the base's encoder."""
    keep_all: float = 0.1
    """Fraction of samples with all condition images, in [0, 1]."""
    drop_all: float = 0.1
    """Fraction of samples with no condition image, in [0, 1]."""
    drop_each: float = 0.5
    """In the other samples, probability that a condition image is left out, independently for each."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""

    @property
    def condition_drop(self) -> ConditionDrop:
        """The fractions of samples without conditions."""
        return ConditionDrop(keep_all=self.keep_all, drop_all=self.drop_all, each=self.drop_each)


@control
class LocalAdapter(Control):
    """A copy of the base's encoder that several condition images modulate (feature denormalisation, FDN), joined to the
    base by zero convolutions.

    The images are concatenated along their channels, with zeros for missing ones. An extractor computes features at
    every resolution. In the first ResNet block of each resolution, the scales and shifts computed from them replace the
    weights of both norms. Features, scales and shifts depend on the images alone, so `encode` computes them once.

    A new one differs from the original code, whose scales and shifts start random: here they start as the weights of
    the base's norms, so that the copy starts as the base's encoder.

    Args:
        network: encoder and middle block; its hint network is not used.
        names: conditions, in the order of their channels.
        extractor_channels: see `EXTRACTOR_CHANNELS`.
        feature_channels: channels of the features, one entry per resolution.
        condition: the only condition that it follows (`for_condition`), or None.
    """

    kind: ClassVar[str] = "uni-controlnet-local"
    title: ClassVar[str] = "a local adapter of Uni-ControlNet"
    paper: ClassVar[str] = "Zhao et al. 2023, arXiv 2305.16322"
    inputs = tuple(Input(name=name, condition=name, required=False) for name in RELEASED)
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    reads_tokens: ClassVar[bool] = True
    enters: ClassVar[str] = "decoder skips and middle"
    not_elsewhere: ClassVar[str] = "only the paper's code has such a network"
    formats = LOCAL_FORMATS
    trainings = (
        Training(
            system="uni-controlnet-local",
            several=True,
            one_file=True,
            together=True,
            options=TrainingOptions,
            doc="The local adapter of a Uni-ControlNet: several conditions of every image at once.",
        ),
    )

    def __init__(
        self,
        network: ControlNetModel,
        names: Sequence[str],
        *,
        extractor_channels: Sequence[int],
        feature_channels: Sequence[int],
        condition: str | None = None,
    ) -> None:
        super().__init__()
        if not names or len(set(names)) != len(names) or not extractor_channels:
            raise ValueError(f"expected different conditions and an extractor, got {names} and {extractor_channels}")
        if len(feature_channels) != len(network.down_blocks):
            raise ValueError(f"got {len(feature_channels)} features for {len(network.down_blocks)} resolutions")
        network.controlnet_cond_embedding = nn.Identity()
        for block, width in zip(network.down_blocks, feature_channels, strict=True):
            first = block.resnets[0]
            first.norm1, first.norm2 = Denormalisation(first.norm1, width), Denormalisation(first.norm2, width)
        self.network = network
        self.feature_extractor = FeatureExtractor(3 * len(names), extractor_channels, feature_channels)
        self.names = tuple(names)
        self.extractor_channels, self.feature_channels = list(extractor_channels), list(feature_channels)
        self.condition = self.names[0] if len(names) == 1 else condition
        self.inputs = inputs_for(self.names)

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, names: Sequence[str] | None = None, **options: Any
    ) -> LocalAdapter:
        """A new one: encoder and middle block copied from `base`, zero convolutions, a random extractor.

        Args:
            names: its conditions; default: `condition`, or the released ones.

        Raises:
            UserError: no extractor fits the base.
        """
        if base.factor not in EXTRACTOR_CHANNELS:
            known = ", ".join(map(str, EXTRACTOR_CHANNELS))
            raise UserError(
                f"{cls.title} has no extractor for {base.name}: the autoencoder downsamples by {base.factor}, expected"
                f" {known}",
                "incompatible",
            )
        network = copied_encoder(base.unet)
        new = cls(
            network,
            names or ((condition,) if condition else RELEASED),
            extractor_channels=EXTRACTOR_CHANNELS[base.factor],
            feature_channels=_feature_channels(network.config["block_out_channels"]),
        )
        return new.to(base.device, base.dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> LocalAdapter:
        settings = with_heads(checked_config(config))
        return cls(
            network_of(settings),
            settings["conditions"],
            extractor_channels=settings["extractor_channels"],
            feature_channels=settings["feature_channels"],
        )

    def config(self) -> dict[str, Any]:
        network = {key: value for key, value in plain_config(self.network).items() if key not in HINT_SETTINGS}
        return {
            **network,
            "conditions": list(self.names),
            "extractor_channels": self.extractor_channels,
            "feature_channels": self.feature_channels,
        }

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `Control.config_of`, for the released conditions.

        Raises:
            ValueError: the tensors are for another number of conditions, whose names are unknown.
        """
        extractor = f"{FEATURES}.pre_extractor."
        stages = sorted(
            (int(name.split(".")[2]), value.shape)
            for name, value in tensors.items()
            if name.startswith(extractor) and name.endswith(".weight")
        )
        count = stages[0][1][1] // 3
        if count != len(RELEASED):
            raise ValueError(
                f"its {count} conditions are unknown; those of the {len(RELEASED)} released ones are known"
            )
        levels = len({name.split(".")[2] for name in tensors if name.startswith(f"{FEATURES}.extractors.")})
        return {
            **{k: v for k, v in config_of(copied_tensors(tensors), unet_config).items() if k not in HINT_SETTINGS},
            "conditions": list(RELEASED),
            "extractor_channels": [shape[0] for _, shape in stages[::2]],
            "feature_channels": [tensors[f"{FEATURES}.zero_convs.{level}.weight"].shape[0] for level in range(levels)],
        }

    @classmethod
    def class_of(cls, config: Mapping[str, Any] | None) -> type[Control]:
        names = (config or {}).get("conditions")
        known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        return _with_inputs(cls, tuple(cast(list[str], names))) if known else cls

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {NETWORK, FEATURES} == {name.partition(".")[0] for name in tensors}

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        return missing_heads(config)

    # Conditions

    @property
    def conditions(self) -> tuple[str, ...]:
        if self.condition is not None:
            return (self.condition,)
        known = conditions.registry()
        return tuple(name for name in self.names if name in known)

    def for_condition(self, condition: str) -> LocalAdapter:
        """The same network that takes one image, of this condition; the others are missing.

        Raises:
            UserError: it has no such condition.
        """
        if condition not in self.names:
            raise UserError(
                f"the control has no condition {condition!r}{nearest(condition, self.names)}", "unknown-name"
            )
        view = copy.copy(self)  # shares all modules
        view.condition, view.inputs = condition, (Input(),)
        return view

    # Computation

    def encode(self, inputs: Tensor | Mapping[str, Any], base: Base) -> Hint:
        """Compute the scales and shifts of the normalised streams.

        Args:
            inputs: condition images `[B, 3, H, W]` in [0, 1]: those of `condition`, or by name, at least one of
                `names`.

        Returns:
            `LEVEL.0` and `LEVEL.1` `[B, 2 C, h, w]` for both norms of each level: scales, then shifts.

        Raises:
            UserError: there is no image.
        """
        images = {cast(str, self.condition): inputs} if isinstance(inputs, Tensor) else dict(inputs)
        if not images:
            raise UserError(
                f"{self.title} needs at least one of its images: {', '.join(self.names)}", "missing-setting"
            )
        weight = next(self.feature_extractor.parameters())
        given = {name: image.to(weight.device, weight.dtype) for name, image in images.items()}
        missing = torch.zeros_like(next(iter(given.values())))
        features = self.feature_extractor(torch.cat([given.get(name, missing) for name in self.names], 1))
        return {
            f"{level}.{place}": norm.modulation(feature)
            for level, (feature, norms) in enumerate(zip(features, self._norms(), strict=True))
            for place, norm in enumerate(norms)
        }

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None and not isinstance(hint, Tensor)
        every = [
            (norm, hint[f"{level}.{place}"])
            for level, norms in enumerate(self._norms())
            for place, norm in enumerate(norms)
        ]
        for norm, modulation in every:
            norm.current = modulation
        nothing = x_t.new_zeros(())  # in place of a hint that is added to the first convolution's output
        down, middle = self.network(x_t, t, **unet_inputs(text), controlnet_cond=nothing, return_dict=False)
        if not torch.is_grad_enabled():  # else gradient checkpointing reads them again, in the backward pass
            for norm, _ in every:
                norm.current = None
        return Residuals.numbered("skip", down, middle=middle)

    def _norms(self) -> list[tuple[Denormalisation, Denormalisation]]:
        return [(block.resnets[0].norm1, block.resnets[0].norm2) for block in self.network.down_blocks]

    def incompatibility(self, base: Base) -> str | None:
        stages = [*self.extractor_channels, self.feature_channels[0]]
        return copy_incompatibility(self.config(), base) or hint_incompatibility(stages, base)

    # Training

    @classmethod
    def for_training(
        cls,
        base: Base,
        conditions: Sequence[str],
        options: Mapping[str, Any],
        *,
        name: str,
        seed: int,
        start: Control | None = None,
        companion: Control | None = None,
    ) -> Control:
        """A new one for these conditions, or `start`.

        Raises:
            UserError: `start` has other conditions.
        """
        if start is None:
            torch.manual_seed(seed)
            start = cls.for_base(base, names=conditions)
        assert isinstance(start, LocalAdapter)
        if start.names != tuple(conditions):
            raise UserError(
                f"the control to start from has the conditions {', '.join(start.names)}, not {', '.join(conditions)}",
                "contradiction",
            )
        start.condition_drop = TrainingOptions(**{**options, "start": None}).condition_drop
        return start.requires_grad_(True).train()

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def copied_network(self) -> nn.Module:
        return self.network

    def copied_from(self, base: Base) -> Mapping[str, Tensor]:
        tensors = dict(base.unet.state_dict())
        for level in range(len(self.network.down_blocks)):
            for norm in (f"down_blocks.{level}.resnets.0.norm{number}" for number in (1, 2)):
                if f"{norm}.weight" in tensors:
                    tensors[f"{norm}.conv_gamma.bias"] = tensors[f"{norm}.weight"] - 1
                    tensors[f"{norm}.conv_beta.bias"] = tensors[f"{norm}.bias"]
        return tensors

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {"conditions": ", ".join(config["conditions"])}

    def parameter_counts(self) -> dict[str, int]:
        norms = [norm for pair in self._norms() for norm in pair]
        parts: dict[str, list[nn.Module]] = {"extractor": [self.feature_extractor], "denormalisation": [*norms]}
        counts = {
            name: sum(parameter.numel() for module in modules for parameter in module.parameters())
            for name, modules in parts.items()
        }
        return {**super().parameter_counts(), **counts}

    @classmethod
    def usage(cls, file: str, base: str, condition: str | None) -> list[str]:
        example = json.dumps({cls.inputs[0].name: "photo.png"})
        names = ", ".join(entry.name for entry in cls.inputs)
        return [
            f'    controlkit generate "PROMPT" --base {base} --control {file}=INPUTS.json --seeds 4',
            "",
            f"`INPUTS.json` has one image or several, such as `{example}`, of: {names}.",
        ]


class Denormalisation(nn.Module):
    """Feature denormalisation: a group norm whose scale and shift are convolutions of the conditions' features.

    Args:
        norm: the norm that it replaces; its weights are the initial biases.
        features: number of channels of the features.
    """

    def __init__(self, norm: nn.GroupNorm, features: int) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.conv_gamma = nn.Conv2d(features, norm.num_channels, 3, padding=1)
        self.conv_beta = nn.Conv2d(features, norm.num_channels, 3, padding=1)
        with torch.no_grad():
            cast(Tensor, self.conv_gamma.bias).copy_(norm.weight - 1)
            cast(Tensor, self.conv_beta.bias).copy_(norm.bias)
        self.current: Tensor | None = None
        """The modulation `[B, 2 C, h, w]` of the current call."""

    def modulation(self, features: Tensor) -> Tensor:
        """Features `[B, F, h, w]` => scales and shifts `[B, 2 C, h, w]`."""
        return torch.cat([1 + self.conv_gamma(features), self.conv_beta(features)], 1)

    def forward(self, stream: Tensor) -> Tensor:
        """The stream `[B, C, h, w]`, normalised, scaled and shifted."""
        assert self.current is not None
        scale, shift = self.current.chunk(2, 1)
        return functional.group_norm(stream, self.groups, eps=self.eps) * scale + shift


class FeatureExtractor(nn.Module):
    """Condition images `[B, C, H, W]` => features at each resolution of the base, initially zero.

    Args:
        channels: C, three for each condition.
        before: channels of the convolutions before the first features; each entry after the first halves the
            resolution.
        features: channels of the features; each entry halves the resolution.
    """

    def __init__(self, channels: int, before: Sequence[int], features: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, before[0], 3, padding=1), nn.SiLU()]
        for width, following in pairwise(before):
            layers += [nn.Conv2d(width, following, 3, padding=1, stride=2), nn.SiLU()]
            layers += [nn.Conv2d(following, following, 3, padding=1), nn.SiLU()]
        self.pre_extractor = nn.Sequential(*layers)
        self.extractors = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, following, 3, padding=1, stride=2), nn.SiLU())
            for width, following in pairwise([before[-1], *features])
        )
        self.zero_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in features)
        for parameter in self.zero_convs.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The features `[B, F, h, w]`, from the finest resolution to the coarsest."""
        stream, features = self.pre_extractor(images), []
        for extractor, convolution in zip(self.extractors, self.zero_convs, strict=True):
            stream = extractor(stream)
            features.append(convolution(stream))
        return features


def inputs_for(names: Sequence[str]) -> tuple[Input, ...]:
    """One optional image per condition; a single one is required."""
    return tuple(Input(name=name, condition=name, required=len(names) == 1) for name in names)


@cache
def _with_inputs(kind: type[LocalAdapter], names: tuple[str, ...]) -> type[LocalAdapter]:
    return type(kind.__name__, (kind,), {"inputs": inputs_for(names), "__doc__": kind.__doc__})


def _feature_channels(channels: Sequence[int]) -> list[int]:
    """Channels of the features of a UNet: those of the original, in proportion to the first resolution's channels."""
    paper = [*FEATURE_CHANNELS, *[FEATURE_CHANNELS[-1]] * len(channels)]
    return [max(8, 8 * round(width * channels[0] / 320 / 8)) for width in paper[: len(channels)]]
