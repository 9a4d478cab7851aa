"""Choose the concepts of nano's text training: those whose images in the four sets look alike.

    python recipes/nano/choose_concepts.py data/nano/icons.npz recipes/nano/concepts.txt

A concept that looks different in every set (a hotel, a satellite) cannot be learned from four images, and takes
training time from the others. For each image of a concept, the images of another set are ranked by distance in
EfficientNet-Lite0 features; a concept is chosen if its own image there is among the nearest five in half of these
twelve rankings. The concepts of the grid in the README are always chosen, held-out concepts never.

`recipes/nano/concepts.txt`, on which nano was trained, was chosen with features of inputs normalised by ImageNet's mean
and deviation (docs/nano.md); this script may choose others now.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from controlkit.errors import UserError
from controlkit.evaluation.features import lite0_features
from controlkit.nano.evaluate_base import GRID
from controlkit.nano.icons import TRAINED_STYLES, IconSets, draw

NEAREST, SHARE = 5, 0.5


def agreement(icons: str) -> dict[str, float]:
    """Concept => share of the searches that find it."""
    chosen = IconSets(icons).select(styles=TRAINED_STYLES, held_out=False, drawable=True, sets=len(TRAINED_STYLES))
    images = [draw(icon, np.random.default_rng(1), colour="white").image for icon in chosen]
    features = lite0_features(images)
    features = torch.nn.functional.normalize((features - features.mean(0)) / features.std(0).clamp_min(1e-6), dim=1)
    likeness = (features @ features.T).numpy()
    concepts = np.array([icon.concept for icon in chosen])
    styles = np.array([icon.style for icon in chosen])
    found: dict[str, list[bool]] = {}
    for index, icon in enumerate(chosen):
        for style in TRAINED_STYLES:
            if style == icon.style:
                continue
            there = np.flatnonzero(styles == style)
            own = there[concepts[there] == icon.concept][0]
            nearer = (likeness[index, there] > likeness[index, own]).sum()
            found.setdefault(icon.concept, []).append(bool(nearer < NEAREST))
    return {concept: float(np.mean(hits)) for concept, hits in found.items()}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        shares = agreement(sys.argv[1])
    except UserError as error:
        sys.exit(str(error))
    shown = {concept.replace(" ", "-") for concept, _, _ in GRID}
    names = sorted(concept for concept, share in shares.items() if share >= SHARE or concept in shown)
    Path(sys.argv[2]).write_text("\n".join(names) + "\n", encoding="utf-8")
    print(f"{len(names)} of {len(shares)} concepts in {sys.argv[2]}")
