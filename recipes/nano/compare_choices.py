"""Design choices of nano's text encoder and UNet, trained for the same processor time and evaluated the same way.

    python recipes/nano/compare_choices.py --seconds 720
    python recipes/nano/compare_choices.py --seconds 720 --only as-it-is,8x8
    python recipes/nano/compare_choices.py --seconds 660 --start runs/nano/base/base --only as-it-is,concepts

After the autoencoder's recipe has run. One thread, so that several may run at once on as many cores. Everything is
`recipes/nano/base.yaml` but for what the choice changes:

- 8x8: latents of 8 x 8 x 16 (the same numbers, 2 x 2 in a pixel), UNet 64, 128, 192, transformers at all levels;
- wide, narrow: UNet 64, 128, 192 and 32, 64, 128;
- min-snr: the loss weighted by min(SNR, 5) / (SNR + 1) (Hang et al. 2023, for v);
- flow: times drawn as flow matching draws them (Lipman et al. 2023; the ratio of noise to signal is u / (1 - u));
- contrastive: first a seventh of the time on matching captions with EfficientNet-Lite0's features of their images;
- concepts-pooled: as concepts, the text also pooled into the embedding of the time, as diffusers' UNet can;
- larger: icons of three quarters of the image and more; concepts: the same, of `recipes/nano/concepts.txt` alone;
- batch-16, rate-1.6e-3: as they say.

Told for each: steps; the mean squared error of v at four times of 1,000 on 256 fixed drawings of the choice's own kind;
by how many percent it rises when the caption names another concept, which is what the text is worth; and whether the
concept is among the five nearest of 50 (as in `controlkit evaluate base`; 200 images here, of `concepts.txt`). With
`--start`, the rate falls to nothing over the last third. The tables in docs/nano.md were made when the features had
ImageNet's mean and deviation as input.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional

from controlkit.bases.load import load_base
from controlkit.evaluation.features import lite0_features
from controlkit.evaluation.metrics import retrieval_accuracy
from controlkit.evaluation.sampling import generate_uncontrolled
from controlkit.files import write_json
from controlkit.nano.base_objective import BaseObjective
from controlkit.nano.icons import TRAINED_STYLES, IconSets, caption_of, draw, read_concepts
from controlkit.nano.recipes import BaseRecipe
from controlkit.training.recipes import read_recipe

CONCEPTS = "recipes/nano/concepts.txt"
TIMES = (400, 600, 750, 900)
_JUDGED = 256
_EMA = 0.995


@dataclasses.dataclass(frozen=True)
class Choice:
    """What differs from the recipe."""

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the recipe."""
    times: str = "uniform"
    """How times are drawn: `uniform` or `flow`."""
    weighting: str = "v"
    """How the squared error of v is weighted: `v` (not at all) or `min-snr`."""
    eight: bool = False
    """Latents of 8 x 8 x 16."""
    contrastive: bool = False
    """Captions are matched with images first."""
    pooled: bool = False
    """The text is pooled into the embedding of the time too."""


CHOICES = {
    "as-it-is": Choice(),
    "8x8": Choice({"channels": (64, 128, 192), "attention": (True, True, True)}, eight=True),
    "wide": Choice({"channels": (64, 128, 192)}),
    "narrow": Choice({"channels": (32, 64, 128)}),
    "min-snr": Choice(weighting="min-snr"),
    "flow": Choice(times="flow"),
    "contrastive": Choice(contrastive=True),
    "larger": Choice({"least_scale": 0.75}),
    "concepts": Choice({"least_scale": 0.75, "concepts": CONCEPTS}),
    "concepts-pooled": Choice({"least_scale": 0.75, "concepts": CONCEPTS}, pooled=True),
    "concepts-flow": Choice({"least_scale": 0.75, "concepts": CONCEPTS}, times="flow"),
    "concepts-rate-1.6e-3": Choice({"least_scale": 0.75, "concepts": CONCEPTS, "learning_rate": 1.6e-3}),
    "concepts-batch-16": Choice({"least_scale": 0.75, "concepts": CONCEPTS, "batch_size": 16}),
    "batch-16": Choice({"batch_size": 16}),
    "rate-1.6e-3": Choice({"learning_rate": 1.6e-3}),
}


class Trial(BaseObjective):
    """A base in training under one choice."""

    def __init__(self, recipe: BaseRecipe, choice: Choice) -> None:
        super().__init__(recipe, torch.device("cpu"))
        self.choice = choice
        self.latents = self.drawings.latents.float()
        if choice.eight:
            self.latents = functional.pixel_unshuffle(self.latents, 2)
            config = dict(self.trained["unet"].config)
            config.update(sample_size=8, in_channels=self.latents.shape[1], out_channels=self.latents.shape[1])
            torch.manual_seed(recipe.seed)
            self.trained["unet"] = UNet2DConditionModel.from_config(config)
        if choice.pooled:
            config = dict(self.trained["unet"].config)
            config.update(addition_embed_type="text", addition_embed_type_num_heads=8)
            torch.manual_seed(recipe.seed)
            self.trained["unet"] = unet = UNet2DConditionModel.from_config(config)
            nn.init.constant_(unet.add_embedding.norm2.weight, 0.1)  # a UNet that knew the time alone goes on with it
        self.snr = self.schedule.snr(torch.arange(self.schedule.length))

    def errors(self, z: Tensor, prompts: list[str], t: Tensor, noise: Tensor) -> Tensor:
        """The mean squared error of v of each sample, `[B]`."""
        x_t, v = self.schedule.add_noise(z, noise, t), self.schedule.target(z, noise, t)
        made = self.trained["unet"](x_t, t, encoder_hidden_states=self._text(prompts)).sample
        return (made - v).pow(2).mean((1, 2, 3))

    def loss(self, step: int) -> Tensor:
        chosen, prompts = self._draw(step)
        z, generator = self.latents[torch.from_numpy(chosen)], self.torch_generator(step)
        noise = torch.randn(z.shape, generator=generator)
        if self.choice.times == "flow":
            u = torch.rand(len(z), generator=generator).clamp_min(1e-4)
            t = torch.searchsorted(-self.snr, -(((1 - u) / u) ** 2)).clamp(max=len(self.snr) - 1)
        else:
            t = torch.randint(len(self.snr), (len(z),), generator=generator)
        errors = self.errors(z, prompts, t, noise)
        if self.choice.weighting == "min-snr":
            weights = self.snr[t].clamp(max=5) / (self.snr[t] + 1)
            errors = errors * weights / (self.snr.clamp(max=5) / (self.snr + 1)).mean()
        return errors.mean()

    @torch.no_grad()
    def judge(self) -> dict[int, tuple[float, float]]:
        """Time => (error, by how many percent it rises under a caption of another concept)."""
        rng = np.random.default_rng(123)
        chosen = rng.integers(len(self.drawings), size=_JUDGED)
        icons = [self.drawings.icons[index // self.drawings.variants] for index in chosen]
        colours = [self.drawings.colours[index] for index in chosen]
        right, wrong = (
            [
                caption_of(icons[(k + shift) % _JUDGED].concept, icons[k].style, colours[k])  # another, in its style
                for k in range(_JUDGED)
            ]
            for shift in (0, 7)
        )
        z = self.latents[torch.from_numpy(chosen)]
        noise = torch.randn(self.drawings.latents[: len(z)].shape, generator=torch.Generator().manual_seed(5))
        noise = functional.pixel_unshuffle(noise, 2) if self.choice.eight else noise
        told = {}
        for t in TIMES:
            own, other = (
                torch.cat(
                    [
                        self.errors(z[k : k + 64], captions[k : k + 64], torch.full((64,), t), noise[k : k + 64])
                        for k in range(0, _JUDGED, 64)
                    ]
                ).mean()
                for captions in (right, wrong)
            )
            told[t] = (own.item(), (100 * (other - own) / own).item())
        return told

    def retrieve(self, icons: str) -> float | None:
        """Share of 200 images whose concept is among the five nearest of 50; None for latents of another shape."""
        if self.choice.eight:
            return None
        names = sorted(read_concepts(CONCEPTS))
        names = [names[index] for index in np.random.default_rng(5).permutation(len(names))[:50]]
        found = IconSets(icons).select(styles=TRAINED_STYLES, concepts=names)
        rng = np.random.default_rng(6)
        drawings = [draw(icon, rng, least_scale=self.recipe.least_scale) for icon in found]
        gallery = lite0_features([drawing.image for drawing in drawings])
        made = lite0_features(generate_uncontrolled(self._base(), [drawing.caption for drawing in drawings], 20, 3.0))
        concepts = [drawing.concept for drawing in drawings]
        return retrieval_accuracy(made, concepts, gallery, concepts)


def match_captions(trial: Trial, seconds: float) -> None:
    """Train the text encoder to match captions with features of their images (Radford et al. 2021) for some time."""
    started, icons = time.process_time(), trial.drawings.icons
    images = [draw(icon, np.random.default_rng(1), colour="white").image for icon in icons]
    features = lite0_features(images)
    features = functional.normalize(features - features.mean(0), dim=1)
    width = trial.trained["text_encoder"].config.hidden_size
    heads = nn.ModuleList([nn.Linear(width, 256, bias=False), nn.Linear(features.shape[1], 256, bias=False)])
    parameters = [*trial.trained["text_encoder"].parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    rng, order = np.random.default_rng(3), torch.arange(128)
    while time.process_time() - started < seconds:
        chosen = rng.integers(len(icons), size=len(order))
        words = trial._text([caption_of(icons[k].concept, icons[k].style) for k in chosen]).mean(1)
        both = functional.normalize(heads[0](words), dim=1) @ functional.normalize(heads[1](features[chosen]), dim=1).T
        loss = functional.cross_entropy(14 * both, order) + functional.cross_entropy(14 * both.T, order)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def train(trial: Trial, seconds: float, falls: bool) -> int:
    """Train for `seconds` of processor time; leaves the averaged weights in place and returns the steps."""
    started = time.process_time()
    if trial.choice.contrastive:
        match_captions(trial, seconds / 7)
    recipe, parameters = trial.recipe, trial.parameters()
    optimiser = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    average = EMAModel(parameters, decay=_EMA)
    step = 0
    while (left := 1 - (time.process_time() - started) / seconds) > 0:
        rate = recipe.learning_rate * min(1.0, (step + 1) / 100)
        for group in optimiser.param_groups:
            group["lr"] = rate * max(0.03, min(1.0, 3 * left)) if falls else rate
        loss = trial.loss(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average.step(parameters)
        step += 1
    average.copy_to(parameters)
    return step


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and judge one choice."""
    choice = CHOICES[name]
    recipe = read_recipe("recipes/nano/base.yaml")
    recipe = dataclasses.replace(recipe, **choice.settings)  # type: ignore[arg-type]
    # Choices with the same drawings share their latents.
    drawings = f"drawings-{recipe.least_scale}-{Path(recipe.concepts or 'all').stem}"
    trial = Trial(dataclasses.replace(recipe, out=str(Path(args.out) / drawings)), choice)  # type: ignore[arg-type]
    if args.start:
        start = load_base(args.start)
        for part in ("text_encoder", "unet"):
            trial.trained[part].load_state_dict(getattr(start, part).state_dict(), strict=not choice.pooled)
    trial.trained.train().requires_grad_(True)
    steps = train(trial, args.seconds, falls=bool(args.start))
    trial.trained.eval()
    return {
        "choice": name,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in trial.trained["unet"].parameters()),
        "judged": trial.judge(),
        "top5": trial.retrieve(trial.recipe.icons),
    }


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    pairs = result["judged"].values()
    errors, rises = (" ".join(form(pair[k]) for pair in pairs) for k, form in enumerate(_FORMS))
    top5 = "" if result["top5"] is None else f"{result['top5']:.2f}"
    return f"| {result['choice']} | {result['steps']} | {errors} | {rises} | {top5} |"


_FORMS: tuple[Callable[[float], str], Callable[[float], str]] = ("{:.3f}".format, "{:.1f}".format)


def main() -> None:
    """Train every choice that is asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=720.0, help="of processor time, for each")
    parser.add_argument("--only", default=None, help="choices, separated by commas; all if it is left out")
    parser.add_argument("--start", default=None, metavar="BASE", help="go on from this base, not from scratch")
    parser.add_argument("--out", default="runs/nano/choices", help="folder of the results")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(CHOICES)
    unknown = sorted(set(names) - set(CHOICES))
    if unknown:
        parser.error(f"there is no choice called {', '.join(unknown)}; there are {', '.join(CHOICES)}")
    torch.set_num_threads(1)
    rows = []
    for name in names:
        result = run(name, args)
        write_json(Path(args.out) / f"{name}.json", {**result, "seconds": args.seconds, "start": args.start})
        rows.append(line(result))
        print(rows[-1], flush=True)
    times = ", ".join(map(str, TIMES))
    print(f"\n| choice | steps | error at {times} | rise, % | top-5 |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
