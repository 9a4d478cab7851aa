"""The evaluation images of nano and its controls, which ship with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np

from controlkit.errors import UserError
from controlkit.evaluation.sets import EvaluationSet, register_evaluation_set
from controlkit.files import write_atomically
from controlkit.nano.icons import (
    TRAINED_STYLES,
    UNSEEN_STYLE,
    Drawing,
    Icon,
    IconSets,
    draw,
    read_concepts,
)

SETS = {
    "held-out": "concepts that were never trained on, in the four trained styles",
    "openmoji": "OpenMoji, a style that was never trained on",
    "seen": "concepts that were trained on",
    "seen-again": "the captions of `seen` at other scales and positions",
}
"""Name of each set -> description."""


def read_set(name: str) -> EvaluationSet[Drawing]:
    """One of `SETS`.

    Raises:
        UserError: the file of the package is missing or damaged.
    """
    path = Path(str(files("controlkit") / "assets" / "evaluation" / "nano.npz"))
    try:
        with np.load(path, allow_pickle=False) as archive:
            index = json.loads(archive["index"].tobytes())[name]
            images = archive[name]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read the evaluation images in {path} ({error}); install controlkit again", "damaged-file"
        ) from error
    return EvaluationSet(name, tuple(Drawing(image=image, **facts) for image, facts in zip(images, index, strict=True)))


def build_evaluation_sets(icons: str | Path, concepts: str | Path, out: str | Path) -> dict[str, int]:
    """Compose the sets and write them to the file `out`; returns their sizes.

    Args:
        icons: file of `nano.icons.render_sets`.
        concepts: file of the concepts that the base was trained on, for `seen`.
    """
    sets, trained_on = IconSets(icons), read_concepts(concepts)
    rng = np.random.default_rng(20)
    seen = sets.select(styles=TRAINED_STYLES, held_out=False, sets=4, concepts=trained_on)
    chosen = {
        "held-out": _all_icons_of(sets.select(styles=TRAINED_STYLES, held_out=True, drawable=True, sets=4), 57, rng),
        "openmoji": _all_icons_of(sets.select(styles=(UNSEEN_STYLE,), drawable=True), 96, rng),
        "seen": _all_icons_of(seen, 50, rng),
    }
    drawings = {name: [draw(icon, rng) for icon in group] for name, group in chosen.items()}
    drawings["seen-again"] = [
        draw(icon, rng, colour=drawing.colour) for icon, drawing in zip(chosen["seen"], drawings["seen"], strict=True)
    ]
    index = {
        name: [{"caption": d.caption, "concept": d.concept, "style": d.style, "colour": d.colour} for d in group]
        for name, group in drawings.items()
    }
    arrays = {name: np.stack([d.image for d in group]) for name, group in drawings.items()}
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)

    write_atomically(out, save)
    return {name: len(group) for name, group in drawings.items()}


def _all_icons_of(icons: Sequence[Icon], count: int, rng: np.random.Generator) -> list[Icon]:
    """All icons of `count` random concepts, in random order."""
    concepts = sorted({icon.concept for icon in icons})
    kept = {concepts[index] for index in rng.permutation(len(concepts))[:count]}
    group = [icon for icon in icons if icon.concept in kept]
    return [group[index] for index in rng.permutation(len(group))]


for _name, _description in SETS.items():
    register_evaluation_set(_name, _description, partial(read_set, _name))
