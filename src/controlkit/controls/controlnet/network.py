"""ControlNet on diffusers' `ControlNetModel`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers import ControlNetModel
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from controlkit.controls.control import Control, OneImage, Reads, Training
from controlkit.controls.controlnet.decoder import (
    PREFIX,
    decoder_for,
    decoder_of,
    decoder_shapes,
    shapes_of_decoder,
    split,
)
from controlkit.controls.controlnet.formats import DECODER_TITLE, FORMATS, take_decoder
from controlkit.controls.encoder_copy.names import config_of
from controlkit.controls.encoder_copy.network import (
    base_needed,
    checked_config,
    copied_encoder,
    copy_incompatibility,
    hint_channels_for,
    hint_incompatibility,
    missing_heads,
    plain_config,
    with_heads,
)
from controlkit.controls.file_format import Checkpoint
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError

_POOLS = "global_pool_conditions"
_ONLY_MIDDLE = "only_mid_control"
_LOCKED = "sd_locked"
_UNLOCKED_RATE = 2e-6
"""Learning rate that lllyasviel/ControlNet, docs/train.md, advises for `sd_locked` false."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a new ControlNet."""

    sd_locked: bool = True
    """Whether the base's decoder stays frozen. False also trains a copy of it, which is part of the control and runs in
    the base's place wherever the control acts."""
    only_mid_control: bool = False
    """Whether it adds to the middle block only, not to the decoder's skips."""
    global_average_pooling: bool = False
    """Whether it averages each of its outputs over the image and acts on the conditional branch only, as ControlNet
    1.1's shuffle does."""
    gaussian_convolutions: bool = False
    """Whether the convolutions between control and base start from Gaussian weights in place of zeros: the ablation of
    section 4.2, which changes the base from the start."""


@dataclass(frozen=True, kw_only=True)
class Start(Options):
    """Recipe settings of a ControlNet."""

    start: str | None = None
    """Initial weights: a ControlNet file or folder in any format, or the name of a shipped one. Default: a copy of the
    base's encoder."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


@control
class ControlNet(OneImage):
    """A trainable copy of the base's encoder and middle block, joined to it by zero convolutions.

    Args:
        only_mid_control: as in `Options`.
        decoder: modules that replace the base's (`decoder.MODULES`), if it was trained with one.

    The hint network (convolutions from the condition image to the size of the latent) is separate from diffusers'
    network, because its output depends on the condition image alone: it runs once, not at every step.
    """

    kind: ClassVar[str] = "controlnet"
    title: ClassVar[str] = "a ControlNet"
    paper: ClassVar[str] = "Zhang, Rao and Agrawala 2023, arXiv 2302.05543"
    architecture: ClassVar[str | None] = "control-net"
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "decoder skips and middle"
    Options = Options
    formats = FORMATS
    convert_flags: ClassVar[tuple[str, ...]] = ("pooled", "decoder")
    diffusers_class: ClassVar[str | None] = "ControlNetModel"
    trainings = (
        Training(
            system="controlnet",
            also=("controlnet-pairs",),
            options=Start,
            doc="A ControlNet, one condition. Half the prompts are dropped (Zhang et al. 2023, section 3.3).",
        ),
    )

    def __init__(
        self,
        network: ControlNetModel,
        condition: str | None = None,
        *,
        only_mid_control: bool = False,
        decoder: nn.ModuleDict | None = None,
    ) -> None:
        super().__init__()
        self.hint_network: nn.Module = network.controlnet_cond_embedding
        network.controlnet_cond_embedding = nn.Identity()
        self.channel_order = network.config["controlnet_conditioning_channel_order"]
        network.register_to_config(controlnet_conditioning_channel_order="rgb")  # `encode` reorders the image
        self.network = network
        self.condition = condition
        self.only_mid_control = only_mid_control
        self.decoder = decoder

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        sd_locked: bool = True,
        only_mid_control: bool = False,
        global_average_pooling: bool = False,
        gaussian_convolutions: bool = False,
        **options: Any,
    ) -> ControlNet:
        """A new one: encoder and middle block copied from `base`, zero convolutions, a random hint network.

        The hint network downsamples as often as the autoencoder (at factor 8: 16, 32, 96, 256 channels, as in
        lllyasviel/ControlNet, cldm/cldm.py). The options are those of `Options`.

        Raises:
            UserError: no hint network fits the base, or, with `sd_locked` false, the base's decoder does not mirror its
                encoder.
        """
        channels = hint_channels_for(base, cls.title)
        network = copied_encoder(base.unet, conditioning_embedding_out_channels=channels)
        network.register_to_config(**{_POOLS: global_average_pooling})
        control = cls(nn.Module.to(network, base.device, base.dtype), condition, only_mid_control=only_mid_control)
        if gaussian_convolutions:
            for convolution in (*network.controlnet_down_blocks, network.controlnet_mid_block):
                nn.init.normal_(convolution.weight, std=convolution.in_channels**-0.5)  # keeps the scale of its input
        if only_mid_control:
            control._silence_skips()
        if not sd_locked:
            control.unlock(base)
        return control

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNet:
        config = checked_config(config)
        decoder = None if config.pop(_LOCKED, True) else decoder_for(config).eval()
        only_mid_control = bool(config.pop(_ONLY_MIDDLE, False))
        network = ControlNetModel.from_config(with_heads(config)).eval()
        return cls(network, condition, only_mid_control=only_mid_control, decoder=decoder)

    def unlock(self, base: Base) -> None:
        """Give it a copy of the base's decoder, which then runs in the base's place.

        Raises:
            UserError: the base's decoder does not mirror its encoder.
        """
        if (reason := _decoder_difference(self.config(), base)) is not None:
            raise UserError(
                f"sd_locked is false, but {base.name} has a decoder unlike its encoder: {reason}; set sd_locked: true",
                "unsupported",
            )
        self.decoder = decoder_of(base.unet).to(base.device)

    def _silence_skips(self) -> None:
        """Zero and freeze the convolutions that nothing reads, so that other tools compute the same from the file."""
        for parameter in self.network.controlnet_down_blocks.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return config_of(tensors, unet_config)

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        families = {name.partition(".")[0] for name in tensors}
        # Unions have these names and more.
        return {"controlnet_down_blocks", "controlnet_cond_embedding"} <= families and "task_embedding" not in families

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        return missing_heads(config)

    def config(self) -> dict[str, Any]:
        config = {**plain_config(self.network), "controlnet_conditioning_channel_order": self.channel_order}
        if self.only_mid_control:
            config[_ONLY_MIDDLE] = True
        if self.decoder is not None:
            config[_LOCKED] = False
        return config

    def file_state(self) -> dict[str, Tensor]:
        hint = {f"controlnet_cond_embedding.{k}": v for k, v in self.hint_network.state_dict().items()}
        decoder = {} if self.decoder is None else self.decoder.state_dict()
        return {**self.network.state_dict(), **hint, **{f"{PREFIX}{name}": value for name, value in decoder.items()}}

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        state, decoder = split(state)
        if self.decoder is not None or decoder:
            (self.decoder or nn.ModuleDict()).load_state_dict(decoder, strict=True, assign=True)
        prefix = "controlnet_cond_embedding."
        hint = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        rest = {name: value for name, value in state.items() if not name.startswith(prefix)}
        self.hint_network.load_state_dict(hint, strict=True, assign=True)
        self.network.load_state_dict(rest, strict=True, assign=True)

    def to_diffusers(self) -> ControlNetModel:
        """diffusers' network with the same weights, sharing memory; saving it writes diffusers' folder.

        Raises:
            UserError: it has a decoder of its own.
        """
        if self.decoder is not None:
            raise UserError(f"diffusers' ControlNetModel has no place for {DECODER_TITLE}", "unsupported")
        config = {key: value for key, value in self.config().items() if key != _ONLY_MIDDLE}
        network = ControlNetModel.from_config(config)
        network.load_state_dict(self.file_state(), assign=True)
        return network.eval()

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        weight = next(self.hint_network.parameters())
        if self.channel_order == "bgr":
            condition_image = condition_image.flip(1)
        return self.hint_network(condition_image.to(weight.device, weight.dtype))

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None
        down, middle = self.network(x_t, t, **unet_inputs(text), controlnet_cond=hint, return_dict=False)
        if self.only_mid_control:
            return Residuals({"middle": middle})
        return Residuals.numbered("skip", down, middle=middle)

    def replacements(self) -> Mapping[str, nn.Module]:
        return {} if self.decoder is None else dict(self.decoder.items())

    def incompatibility(self, base: Base) -> str | None:
        if (channels := self.network.config["conditioning_channels"]) != 3:
            return f"it takes condition images of {channels} channels, not 3 (RGB)"
        config = self.config()
        stages = config["conditioning_embedding_out_channels"]
        reason = copy_incompatibility(config, base) or hint_incompatibility(stages, base)
        if reason is None and self.decoder is not None:
            return _decoder_difference(config, base)
        return reason

    @property
    def conditional_only(self) -> bool:
        # As in diffusers' pipelines for a network that pools its residuals (shuffle).
        return bool(self.network.config[_POOLS])

    def trainable_parameters(self) -> list[nn.Parameter]:
        silent = set(self.network.controlnet_down_blocks.parameters()) if self.only_mid_control else set()
        return [parameter for parameter in self.parameters() if parameter not in silent]

    @classmethod
    def options_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "sd_locked": config.get(_LOCKED, True),
            "only_mid_control": config.get(_ONLY_MIDDLE, False),
            "global_average_pooling": config.get(_POOLS, False),
        }

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
        settings = {key: value for key, value in options.items() if key != "start"}
        if isinstance(start, ControlNet):
            start._continue_with(base, options)
        control = super().for_training(base, conditions, settings, name=name, seed=seed, start=start)
        assert isinstance(control, ControlNet)
        if control.only_mid_control:
            control._silence_skips()
        return control

    def _continue_with(self, base: Base, options: Mapping[str, Any]) -> None:
        """Change it by the options of a recipe that starts from it, where they add to what it is.

        Raises:
            UserError: it has a decoder, and `sd_locked` is true.
        """
        if not options.get("sd_locked", True) and self.decoder is None:
            self.unlock(base)
        elif options.get("sd_locked", True) and self.decoder is not None:
            raise UserError(
                f"the ControlNet to start from contains {DECODER_TITLE}; set sd_locked: false to train both on",
                "contradiction",
            )
        if options.get("only_mid_control"):
            self.only_mid_control = True
        if options.get("global_average_pooling"):
            self.network.register_to_config(**{_POOLS: True})

    def training_notes(self, learning_rate: float) -> list[str]:
        if self.decoder is None or learning_rate <= _UNLOCKED_RATE:
            return []
        return [
            f"sd_locked false also trains the base's decoder; lllyasviel/ControlNet advises a learning_rate of about"
            f" {_UNLOCKED_RATE:g} then, as a higher one may damage the base's images. This run's is {learning_rate:g}"
        ]

    def copied_network(self) -> nn.Module:
        if self.decoder is None:
            return self.network
        both = nn.Module()  # with the base's names
        for name, module in (*self.network.named_children(), *self.decoder.named_children()):
            both.add_module(name, module)
        return both

    @classmethod
    def settle_checkpoint(cls, checkpoint: Checkpoint, flags: Collection[str]) -> None:
        """Record that it pools its residuals, which no tensor shows: with `pooled`, or if the condition is `shuffle`
        and the file has no such entry. With `decoder`, take the decoder of the Stable Diffusion in its file along. Note
        what ControlNet 1.1's inpaint expects, which no tensor shows either."""
        if "decoder" in flags:
            take_decoder(checkpoint)
        pooled = "pooled" in flags
        if not pooled and checkpoint.condition == "shuffle" and _POOLS not in checkpoint.config:
            checkpoint.notes.append("it is written with pooled residuals, as in ControlNet 1.1's shuffle")
            pooled = True
        if pooled:
            checkpoint.config[_POOLS] = True
        if checkpoint.condition == "inpaint" and "control.made" not in checkpoint.metadata:
            checkpoint.notes.append(
                "ControlNet 1.1's inpaint (control_v11p_sd15_inpaint) was trained with its hole at -1, which is not"
                " supported: holes are black here, which that one takes for a black part of the image"
            )

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        facts = {}
        if not config.get(_LOCKED, True):
            facts["decoder"] = "its own, trained with it; it replaces the base's where the control acts"
        if config.get(_ONLY_MIDDLE):
            facts["adds to"] = "the middle block only"
        if config.get(_POOLS):
            facts["pooling"] = "its outputs are averaged over the image, and act on the conditional branch only"
        return facts

    @classmethod
    def variants(cls, base: Base, **options: Any) -> dict[str, Control]:
        variants: dict[str, Control] = {"": cls.for_base(base)}
        with suppress(UserError):
            variants["with sd_locked false"] = cls.for_base(base, sd_locked=False)
        return variants

    def parameter_counts(self) -> dict[str, int]:
        counts = super().parameter_counts()
        if self.decoder is not None:
            counts["decoder"] = sum(tensor.numel() for tensor in self.decoder.state_dict().values())
        return counts


def _decoder_difference(config: Mapping[str, Any], base: Base) -> str | None:
    """Why the decoder of a control of `config` cannot replace the base's; None if it can."""
    own, of_base = decoder_shapes(config), shapes_of_decoder(base.unet)
    for name in sorted(own.keys() | of_base.keys()):
        if own.get(name) != of_base.get(name):
            shapes = [list(shapes[name]) if name in shapes else "missing" for shapes in (own, of_base)]
            return f"its decoder's {name}: {shapes[0]}, the base's: {shapes[1]}"
    return None
