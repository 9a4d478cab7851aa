"""The contract of a control: what it reads decides when it runs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from enum import Enum, Flag, auto
from typing import Any, ClassVar

from torch import Tensor, nn

from controlkit.bases.base import Base, Text
from controlkit.bases.residuals import Residuals


class Reads(Flag):
    """What a control's residuals depend on besides the condition image and its own weights."""

    NOTHING = 0
    """Computed once for a condition."""
    NOISE = auto()
    """The noisy latent x_t: computed at every step for every picture."""
    TIME = auto()
    """The time t: computed once for a step, shared by all pictures if NOISE is absent."""
    TEXT = auto()
    """The prompt: computed for both halves of classifier-free guidance."""


class Site(Enum):
    """Where residuals enter the base."""

    DECODER_SKIPS = "decoder skips and middle"
    ENCODER_STAGES = "encoder stages"


class Control(nn.Module, ABC):
    """Condition image -> hint -> residuals for a base.

    At initialisation every residual is exactly zero where the system has zero convolutions, so such a new control
    changes nothing; one without them says how it starts.
    """

    kind: ClassVar[str]
    """Its system's name in files: `controlnet`, `ctrlora`, ..."""
    reads: ClassVar[Reads]
    site: ClassVar[Site]
    condition: str | None
    """Name of the condition that it was trained on (`controlkit.conditions`), or None."""

    @abstractmethod
    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => hint `[B, ...]`, computed once for a condition."""

    @abstractmethod
    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Tensor) -> Residuals:
        """Residuals for noisy latents `x_t` `[B, C, h, w]` at times `t` `[B]` under `text` and `hint`.

        What `reads` does not name may be None, and is not looked at.
        """

    def weights(self) -> Iterable[nn.Parameter]:
        """Every parameter that its residuals depend on."""
        return self.parameters()

    def state(self) -> Hashable:
        """What its residuals depend on besides its weights, its hint and what it reads, such as a choice among them."""
        return None

    @property
    def shared_network(self) -> nn.Module | None:
        """The network that several controls share; those of one network run in one pass (`forward_together`)."""
        return None

    @classmethod
    def forward_together(
        cls, controls: Sequence[Control], t: Tensor, text: Text, hints: Sequence[Tensor]
    ) -> list[Residuals]:
        """The residuals of several controls of one shared network; no control here reads the noise.

        Args:
            t: `[B]`.
            text: of batch `B`.
            hints: one for each control, `[B, ...]`.
        """
        return [control(None, t, text, hint) for control, hint in zip(controls, hints, strict=True)]

    @property
    def conditional_only(self) -> bool:
        """Whether, under guidance, it is meant for the half that has the prompt alone."""
        return False

    def misfit(self, base: Base) -> str | None:
        """Why it cannot steer `base`, in a few words such as "its channels: 3, the base's: 4"; None if it can."""
        return None

    @abstractmethod
    def trainable_parameters(self) -> list[nn.Parameter]:
        """What training changes."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which `from_config` rebuilds the same network."""


def copy_misfit(config: Mapping[str, Any], base: Base) -> str | None:
    """`Control.misfit` of a network of `config` that copies the encoder of a UNet."""
    for key, what in (
        ("in_channels", "latent channels"),
        ("block_out_channels", "channels"),
        ("cross_attention_dim", "text width"),
    ):
        mine, theirs = config.get(key), base.unet.config.get(key)
        if json.dumps(mine) != json.dumps(theirs):
            return f"its {what}: {mine}, the base's: {theirs}"
    mine, theirs = (_each(one.get("layers_per_block"), one) for one in (config, base.unet.config))
    if mine != theirs:
        return f"its layers of each block: {mine}, the base's: {theirs}"
    return None


def _each(layers: Any, config: Mapping[str, Any]) -> list[Any]:
    """A setting that may be one number for all blocks, for each of them."""
    return list(layers) if isinstance(layers, list | tuple) else [layers] * len(config["block_out_channels"])
