"""ControlNet for FLUX.1 on diffusers' `FluxControlNetModel`.

The first double and single blocks of the transformer, copied, run beside it on the noisy latent plus the condition.
Each of their outputs is added after a run of the base's blocks of its kind (diffusers,
models/transformers/transformer_flux.py): with 4 outputs and 19 blocks, after five blocks each. InstantX's and those of
diffusers' training script read the latent of the condition image; XLabs' read the image through convolutions, and their
outputs take turns.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.flux import pack, positions, text_positions
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.conditions.condition import known_name
from controlkit.controls.control import Control, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import Input, check_range
from controlkit.controls.registry import control
from controlkit.controls.transformer_control import TransformerCopy, count_of, spread, used_of, with_weights_of
from controlkit.errors import UserError, nearest

BASE_BLOCKS = "base_blocks"
"""controlkit's own setting: double and single blocks of the base, if they are not those of FLUX.1."""
FLUX1_BLOCKS = (19, 38)
"""Double and single blocks of FLUX.1."""
# diffusers' own import of a class that it is about to move.
warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)
_HEAD_WIDTH, _ROPE = 128, (16, 56, 56)
"""Channels of an attention head in FLUX.1, and of the rotary embedding of each coordinate."""


MODES: Mapping[str, int] = {
    "canny": 0,
    "downscale": 1,
    "depth": 2,
    "blur": 3,
    "openpose": 4,
    "grayscale": 5,
    "lq": 6,
}
"""Task of a union -> its mode, in the unions of InstantX and Shakker Labs (the model card of
InstantX/FLUX.1-dev-Controlnet-Union). Tile, pose and gray have the names of the conditions here; low quality, `lq`, is
none."""


def _task_problem(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else f"must be the name of a task: {', '.join(MODES)}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet for FLUX.1."""

    num_layers: int = 4
    """Double blocks copied from the base, from the first on (4 in diffusers' script); fewer if fewer are used: of 19
    blocks, 6 would use 5."""
    num_single_layers: int = 4
    """Single blocks copied from the base, from the first on (4 in diffusers' script); 0 is none."""

    def __post_init__(self) -> None:
        for name, least in (("num_layers", 1), ("num_single_layers", 0)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} is {value}; expected {least} or more", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet for FLUX.1."""

    start: str | None = None
    """Initial weights: such a ControlNet in any format. Default: a copy of the base's first blocks."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


@control
class ControlNetFlux(TransformerCopy):
    """A trainable copy of the first blocks of the base's transformer, joined to it by zero-initialised linear layers.

    A union has an embedding of modes, of which a task selects one; its token stands before those of the prompt.

    Args:
        base_blocks: double and single blocks of the base.
    """

    kind: ClassVar[str] = "controlnet-flux"
    title: ClassVar[str] = "a ControlNet for FLUX.1"
    paper: ClassVar[str] = "Zhang, Rao and Agrawala 2023, arXiv 2302.05543"
    transformer = FluxTransformer2DModel
    family_title: ClassVar[str] = "FLUX.1"
    inputs = (Input(), Input(name="task", kind="value", required=False, check=_task_problem))
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    one_prompt: ClassVar[bool] = True
    enters: ClassVar[str] = "after the transformer's blocks"
    Options = Options
    diffusers_class: ClassVar[str | None] = "FluxControlNetModel"
    trainings = (
        Training(
            system="controlnet-flux",
            also=("controlnet-flux-pairs",),
            options=Start,
            doc="A ControlNet for FLUX.1, one condition.",
        ),
    )

    def __init__(
        self, network: FluxControlNetModel, condition: str | None = None, *, base_blocks: tuple[int, int]
    ) -> None:
        super().__init__()
        self.network = network
        self.condition = condition
        self.base_blocks = base_blocks
        self.mode = _tasks(network.config).get(condition or "")
        """Of a union: the selected mode; None if the inputs must select one."""

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        num_layers: int = 4,
        num_single_layers: int = 4,
        **options: Any,
    ) -> ControlNetFlux:
        """A new one: the base's first blocks and embeddings copied, all that joins them to the base zero. The options
        are those of `Options`.

        Raises:
            UserError: the base has another network, `num_layers` is below 1 or `num_single_layers` below 0.
        """
        transformer = cls.transformer_of(base)
        Options(num_layers=num_layers, num_single_layers=num_single_layers)  # refuses wrong ones
        blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        config = plain_config(transformer)
        used = (used_of(count, of_base) for count, of_base in zip((num_layers, num_single_layers), blocks, strict=True))
        config |= dict(zip(("num_layers", "num_single_layers"), used, strict=True))
        del config["out_channels"]  # which a ControlNet does not have
        network = with_weights_of(FluxControlNetModel.from_config(config), transformer, base)
        return cls(network, condition, base_blocks=blocks)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetFlux:
        config = checked_config(config)
        double, single = config.pop(BASE_BLOCKS, FLUX1_BLOCKS)
        network = FluxControlNetModel.from_config(config).eval()
        return cls(network, condition, base_blocks=(int(double), int(single)))

    def config(self) -> dict[str, Any]:
        config = plain_config(self.network)
        if self.base_blocks != FLUX1_BLOCKS:
            config[BASE_BLOCKS] = list(self.base_blocks)
        return config

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        width = tensors["x_embedder.weight"].shape[0]
        if width % _HEAD_WIDTH:
            raise ValueError(f"its width {width} is no multiple of {_HEAD_WIDTH}, the channels of an attention head")
        modes, hint = (
            tensors.get(f"{name}.weight") for name in ("controlnet_mode_embedder", "input_hint_block.conv_out")
        )
        return {
            "patch_size": 1 if hint is None else math.isqrt(tensors["x_embedder.weight"].shape[1] // hint.shape[0]),
            "in_channels": tensors["x_embedder.weight"].shape[1],
            "num_layers": count_of(tensors, "controlnet_blocks"),
            "num_single_layers": count_of(tensors, "controlnet_single_blocks"),
            "attention_head_dim": _HEAD_WIDTH,
            "num_attention_heads": width // _HEAD_WIDTH,
            "joint_attention_dim": tensors["context_embedder.weight"].shape[1],
            "pooled_projection_dim": tensors["time_text_embed.text_embedder.linear_1.weight"].shape[1],
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in tensors,
            "axes_dims_rope": list(_ROPE),
            "num_mode": None if modes is None else modes.shape[0],
            "conditioning_embedding_channels": None if hint is None else hint.shape[0],
        }

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {"controlnet_x_embedder.weight", "x_embedder.weight", "controlnet_blocks.0.weight"} <= set(tensors)

    # Tasks of a union

    @property
    def _is_union(self) -> bool:
        return bool(self.network.union)

    @property
    def conditions(self) -> tuple[str, ...]:
        if self.condition is not None or not self._is_union:
            return super().conditions
        return tuple(task for task in _tasks(self.network.config) if known_name(task))

    @classmethod
    def conditions_in(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_tasks(config))

    def for_condition(self, condition: str) -> Control:
        return self.with_values({"task": condition}) if self._is_union else self

    def with_values(self, values: Mapping[str, Any]) -> Control:
        task, tasks = values.get("task"), _tasks(self.network.config)
        if not self._is_union:
            if task is not None:
                raise UserError(f"the control is no union of tasks; remove task={task}", "contradiction")
            return self
        if task is None:
            if self.mode is None:
                raise UserError(
                    f"the control has several tasks: {', '.join(tasks)}; select one: --control FILE=IMAGE,task=canny,"
                    ' or the input "task" in a .json file',
                    "missing-setting",
                )
            return self
        condition = known_name(task)
        mode = tasks.get(condition or task.strip().lower())
        if mode is None:
            raise UserError(f"the control has no task {task!r}{nearest(task, list(tasks))}", "unknown-name")
        view = copy.copy(self)  # shares all modules
        view.mode, view.condition = mode, condition
        return view

    # Computation

    @torch.no_grad()
    def encode(self, inputs: Any, base: Base) -> Hint:
        """The tokens of the latents of condition images, `[B, h / 2 * w / 2, 4 * C]`: the mode of the posterior, of
        which diffusers draws a sample. Of XLabs' the images in [-1, 1]. Of a union also the `mode`, `[B, 1]`.

        Args:
            inputs: `image` `[B, 3, H, W]` in [0, 1]; of a union also `task`, as in `with_values`.

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base, or no task is selected.
        """
        image = inputs["image"]
        base.check_size(image.shape[-1], image.shape[-2])
        check_range(image)
        pixels = image * 2 - 1
        tokens = (pixels if self._reads_pixels else pack(base.encode_image(pixels))).to(self.network.x_embedder.weight)
        if not self._is_union:
            self.with_values(inputs)
            return tokens
        values = {"task": "canny"} if self.mode is None and image.is_meta else inputs  # to count operations
        mode = cast(ControlNetFlux, self.with_values(values)).mode
        return {"tokens": tokens, "mode": torch.full((len(tokens), 1), mode or 0, device=tokens.device)}

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None
        tokens, mode = (hint, None) if isinstance(hint, Tensor) else (hint["tokens"], hint["mode"])
        double, single = self.network(
            pack(x_t),
            controlnet_cond=tokens,
            controlnet_mode=mode,
            encoder_hidden_states=text.tokens,
            pooled_projections=text["pooled"],
            timestep=t.expand(len(x_t)) / 1000,
            guidance=text["guidance"] if self.network.config.guidance_embeds else None,
            txt_ids=text_positions(text),
            img_ids=positions(x_t),
            return_dict=False,
        )
        return Residuals(
            spread("block", double or (), self.base_blocks[0], in_turns=self._reads_pixels)
            | spread("single", single or (), self.base_blocks[1])
        )

    @property
    def _reads_pixels(self) -> bool:
        return self.network.input_hint_block is not None

    def hint_settings(self) -> Hashable:
        return self._reads_pixels

    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        own, of_base = self.network.config, transformer.config
        blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
        return {
            "channels": (self.network.inner_dim, transformer.inner_dim),
            "double and single blocks of the base": (list(self.base_blocks), list(blocks)),
            "channels of a token": (own["in_channels"], of_base.in_channels),
            "text width": (own["joint_attention_dim"], of_base.joint_attention_dim),
            "pooled text width": (own["pooled_projection_dim"], of_base.pooled_projection_dim),
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
            UserError: `start` is a union, of which one task would be trained and the others spoilt.
        """
        if start is not None and cast(ControlNetFlux, start)._is_union:
            raise UserError(
                "start is a union of several tasks, which cannot be trained further; start from a ControlNet of one"
                " condition",
                "unsupported",
            )
        return super().for_training(base, conditions, options, name=name, seed=seed, start=start, companion=companion)

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        width = config["num_attention_heads"] * config["attention_head_dim"]
        double, single = config.get(BASE_BLOCKS, FLUX1_BLOCKS)
        return f"a FLUX.1 whose transformer has {double} double and {single} single blocks of {width} channels"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        double, single = config.get(BASE_BLOCKS, FLUX1_BLOCKS)
        facts = {
            "blocks": f"{config['num_layers']} double and {config['num_single_layers']} single, for the {double} and"
            f" {single} of the base"
        }
        if config.get("conditioning_embedding_channels") is not None:
            facts["condition image"] = "through convolutions, as XLabs'"
        if config.get("num_mode") is not None:
            facts["tasks"] = ", ".join(_tasks(config))
        return facts


def _tasks(config: Mapping[str, Any]) -> dict[str, int]:
    """Tasks of a network with this config -> their modes; empty if it is no union."""
    return {task: mode for task, mode in MODES.items() if mode < (config.get("num_mode") or 0)}
