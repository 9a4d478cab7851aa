"""Control LoRAs of FLUX.1: Black Forest Labs' Canny and Depth as LoRAs, and those of diffusers' training script
(examples/flux-control/train_control_lora_flux.py).

The transformer reads the latent of the condition beside the noisy one: its first layer has twice the channels. A LoRA
adapts that layer, whose new half is zero in the base, and layers of the blocks; some files also replace norms. Here it
runs beside the base's layers, at the steps and with the weight of the control, and the base stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.flux import pack
from controlkit.bases.taps import MODULE, Tap, TapFunction
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, Control, Reads, Training
from controlkit.controls.encoder_copy.network import checked_config
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
from controlkit.controls.transformer_control import TransformerControl
from controlkit.errors import UserError

EMBEDDER = "x_embedder"
"""The transformer's first layer."""
TARGETS = (
    *(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{network}.net.{layer}" for network in ("ff", "ff_context") for layer in ("0.proj", "2")),
)
"""Layers of the blocks that a new one adapts, those of diffusers' script."""
_PREFIX = "transformer."
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_LAST_NORM = "final_layer.adaLN_modulation.1"
_CHANNELS = 64
"""Channels of a token in FLUX.1."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a control LoRA of FLUX.1."""

    rank: int = 64
    """Rank of every layer (128 in Black Forest Labs')."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank is {self.rank}; expected 1 or more", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a control LoRA of FLUX.1."""

    start: str | None = None
    """Initial weights: such a control LoRA. Default: a new one."""


Sizes = tuple[int, int, int, bool]
"""Of a low-rank layer: channels of its input, rank, channels of its output, and whether it also adds a bias."""


class Layer(nn.Module):
    """Low-rank layer beside a linear one."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        read, rank, made, biased = sizes
        self.lora_A = nn.Linear(read, rank, bias=False)
        self.lora_B = nn.Linear(rank, made, bias=bool(biased))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.lora_B(self.lora_A(x))
        return made


def _detect_diffusers(file: TensorFile) -> str | None:
    embedder = file.tensors.get(f"{_PREFIX}{EMBEDDER}.lora_A.weight")
    # It reads the latent and the condition.
    is_one = embedder is not None and embedder.ndim == 2 and embedder.shape[1] == 2 * _CHANNELS
    return "a control LoRA of FLUX.1" if is_one and "control.kind" not in file.metadata else None


def _read_diffusers(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    config = _config_of(file, description)
    check_names(file.path, description, kind.shapes(config), file.tensors, file.others)
    return Checkpoint(kind.kind, config, _scaled(file, config), dict(file.metadata), path=file.path)


def _config_of(file: TensorFile, description: str) -> dict[str, Any]:
    try:
        return FluxControlLora.config_of(file.tensors)
    except CONFIG_ERRORS as error:
        raise UserError(
            f"{file.path} looks like {description}, but lacks {on_one_line(error)}", "damaged-file"
        ) from error


def _scaled(file: TensorFile, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors with alpha / rank, if the metadata of peft has an alpha, multiplied into the upper halves.

    Raises:
        UserError: layers have alphas of their own, or it is no LoRA.
    """
    text = file.metadata.get("lora_adapter_metadata")
    try:
        settings = json.loads(text) if text else {}
        if settings.get(f"{_PREFIX}alpha_pattern") or settings.get(f"{_PREFIX}use_dora"):
            raise UserError(
                f"{file.path} has alphas for single layers, or is a DoRA, which is not supported", "unsupported"
            )
        alpha = settings.get(f"{_PREFIX}lora_alpha")
    except (ValueError, AttributeError) as error:
        raise UserError(f"lora_adapter_metadata of {file.path} is not JSON ({error})", "damaged-file") from error
    if alpha is None:
        return dict(file.tensors)
    ranks = {f"{_PREFIX}{path}.lora_B.weight": sizes[1] for path, sizes in config["layers"].items()}
    return {
        name: value.float() * (float(alpha) / ranks[name]) if name in ranks and alpha != ranks[name] else value
        for name, value in file.tensors.items()
    }


def _detect_original(file: TensorFile) -> str | None:
    is_one = {"img_in.lora_A.weight", "double_blocks.0.img_attn.norm.query_norm.scale"} <= set(file.tensors)
    return "a control LoRA of FLUX.1 under Black Forest Labs' names" if is_one else None


def _read_original(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    try:
        tensors = FluxLoraLoaderMixin.lora_state_dict(dict(file.tensors))
        # diffusers swaps the halves of the output of this layer in the lower matrix, too, whose rows are the rank.
        tensors[f"{_PREFIX}norm_out.linear.lora_A.weight"] = file.tensors[f"{_LAST_NORM}.lora_A.weight"]
    except CONFIG_ERRORS as error:
        reason = f"{file.path} looks like {description}, but diffusers cannot map its names: {on_one_line(error)}"
        raise UserError(reason, "damaged-file") from error
    config = _config_of(replace(file, tensors=tensors), description)
    check_names(file.path, description, kind.shapes(config), tensors, file.others)
    return Checkpoint(kind.kind, config, tensors, dict(file.metadata), path=file.path)


@control
class FluxControlLora(TransformerControl):
    """A LoRA of the base's transformer that reads the condition's latent beside the noisy one."""

    kind: ClassVar[str] = "flux-control-lora"
    title: ClassVar[str] = "a control LoRA of FLUX.1"
    paper: ClassVar[str] = "Black Forest Labs 2024, github.com/black-forest-labs/flux"
    transformer = FluxTransformer2DModel
    family_title: ClassVar[str] = "FLUX.1"
    architecture: ClassVar[str | None] = "lora"
    tag: ClassVar[str | None] = "lora"
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "beside layers of the transformer, at every step"
    Options = Options
    formats = (
        FileFormat(
            name="diffusers-lora",
            description="diffusers' names, as of its training script",
            detect=_detect_diffusers,
            read=_read_diffusers,
        ),
        FileFormat(
            name="original",
            description="the names of Black Forest Labs",
            detect=_detect_original,
            read=_read_original,
        ),
    )
    trainings = (
        Training(
            system="flux-control-lora",
            also=("flux-control-lora-pairs",),
            options=Start,
            doc="A control LoRA of FLUX.1, one condition.",
        ),
    )

    def __init__(self, layers: Mapping[str, Sizes], norms: Mapping[str, int], condition: str | None = None) -> None:
        super().__init__()
        self.layers, self.norms = dict(layers), dict(norms)
        network = nn.Module()
        network.layers = nn.ModuleDict({_named(path): Layer(sizes) for path, sizes in layers.items()})
        network.norms = nn.ModuleDict({_named(path): nn.RMSNorm(width, eps=1e-6) for path, width in norms.items()})
        self.network = network
        self.condition = condition

    @classmethod
    def for_base(cls, base: Base, condition: str | None = None, *, rank: int = 64, **options: Any) -> FluxControlLora:
        """A new one, which adds zero: for the first layer and the linear layers of the double blocks (`TARGETS`), and
        the attention of the single blocks. The options are those of `Options`.

        Raises:
            UserError: the base has another network, or `rank` is below 1.
        """
        transformer = cls.transformer_of(base)
        Options(rank=rank)  # refuses wrong ones
        layers: dict[str, Sizes] = {}
        for path, module in transformer.named_modules():
            if isinstance(module, nn.Linear) and (path == EMBEDDER or path.endswith(TARGETS)):
                read = module.in_features * (2 if path == EMBEDDER else 1)
                layers[path] = (read, rank, module.out_features, False)
        made = cls(layers, {}, condition)
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(parameter)
        return made.to(base.device, base.dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> FluxControlLora:
        config = checked_config(config)
        layers = {str(path): _sizes(sizes) for path, sizes in dict(config["layers"]).items()}
        if EMBEDDER not in layers:
            raise ValueError(f"it has no layer {EMBEDDER}, which reads the condition")
        return cls(layers, {str(path): int(width) for path, width in config.get("norms", {}).items()}, condition).eval()

    def config(self) -> dict[str, Any]:
        return {"layers": {path: list(sizes) for path, sizes in self.layers.items()}, "norms": self.norms}

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        layers, norms = {}, {}
        for name, value in tensors.items():
            path = name.removeprefix(_PREFIX)
            if (layer := path.removesuffix(".lora_A.weight")) != path:
                above = tensors[f"{_PREFIX}{layer}.lora_B.weight"]
                biased = f"{_PREFIX}{layer}.lora_B.bias" in tensors
                layers[layer] = [value.shape[1], value.shape[0], above.shape[0], biased]
            elif path.endswith(tuple(f".{norm}.weight" for norm in _NORMS)):
                norms[path.removesuffix(".weight")] = value.shape[0]
        return {"layers": layers, "norms": norms}

    def file_state(self) -> dict[str, Tensor]:
        """Under diffusers' names."""
        return {_of_file(name): value for name, value in self.network.state_dict().items()}

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        own = {_of_file(name): name for name in self.network.state_dict()}
        super().load_file_state({own.get(name, name): value for name, value in state.items()})

    # Computation

    @torch.no_grad()
    def encode(self, inputs: Any, base: Base) -> Tensor:
        """The tokens of the latents of condition images, `[B, h / 2 * w / 2, 4 * C]`: the mode of the posterior, of
        which diffusers draws a sample.

        Args:
            inputs: condition images `[B, 3, H, W]` in [0, 1].

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base.
        """
        base.check_size(inputs.shape[-1], inputs.shape[-2])
        check_range(inputs)
        return pack(base.encode_image(inputs * 2 - 1))

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, Tap]:
        """Each layer adds to the output of the base's."""
        assert isinstance(hint, Tensor)

        def both(layer: nn.Module, x: Tensor) -> Tensor:
            made: Tensor = layer(torch.cat([x, hint.to(x)], -1))
            return made

        layers: dict[str, Any] = {path: self.network.layers[_named(path)] for path in self.layers}
        functions: dict[str, TapFunction] = {**layers, EMBEDDER: partial(both, layers[EMBEDDER])}
        return {f"{MODULE}{path}": Tap(function=function, of_input=True) for path, function in functions.items()}

    def replacements(self) -> Mapping[str, nn.Module]:
        return {path: self.network.norms[_named(path)] for path in self.norms}

    def difference(self, transformer: Any) -> str | None:
        modules = dict(transformer.named_modules())
        for path, (read, _, made, _) in self.layers.items():
            module = modules.get(path)
            if not isinstance(module, nn.Linear):
                return f"it has a layer {path}, which the base lacks"
            if (sizes := (module.in_features * (1 + (path == EMBEDDER)), module.out_features)) != (read, made):
                return f"its channels of {path}: {read} to {made}, the base's: {sizes[0]} to {sizes[1]}"
        if missing := [path for path in self.norms if path not in modules]:
            return f"it has a norm {missing[0]}, which the base lacks"
        return None

    # Training

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"rank": config["layers"][EMBEDDER][1]}

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        read, _, made, _ = config["layers"][EMBEDDER]
        return f"a FLUX.1 whose tokens have {read // 2} channels, and its transformer {made}"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        ranks = sorted({sizes[1] for sizes in config["layers"].values()})
        facts = {"layers": str(len(config["layers"])), "rank": " to ".join(map(str, {ranks[0]: 0, ranks[-1]: 0}))}
        if config.get("norms"):
            facts["norms of its own"] = str(len(config["norms"]))
        return facts


def _sizes(values: Any) -> Sizes:
    read, rank, made, biased = values
    return int(read), int(rank), int(made), bool(biased)


def _named(path: str) -> str:
    """A path as the name of a module, which has no dots."""
    return path.replace(".", "/")


def _of_file(name: str) -> str:
    """The name of a parameter in a file."""
    return _PREFIX + name.partition(".")[2].replace("/", ".")
