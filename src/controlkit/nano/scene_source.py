"""Scenes of two icons as training data, for controls of boxes with phrases; other controls get condition images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.control import Control
from controlkit.controls.inputs import takes_values
from controlkit.errors import UserError
from controlkit.images import to_tensor
from controlkit.nano.drawings import check_drawn_size
from controlkit.nano.icons import TRAINED_STYLES, IconSets, read_concepts, unused_concepts
from controlkit.nano.scene_metrics import mean_iou
from controlkit.nano.scenes import Scene, by_style, draw_scene, picture_of_boxes, scene_caption
from controlkit.training.recipe import ControlRecipe, OneCondition
from controlkit.training.sources.registry import source
from controlkit.training.sources.source import Batch, HeldOut, Measure, Source, Step

BOXES = "boxes"
"""Name of the condition, and of a control's input."""
_IOU = "IoU"
"""Name of the score of a control that takes boxes."""


@dataclass(frozen=True, kw_only=True)
class SceneSettings(ControlRecipe):
    """Settings of training on scenes."""

    scenes: str
    """File of rendered icons (`recipes/nano/build_pictures.py`), of which scenes are composed."""
    concepts: str | None = None
    """File of the concepts to draw, one per line, with spaces or hyphens; null for all but the held-out ones."""
    box_drop: float = 0.1
    """Fraction of samples without boxes, for the unconditional branch of guidance (0.1 in gligen/GLIGEN)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.box_drop <= 1:
            raise UserError(f"box_drop is {self.box_drop}; it must be between 0 and 1", "out-of-range")


@dataclass(frozen=True, kw_only=True)
class SceneCondition(OneCondition):
    """The condition of a control that is trained on scenes."""

    condition: str = BOXES
    """`boxes`, for a control that takes boxes with phrases; else a condition (`controlkit condition --list`)."""


@source
class SceneSource(Source):
    """Scenes drawn anew at each step; there are too many of them to cache their latents."""

    name = "scenes"
    Settings = SceneSettings
    one_condition = SceneCondition
    values = (BOXES,)

    def __init__(self, recipe: SceneSettings) -> None:
        self.recipe = recipe
        self.takes_boxes = takes_values(recipe.control_class, self.values)
        for name in recipe.condition_names:
            if self.takes_boxes and name != BOXES:
                raise UserError(f"condition is {name!r}; {recipe.control_class.title} follows {BOXES}", "contradiction")
            if not self.takes_boxes:
                conditions.find(name)
        sets = IconSets(recipe.scenes)
        self.concepts = None if recipe.concepts is None else read_concepts(recipe.concepts)
        self.styles = by_style(sets.select(styles=TRAINED_STYLES, held_out=False, concepts=self.concepts))
        if not self.styles:
            raise UserError(f"{recipe.scenes} has no style with two of the concepts of this recipe", "empty-data")
        rng = np.random.default_rng(0)
        self.held_out_scenes = [draw_scene(self.styles, rng) for _ in range(recipe.score_pictures)]

    def notes(self, base: Base) -> list[str]:
        if self.concepts is None or self.recipe.concepts is None:
            return []
        drawn = {icon.concept for icons in self.styles.values() for icon in icons}
        reasons = "unknown, held out, or the only ones of their style"
        return unused_concepts(self.recipe.concepts, self.concepts, drawn, reasons)

    def prepare(self, base: Base, control: Control) -> None:
        check_drawn_size(base)
        self.base = base

    def batch(self, condition: str, step: Step) -> Batch:
        local = self._scenes(step)[step.local_slice]
        rng = step.rng(2)
        dropped = rng.random((3, step.global_batch))[:, step.local_slice]
        x = to_tensor([scene.image for scene in local]).to(self.base.device) * 2 - 1
        latents = self.base.encode_image(x).float()
        prompts = [self._prompt(scene, *chances) for scene, chances in zip(local, dropped.T, strict=True)]
        if self.takes_boxes:
            without = rng.random(step.global_batch)[step.local_slice] < self.recipe.box_drop
            inputs = [{BOXES: []} if drop else scene.inputs for scene, drop in zip(local, without, strict=True)]
            return Batch(latents=latents, text=prompts, inputs=inputs)
        kind, parameters = conditions.find(condition), step.rng(3)
        images = [kind(scene.image, **kind.random_parameters(parameters)) for scene in self._scenes(step)]
        return Batch(
            latents=latents,
            text=prompts,
            condition_images=to_tensor(images[step.local_slice]).to(self.base.device),
        )

    def samples(self, condition: str, step: Step) -> list[str]:
        return [f"{scene.caption}, in {scene.boxes}" for scene in self._scenes(step)]

    def held_out(self, condition: str) -> HeldOut:
        scenes = self.held_out_scenes
        targets, prompts = [scene.image for scene in scenes], [scene.caption for scene in scenes]
        if self.takes_boxes:
            pictures, inputs = [picture_of_boxes(scene.boxes) for scene in scenes], [scene.inputs for scene in scenes]
            return HeldOut(condition_images=pictures, targets=targets, prompts=prompts, inputs=inputs)
        kind = conditions.find(condition)
        return HeldOut(condition_images=[kind(image) for image in targets], targets=targets, prompts=prompts)

    def scores(self, condition: str, held_out: HeldOut, images: Sequence[np.ndarray]) -> dict[str, float]:
        if not self.takes_boxes:
            return super().scores(condition, held_out, images)
        return {_IOU: mean_iou(images, [scene.boxes for scene in self.held_out_scenes])}

    def measure(self, condition: str) -> Measure | None:
        return Measure(_IOU) if self.takes_boxes else super().measure(condition)

    def _scenes(self, step: Step) -> list[Scene]:
        """The scenes of a step, of all processes."""
        rng = step.rng()
        return [draw_scene(self.styles, rng) for _ in range(step.global_batch)]

    def _prompt(self, scene: Scene, drop: float, style: float, colour: float) -> str:
        """Its caption, empty with the probability `prompt_drop`; style and colour are each omitted with 0.2."""
        if drop < self.recipe.prompt_drop:
            return ""
        return scene_caption(
            scene.concepts, None if style < 0.2 else scene.style, None if colour < 0.2 else scene.colour
        )
