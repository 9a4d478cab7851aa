"""`Base`: the interface of a text-to-image model. Each family is one file beside this one.

All networks are diffusers or transformers classes, so whatever diffusers loads can be a base.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from controlkit.bases.component import Component, Configurations
from controlkit.bases.defaults import DEFAULT_PROMPT
from controlkit.bases.identity import canonical_config, hash_of_halves, network_key, tokenizer_key
from controlkit.bases.image_encoders import CLIP_LARGE
from controlkit.bases.latent_rgb import LatentRGB
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import RectifiedFlow, Schedule, VariancePreserving
from controlkit.bases.taps import Point, Taps, checkpoint_with_taps, tapped
from controlkit.bases.text import Text, cut_from, token_ids
from controlkit.errors import UserError
from controlkit.files import sha256_of


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Shape and scale of a base's latents."""

    channels: int
    factor: int
    """Downsampling factor of the autoencoder: pixels per latent position, along each side."""
    scale: float | tuple[float, ...] = 1.0
    """Latents are (z - shift) * scale of the autoencoder's output z, for about unit variance; one number for all
    channels, or one for each."""
    shift: float | tuple[float, ...] = 0.0
    patch: int = 1
    """Patch size: latent positions per token, along each side."""
    group: int = 1
    """Positions of the autoencoder in one of latents, along each side; its channels are theirs, one after another."""

    def scaled(self, z: Tensor) -> Tensor:
        """Output of the autoencoder `[B, C, h, w]` => scaled latents."""
        return (z - _by_channel(self.shift, z)) * _by_channel(self.scale, z)

    def unscaled(self, z: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return z / _by_channel(self.scale, z) + _by_channel(self.shift, z)


def _by_channel(values: float | tuple[float, ...], like: Tensor) -> Tensor | float:
    """One number, or one for each channel as `[1, C, 1, 1]`."""
    return values if isinstance(values, (int, float)) else torch.tensor(values).to(like).view(1, -1, 1, 1)


class Base(ABC):
    """Text encoders, autoencoder, denoising network and noise schedule of one model; all frozen.

    Images are `[B, 3, H, W]` in [-1, 1]; latents are `[B, latents.channels, H / factor, W / factor]`, scaled to about
    unit variance. Times t are in the units of its `schedule`.

    Args:
        name: as passed to `load_base`.
        scheduler_config: of a diffusers scheduler.
        defaults: the folder's own defaults (`default_guidance`, `default_mode`).
        components: networks and tokenizers, by the names in the class attribute `components`.

    Raises:
        TypeError: a component is missing or unknown.
    """

    components: ClassVar[tuple[Component, ...]]
    """The parts of the family's diffusers folder, in order; the last network is the denoiser, the others encode text or
    images."""
    known: ClassVar[Mapping[str, Configurations]]
    """Name of a well-known model -> its configurations: enough to count its parameters without a download."""
    required_settings: ClassVar[Mapping[str, tuple[str, ...]]]
    """Network -> settings that its configuration must have."""
    pipeline: ClassVar[str]
    """Class name of its diffusers pipeline."""
    lora_loader: ClassVar[str | None] = None
    """Class of `diffusers.loaders` that maps other tools' names of layers of LoRAs, for a transformer."""
    lora_names: ClassVar[str] = ""
    """Pattern of the beginnings of the names that it maps."""
    index_entries: ClassVar[Mapping[str, Any]] = {}
    """Entries of its `model_index.json` besides the components."""
    schedule_class: ClassVar[type[RectifiedFlow | VariancePreserving]] = VariancePreserving
    """Class of its noise schedule."""
    usual_guidance: ClassVar[float]
    """Default guidance scale of the family."""
    usual_sampler: ClassVar[str] = "ddim"
    """Default sampler of the family."""
    learns_words: ClassVar[bool] = True
    """Whether its text encoders take textual inversions."""
    usual_latent_rgb: ClassVar[LatentRGB] = ()
    """Linear approximation of the family's autoencoder, for previews; empty if unknown."""
    upcasts_vae: ClassVar[bool] = False
    """Whether the autoencoder overflows float16, if its configuration does not say."""

    vae: Any
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
        """Loads the base again with the weights as stored, if those here were cast on loading."""
        self.vae_name: str | None = None
        """What stands in place of its own autoencoder, as passed to `load_base`."""
        self.text_device: torch.device | None = None
        """Device of the text encoders, if not that of the other networks."""
        self._device: torch.device | None = None
        expected = {component.name: component for component in self.components if not component.is_scheduler}
        unknown = [key for key in components if key not in expected]
        missing = [key for key, component in expected.items() if key not in components and not component.optional]
        if unknown or missing:
            raise TypeError(f"{type(self).__name__} of {', '.join(expected)}: missing {missing}, unknown {unknown}")
        for key in expected:
            setattr(self, key, components.get(key))
        self.merged: tuple[Any, ...] = ()
        """What is merged into its weights now (LoRAs with their weights), for keys of caches."""
        self._active_taps: tuple[Mapping[str, Tensor], Taps] | None = None
        self._replaced: Mapping[str, nn.Module] = {}
        self._encoders_aside = False
        self.in_use = RLock()
        """Held while its weights or settings are changed for a time, as by the LoRAs of one call of `generate`."""
        for network in self.networks:
            network.eval().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "in_use"}  # a lock cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, in_use=RLock())

    @classmethod
    def settings_in(cls, folder: Path) -> dict[str, Any]:
        """Further constructor arguments, read from a diffusers folder."""
        return {}

    @classmethod
    def is_folder_of(cls, folder: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether these configurations of a diffusers folder belong to this family, judged by its denoiser."""
        denoiser = cls.denoiser_component()
        return (
            denoiser.name in folder
            and folder[denoiser.name].get("_class_name", denoiser.class_name) == denoiser.class_name
        )

    @classmethod
    @abstractmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        """The entry of `known` that a single file in the original format matches; None if it is of another family.

        Args:
            shapes: name -> shape of its tensors.
            name: of the file, for errors.

        Raises:
            UserError: it is of this family but incomplete.
        """

    @classmethod
    def configurations_of_file(
        cls, known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> tuple[Configurations, list[str]]:
        """The `known` configurations adapted to a single file, without components that it lacks; and notes for the
        user, each to follow the file's name."""
        return known, []

    @classmethod
    def settings_of_file(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Settings of the denoiser that the shapes of a single file determine, to compare with the folder beside it."""
        return {}

    @classmethod
    @abstractmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> Any:
        """The tokenizer of single files and well-known models.

        Raises:
            UserError: it does not ship with controlkit.
        """

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All networks, in the order of `components`."""
        return tuple(self.named_networks().values())

    def named_networks(self) -> dict[str, nn.Module]:
        """All networks, by component name."""
        networks = {
            component.name: getattr(self, component.name) for component in self.components if component.is_network
        }
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """All tokenizers, in the order of `components`."""
        tokenizers = (getattr(self, component.name) for component in self.components if component.is_tokenizer)
        return tuple(tokenizer for tokenizer in tokenizers if tokenizer is not None)

    @classmethod
    def denoiser_component(cls) -> Component:
        """The component of the denoising network."""
        return [component for component in cls.components if component.is_network][-1]

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """The text encoders, in the order of `components`."""
        return tuple(network for name, network in self.named_networks().items() if name.startswith("text_encoder"))

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The denoising network."""

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet of a base that has one.

        Raises:
            UserError: the denoiser is another network.
        """
        raise UserError(
            f"{self.name} has no UNet (its network is a {type(self.denoiser).__name__}), so controls for"
            " UNets do not fit it; use a control of its own family.",
            "incompatible",
        )

    @property
    def device(self) -> torch.device:
        """Device of images, texts and latents, and of the denoiser (unless `to` has left it aside)."""
        return self._device or self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser."""
        return self.denoiser.dtype

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        text_device: torch.device | str | None = None,
        denoiser_aside: bool = False,
    ) -> Base:
        """Move all networks; returns itself.

        `fingerprint` and `content` remain those of the weights before the cast, since bfloat16 would change them.

        Args:
            text_device: device of the text encoders from now on, whatever `device` is: large ones can stay on the CPU.
            denoiser_aside: leave the denoiser where it is until `place_denoiser`; the base only encodes and decodes
                until then.
        """
        if device is not None:
            self._device = torch.device(device) if denoiser_aside else None
        if dtype == torch.bfloat16 and self.dtype != dtype and self.original is None:
            _ = self.fingerprint, self.content, self.former_content  # cached_property: computed before the cast
        if text_device is not None:
            self.text_device = torch.device(text_device)
        for network in self.networks:
            is_text = any(network is encoder for encoder in self.text_encoders)
            place = self.text_device if is_text and self.text_device is not None else device
            if place is not None and not (denoiser_aside and network is self.denoiser):
                network.to(place)
            if dtype is not None:
                upcasts = network is self.vae and self.keeps_float32(self.vae, dtype)
                _cast(network, torch.float32 if upcasts else dtype)
        return self

    def place_denoiser(self) -> None:
        """Move the denoiser that `to` has left aside to the base's device."""
        self.denoiser.to(self.device)
        self._device = None

    def keeps_float32(self, vae: Any, dtype: torch.dtype) -> bool:
        """Whether an autoencoder stays float32 in a base of this dtype, as it would overflow."""
        return dtype == torch.float16 and needs_float32(vae, type(self).upcasts_vae)

    @property
    @abstractmethod
    def latents(self) -> Latents:
        """Shape and scale of its latents."""

    @property
    def latent_channels(self) -> int:
        """Channels of its latents."""
        return self.latents.channels

    @property
    def denoiser_channels(self) -> int:
        """Channels of the latents that its network takes, those of a mask and an image among them."""
        return int(self.denoiser.config["in_channels"])

    @property
    def vae_channels(self) -> int:
        """Channels of the latents of its autoencoder."""
        return int(self.vae.config["latent_channels"])

    @property
    def factor(self) -> int:
        """Pixels per latent position, along each side."""
        return self.latents.factor

    @property
    def size(self) -> int:
        """Native side length of its images, in pixels."""
        return self.denoiser.config.sample_size * self.factor

    @property
    def size_multiple(self) -> int:
        """Width and height must be multiples of this, in pixels."""
        return self.latents.factor * self.latents.patch

    @property
    def largest_size(self) -> int | None:
        """The longest supported side in pixels; None if there is no limit."""
        return None

    @property
    def prediction_type(self) -> str:
        """What the network predicts (`Schedule.prediction`)."""
        return self.schedule.prediction

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Its family in modelspec's terms, such as `stable-diffusion-v1`."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the denoiser's weights (as float16): a control records it for the base that it was trained on."""
        if self.original is not None:
            return self._original.fingerprint
        return hash_of_halves(self.denoiser.state_dict().values())

    @cached_property
    def content(self) -> str:
        """Hash of everything that determines its images: weights, configurations, tokenizers and the noise schedule."""
        if self.original is not None:
            return self._original.content
        return sha256_of(self.former_content, *map(tokenizer_key, self.tokenizers))[:16]

    @cached_property
    def former_content(self) -> str:
        """`content` as earlier versions recorded it, without tokenizers."""
        if self.original is not None:
            return self._original.former_content
        others = [network_key(network) for network in self.networks if network is not self.denoiser]
        schedule = canonical_config(self.scheduler_config)
        return sha256_of(self.fingerprint, canonical_config(dict(self.denoiser.config)), *others, schedule)[:16]

    @property
    def _original(self) -> Base:
        assert self.original is not None
        base = self.original()
        # All are computed now, so that the file is read once.
        for name in ("fingerprint", "content", "former_content"):
            self.__dict__[name] = getattr(base, name)
        return base

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule that it was trained with."""
        return type(self).schedule_class(self.scheduler_config)

    def schedule_for(self, width: int, height: int) -> Schedule:
        """The noise schedule of images of a size in pixels, on which some schedules depend."""
        return self.schedule.for_tokens((width // self.size_multiple) * (height // self.size_multiple))

    @property
    def reads_guidance(self) -> bool:
        """Whether its network reads the guidance scale (guidance distillation, Meng et al. 2023, arXiv 2210.03142):
        there are then no branches of CFG."""
        return False

    def guided(self, text: Text, guidance: float) -> Text:
        """A text for a guidance scale, on a base that reads it."""
        return text

    def combined(self, unconditional: Tensor, conditional: Tensor, guidance: float) -> Tensor:
        """Predictions of both branches => that of classifier-free guidance (Ho and Salimans 2022, arXiv
        2207.12598)."""
        return unconditional + guidance * (conditional - unconditional)

    @abstractmethod
    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """Prompts => `Text` on the base's device; plain prompts are padded or truncated to the tokenizer's length.

        Args:
            size: width and height of the images in pixels, for bases conditioned on it; default: the base's native
                size.
            options: how the prompts are read.

        Raises:
            UserError: the base does not support the options, or a prompt has syntax that is not supported.
        """

    @property
    def pooled_width(self) -> int | None:
        """Width of `pool_text`; None if the base has none."""
        return None

    def pool_text(self, phrases: Sequence[str]) -> Tensor:
        """Phrases => one vector each, `[B, pooled_width]`: what its text encoder pools.

        Raises:
            UserError: the base pools no text, or a phrase contains half a character (a lone surrogate).
        """
        raise UserError(f"{self.name} has no vectors of phrases: its text encoder does not pool", "incompatible")

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Plain prompts => token ids `[B, L]` of each of `tokenizers`, for `TokenizedPrompts`.

        Raises:
            UserError: a prompt contains half a character (a lone surrogate).
        """
        return tuple(token_ids(tokenizer, prompts) for tokenizer in self.tokenizers)

    @abstractmethod
    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """Time embedding `[B, D]` at times `t` `[B]`, with whatever else the network adds to it."""

    @abstractmethod
    def zero_text(self) -> Text:
        """Zeros in the shape of `encode_text` for one prompt, without a tokenizer, on torch's default device."""

    @torch.no_grad()
    def encode_image(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `[B, 3, H, W]` => scaled latents: the mode of the posterior, or a sample of it.

        An autoencoder in float16 that overflows is cast to float32 for good.

        Args:
            noise: standard normal `[B, C, h, w]` of the sample; for one image, of several samples.
        """
        x = x.to(self.vae.device, self.vae.dtype)  # which may be offloaded while the network trains
        parts = x.split(_vae_batch(x.shape[2] * x.shape[3]))
        moments = [self._finite(self._moments, part) for part in parts]
        posteriors = [DiagonalGaussianDistribution(each) for each in moments]
        z = torch.cat([posterior.mode() for posterior in posteriors])
        if noise is not None:
            z = z + torch.cat([posterior.std for posterior in posteriors]) * noise.to(z.device, z.dtype)
        return self.scaled(z).to(self.device, self.dtype)

    def scaled(self, z: Tensor) -> Tensor:
        """Output of the autoencoder => scaled latents."""
        return self.latents.scaled(z)

    def unscaled(self, z: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return self.latents.unscaled(z)

    def _moments(self, x: Tensor) -> Tensor:
        """Images => mean and logarithm of the variance of the autoencoder's posterior, `[B, 2 * C, h, w]`."""
        moments: Tensor = self.vae.encode(x).latent_dist.parameters
        return moments

    def _pixels(self, z: Tensor) -> Tensor:
        """Output of the autoencoder's encoder => images, not clamped."""
        images: Tensor = self.vae.decode(z).sample
        return images

    @contextmanager
    def text_encoders_loaded(self, *, aside: bool) -> Iterator[None]:
        """A context in which the text encoders are on their device.

        Args:
            aside: whether they are on the CPU afterwards, until the next context.
        """
        if aside or self._encoders_aside:
            self._move_text_encoders(self.text_device or self.device)
            self._encoders_aside = False
        try:
            yield
        finally:
            if aside:
                self._move_text_encoders("cpu")
                self._encoders_aside = True

    def _move_text_encoders(self, device: torch.device | str) -> None:
        for encoder in self.text_encoders:
            encoder.to(device)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents => images, clamped to [-1, 1].

        An autoencoder in float16 that overflows is cast to float32 for good.
        """
        z = self.unscaled(z.to(self.vae.dtype))
        parts = z.split(_vae_batch(z.shape[2] * z.shape[3] * self.factor**2))
        images = torch.cat([self._finite(self._pixels, part) for part in parts])
        return images.clamp(-1, 1)

    def _finite(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`run` of the autoencoder on `x`. One that overflows float16 is cast to float32, which it then keeps."""
        if self.vae.dtype != torch.float16 or x.is_meta:
            return run(x.to(self.vae.dtype))
        try:
            made = run(x.half())
            if made.isfinite().all():
                return made
        except RuntimeError:
            with _CASTING:
                if self.vae.dtype == torch.float16:
                    raise  # else another thread has cast it meanwhile
        with _CASTING:
            self.vae.to(torch.float32)
        return run(x.float())

    @contextmanager
    def slicing(self, enabled: bool = True) -> Iterator[None]:
        """A context in which the autoencoder takes one image at a time, as by `enable_slicing` of diffusers."""
        before = self.vae.use_slicing
        self.vae.use_slicing = enabled
        try:
            yield
        finally:
            self.vae.use_slicing = before

    @contextmanager
    def tiling(self, enabled: bool = True) -> Iterator[None]:
        """A context in which the autoencoder works in overlapping tiles, of its native size or as it says, as by
        `enable_tiling` of diffusers. It bounds the memory for large images and changes them a little."""
        before = self.vae.use_tiling
        self.vae.use_tiling = enabled
        try:
            yield
        finally:
            self.vae.use_tiling = before

    @property
    @abstractmethod
    def sites(self) -> Mapping[str, tuple[int, int]]:
        """Injection sites of residuals: site -> its channels and its downsampling factor relative to the image."""

    @property
    @abstractmethod
    def points(self) -> Mapping[str, Point]:
        """Points for taps: on the stream of hidden states, and on the time embedding (`time`). Modules have more
        (`taps.MODULE`)."""

    def sites_in_words(self) -> dict[str, str]:
        """For a person: what enters -> where."""
        return {"where residuals enter": ", ".join(self.sites)}

    @property
    def is_inpainting(self) -> bool:
        """Whether its network reads a mask and the masked image beside the noisy latents."""
        return False

    def check_text_to_image(self, use: str) -> None:
        """Check that the base needs no mask and image.

        Args:
            use: what it is needed for, as in `training`.

        Raises:
            UserError: it is an inpainting model.
        """
        if self.is_inpainting:
            raise UserError(
                f"{self.name} is an inpainting model, which needs an image and a mask; {use} has none: use the"
                " text-to-image model that it was made from",
                "unsupported",
            )

    @abstractmethod
    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text,
        residuals: Residuals | None = None,
        taps: Taps | None = None,
        *,
        masked: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction (see `prediction_type`) for noisy latents `x_t` at times `t` of its schedule.

        Args:
            x_t: `[B, latent_channels, h, w]`.
            t: `[B]` or a scalar.
            text: of batch `B`.
            residuals: of the controls; gradients flow through them.
            taps: of the controls, for this call.
            masked: of an inpainting model, the mask (1 where to inpaint) and the latents of the masked image,
                `[B, 1 + latent_channels, h, w]`.

        Returns:
            `[B, latent_channels, h, w]`.

        Raises:
            UserError: this base lacks a site or a point, several taps act where one replaces the hidden states, or it
                is an inpainting model and `masked` is missing.
        """

    def check_sites(self, residuals: Residuals) -> None:
        """Check that the base has all sites of `residuals`.

        Raises:
            UserError: it lacks one.
        """
        if unknown := [site for site in residuals if site not in self.sites]:
            raise UserError(
                f"{self.name} has no site {unknown[0]!r}; its sites: {', '.join(self.sites)}", "incompatible"
            )

    @contextmanager
    def tapping(self, residuals: Mapping[str, Tensor], taps: Taps) -> Iterator[None]:
        """A context in which the network runs with residuals and taps at its points; see `taps.tapped`."""
        before, self._active_taps = self._active_taps, (residuals, taps)
        try:
            with tapped(self.denoiser, self.points, residuals, taps):
                yield
        finally:
            self._active_taps = before

    @contextmanager
    def replacing(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """A context in which the denoiser runs with `modules` in place of its own at these paths."""
        denoiser, before = self.denoiser, self._replaced
        own = {path: denoiser.get_submodule(path) for path in modules}
        self._replaced = {**before, **modules}
        try:
            for path, module in modules.items():
                denoiser.set_submodule(path, module)
            yield
        finally:
            for path, module in own.items():
                denoiser.set_submodule(path, module)
            self._replaced = before

    def checkpoint_activations(self) -> None:
        """Gradient checkpointing of the denoiser.

        Taps are hooked again for the recomputation, with the state of the original call.
        """

        def active() -> Callable[[], AbstractContextManager[Any]] | None:
            taps, replaced = self._active_taps, self._replaced
            return None if taps is None else lambda: self._again(taps, replaced)

        self.denoiser.enable_gradient_checkpointing(checkpoint_with_taps(active))

    @contextmanager
    def _again(self, taps: tuple[Mapping[str, Tensor], Taps], replaced: Mapping[str, nn.Module]) -> Iterator[None]:
        """The state of a call, for a block that is recomputed. A recomputed block is the one that ran, replaced or
        not, but taps are hooked by path."""
        with self.replacing(replaced), self.tapping(*taps):
            yield

    @property
    def default_guidance(self) -> float:
        """Default guidance scale: from the base's folder (as in nano's), else the family's default in diffusers."""
        return float(self.defaults.get("guidance", self.usual_guidance))

    @property
    def default_sampler(self) -> str:
        """Default sampler."""
        return self.usual_sampler

    @property
    def default_mode(self) -> str:
        """Default `ControlUse.mode`, the branches of CFG on which controls act: from the base's folder (as in nano's),
        else both, as in diffusers."""
        return str(self.defaults.get("mode", "balanced"))

    @property
    def latent_rgb(self) -> LatentRGB:
        """Linear approximation of its autoencoder: from the base's folder (as nano's), else that of the family."""
        rows: LatentRGB = self.defaults.get("latent_rgb", self.usual_latent_rgb)
        return rows

    @property
    def default_prompt(self) -> str:
        """Prompt of the prompt mode `default`, from the base's folder (as in nano's) or of the field; empty if the base
        does not know its words."""
        return str(self.defaults.get("prompt", DEFAULT_PROMPT))

    @property
    def default_captioner(self) -> str | None:
        """Default captioner of the prompt mode `automatic`, from the base's folder; None is BLIP."""
        name = self.defaults.get("captioner")
        return None if name is None else str(name)

    @property
    def default_image_encoder(self) -> str:
        """Default encoder of image prompts (`image_encoders`), from the base's folder, else CLIP ViT-L/14."""
        return str(self.defaults.get("image_encoder", CLIP_LARGE))

    @property
    def prompt_tokens(self) -> int:
        """Maximum length of a prompt in tokens, including those that mark its begin and end."""
        return self.tokenizer.model_max_length

    def fitted(self, *texts: Text) -> list[Text]:
        """Texts of one run, without padding that none of them needs, for bases that pad prompts of any length."""
        return list(texts)

    def cut_from(self, prompt: str) -> str:
        """The part of a prompt beyond the maximum length; empty if nothing is truncated.

        Raises:
            UserError: the prompt contains half a character (a lone surrogate).
        """
        return cut_from(self.tokenizer, prompt)

    def check_size(self, width: int, height: int) -> None:
        """Check that a size is supported.

        Raises:
            UserError: a side is not a positive multiple of `size_multiple`, or longer than `largest_size`.
        """
        multiple, largest = self.size_multiple, self.largest_size
        for name, value in (("width", width), ("height", height)):
            if value < multiple or value % multiple:
                nearest = max(multiple, round(value / multiple) * multiple)
                raise UserError(
                    f"{name} {value} does not fit {self.name}: it must be a multiple of {multiple}; try {nearest}",
                    "wrong-size",
                )
            if largest is not None and value > largest:
                raise UserError(
                    f"{name} {value} does not fit {self.name}: the largest side is {largest} pixels", "wrong-size"
                )


_CASTING = RLock()
"""Held while an autoencoder that overflows is cast, which several threads may use."""

PIXELS_AT_ONCE = 2**19
"""Pixels per call of an autoencoder: two images of 512 x 512, whose largest float32 activations take 256 MiB, or whole
batches of small images."""


def _vae_batch(pixels: int) -> int:
    """Images of `pixels` pixels per call of an autoencoder."""
    return max(1, PIXELS_AT_ONCE // pixels)


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network; in float16, modules that transformers names stay float32, as when it loads them: T5's `wo`
    overflows."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    before = {name: value.data for name, value in network.named_parameters() if kept & set(name.split("."))}
    network.to(dtype)
    for name, value in before.items():
        network.get_parameter(name).data = value.float()


def needs_float32(vae: Any, default: bool) -> bool:
    """Whether an autoencoder overflows float16: `force_upcast` of its config if set, else `default`."""
    config = dict(vae.config)
    # diffusers fills in True where the config has no entry, as for Stable Diffusion 1, which needs no upcast.
    explicit = "force_upcast" in config and "force_upcast" not in config.get("_use_default_values", ())
    return bool(config["force_upcast"]) if explicit else default
