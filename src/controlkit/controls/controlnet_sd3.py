"""ControlNet for the transformer of Stable Diffusion 3 and 3.5, on diffusers' `SD3ControlNetModel`.

The first blocks of the transformer, copied, run beside it on the noisy latent plus the latent of the condition image.
Each of their outputs is added after a run of the base's blocks (diffusers, models/transformers/transformer_sd3.py):
with 12 outputs and 24 blocks, after two blocks each.

Stability AI's own ControlNets for Stable Diffusion 3.5 have blocks over the image alone, and their files lack the
position embedding, which is the base's (Stability-AI/sd3.5, sd3_impls.py and sd3_infer.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.controls.control import Control, OneImage, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    check_names,
    on_one_line,
)
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import check_range
from controlkit.controls.registry import control
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
HEAD_WIDTH = 64
"""Channels of an attention head in all Stable Diffusion 3."""
_ZEROS = "force_zeros_for_pooled_projection"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet for Stable Diffusion 3."""

    num_layers: int = 12
    """Blocks copied from the base, from the first on (12 in diffusers); fewer if the base has fewer."""
    reads_pooled: bool = False
    """Whether it reads the pooled prompt, and the condition's latent is shifted as the base's are. diffusers runs
    such a control so, too; ComfyUI does not."""


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet for Stable Diffusion 3."""

    start: str | None = None
    """Initial weights: such a ControlNet in any format. Default: a copy of the base's first blocks."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


def _is_of_stability(tensors: Collection[str]) -> bool:
    """Whether names are those of Stability AI's files; diffusers' differ within the blocks."""
    return {"pos_embed_input.proj.weight", "transformer_blocks.0.adaLN_modulation.1.weight"} <= set(tensors)


def _detect_stability(file: TensorFile) -> str | None:
    return "a ControlNet of Stability AI for Stable Diffusion 3.5" if _is_of_stability(file.tensors) else None


def _lacks_positions(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == SD3ControlNetModel.__name__ and config.get("use_pos_embed") is False


def _read_folder(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """diffusers' folder without the position embedding, which its pipeline takes from the base, too."""
    config = {key: value for key, value in file.config.items() if not key.startswith("_")}
    return _with_positions(kind, file, dict(file.tensors), config, reference, description)


def _read_stability(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    tensors = dict(file.tensors)
    which = tensors.pop("control_type", None)
    try:
        own = _from_stability(tensors)
        config = {**_config_of(own), _ZEROS: False}
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    checkpoint = _with_positions(kind, file, own, config, reference, description)
    condition = None if which is None else _STABILITY_CONDITIONS.get(round(float(which)))
    if condition is not None:
        checkpoint.metadata.setdefault("control.condition", condition)
        kind.settle_checkpoint(checkpoint, ())
    return checkpoint


_STABILITY_CONDITIONS = {0: "blur", 1: "canny", 2: "depth_midas"}
"""Value of `control_type` in a file -> condition (ComfyUI, comfy/controlnet.py, `load_controlnet_sd35`)."""
_STABILITY_NAMES = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_IN_BLOCK = re.compile(r"(transformer_blocks\.\d+)\.(.+)\.(weight|bias)")


def _from_stability(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under Stability AI's names => under diffusers'; others keep their names.

    (diffusers, scripts/convert_sd3_controlnet_to_diffusers.py.)
    """
    own: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            own[name] = value
        elif match[2] == "attn.qkv":
            for which, part in zip("qkv", value.chunk(3), strict=True):
                own[f"{match[1]}.attn.to_{which}.{match[3]}"] = part
        else:
            own[f"{match[1]}.{_STABILITY_NAMES.get(match[2], match[2])}.{match[3]}"] = value
    return own


def _with_positions(
    kind: type[Control],
    file: TensorFile,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    reference: Reference,
    description: str,
) -> Checkpoint:
    """The checkpoint of a file without a position embedding, completed by that of the base.

    Raises:
        UserError: there is no base of this family, or names or shapes do not fit.
    """
    base_config, weights = reference.transformer_config, reference.transformer_weights
    if base_config is None or weights is None:
        raise UserError(
            f"{file.path} is {description}, which shares the position embedding of its base; pass that base with its"
            " weights (--base)",
            "missing-setting",
        )
    shared = ("sample_size", "patch_size", "in_channels", "pos_embed_max_size")
    config |= {**{name: base_config[name] for name in shared}, "use_pos_embed": True, "pos_embed_type": "sincos"}
    dtype = next(iter(tensors.values())).dtype
    tensors |= {name: value.to(dtype) for name, value in weights.items() if name.startswith("pos_embed.")}
    try:
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    check_names(file.path, description, expected, tensors, file.others)
    checkpoint = Checkpoint(kind.kind, config, tensors, dict(file.metadata), path=file.path)
    checkpoint.notes.append("its position embedding is not in the file and comes from the base")
    return checkpoint


FORMATS = (
    FileFormat(
        name="diffusers-sd35",
        description="diffusers' folder of Stability AI's ControlNets, without a position embedding",
        detect=lambda file: "a ControlNet for Stable Diffusion 3.5 as diffusers' folder",
        read=_read_folder,
        files=("config.json", "diffusion_pytorch_model.safetensors"),
        of_config=_lacks_positions,
        needs_base=True,
    ),
    FileFormat(
        name="original",
        description="the names of Stability AI's files",
        detect=_detect_stability,
        read=_read_stability,
        needs_base=True,
    ),
)


@control
class ControlNetSD3(OneImage):
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
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "after the transformer's blocks"
    hint_is_frozen: ClassVar[bool] = True
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
            UserError: the base has another network, or `num_layers` is below 1.
        """
        transformer = _transformer_of(base, cls.title)
        layers = len(transformer.transformer_blocks)
        if num_layers < 1:
            raise UserError(f"num_layers is {num_layers}; expected 1 or more", "out-of-range")
        copied = min(num_layers, layers - 1)
        config = {
            **plain_config(transformer),
            "num_layers": copied,
            "dual_attention_layers": [layer for layer in transformer.config.dual_attention_layers if layer < copied],
            _ZEROS: not reads_pooled,
        }
        network = SD3ControlNetModel.from_config(config)
        own = network.state_dict()
        network.load_state_dict({name: value for name, value in transformer.state_dict().items() if name in own}, False)
        return cls(nn.Module.to(network, base.device, base.dtype), condition, base_layers=layers)

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
        return _config_of(tensors)

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        families = {name.partition(".")[0] for name in tensors}
        return {"controlnet_blocks", "pos_embed_input", "transformer_blocks", "pos_embed"} <= families

    def file_state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(state), strict=True, assign=True)

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
        check_range(condition_image)
        factor, offset = self.pixels
        latent = base.encode_image(condition_image * factor + offset)
        if self.network.config[_ZEROS]:
            latent = latent + base.latents.shift * base.latents.scale
        return latent.to(self.network.pos_embed_input.proj.weight)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None
        config, pooled = self.network.config, text["pooled"]
        outputs = self.network(
            x_t,
            controlnet_cond=hint,
            encoder_hidden_states=None if config["joint_attention_dim"] is None else text.tokens,
            pooled_projections=torch.zeros_like(pooled) if config[_ZEROS] else pooled,
            timestep=t.expand(len(x_t)),
            return_dict=False,
        )[0]
        interval = self.base_layers / len(outputs)
        return Residuals({f"block.{place}": outputs[int(place / interval)] for place in range(self.base_layers - 1)})

    def hint_settings(self) -> Hashable:
        return (self.pixels, bool(self.network.config[_ZEROS]))

    def incompatibility(self, base: Base) -> str | None:
        own, transformer = self.network.config, base.denoiser
        if not isinstance(transformer, SD3Transformer2DModel):
            return f"it needs the transformer of Stable Diffusion 3; the base has a {type(transformer).__name__}"
        if own["extra_conditioning_channels"]:
            return "it reads an inpainting mask beside its condition image, which is not supported"
        of_base, layers = transformer.config, len(transformer.transformer_blocks)
        width, of_base_width = self.network.inner_dim, transformer.inner_dim
        for what, mine, theirs in (
            ("channels", width, of_base_width),
            ("blocks of the base", self.base_layers, layers),
            ("latent channels", own["in_channels"], of_base.in_channels),
            ("patch size", own["patch_size"], of_base.patch_size),
            ("text width", own["joint_attention_dim"] or of_base.joint_attention_dim, of_base.joint_attention_dim),
            ("pooled text width", own["pooled_projection_dim"], of_base.pooled_projection_dim),
        ):
            if mine != theirs:
                return f"its {what}: {mine}, the base's: {theirs}"
        return None

    # Training

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_layers": config["num_layers"], "reads_pooled": not config.get(_ZEROS, True)}

    def copied_network(self) -> nn.Module:
        return self.network

    # Files and description

    @classmethod
    def settle_checkpoint(cls, checkpoint: Checkpoint, flags: Collection[str]) -> None:
        """Record the input range of Stability AI's canny ControlNet, which no tensor shows."""
        config = checkpoint.config
        if checkpoint.condition == "canny" and config["joint_attention_dim"] is None and PIXELS not in config:
            config[PIXELS] = list(STABILITY_CANNY_PIXELS)
            checkpoint.notes.append(
                "its autoencoder gets condition images as 127.5 x + 0.5, as in Stability AI's code for canny"
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
        elif config.get(_ZEROS, True):
            facts["text"] = "the prompt's tokens only"
        return facts

    def parameter_counts(self) -> dict[str, int]:
        return {"parameters": sum(parameter.numel() for parameter in self.parameters())}


def _transformer_of(base: Base, title: str) -> SD3Transformer2DModel:
    """The transformer of Stable Diffusion 3.

    Raises:
        UserError: the base has another network, or one block.
    """
    denoiser = base.denoiser
    if not isinstance(denoiser, SD3Transformer2DModel):
        raise UserError(
            f"{title} needs the transformer of Stable Diffusion 3; {base.name} has a {type(denoiser).__name__}",
            "incompatible",
        )
    if len(denoiser.transformer_blocks) < 2:
        raise UserError(
            f"{title} needs a transformer of two blocks or more; that of {base.name} has one", "incompatible"
        )
    return denoiser


def _config_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of a network with diffusers' names, inferred from shapes.

    Raises:
        KeyError, ValueError: a tensor is missing, or the width is no multiple of `HEAD_WIDTH`.
    """
    width = tensors["controlnet_blocks.0.weight"].shape[0]
    if width % HEAD_WIDTH:
        raise ValueError(f"its width {width} is no multiple of {HEAD_WIDTH}, the channels of an attention head")
    latent = tensors.get("pos_embed.proj.weight", tensors["pos_embed_input.proj.weight"])
    context = tensors.get("context_embedder.weight")
    positions = tensors.get("pos_embed.pos_embed")
    layers = len([name for name in tensors if re.fullmatch(r"controlnet_blocks\.\d+\.weight", name)])
    return {
        "patch_size": latent.shape[2],
        "in_channels": latent.shape[1],
        "num_layers": layers,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": width // HEAD_WIDTH,
        "joint_attention_dim": None if context is None else context.shape[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
        "pos_embed_max_size": None if positions is None else math.isqrt(positions.shape[1]),
        "extra_conditioning_channels": tensors["pos_embed_input.proj.weight"].shape[1] - latent.shape[1],
        "dual_attention_layers": [
            layer for layer in range(layers) if f"transformer_blocks.{layer}.attn2.to_q.weight" in tensors
        ],
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in tensors else None,
        _ZEROS: True,
    }
