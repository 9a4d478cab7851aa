"""Where the time goes, before and after: parts of sampling and of a training step, and what the machine's limit is.

    python benchmarks/where_time_goes.py --figure docs/images/where-time-goes-nano.png
    python benchmarks/where_time_goes.py --base sd15 --random-weights --size 256 --steps 2 --batch 1 --rank 128

One CtrLoRA condition, one image under guidance, in the ways of `ctrlora_sampling.py`; and a step of adapter training
in the ways of `adapter_training.py`. Every network's calls are timed where they happen. The limit is the number of
floating-point operations, counted by torch while the way runs, over the machine's rate for products of large square
matrices, measured in the same run: no program on this machine that does the same arithmetic can be faster than that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import torch
from adapter_training import Side, as_the_reference
from ctrlora_sampling import SHIPPED, EveryStep, made_up, shipped
from torch import nn

from controlkit.bases.base import Base
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample

REST = "the rest"
PARTS = ("autoencoder", "text encoder", "control", "UNet", "optimiser", REST)
"""In the order of the chart; `the rest` of a training step is mostly its backward pass."""


class Clock:
    """Seconds that named parts take, each counted where it is not inside another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._started = 0.0

    def start(self, name: str) -> None:
        """A part begins."""
        if not self._open:
            measure.synchronise(self.device)
            self._started = time.perf_counter()
        self._open.append(name)

    def stop(self) -> None:
        """The part that began last ends."""
        name = self._open.pop()
        if not self._open:
            measure.synchronise(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self._started


@contextmanager
def timed(
    clock: Clock, modules: Mapping[str, list[nn.Module]], optimizers: list[torch.optim.Optimizer]
) -> Iterator[None]:
    """A block in which the calls of networks and optimisers are timed by the clock."""
    handles: list[Any] = []
    for name, group in modules.items():
        for module in group:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: clock.start(name)))
            handles.append(module.register_forward_hook(lambda *_: clock.stop()))
    for optimizer in optimizers:
        handles.append(optimizer.register_step_pre_hook(lambda *_: clock.start("optimiser")))
        handles.append(optimizer.register_step_post_hook(lambda *_: clock.stop()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_ways(
    ways: Mapping[str, Callable[[int], Any]],
    modules: Mapping[str, list[nn.Module]],
    optimizers: list[torch.optim.Optimizer],
    *,
    rounds: int,
    rate: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """For each way the seconds of its parts (from the round of median length), its operations, and the limit."""
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    operations: dict[str, int] = {}
    for way, run in ways.items():  # also warms up
        operations[way] = measure.operations(lambda run=run: run(0))  # type: ignore[misc]
    for number in range(rounds):
        for way, run in ways.items():
            clock = Clock(device)
            measure.synchronise(device)
            started = time.perf_counter()
            with timed(clock, modules, optimizers):
                run(number + 1)
            measure.synchronise(device)
            total = time.perf_counter() - started
            runs[way].append({**clock.seconds, REST: total - sum(clock.seconds.values()), "total": total})
    cases = []
    for way, every in runs.items():
        typical = sorted(every, key=lambda parts: parts["total"])[len(every) // 2]
        limit = operations[way] / rate
        cases.append(
            {
                "way": way,
                "seconds": typical,
                "GFLOP": operations[way] / 1e9,
                "limit_seconds": limit,
                "share_of_limit": limit / typical["total"],
            }
        )
    return cases


def sampling_ways(base: Base, args: argparse.Namespace) -> tuple[dict[str, Callable[[int], Any]], list[nn.Module]]:
    """Draw one image: without control, as the reference does, by a plan, and by the plan again."""
    (control,), (image,), prompt = (
        made_up(base, 1, args.size, args.rank) if args.random_weights else shipped(base, SHIPPED[:1])
    )
    kept = ResidualCache(megabytes=4096)

    def draw(number: int, uses: list[ActiveControl], cache: ResidualCache | None = None) -> None:
        for _ in sample(
            base,
            prompt=prompt,
            seeds=[number],
            uses=uses,
            width=args.size,
            height=args.size,
            steps=args.steps,
            cache=cache,
        ):
            pass

    def planned(number: int, cache: ResidualCache | None = None) -> None:
        draw(number, [ActiveControl(control, control.encode(image, base))], cache)

    hint = control.encode(image, base)
    draw(0, [ActiveControl(control, hint)], kept)
    ways: dict[str, Callable[[int], Any]] = {
        "no control": lambda number: draw(number, []),
        "reference": lambda number: draw(number, [ActiveControl(EveryStep(control, base), image)]),
        "ours": planned,
        "ours, again": lambda number: draw(number, [ActiveControl(control, hint)], kept),
    }
    return ways, [control.base_control]


def training_ways(
    base: Base, args: argparse.Namespace
) -> tuple[dict[str, Callable[[int], Any]], dict[str, list[nn.Module]], list[torch.optim.Optimizer]]:
    """A step of adapter training as the reference does it, and ours."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.batch, 3, args.size, args.size)
    images, condition_images = (torch.rand(shape, generator=generator).to(base.device) for _ in range(2))
    prompts = [f"thing {number}" for number in range(args.batch)]
    bf16 = args.dtype == "bf16"
    mine = Side(base, args.rank, fused=True, bf16=bf16)
    z, hint = base.encode_image(images * 2 - 1), mine.control.encode(condition_images, base)
    text = base.encode_text(prompts, (args.size, args.size))
    theirs = Side(as_the_reference(base), args.rank, fused=False, bf16=bf16)
    theirs.shared.network.requires_grad_(True)

    def reference(number: int) -> None:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
            latents = base.encode_image(images * 2 - 1).float()
            hints = theirs.control.encode(condition_images, base).float()
            embedded = base.encode_text(prompts, (args.size, args.size))
        theirs.step(number, latents, hints, embedded)

    ways = {"reference": reference, "ours": lambda number: mine.step(number, z, hint, text)}
    networks = {"control": [mine.shared, theirs.shared], "UNet": [base.unet, theirs.base.unet]}
    return ways, networks, [mine.optimizer, theirs.optimizer]


def main() -> None:
    """Measure, print, draw, write."""
    parser = measure.parser(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=20, help="of sampling")
    parser.add_argument("--batch", type=int, default=16, help="of training")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--figure", type=Path, default=None, help="also draw a chart there")
    args = parser.parse_args()
    base = measure.base_of(args)
    args.size = args.size or base.size
    rate = measure.product_rate(base.device, base.dtype)
    networks: dict[str, list[nn.Module]] = {
        "autoencoder": [base.vae.encoder, base.vae.decoder],
        "text encoder": list(base.text_encoders),
        "UNet": [base.unet],
    }
    ways, control = sampling_ways(base, args)
    settings: dict[str, Any] = {"rounds": args.rounds, "rate": rate, "device": base.device}
    sampled = measure_ways(ways, {**networks, "control": control}, [], **settings)
    if base.dtype != torch.float32:
        base.to(dtype=torch.float32)  # bf16 in training is autocast
    steps, trained_networks, optimizers = training_ways(base, args)
    trained = measure_ways(steps, {**networks, **trained_networks}, optimizers, **settings)
    work = {
        f"one image, {args.steps} steps, one condition": sampled,
        f"a step of adapter training, batch {args.batch}": trained,
    }
    for title, cases in work.items():
        print(f"\n{title} (seconds)")
        print(measure.table(["way", *PARTS, "total", "GFLOP", "limit"], [_row(case) for case in cases]))
    print(f"\nproducts of matrices: {rate / 1e9:.0f} GFLOP/s")
    cases = [{"work": title, **case} for title, group in work.items() for case in group]
    if args.figure is not None:
        draw_chart(work, args.figure)
    measure.finish("where_time_goes", args, cases, matrix_product_gflops=rate / 1e9)


def _row(case: Mapping[str, Any]) -> list[Any]:
    parts = [case["seconds"].get(part, 0.0) for part in PARTS]
    return [case["way"], *parts, case["seconds"]["total"], case["GFLOP"], case["limit_seconds"]]


def draw_chart(work: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """A row of stacked bars for each way, with the limit marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(work), 1, figsize=(8, 4.8), layout="constrained", height_ratios=[2, 1])
    colours = dict(zip(PARTS, pyplot.get_cmap("tab10").colors, strict=False))
    for axis, (title, cases) in zip(axes, work.items(), strict=True):
        names = [case["way"] for case in cases]
        left = [0.0] * len(cases)
        for part in PARTS:
            widths = [case["seconds"].get(part, 0.0) for case in cases]
            axis.barh(names, widths, left=left, color=colours[part], label=part, height=0.7)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for place, case in enumerate(cases):
            line = [case["limit_seconds"]] * 2
            label = "limit: operations / rate of matrix products" if place == 0 else None
            axis.plot(line, [place - 0.35, place + 0.35], color="black", linewidth=2, label=label)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("seconds")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
