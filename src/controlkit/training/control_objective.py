"""The objective of training a control of any system on a frozen base, with data from any source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from controlkit.bases.load import load_base
from controlkit.bases.text import Text, TokenizedPrompts
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Acts, Control
from controlkit.controls.hints import Hint, dropped, float_hint, map_hint, without
from controlkit.controls.inputs import encode_each, encode_images, takes_one_image, takes_values, words_of_inputs
from controlkit.controls.registry import find
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.formats.load import find_control, load_control, save_control, shipped_controls
from controlkit.formats.metadata import read_metadata
from controlkit.images import to_tensor
from controlkit.training.diffusion import Draw
from controlkit.training.graphs import Graphs
from controlkit.training.memory import CPUOffload, checkpoint_activations, store_frozen
from controlkit.training.objective import Objective, numpy_generator, torch_generator
from controlkit.training.precision import uses_bf16
from controlkit.training.previews import preview_images, preview_settings, write_preview
from controlkit.training.processes import print_notes
from controlkit.training.recipe import ControlRecipe
from controlkit.training.sources.source import Batch, HeldOut, Source, Step

_CONDITIONS, _DROPOUT = 21, 22
"""Purposes of random numbers: dropped conditions, and dropout within networks."""
_STRIP = 8
"""Held-out samples in the image of a preview."""


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What a step of training a control needs and no network computes."""

    condition: str
    batch: Batch
    kept: Tensor | None
    """Conditions that training does not drop (`ControlObjective._kept`)."""
    ids: tuple[Tensor, ...]
    """Token ids of the prompts, of each tokenizer; none if the batch has embeddings."""
    drawn: Draw


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
        fits = takes_one_image(kind) or takes_values(kind, recipe.source.values) or recipe.training.together
        if not fits:
            provided = " or ".join(("one condition image", *recipe.source.values))
            raise UserError(
                f"{kind.title} takes {words_of_inputs(kind)}; for training, {recipe.source.name} provides {provided}"
                " per sample; choose another source of data",
                "unsupported",
            )
        self.source: Source = recipe.source(recipe)
        # The denoiser, by far the largest network, is not needed before the steps: it is cast on its way to the device.
        self.base = load_base(recipe.base, device=device, denoiser_aside=True)
        self.base.check_text_to_image("training")
        self.frozen, self.frozen_before = self.base.content, self.base.former_content
        self.control = self._build(kind)
        if encoder := self.control.frozen_encoder():
            self.frozen = sha256_of(self.frozen, encoder)
        self.trained = nn.ModuleDict(self.control.trained_modules())
        self.has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.trained.modules())
        print_notes([*self.control.training_notes(recipe.learning_rate), *self.source.notes(self.base)])
        self.source.prepare(self.base, self.control)
        self.data, self.held_out_data = self.source.digest, self.source.held_out_digest
        if recipe.gradient_checkpointing:
            checkpoint_activations(self.base, self.control)
        # Autocast rounds them in every step, also those of encoders that run in it.
        self.stores_bf16 = uses_bf16(recipe, device)
        if self.stores_bf16:
            store_frozen(self.base, self.control)
        self.offload = CPUOffload(self.base, self.source.embedded) if self.source.caches_encoders else None
        self.base.place_denoiser()
        self.not_ahead = "" if self.source.prepares_ahead else f"the source {self.source.name} prepares no data ahead"
        self.graphs = Graphs(
            recipe.graphs, device, bf16=uses_bf16(recipe, device), unsuitable=_no_graph(recipe, self.control)
        )
        self._predict = self.graphs.base(self.base)

    def _build(self, kind: type[Control]) -> Control:
        """Build the control before anything is encoded, so that an unsuitable file fails at once."""
        recipe = self.recipe
        start = companion = None
        notes: list[str] = []
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
                used = loaded.fingerprint()
                self.frozen, self.frozen_before = sha256_of(self.frozen, used), sha256_of(self.frozen_before, used)
            else:
                start = loaded
                if recipe.training.several and not recipe.training.one_file:
                    notes = self._load_dependents(start, find_control(path))
        control = kind.for_training(
            self.base,
            recipe.condition_names,
            recipe.options,
            name=recipe.control_name,
            seed=recipe.seed,
            start=start,
            companion=companion,
        )
        print_notes(notes)
        return control

    def _load_dependents(self, start: Control, path: Path) -> list[str]:
        """Load the controls of the trained conditions beside the file of `start` that were trained on it; notes."""
        fingerprint = start.fingerprint()
        ships = path in shipped_controls().values()
        found = []
        for name in self.recipe.condition_names:
            file = path.parent / f"{name}.safetensors"
            if not file.is_file() or fingerprint not in read_metadata(file).values():
                continue
            # Users can move their own files to begin anew, but not those of the package.
            if ships and load_control(file, self.base).is_trained_alone():
                continue
            load_control(file, self.base, shared={fingerprint: start})
            found.append(name)
        new = [name for name in self.recipe.condition_names if name not in found]
        parts = [f"goes on with {', '.join(found)}"] if found else []
        parts += [f"begins {', '.join(new)} anew"] if new else []
        return [f"this run {' and '.join(parts)}"]

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

    @property
    def base_runs(self) -> str:
        return self.graphs.words

    def prepare(self, step: int) -> _Prepared:
        condition, sampling = self.condition_at(step), self.sampling_step(step)
        if self.recipe.training.together:
            others = [name for name in self.recipe.condition_names if name != condition]
            batch = self.source.batch_together([condition, *others], sampling)
        else:
            batch = self.source.batch(condition, sampling)
        side = self.base.size // self.base.factor
        shape = (self.base.latent_channels, side, side) if batch.latents is None else batch.latents.shape[1:]
        return _Prepared(
            condition=condition,
            batch=batch,
            kept=self._kept(batch, sampling),
            ids=() if isinstance(batch.text, Text) else self.base.tokenize(batch.text),
            drawn=self.draw(self.base.schedule, shape, sampling.generator),
        )

    def loss(self, step: int) -> Tensor:
        made: _Prepared = self.prepared(step, self.device)
        together = self.recipe.training.together
        control = self.control if together else self.control.for_condition(made.condition)
        noisy = self.noised(self.base.schedule, self._latents(made.batch), made.drawn)
        (text,) = self.base.fitted(self._text(made))
        hint = self._hint(control, made)
        if self.has_dropout:
            # Each process has other samples, and so other masks.
            torch.manual_seed(torch_generator(self.recipe.seed, step, _DROPOUT).initial_seed() + self.process)
        return self.diffusion_loss(
            noisy, predict_under(control, self.base, noisy.x_t, noisy.t, text, hint, self._predict)
        )

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents.float()
        assert batch.images is not None  # a batch has one of the two
        return self.base.encode_image(batch.images.float() / 255 * 2 - 1).float()

    def _text(self, made: _Prepared) -> Text:
        if isinstance(made.batch.text, Text):
            return made.batch.text
        return self.base.encode_text(TokenizedPrompts(made.batch.text, self.base.tokenizers, made.ids))

    def _hint(self, control: Control, made: _Prepared) -> Hint:
        """The hint of a batch, without the conditions that training drops."""
        batch, kept = made.batch, made.kept
        if batch.inputs is not None:
            return encode_each(control, batch.inputs, self.base)
        images, hint = batch.condition_images, batch.hint
        if isinstance(images, Mapping):
            given = {name: each.float() / 255 if each.dtype == torch.uint8 else each for name, each in images.items()}
            return control.encode(given if kept is None else dropped(given, kept), self.base)
        if hint is None:
            assert images is not None  # a batch has one of the three
            if kept is not None and not control.hint_is_frozen:
                images = without(images, kept[:, 0])
            hint = encode_images(control, images, self.base)
        hint = float_hint(hint)
        if kept is None or not control.hint_is_frozen:
            return hint
        return map_hint(hint, lambda tensor: without(tensor, kept[:, 0]))

    def _kept(self, batch: Batch, sampling: Step) -> Tensor | None:
        """Which conditions of which samples training keeps, `bool [B, conditions]`; None for all."""
        if (drop := self.control.condition_drop) is None:
            return None
        images = batch.condition_images
        count = len(images) if isinstance(images, Mapping) else 1
        return drop.kept(sampling.rng(_CONDITIONS), sampling.global_batch, count)[sampling.local_slice]

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

    def merits(self, scores: Mapping[str, float]) -> list[float] | None:
        """The score of each condition, with the sign of distances changed."""
        found = []
        for name in self.recipe.condition_names:
            measure = self.source.measure(name)
            if measure is None or (score := scores.get(f"{name}: {measure.name}")) is None:
                return None
            found.append(score if measure.higher_is_better else -score)
        return found

    @property
    def has_merits(self) -> bool:
        return all(self.source.measure(name) is not None for name in self.recipe.condition_names)

    def _sample(self, name: str, held_out: HeldOut) -> list[Image.Image]:
        """Images generated from held-out condition images with fixed seeds."""
        control = self.control.for_condition(name)
        if held_out.inputs is not None:
            hint = encode_each(control, held_out.inputs, self.base)
        else:
            hint = encode_images(control, to_tensor(held_out.condition_images).to(self.device), self.base)
        encode_text = None if self.offload is None else self.offload.encode_text
        return preview_images(self.base, control, hint, held_out.prompts, encode_text)

    @property
    def preview_settings(self) -> dict[str, Any]:
        return preview_settings(self.base, self.control.for_condition(self.recipe.condition_names[0]))

    def save(self, folder: Path, step: int) -> list[Path]:
        recipe = self.recipe
        metadata = {**self.source.facts(), **recipe.summary(), "steps": step}
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


def _no_graph(recipe: ControlRecipe, control: Control) -> str:
    """Why the base under this control cannot run as a CUDA graph; empty if it can."""
    if recipe.gradient_checkpointing:
        return "gradient_checkpointing recomputes activations in the backward pass"
    if Acts.TAPS in control.acts:
        return f"{control.title} acts within the base by taps"
    if control.replacements():
        return "this run trains a part of the base"
    return ""


def _strip(images: Sequence[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images[:_STRIP]]
