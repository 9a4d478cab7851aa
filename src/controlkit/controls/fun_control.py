"""alibaba-pai's Fun ControlNets: what those of Qwen-Image and FLUX.2 share.

Copies of some blocks of the base's transformer run on the base's image tokens plus those of the condition's latent, and
on the base's prompt, before the base's own blocks do. Each of their outputs is added after the block of which it is a
copy (aigc-apps/VideoX-Fun, videox_fun/models/*_control.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.taps import TapFunction
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, Control, Reads
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import Input
from controlkit.controls.masked_image import INPAINTING, latents_of
from controlkit.controls.transformer_control import BASE_BLOCKS, TransformerCopy, count_of
from controlkit.errors import UserError

HEAD_WIDTH = 128
"""Channels of an attention head in the released models."""
_MASK_POSITIONS = 4
"""Positions of the autoencoder in a token, each with one channel of a mask."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a Fun ControlNet."""

    num_layers: int
    """Blocks copied from the base, evenly spaced from the first on."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; expected 1 or more", "out-of-range")


class FunNetwork(ModelMixin, ConfigMixin):
    """The copied blocks, with a layer for the output of each and one for the condition's tokens before the first, and
    the embedder of these tokens. A subclass makes them."""

    _supports_gradient_checkpointing = True
    family: ClassVar[str]
    """Name of the copied blocks in a file."""

    control_img_in: nn.Linear
    gradient_checkpointing = False

    @property
    def width(self) -> int:
        """Channels of a token of the base."""
        return self.control_img_in.out_features

    @property
    def blocks(self) -> Sequence[Any]:
        """The copied blocks."""
        return list(getattr(self, self.family))

    def forward(self, condition: Tensor, stream: Tensor, prompt: Tensor, others: Sequence[Any]) -> list[Tensor]:
        """One output for each block.

        Args:
            condition: tokens `[B, n, control_in_dim]`.
            stream: the base's image tokens before its first block, `[B, n, width]`.
            prompt: its prompt tokens `[B, m, width]`.
            others: further arguments of a block.
        """
        blocks = self.blocks
        tokens = blocks[0].before_proj(self.control_img_in(condition)) + stream
        outputs = []
        for block in blocks:
            recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
            call = partial(self._gradient_checkpointing_func, block) if recomputes else block
            prompt, tokens = call(tokens, prompt, *others)
            outputs.append(block.after_proj(tokens))
        return outputs


class FunControl(TransformerCopy):
    """Copies of blocks of the base's transformer, joined to it by zero-initialised linear layers.

    It runs inside the base's forward pass, whose tokens it reads.

    Args:
        base_blocks: number of the base's blocks; default: those of the released model.
    """

    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "after the transformer's blocks, whose tokens it reads at every step"
    network_class: ClassVar[type[FunNetwork]]
    released_places: ClassVar[range]
    """The blocks of which the released model has copies, up to the number of the base's blocks."""
    with_masked_image: ClassVar[type[FunControl]]
    """Its subclass that also reads a masked image."""

    network: FunNetwork

    def __init__(self, network: FunNetwork, condition: str | None = None, *, base_blocks: int | None = None) -> None:
        super().__init__()
        self.network = network
        self.condition = condition
        self.base_blocks = self.released_places.stop if base_blocks is None else base_blocks
        self.inputs = _inputs(network.config.control_in_dim)

    @classmethod
    def network_for(cls, transformer: Any, **sizes: Any) -> FunNetwork:
        """A network with the attention heads of the base's transformer.

        Args:
            sizes: its `control_layers` and `control_in_dim`.
        """
        config = transformer.config
        heads = {"num_attention_heads": config.num_attention_heads, "attention_head_dim": config.attention_head_dim}
        return cls.network_class(**sizes, **heads)

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, num_layers: int | None = None, **options: Any
    ) -> FunControl:
        """A new one: blocks of the base copied, all that joins them to the base zero. It has room for a masked image,
        as the released one. The options are those of `Options`.

        Raises:
            UserError: the base has another network, or `num_layers` is below 1.
        """
        transformer = cls.transformer_of(base)
        assert cls.Options is not None
        wanted = cls.Options(**({} if num_layers is None else {"num_layers": num_layers})).num_layers
        blocks = len(transformer.transformer_blocks)
        count = min(wanted, blocks)
        network = cls.network_for(
            transformer,
            control_layers=[place * blocks // count for place in range(count)],
            control_in_dim=2 * transformer.config.in_channels + _MASK_POSITIONS,
        )
        made = cls._of(network)(network, condition, base_blocks=blocks)
        network.load_state_dict(made.copied_from(base), strict=False)
        nn.Module.to(network, base.device, base.dtype)
        return made

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> FunControl:
        config = checked_config(config)
        blocks, places = int(config.pop(BASE_BLOCKS, cls.released_places.stop)), config["control_layers"]
        if not places or places[0] != 0 or places != sorted(set(places)) or places[-1] >= blocks:
            raise ValueError(f"control_layers is {places}; expected rising numbers from 0 to {blocks - 1}")
        network = cls.network_class.from_config(config).eval()
        return cls._of(network)(network, condition, base_blocks=blocks)

    def config(self) -> dict[str, Any]:
        config = plain_config(self.network)
        if self.base_blocks != self.released_places.stop:
            config[BASE_BLOCKS] = self.base_blocks
        return config

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        width, channels = tensors["control_img_in.weight"].shape
        if width % HEAD_WIDTH:
            raise ValueError(f"its width {width} is no multiple of {HEAD_WIDTH}, the channels of an attention head")
        count, places = count_of(tensors, cls.network_class.family), cls.released_places
        if count != len(places):
            raise ValueError(f"it has {count} blocks; their places are known for {len(places)}")
        return {
            "control_layers": list(places),
            "control_in_dim": channels,
            "num_attention_heads": width // HEAD_WIDTH,
            "attention_head_dim": HEAD_WIDTH,
        }

    @classmethod
    def class_of(cls, config: Mapping[str, Any] | None) -> type[Control]:
        channels = (config or {}).get("control_in_dim") or 0
        return cls.with_masked_image if len(_inputs(channels)) > 1 else cls

    @classmethod
    def _of(cls, network: FunNetwork) -> type[FunControl]:
        return cls.with_masked_image if len(_inputs(network.config.control_in_dim)) > 1 else cls

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {"control_img_in.weight", f"{cls.network_class.family}.0.before_proj.weight"} <= set(tensors)

    # Computation

    @abstractmethod
    def tokens_of(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` => tokens `[B, n, D]` as of the base's transformer."""

    @abstractmethod
    def beside_the_image(self, base: Base, x_t: Tensor, t: Tensor, text: Text, stream: Tensor) -> tuple[Tensor, Any]:
        """What a block reads besides image tokens: the base's embedded prompt `[B, m, width]`, and further arguments.

        Args:
            stream: the base's image tokens before its first block.
        """

    @torch.no_grad()
    def encode(self, inputs: Any, base: Base) -> Tensor:
        """The tokens of `latents_of` the condition image, `[B, n, control_in_dim]`; the channels of a masked image are
        zero if there is none.

        Args:
            inputs: condition images `[B, 3, H, W]` in [0, 1], or a mapping with them as `image`, and optionally
                `original` and `mask` (white where to inpaint).

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base, or one of `original` and `mask` is missing.
        """
        tokens = self.tokens_of(latents_of({"image": inputs} if isinstance(inputs, Tensor) else inputs, base))
        missing = self.network.config.control_in_dim - tokens.shape[2]
        return nn.functional.pad(tokens, (0, missing)).to(self.network.control_img_in.weight)

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, TapFunction]:
        """At `block.0.in` all blocks of the control run on the base's tokens; their outputs are added at `block.N`."""
        assert isinstance(hint, Tensor)
        condition, places = hint, self.network.config.control_layers
        # Recomputed blocks overwrite entries by equal values.
        outputs: dict[str, Tensor] = {}

        def follow(stream: Tensor) -> None:
            prompt, others = self.beside_the_image(base, x_t, t, text, stream)
            made = self.network(condition, stream, prompt, others)
            outputs.update({f"block.{place}": each for place, each in zip(places, made, strict=True)})

        def add(point: str, stream: Tensor) -> Tensor:
            return outputs[point]

        return {"block.0.in": follow, **{f"block.{place}": partial(add, f"block.{place}") for place in places}}

    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        of_base, is_masked = transformer.config, len(self.inputs) > 1
        with_masked = 2 * of_base.in_channels + _MASK_POSITIONS
        return {
            "channels": (self.network.width, transformer.inner_dim),
            "attention heads": (self.network.config.num_attention_heads, of_base.num_attention_heads),
            "blocks of the base": (self.base_blocks, len(transformer.transformer_blocks)),
            "channels of a token": (
                self.network.config.control_in_dim,
                with_masked if is_masked else of_base.in_channels,
            ),
        }

    # Training

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": len(config["control_layers"])}

    def copied_from(self, base: Base) -> Mapping[str, Tensor]:
        blocks = base.denoiser.transformer_blocks
        return {
            f"{self.network.family}.{place}.{name}": tensor
            for place, of_base in enumerate(self.network.config.control_layers)
            for name, tensor in blocks[of_base].state_dict().items()
        }

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        width, blocks = config["num_attention_heads"] * config["attention_head_dim"], config.get(BASE_BLOCKS)
        count = blocks or cls.released_places.stop
        return f"a {cls.family_title} whose transformer has {count} {cls.blocks_title} of {width} channels"

    blocks_title: ClassVar[str] = "blocks"
    """The base's blocks that are copied, in text."""

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        blocks, places = config.get(BASE_BLOCKS, cls.released_places.stop), config["control_layers"]
        return {
            "blocks": f"{len(places)}, whose outputs are added after blocks {', '.join(map(str, places))} of {blocks}"
        }


def zero(layer: nn.Linear) -> nn.Linear:
    """The layer, initialised to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _inputs(channels: int) -> tuple[Input, ...]:
    """Of tokens with C channels, or C of the condition, 4 of a mask and C of a masked image; C is a multiple of 8."""
    return (Input(), *INPAINTING) if channels // _MASK_POSITIONS % 2 else (Input(),)
