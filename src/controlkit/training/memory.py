"""Memory reduction for training: CPU offload of encoders, bf16 frozen weights, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.prompt_encoding import PLAIN, TextOptions
from controlkit.bases.text import Text
from controlkit.controls.control import Control


def checkpoint_activations(base: Base, control: Control) -> None:
    """Enable gradient checkpointing: store the inputs of blocks only, and recompute the rest in the backward pass.

    Gradients stay the same (Chen et al. 2016, arXiv 1604.06174); a step takes about a third longer.
    """
    base.checkpoint_activations()
    with base.replacing(control.replacements()):  # they are part of the base only within
        base.checkpoint_activations()
    for module in control.modules():
        if isinstance(module, ModelMixin) and module._supports_gradient_checkpointing:
            module.enable_gradient_checkpointing()


def store_frozen(base: Base, control: Control, dtype: torch.dtype = torch.bfloat16) -> None:
    """Cast frozen weights to `dtype`; trained weights keep theirs. For use under autocast.

    Fingerprints stay those of the loaded weights, because a finished control stores them.
    """
    _ = base.fingerprint  # computes and caches it
    for network in base.networks:
        nn.Module.to(network, dtype)  # diffusers' method warns of modules that autocast handles
    control.store_frozen(dtype)


class CPUOffload:
    """Keeps the text encoders and the VAE of a base on the CPU; steps do not need them if their outputs are cached.

    Args:
        embedded: the cached embeddings of prompts on the CPU, None if they are not cached: of those of previews, for
            which large text encoders do not come back.
    """

    def __init__(self, base: Base, embedded: Callable[[Sequence[str]], Text | None]) -> None:
        self.base, self.device = base, base.device
        self._embedded = embedded
        cpu = torch.device("cpu")
        for encoder in base.text_encoders:
            encoder.to(cpu)
        self._move(cpu)

    def encode_text(
        self, prompts: Sequence[str], size: tuple[int, int] | None = None, options: TextOptions = PLAIN
    ) -> Text:
        """As `Base.encode_text`; plain prompts that are cached are as they were encoded, for the base's own size;
        others are encoded on the CPU."""
        text = self._embedded(prompts) if options == PLAIN else None
        if text is None:
            return self.base.encode_text(prompts, size, options)

        def on_device(value: Tensor) -> Tensor:
            return value.to(self.device, self.base.dtype if value.is_floating_point() else value.dtype)

        return text.map(on_device)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Move the VAE to the base's device within a block."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        self.base.vae.to(device)
