"""GLIGEN (Li et al. 2023, arXiv 2301.07093): boxes with phrases, on diffusers' own modules.

A grounding token is computed from the text vector of a phrase and Fourier features of its box
(`GLIGENTextBoundingboxProjection`). In each transformer block of the base, between self-attention and cross-attention,
a gated self-attention over hidden states and grounding tokens is added to the hidden states
(`GatedSelfAttentionDense`). diffusers builds both into the UNet (`attention_type="gated"`); here they are taps on the
unchanged base.

`ControlUse.end` is the fraction of steps at which it acts (tau in the paper, `gligen_scheduled_sampling_beta` in
diffusers). The other inputs of the paper (images of objects, keypoints, condition maps) are not supported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.taps import Tap, TapFunction
from controlkit.bases.text import Text
from controlkit.bases.unet import attention_blocks
from controlkit.controls.control import Acts, Control, Reads
from controlkit.controls.encoder_copy.network import (
    base_needed,
    checked_config,
    copy_incompatibility,
    missing_heads,
    with_heads,
)
from controlkit.controls.file_format import FileFormat, Written
from controlkit.controls.gligen.boxes import MAX_OBJECTS, boxes_in_part, boxes_problem
from controlkit.controls.gligen.config import PHRASE_WIDTH, config_for, max_objects_of
from controlkit.controls.gligen.formats import (
    detect_diffusers,
    detect_original,
    is_gated_unet,
    read_diffusers,
    read_original,
    to_original,
    write_diffusers,
)
from controlkit.controls.hints import Hint, named
from controlkit.controls.inputs import Input
from controlkit.controls.registry import control
from controlkit.errors import UserError

_SILU_GAIN = 1.7
"""Factor of the standard deviation of weights after a SiLU, with which the variance is kept."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a GLIGEN."""

    max_objects: int = MAX_OBJECTS
    """Number of grounding tokens, 1 to 30, and so the most boxes it takes. Null tokens take a share of the attention,
    which is large if there are few visual tokens. Other tools compute 30 and cannot run a file with another number."""
    gate: float = 0.0
    """Initial value of the gates (tanh of alpha), in (-1, 1). At 0, as in the paper, a new one changes nothing, and the
    layers behind a gate learn only once it has opened; after short runs they ignore the boxes."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise UserError(f"max_objects is {self.max_objects}; it must be 1 to {MAX_OBJECTS}", "out-of-range")
        if not -1 < self.gate < 1:
            raise UserError(f"gate is {self.gate}; it must be above -1 and below 1", "out-of-range")


@control
class GLIGEN(Control):
    """Gated self-attention between self-attention and cross-attention of every transformer block of the base.

    A new one changes nothing, unless its gates start open (`Options.gate`). Grounding tokens are computed once per
    request, by `encode`. On the unconditional branch of CFG it runs with null tokens, as in diffusers.
    """

    kind: ClassVar[str] = "gligen"
    title: ClassVar[str] = "a GLIGEN"
    paper: ClassVar[str] = "Li et al. 2023, arXiv 2301.07093"
    inputs = (Input(name="boxes", kind="value", check=boxes_problem, part=boxes_in_part),)
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "transformer blocks, between self-attention and cross-attention"
    Options = Options
    not_elsewhere: ClassVar[str] = "other tools know it as part of a UNet, or under the original's names"
    formats = (
        FileFormat(
            name="original",
            description="the names of gligen/GLIGEN",
            detect=detect_original,
            read=read_original,
            write=lambda checkpoint, reference: Written(tensors=to_original(checkpoint)),
        ),
        FileFormat(
            name="diffusers-unet",
            description="diffusers' folder of a UNet with gated attention",
            files=("config.json", "diffusion_pytorch_model.safetensors"),
            of_config=is_gated_unet,
            detect=detect_diffusers,
            read=read_diffusers,
            write=write_diffusers,
        ),
        FileFormat(
            name="diffusers-unet-file",
            description="one file of diffusers' UNet with gated attention",
            detect=detect_diffusers,
            read=read_diffusers,
        ),
    )

    def __init__(self, config: Mapping[str, Any], condition: str | None = None) -> None:
        super().__init__()
        self.condition = condition
        self._config = dict(config)
        self.max_objects = max_objects_of(config)
        width = config["cross_attention_dim"]
        self.position_net = GLIGENTextBoundingboxProjection(config[PHRASE_WIDTH], width)
        self.fusers = nn.ModuleList(
            GatedSelfAttentionDense(block.channels, width, block.heads, block.channels // block.heads)
            for block in attention_blocks(config)
        )
        if not self.fusers:
            raise ValueError("the UNet has no transformer blocks")

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        max_objects: int = Options.max_objects,
        gate: float = Options.gate,
        **options: Any,
    ) -> GLIGEN:
        """A new one, with random weights; the options are those of `Options`.

        Raises:
            UserError: the base has no points between self-attention and cross-attention, or pools no text; or an
                option is out of range.
        """
        Options(max_objects=max_objects, gate=gate)  # refuses wrong ones
        if (reason := _lacking(base)) is not None:
            raise UserError(f"no GLIGEN fits the base {base.name}: {reason}", "incompatible")
        config = config_for(dict(base.unet.config), base.pooled_width or 0, max_objects)
        network = cls(config, condition)
        network._initialise(gate)
        return network.to(base.device, base.dtype)

    def _initialise(self, gate: float) -> None:
        """Set the gates, and random weights that keep the variance from phrases and boxes, which contribute equally, to
        the output of the attention.

        With torch's default weights the biases dominate: on nano, only a tenth of the variance of the grounding tokens
        that enter the attention is between phrases with boxes, and a thirtieth between boxes.
        """
        first, *later = (layer for layer in self.position_net.linears if isinstance(layer, nn.Linear))
        phrase, box = first.weight.split([self.position_net.positive_len, self.position_net.position_dim], 1)
        weights = [(phrase, 0.5**0.5), (box, 0.5**0.5), *((layer.weight, _SILU_GAIN) for layer in later)]
        fusers: list[Any] = list(self.fusers)
        for fuser in fusers:
            attention = fuser.attn
            layers = (fuser.linear, attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
            weights += [(layer.weight, 1.0) for layer in layers]
            nn.init.zeros_(fuser.linear.bias)
            nn.init.constant_(fuser.alpha_attn, math.atanh(gate))
            nn.init.constant_(fuser.alpha_dense, math.atanh(gate))
        for layer in (first, *later):
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            for weight, gain in weights:
                weight.normal_(std=gain * weight.shape[1] ** -0.5)

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> GLIGEN:
        return cls(with_heads(checked_config(config)), condition).eval()

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        return missing_heads(config)

    def encode(self, inputs: Mapping[str, Any], base: Base) -> dict[str, Tensor]:
        """Compute grounding tokens of the base's text width D.

        Args:
            inputs: `boxes`, as in `boxes_problem`; an empty list is the null condition.

        Returns:
            `objects`, the tokens of the boxes and then null tokens; and `null`, null tokens only. Both are
            `[1, max_objects, D]`.

        Raises:
            UserError: there are more than `max_objects` boxes, or one is invalid.
        """
        entries = inputs["boxes"]
        if entries and (problem := boxes_problem(entries)) is not None:
            raise UserError(f"input 'boxes' {problem}", "wrong-type")
        count = len(entries)
        if count > self.max_objects:
            raise UserError(f"input 'boxes' has {count} boxes; this control takes {self.max_objects}", "out-of-range")
        weight = next(self.position_net.parameters())
        # A null token does not depend on its place, so one is computed and repeated.
        boxes, masks = weight.new_zeros(1, count + 1, 4), weight.new_zeros(1, count + 1)
        phrases = weight.new_zeros(1, count + 1, self._config[PHRASE_WIDTH])
        if entries:
            boxes[0, :count] = boxes.new_tensor([entry["box"] for entry in entries])
            masks[0, :count] = 1
            phrases[0, :count] = base.pool_text([entry["phrase"] for entry in entries]).to(phrases)
        tokens = self.position_net(boxes, masks, phrases)
        null = tokens[:, count:].repeat(1, self.max_objects, 1)
        return {"objects": torch.cat([tokens[:, :count], null[:, count:]], 1), "null": null}

    def unconditional(self, hint: Hint) -> dict[str, Tensor]:
        null = named(hint)["null"]
        return {"objects": null, "null": null}

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, TapFunction | Tap]:
        tokens = named(hint)["objects"]

        def fused(fuser: nn.Module, stream: Tensor) -> Tensor:
            return fuser(stream, tokens) - stream

        return {f"attention.{place}": partial(fused, fuser) for place, fuser in enumerate(self.fusers)}

    def incompatibility(self, base: Base) -> str | None:
        if (reason := _lacking(base)) is not None:
            return reason
        if (reason := copy_incompatibility(self._config, base)) is not None:
            return reason
        if attention_blocks(self._config) != attention_blocks(dict(base.unet.config)):
            return "its transformer blocks are not those of the base"
        if (width := self._config[PHRASE_WIDTH]) != base.pooled_width:
            return f"its vectors of phrases have width {width}, the base's text encoder pools {base.pooled_width}"
        return None

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "gated attention": f"in {len(attention_blocks(with_heads(config)))} transformer blocks",
            "boxes": f"1 to {max_objects_of(config)}",
        }

    def parameter_counts(self) -> dict[str, int]:
        tokens = sum(parameter.numel() for parameter in self.position_net.parameters())
        return {**super().parameter_counts(), "of them for grounding tokens": tokens}


def _lacking(base: Base) -> str | None:
    """What every GLIGEN needs and this base lacks; None if it has it."""
    if "attention.0" not in base.points:
        return "it has no point between self-attention and cross-attention (attention.N)"
    return None if base.pooled_width else "its text encoder does not pool, so phrases have no vectors"
