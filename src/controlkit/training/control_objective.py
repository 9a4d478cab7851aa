"""Training a control on a frozen base, whatever its system and wherever its data comes from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from controlkit.bases.load import load_base
from controlkit.bases.text import Text
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Control, takes_one_image, words_of_inputs
from controlkit.controls.hints import Hint
from controlkit.controls.registry import find
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.formats.load import load_control, save_control
from controlkit.training.memory import checkpoint_activations
from controlkit.training.objective import Objective
from controlkit.training.recipes import ControlRecipe


class ControlObjective(Objective):
    """The base's own loss under a control (Zhang et al. 2023, section 3.3).

    The base is frozen. Gradients pass through whatever of it lies behind the places where the control acts, and no
    other gradient is ever made.
    """

    recipe: ControlRecipe
    control: Control
    """What is trained, or holds what is."""

    def __init__(self, recipe: ControlRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        kind = recipe.control_class
        if not takes_one_image(kind):
            raise UserError(
                f"{kind.title} takes {words_of_inputs(kind)}; training from data of one condition image needs a control"
                " that takes one"
            )
        self.base = load_base(recipe.base, device=device)
        self.frozen = self.base.content
        self.control = self._build(kind)
        self.trained = nn.ModuleDict(self.control.trained_modules())

    def _build(self, kind: type[Control]) -> Control:
        """The control, made before anything is encoded, so that a file that does not do is told of at once."""
        recipe = self.recipe
        start = companion = None
        if (named := recipe.started_from) is not None:
            loaded = load_control(named, self.base)
            wanted = find(kind.companion or kind.kind)
            if not isinstance(loaded, wanted):
                hint = "; nano's is called nano/base" if kind.companion is not None else ""
                raise UserError(f"{named} is {loaded.title}, not {wanted.title}, which {kind.title} starts from{hint}")
            if kind.companion is not None:
                companion = loaded
                self.frozen = sha256_of(self.frozen, loaded.fingerprint())
            else:
                start = loaded
        name = getattr(recipe, "name", recipe.condition_names[0])
        return kind.for_training(
            self.base,
            recipe.condition_names,
            recipe.options,
            name=name,
            seed=recipe.seed,
            start=start,
            companion=companion,
        )

    def checkpoint(self) -> None:
        """Save memory at the cost of time, if the recipe says so."""
        if self.recipe.gradient_checkpointing:
            checkpoint_activations(self.base, self.control)

    def control_loss(
        self, control: Control, latents: Tensor, text: Text, hint: Hint, generator: torch.Generator
    ) -> Tensor:
        """The loss of this process's share of a step.

        Args:
            latents: `[B, C, h, w]`.
            text: of batch `B`.
            hint: of batch `B`.
            generator: of the noise and times of the whole batch.
        """
        drawn = self.noised(self.base.schedule, latents, generator)
        return self.diffusion_loss(drawn, predict_under(control, self.base, drawn.x_t, drawn.t, text, hint))

    def save(self, folder: Path) -> list[Path]:
        recipe = self.recipe
        made = {**self.facts(), **recipe.summary()}
        name = getattr(recipe, "name", recipe.condition_names[0])
        companion = None if recipe.started_from is None else Path(recipe.started_from).stem
        return [
            save_control(
                folder / f"{stem}.safetensors",
                control,
                self.base,
                companion=None if control.companion is None else (companion or "base"),
                made=made,
            )
            for stem, control in self.control.finished(name).items()
        ]

    def facts(self) -> dict[str, int]:
        """What else a file says about how it came to be."""
        return {}
