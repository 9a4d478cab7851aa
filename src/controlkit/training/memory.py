"""Memory reduction for training: CPU offload of encoders, bf16 frozen weights, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import nn

from controlkit.bases.base import Base
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
    """Keeps the text encoders and the VAE of a base on the CPU; steps do not need them if their outputs are cached."""

    def __init__(self, base: Base) -> None:
        self.device = base.device
        self.networks = (*base.text_encoders, base.vae)
        self._move(torch.device("cpu"))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Move them to the base's device within a block."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for network in self.networks:
            network.to(device)
