"""What nano's hardest concepts lack, more steps or a wider UNet: three short trainings that go on from its base.

    python recipes/nano/steps_or_width.py prepare OUT
    controlkit train recipes/nano/base-concepts.yaml --set steps=1500 --set warmup_steps=50 --set learning_rate=3e-4 \\
        --set ema=0.995 --set start=START --set out=OUT/NAME        # three times
    python recipes/nano/steps_or_width.py measure OUT

NAME and START are `all` and `src/controlkit/assets/nano`; `few` and the same, with `--set concepts=OUT/few.txt`, so
that each of 56 concepts is drawn eight times as often; and `wide` and `OUT/wide-start`, whose UNet has twice the
channels and predicts the same (Net2Net, Chen et al. 2016, arXiv 1511.05641). `all` and `wide` see the same drawings and
noise. `measure` writes `OUT/steps-or-width.json`; it needs the rendered icons and the metrics extra.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.folders import nano_folder
from controlkit.bases.load import load_base
from controlkit.evaluation.features import lite0_features
from controlkit.evaluation.metrics import concept_similarity, retrieval_accuracy
from controlkit.evaluation.sampling import generate_uncontrolled, reconstruct
from controlkit.files import write_json
from controlkit.nano.base_objective import save_base
from controlkit.nano.evaluate_base import GRID
from controlkit.nano.evaluation_sets import read_set
from controlkit.nano.icons import TRAINED_STYLES, IconSets, caption_of, draw, read_concepts

ROOT = Path(__file__).parents[2]
RUNS = ("all", "few", "wide")
_HARD = tuple(concept.replace(" ", "-") for concept, _, _ in GRID)
_SPREAD = 0.3
"""Standard deviation of the difference between the two copies of a weight; the copies would stay alike without."""


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "measure"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--icons", default="data/nano/icons.npz")
    args = parser.parse_args()
    if args.part == "prepare":
        prepare(args.out)
    else:
        measure(args.out, args.icons)


def prepare(out: Path) -> None:
    """Write the list of few concepts and the wide base."""
    out.mkdir(parents=True, exist_ok=True)
    few = sorted({drawing.concept for drawing in read_set("seen").examples} | set(_HARD))
    (out / "few.txt").write_text("\n".join(few) + "\n", encoding="utf-8")
    base = load_base(nano_folder())
    base.unet = widened(base.unet)  # type: ignore[misc]
    save_base(base, out / "wide-start")
    print(f"{len(few)} concepts in {out / 'few.txt'}; a base of twice the width in {out / 'wide-start'}")


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A UNet with twice the channels that computes the same.

    Each channel is doubled beside itself, which keeps groups, heads and the halves of gates; weights that read it are
    split between the copies, unevenly, so that they learn apart.
    """
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    wide = UNet2DConditionModel(**{**config, "block_out_channels": [2 * c for c in config["block_out_channels"]]})
    random = torch.Generator().manual_seed(0)
    weights = unet.state_dict()
    state = {name: _doubled(name, weights[name], like, random) for name, like in wide.state_dict().items()}
    wide.load_state_dict(state)
    return wide.eval().requires_grad_(False)


def _doubled(name: str, weight: Tensor, like: Tensor, random: torch.Generator) -> Tensor:
    if like.shape[0] == 2 * weight.shape[0]:
        weight = weight.repeat_interleave(2, 0)
    if name == "time_embedding.linear_1.weight":
        # Every second frequency of twice as many is one of the old.
        split = torch.zeros_like(like)
        split[:, ::2] = weight
        return split
    if weight.ndim > 1 and like.shape[1] == 2 * weight.shape[1]:
        share = torch.randn(weight.shape, generator=random) * _SPREAD
        weight = torch.stack([weight * (0.5 + share), weight * (0.5 - share)], 2).flatten(1, 2)
    # The product of doubled queries and keys is twice as large, its divisor the square root of two.
    return weight / 2**0.5 if name.endswith("to_q.weight") else weight


def measure(out: Path, icons: str) -> None:
    """Name the images of nano and of the three bases, and write the shares that are right."""
    gallery = _Gallery(icons)
    result: dict[str, Any] = {"autoencoder": gallery.ceiling(load_base(nano_folder()))}
    for name, folder in {"nano": nano_folder(), **{name: out / name / "base" for name in RUNS}}.items():
        base = load_base(folder)
        result[name] = {**gallery.named(base), "parameters of the UNet": sum(p.numel() for p in base.unet.parameters())}
        if (log := out / name / "log.jsonl").is_file():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            losses = [line["loss"] for line in lines if "loss" in line]
            result[name]["loss, last third"] = float(np.mean(losses[-len(losses) // 3 :]))
        print(name, json.dumps(result[name]), file=sys.stderr, flush=True)
    write_json(out / "steps-or-width.json", result)


class _Gallery:
    """True drawings of all trained concepts, among which images are named by EfficientNet-Lite0's features."""

    def __init__(self, icons: str) -> None:
        chosen = IconSets(icons).select(
            styles=TRAINED_STYLES, held_out=False, sets=4, concepts=read_concepts(ROOT / "recipes/nano/concepts.txt")
        )
        rng = np.random.default_rng(7)
        drawings = [draw(icon, rng, least_scale=0.75) for icon in chosen]
        self._features = lite0_features([drawing.image for drawing in drawings])
        self._concepts = [drawing.concept for drawing in drawings]
        self._again = {
            concept: [
                draw(icon, rng, colour="teal", least_scale=0.75).image
                for icon in chosen
                if icon.concept == concept
                for _ in range(8)
            ]
            for concept in _HARD
        }
        self._seen = read_set("seen")

    def _named(self, images: dict[str, list[np.ndarray]]) -> dict[str, float]:
        """Concept -> share of its images that are nearest to it among all."""
        shares = {}
        for concept, own in images.items():
            names, similarity = concept_similarity(lite0_features(own), self._features, self._concepts)
            shares[concept] = float((similarity.argmax(1) == names.index(concept)).float().mean())
        return shares

    def ceiling(self, base: Base) -> dict[str, float]:
        """The same of true drawings through the autoencoder."""
        return self._named({concept: list(reconstruct(base, images)) for concept, images in self._again.items()})

    def named(self, base: Base) -> dict[str, Any]:
        """Shares of 32 images of each concept of the README's grid, and of the 200 of `evaluate base` among 50."""
        made = {
            concept: list(
                generate_uncontrolled(
                    base,
                    [caption_of(concept, style, "teal") for style in TRAINED_STYLES for _ in range(8)],
                    20,
                    None,
                    list(range(8)) * len(TRAINED_STYLES),
                )
            )
            for concept in _HARD
        }
        seen = self._seen
        concepts = [drawing.concept for drawing in seen.examples]
        images = lite0_features(generate_uncontrolled(base, seen.captions, 20, None))
        return {
            **self._named(made),
            "right concept among 5 of 50": retrieval_accuracy(images, concepts, lite0_features(seen.images), concepts),
        }


if __name__ == "__main__":
    main()
