"""The objectives of ControlNet and of CtrLoRA's base control."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from controlkit.checkpoints.controls import save_control
from controlkit.checkpoints.ctrlora import save_adapter, save_base_control
from controlkit.controls.base_control import BaseControl
from controlkit.controls.control import Control
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.training.recipes import ControlNetRecipe, CtrLoRABaseRecipe
from controlkit.training.savings import checkpoint_activations
from controlkit.training.starts import controlnet_from
from controlkit.training.steering import SteeringObjective


class ControlNetObjective(SteeringObjective):
    """All of a ControlNet, one condition."""

    def __init__(self, recipe: ControlNetRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.control = controlnet_from(recipe.start, self.base, recipe.condition, recipe.seed)
        if recipe.gradient_checkpointing:
            checkpoint_activations(self.base, self.control)
        self.trained = nn.ModuleDict({"control": self.control})

    def control_for(self, condition: str) -> Control:
        return self.control

    def save(self, folder: Path) -> list[Path]:
        path = folder / f"{self.names[0]}.safetensors"
        return [save_control(path, self.control, self.base, made=self.recipe.summary())]


class CtrLoRABaseObjective(SteeringObjective):
    """The shared network and one LoRA for each condition, together (Xu et al. 2025, section 3.2).

    Zero convolutions and norms are shared by all conditions; a finished adapter's file has its own copy of them.
    """

    def __init__(self, recipe: CtrLoRABaseRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.base_control = BaseControl.for_base(self.base)
        for index, name in enumerate(self.names):
            self.base_control.add_adapter(name, recipe.rank, shares_base=True, seed=recipe.seed + index)
        self.base_control.train_base()
        self.base_control.train()
        if recipe.gradient_checkpointing:
            checkpoint_activations(self.base, self.base_control)
        self.trained = nn.ModuleDict({"control": self.base_control})

    def control_for(self, condition: str) -> CtrLoRA:
        # Selected for the backward pass, too, which runs the layers again under gradient checkpointing.
        self.base_control.select(condition)
        return CtrLoRA(self.base_control, condition, condition)

    def save(self, folder: Path) -> list[Path]:
        made = self.recipe.summary()
        shared = save_base_control(folder / "base.safetensors", self.base_control, self.base, made=made)
        return [shared] + [
            save_adapter(folder / f"{name}.safetensors", self.control_for(name), self.base, "base", made=made)
            for name in self.names
        ]
