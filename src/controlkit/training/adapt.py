"""The objective of a CtrLoRA adapter: a new condition from about a thousand pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from controlkit import conditions
from controlkit.bases.base import Text
from controlkit.bases.load import load_base
from controlkit.checkpoints.controls import load_control
from controlkit.checkpoints.ctrlora import save_adapter
from controlkit.controls.base_control import BaseControl
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.data.pairs import Pair, read_pairs, split_pairs
from controlkit.errors import UserError
from controlkit.files import sha256_of, write_atomically
from controlkit.images import contact_sheet, to_images, to_tensor, write_png
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.drawings import weights_key
from controlkit.training.objective import Objective, numpy_generator, torch_generator
from controlkit.training.recipe import AdaptRecipe
from controlkit.training.steering import training_target

_BATCH = 32
_STRIP = 8


class AdaptObjective(Objective):
    """Only the adapter trains (Xu et al. 2025, section 3.3); what does not change is computed once.

    Latents of picture and condition and the embeddings of the prompts and of the empty prompt come from a cache
    keyed by their content; neither autoencoder nor text encoder runs in a step, and no frozen weight gets a gradient.
    """

    def __init__(self, recipe: AdaptRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.condition = conditions.find(recipe.condition)
        pairs, self.held_out = split_pairs(read_pairs(recipe.pairs), recipe.held_out)
        self.base = load_base(recipe.base, device=device)
        base_control = load_control(recipe.control, self.base)
        if not isinstance(base_control, BaseControl):
            raise UserError(f"{recipe.control} is a {base_control.kind}, not a base control that adapters are made on")
        self.scheduler = self.base.schedule()
        adapter = base_control.add_adapter(recipe.name, recipe.rank, seed=recipe.seed)
        base_control.train_adapter(recipe.name)
        self.control = CtrLoRA(base_control, recipe.name, self.condition.name)
        self.trained = nn.ModuleDict({"adapter": adapter})
        self.latents, self.hints = self._encode(pairs)
        prompts = sorted({pair.prompt for pair in pairs} | {""})
        self.tokens = torch.cat([self.base.encode_text([prompt]).tokens for prompt in prompts])
        self.empty = prompts.index("")
        self.prompt_of = torch.tensor([prompts.index(pair.prompt) for pair in pairs])

    def loss(self, step: int) -> Tensor:
        generator = torch_generator(self.recipe.seed, step)
        chosen = torch.from_numpy(
            numpy_generator(self.recipe.seed, step).integers(len(self.latents), size=self.recipe.batch_size)
        )
        z = self.latents[chosen].float().to(self.device)
        hint = self.hints[chosen].float().to(self.device)
        dropped = torch.rand(len(chosen), generator=generator) < self.recipe.prompt_drop
        text = Text(self.tokens[torch.where(dropped, self.empty, self.prompt_of[chosen])])
        noise = torch.randn(z.shape, generator=generator).to(self.device)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(z),), generator=generator).to(self.device)
        x_t = self.scheduler.add_noise(z, noise, t)
        prediction = self.base.predict(x_t, t, text, self.control(None, t, text, hint))
        return (prediction.float() - training_target(self.scheduler, z, noise, t)).pow(2).mean()

    @torch.no_grad()
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        pairs = self.held_out[: self.recipe.score_pictures]
        images = [pair.images(self.base.size) for pair in pairs]
        given, truths = [source for source, _ in images], [target for _, target in images]
        hint = self.control.encode(to_tensor(given).to(self.device), self.base)
        batches = sample_prompts(
            self.base,
            prompts=[pair.prompt for pair in pairs],
            seeds=range(len(pairs)),
            uses=[ActiveControl(self.control, hint)],
            steps=10,
        )
        results = [image for batch in batches for image in to_images(batch)]
        scores = [self.condition.score(g, np.asarray(r), t) for g, r, t in zip(given, results, truths, strict=True)]
        rows = [
            [Image.fromarray(image) for image in given[:_STRIP]],
            results[:_STRIP],
            [Image.fromarray(image) for image in truths[:_STRIP]],
        ]
        write_png(folder / f"{step:07d}.png", contact_sheet(rows, row_titles=("given", "result", "truth"), cell=96))
        return {self.condition.fidelity.name: float(np.mean(scores))}

    def save(self, folder: Path) -> list[Path]:
        path = folder / f"{self.recipe.name}.safetensors"
        made = {"pairs": len(self.latents), **self.recipe.summary()}
        return [save_adapter(path, self.control, self.base, Path(self.recipe.control).stem, made=made)]

    def _encode(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Latents of pictures and of condition images `[N, C, h, w]` in fp16, from the cache if it fits."""
        key = sha256_of(weights_key(self.base.vae), str(self.base.size), *(pair.key() for pair in pairs))
        path = Path(self.recipe.pairs) / ".controlkit" / f"latents-{key[:16]}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return file.get_tensor("latents"), file.get_tensor("hints")
        print(f"encoding {len(pairs)} pairs once, kept in {path}", file=sys.stderr, flush=True)
        latents, hints = [], []
        for first in range(0, len(pairs), _BATCH):
            images = [pair.images(self.base.size) for pair in pairs[first : first + _BATCH]]
            x = to_tensor([target for _, target in images]).to(self.device) * 2 - 1
            latents.append(self.base.encode_picture(x).half().cpu())
            hints.append(self.control.encode(to_tensor([source for source, _ in images]), self.base).half().cpu())
        tensors = {"latents": torch.cat(latents), "hints": torch.cat(hints)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {"key": key}))
        return tensors["latents"], tensors["hints"]
