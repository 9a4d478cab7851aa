"""Training a control on a frozen base: what ControlNet's and CtrLoRA's objectives share."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Text
from controlkit.bases.load import load_base
from controlkit.bases.residuals import Residuals
from controlkit.conditions import Condition
from controlkit.controls.control import Control
from controlkit.data.icons import TRAINED_STYLES, IconSets, draw
from controlkit.images import contact_sheet, to_images, to_tensor, write_png
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.drawings import Drawings, weights_key
from controlkit.training.objective import Objective, numpy_generator, torch_generator
from controlkit.training.recipe import SteeringRecipe

_STRIP = 8
_PREVIEW_STEPS = 10


class SteeringObjective(Objective):
    """The base's own loss with a control's residuals; one condition a step (Zhang et al. 2023, section 3.3).

    The base is frozen and its encoder sees nothing that needs a gradient, so none is ever made for it; gradients
    pass through its decoder to the residuals only.
    """

    def __init__(self, recipe: SteeringRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.conditions = [conditions.find(name) for name in recipe.condition_names]
        self.base = load_base(recipe.base, device=device)
        self.scheduler = self.base.schedule()
        sets = IconSets(recipe.icons)
        self.drawings = Drawings(
            sets.select(styles=TRAINED_STYLES, held_out=False),
            recipe.variants,
            recipe.seed,
            path=Path(recipe.out) / "latents.safetensors",
            encode=lambda x: self.base.encode_picture(x.to(device)),
            key=weights_key(self.base.vae),
        )
        rng = np.random.default_rng(0)
        held_out = sets.select(styles=TRAINED_STYLES, held_out=True, drawable=True)
        chosen = rng.permutation(len(held_out))[: recipe.score_pictures]
        self.test = [draw(held_out[index], rng) for index in chosen]

    @abstractmethod
    def control_for(self, condition: Condition) -> Control:
        """The control that follows `condition`."""

    def condition_at(self, step: int) -> Condition:
        """The condition of a step: rounds of all of them, each round in random order, so each is as frequent."""
        count = len(self.conditions)
        order = numpy_generator(self.recipe.seed, step // count, 1).permutation(count)
        return self.conditions[order[step % count]]

    def residuals(self, condition: Condition, x_t: Tensor, t: Tensor, text: Text, images: Tensor) -> Residuals:
        """Residuals of the control that follows `condition`, for condition images `[B, 3, H, W]` in [0, 1]."""
        control = self.control_for(condition)
        return control(x_t, t, text, control.encode(images, self.base))

    def loss(self, step: int) -> Tensor:
        condition = self.condition_at(step)
        rng = numpy_generator(self.recipe.seed, step)
        chosen = [int(index) for index in rng.integers(len(self.drawings), size=self.recipe.batch_size)]
        z = self.drawings.latents[torch.tensor(chosen)].float().to(self.device)
        text = self.base.encode_text([self.drawings.prompt(index, rng, self.recipe.prompt_drop) for index in chosen])
        images = [condition(self.drawings.draw(i).image, **condition.random_parameters(rng)) for i in chosen]
        generator = torch_generator(self.recipe.seed, step)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(z),), generator=generator).to(self.device)
        x_t = self.scheduler.add_noise(z, noise, t)
        residuals = self.residuals(condition, x_t, t, text, to_tensor(images).to(self.device))
        prediction = self.base.predict(x_t, t, text, residuals)
        return (prediction.float() - training_target(self.scheduler, z, noise, t)).pow(2).mean()

    @torch.no_grad()
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        self.trained.eval()
        scores: dict[str, float] = {}
        rows, titles = [], []
        for condition in self.conditions:
            given, results, score = self._follow(condition)
            scores[f"{condition.name}: {condition.fidelity.name}"] = score
            rows += [[Image.fromarray(image) for image in given[:_STRIP]], results[:_STRIP]]
            titles += [condition.name, "result"]
        rows.append([Image.fromarray(drawing.image) for drawing in self.test[:_STRIP]])
        write_png(folder / f"{step:07d}.png", contact_sheet(rows, row_titles=[*titles, "truth"], cell=96))
        self.trained.train()
        return scores

    def _follow(self, condition: Condition) -> tuple[list[np.ndarray], list[Image.Image], float]:
        """Condition images of the held-out drawings, pictures under control from fixed seeds, and their score."""
        control = self.control_for(condition)
        given = [condition(drawing.image) for drawing in self.test]
        hint = control.encode(to_tensor(given).to(self.device), self.base)
        batches = sample_prompts(
            self.base,
            prompts=[drawing.caption for drawing in self.test],
            seeds=range(len(self.test)),
            uses=[ActiveControl(control, hint)],
            steps=_PREVIEW_STEPS,
        )
        results = [image for batch in batches for image in to_images(batch)]
        scores = [
            condition.score(image, np.asarray(result), drawing.image)
            for image, result, drawing in zip(given, results, self.test, strict=True)
        ]
        return given, results, float(np.mean(scores))


def training_target(scheduler: DDIMScheduler, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the base was trained to predict: the noise, the velocity or the latent itself."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(z, noise, t)
    return noise if kind == "epsilon" else z
