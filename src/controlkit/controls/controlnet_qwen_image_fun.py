"""alibaba-pai's Fun ControlNet Union for Qwen-Image-2512 (aigc-apps/VideoX-Fun,
videox_fun/models/qwenimage_transformer2d_control.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.flux import pack
from controlkit.bases.qwen_image import QwenImage, prompt_and_positions
from controlkit.bases.text import Text
from controlkit.controls.control import Training
from controlkit.controls.fun_control import FunControl, FunNetwork, zero
from controlkit.controls.fun_control import Options as FunOptions
from controlkit.controls.inputs import Input
from controlkit.controls.masked_image import INPAINTING
from controlkit.controls.registry import control


@dataclass(frozen=True, kw_only=True)
class Options(FunOptions):
    """Options of a Fun ControlNet for Qwen-Image."""

    num_layers: int = 5
    """Blocks copied from the base, evenly spaced from the first on (5 in the released one)."""


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
            self.before_proj = zero(nn.Linear(self.dim, self.dim))
        self.after_proj = zero(nn.Linear(self.dim, self.dim))


class Network(FunNetwork):
    """The copied blocks and the embedder of the condition's tokens.

    Args:
        control_layers: blocks of the base that are copied, from 0 on.
        control_in_dim: channels of a token of the condition.
    """

    family = "control_blocks"

    @register_to_config
    def __init__(
        self, control_layers: list[int], control_in_dim: int, num_attention_heads: int, attention_head_dim: int
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes = {"num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim}
        blocks = [Block(is_first=place == 0, dim=width, **sizes) for place in range(len(control_layers))]
        self.control_blocks = nn.ModuleList(blocks)
        self.control_img_in = nn.Linear(control_in_dim, width)


@control
class ControlNetQwenImageFun(FunControl):
    """Copies of blocks of Qwen-Image's transformer."""

    __doc__ = FunControl.__doc__
    kind: ClassVar[str] = "controlnet-qwen-image-fun"
    title: ClassVar[str] = "a Fun ControlNet for Qwen-Image"
    paper: ClassVar[str] = "alibaba-pai 2026, github.com/aigc-apps/VideoX-Fun"
    transformer = QwenImageTransformer2DModel
    family_title: ClassVar[str] = "Qwen-Image"
    network_class: ClassVar[type[FunNetwork]] = Network
    released_places: ClassVar[range] = range(0, 60, 12)
    Options = Options
    trainings = (
        Training(
            system="controlnet-qwen-image-fun",
            also=("controlnet-qwen-image-fun-pairs",),
            options=Start,
            doc="A Fun ControlNet for Qwen-Image, one condition.",
        ),
    )

    def tokens_of(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def beside_the_image(self, base: Base, x_t: Tensor, t: Tensor, text: Text, stream: Tensor) -> tuple[Tensor, Any]:
        assert isinstance(base, QwenImage)
        transformer, told = base.transformer, prompt_and_positions(base.transformer, x_t, text)
        prompt = transformer.txt_in(transformer.txt_norm(told["encoder_hidden_states"]))
        rotation = transformer.pos_embed(told["img_shapes"], device=stream.device, max_txt_seq_len=prompt.shape[1])
        return prompt, (told["encoder_hidden_states_mask"], base.embed_time(x_t, t, text), rotation)


class _Inpainting(ControlNetQwenImageFun):
    """One that also reads a masked image."""

    __doc__ = FunControl.__doc__
    inputs = (Input(), *INPAINTING)


ControlNetQwenImageFun.with_masked_image = _Inpainting
