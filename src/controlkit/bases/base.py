"""`Base`: the contract of a text-to-image model. Each family of models is one file beside this one.

Everything inside is a diffusers or transformers class, so what diffusers loads is a base.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from controlkit.bases.component import Component, Configurations
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import RectifiedFlow, Schedule, VariancePreserving
from controlkit.bases.taps import Point, Taps, checkpoint_with_taps, tapped
from controlkit.bases.text import Text, cut_from
from controlkit.errors import UserError
from controlkit.files import sha256_of, sha256_of_all


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents of a base."""

    channels: int
    factor: int
    """Pixels of an image to one of its latent, along each side."""
    scale: float = 1.0
    """Latents are (z - shift) * scale of what the autoencoder makes, for a variance of about one."""
    shift: float = 0.0
    patch: int = 1
    """Pixels of a latent, along each side, that the network packs into one token."""


class Base(ABC):
    """Text encoders, autoencoder, denoising network and noise schedule of one model; all frozen.

    Images are `[B, 3, H, W]` in [-1, 1]; latents are `[B, latents.channels, H / factor, W / factor]`, scaled to about
    unit variance. Times t are in the units of its `schedule`.

    Args:
        name: as `load_base` was given it.
        scheduler_config: of a scheduler of diffusers.
        defaults: what to do where nothing is asked for (`default_guidance`, `default_mode`).
        components: the networks and tokenizers, by the names of `components`.

    Raises:
        TypeError: a component is missing, or is none of the family's.
    """

    components: ClassVar[tuple[Component, ...]]
    """What a folder of the family holds, in order; all networks but the last encode text or images."""
    known: ClassVar[Mapping[str, Configurations]]
    """Name of a well-known model -> its configurations: enough to count it with no download."""
    pipeline: ClassVar[str]
    """Name of diffusers' pipeline for it."""
    index_entries: ClassVar[Mapping[str, Any]] = {}
    """What its `model_index.json` says besides its components."""
    schedule_class: ClassVar[type[RectifiedFlow | VariancePreserving]] = VariancePreserving
    """The kind of its noise schedule."""
    usual_guidance: ClassVar[float]
    """The guidance scale that the family is used with."""
    usual_sampler: ClassVar[str] = "ddim"
    """The sampler where none is asked for."""
    upcasts_vae: ClassVar[bool] = False
    """Whether the autoencoder's activations overflow float16 where its configuration says nothing."""

    vae: AutoencoderKL
    tokenizer: Any
    text_encoder: Any

    def __init__(
        self,
        *,
        name: str,
        scheduler_config: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        **components: Any,
    ) -> None:
        self.name = name
        self.defaults = dict(defaults or {})
        self.scheduler_config = dict(scheduler_config)
        self.original: Callable[[], Base] | None = None
        """Loads the weights as they are stored, where those held here were cast as they were read."""
        self.text_device: torch.device | None = None
        """Where text encoders stay, if not with the other networks."""
        wanted = {one.name: one for one in self.components if not one.is_scheduler}
        unknown = [key for key in components if key not in wanted]
        missing = [key for key, one in wanted.items() if key not in components and not one.optional]
        if unknown or missing:
            raise TypeError(f"{type(self).__name__} of {', '.join(wanted)}: missing {missing}, unknown {unknown}")
        for key in wanted:
            setattr(self, key, components.get(key))
        self._hung: tuple[Mapping[str, Tensor], Taps] | None = None
        for network in self.networks:
            network.eval().requires_grad_(False)

    @classmethod
    def settings_in(cls, folder: Path) -> dict[str, Any]:
        """More arguments of the class, from a diffusers folder."""
        return {}

    @classmethod
    def is_folder_of(cls, folder: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a folder with these configurations of components is of this family, by its denoising network."""
        own = cls.denoiser_component()
        return own.name in folder and folder[own.name].get("_class_name", own.class_name) == own.class_name

    @classmethod
    @abstractmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        """Which of `known` a single file in the original layout is one of; None if it is of another family.

        Args:
            shapes: of its tensors, by their names.
            name: what errors call it.

        Raises:
            UserError: it is of this family and not a whole model.
        """

    @classmethod
    def configurations_of_file(
        cls, known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> tuple[Configurations, list[str]]:
        """`known` configurations, changed to what a single file holds, without components that it lacks; and notes for
        a person, each to follow the file's name."""
        return known, []

    @classmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> Any:
        """The tokenizer that single files and well-known models are read with."""
        raise NotImplementedError(component.name)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All networks, in the order of `components`."""
        return tuple(self.named_networks().values())

    def named_networks(self) -> dict[str, nn.Module]:
        """All networks, by the names of their components."""
        made = {one.name: getattr(self, one.name) for one in self.components if one.is_network}
        return {name: network for name, network in made.items() if network is not None}

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """Those that there are, in the order of `components`."""
        made = (getattr(self, one.name) for one in self.components if one.is_tokenizer)
        return tuple(tokenizer for tokenizer in made if tokenizer is not None)

    @classmethod
    def denoiser_component(cls) -> Component:
        """The component of the denoising network."""
        return [one for one in cls.components if one.is_network][-1]

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """Those that read prompts."""
        return tuple(network for name, network in self.named_networks().items() if name.startswith("text_encoder"))

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network that predicts."""

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoising network of a base that has a UNet.

        Raises:
            UserError: it has none.
        """
        raise UserError(
            f"{self.name} has no UNet: its network is a {type(self.denoiser).__name__}. Controls that are made for a"
            " UNet do not fit it; take a control of its own family"
        )

    @property
    def device(self) -> torch.device:
        """Where the denoising network is."""
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """The denoising network's dtype."""
        return self.denoiser.dtype

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        text_device: torch.device | str | None = None,
    ) -> Base:
        """Move all networks; returns itself.

        What it is known by (`fingerprint`, `content`) stays that of the weights as they were: bfloat16 would change it.

        Args:
            text_device: where text encoders stay from now on, whatever `device` is: large ones can be left on the CPU.
        """
        if dtype == torch.bfloat16 and self.dtype != dtype and self.original is None:
            _ = self.fingerprint, self.content  # kept from now on
        if text_device is not None:
            self.text_device = torch.device(text_device)
        for network in self.networks:
            is_text = any(network is encoder for encoder in self.text_encoders)
            place = self.text_device if is_text and self.text_device is not None else device
            if place is not None:
                network.to(place)
            if dtype is not None:
                network.to(torch.float32 if network is self.vae and self._upcasts(dtype) else dtype)
        return self

    def _upcasts(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float16 and needs_float32(self.vae, type(self).upcasts_vae)

    @property
    @abstractmethod
    def latents(self) -> Latents:
        """What its latents are."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.latents.channels

    @property
    def factor(self) -> int:
        """Pixels of an image to one of its latent, along each side."""
        return self.latents.factor

    @property
    def size(self) -> int:
        """Side in pixels of the images that the base was trained on."""
        return self.denoiser.config.sample_size * self.factor

    @property
    def size_multiple(self) -> int:
        """Sizes must be multiples of this."""
        return self.latents.factor * self.latents.patch

    @property
    def largest_size(self) -> int | None:
        """The longest side in pixels that the network takes; None if there is no limit."""
        return None

    @property
    def prediction_type(self) -> str:
        """What the network predicts: `Schedule.prediction`."""
        return self.schedule.prediction

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Its family under modelspec's names, such as `stable-diffusion-v1`."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the denoising network's weights (as float16), by which a control knows the base that it was trained
        on."""
        if self.original is not None:
            return self._original.fingerprint
        return hash_of_halves(self.denoiser.state_dict().values())

    @cached_property
    def content(self) -> str:
        """Hash of all that decides what it draws: every network's weights and settings, and the noise schedule."""
        if self.original is not None:
            return self._original.content
        others = [network_key(network) for network in self.networks if network is not self.denoiser]
        schedule = _settings_of(self.scheduler_config)
        return sha256_of(self.fingerprint, _settings_of(dict(self.denoiser.config)), *others, schedule)[:16]

    @property
    def _original(self) -> Base:
        assert self.original is not None
        made = self.original()
        # Both are taken while it is here, so that it is read once.
        self.__dict__["fingerprint"], self.__dict__["content"] = made.fingerprint, made.content
        return made

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule that it was trained with."""
        return type(self).schedule_class(self.scheduler_config)

    @abstractmethod
    def encode_text(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Text:
        """Prompts => `Text`, on the base's device; each is padded or cut to the tokenizer's length.

        Args:
            size: width and height of the images in pixels, which some bases are told; default: the base's own.
        """

    @abstractmethod
    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """The embedding of times `t` `[B]` (and of what else the network is told beside the prompt), `[B, D]`."""

    @abstractmethod
    def zero_text(self) -> Text:
        """Zeros of the shape that `encode_text` makes of one prompt, with no tokenizer, on torch's default device."""

    @torch.no_grad()
    def encode_image(self, x: Tensor) -> Tensor:
        """Images => scaled latents (the mode of the posterior)."""
        x = x.to(self.vae.device, self.vae.dtype)  # which may have been put aside while the network trains
        parts = [self.vae.encode(part).latent_dist.mode() for part in x.split(_at_once(x.shape[2] * x.shape[3]))]
        return self.scaled(torch.cat(parts)).to(self.device, self.dtype)

    def scaled(self, z: Tensor) -> Tensor:
        """What the autoencoder makes => latents."""
        latents = self.latents
        return (z - latents.shift if latents.shift else z) * latents.scale

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents => images, clamped to [-1, 1]."""
        latents = self.latents
        z = z.to(self.vae.dtype) / latents.scale
        z = z + latents.shift if latents.shift else z
        pixels = z.shape[2] * z.shape[3] * self.factor**2
        return torch.cat([self.vae.decode(part).sample for part in z.split(_at_once(pixels))]).clamp(-1, 1)

    @property
    @abstractmethod
    def sites(self) -> Mapping[str, tuple[int, int]]:
        """Where residuals may enter: site -> its channels, and the pixels of an image to one of it, along a side."""

    @property
    @abstractmethod
    def points(self) -> Mapping[str, Point]:
        """Where taps may hang: on the stream of hidden states, and on the embedding of the time (`time`)."""

    def sites_in_words(self) -> dict[str, str]:
        """For a person: what enters -> where."""
        return {"where residuals enter": ", ".join(self.sites)}

    @abstractmethod
    def predict(
        self, x_t: Tensor, t: Tensor, text: Text, residuals: Residuals | None = None, taps: Taps | None = None
    ) -> Tensor:
        """The network's prediction (see `prediction_type`) for noisy latents `x_t` at times `t` of its schedule.

        Args:
            x_t: `[B, latent_channels, h, w]`.
            t: `[B]` or a scalar.
            text: of batch `B`.
            residuals: what controls add; gradients flow through them.
            taps: what controls do inside of this call.

        Returns:
            `[B, latent_channels, h, w]`.

        Raises:
            UserError: a site or a point is not one of this base's, or a tap that replaces has company.
        """

    def check_sites(self, residuals: Residuals) -> None:
        """Refuse residuals that have no place here.

        Raises:
            UserError: a site is not one of this base's.
        """
        if unknown := [site for site in residuals if site not in self.sites]:
            raise UserError(f"{self.name} has no site called {unknown[0]!r}; it has: {', '.join(self.sites)}")

    @contextmanager
    def tapping(self, residuals: Mapping[str, Tensor], taps: Taps) -> Iterator[None]:
        """A block in which calls of the network get residuals and taps at its points; see `taps.tapped`."""
        before, self._hung = self._hung, (residuals, taps)
        try:
            with tapped(self.denoiser, self.points, residuals, taps):
                yield
        finally:
            self._hung = before

    def checkpoint_activations(self) -> None:
        """Keep the inputs of the network's blocks only, and compute what is inside of them again in the backward pass.

        Taps are hung again for that, and stay what they were in the call that hung them.
        """

        def active() -> Callable[[], AbstractContextManager[Any]] | None:
            hung = self._hung
            return None if hung is None else lambda: self.tapping(*hung)

        self.denoiser.enable_gradient_checkpointing(checkpoint_with_taps(active))

    @property
    def default_guidance(self) -> float:
        """The guidance scale where none is asked for: what the base's folder says, such as nano's, or the family's as
        diffusers has it."""
        return float(self.defaults.get("guidance", self.usual_guidance))

    @property
    def default_sampler(self) -> str:
        """The sampler where none is asked for."""
        return self.usual_sampler

    @property
    def default_mode(self) -> str:
        """On which halves of guidance a control acts where nothing is said (`ControlUse.mode`): what the base's folder
        says, such as nano's, or both, as in diffusers."""
        return str(self.defaults.get("mode", "balanced"))

    @property
    def prompt_tokens(self) -> int:
        """The most tokens of a prompt that are read, with those that mark its begin and end."""
        return self.tokenizer.model_max_length

    def cut_from(self, prompt: str) -> str:
        """The end of a prompt that is too long to be read; empty if none is.

        Raises:
            UserError: the prompt holds half a character, as cut text does.
        """
        return cut_from(self.tokenizer, prompt)

    def check_size(self, width: int, height: int) -> None:
        """Refuse sizes that no latent has.

        Raises:
            UserError: a side is not a positive multiple of `size_multiple`, or longer than `largest_size`.
        """
        step, most = self.size_multiple, self.largest_size
        for name, value in (("width", width), ("height", height)):
            if value < step or value % step:
                near = max(step, round(value / step) * step)
                raise UserError(f"{name} {value} does not fit {self.name}: it must be a multiple of {step}; try {near}")
            if most is not None and value > most:
                raise UserError(f"{name} {value} does not fit {self.name}: its network takes {most} pixels at the most")


def network_key(network: nn.Module) -> str:
    """Hash of the weights and the settings of a network of diffusers or transformers."""
    config: Any = network.config
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    weights = (p.detach().cpu().float().contiguous().numpy().tobytes() for p in network.parameters())
    return sha256_of_all(chain([_settings_of(settings)], weights))


def hash_of_halves(weights: Iterable[Tensor]) -> str:
    """Hash of weights as float16: the same for a network held in float32 and in float16, another in bfloat16."""
    halves = (value.detach().to("cpu", torch.float16).contiguous() for value in weights)
    return sha256_of_all(half.numpy().tobytes() for half in halves)[:16]


def _settings_of(config: Mapping[str, Any]) -> str:
    """A configuration without what says only where it came from, or with which version and type it was written."""
    apart = ("transformers_version", "dtype", "torch_dtype")
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name not in apart}
    return json.dumps(kept, sort_keys=True, default=str)


PIXELS_AT_ONCE = 2**19
"""What an autoencoder takes at once: two images of 512 x 512, whose largest activations in float32 take 256 MiB, and
whole batches of small ones."""


def _at_once(pixels: int) -> int:
    """How many images of so many pixels that is."""
    return max(1, PIXELS_AT_ONCE // pixels)


def needs_float32(vae: AutoencoderKL, usual: bool) -> bool:
    """Whether an autoencoder's activations overflow float16: what its config says, or else what is `usual`."""
    config = dict(vae.config)
    # diffusers fills in True where a config says nothing, as Stable Diffusion 1's does, whose autoencoder needs none.
    said = "force_upcast" in config and "force_upcast" not in config.get("_use_default_values", ())
    return bool(config["force_upcast"]) if said else usual
