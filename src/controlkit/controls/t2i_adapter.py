"""T2I-Adapter (Mou et al., AAAI 2024, arXiv 2302.08453) on diffusers' `T2IAdapter`.

Its files have the names of TencentARC/T2I-Adapter or of diffusers. The original counts through all residual blocks
(`body.5`), diffusers counts blocks of a stage (`adapter.body.2.resnets.1`); the light adapter has stages in both
(branch SD, ldm/modules/encoders/adapter.py).
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
from controlkit.controls.control import Control, OneImage, Reads
from controlkit.controls.encoder_copy.network import checked_config, plain_config
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    Written,
    announced_config,
    check_names,
    on_one_line,
)
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError

FULL, FULL_XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
"""Names of the three networks, as diffusers' configs have them."""

_GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey image (ITU-R BT.601), as Pillow's `convert("L")` has them."""
_RES_BLOCKS = {FULL: 2, FULL_XL: 2, LIGHT: 4}
"""Residual blocks of a stage, as in TencentARC/T2I-Adapter."""
_PREFIX = "adapter."
"""Of diffusers' names."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a T2I-Adapter."""

    colours: int = 3
    """Of the condition image that the network takes: 3, or 1 for grey (sketch, canny)."""
    light: bool = False
    """The small network with a quarter of the channels inside, where its shape fits."""


@control
class T2IAdapterControl(OneImage):
    """A small network of its own, from the condition image to one feature map for each stage of the base's encoder.

    It copies nothing of the base and sees neither noise nor time nor prompt, so it runs once for a condition. It has no
    zero convolutions: a new one starts from torch's random initialisation of convolutions, as the reference's does
    (TencentARC/T2I-Adapter, branch SD, ldm/modules/encoders/adapter.py), and changes images from the first step.
    """

    kind: ClassVar[str] = "t2i-adapter"
    title: ClassVar[str] = "a T2I-Adapter"
    paper: ClassVar[str] = "Mou et al. 2024, arXiv 2302.08453"
    reads: ClassVar[Reads] = Reads.NOTHING
    enters: ClassVar[str] = "encoder stages"
    starts_at_zero: ClassVar[bool] = False
    Options = Options
    diffusers_class: ClassVar[str | None] = "T2IAdapter"
    formats = (
        FileFormat(
            name="original",
            says="the names of TencentARC/T2I-Adapter",
            detect=lambda file: _detect_original(file),
            read=lambda *given: from_original(*given),
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
        """A new one, of random weights; `condition`, `colours` and `light` as in `config_for`.

        Raises:
            UserError: no adapter has the shape of the base's encoder.
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
        """Condition images `[B, 3, H, W]` in [0, 1] => the same, or grey `[B, 1, H, W]` if the network takes that."""
        patch = self.network.config["downscale_factor"]
        for name, side in (("width", condition_image.shape[-1]), ("height", condition_image.shape[-2])):
            if side % patch:
                raise UserError(
                    f"{name} {side} does not fit this T2I-Adapter, which cuts the image into patches of {patch} pixels;"
                    f" try {max(patch, round(side / patch) * patch)}"
                )
        weight = next(self.network.parameters())
        image = condition_image.to(weight.device, weight.dtype)
        if self.network.config["in_channels"] == 3:
            return image
        return (image * image.new_tensor(_GREY)[:, None, None]).sum(1, keepdim=True)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        return Residuals.numbered("stage", self.network(hint))

    def incompatibility(self, base: Base) -> str | None:
        mine, theirs = feature_stages(self.network.config), encoder_stages(dict(base.unet.config), base.factor)
        colours = self.network.config["in_channels"]
        if colours not in (1, 3):
            return f"it takes condition images of {colours} colours, not of 3 or of 1 (grey)"
        if mine in (theirs, theirs[:-1]):
            return None
        return f"its features are {listed_stages(mine)}, the stages of the base's encoder {listed_stages(theirs[:-1])}"

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def config(self) -> dict[str, Any]:
        return plain_config(self.network)

    def file_state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(state), strict=True, assign=True)

    def to_diffusers(self) -> T2IAdapter:
        """diffusers' own network, the very one that is used here; saving it writes diffusers' folder."""
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
        made: dict[str, Control] = {"": cls.for_base(base), "for grey images": cls.for_base(base, colours=1)}
        with suppress(UserError):
            made["light"] = cls.for_base(base, light=True)
        return made


def feature_stages(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """What a network of `config` makes: for each feature its channels, and the pixels of an image to one of it."""
    channels, first, kind = list(config["channels"]), config["downscale_factor"], config["adapter_type"]
    if kind == FULL_XL:
        return tuple((wide, first * (1 if place < 2 else 2)) for place, wide in enumerate(channels))
    if kind == LIGHT:
        channels.append(channels[-1])
    return tuple((wide, first * 2**place) for place, wide in enumerate(channels))


def config_for(unet_config: Mapping[str, Any], factor: int, *, colours: int = 3, light: bool = False) -> dict[str, Any]:
    """The config of diffusers' `T2IAdapter` whose features fit the encoder of a UNet.

    Args:
        factor: pixels of an image to one of its latent, along each side.
        colours: of the condition image that the network takes: 3, or 1 for grey (sketch, canny).
        light: the small network with a quarter of the channels inside, where its shape fits.

    Raises:
        UserError: none has that shape.
    """
    stages = encoder_stages(unet_config, factor)
    channels = [wide for wide, _ in stages]
    # The last of `channels` is the middle's, which XL reaches too; a light network adds its last stage by itself.
    tried = (
        [(LIGHT, channels[:-2])] if light else [(FULL, channels[:-1]), (FULL_XL, channels), (FULL_XL, channels[:-1])]
    )
    for kind, wide in tried:
        config: dict[str, Any] = {
            "in_channels": colours,
            "channels": wide,
            "num_res_blocks": _RES_BLOCKS[kind],
            "downscale_factor": stages[0][1],
            "adapter_type": kind,
        }
        if wide and feature_stages(config) in (stages, stages[:-1]):
            return config
    raise UserError(
        f"no {'light ' if light else ''}T2I-Adapter has the shape of this base's encoder: {listed_stages(stages[:-1])}"
    )


def _detect_original(file: TensorFile) -> str | None:
    def four_dimensional(name: str) -> bool:
        return name in file.tensors and file.tensors[name].ndim == 4

    full = four_dimensional("body.0.block1.weight") and four_dimensional("conv_in.weight")
    found = full or four_dimensional("body.0.body.0.block1.weight")
    return "a T2I-Adapter under the names of the original code" if found else None


def from_original(kind: type[Control], file: TensorFile, reference: Reference, says: str) -> Checkpoint:
    """The checkpoint of a file under the original's names.

    Raises:
        UserError: names or shapes are not those of an adapter.
    """
    path, what = file.path, kind.title
    names = _from_original_names(file.tensors)
    unknown = {name: value for name, value in file.tensors.items() if name not in names}
    tensors = {new: file.tensors[name] for name, new in names.items()}
    try:
        config = announced_config(file.metadata) or config_of(tensors, reference.unet_config)
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{path} looks like {what}, but {on_one_line(error)}") from error
    check_names(path, what, expected, {**tensors, **unknown}, file.others)
    ordered = {name: tensors[name] for name in expected}
    return Checkpoint(kind.kind, config, ordered, dict(file.metadata), path=path)


def to_original(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Its tensors under the original's names."""
    light = checkpoint.config["adapter_type"] == "light_adapter"
    each = checkpoint.config["num_res_blocks"]
    made: dict[str, Tensor] = {}
    for name, value in checkpoint.tensors.items():
        match = re.fullmatch(r"adapter\.body\.(\d+)\.(?:resnets\.(\d+)\.)?(.+)", name)
        if match is None:
            made[name.removeprefix(_PREFIX)] = value
        elif light:
            block = f"body.{match[2]}." if match[2] else ""
            made[f"body.{match[1]}.{block}{match[3]}"] = value
        else:
            made[f"body.{int(match[1]) * each + int(match[2] or 0)}.{match[3]}"] = value
    return made


def config_of(tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of diffusers' `T2IAdapter` whose tensors these are.

    Shapes do not tell the full network from the one of Stable Diffusion XL, whose features are as large at its second
    stage as at its first: the base tells it, or the size of its patches.

    Raises:
        ValueError: they are of no such network.
    """
    stages = _count(tensors, r"adapter\.body\.(\d+)\.")
    each = _count(tensors, r"adapter\.body\.0\.resnets\.(\d+)\.")
    light = "adapter.body.0.out_conv.weight" in tensors
    first = tensors.get("adapter.body.0.in_conv.weight" if light else "adapter.conv_in.weight")
    if not stages or not each or first is None:
        raise ValueError("its first convolution or its residual blocks are missing")
    last = "out_conv" if light else "resnets.0.block1"
    channels = []
    for stage in range(stages - light):  # diffusers adds a light adapter's last stage by itself
        weight = tensors.get(f"adapter.body.{stage}.{last}.weight")
        if weight is None:
            raise ValueError(f"its stage {stage} is missing")
        channels.append(weight.shape[0])
    colours, factor = _input(first.shape[1])
    first_stage = "" if unet_config is None else unet_config["down_block_types"][0]
    halved = factor == 16 if unet_config is None else "CrossAttn" not in first_stage
    kind = "light_adapter" if light else "full_adapter_xl" if halved else "full_adapter"
    return {
        "in_channels": colours,
        "channels": channels,
        "num_res_blocks": each,
        "downscale_factor": factor,
        "adapter_type": kind,
    }


def _from_original_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in the file -> diffusers' name, of those that have one."""
    light = any(re.match(r"body\.\d+\.out_conv\.", name) for name in tensors)
    # Where channels change, a stage begins; the first change tells how many blocks a stage has.
    begins = [int(match[1]) for name in tensors if (match := re.match(r"body\.(\d+)\.in_conv\.", name))]
    each = min((begin for begin in begins if begin), default=2)
    made: dict[str, str] = {}
    for name in tensors:
        if re.match(r"conv_in\.", name) and not light:
            made[name] = f"{_PREFIX}{name}"
        elif light and (
            match := re.fullmatch(r"body\.(\d+)\.(?:body\.(\d+)\.)?((?:in_conv|out_conv|block\d)\..+)", name)
        ):
            block = f"resnets.{match[2]}." if match[2] else ""
            made[name] = f"{_PREFIX}body.{match[1]}.{block}{match[3]}"
        elif not light and (match := re.fullmatch(r"body\.(\d+)\.(in_conv|block1|block2)\.(.+)", name)):
            stage, place = divmod(int(match[1]), each)
            inner = "in_conv" if match[2] == "in_conv" else f"resnets.{place}.{match[2]}"
            made[name] = f"{_PREFIX}body.{stage}.{inner}.{match[3]}"
    return made


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return max((int(match[1]) + 1 for name in tensors if (match := re.match(pattern, name))), default=0)


def _input(channels: int) -> tuple[int, int]:
    """Colours of the image and the side of its patches, from channels after the pixels of a patch are stacked."""
    for colours in (3, 1):
        for factor in (1, 2, 4, 8, 16, 32):
            if channels == colours * factor**2:
                return colours, factor
    raise ValueError(f"its input has {channels} channels, which are no square patches of grey or of colours")
