"""T2I-Adapter (Mou et al., AAAI 2024, arXiv 2302.08453) on diffusers' `T2IAdapter`.

Files have the names of TencentARC/T2I-Adapter or of diffusers. The original numbers all residual blocks consecutively
(`body.5`, in its training's files `adapter.body.5`), diffusers numbers the blocks of a stage
(`adapter.body.2.resnets.1`); the light adapter has stages in both (branch SD, ldm/modules/encoders/adapter.py).

`cond_tau` of the original, the fraction of the steps at which the adapter acts, is `ControlUse.end`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import T2IAdapter
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.bases.unet import encoder_stages, listed_stages
from controlkit.controls.control import Control, OneImage, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config, plain_config
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
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError

FULL, FULL_XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
"""Names of the three networks, as diffusers' configs have them."""

_GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey image (ITU-R BT.601), as in Pillow's `convert("L")`."""
_RES_BLOCKS = {FULL: 2, FULL_XL: 2, LIGHT: 4}
"""Residual blocks per stage, as in TencentARC/T2I-Adapter."""
_PREFIX = "adapter."
"""Prefix of diffusers' names."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a T2I-Adapter."""

    colours: int = 3
    """Channels of the condition image: 3, or 1 for grey (sketch, canny)."""
    light: bool = False
    """The small network with a quarter of the inner channels, if it fits."""

    def __post_init__(self) -> None:
        if self.colours not in (1, 3):
            raise UserError(f"colours is {self.colours}; it must be 3 (RGB) or 1 (grey)", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class AdapterTraining(Options):
    """Recipe settings of a T2I-Adapter."""

    start: str | None = None
    """Initial weights: a T2I-Adapter file or folder in any format, which determines `colours` and `light`. Default:
    random weights."""
    time_sampling: str | None = "cubic"
    """Distribution of training times: `cubic` favours noisy ones, at which the layout is decided (Mou et al. 2024,
    section 3.3); `uniform`; `logit-normal`. null is the base's own."""


@control
class T2IAdapterControl(OneImage):
    """A small network from the condition image to one feature map per stage of the base's encoder.

    It copies nothing of the base and reads neither noise nor time nor prompt, so it runs once per condition image. It
    has no zero convolutions: a new one has torch's random initialisation, as the reference's (TencentARC/T2I-Adapter,
    branch SD, ldm/modules/encoders/adapter.py), and changes images from the first step.
    """

    kind: ClassVar[str] = "t2i-adapter"
    title: ClassVar[str] = "a T2I-Adapter"
    paper: ClassVar[str] = "Mou et al. 2024, arXiv 2302.08453"
    reads: ClassVar[Reads] = Reads.NOTHING
    enters: ClassVar[str] = "encoder stages"
    starts_at_zero: ClassVar[bool] = False
    Options = Options
    trainings = (
        Training(
            system="t2i-adapter",
            also=("t2i-adapter-pairs",),
            options=AdapterTraining,
            doc="A T2I-Adapter, one condition. Noisy times are drawn more often (Mou et al. 2024, section 3.3).",
        ),
    )
    diffusers_class: ClassVar[str | None] = "T2IAdapter"
    formats = (
        FileFormat(
            name="original",
            description="the names of TencentARC/T2I-Adapter",
            detect=lambda file: _detect_original(file),
            read=lambda *arguments: from_original(*arguments),
            write=lambda checkpoint, reference: Written(tensors=to_original(checkpoint)),
        ),
    )

    def __init__(self, network: T2IAdapter, condition: str | None = None) -> None:
        super().__init__()
        self.network = network
        self.condition = condition

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, colours: int = 3, light: bool = False, **options: Any
    ) -> T2IAdapterControl:
        """A new one, with random weights; `colours` and `light` as in `config_for`.

        Raises:
            UserError: no adapter fits the base's encoder, or `colours` is neither 1 nor 3.
        """
        config = config_for(dict(base.unet.config), base.factor, colours=colours, light=light)
        return cls(nn.Module.to(T2IAdapter(**config), base.device, base.dtype), condition)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> T2IAdapterControl:
        return cls(T2IAdapter.from_config(checked_config(config)).eval(), condition)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return config_of(tensors, unet_config)

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        name = "adapter.body.0.resnets.0.block1.weight"
        return name in tensors and tensors[name].ndim == 4

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        """Condition images `[B, 3, H, W]` in [0, 1], or grey `[B, 1, H, W]` if the network takes that."""
        patch = self.network.config["downscale_factor"]
        for name, side in (("width", condition_image.shape[-1]), ("height", condition_image.shape[-2])):
            if side % patch:
                raise UserError(
                    f"{name} {side} does not fit this T2I-Adapter, whose patches are {patch} pixels wide; try"
                    f" {max(patch, round(side / patch) * patch)}",
                    "wrong-size",
                )
        weight = next(self.network.parameters())
        image = condition_image.to(weight.device, weight.dtype)
        if self.network.config["in_channels"] == 3:
            return image
        return (image * image.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        return Residuals.numbered("stage", self.network(hint))

    def incompatibility(self, base: Base) -> str | None:
        stages, base_stages = feature_stages(self.network.config), encoder_stages(dict(base.unet.config), base.factor)
        channels = self.network.config["in_channels"]
        if channels not in (1, 3):
            return f"it takes condition images of {channels} channels, not 3 (RGB) or 1 (grey)"
        if stages in (base_stages, base_stages[:-1]):
            return None
        return f"its features: {listed_stages(stages)}, the base's encoder stages: {listed_stages(base_stages[:-1])}"

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def config(self) -> dict[str, Any]:
        return plain_config(self.network)

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"colours": config["in_channels"], "light": config["adapter_type"] == LIGHT}

    def file_state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(state), strict=True, assign=True)

    def to_diffusers(self) -> T2IAdapter:
        """diffusers' network, the one used here; saving it writes diffusers' folder."""
        return self.network

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        stages = listed_stages(feature_stages(config))
        return f"a base whose encoder has, up to a last one that goes to the middle, {stages}"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {"network": config["adapter_type"]}

    @classmethod
    def variants(cls, base: Base, **options: Any) -> dict[str, Control]:
        variants: dict[str, Control] = {"": cls.for_base(base), "for grey images": cls.for_base(base, colours=1)}
        with suppress(UserError):
            variants["light"] = cls.for_base(base, light=True)
        return variants


def feature_stages(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Features of a network of `config`: channels and downsampling factor of each."""
    channels, first, kind = list(config["channels"]), config["downscale_factor"], config["adapter_type"]
    if kind == FULL_XL:
        return tuple((width, first * (1 if place < 2 else 2)) for place, width in enumerate(channels))
    if kind == LIGHT:
        channels.append(channels[-1])
    return tuple((width, first * 2**place) for place, width in enumerate(channels))


def config_for(unet_config: Mapping[str, Any], factor: int, *, colours: int = 3, light: bool = False) -> dict[str, Any]:
    """The config of the `T2IAdapter` of diffusers whose features fit a UNet's encoder.

    Args:
        factor: downsampling factor of the base's autoencoder.
        colours: channels of the condition image: 3, or 1 for grey (sketch, canny).
        light: the small network with a quarter of the inner channels, if it fits.

    Raises:
        UserError: none fits, or `colours` is neither 1 nor 3.
    """
    Options(colours=colours, light=light)  # refuses wrong ones
    stages = encoder_stages(unet_config, factor)
    channels = [widths for widths, _ in stages]
    # The last of `channels` is the middle block's, which XL reaches too; a light network adds its last stage itself.
    candidates = (
        [(LIGHT, channels[:-2])] if light else [(FULL, channels[:-1]), (FULL_XL, channels), (FULL_XL, channels[:-1])]
    )
    for kind, widths in candidates:
        config: dict[str, Any] = {
            "in_channels": colours,
            "channels": widths,
            "num_res_blocks": _RES_BLOCKS[kind],
            "downscale_factor": stages[0][1],
            "adapter_type": kind,
        }
        if widths and feature_stages(config) in (stages, stages[:-1]):
            return config
    raise UserError(
        f"no {'light ' if light else ''}T2I-Adapter fits this base's encoder: {listed_stages(stages[:-1])}",
        "incompatible",
    )


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the original's names; its training prefixes them (`adapter.body.5`), as its inference knows."""
    if not tensors or not all(name.startswith(_PREFIX) for name in tensors):
        return dict(tensors)
    return {name.removeprefix(_PREFIX): value for name, value in tensors.items()}


def _detect_original(file: TensorFile) -> str | None:
    tensors = _without_prefix(file.tensors)

    def four_dimensional(name: str) -> bool:
        return name in tensors and tensors[name].ndim == 4

    full = four_dimensional("body.0.block1.weight") and four_dimensional("conv_in.weight")
    matches = full or four_dimensional("body.0.body.0.block1.weight")
    return "a T2I-Adapter with the names of the original code" if matches else None


def from_original(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """The checkpoint of a file with the original's names.

    Raises:
        UserError: names or shapes are not those of an adapter.
    """
    path, title = file.path, kind.title
    original = _without_prefix(file.tensors)
    names = _from_original_names(original)
    unknown = {name: value for name, value in original.items() if name not in names}
    tensors = {new: original[name] for name, new in names.items()}
    try:
        config = declared_config(file.metadata) or config_of(tensors, reference.unet_config)
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {title}, but {on_one_line(error)}", "damaged-file") from error
    check_names(path, title, expected, {**tensors, **unknown}, file.others)
    ordered = {name: tensors[name] for name in expected}
    return Checkpoint(kind.kind, config, ordered, dict(file.metadata), path=path)


def to_original(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Its tensors with the original's names."""
    light = checkpoint.config["adapter_type"] == "light_adapter"
    blocks_per_stage = checkpoint.config["num_res_blocks"]
    tensors: dict[str, Tensor] = {}
    for name, value in checkpoint.tensors.items():
        match = re.fullmatch(r"adapter\.body\.(\d+)\.(?:resnets\.(\d+)\.)?(.+)", name)
        if match is None:
            tensors[name.removeprefix(_PREFIX)] = value
        elif light:
            block = f"body.{match[2]}." if match[2] else ""
            tensors[f"body.{match[1]}.{block}{match[3]}"] = value
        else:
            tensors[f"body.{int(match[1]) * blocks_per_stage + int(match[2] or 0)}.{match[3]}"] = value
    return tensors


def config_of(tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of diffusers' `T2IAdapter` from its tensors.

    Shapes do not distinguish the full network from Stable Diffusion XL's, whose features have one size in the first two
    stages: the base decides, or the patch size.

    Raises:
        ValueError: they are not those of such a network.
    """
    stages = _max_index(tensors, r"adapter\.body\.(\d+)\.")
    blocks_per_stage = _max_index(tensors, r"adapter\.body\.0\.resnets\.(\d+)\.")
    light = "adapter.body.0.out_conv.weight" in tensors
    first = tensors.get("adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight")
    if not stages or not blocks_per_stage or first is None:
        raise ValueError("its first convolution or its residual blocks are missing")
    last = "out_conv" if light else "resnets.0.block1"
    channels = []
    for stage in range(stages - light):  # diffusers adds a light adapter's last stage itself
        weight = tensors.get(f"adapter.body.{stage}.{last}.weight")
        if weight is None:
            raise ValueError(f"its stage {stage} is missing")
        channels.append(weight.shape[0])
    colours, factor = _input_shape(first.shape[1])
    first_stage = "" if unet_config is None else unet_config["down_block_types"][0]
    halved = factor == 16 if unet_config is None else "CrossAttn" not in first_stage
    kind = "light_adapter" if light else "full_adapter_xl" if halved else "full_adapter"
    return {
        "in_channels": colours,
        "channels": channels,
        "num_res_blocks": blocks_per_stage,
        "downscale_factor": factor,
        "adapter_type": kind,
    }


def _from_original_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the file -> diffusers' name, of those that have one."""
    light = any(re.match(r"body\.\d+\.out_conv\.", name) for name in tensors)
    # A stage starts where channels change; the first change gives the number of blocks per stage.
    stage_starts = [int(match[1]) for name in tensors if (match := re.match(r"body\.(\d+)\.in_conv\.", name))]
    blocks_per_stage = min((start for start in stage_starts if start), default=2)
    renamed: dict[str, str] = {}
    for name in tensors:
        if re.match(r"conv_in\.", name) and not light:
            renamed[name] = f"{_PREFIX}{name}"
        elif light and (
            match := re.fullmatch(r"body\.(\d+)\.(?:body\.(\d+)\.)?((?:in_conv|out_conv|block\d)\..+)", name)
        ):
            block = f"resnets.{match[2]}." if match[2] else ""
            renamed[name] = f"{_PREFIX}body.{match[1]}.{block}{match[3]}"
        elif not light and (match := re.fullmatch(r"body\.(\d+)\.(in_conv|block1|block2)\.(.+)", name)):
            stage, place = divmod(int(match[1]), blocks_per_stage)
            inner = "in_conv" if match[2] == "in_conv" else f"resnets.{place}.{match[2]}"
            renamed[name] = f"{_PREFIX}body.{stage}.{inner}.{match[3]}"
    return renamed


def _max_index(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return max((int(match[1]) + 1 for name in tensors if (match := re.match(pattern, name))), default=0)


def _input_shape(channels: int) -> tuple[int, int]:
    """Channels of the image and side of its patches, from the channels of the unshuffled input."""
    for colours in (3, 1):
        for factor in (1, 2, 4, 8, 16, 32):
            if channels == colours * factor**2:
                return colours, factor
    raise ValueError(f"its input has {channels} channels, expected square patches of grey or RGB pixels")
