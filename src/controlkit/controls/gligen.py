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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.stable_diffusion import SD15_UNET
from controlkit.bases.taps import Tap, TapFunction
from controlkit.bases.text import Text
from controlkit.bases.unet import attention_blocks, layers_of
from controlkit.controls.control import Acts, Control, Reads
from controlkit.controls.encoder_copy.network import (
    HEADS,
    base_needed,
    checked_config,
    copy_incompatibility,
    missing_heads,
    with_heads,
)
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    Written,
    check_names,
    declared_config,
    on_one_line,
)
from controlkit.controls.hints import Hint, named
from controlkit.controls.inputs import Input
from controlkit.controls.registry import control
from controlkit.errors import UserError

_Value = TypeVar("_Value")

MAX_OBJECTS = 30
"""Number of grounding tokens of published models (`max_objs` in gligen/GLIGEN and diffusers). Tokens without a box are
learned null tokens."""

PHRASE_WIDTH = "phrase_width"
"""controlkit's own setting: width of the text vectors of phrases."""
OBJECTS = "max_objects"
"""controlkit's own setting: number of grounding tokens. All other settings are those of the base's UNet."""
_SILU_GAIN = 1.7
"""Factor of the standard deviation of weights after a SiLU, with which the variance is kept."""
_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "block_out_channels": None,
    "layers_per_block": None,
    "down_block_types": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": None,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": None,
    HEADS: None,
    "num_attention_heads": None,
}
"""Settings of the base's UNet on which the network depends, with diffusers' defaults."""


def boxes_problem(value: Any) -> str | None:
    """What is wrong with boxes and phrases; None if they are valid.

    Args:
        value: valid is a list of 1 to 30 `{"box": [x0, y0, x1, y1], "phrase": TEXT}`, in fractions of width and height
            in [0, 1], with x0 < x1, y0 < y1 and a phrase that is not blank.

    Returns:
        Words that follow the name of the input in an error.
    """
    expected = 'a list of {"box": [x0, y0, x1, y1], "phrase": TEXT}, in fractions of width and height'
    if not isinstance(value, list):
        return f"must be {expected}, not {type(value).__name__}"
    if not 1 <= len(value) <= MAX_OBJECTS:
        return f"has {len(value)} boxes; expected 1 to {MAX_OBJECTS}"
    for number, entry in enumerate(value, 1):
        if (problem := _problem_of_entry(entry)) is not None:
            return f"must be {expected}; {problem.format(f'entry {number}')}"
    return None


def _problem_of_entry(entry: Any) -> str | None:
    """What is wrong with one box, with `{}` in place of its name."""
    if not isinstance(entry, dict) or set(entry) != {"box", "phrase"}:
        found = ", ".join(map(repr, entry)) if isinstance(entry, dict) else type(entry).__name__
        return f"{{}} has {found or 'no keys'}"
    box, phrase = entry["box"], entry["phrase"]
    if not isinstance(phrase, str):
        return "the phrase of {} is not text"
    if not phrase.strip():
        return "the phrase of {} is empty"
    numbers = isinstance(box, list | tuple) and all(
        isinstance(side, int | float) and not isinstance(side, bool) and math.isfinite(side) for side in box
    )
    if not numbers or len(box) != 4:
        return "the box of {} is not four numbers"
    listed = ", ".join(f"{side:g}" for side in box)
    if not all(0 <= side <= 1 for side in box):
        return f"the box of {{}} leaves 0 to 1: [{listed}]"
    if box[0] >= box[2] or box[1] >= box[3]:
        return f"the box of {{}} is empty: [{listed}]; expected x0 below x1 and y0 below y1"
    return None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a GLIGEN."""

    max_objects: int = MAX_OBJECTS
    """Number of grounding tokens, 1 to 30, and so the most boxes it takes. Null tokens take a share of the attention,
    which is large if there are few visual tokens. Other tools compute 30 and cannot run a file with another number."""
    gate: float = 0.0
    """Initial value of the gates (tanh of alpha), in (-1, 1). At 0, as in the paper, a new one changes nothing, and the
    layers behind a gate learn only once it has opened; after short runs they ignore the boxes."""


@control
class GLIGEN(Control):
    """Gated self-attention between self-attention and cross-attention of every transformer block of the base.

    A new one changes nothing, unless its gates start open (`Options.gate`). Grounding tokens are computed once per
    request, by `encode`. On the unconditional branch of CFG it runs with null tokens, as in diffusers.
    """

    kind: ClassVar[str] = "gligen"
    title: ClassVar[str] = "a GLIGEN"
    paper: ClassVar[str] = "Li et al. 2023, arXiv 2301.07093"
    inputs = (Input(name="boxes", kind="value", check=boxes_problem),)
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "transformer blocks, between self-attention and cross-attention"
    Options = Options
    not_elsewhere: ClassVar[str] = "other tools know it as part of a UNet, or under the original's names"
    formats = (
        FileFormat(
            name="original",
            description="the names of gligen/GLIGEN",
            detect=lambda file: _detect_original(file),
            read=lambda *arguments: _read_original(*arguments),
            write=lambda checkpoint, reference: Written(tensors=_to_original(checkpoint)),
        ),
        FileFormat(
            name="diffusers-unet",
            description="diffusers' folder of a UNet with gated attention",
            files=("config.json", "diffusion_pytorch_model.safetensors"),
            of_config=lambda config: _is_gated_unet(config),
            detect=lambda file: _detect_diffusers(file),
            read=lambda *arguments: _read_diffusers(*arguments),
            write=lambda *arguments: _write_diffusers(*arguments),
        ),
        FileFormat(
            name="diffusers-unet-file",
            description="one file of diffusers' UNet with gated attention",
            detect=lambda file: _detect_diffusers(file),
            read=lambda *arguments: _read_diffusers(*arguments),
        ),
    )

    def __init__(self, config: Mapping[str, Any], condition: str | None = None) -> None:
        super().__init__()
        self.condition = condition
        self._config = dict(config)
        self.max_objects = _max_objects(config)
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
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise UserError(f"max_objects is {max_objects}; it must be 1 to {MAX_OBJECTS}", "out-of-range")
        if not -1 < gate < 1:
            raise UserError(f"gate is {gate}; it must be above -1 and below 1", "out-of-range")
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
            "boxes": f"1 to {_max_objects(config)}",
        }

    def parameter_counts(self) -> dict[str, int]:
        tokens = sum(parameter.numel() for parameter in self.position_net.parameters())
        return {**super().parameter_counts(), "of them for grounding tokens": tokens}


def config_for(unet_config: Mapping[str, Any], phrase_width: int, max_objects: int = MAX_OBJECTS) -> dict[str, Any]:
    """The config of a network for a UNet.

    Args:
        phrase_width: width of the text vectors of phrases.
        max_objects: number of grounding tokens.
    """
    config = {name: unet_config.get(name, default) for name, default in _DEFAULTS.items()}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    # Inpainting models take more channels; a control does not see them.
    return {**plain, "in_channels": _DEFAULTS["in_channels"] if plain["in_channels"] == 9 else plain["in_channels"]} | {
        PHRASE_WIDTH: phrase_width,
        OBJECTS: max_objects,
    }


def _max_objects(config: Mapping[str, Any]) -> int:
    """Number of grounding tokens of a config; without the setting, as in older files, that of published models.

    Raises:
        ValueError: it is not 1 to 30.
    """
    number = int(config.get(OBJECTS, MAX_OBJECTS))
    if not 1 <= number <= MAX_OBJECTS:
        raise ValueError(f"{OBJECTS} is {number}; expected 1 to {MAX_OBJECTS}")
    return number


def _lacking(base: Base) -> str | None:
    """What every GLIGEN needs and this base lacks; None if it has it."""
    if "attention.0" not in base.points:
        return "it has no point between self-attention and cross-attention (attention.N)"
    return None if base.pooled_width else "its text encoder does not pool, so phrases have no vectors"


# Names: `position_net` everywhere; `fusers.N` here is `BLOCK.fuser` in UNets.

_FUSER = re.compile(r"(.+\.transformer_blocks\.\d+)\.fuser\.(.+)")
_UNET_PREFIX = "model.diffusion_model."
_ORIGINAL_UNET = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|out|label_emb)\.")


def _original_path(module: str, layers: Sequence[int]) -> str:
    """diffusers' path of a transformer block -> the original's.

    Args:
        layers: number of layers of each encoder block.
    """
    part, *numbers = re.findall(
        r"[a-z]+_blocks?|\d+", module.replace("transformer_blocks", "").replace("attentions", "")
    )
    inner = numbers[-1]
    if part == "mid_block":
        return f"middle_block.1.transformer_blocks.{inner}"
    block, layer = int(numbers[0]), int(numbers[1])
    if part == "down_blocks":
        return f"input_blocks.{1 + sum(layers[:block]) + block + layer}.1.transformer_blocks.{inner}"
    upwards = [count + 1 for count in reversed(layers)]
    return f"output_blocks.{sum(upwards[:block]) + layer}.1.transformer_blocks.{inner}"


def _paths(config: Mapping[str, Any], *, original: bool) -> list[str]:
    """Paths of the transformer blocks in a UNet, in order."""
    modules = [block.module for block in attention_blocks(with_heads(config))]
    return [_original_path(module, layers_of(config)) for module in modules] if original else modules


def _to_unet_names(values: Mapping[str, _Value], paths: Sequence[str]) -> dict[str, _Value]:
    """Values under the names that tensors have in a UNet whose transformer blocks are at `paths`."""

    def renamed(name: str) -> str:
        _, _, rest = name.partition("fusers.")
        place, _, layer = rest.partition(".")
        return f"{paths[int(place)]}.fuser.{layer}" if rest else name

    return {renamed(name): value for name, value in values.items()}


def _is_ours(name: str) -> bool:
    return name.startswith("position_net.") or _FUSER.fullmatch(name) is not None


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_UNET_PREFIX): value for name, value in tensors.items()}


def _detect(names: Mapping[str, Tensor], block: str, description: str) -> str | None:
    found = "position_net.linears.0.weight" in names and any(
        name.startswith(block) and _FUSER.fullmatch(name) for name in names
    )
    return f"a GLIGEN of boxes with phrases under {description}" if found else None


def _detect_original(file: TensorFile) -> str | None:
    return _detect(_without_prefix(file.tensors), "input_blocks.", "the names of the original code")


def _detect_diffusers(file: TensorFile) -> str | None:
    return _detect(file.tensors, "down_blocks.", "the names of diffusers' UNet")


def _is_gated_unet(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") == UNet2DConditionModel.__name__ and config.get("attention_type") == "gated"


def _read_original(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A file with the original's names: only the control's tensors, or with the UNet around them."""
    tensors = _without_prefix(file.tensors)
    own = {name: value for name, value in tensors.items() if _is_ours(name)}
    unknown = {name: value for name, value in tensors.items() if not _is_ours(name) and not _ORIGINAL_UNET.match(name)}
    first = tensors.get("input_blocks.0.0.weight")
    return _checkpoint(kind, file, reference, description, own, unknown, original=True, first=first)


def _read_diffusers(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A UNet with gated attention, or only the control's tensors with its names."""
    own = {name: value for name, value in file.tensors.items() if _is_ours(name)}
    unknown = {name: value for name, value in file.tensors.items() if name not in own}
    first = file.tensors.get("conv_in.weight")
    if unknown:
        config = _plain(file.config or reference.unet_config or SD15_UNET)
        try:
            with torch.device("meta"):
                names = UNet2DConditionModel(**{**config, "attention_type": "default"}).state_dict()
        except CONFIG_ERRORS as error:
            raise UserError(
                f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file"
            ) from error
        unknown = {name: value for name, value in unknown.items() if name not in names}
    return _checkpoint(kind, file, reference, description, own, unknown, original=False, first=first)


def _checkpoint(
    kind: type[Control],
    file: TensorFile,
    reference: Reference,
    description: str,
    own: Mapping[str, Tensor],
    unknown: Mapping[str, Tensor],
    *,
    original: bool,
    first: Tensor | None,
) -> Checkpoint:
    """The checkpoint of the control's tensors with the names that they have in a UNet.

    Args:
        unknown: tensors that are neither the control's nor the UNet's.
        first: weight of the UNet's first convolution, if the file has it.

    Raises:
        UserError: names or shapes are not those of a control for the UNet of the file, of the reference, or of Stable
            Diffusion 1.
    """
    if first is not None and first.shape[1] == 9:
        raise UserError(
            f"{file.path} is a GLIGEN for inpainting, whose first convolution was trained too; only GLIGENs for"
            " generation are supported",
            "unsupported",
        )
    phrase_width = _phrase_width(own)
    declared = declared_config(file.metadata)
    unet_config = file.config or reference.unet_config or SD15_UNET
    try:
        config = declared or config_for(unet_config, phrase_width)
        expected = kind.shapes(config)
        in_file = _to_unet_names(expected, _paths(config, original=original))
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    try:
        check_names(file.path, description, in_file, {**own, **unknown}, _others(file, original))
    except UserError as error:
        if declared or file.config or reference.unet_config:
            raise
        raise UserError(
            f"{error} (compared with Stable Diffusion 1; if it was made for another base, pass that: --base)",
            error.code,
        ) from error
    tensors = {name: own[place] for name, place in zip(expected, in_file, strict=True)}
    notes = (
        ["the UNet in the file is left out: the control acts on the base that is in use"] if first is not None else []
    )
    return Checkpoint(kind.kind, config, tensors, dict(file.metadata), notes=notes, path=file.path)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without private entries."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _others(file: TensorFile, original: bool) -> Sequence[str]:
    """Entries of a file that are neither tensors nor parts of the original's checkpoint around its UNet."""
    around = ("autoencoder", "text_encoder", "diffusion", "opt", "scheduler", "iters", "ema", "config_dict")
    return [name for name in file.others if not (original and name in around)]


def _phrase_width(tensors: Mapping[str, Tensor]) -> int:
    weight = tensors.get("position_net.null_positive_feature")
    return 0 if weight is None or weight.ndim != 1 else len(weight)


def _check_objects(checkpoint: Checkpoint) -> None:
    """Refuse a control that other tools would run with another number of grounding tokens."""
    if (number := _max_objects(checkpoint.config)) != MAX_OBJECTS:
        raise UserError(
            f"{checkpoint.path} has {number} grounding tokens (max_objects); other tools always compute {MAX_OBJECTS},"
            " with which it would give other images. Train it with max_objects=30 to convert it",
            "unsupported",
        )


def _to_original(checkpoint: Checkpoint) -> dict[str, Tensor]:
    _check_objects(checkpoint)
    return _to_unet_names(checkpoint.tensors, _paths(checkpoint.config, original=True))


def _write_diffusers(checkpoint: Checkpoint, reference: Reference) -> Written:
    """The control inside the UNet of a base.

    Raises:
        UserError: there is no base, the control does not fit it, or its number of grounding tokens is not 30.
    """
    _check_objects(checkpoint)
    unet_config, weights = reference.unet_config, reference.unet_weights
    if unet_config is None or weights is None:
        raise UserError("diffusers' folder contains the base's UNet too; pass the base (--base)", "missing-setting")
    config, width = checkpoint.config, checkpoint.config[PHRASE_WIDTH]
    if attention_blocks(config) != attention_blocks(unet_config) or width != unet_config["cross_attention_dim"]:
        raise UserError(
            f"{checkpoint.path} does not fit the UNet of the base, or its phrases have another width ({width}) than the"
            " text, which diffusers does not support",
            "incompatible",
        )
    return Written(
        tensors={**weights, **_to_unet_names(checkpoint.tensors, _paths(config, original=False))},
        configs={
            "config.json": {
                "_class_name": UNet2DConditionModel.__name__,
                **_plain(unet_config),
                "attention_type": "gated",
            },
        },
    )
