"""Training a control on a folder of pairs: what does not change is computed once."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base, Text, concatenate
from controlkit.bases.load import load_base
from controlkit.controls.control import Control
from controlkit.data.pairs import Pair, pairs_folder, read_pairs, split_pairs
from controlkit.files import sha256_of, write_atomically
from controlkit.images import contact_sheet, to_images, to_tensor, write_png
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample_prompts
from controlkit.training.diffusion import noised
from controlkit.training.drawings import weights_key
from controlkit.training.objective import Objective
from controlkit.training.recipe import PairsRecipe

_BATCH = 32
_STRIP = 8


class PairsObjective(Objective):
    """The base's own loss with a control's residuals, on pairs; the base is frozen.

    Latents of pictures, embeddings of prompts and of the empty prompt, and hints that no trained weight makes come
    from a cache in the pairs' folder, keyed by their content; neither autoencoder nor text encoder runs in a step.
    """

    control: Control
    """What is trained, or holds what is."""
    recipe: PairsRecipe

    def __init__(self, recipe: PairsRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.condition = conditions.find(recipe.condition)
        self.pairs, self.held_out = split_pairs(read_pairs(recipe.pairs, recipe.condition), recipe.held_out)
        self.base = load_base(recipe.base, device=device)
        self.scheduler = self.base.schedule()
        self.cache = PairCache(pairs_folder(recipe.pairs) / ".controlkit", self.base, self.pairs)
        self.latents = self.cache.latents()
        self.texts, self.prompt_of, self.empty = self.cache.texts()

    @abstractmethod
    def hints(self, chosen: Tensor) -> Tensor:
        """Hints of the pairs whose indices are `chosen` `[B]`, on the device."""

    def loss(self, step: int) -> Tensor:
        generator = self.torch_generator(step)
        chosen = torch.from_numpy(self.numpy_generator(step).integers(len(self.latents), size=self.whole))[self.share]
        z = self.latents[chosen].float().to(self.device)
        dropped = torch.rand(self.whole, generator=generator)[self.share] < self.recipe.prompt_drop
        prompts = torch.where(dropped, self.empty, self.prompt_of[chosen])
        text = self.texts.map(lambda part: part[prompts].to(self.device))
        drawn = noised(self.scheduler, z, generator, self.whole, self.share)
        residuals = self.control(drawn.x_t, drawn.t, text, self.hints(chosen))
        return drawn.loss(self.base.predict(drawn.x_t, drawn.t, text, residuals))

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


class PairCache:
    """What frozen networks make of the pairs, one file for each kind of it; latents and hints in fp16.

    Args:
        folder: where the files are kept.
    """

    def __init__(self, folder: Path, base: Base, pairs: Sequence[Pair]) -> None:
        self.folder = folder
        self.base = base
        self.pairs = pairs
        self._vae_key = weights_key(base.vae)
        self._content = sha256_of(*(pair.key() for pair in pairs))

    def latents(self) -> Tensor:
        """Scaled latents of the pictures `[N, C, h, w]`."""
        return self._images("latents", 1, lambda x: self.base.encode_picture(x * 2 - 1))

    def hints(self, control: Control) -> Tensor:
        """Hints of a control whose `encode` has no weights but the base's autoencoder's."""
        return self._images("hints", 0, lambda x: control.encode(x, self.base))

    def texts(self) -> tuple[Text, Tensor, int]:
        """All distinct prompts, embedded; the index of each pair's `[N]`, and that of the empty prompt."""
        prompts = sorted({pair.prompt for pair in self.pairs} | {""})
        position = {prompt: index for index, prompt in enumerate(prompts)}
        key = sha256_of(*(weights_key(network) for network in self.base.text_encoders), str(self.base.dtype), *prompts)

        def embed() -> dict[str, Tensor]:
            groups = [prompts[first : first + _BATCH] for first in range(0, len(prompts), _BATCH)]
            text = concatenate(*(self.base.encode_text(group) for group in groups))
            return {name: part for name, part in vars(text).items() if part is not None}

        made = self._kept("texts", key, f"embedding {len(prompts)} prompts", embed)
        return Text(**made), torch.tensor([position[pair.prompt] for pair in self.pairs]), position[""]

    def _images(self, kind: str, side: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
        key = sha256_of(self._vae_key, str(self.base.size), self._content)

        def run() -> dict[str, Tensor]:
            made = []
            for first in range(0, len(self.pairs), _BATCH):
                images = [pair.images(self.base.size)[side] for pair in self.pairs[first : first + _BATCH]]
                made.append(encode(to_tensor(images).to(self.base.device)).to("cpu", torch.float16))
            return {kind: torch.cat(made)}

        return self._kept(kind, key, f"encoding {len(self.pairs)} pairs ({kind})", run)[kind]

    def _kept(self, kind: str, key: str, what: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self.folder / f"{kind}-{key[:16]}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        print(f"{what} once, kept in {path}", file=sys.stderr, flush=True)
        with torch.no_grad():
            tensors = {name: part.cpu().contiguous() for name, part in make().items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {"key": key}))
        return tensors
