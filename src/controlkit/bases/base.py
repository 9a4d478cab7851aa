"""`Base`: a text-to-image model that is shaped like Stable Diffusion.

Everything inside is a diffusers or transformers class, so what diffusers loads is a base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from controlkit.bases.residuals import Residuals
from controlkit.bases.schedules import Schedule, VariancePreserving
from controlkit.bases.taps import Point, Taps, checkpoint_with_taps, tapped
from controlkit.bases.unet import encoder_stages, points_of, sites_of, stage_points
from controlkit.errors import UserError
from controlkit.files import sha256_of, sha256_of_all, whole_text


@dataclass(frozen=True)
class Text:
    """Encoded prompts, and whatever else a base's networks are told besides x_t and t."""

    tokens: Tensor
    """`[B, L, D]`, the hidden states that cross attention reads."""
    pooled: Tensor | None = None
    """`[B, D2]`, one vector for each prompt (Stable Diffusion XL)."""
    time_ids: Tensor | None = None
    """`[B, 6]`, original size, crop and target size of the picture (Stable Diffusion XL)."""

    def __len__(self) -> int:
        return len(self.tokens)

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The same change to every tensor."""
        parts = (self.tokens, self.pooled, self.time_ids)
        return Text(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    def expand(self, batch: int) -> Text:
        """One prompt repeated `batch` times, without copying."""
        return self.map(lambda part: part.expand(batch, *part.shape[1:]))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that there are."""
        return tuple(part for part in (self.tokens, self.pooled, self.time_ids) if part is not None)

    def extended(self, tokens: Tensor) -> Text:
        """The same with more tokens `[B, n, D]` after those of the prompt."""
        return replace(self, tokens=torch.cat([self.tokens, tokens.to(self.tokens)], 1))

    def inputs(self) -> dict[str, Any]:
        """As keyword arguments of diffusers' UNets and ControlNets."""
        inputs: dict[str, Any] = {"encoder_hidden_states": self.tokens}
        if self.pooled is not None:
            inputs["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return inputs


def concatenate(*texts: Text) -> Text:
    """Texts one after another along the batch."""
    parts = zip(*(text.tensors() for text in texts), strict=True)
    return Text(*(torch.cat(part) for part in parts))


class Base:
    """Text encoder, autoencoder, UNet and noise schedule of one model; all frozen.

    Pictures are `[B, 3, H, W]` in [-1, 1]; latents are `[B, latent_channels, H / factor, W / factor]`, scaled to
    about unit variance.
    """

    usual_guidance: ClassVar[float] = 7.5
    """The scale of guidance that its family is used with."""

    def __init__(
        self,
        *,
        name: str,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: dict[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.defaults = dict(defaults or {})
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.unet = unet
        self.scheduler_config = scheduler_config
        self._hung: tuple[Mapping[str, Tensor], Taps] | None = None
        for network in self.networks:
            network.eval().requires_grad_(False)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All networks."""
        return (self.text_encoder, self.vae, self.unet)

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """Those that read prompts."""
        return (self.text_encoder,)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return self.unet.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Base:
        """Move all networks; returns itself.

        What it is known by (`fingerprint`, `content`) stays that of the weights as they were: bfloat16 would change it.
        """
        if dtype == torch.bfloat16 and self.dtype != dtype:
            _ = self.fingerprint, self.content  # kept from now on
        for network in self.networks:
            if device is not None:
                network.to(device)
            if dtype is not None:
                network.to(torch.float32 if network is self.vae and self._upcasts(dtype) else dtype)
        return self

    def _upcasts(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float16 and needs_float32(self.vae, xl=len(self.text_encoders) > 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.unet.config.in_channels

    @property
    def factor(self) -> int:
        """Pixels of a picture to one of its latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return self.unet.config.sample_size * self.factor

    @property
    def size_multiple(self) -> int:
        """Sizes must be multiples of this. What the UNet halves unevenly is rounded up, as in diffusers."""
        return self.factor

    @property
    def encoder_stages(self) -> tuple[tuple[int, int], ...]:
        """What its UNet takes at each stage of the encoder; see the function of this name."""
        return encoder_stages(dict(self.unet.config), self.factor)

    @property
    def prediction_type(self) -> str:
        """What the network predicts: `Schedule.prediction`."""
        return self.schedule.prediction

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the UNet's weights (as float16), by which a control knows the base that it was trained on."""
        return hash_of_halves(self.unet.state_dict().values())

    @cached_property
    def content(self) -> str:
        """Hash of all that decides what it draws: every network's weights and settings, and the noise schedule."""
        others = [network_key(network) for network in self.networks if network is not self.unet]
        schedule = _settings_of(self.scheduler_config)
        return sha256_of(self.fingerprint, _settings_of(dict(self.unet.config)), *others, schedule)[:16]

    @cached_property
    def schedule(self) -> Schedule:
        """The noise schedule that it was trained with."""
        return VariancePreserving(self.scheduler_config)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Text:
        """Prompts => `Text`; each is padded or cut to the tokenizer's length.

        Args:
            size: width and height of the pictures in pixels, which some bases are told; default: the base's own.
        """
        ids = token_ids(self.tokenizer, prompts)
        return Text(self.text_encoder(ids.to(self.text_encoder.device))[0])

    @torch.no_grad()
    def encode_picture(self, x: Tensor) -> Tensor:
        """Pictures => scaled latents (the mode of the posterior)."""
        x = x.to(self.vae.device, self.vae.dtype)  # which may have been put aside while the UNet trains
        parts = [self.vae.encode(part).latent_dist.mode() for part in x.split(_at_once(x.shape[2] * x.shape[3]))]
        return (torch.cat(parts) * self.vae.config.scaling_factor).to(self.device, self.dtype)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents => pictures, clamped to [-1, 1]."""
        z = z.to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels = z.shape[2] * z.shape[3] * self.factor**2
        return torch.cat([self.vae.decode(part).sample for part in z.split(_at_once(pixels))]).clamp(-1, 1)

    @cached_property
    def sites(self) -> dict[str, tuple[int, int]]:
        """Where residuals may enter: site -> its channels, and the pixels of an image to one of it, along a side.

        `skip.N` are the decoder's skip connections, `middle` is the middle's output, `stage.N` are the encoder's stages
        where T2I-Adapters enter, and `encoder.N` is what follows the Nth block of the encoder (numbered as the original
        code's `input_blocks`); what comes after in the encoder, its skips too, sees the last two.
        """
        return sites_of(dict(self.unet.config), self.factor)

    @cached_property
    def points(self) -> dict[str, Point]:
        """Where taps may hang: on the stream of hidden states, and on the embedding of the time.

        `encoder.N.in` and `encoder.N` are before and after the Nth block of the encoder, `middle.in` and `middle` are
        before and after the middle, and `decoder.N` is before the Nth block of the decoder takes its skip connection.
        `time` is the embedding of the time, `[B, D]`, before that of what else the UNet is told is added to it; all
        blocks see what taps make of it.
        """
        return points_of(dict(self.unet.config))

    def predict(
        self, x_t: Tensor, t: Tensor, text: Text, residuals: Residuals | None = None, taps: Taps | None = None
    ) -> Tensor:
        """The UNet's prediction (see `prediction_type`) for noisy latents `x_t` at times `t` of 0..999.

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
        given = Residuals() if residuals is None else residuals
        if unknown := [site for site in given if site not in self.sites]:
            raise UserError(f"{self.name} has no site called {unknown[0]!r}; it has: {', '.join(self.sites)}")
        hooked = _hooked(given, taps or {}, stage_points(dict(self.unet.config)))
        left = Residuals({site: tensor for site, tensor in given.items() if site not in hooked})
        streams = _streams(given, hooked)
        with self._tapping(streams, taps or {}) if streams or taps else nullcontext():
            return self.unet(x_t, t, **text.inputs(), **_additions(left, x_t, self._skips), return_dict=False)[0]

    @cached_property
    def _skips(self) -> int:
        """How many skip connections the decoder has."""
        return sum(site.startswith("skip.") for site in self.sites)

    @contextmanager
    def _tapping(self, residuals: Mapping[str, Tensor], taps: Taps) -> Iterator[None]:
        before, self._hung = self._hung, (residuals, taps)
        try:
            with tapped(self.unet, self.points, residuals, taps):
                yield
        finally:
            self._hung = before

    def checkpoint_activations(self) -> None:
        """Keep the inputs of the UNet's blocks only, and compute what is inside of them again in the backward pass.

        Taps are hung again for that, and stay what they were in the call that hung them.
        """

        def active() -> Callable[[], AbstractContextManager[Any]] | None:
            hung = self._hung
            return None if hung is None else lambda: self._tapping(*hung)

        self.unet.enable_gradient_checkpointing(checkpoint_with_taps(active))

    def embed_time(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """The UNet's embedding of times `t` `[B]` (and of what else it is told beside the prompt), `[B, D]`."""
        embedded = self.unet.time_embedding(self.unet.get_time_embed(sample=x_t, timestep=t))
        inputs = text.inputs()
        told = self.unet.get_aug_embed(
            emb=embedded,
            encoder_hidden_states=text.tokens,
            added_cond_kwargs=inputs.get("added_cond_kwargs", {}),
        )
        return embedded if told is None else embedded + told

    @property
    def default_guidance(self) -> float:
        """The scale of guidance where none is asked for: what the base's folder says, such as nano's, or 7.5 for Stable
        Diffusion 1 and 2 and 5 for XL, as diffusers has them."""
        return float(self.defaults.get("guidance", self.usual_guidance))

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
            UserError: a side is not a positive multiple of `size_multiple`.
        """
        step = self.size_multiple
        for name, value in (("width", width), ("height", height)):
            if value < step or value % step:
                near = max(step, round(value / step) * step)
                raise UserError(f"{name} {value} does not fit {self.name}: it must be a multiple of {step}; try {near}")


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
"""What an autoencoder takes at once: two pictures of 512 x 512, whose largest activations in float32 take 256 MiB, and
whole batches of small ones."""


def _at_once(pixels: int) -> int:
    """How many pictures of so many pixels that is."""
    return max(1, PIXELS_AT_ONCE // pixels)


def cut_from(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The end of a prompt beyond the tokenizer's length; empty if there is none.

    Raises:
        UserError: the prompt holds half a character, as cut text does.
    """
    most = tokenizer.model_max_length
    ids = tokenizer(whole_text(prompt, "the prompt"), verbose=False).input_ids
    beyond = ids[most - 1 : -1]  # the last that is kept marks the end
    return tokenizer.decode(beyond).strip() if len(ids) > most else ""


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Prompts => token ids `[B, L]`, padded or cut to the tokenizer's length.

    Raises:
        UserError: a prompt holds half a character, as cut text does.
    """
    return tokenizer(
        [whole_text(prompt, "the prompt") for prompt in prompts],
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def _hooked(residuals: Residuals, taps: Taps, stages: Mapping[str, str]) -> dict[str, str]:
    """Site -> point of the residuals that enter by a hook: those the UNet has no argument for, and those that meet a
    tap, which is to see them. It takes stages by their order alone, so not if one before them has nothing."""
    hooked = {site: site for site in residuals if site.startswith("encoder.")}
    staged = [site for site in residuals if site in stages]
    if taps or hooked or len(staged) > len(residuals.family("stage")):
        hooked |= {site: stages.get(site, site) for site in residuals if site == "middle" or site in staged}
    return hooked


def _streams(residuals: Residuals, hooked: Mapping[str, str]) -> dict[str, Tensor]:
    """Point -> the sum of the residuals that enter there by a hook."""
    made: dict[str, Tensor] = {}
    for site, point in hooked.items():
        made[point] = made[point] + residuals[site] if point in made else residuals[site]
    return made


def _additions(residuals: Residuals, x_t: Tensor, skips: int) -> dict[str, Any]:
    """Residuals as keyword arguments of diffusers' UNet for the noisy latents `x_t`; it has so many `skips`."""
    made: dict[str, Any] = {}
    if "middle" in residuals or any(site.startswith("skip.") for site in residuals):
        zero = x_t.new_zeros(())
        made["down_block_additional_residuals"] = tuple(residuals.get(f"skip.{place}", zero) for place in range(skips))
        made["mid_block_additional_residual"] = residuals.get("middle", zero)
    if stages := residuals.family("stage"):
        # The UNet takes them off the list one by one, and leaves out at its middle what has another batch than x_t.
        made["down_intrablock_additional_residuals"] = [tensor.expand(len(x_t), *tensor.shape[1:]) for tensor in stages]
    return made


def needs_float32(vae: AutoencoderKL, *, xl: bool) -> bool:
    """Whether an autoencoder's activations overflow float16: what its config says, or else if it is XL's.

    Args:
        xl: whether it belongs to a base of Stable Diffusion XL's shape, with two text encoders.
    """
    config = dict(vae.config)
    # diffusers fills in True where a config says nothing, as Stable Diffusion 1's does, whose autoencoder needs none.
    said = "force_upcast" in config and "force_upcast" not in config.get("_use_default_values", ())
    return bool(config["force_upcast"]) if said else xl
