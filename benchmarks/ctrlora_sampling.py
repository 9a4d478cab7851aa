"""What a CtrLoRA condition costs while sampling: the plan against the control at every step, and against no control.

    python benchmarks/ctrlora_sampling.py --seeds 4 --out benchmarks/results/ctrlora_sampling.json

Four ways to draw the same pictures from the same seeds, in turns, so that a busy machine disturbs all alike:

- base: no control at all;
- every step: as the reference does (xyfJASON/ctrlora, cldm/cldm_ctrlora_inference.py), the condition image goes through
  the autoencoder and the control runs at every step, for both halves of guidance and every picture;
- plan: the control's residuals of all steps are computed before sampling, once for all pictures;
- again: the plan a second time with other seeds, its residuals kept from the call before.

Prints medians in seconds, ratios to the base, and the largest difference of the pictures.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base, Text
from controlkit.bases.load import load_base
from controlkit.bases.residuals import Residuals
from controlkit.checkpoints.controls import load_control
from controlkit.controls.control import Reads
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.evaluation.pictures import evaluation_set
from controlkit.images import to_tensor
from controlkit.sampling.cache import ResidualCache
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample


class EveryStep(CtrLoRA):
    """A CtrLoRA that runs as the reference's does: at every step, its condition image encoded anew."""

    reads = Reads.NOISE | Reads.TIME | Reads.TEXT

    def __init__(self, control: CtrLoRA, base: Base) -> None:
        super().__init__(control.base_control, control.adapter, control.condition)
        self.base = base

    @property
    def shared_network(self) -> None:
        return None

    def encode(self, condition_image: Tensor, base: Base) -> Tensor:
        return condition_image

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Tensor) -> Residuals:
        assert x_t is not None
        return super().forward(x_t, t, text, super().encode(hint.expand(len(x_t), -1, -1, -1), self.base))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano")
    parser.add_argument("--control", action="append", default=None, help="adapters (default: nano/palette)")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the figures as JSON")
    args = parser.parse_args()

    base = load_base(args.base, device=args.device)
    shared: dict[str, Any] = {}
    controls = [load_control(name, base, shared=shared) for name in args.control or ["nano/palette"]]
    drawing = evaluation_set("held-out").drawings[0]
    images = [
        to_tensor([conditions.find(control.condition or "identity")(drawing.image)]).to(base.device)
        for control in controls
    ]
    cache = ResidualCache()

    def draw(uses: Sequence[ActiveControl], first: int, kept: ResidualCache | None = None) -> np.ndarray:
        seeds = range(first, first + args.seeds)
        batches = sample(base, prompt=drawing.caption, seeds=seeds, uses=uses, steps=args.steps, cache=kept)
        return torch.cat(list(batches)).cpu().numpy()

    planned = [ActiveControl(c, c.encode(x, base)) for c, x in zip(controls, images, strict=True)]
    stepwise = [EveryStep(c, base) for c in controls if isinstance(c, CtrLoRA)]
    each = [ActiveControl(c, x) for c, x in zip(stepwise, images, strict=True)]
    draw(planned, 0, cache)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "base": lambda: draw([], 1000),
        "every step": lambda: draw(each, 1000),
        "plan": lambda: draw(planned, 1000),
        "again": lambda: draw(planned, 1000, cache),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    pictures: dict[str, np.ndarray] = {}
    for _ in range(args.rounds):
        for name, run in ways.items():
            started = time.perf_counter()
            pictures[name] = run()
            times[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(group)) for name, group in times.items()}
    figures = {
        "seconds": medians,
        "ratio_to_base": {name: value / medians["base"] for name, value in medians.items()},
        "largest_difference": {
            name: float(np.abs(pictures[name] - pictures["plan"]).max()) for name in ("every step", "again")
        },
        "setting": {
            "base": base.name,
            "controls": args.control or ["nano/palette"],
            "seeds": args.seeds,
            "steps": args.steps,
            "rounds": args.rounds,
            "device": str(base.device),
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
