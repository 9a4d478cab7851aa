"""A control system of your own in one file.

    export CONTROLKIT_CONTROLS=examples/my_control.py
    controlkit inspect modulation --base nano
    controlkit train recipe.yaml                # system: modulation, or modulation-pairs

All verbs know it then: `train`, `generate`, `evaluate`, `convert`, `inspect`. See docs/systems.md.

It scales and shifts the hidden states of the base's decoder at every position of the condition image (after SPADE, Park
et al. 2019, arXiv 1903.07291); the prompt gates the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pixel_unshuffle

from controlkit.bases.base import Base, Text
from controlkit.controls.control import Acts, OneImage, Reads
from controlkit.controls.file_format import renaming
from controlkit.controls.registry import control


@dataclass(frozen=True, kw_only=True)
class Options:
    """Recipe settings of a modulation."""

    width: int = 32
    """Channels of the features."""


@control
class Modulation(OneImage):
    """Condition image and prompt -> a scale and a shift for each hidden state of the decoder."""

    kind = "modulation"
    title = "a modulation"
    reads = Reads.TEXT
    acts = Acts.TAPS
    enters = "the decoder's hidden states"
    Options = Options
    hint_is_frozen = True  # `encode` has no weights
    formats = (
        renaming(
            name="spade",
            description="the names of your own training script",
            title="a modulation",
            prefixes={"features.": "trunk.", "gate.": "text_gate.", "heads.": "spade."},
        ),
    )

    def __init__(self, config: Mapping[str, Any], condition: str | None = None) -> None:
        super().__init__()
        self.condition = condition
        width = config["width"]
        self.features = nn.Sequential(
            nn.Conv2d(config["hint_channels"], width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
        )
        self.gate = nn.Linear(config["text_width"], width)
        self.heads = nn.ModuleList(nn.Conv2d(width, 2 * channels, 3, padding=1) for channels in config["channels"])
        for head in self.heads:  # a new control leaves the base unchanged
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    # Computation

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] => `[B, 3 f^2, H / f, W / f]`, the size of the latent."""
        return pixel_unshuffle(condition_image, base.factor).to(self.gate.weight)

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Any) -> dict[str, Any]:
        gate = self.gate(text.tokens.mean(1))
        features = self.features(hint) * gate[:, :, None, None]

        def modulate(stream: Tensor, head: nn.Module) -> Tensor:
            scale, shift = head(adaptive_avg_pool2d(features, stream.shape[2:])).chunk(2, 1)
            return stream * scale + shift

        # The default argument binds `head` per iteration.
        return {
            f"decoder.{place}": lambda stream, head=head: modulate(stream, head)
            for place, head in enumerate(self.heads)
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    # Construction

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None, *, width: int = 32, **options: Any) -> Modulation:
        config = {
            "width": width,
            "hint_channels": 3 * base.factor**2,
            "text_width": base.unet.config.cross_attention_dim,
            "channels": _decoder_of(base),
        }
        return cls(config, condition).to(base.device, base.dtype)

    def config(self) -> dict[str, Any]:
        return self.config_of(self.state_dict())

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> Modulation:
        return cls(config, condition)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Inferred from shapes, so that files without metadata can be read."""
        heads = sum(name.startswith("heads.") and name.endswith(".weight") for name in tensors)
        width, hint_channels = tensors["features.0.weight"].shape[:2]
        return {
            "width": width,
            "hint_channels": hint_channels,
            "text_width": tensors["gate.weight"].shape[1],
            "channels": [tensors[f"heads.{place}.weight"].shape[0] // 2 for place in range(heads)],
        }

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {"features.0.weight", "gate.weight", "heads.0.weight"} <= set(tensors)

    def incompatibility(self, base: Base) -> str | None:
        channels, base_channels = self.config()["channels"], _decoder_of(base)
        if channels != base_channels:
            return f"its decoder channels: {channels}, the base's: {base_channels}"
        width, base_width = self.gate.in_features, base.unet.config.cross_attention_dim
        return None if width == base_width else f"its text width: {width}, the base's: {base_width}"


def _decoder_of(base: Base) -> list[int]:
    """Channels of the stream before each decoder block, from the base's points."""
    points = [point for name, point in base.points.items() if name.startswith("decoder.")]
    return [point.channels for point in points if point.channels is not None]
