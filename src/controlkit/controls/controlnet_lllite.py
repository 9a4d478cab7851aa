"""ControlNet-LLLite (kohya-ss/sd-scripts, networks/control_net_lllite.py): small networks before layers of attention.

Each embeds the condition image at the resolution of its layer, once, and at every step adds to the layer's input what
it makes of both. Files have kohya's names, which ComfyUI reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from controlkit.bases.base import Base
from controlkit.bases.taps import MODULE, Tap
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, OneImage, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import check_range
from controlkit.controls.registry import control
from controlkit.errors import UserError

_PREFIX = "lllite_unet_"
_LAYER = re.compile(
    r"lllite_unet_(?:(input|output)_blocks_(\d+)|(middle)_block)_1_transformer_blocks_(\d+)_(attn\d)_(to_[qkv])"
)
_PLACE = re.compile(
    r"(?:(down|up)_blocks\.(\d+)\.attentions\.(\d+)|(mid)_block\.attentions\.0)"
    r"\.transformer_blocks\.(\d+)\.(attn\d)\.(to_[qkv])"
)
_ADAPTED = re.compile(r"(down|mid)_block.*\.(attn1\.to_[qkv]|attn2\.to_q)")
"""Layers for which a new one is made: those of encoder and middle that read image features."""
_SDXL_BLOCK = 2
"""Layers per block in Stable Diffusion XL."""
_SDXL_FACTOR = 8
"""Downsampling factor of its autoencoder."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet-LLLite."""

    cond_emb_dim: int = 32
    """Channels of the embedded condition image (32 in kohya's canny; half of it may do for depth)."""
    mlp_dim: int = 64
    """Inner channels (64 in kohya's canny)."""

    def __post_init__(self) -> None:
        if self.cond_emb_dim < 2 or self.cond_emb_dim % 2:
            raise UserError(
                f"cond_emb_dim is {self.cond_emb_dim}; expected an even number of 2 or more", "out-of-range"
            )
        if self.mlp_dim < 1:
            raise UserError(f"mlp_dim is {self.mlp_dim}; expected 1 or more", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet-LLLite."""

    start: str | None = None
    """Initial weights: a ControlNet-LLLite. Default: a new one."""


Sizes = tuple[int, int]
"""Of the network before a layer: channels of the layer's input, and halvings of twice the latent's resolution."""
_MOST_HALVINGS = 8


class Layer(nn.Module):
    """The network before one layer.

    Args:
        sizes: of the layer.
        cond_emb_dim: channels of the embedded condition image.
        mlp_dim: inner channels.
        stride: of its first convolution: half the downsampling factor of the autoencoder.
    """

    def __init__(self, sizes: Sizes, cond_emb_dim: int, mlp_dim: int, stride: int) -> None:
        super().__init__()
        channels, halvings = sizes
        half = cond_emb_dim // 2
        parts: list[nn.Module] = [nn.Conv2d(3, half, stride, stride)]
        strides = _strides(halvings)
        for place, each in enumerate(strides, 1):
            parts += [nn.ReLU(), nn.Conv2d(half, cond_emb_dim if place == len(strides) else half, each, each)]
        self.conditioning1 = nn.Sequential(*parts)
        self.down = nn.Sequential(nn.Linear(channels, mlp_dim), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(mlp_dim + cond_emb_dim, mlp_dim), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(mlp_dim, channels))

    def embed(self, condition_image: Tensor) -> Tensor:
        """Condition images in [-1, 1] => one vector for each token of the layer, `[B, n, cond_emb_dim]`."""
        return self.conditioning1(condition_image).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, embedded: Tensor, weight: Tensor) -> Tensor:
        """What is added to the output of the layer, for its input `[B, n, channels]` and its weight.

        That is the weight times what kohya adds to the input, with the product of both matrices computed first: it is
        much smaller than either times all tokens.
        """
        up = self.up[0]
        assert isinstance(up, nn.Linear)
        inner = self.mid(torch.cat([embedded.to(x), self.down(x)], 2))
        return functional.linear(inner, weight @ up.weight, weight @ up.bias)


@control
class ControlNetLLLite(OneImage):
    """Small networks before layers of the base's attention.

    Args:
        layers: path of a layer in diffusers' UNet -> sizes of the network before it.
        cond_emb_dim: as in `Options`.
        mlp_dim: as in `Options`.
        layers_per_block: of the base, from which kohya's names count.
        factor: downsampling factor of the base's autoencoder.
    """

    kind: ClassVar[str] = "controlnet-lllite"
    title: ClassVar[str] = "a ControlNet-LLLite"
    paper: ClassVar[str] = "kohya-ss 2023, github.com/kohya-ss/sd-scripts"
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "before layers of attention, whose input it reads at every step"
    architecture: ClassVar[str | None] = "control-net-lllite"
    Options = Options
    trainings = (
        Training(
            system="controlnet-lllite",
            also=("controlnet-lllite-pairs",),
            options=Start,
            doc="A ControlNet-LLLite, one condition.",
        ),
    )

    def __init__(
        self,
        layers: Mapping[str, Sizes],
        *,
        cond_emb_dim: int,
        mlp_dim: int,
        layers_per_block: int = _SDXL_BLOCK,
        factor: int = _SDXL_FACTOR,
        condition: str | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.layers_per_block, self.factor = dict(layers), layers_per_block, factor
        self.sizes = {"cond_emb_dim": cond_emb_dim, "mlp_dim": mlp_dim}
        self.condition = condition
        self.network = nn.ModuleDict(
            {self._name(path): Layer(sizes, cond_emb_dim, mlp_dim, factor // 2) for path, sizes in layers.items()}
        )

    def _name(self, path: str) -> str:
        """kohya's name of a layer, which counts the blocks of encoder and decoder through."""
        found = _PLACE.fullmatch(path)
        if found is None:
            raise ValueError(f"{path} is no layer of attention that reads image features")
        side, block, attention, _, transformer, name, layer = found.groups()
        if side is None:
            place = "middle_block"
        else:
            number = int(block) * (self.layers_per_block + 1) + int(attention)
            place = f"input_blocks_{number + 1}" if side == "down" else f"output_blocks_{number}"
        return f"{_PREFIX}{place}_1_transformer_blocks_{transformer}_{name}_{layer}"

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, cond_emb_dim: int = 32, mlp_dim: int = 64, **options: Any
    ) -> ControlNetLLLite:
        """A new one, which adds zero: before query, key and value of self-attention and query of cross-attention, in
        encoder and middle. The options are those of `Options`.

        Raises:
            UserError: the base has no UNet or an odd downsampling factor, or an option is out of range.
        """
        Options(cond_emb_dim=cond_emb_dim, mlp_dim=mlp_dim)  # refuses wrong ones
        unet = base.unet
        if (reason := _unusual(unet)) is not None:
            raise UserError(f"{cls.title} does not fit {base.name}: {reason}", "incompatible")
        if base.factor % 2:
            raise UserError(
                f"{cls.title} needs an even downsampling factor; {base.name} has {base.factor}", "incompatible"
            )
        layers = {
            path: (module.in_features, _level(path, unet) + 1)
            for path, module in unet.named_modules()
            if isinstance(module, nn.Linear) and _ADAPTED.fullmatch(path) and _PLACE.fullmatch(path)
        }
        made = cls(
            layers,
            cond_emb_dim=cond_emb_dim,
            mlp_dim=mlp_dim,
            layers_per_block=int(unet.config["layers_per_block"]),
            factor=base.factor,
            condition=condition,
        )
        for name, parameter in made.network.named_parameters():
            if ".up." in name:  # kohya leaves its bias random, which changes images from the start
                nn.init.zeros_(parameter)
        return made.to(base.device, base.dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetLLLite:
        config = checked_config(config)
        layers = {str(path): (int(channels), int(halvings)) for path, (channels, halvings) in config["layers"].items()}
        if any(not 0 < halvings <= _MOST_HALVINGS for _, halvings in layers.values()):
            raise ValueError(f"a layer has halvings that are not from 1 to {_MOST_HALVINGS}")
        return cls(
            layers,
            cond_emb_dim=int(config["cond_emb_dim"]),
            mlp_dim=int(config["mlp_dim"]),
            layers_per_block=int(config.get("layers_per_block", _SDXL_BLOCK)),
            factor=int(config.get("factor", _SDXL_FACTOR)),
            condition=condition,
        ).eval()

    def config(self) -> dict[str, Any]:
        layers = {path: list(sizes) for path, sizes in self.layers.items()}
        return {
            "layers": layers,
            **self.sizes,
            "layers_per_block": self.layers_per_block,
            "factor": self.factor,
        }

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        # A file does not say from which base its numbers of blocks are.
        per_block = int((unet_config or {}).get("layers_per_block") or _SDXL_BLOCK)
        layers, inner = dict[str, list[int]](), 0
        names = dict.fromkeys(name.partition(".")[0] for name in tensors)
        for name in names:
            found, down = _LAYER.fullmatch(name), tensors.get(f"{name}.down.0.weight")
            path = None if found is None else _path(found, per_block)
            if path is None or (down is not None and down.ndim != 2):
                raise ValueError(
                    f"it acts on {name}, which is not supported; expected query, key and value of attention"
                )
            if down is None:
                raise ValueError(f"it lacks {name}.down.0.weight")
            strides = [
                value.shape[-1]
                for place in (2, 4, 6)
                if (value := tensors.get(f"{name}.conditioning1.{place}.weight")) is not None
            ]
            halvings = sum(stride.bit_length() - 1 for stride in strides)
            layers[path], inner = [down.shape[1], halvings], down.shape[0]
        first = next(value for name, value in tensors.items() if name.endswith(".conditioning1.0.weight"))
        return {
            "layers": layers,
            "cond_emb_dim": 2 * first.shape[0],
            "mlp_dim": inner,
            "layers_per_block": per_block,
            "factor": 2 * first.shape[-1],
        }

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return any(name.startswith(_PREFIX) and name.endswith(".conditioning1.0.weight") for name in tensors)

    def file_state(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        self.network.load_state_dict(dict(state), strict=True, assign=True)

    # Computation

    def encode(self, condition_image: Tensor, base: Base) -> Mapping[str, Tensor]:
        """Each layer's embedding of the condition images, `[B, n, cond_emb_dim]`, by its path.

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: a side is no multiple of the lowest resolution's pixels.
        """
        check_range(condition_image)
        multiple = self.factor * 2 ** (max(halvings for _, halvings in self.layers.values()) - 1)
        height, width = condition_image.shape[-2:]
        if height % multiple or width % multiple:
            near = [max(1, round(side / multiple)) * multiple for side in (width, height)]
            raise UserError(
                f"{self.title} needs a width and a height that are multiples of {multiple}, also in a second pass; they"
                f" are {width} and {height}; try {near[0]} and {near[1]}",
                "wrong-size",
            )
        weight = next(self.parameters())
        image = (condition_image * 2 - 1).to(weight)
        return {path: self._layer(path).embed(image) for path in self.layers}

    def _layer(self, path: str) -> Layer:
        layer = self.network[self._name(path)]
        assert isinstance(layer, Layer)
        return layer

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, Tap]:
        """What each network adds to the input of a layer is added to its output, through the layer's weight."""
        assert isinstance(hint, Mapping)

        def function(path: str) -> Tap:
            layer, embedded = self._layer(path), hint[path]

            def added(x: Tensor) -> Tensor:
                # Read now: another control may run its own decoder in place of the base's.
                weight = base.unet.get_submodule(path).weight
                assert isinstance(weight, Tensor)
                return layer(x, embedded, weight)

            return Tap(function=added, of_input=True)

        return {f"{MODULE}{path}": function(path) for path in self.layers}

    def incompatibility(self, base: Base) -> str | None:
        if not isinstance(base.denoiser, UNet2DConditionModel):
            return f"it needs a UNet; the base has a {type(base.denoiser).__name__}"
        if (reason := _unusual(base.unet)) is not None:
            return reason
        if base.factor != self.factor:
            return f"its downsampling factor: {self.factor}, the base's: {base.factor}"
        modules = dict(base.unet.named_modules())
        for path, (channels, _) in self.layers.items():
            module = modules.get(path)
            if not isinstance(module, nn.Linear):
                return f"it has a network before {path}, which the base lacks"
            if module.in_features != channels:
                return f"its channels of {path}: {channels}, the base's: {module.in_features}"
        return None

    # Training

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        widths = sorted({channels for channels, _ in config["layers"].values()})
        return f"a UNet with attention at {', '.join(map(str, widths))} channels"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {
            "layers": str(len(config["layers"])),
            "channels": f"{config['cond_emb_dim']} of the embedded condition image, {config['mlp_dim']} inner",
        }


def _strides(halvings: int) -> list[int]:
    """Strides of the convolutions after the first."""
    return [4] * (halvings // 2) + [2] * (halvings % 2)


def _level(path: str, unet: UNet2DConditionModel) -> int:
    """How often the features of a layer are halved, from the latent's resolution on."""
    side = path.partition(".")[0]
    return int(path.split(".")[1]) if side == "down_blocks" else len(unet.config["down_block_types"]) - 1


def _unusual(unet: UNet2DConditionModel) -> str | None:
    """Why no network can be made for a UNet; None if one can."""
    if not isinstance(unet.config["layers_per_block"], int):
        return "its UNet has other numbers of layers in each block"
    if unet.config.get("only_cross_attention"):
        return "its UNet has no self-attention (only_cross_attention)"
    return None


def _path(found: re.Match[str], per_block: int) -> str | None:
    """The path in diffusers' UNet of a layer that kohya calls so; None if there is no such block."""
    side, number, _, transformer, name, layer = found.groups()
    if side is None:
        place = "mid_block.attentions.0"
    else:
        block, attention = divmod(int(number) - (side == "input"), per_block + 1)
        if block < 0:
            return None
        place = f"{'down' if side == 'input' else 'up'}_blocks.{block}.attentions.{attention}"
    return f"{place}.transformer_blocks.{transformer}.{name}.{layer}"
