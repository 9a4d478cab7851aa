"""Objectives that make a control from a folder of pairs: CtrLoRA's adapter, and what it is compared with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from controlkit.checkpoints.controls import save_control
from controlkit.checkpoints.ctrlora import save_adapter, save_base_control
from controlkit.controls.base_control import BaseControl
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.data.pair import SOURCE
from controlkit.files import sha256_of
from controlkit.images import to_tensor
from controlkit.training.pairs import PairsObjective
from controlkit.training.recipes import AdaptRecipe, ControlNetPairsRecipe, CtrLoRAFullRecipe
from controlkit.training.savings import SetAside, checkpoint_activations, store_frozen, uses_bf16
from controlkit.training.starts import controlnet_from, load_base_control


class FrugalObjective(PairsObjective):
    """What the device holds is what steps use: a class of its own calls `settle` when caches and control are there."""

    set_aside: SetAside

    def settle(self) -> None:
        """Lay aside what is cached, and save memory as the recipe says."""
        if self.recipe.gradient_checkpointing:
            checkpoint_activations(self.base, self.control)
        if uses_bf16(self.recipe, self.device):
            store_frozen(self.base, self.control)
        self.set_aside = SetAside(self.base)

    def preview(self, step: int, folder: Path) -> dict[str, float]:
        bf16 = uses_bf16(self.recipe, self.device)
        with self.set_aside.at_hand(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return super().preview(step, folder)


class AdaptObjective(FrugalObjective):
    """Only the adapter trains (Xu et al. 2025, section 3.3); no frozen weight gets a gradient."""

    recipe: AdaptRecipe
    control: CtrLoRA

    def __init__(self, recipe: AdaptRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.encoded = self.cache.hints(self.control)
        self.settle()

    def build_control(self) -> CtrLoRA:
        recipe = self.recipe
        base_control = load_base_control(recipe.control, self.base)
        self.frozen = sha256_of(self.frozen, base_control.fingerprint())
        adapter = base_control.add_adapter(recipe.name, recipe.rank, seed=recipe.seed)
        base_control.train_adapter(recipe.name)
        self.base_control_name = Path(recipe.control).stem
        self.trained = nn.ModuleDict({"adapter": adapter})
        return CtrLoRA(base_control, recipe.name, self.condition.name)

    def hints(self, chosen: Tensor, flipped: Tensor) -> Tensor:
        return self.encoded.gather(chosen, flipped).float().to(self.device)

    def save(self, folder: Path) -> list[Path]:
        path = folder / f"{self.recipe.name}.safetensors"
        made = {"pairs": len(self.pairs), **self.recipe.summary()}
        return [save_adapter(path, self.control, self.base, self.base_control_name, made=made)]


class CtrLoRAFullObjective(FrugalObjective):
    """The whole latent-conditioned network trains: from the UNet's copy, or from a base control.

    (The second and third rows of the ablation in Xu et al. 2025, table 4.)
    """

    recipe: CtrLoRAFullRecipe
    control: BaseControl

    def __init__(self, recipe: CtrLoRAFullRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.encoded = self.cache.hints(self.control)
        self.settle()

    def build_control(self) -> BaseControl:
        start = self.recipe.control
        control = BaseControl.for_base(self.base) if start is None else load_base_control(start, self.base)
        control.condition = self.condition.name
        control.train_base()
        self.trained = nn.ModuleDict({"control": control})
        return control

    def hints(self, chosen: Tensor, flipped: Tensor) -> Tensor:
        return self.encoded.gather(chosen, flipped).float().to(self.device)

    def save(self, folder: Path) -> list[Path]:
        path = folder / f"{self.recipe.name}.safetensors"
        made = {"pairs": len(self.pairs), **self.recipe.summary()}
        return [save_base_control(path, self.control, self.base, made=made)]


class ControlNetPairsObjective(FrugalObjective):
    """A ControlNet; its hint network trains too, so condition images are read at every step."""

    recipe: ControlNetPairsRecipe
    control: ControlNet

    def __init__(self, recipe: ControlNetPairsRecipe, device: torch.device) -> None:
        super().__init__(recipe, device)
        self.settle()

    def build_control(self) -> ControlNet:
        control = controlnet_from(self.recipe.start, self.base, self.condition.name, self.recipe.seed)
        self.trained = nn.ModuleDict({"control": control})
        return control

    def hints(self, chosen: Tensor, flipped: Tensor) -> Tensor:
        sources = [
            self.pairs[index].side(SOURCE, self.base.size, mirrored)
            for index, mirrored in zip(chosen.tolist(), flipped.tolist(), strict=True)
        ]
        return self.control.encode(to_tensor(sources).to(self.device), self.base)

    def save(self, folder: Path) -> list[Path]:
        path = folder / f"{self.recipe.name}.safetensors"
        made = {"pairs": len(self.pairs), **self.recipe.summary()}
        return [save_control(path, self.control, self.base, made=made)]
