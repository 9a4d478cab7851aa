"""ControlNet for Z-Image (alibaba-pai's Fun ControlNet Union) on diffusers' `ZImageControlNetModel`.

Copies of some layers of the base's transformer run on the base's tokens plus those of the condition's latent, and each
of their outputs is added after a layer of the base. There are three designs (aigc-apps/VideoX-Fun,
videox_fun/models/z_image_transformer2d_control.py):

- 1.0: layers of their own refine the condition's tokens first;
- 2.0: the copied layers themselves refine them, and their first outputs also enter the base's refiner layers;
- 2.1: copies of the base's refiner layers refine them, and their outputs enter these.

diffusers' pipeline runs the base's refiner again for the control and keeps the outputs of the second and third design
from the base's own; here, as in the original, they enter it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.taps import TapFunction
from controlkit.bases.text import Text
from controlkit.bases.z_image import PATCH, Sequences, ZImage, padded, patches
from controlkit.controls.control import Acts, Control, Reads, Training
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
from controlkit.controls.inputs import Input
from controlkit.controls.masked_image import INPAINTING, latents_of
from controlkit.controls.registry import control
from controlkit.controls.transformer_control import TransformerCopy, count_of
from controlkit.errors import UserError

DESIGNS = {"1.0": None, "2.0": "control_layers", "2.1": "control_noise_refiner"}
"""Version of the Fun ControlNets -> `add_control_noise_refiner` of diffusers' config."""
BASE_LAYERS = "base_layers"
"""controlkit's own setting: layers of the base, if they are not those of Z-Image."""
Z_IMAGE_LAYERS = 30
"""Layers of Z-Image."""
_HEAD_WIDTH = 128
"""Channels of an attention head in Z-Image."""
_EMBEDDER = f"control_all_x_embedder.{PATCH}-1.weight"
_REFINERS = "control_noise_refiner."
_PLACES = {3: range(0, 30, 10), 6: range(0, 30, 5), 10: range(0, 30, 3), 15: range(0, 30, 2)}
"""Number of copied layers -> the layers after which their outputs are added, of the released files."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a ControlNet for Z-Image."""

    num_layers: int = 6
    """Layers copied from the base, evenly spaced from the first on (6 in version 1.0, 15 in 2.1, 3 in its lite one)."""
    design: str = "1.0"
    """How the condition's tokens are refined: 1.0, in layers of their own; 2.1, in layers whose outputs also enter the
    base's refiner."""

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UserError(f"num_layers is {self.num_layers}; expected 1 or more", "out-of-range")
        if self.design not in ("1.0", "2.1"):
            # In 2.0 the same layers run on tokens that are refined and on those that are not.
            raise UserError(f"design is {self.design!r}; expected 1.0 or 2.1", "unknown-name")


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet for Z-Image."""

    start: str | None = None
    """Initial weights: such a ControlNet in any format. Default: copies of the base's layers."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


def _detect_unused(file: TensorFile) -> str | None:
    """Files of 2.0 have refiner layers that nothing reads."""
    of_2_0 = _EMBEDDER in file.tensors and _design_of(file.tensors) == "2.0"
    unused = any(name.startswith(_REFINERS) for name in file.tensors)
    return "a Fun ControlNet of version 2.0 with unused refiner layers" if of_2_0 and unused else None


def _read_unused(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    own = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(_REFINERS)}
    try:
        config = kind.config_of(own)
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    check_names(file.path, description, expected, own, file.others)
    leftover = {name: tensor for name, tensor in file.tensors.items() if name not in own}
    note = f"{len(leftover)} tensors of refiner layers, which version 2.0 does not use, are left out"
    return Checkpoint(kind.kind, config, own, dict(file.metadata), leftover, [note], path=file.path)


@control
class ControlNetZImage(TransformerCopy):
    """Copies of layers of the base's transformer, joined to it by zero-initialised linear layers.

    It runs inside the base's forward pass, whose tokens it reads once they are refined.

    Args:
        base_layers: number of the base's layers.
    """

    kind: ClassVar[str] = "controlnet-z-image"
    title: ClassVar[str] = "a ControlNet for Z-Image"
    paper: ClassVar[str] = "alibaba-pai 2025, github.com/aigc-apps/VideoX-Fun"
    transformer = ZImageTransformer2DModel
    family_title: ClassVar[str] = "Z-Image"
    reads: ClassVar[Reads] = Reads.NOTHING
    acts: ClassVar[Acts] = Acts.TAPS
    enters: ClassVar[str] = "after the transformer's layers, whose tokens it reads at every step"
    Options = Options
    diffusers_class: ClassVar[str | None] = "ZImageControlNetModel"
    formats = (
        FileFormat(
            name="videox-fun",
            description="alibaba-pai's file of version 2.0, with refiner layers that it does not use",
            detect=_detect_unused,
            read=_read_unused,
        ),
    )
    trainings = (
        Training(
            system="controlnet-z-image",
            also=("controlnet-z-image-pairs",),
            options=Start,
            doc="A ControlNet for Z-Image, one condition.",
        ),
    )

    def __init__(
        self, network: ZImageControlNetModel, condition: str | None = None, *, base_layers: int = Z_IMAGE_LAYERS
    ) -> None:
        super().__init__()
        network.gradient_checkpointing = False  # which diffusers' network reads and does not set
        self.network = network
        self.condition = condition
        self.base_layers = base_layers
        self.inputs = _inputs(network.config)

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        num_layers: int = 6,
        design: str = "1.0",
        **options: Any,
    ) -> ControlNetZImage:
        """A new one: layers of the base copied, all that joins them to the base zero. The options are those of
        `Options`.

        Raises:
            UserError: the base has another network, or an option is not one of those that can be trained.
        """
        transformer = cls.transformer_of(base)
        Options(num_layers=num_layers, design=design)  # refuses wrong ones
        layers = len(transformer.layers)
        places = sorted({place * layers // min(num_layers, layers) for place in range(min(num_layers, layers))})
        refiners = len(transformer.noise_refiner)
        of_base = transformer.config
        network = ZImageControlNetModel(
            control_layers_places=places,
            control_refiner_layers_places=list(range(refiners)),
            control_in_dim=of_base.in_channels,
            add_control_noise_refiner=DESIGNS[design],
            dim=of_base.dim,
            n_refiner_layers=refiners,
            n_heads=of_base.n_heads,
            n_kv_heads=of_base.n_kv_heads,
            norm_eps=of_base.norm_eps,
            qk_norm=of_base.qk_norm,
        )
        made = cls(network, condition, base_layers=layers)
        network.load_state_dict(made.copied_from(base), strict=False)
        nn.Module.to(network, base.device, base.dtype)
        return made

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetZImage:
        config = checked_config(config)
        layers = int(config.pop(BASE_LAYERS, Z_IMAGE_LAYERS))
        places = config["control_layers_places"]
        if not places or places[0] != 0 or places != sorted(set(places)) or places[-1] >= layers:
            raise ValueError(f"control_layers_places is {places}; expected rising numbers from 0 to {layers - 1}")
        if (kind := config.get("add_control_noise_refiner")) not in DESIGNS.values():
            raise ValueError(f"add_control_noise_refiner is {kind!r}; expected {', '.join(map(str, DESIGNS.values()))}")
        return cls(ZImageControlNetModel.from_config(config).eval(), condition, base_layers=layers)

    def config(self) -> dict[str, Any]:
        config = plain_config(self.network)
        if self.base_layers != Z_IMAGE_LAYERS:
            config[BASE_LAYERS] = self.base_layers
        return config

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        width, inputs = tensors[_EMBEDDER].shape
        if width % _HEAD_WIDTH:
            raise ValueError(f"its width {width} is no multiple of {_HEAD_WIDTH}, the channels of an attention head")
        count = count_of(tensors, "control_layers")
        if count not in _PLACES:
            raise ValueError(f"it has {count} layers; their places are known for {', '.join(map(str, _PLACES))}")
        return {
            "control_layers_places": list(_PLACES[count]),
            "control_refiner_layers_places": list(range(max(2, count_of(tensors, "control_noise_refiner")))),
            "control_in_dim": inputs // PATCH**2,
            "add_control_noise_refiner": DESIGNS[_design_of(tensors)],
            "dim": width,
            "n_refiner_layers": max(2, count_of(tensors, "control_noise_refiner")),
            "n_heads": width // _HEAD_WIDTH,
            "n_kv_heads": width // _HEAD_WIDTH,
        }

    @classmethod
    def class_of(cls, config: Mapping[str, Any] | None) -> type[Control]:
        return _InpaintingZImage if len(_inputs(config or {})) > 1 else cls

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {_EMBEDDER, "control_layers.0.before_proj.weight"} <= set(tensors)

    # Computation

    @torch.no_grad()
    def encode(self, inputs: Any, base: Base) -> Tensor:
        """`latents_of` the condition images.

        Args:
            inputs: condition images `[B, 3, H, W]` in [0, 1]; of a network that reads a masked image a mapping with
                them as `image`, and optionally `original` and `mask` (white where to inpaint).

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: the size does not fit the base, or one of `original` and `mask` is missing.
        """
        return latents_of({"image": inputs} if isinstance(inputs, Tensor) else inputs, base)

    def taps(self, base: Base, x_t: Tensor, t: Tensor, text: Text, hint: Hint) -> Mapping[str, TapFunction]:
        """At `refiner.0.in` or `layer.0.in` all layers of the control run on the base's tokens; their outputs are added
        at `refiner.N` and `layer.N`."""
        assert isinstance(base, ZImage) and isinstance(hint, Tensor)
        network, sequences = self.network, Sequences(base.transformer, x_t, text)
        time = base.embed_time(x_t, t, text)
        # Recomputed blocks overwrite entries by equal values.
        outputs: dict[str, Tensor] = {}

        def run(layers: Sequence[nn.Module], tokens: Tensor, *others: Any) -> Tensor:
            checkpoints = network.gradient_checkpointing and torch.is_grad_enabled()
            for layer in layers:
                call = partial(network._gradient_checkpointing_func, layer) if checkpoints else layer
                tokens = call(tokens, *others, time)
            return tokens

        def embedded() -> Tensor:
            embedder = network.control_all_x_embedder[f"{PATCH}-1"]
            tokens = patches(hint.to(embedder.weight))
            # Channels of a masked image are zero if nothing is inpainted.
            tokens = _with_channels(tokens, embedder.in_features)
            return padded(embedder(tokens), base.transformer.x_pad_token, sequences.padded_image_tokens)

        def refine(stream: Tensor) -> None:
            layers = network.control_layers if self.design == "2.0" else network.control_noise_refiner
            *added, outputs["condition"] = run(layers, embedded(), stream, None, sequences.image_rotation).unbind()
            for place, value in zip(network.control_refiner_layers_places, added, strict=False):
                outputs[f"refiner.{place}"] = value

        def follow(stream: Tensor) -> None:
            if self.design == "1.0":
                refiners = network.control_noise_refiner
                outputs["condition"] = run(refiners, embedded(), None, sequences.image_rotation)
            prompt = stream[:, sequences.padded_image_tokens :]
            both = torch.cat([outputs["condition"], prompt], 1)
            *added, _ = run(network.control_layers, both, stream, sequences.mask, sequences.rotation).unbind()
            for place, value in zip(network.control_layers_places, added, strict=True):
                outputs[f"layer.{place}"] = value

        def add(point: str, stream: Tensor) -> Tensor:
            return outputs[point]

        taps: dict[str, TapFunction] = {"layer.0.in": follow}
        points = [f"layer.{place}" for place in network.control_layers_places]
        if self.design != "1.0":
            taps["refiner.0.in"] = refine
            points += [f"refiner.{place}" for place in network.control_refiner_layers_places]
        return {**taps, **{point: partial(add, point) for point in points}}

    @property
    def design(self) -> str:
        """Which of `DESIGNS` it has."""
        return _design_named(self.network.add_control_noise_refiner)

    def difference(self, transformer: Any) -> str | None:
        channels, of_base = self.network.config["control_in_dim"], transformer.config.in_channels
        if channels < of_base:
            return f"its latent channels: {channels}, the base's: {of_base}"
        return super().difference(transformer)

    def sizes_beside(self, transformer: Any) -> Mapping[str, tuple[Any, Any]]:
        own, of_base = self.network.config, transformer.config
        return {
            "channels": (own["dim"], of_base.dim),
            "attention heads": (own["n_heads"], of_base.n_heads),
            "layers of the base": (self.base_layers, len(transformer.layers)),
            "refiner layers": (own["n_refiner_layers"], len(transformer.noise_refiner)),
        }

    # Training

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "num_layers": len(config["control_layers_places"]),
            "design": _design_named(config.get("add_control_noise_refiner")),
        }

    def copied_from(self, base: Base) -> Mapping[str, Tensor]:
        transformer, network = base.denoiser, self.network
        layers = {place: transformer.layers[of_base] for place, of_base in enumerate(network.control_layers_places)}
        copied = {f"control_layers.{place}": layer for place, layer in layers.items()}
        if network.control_noise_refiner is not None:
            copied |= {f"{_REFINERS}{place}": layer for place, layer in enumerate(transformer.noise_refiner)}
        if network.control_in_dim == transformer.config.in_channels:
            copied["control_all_x_embedder"] = transformer.all_x_embedder
        return {
            f"{place}.{name}": tensor
            for place, module in copied.items()
            for name, tensor in module.state_dict().items()
        }

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        layers = config.get(BASE_LAYERS, Z_IMAGE_LAYERS)
        return f"a Z-Image whose transformer has {layers} layers of {config['dim']} channels"

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        layers, places = config.get(BASE_LAYERS, Z_IMAGE_LAYERS), config["control_layers_places"]
        return {
            "design": _design_named(config.get("add_control_noise_refiner")),
            "layers": f"{len(places)}, whose outputs are added after layers {', '.join(map(str, places))} of {layers}",
        }


class _InpaintingZImage(ControlNetZImage):
    """One that also reads a masked image."""

    __doc__ = ControlNetZImage.__doc__
    inputs = (Input(), *INPAINTING)


def _inputs(config: Mapping[str, Any]) -> tuple[Input, ...]:
    """Of a network that reads latents of C channels, or C of the condition, one of a mask and C of a masked image."""
    return (Input(), *INPAINTING) if (config.get("control_in_dim") or 0) % 2 else (Input(),)


def _with_channels(tokens: Tensor, width: int) -> Tensor:
    """Tokens of patches `[B, n, positions * C]`, channels last, with further channels of zeros, `[B, n, width]`."""
    parts = tokens.unflatten(-1, (PATCH**2, -1))
    return nn.functional.pad(parts, (0, width // PATCH**2 - parts.shape[-1])).flatten(-2)


def _design_of(tensors: Mapping[str, Tensor]) -> str:
    """The design of a file's tensors. Files of 2.0 may have unused refiner layers, whose `before_proj` is zero."""
    before = tensors.get("control_noise_refiner.0.before_proj.weight")
    if before is not None:
        return "2.1" if before.is_meta or bool(before.any()) else "2.0"
    return "1.0" if count_of(tensors, "control_noise_refiner") else "2.0"


def _design_named(setting: str | None) -> str:
    """The design that `add_control_noise_refiner` of a config means."""
    return next(name for name, value in DESIGNS.items() if value == setting)
