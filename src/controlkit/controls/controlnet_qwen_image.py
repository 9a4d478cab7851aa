"""ControlNet for Qwen-Image on diffusers' `QwenImageControlNetModel`, as InstantX's.

The first blocks of the transformer, copied, run beside it on the noisy latent plus that of the condition. Each of their
outputs is added after a run of the base's blocks (diffusers, models/transformers/transformer_qwenimage.py): with 5
outputs and 60 blocks, after twelve blocks each. InstantX's union follows canny, soft edges, depth and pose, and is not
told which; its ControlNet for inpainting reads a masked image and the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.flux import pack
from controlkit.bases.qwen_image import PACK, prompt_and_positions
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.controls.control import Control, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import Input, check_range
from controlkit.controls.registry import control
from controlkit.controls.transformer_control import (
    BASE_BLOCKS,
    TransformerCopy,
    count_of,
    spread,
    used_of,
    with_weights_of,
)
from controlkit.errors import UserError

QWEN_IMAGE_BLOCKS = 60
"""Blocks of Qwen-Image."""
_HEAD_WIDTH, _ROPE = 128, (16, 56, 56)
"""Channels of an attention head in Qwen-Image, and of the rotary embedding of each coordinate."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet for Qwen-Image."""

    num_layers: int = 5
    """Blocks copied from the base, from the first on (5 in InstantX's); fewer if fewer are used: each output follows
    as many of the base's blocks, rounded up, so of 60 blocks 11 use 10 outputs."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; expected 1 or more", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet for Qwen-Image."""

    start: str | None = None
    """Initial weights: such a ControlNet in any format. Default: a copy of the base's first blocks."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


@control
class ControlNetQwenImage(TransformerCopy):
    """A trainable copy of the first blocks of the base's transformer, joined to it by zero-initialised linear layers.

    Args:
        base_blocks: number of the base's blocks.
    """

    kind: ClassVar[str] = "controlnet-qwen-image"
    title: ClassVar[str] = "a ControlNet for Qwen-Image"
    paper: ClassVar[str] = "Zhang, Rao and Agrawala 2023, arXiv 2302.05543"
    transformer = QwenImageTransformer2DModel
    family_title: ClassVar[str] = "Qwen-Image"
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    one_prompt: ClassVar[bool] = True
    enters: ClassVar[str] = "after the transformer's blocks"
    Options = Options
    diffusers_class: ClassVar[str | None] = "QwenImageControlNetModel"
    trainings = (
        Training(
            system="controlnet-qwen-image",
            also=("controlnet-qwen-image-pairs",),
            options=Start,
            doc="A ControlNet for Qwen-Image, one condition.",
        ),
    )

    def __init__(
        self,
        network: QwenImageControlNetModel,
        condition: str | None = None,
        *,
        base_blocks: int = QWEN_IMAGE_BLOCKS,
    ) -> None:
        super().__init__()
        self.network = network
        self.condition = condition
        self.base_blocks = base_blocks
        self.inputs = _inputs(network.config)

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, num_layers: int = 5, **options: Any
    ) -> ControlNetQwenImage:
        """A new one: the base's first blocks and embeddings copied, all that joins them to the base zero. The options
        are those of `Options`.

        Raises:
            UserError: the base has another network, or `num_layers` is below 1.
        """
        transformer = cls.transformer_of(base)
        Options(num_layers=num_layers)  # refuses wrong ones
        blocks = len(transformer.transformer_blocks)
        of_base = plain_config(transformer)
        shared = ("patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads")
        config = {name: of_base[name] for name in (*shared, "joint_attention_dim", "axes_dims_rope")}
        network = QwenImageControlNetModel(**config, num_layers=used_of(num_layers, blocks))
        return cls(with_weights_of(network, transformer, base), condition, base_blocks=blocks)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetQwenImage:
        config = checked_config(config)
        blocks = int(config.pop(BASE_BLOCKS, QWEN_IMAGE_BLOCKS))
        if (extra := config.get("extra_condition_channels") or 0) not in (0, PACK**2):
            raise ValueError(f"extra_condition_channels is {extra}; expected 0, or {PACK**2} for those of a mask")
        return cls(QwenImageControlNetModel.from_config(config).eval(), condition, base_blocks=blocks)

    def config(self) -> dict[str, Any]:
        config = plain_config(self.network)
        if self.base_blocks != QWEN_IMAGE_BLOCKS:
            config[BASE_BLOCKS] = self.base_blocks
        return config

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        width, channels = tensors["img_in.weight"].shape
        if width % _HEAD_WIDTH:
            raise ValueError(f"its width {width} is no multiple of {_HEAD_WIDTH}, the channels of an attention head")
        return {
            "patch_size": PACK,
            "in_channels": channels,
            "out_channels": channels // PACK**2,
            "num_layers": count_of(tensors, "controlnet_blocks"),
            "attention_head_dim": _HEAD_WIDTH,
            "num_attention_heads": width // _HEAD_WIDTH,
            "joint_attention_dim": tensors["txt_in.weight"].shape[1],
            "axes_dims_rope": list(_ROPE),
            "extra_condition_channels": tensors["controlnet_x_embedder.weight"].shape[1] - channels,
        }

    @classmethod
    def class_of(cls, config: Mapping[str, Any] | None) -> type[Control]:
        return _InpaintingQwenImage if len(_inputs(config or {})) > 1 else cls

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {"controlnet_x_embedder.weight", "img_in.weight", "controlnet_blocks.0.weight"} <= set(tensors)

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_file_state(state)
        # Its rotary embeddings are no buffers: those of a network that was built on the meta device have no values.
        old = self.network.pos_embed
        if old.pos_freqs.is_meta:
            self.network.pos_embed = type(old)(theta=old.theta, axes_dim=old.axes_dim, scale_rope=old.scale_rope)

    # Computation

    @torch.no_grad()
    def encode(self, inputs: Any, base: Base) -> Tensor:
        """The tokens of the latents of condition images, `[B, h / 2 * w / 2, 4 * C]`: the mode of the posterior, of
        which diffusers draws a sample. Of one for inpainting the latents are those of the image with black where it is
        inpainted, and one more channel says where it is kept.

        Args:
            inputs: condition images `[B, 3, H, W]` in [0, 1]; of one for inpainting a mapping with `image` and `mask`
                (white where to inpaint).

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base.
        """
        given = {"image": inputs} if isinstance(inputs, Tensor) else inputs
        for image in given.values():
            base.check_size(image.shape[-1], image.shape[-2])
            check_range(image)
        pixels = given["image"] * 2 - 1
        if len(self.inputs) > 1 and "mask" not in given:
            raise UserError(f"{self.title} for inpainting needs a mask beside the image", "missing-setting")
        if "mask" not in given:
            hint = base.encode_image(pixels)
        else:
            kept = given["mask"][:, :1] <= 0.5
            latents = base.encode_image(torch.where(kept, pixels, -1.0))
            small = nn.functional.interpolate(kept.to(latents), latents.shape[-2:])
            hint = torch.cat([latents, small.expand(len(latents), -1, -1, -1)], 1)
        return pack(hint).to(self.network.img_in.weight)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None
        outputs = self.network(
            pack(x_t),
            controlnet_cond=hint,
            timestep=(t.expand(len(x_t)) / 1000).to(x_t.dtype),
            **prompt_and_positions(self.network, x_t, text),
            return_dict=False,
        )
        return Residuals(spread("block", outputs or (), self.base_blocks))

    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        own, of_base = self.network.config, transformer.config
        return {
            "channels": (self.network.inner_dim, transformer.inner_dim),
            "blocks of the base": (self.base_blocks, len(transformer.transformer_blocks)),
            "channels of a token": (own["in_channels"], of_base.in_channels),
            "text width": (own["joint_attention_dim"], of_base.joint_attention_dim),
        }

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
        """As `Control.for_training`.

        Raises:
            UserError: `start` reads a mask, which pairs do not have.
        """
        if start is not None and len(cast(ControlNetQwenImage, start).inputs) > 1:
            raise UserError(
                "start is a ControlNet for inpainting, which cannot be trained further: pairs have no masks",
                "unsupported",
            )
        return super().for_training(base, conditions, options, name=name, seed=seed, start=start, companion=companion)

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        width, blocks = config["num_attention_heads"] * config["attention_head_dim"], config.get(BASE_BLOCKS)
        return f"a Qwen-Image whose transformer has {blocks or QWEN_IMAGE_BLOCKS} blocks of {width} channels"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {"blocks": f"{config['num_layers']}, for the {config.get(BASE_BLOCKS, QWEN_IMAGE_BLOCKS)} of the base"}


class _InpaintingQwenImage(ControlNetQwenImage):
    """One that reads a masked image."""

    __doc__ = ControlNetQwenImage.__doc__
    inputs = (Input(condition="identity"), Input(name="mask", condition="identity"))


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    return _InpaintingQwenImage.inputs if config.get("extra_condition_channels") else (Input(),)
