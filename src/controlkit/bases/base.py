"""`Base`: the interface of a text-to-image model. Each family is one file beside this one.

All networks are diffusers or transformers classes, so whatever diffusers loads can be a base. `family.py` has what is
known before one is loaded, `networks.py` its parts, `latent_space.py` its autoencoder; here is what reads texts and
predicts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, ClassVar

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from controlkit.bases.defaults import DEFAULT_PROMPT
from controlkit.bases.image_encoders import CLIP_LARGE
from controlkit.bases.latent_rgb import LatentRGB
from controlkit.bases.latent_space import LatentSpace
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import RectifiedFlow, Schedule, VariancePreserving
from controlkit.bases.taps import Point, Taps, checkpoint_with_taps, tapped
from controlkit.bases.text import Text, cut_from, token_ids
from controlkit.errors import UserError


class Base(LatentSpace):
    """Text encoders, autoencoder, denoising network and noise schedule of one model; all frozen.

    Images are `[B, 3, H, W]` in [-1, 1]; latents are `[B, latents.channels, H / factor, W / factor]`, scaled to about
    unit variance. Times t are in the units of its `schedule`.

    Args:
        defaults: the folder's own defaults (`default_guidance`, `default_mode`).
        parts: as of `Networks`.
    """

    schedule_class: ClassVar[type[RectifiedFlow | VariancePreserving]] = VariancePreserving
    """Class of its noise schedule."""
    usual_guidance: ClassVar[float]
    """Default guidance scale of the family."""
    usual_sampler: ClassVar[str] = "ddim"
    """Default sampler of the family."""
    learns_words: ClassVar[bool] = True
    """Whether its text encoders take textual inversions."""

    def __init__(self, *, defaults: Mapping[str, Any] | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        self.defaults = dict(defaults or {})
        self.merged: tuple[Any, ...] = ()
        """What is merged into its weights now (LoRAs with their weights), for keys of caches."""
        self._active_taps: tuple[Mapping[str, Tensor], Taps] | None = None
        self._replaced: Mapping[str, nn.Module] = {}

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
    def denoiser_channels(self) -> int:
        """Channels of the latents that its network takes, those of a mask and an image among them."""
        return int(self.denoiser.config["in_channels"])

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
    def text_settings(self) -> tuple[Any, ...]:
        """What `encode_text` depends on besides text encoders and tokenizers, for keys of caches."""
        return ()

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
