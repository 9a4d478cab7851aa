"""ControlNet-lite: ControlNet with each block of the encoder copy replaced by one convolution, trained from scratch.

Two published designs:

- `paper`, the ablation of Zhang et al. 2023 (arXiv 2302.05543, section 4.2): each block of the trainable copy is one
convolution layer; hint network, zero convolutions, injection sites and input (noisy latent plus hint) are ControlNet's.
No layer is left that could read time or text.
- `ctrlora`, the baseline of Xu et al. 2025 (arXiv 2410.09400; xyfJASON/ctrlora, cldm/cldm_lite.py): a group norm, SiLU
and a convolution instead of a layer, a bare convolution instead of a downsampler; residuals are added after each
encoder block, not to the decoder's skips.

Files of the second have the names of its repository: `control_model.*`, bare, or inside a training checkpoint.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding, zero_module
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.controls.control import Control, OneImage, Reads
from controlkit.controls.encoder_copy.network import checked_config, hint_channels_for, hint_incompatibility
from controlkit.controls.encoder_copy.original import (
    BARE_DESCRIPTION,
    FULL_DESCRIPTION,
    ORIGINAL_DESCRIPTION,
    PREFIX,
    FullCheckpoint,
    Names,
    full_note,
    without_prefix,
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
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError

Design = Literal["paper", "ctrlora"]

SITES: dict[str, str] = {"paper": "skip", "ctrlora": "encoder"}
"""Design -> family of its injection sites, besides the middle."""

Blocks = Sequence[Sequence[int]]
"""Encoder blocks, from the outermost in: channels, and the number of downsamplings of the latent at the output."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet-lite."""

    design: Design = "paper"
    """`paper`: the ablation of Zhang et al. 2023, added to the decoder's skips; `ctrlora`: CtrLoRA's baseline with
    group norms, added to the encoder."""


@control
class ControlNetLite(OneImage):
    """A pyramid of convolutions on the noisy latent and the hint, joined to the base by zero convolutions.

    Args:
        in_channels: of the latent.
        blocks: of the base's encoder; the first takes the latent, and the hint is added to its output.
        hint_channels: of the hint network's stages, one more than its downsamplings.
    """

    kind: ClassVar[str] = "controlnet-lite"
    title: ClassVar[str] = "a ControlNet-lite"
    paper: ClassVar[str] = "Zhang, Rao and Agrawala 2023, arXiv 2302.05543, section 4.2"
    reads: ClassVar[Reads] = Reads.NOISE
    enters: ClassVar[str] = "decoder skips (design ctrlora: encoder blocks) and middle"
    Options = Options
    not_elsewhere: ClassVar[str] = "only CtrLoRA's repository has such a network, of the design ctrlora"
    formats = (
        FileFormat(
            name="original",
            description=ORIGINAL_DESCRIPTION,
            detect=lambda file: _detect(file, prefix=PREFIX, full=False),
            read=lambda *arguments: read_original(*arguments),
            write=lambda checkpoint, reference: write_original(checkpoint, PREFIX),
        ),
        FileFormat(
            name="bare",
            description=BARE_DESCRIPTION,
            detect=lambda file: _detect(file, prefix="", full=False),
            read=lambda *arguments: read_original(*arguments),
            write=lambda checkpoint, reference: write_original(checkpoint, ""),
        ),
        FileFormat(
            name="full",
            description=FULL_DESCRIPTION,
            detect=lambda file: _detect(file, prefix=PREFIX, full=True),
            read=lambda *arguments: read_full(*arguments),
        ),
    )

    def __init__(
        self,
        *,
        design: str,
        in_channels: int,
        blocks: Blocks,
        hint_channels: Sequence[int],
        condition: str | None = None,
    ) -> None:
        super().__init__()
        if design not in SITES:
            raise ValueError(f"design is {design!r}; expected one of {', '.join(SITES)}")
        self.design, self.in_channels = design, in_channels
        self.encoder_blocks, self.hint_channels = checked_blocks(blocks), list(hint_channels)
        self.condition = condition
        first, last = self.encoder_blocks[0][0], self.encoder_blocks[-1][0]
        self.hint_network = ControlNetConditioningEmbedding(first, block_out_channels=tuple(hint_channels))
        layers = [nn.Sequential(OrderedDict(conv=_convolution(in_channels, first)))]
        groups = math.gcd(32, *(channels for channels, _ in self.encoder_blocks))  # 32 in Stable Diffusion's widths
        layer = _layer if design == "paper" else _normalised_layer
        for (width, depth), (out_width, out_depth) in pairwise(self.encoder_blocks):
            layers.append(layer(width, out_width, halving=out_depth > depth, groups=groups))
        self.blocks = nn.ModuleList(layers)
        self.middle = layer(last, last, halving=False, groups=groups)
        if design == "paper":
            initialise_for_relu([*self.blocks, self.middle])
        self.zero_convs = nn.ModuleList(zero_convolution(channels) for channels, _ in self.encoder_blocks)
        self.middle_zero_conv = zero_convolution(last)
        if design == "ctrlora":
            width = 4 * first
            self.time_embed = nn.ModuleDict({"0": UnusedLinear(first, width), "2": UnusedLinear(width, width)})

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, design: str = "paper", **options: Any
    ) -> ControlNetLite:
        """A new one, with random weights and zero convolutions.

        Args:
            design: as in `Options`.

        Raises:
            UserError: the design is unknown, or the base's encoder does not fit.
        """
        if design not in SITES:
            raise UserError(f"design is {design!r}; expected one of {', '.join(SITES)}", "unknown-name")
        new = cls(
            design=design,
            in_channels=base.latent_channels,
            blocks=blocks_of(base, SITES[design], cls.title),
            hint_channels=hint_channels_for(base, cls.title),
            condition=condition,
        )
        return new.to(base.device, base.dtype)

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        weight = self.hint_network.conv_in.weight
        return self.hint_network(condition_image.to(weight.device, weight.dtype))

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and isinstance(hint, Tensor)
        residuals = []
        stream = x_t
        for number, (layer, zero_conv) in enumerate(zip(self.blocks, self.zero_convs, strict=True)):
            stream = layer(stream) if number else layer(stream) + hint
            residuals.append(zero_conv(stream))
        middle = self.middle_zero_conv(self.middle(stream))
        return Residuals.numbered(SITES[self.design], residuals, middle=middle)

    def incompatibility(self, base: Base) -> str | None:
        if self.in_channels != base.latent_channels:
            return f"its latent channels: {self.in_channels}, the base's: {base.latent_channels}"
        return block_incompatibility(self.encoder_blocks, self.hint_channels, base, SITES[self.design])

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def config(self) -> dict[str, Any]:
        return {
            "design": self.design,
            "in_channels": self.in_channels,
            "blocks": [list(block) for block in self.encoder_blocks],
            "hint_channels": self.hint_channels,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetLite:
        return cls(**checked_config(config), condition=condition).eval()

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        listed = listed_blocks(config["blocks"], config["hint_channels"])
        return f"a base of {config['in_channels']} latent channels whose encoder has blocks of {listed}"

    def parameter_counts(self) -> dict[str, int]:
        unused = sum(tensor.numel() for tensor in self.buffers())
        return {**super().parameter_counts(), **({"unused": unused} if unused else {})}

    @classmethod
    def variants(cls, base: Base, **options: Any) -> dict[str, Control]:
        return {"": cls.for_base(base), "design ctrlora": cls.for_base(base, design="ctrlora")}


class UnusedLinear(nn.Module):
    """A linear layer of the files that no computation uses: stored unchanged, never trained.

    CtrLoRA's repository computes a time embedding and passes it to modules that ignore it.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out, channels))
        self.register_buffer("bias", torch.zeros(out))


# Blocks of the base's encoder


def blocks_of(base: Base, family: str, title: str) -> list[tuple[int, int]]:
    """Blocks of the base's encoder, from its sites of one family (`skip`, `encoder`).

    Args:
        title: of the control, for errors.

    Raises:
        UserError: the base has no such sites.
    """
    sites = [shape for site, shape in base.sites.items() if site.rpartition(".")[0] == family]
    if not sites or "middle" not in base.sites:
        raise UserError(
            f"{base.name} has no sites {family}.N and middle, which {title} needs; use another base", "incompatible"
        )
    return [(channels, round(math.log2(pixels / base.factor))) for channels, pixels in sites]


def checked_blocks(blocks: Blocks) -> list[tuple[int, int]]:
    """Blocks, if they form an encoder that starts at the latent's size.

    Raises:
        ValueError: they do not.
    """
    checked = [(int(channels), int(halvings)) for channels, halvings in blocks]
    depths = [halvings for _, halvings in checked]
    if not checked or depths[0] != 0 or any(b - a not in (0, 1) for a, b in pairwise(depths)):
        raise ValueError(
            f"blocks are {list(blocks)}; expected [channels, downsamplings] per block, starting at 0 downsamplings"
        )
    return checked


def block_incompatibility(blocks: Blocks, hint_channels: Sequence[int], base: Base, family: str) -> str | None:
    """Why a control with these blocks, for sites of one family, does not fit a base; None if it fits."""
    if (reason := hint_incompatibility(hint_channels, base)) is not None:
        return reason
    try:
        base_blocks = blocks_of(base, family, "it")
    except UserError as error:
        return str(error)
    if list(map(tuple, blocks)) != base_blocks:
        return (
            f"the channels of its blocks: {listed_blocks(blocks, hint_channels)},"
            f" the base's: {listed_blocks(base_blocks, hint_channels)}"
        )
    return None


def listed_blocks(blocks: Blocks, hint_channels: Sequence[int]) -> str:
    """Blocks as text: `320 320 320 at 1/8, 320 640 640 at 1/16`."""
    factor = 2 ** (len(hint_channels) - 1)
    parts = groupby(blocks, key=lambda block: block[1])
    return ", ".join(
        f"{' '.join(str(channels) for channels, _ in part)} at 1/{factor * 2**depth}" for depth, part in parts
    )


# Layers


def zero_convolution(channels: int) -> nn.Conv2d:
    """A 1 x 1 convolution initialised to zero (Zhang et al. 2023, section 3.1)."""
    return zero_module(nn.Conv2d(channels, channels, 1))


def initialise_for_relu(modules: Sequence[nn.Module]) -> None:
    """Gaussian weights that preserve the signal's scale in a ReLU network (He et al. 2015, arXiv 1502.01852).

    Without norms between layers, torch's defaults would shrink it by two thirds per layer.
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                assert part.bias is not None
                nn.init.zeros_(part.bias)


def _convolution(channels: int, out: int, *, halving: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=2 if halving else 1, padding=1)


def _layer(channels: int, out: int, *, halving: bool, groups: int) -> nn.Sequential:
    """One convolution layer of the paper; it specifies no activation here, and uses ReLU and Gaussian weights elsewhere
    (the hint network of section 3.2)."""
    return nn.Sequential(OrderedDict(act=nn.ReLU(), conv=_convolution(channels, out, halving=halving)))


def _normalised_layer(channels: int, out: int, *, halving: bool, groups: int) -> nn.Sequential:
    """The layer of CtrLoRA's repository."""
    conv = _convolution(channels, out, halving=halving)
    if halving:
        return nn.Sequential(OrderedDict(conv=conv))
    return nn.Sequential(OrderedDict(norm=nn.GroupNorm(groups, channels), act=nn.SiLU(), conv=conv))


# Files of CtrLoRA's repository


def original_paths(config: Mapping[str, Any]) -> dict[str, str]:
    """Path of a layer here -> in xyfJASON/ctrlora, cldm/cldm_lite.py.

    Raises:
        ValueError: the design is `paper`, which that code lacks.
    """
    if config["design"] != "ctrlora":
        raise ValueError(f"CtrLoRA's repository has no ControlNet-lite of the design {config['design']}")
    paths = {
        "middle.norm": "middle_block.0",
        "middle.conv": "middle_block.2",
        "middle_zero_conv": "middle_block_out.0",
        "time_embed.0": "time_embed.0",
        "time_embed.2": "time_embed.2",
        "blocks.0.conv": "input_blocks.0.0",
    }
    blocks = config["blocks"]
    for number in range(1, len(blocks)):
        own, original = f"blocks.{number}", f"input_blocks.{number}"
        if blocks[number][1] > blocks[number - 1][1]:
            paths[f"{own}.conv"] = f"{original}.0.op"
        else:
            paths |= {f"{own}.norm": f"{original}.0", f"{own}.conv": f"{original}.2"}
    paths |= {f"zero_convs.{number}": f"zero_convs.{number}.0" for number in range(len(blocks))}
    hint_layers = ["conv_in", *(f"blocks.{place}" for place in range(2 * len(config["hint_channels"]) - 2)), "conv_out"]
    return paths | {f"hint_network.{name}": f"input_hint_block.{2 * place}" for place, name in enumerate(hint_layers)}


def original_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of a network from its tensors with that code's names, without prefix.

    Raises:
        ValueError: they are not those of such a network.
    """
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"input_blocks\.(\d+)\.", name))]
    blocks: list[tuple[int, int]] = []
    for number in range(max(numbers, default=-1) + 1):
        path = f"input_blocks.{number}"
        halving = number > 0 and any(name.startswith(f"{path}.0.op.") for name in tensors)
        channels = _out_channels(tensors, f"{path}.0" if number == 0 else f"{path}.0.op" if halving else f"{path}.2")
        blocks.append((channels, halving + (blocks[-1][1] if blocks else 0)))
    hint_indices = [int(match[1]) for name in tensors if (match := re.match(r"input_hint_block\.(\d+)\.", name))]
    # Two convolutions per stage, each with an activation; the second has the channels of the next stage.
    stages = [
        _out_channels(tensors, f"input_hint_block.{place}") for place in range(0, max(hint_indices, default=0), 4)
    ]
    first_weight = tensors.get("input_blocks.0.0.weight")
    return {
        "design": "ctrlora",
        "in_channels": 4 if first_weight is None or first_weight.ndim != 4 else first_weight.shape[1],
        "blocks": checked_blocks(blocks),
        "hint_channels": stages,
    }


def read_original(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """A file of the control alone, with or without the prefix.

    Raises:
        UserError: names or shapes are not those of such a network.
    """
    inside, others, prefix = without_prefix(file)
    return _checkpoint(kind, file, inside, others, prefix)


def read_full(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    """The control in a training checkpoint that also contains Stable Diffusion.

    Raises:
        UserError: names or shapes are not those of such a network.
    """
    full = FullCheckpoint.of(file)
    checkpoint = _checkpoint(kind, file, full.inside, full.unknown, PREFIX)
    checkpoint.notes.append(full_note(full.stable_diffusion))
    return checkpoint


def write_original(checkpoint: Checkpoint, prefix: str) -> Written:
    """Its tensors with that code's names.

    Raises:
        UserError: it is of the design `paper`.
    """
    try:
        paths = original_paths(checkpoint.config)
    except ValueError as error:
        raise UserError(f"{error}; write it in the format controlkit", "unsupported") from error
    return Written(
        tensors={f"{prefix}{_original_name(name, paths)}": value for name, value in checkpoint.tensors.items()}
    )


def _detect(file: TensorFile, *, prefix: str, full: bool) -> str | None:
    names = Names.of(file.tensors)
    # Norm, activation and convolution are parts 0, 1 and 2 of a block; a UNet's blocks have no weights of a part 2.
    is_lite = names.is_copy and any(re.fullmatch(r"input_blocks\.\d+\.2\.(weight|bias)", name) for name in names.inside)
    fits = (names.prefix, names.has_stable_diffusion) == (prefix, full)
    return "a ControlNet-lite with the names of CtrLoRA's repository" if is_lite and fits else None


def _checkpoint(
    kind: type[Control], file: TensorFile, tensors: Mapping[str, Tensor], others: Sequence[str], prefix: str
) -> Checkpoint:
    """The checkpoint of tensors with that code's names; every tensor must be accounted for."""
    try:
        config = declared_config(file.metadata) or original_config(tensors)
        paths = original_paths(config)
        expected = kind.shapes(config)
        original_names = {name: _original_name(name, paths) for name in expected}
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {kind.title}, but {on_one_line(error)}", "damaged-file") from error
    expected_in_file = {f"{prefix}{original_names[name]}": shape for name, shape in expected.items()}
    check_names(
        file.path, kind.title, expected_in_file, {f"{prefix}{name}": value for name, value in tensors.items()}, others
    )
    return Checkpoint(
        kind.kind,
        config,
        {name: tensors[original_names[name]] for name in expected},
        dict(file.metadata),
        path=file.path,
    )


def _original_name(name: str, paths: Mapping[str, str]) -> str:
    path, _, last = name.rpartition(".")
    return f"{paths[path]}.{last}"


def _out_channels(tensors: Mapping[str, Tensor], path: str) -> int:
    """Output channels of a layer; a damaged file may lack its weight or its bias."""
    for name in (f"{path}.weight", f"{path}.bias"):
        if name in tensors and tensors[name].ndim:
            return tensors[name].shape[0]
    raise ValueError(f"its layer {path} is missing")
