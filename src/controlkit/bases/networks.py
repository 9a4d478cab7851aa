"""`Networks`: the networks and tokenizers of one model, where they are, and hashes that identify them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from threading import RLock
from typing import Any, ClassVar, Self

import torch
from torch import nn

from controlkit.bases.family import Family
from controlkit.bases.identity import canonical_config, hash_of_halves, network_key, tokenizer_key
from controlkit.files import sha256_of


class Networks(Family):
    """The networks of one model, all frozen, with its tokenizers and the configuration of its scheduler.

    Args:
        name: as passed to `load_base`.
        scheduler_config: of a diffusers scheduler.
        components: networks and tokenizers, by the names in the class attribute `components`.

    Raises:
        TypeError: a component is missing or unknown.
    """

    upcasts_vae: ClassVar[bool] = False
    """Whether the autoencoder overflows float16, if its configuration does not say."""

    vae: Any
    tokenizer: Any
    text_encoder: Any

    def __init__(self, *, name: str, scheduler_config: Mapping[str, Any], **components: Any) -> None:
        self.name = name
        self.scheduler_config = dict(scheduler_config)
        self.original: Callable[[], Networks] | None = None
        """Loads the base again with the weights as stored, if those here were cast on loading."""
        self.vae_name: str | None = None
        """What stands in place of its own autoencoder, as passed to `load_base`."""
        self.text_device: torch.device | None = None
        """Device of the text encoders, if not that of the other networks."""
        self._device: torch.device | None = None
        self._encoders_aside = False
        expected = {component.name: component for component in self.components if not component.is_scheduler}
        unknown = [key for key in components if key not in expected]
        missing = [key for key, component in expected.items() if key not in components and not component.optional]
        if unknown or missing:
            raise TypeError(f"{type(self).__name__} of {', '.join(expected)}: missing {missing}, unknown {unknown}")
        for key in expected:
            setattr(self, key, components.get(key))
        self.in_use = RLock()
        """Held while its weights or settings are changed for a time, as by the LoRAs of one call of `generate`."""
        for network in self.networks:
            network.eval().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "in_use"}  # a lock cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, in_use=RLock())

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

    @property
    def text_encoders(self) -> tuple[nn.Module, ...]:
        """The text encoders, in the order of `components`."""
        return tuple(network for name, network in self.named_networks().items() if name.startswith("text_encoder"))

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The denoising network."""

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
    ) -> Self:
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
    def _original(self) -> Networks:
        assert self.original is not None
        base = self.original()
        # All are computed now, so that the file is read once.
        for name in ("fingerprint", "content", "former_content"):
            self.__dict__[name] = getattr(base, name)
        return base


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
