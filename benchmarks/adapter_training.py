"""A step of adapter training: ours against a step that does what the reference does, on the same weights and numbers.

    python benchmarks/adapter_training.py --out benchmarks/results/adapter_training.json
    python benchmarks/adapter_training.py --base sd15 --random-weights --size 256 --batch 1 --rank 128

The reference (xyfJASON/ctrlora, cldm/cldm_ctrlora_finetune.py) encodes the picture, the condition image and the prompts
at every step, and every weight of the base control and of the UNet's decoder gets a gradient that no one uses. Ours
reads latents and embeddings that were computed once, and makes gradients for the adapter alone. The two take turns;
their losses are compared at every step.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlkit.bases.base import Base, Text
from controlkit.bases.load import load_base
from controlkit.controls.base_control import BaseControl
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.training.diffusion import noised
from controlkit.training.objective import torch_generator

ADAPTER = "measured"


class Side:
    """A control with an adapter that steers, its optimiser, and what a step reads."""

    def __init__(self, base: Base, rank: int, rate: float) -> None:
        self.base = base
        self.shared = BaseControl.for_base(base)
        generator = torch.Generator().manual_seed(0)
        adapter = self.shared.add_adapter(ADAPTER, rank, seed=0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01)
        self.shared.train_adapter(ADAPTER)
        self.control = CtrLoRA(self.shared, ADAPTER)
        self.scheduler = base.schedule()
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)

    def step(self, number: int, z: Tensor, hint: Tensor, text: Text) -> float:
        """One optimiser step from latents, hints and embeddings; returns its loss."""
        drawn = noised(self.scheduler, z, torch_generator(0, number), len(z), slice(None))
        residuals = self.control(None, drawn.t, text, hint)
        loss = drawn.loss(self.base.predict(drawn.x_t, drawn.t, text, residuals))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    figures = measure(args)
    print(json.dumps(figures, indent=2))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of both, their ratio, peak memory on CUDA, and how far their losses are apart."""
    base = load_base(args.base, device=args.device, random_weights=args.random_weights)
    size = args.size or base.size
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(args.batch, 3, size, size, generator=generator).to(base.device)
    images = torch.rand(args.batch, 3, size, size, generator=generator).to(base.device)
    prompts = [f"thing {number}" for number in range(args.batch)]
    rate = 1e-4

    mine = Side(base, args.rank, rate)
    z, hint = base.encode_picture(pictures * 2 - 1), mine.control.encode(images, base)
    text = base.encode_text(prompts, (size, size))
    theirs = Side(base, args.rank, rate)

    def ours(number: int) -> float:
        base.unet.requires_grad_(False)
        return mine.step(number, z, hint, text)

    def reference(number: int) -> float:
        theirs.shared.network.requires_grad_(True)
        base.unet.up_blocks.requires_grad_(True)
        return theirs.step(
            number,
            base.encode_picture(pictures * 2 - 1),
            theirs.control.encode(images, base),
            base.encode_text(prompts, (size, size)),
        )

    ways: dict[str, Callable[[int], float]] = {"ours": ours, "reference": reference}
    times: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    for number in range(args.steps + 1):
        for name, run in ways.items():
            if base.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            losses[name].append(run(number))
            if number > 0:  # the first warms up
                times[name].append(time.perf_counter() - started)
            if base.device.type == "cuda":
                peaks[name] = max(peaks.get(name, 0.0), torch.cuda.max_memory_allocated() / 2**20)
    medians = {name: float(np.median(group)) for name, group in times.items()}
    return {
        "seconds_a_step": medians,
        "spread": {name: [min(group), max(group)] for name, group in times.items()},
        "ratio": medians["reference"] / medians["ours"],
        "largest_difference_of_losses": max(
            abs(a - b) for a, b in zip(losses["ours"], losses["reference"], strict=True)
        ),
        "peak_mebibytes": peaks or "only known on CUDA",
        "setting": {
            **{key: str(value) for key, value in vars(args).items() if key != "out"},
            "size": size,
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }


if __name__ == "__main__":
    main()
