"""ControlNet for Stable Diffusion 3 on diffusers' `SD3ControlNetModel`.

The first blocks of the transformer, copied, run beside it on the noisy latent plus the latent of the condition image.
Each of their outputs is added after a run of the base's blocks (diffusers, models/transformers/transformer_sd3.py):
with 12 outputs and 24 blocks, after two blocks each.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.controls.control import OneImage, Reads, Training
from controlkit.controls.controlnet_sd3.formats import FORMATS, ZEROS, config_of
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.file_format import Checkpoint
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import check_range
from controlkit.controls.registry import control
from controlkit.controls.transformer_control import TransformerCopy, with_weights_of
from controlkit.errors import UserError

BASE_LAYERS = "base_layers"
"""controlkit's own setting: blocks of the base, if they are not as many as its attention heads, which they are in all
Stable Diffusion 3."""
PIXELS = "pixels"
"""controlkit's own setting: [factor, offset] from a condition image in [0, 1] to the autoencoder's input, if it is not
`USUAL_PIXELS`."""
USUAL_PIXELS = (2.0, -1.0)
STABILITY_CANNY_PIXELS = (127.5, 0.5)
"""`image * 255 * 0.5 + 0.5`, for the canny ControlNet of Stable Diffusion 3.5 large (Stability-AI/sd3.5,
sd3_infer.py, `vae_encode`)."""
STABILITY_DEPTH_PIXELS = (-2.0, 1.0)
"""`(1 - image) * 2 - 1`, for its depth ControlNet, to which far is white; depth maps here, as in other tools, show near
in white (ComfyUI, comfy/controlnet.py, `load_controlnet_sd35`)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet for Stable Diffusion 3."""

    num_layers: int = 12
    """Blocks copied from the base, from the first on (12 in diffusers); fewer if the base has fewer."""
    reads_pooled: bool = False
    """Whether it reads the pooled prompt, and the condition's latent is shifted as the base's are. diffusers runs
    such a control so, too; ComfyUI does not."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; expected 1 or more", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet for Stable Diffusion 3."""

    start: str | None = None
    """Initial weights: such a ControlNet in any format. Default: a copy of the base's first blocks."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


@control
class ControlNetSD3(TransformerCopy, OneImage):
    """A trainable copy of the first blocks of the base's transformer, joined to it by zero-initialised linear layers.

    Args:
        base_layers: blocks of the base.
        pixels: factor and offset from a condition image in [0, 1] to the autoencoder's input.

    Like InstantX's, it gets zeros in place of the pooled prompt, and the condition's latent without the shift of the
    base's latents, unless its config has `force_zeros_for_pooled_projection` false (diffusers,
    pipeline_stable_diffusion_3_controlnet.py; ComfyUI, comfy/cldm/mmdit.py).
    """

    kind: ClassVar[str] = "controlnet-sd3"
    title: ClassVar[str] = "a ControlNet for Stable Diffusion 3"
    paper: ClassVar[str] = "Zhang, Rao and Agrawala 2023, arXiv 2302.05543; Esser et al. 2024, arXiv 2403.03206"
    transformer = SD3Transformer2DModel
    family_title: ClassVar[str] = "Stable Diffusion 3"
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "after the transformer's blocks"
    Options = Options
    formats = FORMATS
    diffusers_class: ClassVar[str | None] = "SD3ControlNetModel"
    trainings = (
        Training(
            system="controlnet-sd3",
            also=("controlnet-sd3-pairs",),
            options=Start,
            doc="A ControlNet for Stable Diffusion 3, one condition.",
        ),
    )

    def __init__(
        self,
        network: SD3ControlNetModel,
        condition: str | None = None,
        *,
        base_layers: int,
        pixels: tuple[float, float] = USUAL_PIXELS,
    ) -> None:
        super().__init__()
        self.network = network
        self.condition = condition
        self.base_layers = base_layers
        self.pixels = pixels

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        num_layers: int = 12,
        reads_pooled: bool = False,
        **options: Any,
    ) -> ControlNetSD3:
        """A new one: the base's first blocks and embeddings copied, all that joins them to the base zero. The options
        are those of `Options`.

        The last block of the base is never copied: it has no output for the text.

        Raises:
            UserError: the base has another network, or one block, or `num_layers` is below 1.
        """
        transformer = cls.transformer_of(base)
        if len(transformer.transformer_blocks) < 2:
            raise UserError(
                f"{cls.title} needs a transformer of two blocks or more; that of {base.name} has one", "incompatible"
            )
        layers = len(transformer.transformer_blocks)
        Options(num_layers=num_layers)  # refuses wrong ones
        copied = min(num_layers, layers - 1)
        config = {
            **plain_config(transformer),
            "num_layers": copied,
            "dual_attention_layers": [layer for layer in transformer.config.dual_attention_layers if layer < copied],
            ZEROS: not reads_pooled,
        }
        network = with_weights_of(SD3ControlNetModel.from_config(config), transformer, base)
        return cls(network, condition, base_layers=layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetSD3:
        config = checked_config(config)
        layers = config.pop(BASE_LAYERS, None)
        factor, offset = config.pop(PIXELS, USUAL_PIXELS)
        network = SD3ControlNetModel.from_config(config).eval()
        layers = network.config.num_attention_heads if layers is None else int(layers)
        return cls(network, condition, base_layers=layers, pixels=(float(factor), float(offset)))

    def config(self) -> dict[str, Any]:
        config = plain_config(self.network)
        if self.base_layers != config["num_attention_heads"]:
            config[BASE_LAYERS] = self.base_layers
        if self.pixels != USUAL_PIXELS:
            config[PIXELS] = list(self.pixels)
        return config

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `Control.config_of`; the pooled prompt is not read, as in diffusers by default and in ComfyUI."""
        return config_of(tensors)

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        families = {name.partition(".")[0] for name in tensors}
        return {"controlnet_blocks", "pos_embed_input", "transformer_blocks", "pos_embed"} <= families

    # Computation

    @torch.no_grad()
    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1] => latents `[B, latent_channels, h, w]`: the mode of the posterior,
        of which diffusers draws a sample.

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base.
        """
        base.check_size(condition_image.shape[-1], condition_image.shape[-2])
        largest = self.network.config["pos_embed_max_size"] * base.size_multiple
        if (side := max(condition_image.shape[-2:])) > largest:
            raise UserError(
                f"{side} pixels are more than the {largest} for which {self.title} has positions; use a smaller size",
                "wrong-size",
            )
        check_range(condition_image)
        factor, offset = self.pixels
        latent = base.encode_image(condition_image * factor + offset)
        if self.network.config[ZEROS]:
            latent = latent - base.latents.scaled(torch.zeros_like(latent))
        return latent.to(self.network.pos_embed_input.proj.weight)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None
        config, pooled = self.network.config, text["pooled"]
        outputs = self.network(
            x_t,
            controlnet_cond=hint,
            encoder_hidden_states=None if config["joint_attention_dim"] is None else text.tokens,
            pooled_projections=torch.zeros_like(pooled) if config[ZEROS] else pooled,
            timestep=t.expand(len(x_t)),
            return_dict=False,
        )[0]
        interval = self.base_layers / len(outputs)
        return Residuals({f"block.{place}": outputs[int(place / interval)] for place in range(self.base_layers - 1)})

    def hint_settings(self) -> Hashable:
        return (self.pixels, bool(self.network.config[ZEROS]))

    def difference(self, transformer: Any) -> str | None:
        if self.network.config["extra_conditioning_channels"]:
            return "it reads an inpainting mask beside its condition image, which is not supported"
        return super().difference(transformer)

    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        own, of_base = self.network.config, transformer.config
        return {
            "channels": (self.network.inner_dim, transformer.inner_dim),
            "blocks of the base": (self.base_layers, len(transformer.transformer_blocks)),
            "latent channels": (own["in_channels"], of_base.in_channels),
            "patch size": (own["patch_size"], of_base.patch_size),
            # Some do not read the prompt's tokens.
            "text width": (own["joint_attention_dim"] or of_base.joint_attention_dim, of_base.joint_attention_dim),
            "pooled text width": (own["pooled_projection_dim"], of_base.pooled_projection_dim),
        }

    # Training

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": config["num_layers"], "reads_pooled": not config.get(ZEROS, True)}

    # Files and description

    @classmethod
    def settle_checkpoint(cls, checkpoint: Checkpoint, flags: Collection[str]) -> None:
        """Record the input range of Stability AI's canny and depth ControlNets, which no tensor shows."""
        config = checkpoint.config
        if config["joint_attention_dim"] is not None or PIXELS in config:
            return
        kind = (checkpoint.condition or "").partition("_")[0]  # depth_zoe: depth
        if kind == "canny":
            config[PIXELS] = list(STABILITY_CANNY_PIXELS)
            checkpoint.notes.append(
                "its autoencoder gets condition images as 127.5 x + 0.5, as in Stability AI's code for canny"
            )
        elif kind == "depth":
            config[PIXELS] = list(STABILITY_DEPTH_PIXELS)
            checkpoint.notes.append(
                "its autoencoder gets condition images inverted, as in ComfyUI: it was trained on maps with far in"
                " white, and takes maps with near in white here"
            )

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        layers = config.get(BASE_LAYERS, config["num_attention_heads"])
        return f"a Stable Diffusion 3 whose transformer has {layers} blocks of {width} channels"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        layers = config.get(BASE_LAYERS, config["num_attention_heads"])
        facts = {"blocks": f"{config['num_layers']}, for the {layers} of the base"}
        if config["joint_attention_dim"] is None:
            facts["text"] = "the pooled prompt only"
        elif config.get(ZEROS, True):
            facts["text"] = "the prompt's tokens only"
        return facts
