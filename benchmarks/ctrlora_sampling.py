"""What a CtrLoRA condition costs while sampling: the plan against the control at every step, and against no control.

    python benchmarks/ctrlora_sampling.py --seeds 4 --out benchmarks/results/ctrlora_sampling.json
    python benchmarks/ctrlora_sampling.py --base sd15 --random-weights --size 256 --steps 4 --rounds 3 --conditions 2

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

import numpy as np
import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base, Text
from controlkit.bases.load import load_base
from controlkit.bases.residuals import Residuals
from controlkit.checkpoints.controls import load_control
from controlkit.controls.base_control import BaseControl
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


def shipped(base: Base, names: Sequence[str] | None) -> tuple[list[CtrLoRA], list[Tensor], str]:
    """Adapters by name, condition images of a held-out picture, and its caption."""
    shared: dict[str, BaseControl] = {}
    drawing = evaluation_set("held-out").drawings[0]
    controls, images = [], []
    for name in names or ["nano/palette"]:
        control = load_control(name, base, shared=shared)
        if not isinstance(control, CtrLoRA):
            raise SystemExit(f"{name} is no CtrLoRA adapter")
        kind = conditions.find(control.condition or "identity")
        controls.append(control)
        images.append(to_tensor([kind(drawing.image)]).to(base.device))
    return controls, images, drawing.caption


def made_up(base: Base, count: int, size: int) -> tuple[list[CtrLoRA], list[Tensor], str]:
    """As many adapters of rank 128 with random weights, and random condition images."""
    generator = torch.Generator().manual_seed(0)
    shared = BaseControl.for_base(base)
    controls, images = [], []
    for number in range(count):
        adapter = shared.add_adapter(str(number), 128, seed=number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01)
        controls.append(CtrLoRA(shared, str(number)).eval())
        images.append(torch.rand(1, 3, size, size, generator=generator).to(base.device))
    return controls, images, "a red apple on a table"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano")
    parser.add_argument("--random-weights", action="store_true", help="of a known base, and of adapters of rank 128")
    parser.add_argument("--control", action="append", default=None, help="adapters (default: nano/palette)")
    parser.add_argument("--conditions", type=int, default=1, help="how many, with random weights")
    parser.add_argument("--size", type=int, default=None, help="side of the pictures in pixels")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the figures as JSON")
    args = parser.parse_args()

    base = load_base(args.base, device=args.device, random_weights=args.random_weights)
    size = args.size or base.size
    controls, images, prompt = (
        made_up(base, args.conditions, size) if args.random_weights else shipped(base, args.control)
    )
    cache = ResidualCache()

    def draw(uses: Sequence[ActiveControl], first: int, kept: ResidualCache | None = None) -> np.ndarray:
        seeds = range(first, first + args.seeds)
        settings = {"width": size, "height": size, "steps": args.steps, "cache": kept}
        batches = sample(base, prompt=prompt, seeds=seeds, uses=uses, **settings)
        return torch.cat(list(batches)).cpu().numpy()

    planned = [ActiveControl(c, c.encode(x, base)) for c, x in zip(controls, images, strict=True)]
    stepwise = [EveryStep(control, base) for control in controls]
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
            "controls": len(controls),
            "size": size,
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
