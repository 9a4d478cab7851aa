"""alibaba-pai's Fun ControlNet Union for Qwen-Image-2512.

Copies of some blocks of the base's transformer run on the base's image tokens plus those of the condition's latent, and
on the base's prompt, before the base's own blocks do. Each of their outputs is added after the block of which it is a
copy (aigc-apps/VideoX-Fun, videox_fun/models/qwenimage_transformer2d_control.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin, QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.flux import pack
from controlkit.bases.qwen_image import PACK, QwenImage, prompt_and_positions
from controlkit.bases.taps import TapFunction
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, Control, Reads, Training
from controlkit.controls.controlnet_qwen_image import BASE_BLOCKS, QWEN_IMAGE_BLOCKS
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import Input
from controlkit.controls.masked_image import INPAINTING, latents_of
from controlkit.controls.registry import control
from controlkit.controls.transformer_control import TransformerCopy, count_of
from controlkit.errors import UserError

_HEAD_WIDTH = 128
"""Channels of an attention head in Qwen-Image."""
_PLACES = {5: range(0, 60, 12)}
"""Number of copied blocks -> the blocks after which their outputs are added, of the released file."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a Fun ControlNet for Qwen-Image."""

    num_layers: int = 5
    """Blocks copied from the base, evenly spaced from the first on (5 in the released one)."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; expected 1 or more", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a Fun ControlNet for Qwen-Image."""

    start: str | None = None
    """Initial weights: such a ControlNet. Default: copies of the base's blocks."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


class Block(QwenImageTransformerBlock):
    """A block of the base with a layer for its output, and one for the condition's tokens if it is the first."""

    def __init__(self, *, is_first: bool, **sizes: int) -> None:
        super().__init__(**sizes)
        if is_first:
            self.before_proj = _zero(nn.Linear(self.dim, self.dim))
        self.after_proj = _zero(nn.Linear(self.dim, self.dim))


class Network(ModelMixin, ConfigMixin):
    """The copied blocks and the embedder of the condition's tokens.

    Args:
        control_layers: blocks of the base that are copied, from 0 on.
        control_in_dim: channels of a token of the condition.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self, control_layers: list[int], control_in_dim: int, num_attention_heads: int, attention_head_dim: int
    ) -> None:
        super().__init__()
        self.width = num_attention_heads * attention_head_dim
        sizes = {"num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim}
        blocks = [Block(is_first=place == 0, dim=self.width, **sizes) for place in range(len(control_layers))]
        self.control_blocks = nn.ModuleList(blocks)
        self.control_img_in = nn.Linear(control_in_dim, self.width)
        self.gradient_checkpointing = False

    def forward(
        self, condition: Tensor, stream: Tensor, prompt: Tensor, mask: Tensor | None, time: Tensor, rotation: Any
    ) -> list[Tensor]:
        """One output for each block.

        Args:
            condition: tokens `[B, n, control_in_dim]`.
            stream: the base's image tokens before its first block, `[B, n, width]`.
            prompt: its prompt tokens `[B, m, width]`.
            mask: which of these are read, `bool [B, m]`; None for all.
            time: its time embedding `[B, width]`.
            rotation: rotary embeddings of image and prompt.
        """
        blocks: list[Any] = list(self.control_blocks)
        tokens = blocks[0].before_proj(self.control_img_in(condition)) + stream
        outputs = []
        for block in blocks:
            recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
            call = partial(self._gradient_checkpointing_func, block) if recomputes else block
            prompt, tokens = call(tokens, prompt, mask, time, rotation)
            outputs.append(block.after_proj(tokens))
        return outputs


@control
class ControlNetQwenImageFun(TransformerCopy):
    """Copies of blocks of the base's transformer, joined to it by zero-initialised linear layers.

    It runs inside the base's forward pass, whose tokens it reads.

    Args:
        base_blocks: number of the base's blocks.
    """

    kind: ClassVar[str] = "controlnet-qwen-image-fun"
    title: ClassVar[str] = "a Fun ControlNet for Qwen-Image"
    paper: ClassVar[str] = "alibaba-pai 2026, github.com/aigc-apps/VideoX-Fun"
    transformer = QwenImageTransformer2DModel
    family_title: ClassVar[str] = "Qwen-Image"
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "after the transformer's blocks, whose tokens it reads at every step"
    Options = Options
    trainings = (
        Training(
            system="controlnet-qwen-image-fun",
            also=("controlnet-qwen-image-fun-pairs",),
            options=Start,
            doc="A Fun ControlNet for Qwen-Image, one condition.",
        ),
    )

    def __init__(self, network: Network, condition: str | None = None, *, base_blocks: int = QWEN_IMAGE_BLOCKS) -> None:
        super().__init__()
        self.network = network
        self.condition = condition
        self.base_blocks = base_blocks
        self.inputs = _inputs(network.config.control_in_dim)

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, num_layers: int = 5, **options: Any
    ) -> ControlNetQwenImageFun:
        """A new one: blocks of the base copied, all that joins them to the base zero. It has room for a masked image,
        as the released one. The options are those of `Options`.

        Raises:
            UserError: the base has another network, or `num_layers` is below 1.
        """
        transformer = cls.transformer_of(base)
        Options(num_layers=num_layers)  # refuses wrong ones
        blocks = len(transformer.transformer_blocks)
        count = min(num_layers, blocks)
        network = Network(
            control_layers=[place * blocks // count for place in range(count)],
            control_in_dim=PACK**2 * (2 * base.latent_channels + 1),
            num_attention_heads=transformer.config.num_attention_heads,
            attention_head_dim=transformer.config.attention_head_dim,
        )
        made = _kind_of(network)(network, condition, base_blocks=blocks)
        network.load_state_dict(made.copied_from(base), strict=False)
        nn.Module.to(network, base.device, base.dtype)
        return made

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetQwenImageFun:
        config = checked_config(config)
        blocks, places = int(config.pop(BASE_BLOCKS, QWEN_IMAGE_BLOCKS)), config["control_layers"]
        if not places or places[0] != 0 or places != sorted(set(places)) or places[-1] >= blocks:
            raise ValueError(f"control_layers is {places}; expected rising numbers from 0 to {blocks - 1}")
        network = Network.from_config(config).eval()
        return _kind_of(network)(network, condition, base_blocks=blocks)

    def config(self) -> dict[str, Any]:
        config = plain_config(self.network)
        if self.base_blocks != QWEN_IMAGE_BLOCKS:
            config[BASE_BLOCKS] = self.base_blocks
        return config

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        width, channels = tensors["control_img_in.weight"].shape
        if width % _HEAD_WIDTH:
            raise ValueError(f"its width {width} is no multiple of {_HEAD_WIDTH}, the channels of an attention head")
        count = count_of(tensors, "control_blocks")
        if count not in _PLACES:
            raise ValueError(f"it has {count} blocks; their places are known for {', '.join(map(str, _PLACES))}")
        return {
            "control_layers": list(_PLACES[count]),
            "control_in_dim": channels,
            "num_attention_heads": width // _HEAD_WIDTH,
            "attention_head_dim": _HEAD_WIDTH,
        }

    @classmethod
    def class_of(cls, config: Mapping[str, Any] | None) -> type[Control]:
        return _Inpainting if len(_inputs((config or {}).get("control_in_dim") or 0)) > 1 else cls

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {"control_img_in.weight", "control_blocks.0.before_proj.weight"} <= set(tensors)

    # Computation

    @torch.no_grad()
    def encode(self, inputs: Any, base: Base) -> Tensor:
        """The tokens of `latents_of` the condition image, `[B, h / 2 * w / 2, control_in_dim]`; the channels of a
        masked image are zero if there is none.

        Args:
            inputs: condition images `[B, 3, H, W]` in [0, 1], or a mapping with them as `image`, and optionally
                `original` and `mask` (white where to inpaint).

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base, or one of `original` and `mask` is missing.
        """
        latents = latents_of({"image": inputs} if isinstance(inputs, Tensor) else inputs, base)
        channels = self.network.config.control_in_dim // PACK**2
        latents = nn.functional.pad(latents, (0, 0, 0, 0, 0, channels - latents.shape[1]))
        return pack(latents).to(self.network.control_img_in.weight)

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, TapFunction]:
        """At `block.0.in` all blocks of the control run on the base's tokens; their outputs are added at `block.N`."""
        assert isinstance(base, QwenImage) and isinstance(hint, Tensor)
        transformer, told = base.transformer, prompt_and_positions(base.transformer, x_t, text)
        # Recomputed blocks overwrite entries by equal values.
        outputs: dict[str, Tensor] = {}

        def follow(stream: Tensor) -> None:
            prompt = transformer.txt_in(transformer.txt_norm(told["encoder_hidden_states"]))
            rotation = transformer.pos_embed(told["img_shapes"], device=stream.device, max_txt_seq_len=prompt.shape[1])
            mask, time = told["encoder_hidden_states_mask"], base.embed_time(x_t, t, text)
            made = self.network(hint, stream, prompt, mask, time, rotation)
            outputs.update(
                {f"block.{place}": each for place, each in zip(self.network.config.control_layers, made, strict=True)}
            )

        def add(point: str, stream: Tensor) -> Tensor:
            return outputs[point]

        points = [f"block.{place}" for place in self.network.config.control_layers]
        return {"block.0.in": follow, **{point: partial(add, point) for point in points}}

    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        of_base, is_masked = transformer.config, len(self.inputs) > 1
        with_masked = 2 * of_base.in_channels + PACK**2
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
            f"control_blocks.{place}.{name}": tensor
            for place, of_base in enumerate(self.network.config.control_layers)
            for name, tensor in blocks[of_base].state_dict().items()
        }

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        width, blocks = config["num_attention_heads"] * config["attention_head_dim"], config.get(BASE_BLOCKS)
        return f"a Qwen-Image whose transformer has {blocks or QWEN_IMAGE_BLOCKS} blocks of {width} channels"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        blocks, places = config.get(BASE_BLOCKS, QWEN_IMAGE_BLOCKS), config["control_layers"]
        return {
            "blocks": f"{len(places)}, whose outputs are added after blocks {', '.join(map(str, places))} of {blocks}"
        }


class _Inpainting(ControlNetQwenImageFun):
    """One that also reads a masked image."""

    __doc__ = ControlNetQwenImageFun.__doc__
    inputs = (Input(), *INPAINTING)


def _inputs(channels: int) -> tuple[Input, ...]:
    """Of tokens with C channels of a latent, or C of the condition, one of a mask and C of a masked image."""
    return (Input(), *INPAINTING) if channels // PACK**2 % 2 else (Input(),)


def _kind_of(network: Network) -> type[ControlNetQwenImageFun]:
    return _Inpainting if len(_inputs(network.config.control_in_dim)) > 1 else ControlNetQwenImageFun


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
