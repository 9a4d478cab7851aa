"""Precomputed ControlNet: the encoder copy reads no noise and no time, so it runs once for all steps.

From lllyasviel/ControlNet, discussion 216: a ControlNet trained so that its residuals can be computed before sampling.
Its author judged the images worse than a ControlNet's; this is the system to measure that with. The discussion gives no
code. It is read here as ControlNet without what depends on the step: the stream starts from the hint network's output
instead of the latent's convolution, and the time embedding is gone. What the copy of the base had added for a fixed
time, 0, is in the biases of its convolutions. The condition is read alone, with the embedding of the empty prompt in
the cross attention, or with the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.meta import meta_text
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.controls.control import Control, OneImage, Reads
from controlkit.controls.controlnet_lite import initialise_for_relu
from controlkit.controls.encoder_copy.network import (
    base_needed,
    checked_config,
    copied_encoder,
    copy_incompatibility,
    hint_channels_for,
    hint_incompatibility,
    plain_config,
)
from controlkit.controls.hints import Hint
from controlkit.controls.registry import control
from controlkit.errors import UserError

_READS_TEXT, _TOKENS = "reads_text", "prompt_tokens"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a precomputed ControlNet."""

    reads_text: bool = False
    """Whether it reads the prompt, too. It then runs once for a condition image and a prompt, else once for a condition
    image."""


@control
class PrecomputedControlNet(OneImage):
    """A trainable copy of the base's encoder and middle block on the condition image alone, or on it and the prompt.

    Args:
        network: a ControlNet's, of which the parts that read the latent and the time are removed.
        prompt_tokens: of the embedding of the empty prompt that it reads; None if it reads the prompt.
    """

    kind: ClassVar[str] = "controlnet-precomputed"
    title: ClassVar[str] = "a precomputed ControlNet"
    paper: ClassVar[str] = "Zhang 2023, lllyasviel/ControlNet, discussion 216"
    reads: ClassVar[Reads] = Reads.TEXT
    enters: ClassVar[str] = "decoder skips and middle"
    Options = Options
    not_elsewhere: ClassVar[str] = "other tools run a ControlNet at every step, on the noise"

    def __init__(
        self, network: ControlNetModel, condition: str | None = None, *, prompt_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.hint_network: nn.Module = network.controlnet_cond_embedding
        for name in ("controlnet_cond_embedding", "conv_in", "time_embedding", "add_embedding", "class_embedding"):
            setattr(network, name, None)
        for resnet in _resnets(network):
            resnet.time_emb_proj = None
        self.network = network
        self.condition = condition
        self.empty_prompt: Tensor | None
        width = network.config["cross_attention_dim"]
        empty = None if prompt_tokens is None else torch.zeros(1, prompt_tokens, width)
        self.register_buffer("empty_prompt", empty)

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, reads_text: bool = False, **options: Any
    ) -> PrecomputedControlNet:
        """A new one: encoder and middle block as `base` runs them at time 0 (with the empty prompt, if it does not read
        text), zero convolutions, and a random hint network.

        Args:
            reads_text: as in `Options`.

        Raises:
            UserError: no hint network fits the base, or its time embedding does more than shift.
        """
        if (kind := base.unet.config["resnet_time_scale_shift"]) != "default":
            raise UserError(
                f"{cls.title} needs a UNet that adds its time embedding (resnet_time_scale_shift: default);"
                f" {base.name} has {kind}",
                "incompatible",
            )
        channels = hint_channels_for(base, cls.title)
        network = copied_encoder(base.unet, conditioning_embedding_out_channels=channels)
        network = nn.Module.to(network, base.denoiser.device, base.dtype)
        text = meta_text(base) if base.device.type == "meta" else base.encode_text([""])
        network.load_state_dict(_biases_at_time_zero(network, base, text), strict=False)
        # Nothing else enters the stream that its output starts, which zero convolutions keep from the base.
        initialise_for_relu([network.controlnet_cond_embedding])
        network = nn.Module.to(network, base.device)
        new = cls(network, condition, prompt_tokens=None if reads_text else text.tokens.shape[1])
        if new.empty_prompt is not None:
            new.empty_prompt = text.tokens.detach().clone()
        return new

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        weight = next(self.hint_network.parameters())
        return self.hint_network(condition_image.to(weight.device, weight.dtype))

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert isinstance(hint, Tensor)
        tokens = self._tokens(text, len(hint))
        network, stream = self.network, hint
        features = [stream]
        for block in network.down_blocks:
            stream, outputs = block(stream, None, **_attended(block, tokens))
            features += outputs
        stream = network.mid_block(stream, None, **_attended(network.mid_block, tokens))
        convolutions = zip(network.controlnet_down_blocks, features, strict=True)
        skips = [convolution(feature) for convolution, feature in convolutions]
        return Residuals.numbered("skip", skips, middle=network.controlnet_mid_block(stream))

    def _tokens(self, text: Text | None, rows: int) -> Tensor:
        if self.empty_prompt is not None:
            return self.empty_prompt.expand(rows, -1, -1)
        assert text is not None
        return text.tokens

    @property
    def reading(self) -> Reads:
        return Reads.TEXT if self.empty_prompt is None else Reads.NOTHING

    def incompatibility(self, base: Base) -> str | None:
        config = self.config()
        of_hint = hint_incompatibility(config["conditioning_embedding_out_channels"], base)
        # It reads no latents, so any number of channels will do.
        return of_hint or copy_incompatibility({**config, "in_channels": base.latent_channels}, base)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def copied_network(self) -> nn.Module:
        return self

    def copied_from(self, base: Base) -> Mapping[str, Tensor]:
        text = base.encode_text([""])
        network = {**base.unet.state_dict(), **_biases_at_time_zero(base.unet, base, text)}
        return {**{f"network.{name}": value for name, value in network.items()}, "empty_prompt": text.tokens}

    def config(self) -> dict[str, Any]:
        config = {**plain_config(self.network), _READS_TEXT: self.empty_prompt is None}
        if self.empty_prompt is not None:
            config[_TOKENS] = self.empty_prompt.shape[1]
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> PrecomputedControlNet:
        config = checked_config(config)
        tokens = None if config.pop(_READS_TEXT) else int(config[_TOKENS])
        config.pop(_TOKENS, None)
        return cls(ControlNetModel.from_config(config).eval(), condition, prompt_tokens=tokens)

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        return {"reads the prompt": "yes" if config[_READS_TEXT] else "no"}

    def parameter_counts(self) -> dict[str, int]:
        empty = {} if self.empty_prompt is None else {"empty_prompt": self.empty_prompt.numel()}
        return {**super().parameter_counts(), **empty}

    @classmethod
    def variants(cls, base: Base, **options: Any) -> dict[str, Control]:
        return {"": cls.for_base(base), "with reads_text": cls.for_base(base, reads_text=True)}


def _resnets(network: nn.Module) -> list[ResnetBlock2D]:
    return [module for module in network.modules() if isinstance(module, ResnetBlock2D)]


@torch.no_grad()
def _biases_at_time_zero(network: nn.Module, base: Base, text: Text) -> dict[str, Tensor]:
    """The biases of a UNet's or a ControlNet's first convolutions with what `base` adds to them at time 0, by name."""
    device = base.denoiser.device
    x_t = torch.zeros(1, base.latent_channels, 1, 1, device=device, dtype=base.dtype)
    embedded = base.embed_time(x_t, torch.zeros(1, device=device), text.map(lambda tensor: tensor.to(device)))
    return {
        f"{path}.conv1.bias": resnet.conv1.bias + resnet.time_emb_proj(resnet.nonlinearity(embedded))[0]
        for path, resnet in network.named_modules()
        if isinstance(resnet, ResnetBlock2D)
    }


def _attended(block: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    return {"encoder_hidden_states": tokens} if getattr(block, "has_cross_attention", False) else {}
