"""The objective of training a control of any system on a frozen base, with data from any source."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from controlkit.bases.load import load_base
from controlkit.bases.text import Text
from controlkit.controls.apply import predict_under
from controlkit.controls.control import (
    Control,
    encode_each,
    encode_images,
    takes_one_image,
    takes_values,
    words_of_inputs,
)
from controlkit.controls.registry import find
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.formats.load import find_control, load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.images import to_tensor
from controlkit.training.memory import CPUOffload, checkpoint_activations, store_frozen, uses_bf16
from controlkit.training.objective import Objective, numpy_generator
from controlkit.training.previews import preview_images, preview_settings, write_preview
from controlkit.training.processes import print_notes
from controlkit.training.recipe import ControlRecipe
from controlkit.training.sources.source import HeldOut, Source, Step

_STRIP = 8
"""Held-out samples in the image of a preview."""


class ControlObjective(Objective):
    """The base's diffusion loss under a control (Zhang et al. 2023, section 3.3).

    The base is frozen; gradients flow only through its part behind the injection sites.
    """

    recipe: ControlRecipe
    control: Control
    """The control that is trained, or that contains the trained modules."""

    def __init__(self, recipe: ControlRecipe, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        kind = recipe.control_class
        if not takes_one_image(kind) and not takes_values(kind, recipe.source.values):
            provided = " or ".join(("one condition image", *recipe.source.values))
            raise UserError(
                f"{kind.title} takes {words_of_inputs(kind)}; for training, {recipe.source.name} provides {provided}"
                " per sample; choose another source of data",
                "unsupported",
            )
        self.source: Source = recipe.source(recipe)
        self.base = load_base(recipe.base, device=device)
        self.base.check_text_to_image("training")
        self.frozen = self.base.content
        self.control = self._build(kind)
        self.trained = nn.ModuleDict(self.control.trained_modules())
        print_notes([*self.control.training_notes(recipe.learning_rate), *self.source.notes(self.base)])
        self.source.prepare(self.base, self.control)
        self.data = self.source.digest
        if recipe.gradient_checkpointing:
            checkpoint_activations(self.base, self.control)
        self.stores_bf16 = self.source.caches_encoders and uses_bf16(recipe, device)
        if self.stores_bf16:
            store_frozen(self.base, self.control)
        self.offload = CPUOffload(self.base) if self.source.caches_encoders else None

    def _build(self, kind: type[Control]) -> Control:
        """Build the control before anything is encoded, so that an unsuitable file fails at once."""
        recipe = self.recipe
        start = companion = None
        if (path := recipe.started_from) is not None:
            loaded = load_control(path, self.base)
            expected = find(kind.companion or kind.kind)
            if not isinstance(loaded, expected):
                hint = " (for nano: nano/base)" if kind.companion is not None else ""
                raise UserError(
                    f"cannot train {kind.title} from {path}: it is {loaded.title}; give {expected.title}{hint}",
                    "wrong-kind",
                )
            if kind.companion is not None:
                companion = loaded
                self.frozen = sha256_of(self.frozen, loaded.fingerprint())
            else:
                start = loaded
                if recipe.training.several and not recipe.training.one_file:
                    self._load_dependents(start, find_control(path).parent)
        return kind.for_training(
            self.base,
            recipe.condition_names,
            recipe.options,
            name=recipe.control_name,
            seed=recipe.seed,
            start=start,
            companion=companion,
        )

    def _load_dependents(self, start: Control, folder: Path) -> None:
        """Load the controls of the trained conditions in a folder that were trained on `start`."""
        fingerprint = start.fingerprint()
        found = []
        for name in self.recipe.condition_names:
            file = folder / f"{name}.safetensors"
            if file.is_file() and fingerprint in read_metadata(file).values():
                load_control(file, self.base, shared={fingerprint: start})
                found.append(name)
        new = [name for name in self.recipe.condition_names if name not in found]
        parts = [f"goes on with {', '.join(found)}"] if found else []
        parts += [f"begins {', '.join(new)} anew"] if new else []
        print_notes([f"this run {' and '.join(parts)}"])

    def condition_at(self, step: int) -> str:
        """The condition of a step: rounds of all conditions, each in random order, so that all are equally frequent.

        It is the same in every process, so that each condition gets the same number of optimiser steps.
        """
        names = self.recipe.condition_names
        order = numpy_generator(self.recipe.seed, step // len(names), 1).permutation(len(names))
        return names[order[step % len(names)]]

    def sampling_step(self, step: int) -> Step:
        """Seed, batch size and generator from which the batch of a step is sampled."""
        return Step(
            number=step,
            seed=self.recipe.seed,
            global_batch=self.global_batch,
            local_slice=self.local_slice,
            generator=self.torch_generator(step),
        )

    def loss(self, step: int) -> Tensor:
        condition, sampling = self.condition_at(step), self.sampling_step(step)
        batch = self.source.batch(condition, sampling)
        control = self.control.for_condition(condition)
        text = batch.text if isinstance(batch.text, Text) else self.base.encode_text(batch.text)
        hint = batch.hint
        if batch.inputs is not None:
            hint = encode_each(control, batch.inputs, self.base)
        if hint is None:
            assert batch.condition_images is not None  # a batch has one of the three
            hint = encode_images(control, batch.condition_images, self.base)
        noisy = self.noised(self.base.schedule, batch.latents, sampling.generator)
        return self.diffusion_loss(noisy, predict_under(control, self.base, noisy.x_t, noisy.t, text, hint))

    def samples(self, step: int) -> list[str]:
        condition = self.condition_at(step)
        return [f"{condition}: {name}" for name in self.source.samples(condition, self.sampling_step(step))]

    @torch.no_grad()
    def preview(self, step: int, folder: Path) -> dict[str, float]:
        on_device = nullcontext() if self.offload is None else self.offload.suspended()
        self.trained.eval()
        with on_device, torch.autocast(self.device.type, torch.bfloat16, enabled=self.stores_bf16):
            scores = self._preview(step, folder)
        self.trained.train()
        return scores

    def _preview(self, step: int, folder: Path) -> dict[str, float]:
        scores: dict[str, float] = {}
        rows: list[Sequence[Image.Image]] = []
        titles: list[str] = []
        names = self.recipe.condition_names
        sets = [self.source.held_out(name) for name in names]
        for name, held_out, following in zip(names, sets, [*sets[1:], None], strict=True):
            results = self._sample(name, held_out)
            of_images = self.source.scores(name, held_out, [np.asarray(image) for image in results])
            scores |= {f"{name}: {measure}": score for measure, score in of_images.items()}
            rows += [_strip(held_out.condition_images), results[:_STRIP]]
            titles += [name, f"result, {self.preview_settings['mode']}"]
            if following is None or following.targets is not held_out.targets:
                rows.append(_strip(held_out.targets))
                titles.append("target")
        write_preview(folder, step, rows, titles, scores, self.preview_settings)
        return scores

    def _sample(self, name: str, held_out: HeldOut) -> list[Image.Image]:
        """Images generated from held-out condition images with fixed seeds."""
        control = self.control.for_condition(name)
        if held_out.inputs is not None:
            hint = encode_each(control, held_out.inputs, self.base)
        else:
            hint = encode_images(control, to_tensor(held_out.condition_images).to(self.device), self.base)
        return preview_images(self.base, control, hint, held_out.prompts)

    @property
    def preview_settings(self) -> dict[str, Any]:
        return preview_settings(self.base, self.control.for_condition(self.recipe.condition_names[0]))

    def save(self, folder: Path) -> list[Path]:
        recipe = self.recipe
        metadata = {**self.source.facts(), **recipe.summary()}
        on_companion = recipe.control_class.companion is not None and recipe.started_from is not None
        companion = Path(recipe.started_from or "").stem if on_companion else "base"
        return [
            save_control(
                folder / f"{stem}.safetensors",
                control,
                self.base,
                companion=None if control.companion is None else companion,
                made=metadata,
            )
            for stem, control in self.control.finished(recipe.control_name).items()
        ]


def _strip(images: Sequence[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images[:_STRIP]]
