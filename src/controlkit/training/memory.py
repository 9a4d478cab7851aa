"""Memory reduction for training: CPU offload of encoders, bf16 frozen weights, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import nn

from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.training.recipe import Recipe


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether a recipe's arithmetic on `device` is bf16."""
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.precision == "bf16"


def checkpoint_activations(base: Base, control: Control) -> None:
    """Keep the inputs of blocks only, and compute what is inside of them again in the backward pass.

    The gradients are the same (Chen et al. 2016, arXiv 1604.06174); a step takes about a third longer.
    """
    base.checkpoint_activations()
    for module in control.modules():
        if isinstance(module, ModelMixin) and module._supports_gradient_checkpointing:
            module.enable_gradient_checkpointing()


def store_frozen(base: Base, control: Control, dtype: torch.dtype = torch.bfloat16) -> None:
    """Store what does not train in `dtype`; what trains keeps its own. For use under autocast.

    Fingerprints stay those of the weights as they were loaded, which a finished control is known by.
    """
    _ = base.fingerprint  # kept from now on
    for network in base.networks:
        nn.Module.to(network, dtype)  # diffusers' own method warns of what autocast sees to
    control.store_frozen(dtype)


class CPUOffload:
    """Keeps on the CPU the networks of a base that steps do without once their results are cached."""

    def __init__(self, base: Base) -> None:
        self.device = base.device
        self.networks = (*base.text_encoders, base.vae)
        self._move(torch.device("cpu"))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A block in which they are on the base's device."""
        self._move(self.device)
        try:
            yield
        finally:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for network in self.networks:
            network.to(device)
