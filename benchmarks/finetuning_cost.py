"""What a training step of a control costs, against fine-tuning the base without one: time and memory.

    python benchmarks/finetuning_cost.py
    python benchmarks/finetuning_cost.py --base sd15 --random-weights --size 256 --batch 1 --rounds 3
    python benchmarks/finetuning_cost.py --base sd15 --random-weights --device cuda --batch 4

Zhang et al. 2023 (arXiv 2302.05543v3, section 1) report 34 % more time and 23 % more memory for a ControlNet than for
optimising Stable Diffusion without it, on an A100. Here both take the same step on the same weights, from latents and
embeddings, in float32 or under bf16 autocast over float32 weights; a CtrLoRA adapter stands beside them. Memory is
measured on CUDA, each way by itself, and counted elsewhere (benchmarks/memory.py).
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import measure
import memory
import torch
from memory import Way

FINE_TUNING = Way("fine-tuning", control="none")
CONTROLNET = Way("ControlNet", control="controlnet")
ADAPTER = Way("CtrLoRA adapter")
WAYS = (FINE_TUNING, CONTROLNET, ADAPTER)


def times(args: argparse.Namespace, *, bf16: bool) -> measure.Turns:
    """Seconds of a step of each way, in turns. Each has a base of its own, whose weights may change."""
    steps = {}
    for way in WAYS:
        base, _ = measure.base_in_float32(args)
        built = memory.build(base, way, args.rank)
        optimizer = torch.optim.AdamW(built.parameters, lr=1e-6, fused=True)

        def step(_: int, built: Any = built, optimizer: Any = optimizer) -> None:
            def autocast() -> Any:
                return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=bf16)

            memory.take_step(built, optimizer, built.base.predict, args.size // built.base.factor, args.batch, autocast)

        steps[way.name] = step
    return measure.take_turns(steps, args.rounds, device=args.device, warm_up=args.warm_up)


def peaks(args: argparse.Namespace, *, bf16: bool) -> tuple[str, dict[str, float]]:
    """How memory was found, and the peak of each way in MiB; none for a base whose size is not known without files."""
    settings = {"size": args.size, "batch": args.batch, "rank": args.rank}
    found: dict[str, float] = {}
    if not args.random_weights:
        return "not counted", found
    cuda = torch.device(args.device).type == "cuda"
    for way in WAYS:
        count = memory.measured if cuda else memory.counted
        found[way.name] = count(args.base, Way(way.name, control=way.control, bf16=bf16), **settings)["peak"]
    return "measured" if cuda else "counted", found


def main() -> None:
    """Measure, print, write."""
    parser = measure.parser(__doc__, rounds=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=128)
    args = parser.parse_args()
    base, bf16 = measure.base_in_float32(args)
    args.size = args.size or base.size
    del base
    turns = times(args, bf16=bf16)
    gc.collect()
    how, found = peaks(args, bf16=bf16)
    first = FINE_TUNING.name
    cases = []
    for way in WAYS:
        ratio = turns.ratio(way.name, first)
        more = found.get(way.name, 0.0) / found[first] if found else None
        cases.append(
            {"way": way.name, "seconds_a_step": turns.times()[way.name], "to_fine_tuning": ratio}
            | {"peak_mib": found.get(way.name), "memory_to_fine_tuning": more}
        )
    rows = [
        [case["way"], case["seconds_a_step"], case["to_fine_tuning"], case["peak_mib"], case["memory_to_fine_tuning"]]
        for case in cases
    ]
    columns = ["step", "seconds", "of fine-tuning's", f"peak MiB, {how}", "of fine-tuning's"]
    print(measure.table(columns, [[("" if value is None else value) for value in row] for row in rows]))
    measure.finish("finetuning_cost", args, cases, memory=how)


if __name__ == "__main__":
    main()
