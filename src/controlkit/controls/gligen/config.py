"""Settings of a GLIGEN's network: those of its base's UNet, and two of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlkit.controls.encoder_copy.network import HEADS
from controlkit.controls.gligen.boxes import MAX_OBJECTS

PHRASE_WIDTH = "phrase_width"
"""controlkit's own setting: width of the text vectors of phrases."""
OBJECTS = "max_objects"
"""controlkit's own setting: number of grounding tokens. All other settings are those of the base's UNet."""
_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "block_out_channels": None,
    "layers_per_block": None,
    "down_block_types": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": None,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": None,
    HEADS: None,
    "num_attention_heads": None,
}
"""Settings of the base's UNet on which the network depends, with diffusers' defaults."""


def config_for(unet_config: Mapping[str, Any], phrase_width: int, max_objects: int = MAX_OBJECTS) -> dict[str, Any]:
    """The config of a network for a UNet.

    Args:
        phrase_width: width of the text vectors of phrases.
        max_objects: number of grounding tokens.
    """
    config = {name: unet_config.get(name, default) for name, default in _DEFAULTS.items()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    # Inpainting models take more channels; a control does not see them.
    return {**plain, "in_channels": _DEFAULTS["in_channels"] if plain["in_channels"] == 9 else plain["in_channels"]} | {
        PHRASE_WIDTH: phrase_width,
        OBJECTS: max_objects,
    }


def max_objects_of(config: Mapping[str, Any]) -> int:
    """Number of grounding tokens of a config; without the setting, as in older files, that of published models.

    Raises:
        ValueError: it is not 1 to 30.
    """
    number = int(config.get(OBJECTS, MAX_OBJECTS))
    if not 1 <= number <= MAX_OBJECTS:
        raise ValueError(f"{OBJECTS} is {number}; expected 1 to {MAX_OBJECTS}")
    return number
