"""`controlkit study image-prompt`: what results take from an image prompt, by its weight, with and without a caption.

For controls that turn an image into tokens of the prompt, such as the global adapter of Zhao et al. 2023 (arXiv
2305.16322, section 3.2), whose results need not follow the image pixel by pixel. Each image prompt is a drawing
of a concept that nano was trained on; results are compared with another drawing of the same caption. Samples are
stored in the folder of the study; running it again resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit.bases.load import load_base
from controlkit.controls.control import Acts
from controlkit.controls.inputs import takes_one_image
from controlkit.errors import UserError
from controlkit.evaluation.features import LITE0, lite0_features
from controlkit.evaluation.metrics import retrieval_accuracy
from controlkit.evaluation.report import Report, Row
from controlkit.evaluation.sampling import EvalControl, generate_controlled, generate_uncontrolled, reconstruct
from controlkit.evaluation.settings import content_of, control_settings, examples_settings, seeds_of
from controlkit.formats.load import load_control
from controlkit.images import contact_sheet, write_png
from controlkit.nano.evaluation_sets import read_set
from controlkit.sampling.request import DEFAULT_STEPS
from controlkit.sampling.settings import sampling_settings
from controlkit.sampling.uses import mode_name
from controlkit.studies.stored_results import (
    StoredResults,
    StudyResult,
    check_sampling_steps,
    study_settings,
    with_settings,
)

EMPTY, CAPTION = "empty", "the image's caption"
"""The prompts."""
NO_CONTROL = "no control"
_NEAREST = 5
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class ImagePrompt:
    """Settings of the study."""

    control: str = "runs/nano/uni-controlnet-global/global.safetensors"
    """A control whose image becomes tokens of the prompt."""
    out: str = "runs/study/image-prompt"
    """Folder for the sheet and stored results (`kept/`; delete it to sample again)."""
    base: str = "nano"
    """The base."""
    device: str = "auto"
    """`cpu`, `cuda`, `mps`, or `auto` for the best available."""
    weights: tuple[float, ...] = (0.5, 1.0)
    """Weights of the image prompt."""
    mode: str | None = None
    """Mode of the control (`ControlUse.mode`); null is that of the base."""
    images: int = 200
    """Image prompts."""
    sampling_steps: int = DEFAULT_STEPS
    """Denoising steps."""

    def __post_init__(self) -> None:
        check_sampling_steps(self.sampling_steps)
        if self.images < 1 or not self.weights:
            raise UserError(
                f"images {self.images}, weights {list(self.weights)}: expected at least one of each", "out-of-range"
            )
        object.__setattr__(self, "mode", mode_name(self.mode))


def run_image_prompt(settings: ImagePrompt) -> StudyResult:
    """Sample and score.

    Raises:
        UserError: the control is missing, adds no tokens or takes more than one image; or the `metrics` extra is not
            installed.
    """
    base = load_base(settings.base, device=settings.device)
    control = load_control(settings.control, base)
    if control.acts is not Acts.TOKENS or not takes_one_image(control):
        raise UserError(f"{settings.control} is {control.title}, which makes no tokens of one image", "wrong-kind")
    every = read_set("seen")
    seen, given = (images.take(settings.images) for images in (every, read_set("seen-again")))
    gallery, gallery_concepts = lite0_features(every.images), [drawing.concept for drawing in every.examples]
    references, concepts = gallery[: settings.images], gallery_concepts[: settings.images]
    count = len(set(gallery_concepts))
    steps = settings.sampling_steps
    stored = StoredResults(Path(settings.out), {"base": base.content, **sampling_settings(base, steps=steps)})

    def scored(prompt: str, weight: float | str, results: Sequence[np.ndarray]) -> Row:
        features = lite0_features(results)
        right = retrieval_accuracy(features, concepts, gallery, gallery_concepts, _NEAREST)
        return prompt, weight, right, float((features - references).pow(2).sum(1).mean())

    rows: list[Row] = []
    acting: dict[float, dict[str, Any]] = {}
    strips: dict[str, Sequence[np.ndarray]] = {"image prompt": given.images}
    for prompt, prompts in ((EMPTY, [""] * len(concepts)), (CAPTION, seen.captions)):
        content = {"prompts": content_of((), prompts)}
        results = stored.images(
            f"{prompt}, {NO_CONTROL}", content, partial(generate_uncontrolled, base, prompts, steps)
        )
        rows.append(scored(prompt, NO_CONTROL, results))
        strips[f"{prompt}: {NO_CONTROL}"] = results
        for weight in settings.weights:
            use = EvalControl(control=control, condition_images=given.images, weight=weight, mode=settings.mode)
            acting[weight] = control_settings(base, control, weight=weight, mode=settings.mode)
            results = stored.images(
                f"{prompt}, weight {weight:g}",
                {**content, "control": acting[weight], "given": content_of(given.images, ())},
                partial(generate_controlled, base, [use], prompts, steps=steps),
            )
            rows.append(scored(prompt, weight, results))
            strips[f"{prompt}: weight {weight:g}"] = results
    ceiling = scored("", "the image prompts through the autoencoder (ceiling)", reconstruct(base, given.images))
    strips["compared with"] = seen.images
    report = Report(
        title=f"What {len(concepts)} results take from their image prompts",
        columns=("prompt", "weight", f"right concept among {_NEAREST} of {count}", "distance"),
        rows=(*rows, ceiling),
        notes=(
            f"chance of the right concept: {_NEAREST / count:.2f}.",
            "distance (lower is better): of EfficientNet-Lite0's features to another drawing of the same caption.",
        ),
        facts={"chance": _NEAREST / count},
        settings={
            "controls": list(acting.values()),
            "sets": [examples_settings(seen), examples_settings(given)],
            "seeds": seeds_of(len(concepts)),
            "features": LITE0,
        },
    )
    cells = [[Image.fromarray(image) for image in strip[:_SHOWN]] for strip in strips.values()]
    path = Path(settings.out) / "image-prompt.png"
    write_png(path, contact_sheet(cells, row_titles=list(strips), cell=80))
    shared = study_settings(settings, base, mode=acting[settings.weights[0]]["mode"])
    del shared["weight"]  # each row has its own
    return StudyResult(reports=with_settings([report], shared), files={"images": path})
