"""The objective of a control on a frozen base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor, nn

from controlkit import conditions
from controlkit.bases.load import load_base
from controlkit.checkpoints.controls import save_control
from controlkit.controls.controlnet import ControlNet
from controlkit.data.icons import IconSets, draw
from controlkit.images import contact_sheet, to_images, to_tensor, write_png
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.base import TRAINED_STYLES
from controlkit.training.drawings import Drawings, weights_key
from controlkit.training.objective import Objective, numpy_generator, torch_generator
from controlkit.training.recipe import ControlNetRecipe

_STRIP = 8


class ControlObjective(Objective):
    """ControlNet's training (Zhang et al. 2023, section 3.3) with the base's own parametrisation.

    The base is frozen and its encoder sees nothing that needs a gradient, so none is ever made for it; gradients
    pass through its decoder to the residuals only.
    """

    def __init__(self, recipe: ControlNetRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.condition = conditions.find(recipe.condition)
        self.base = load_base(recipe.base, device=device)
        self.scheduler = self.base.schedule()
        torch.manual_seed(recipe.seed)
        self.control = ControlNet.for_base(self.base, self.condition.name).train()
        self.trained = nn.ModuleDict({"control": self.control})
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
        self.test_conditions = [self.condition(drawing.image) for drawing in self.test]

    def loss(self, step: int) -> Tensor:
        rng = numpy_generator(self.recipe.seed, step)
        chosen = [int(index) for index in rng.integers(len(self.drawings), size=self.recipe.batch_size)]
        z = self.drawings.latents[torch.tensor(chosen)].float().to(self.device)
        text = self.base.encode_text([self.drawings.prompt(index, rng, self.recipe.prompt_drop) for index in chosen])
        images = to_tensor(
            [self.condition(self.drawings.draw(i).image, **self.condition.random_parameters(rng)) for i in chosen]
        ).to(self.device)
        generator = torch_generator(self.recipe.seed, step)
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(z),), generator=generator).to(self.device)
        x_t = self.scheduler.add_noise(z, noise, t)
        residuals = self.control(x_t, t, text, self.control.encode(images, self.base))
        prediction = self.base.predict(x_t, t, text, residuals)
        return (prediction.float() - training_target(self.scheduler, z, noise, t)).pow(2).mean()

    @torch.no_grad()
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        self.control.eval()
        hint = self.control.encode(to_tensor(self.test_conditions).to(self.device), self.base)
        batches = sample_prompts(
            self.base,
            prompts=[drawing.caption for drawing in self.test],
            seeds=range(len(self.test)),
            uses=[ActiveControl(self.control, hint)],
            steps=10,
        )
        pictures = [image for batch in batches for image in to_images(batch)]
        scores = [
            self.condition.score(given, np.asarray(result), drawing.image)
            for given, result, drawing in zip(self.test_conditions, pictures, self.test, strict=True)
        ]
        rows = [
            [Image.fromarray(image) for image in self.test_conditions[:_STRIP]],
            pictures[:_STRIP],
            [Image.fromarray(drawing.image) for drawing in self.test[:_STRIP]],
        ]
        write_png(folder / f"{step:07d}.png", contact_sheet(rows, row_titles=("given", "result", "truth"), cell=96))
        self.control.train()
        return {self.condition.fidelity.name: float(np.mean(scores))}

    def save(self, folder: Path) -> list[Path]:
        made = {"steps": self.recipe.steps, "batch_size": self.recipe.batch_size, "seed": self.recipe.seed}
        return [save_control(folder / f"{self.condition.name}.safetensors", self.control, self.base, made=made)]


def training_target(scheduler: DDIMScheduler, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the base was trained to predict: the noise, the velocity or the latent itself."""
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(z, noise, t)
    return noise if kind == "epsilon" else z
