"""alibaba-pai's Fun ControlNet Union for FLUX.2 dev (aigc-apps/VideoX-Fun,
videox_fun/models/flux2_transformer2d_control.py); new ones are made for any FLUX.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux2 import Flux2TransformerBlock
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.flux2 import Flux2Base, positions, text_positions, tokens_of
from controlkit.bases.text import Text
from controlkit.controls.control import Training
from controlkit.controls.fun_control import FunControl, FunNetwork, zero
from controlkit.controls.fun_control import Options as FunOptions
from controlkit.controls.inputs import Input
from controlkit.controls.masked_image import INPAINTING
from controlkit.controls.registry import control


@dataclass(frozen=True, kw_only=True)
class Options(FunOptions):
    """Options of a Fun ControlNet for FLUX.2."""

    num_layers: int = 4
    """Double blocks copied from the base, evenly spaced from the first on (4 in the released one)."""


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a Fun ControlNet for FLUX.2."""

    start: str | None = None
    """Initial weights: such a ControlNet. Default: copies of the base's blocks."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


class Block(Flux2TransformerBlock):
    """A double block of the base with a layer for its output, and one for the condition's tokens if it is the first."""

    def __init__(self, *, is_first: bool, dim: int, **sizes: Any) -> None:
        super().__init__(dim=dim, **sizes)
        if is_first:
            self.before_proj = zero(nn.Linear(dim, dim))
        self.after_proj = zero(nn.Linear(dim, dim))


class Network(FunNetwork):
    """The copied double blocks and the embedder of the condition's tokens.

    Args:
        control_layers: double blocks of the base that are copied, from 0 on.
        control_in_dim: channels of a token of the condition.
        mlp_ratio: channels of the feed-forward layers, of those of a token.
        eps: of the norms.
    """

    family = "control_transformer_blocks"

    @register_to_config
    def __init__(
        self,
        control_layers: list[int],
        control_in_dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float = 3.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes: dict[str, Any] = {
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "mlp_ratio": mlp_ratio,
            "eps": eps,
        }
        blocks = [Block(is_first=place == 0, dim=width, **sizes) for place in range(len(control_layers))]
        self.control_transformer_blocks = nn.ModuleList(blocks)
        self.control_img_in = nn.Linear(control_in_dim, width)


@control
class ControlNetFlux2Fun(FunControl):
    """Copies of double blocks of FLUX.2's transformer."""

    __doc__ = FunControl.__doc__
    kind: ClassVar[str] = "controlnet-flux2-fun"
    title: ClassVar[str] = "a Fun ControlNet for FLUX.2"
    paper: ClassVar[str] = "alibaba-pai 2025, github.com/aigc-apps/VideoX-Fun"
    transformer = Flux2Transformer2DModel
    family_title: ClassVar[str] = "FLUX.2"
    blocks_title: ClassVar[str] = "double blocks"
    network_class: ClassVar[type[FunNetwork]] = Network
    released_places: ClassVar[range] = range(0, 8, 2)
    Options = Options
    trainings = (
        Training(
            system="controlnet-flux2-fun",
            also=("controlnet-flux2-fun-pairs",),
            options=Start,
            doc="A Fun ControlNet for FLUX.2, one condition.",
        ),
    )

    @classmethod
    def network_for(cls, transformer: Any, **sizes: Any) -> FunNetwork:
        config = transformer.config
        return super().network_for(transformer, **sizes, mlp_ratio=config.mlp_ratio, eps=config.eps)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        width, hidden = tensors[f"{cls.network_class.family}.0.ff.linear_out.weight"].shape
        return {**super().config_of(tensors, unet_config), "mlp_ratio": hidden / width}

    def tokens_of(self, latents: Tensor) -> Tensor:
        return tokens_of(latents)

    def beside_the_image(self, base: Base, x_t: Tensor, t: Tensor, text: Text, stream: Tensor) -> tuple[Tensor, Any]:
        assert isinstance(base, Flux2Base)
        transformer, time = base.transformer, base.embed_time(x_t, t, text)
        modulations = (transformer.double_stream_modulation_img(time), transformer.double_stream_modulation_txt(time))
        # Prompt before image, as in the blocks.
        angles = [transformer.pos_embed(places) for places in (text_positions(text), positions(x_t))]
        rotation = tuple(torch.cat(parts) for parts in zip(*angles, strict=True))
        return transformer.context_embedder(text.tokens), (*modulations, rotation)


class _Inpainting(ControlNetFlux2Fun):
    """One that also reads a masked image."""

    __doc__ = FunControl.__doc__
    inputs = (Input(), *INPAINTING)


ControlNetFlux2Fun.with_masked_image = _Inpainting
