"""Helpers of the benchmarks: interleaved timing, medians with spread, comparison of outputs, one JSON file per run.

On CUDA with bf16 arithmetic, outputs are compared in float32 at a few steps first (`compared_in_float32`): in bf16 two
correct ways of a network of random weights are as far apart as two different images. Then the ways run untimed until
their times settle (`take_turns`), since the first minute of a fresh machine is slower; beside the seconds stands the
share of the card's rate, counted operations over those that products of large matrices reach in that time.

A machine is never quite quiet, so the ways of one case are run in turns, in an order that changes from round to round,
and a ratio is the median of the ratios of the rounds: what slows one round slows both sides of its ratio.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit._version import __version__
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.bases.random import random_base
from controlkit.controls.ctrlora import lora
from controlkit.files import write_json

RESULTS = Path(__file__).parent / "results"
SETTLING_SECONDS = 20.0
"""The longest warm-up of one case on CUDA."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SURROUNDINGS = ("OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_")
"""Environment variables that affect times on a CPU."""
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


@dataclass
class Turns:
    """Times and outputs of interleaved ways."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Way -> seconds of each round."""
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    """Way -> what it returned in each round, those of the warm-up first."""

    def median(self, way: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[way])

    def times(self) -> dict[str, dict[str, float]]:
        """Way -> median, lowest and highest seconds."""
        return {way: spread(values) for way, values in self.seconds.items()}

    def ratio(self, way: str, to: str) -> dict[str, float]:
        """Seconds of `way` as multiples of those of `to`: median, lowest and highest of the rounds."""
        return spread([a / b for a, b in zip(self.seconds[way], self.seconds[to], strict=True)])


def take_turns(
    ways: Mapping[str, Callable[[int], Any]], rounds: int, *, device: torch.device | str = "cpu", warm_up: int = 1
) -> Turns:
    """Run every way in each of `rounds` rounds, with the number of the round; those of the warm-up are not timed.

    Args:
        ways: name -> what is timed; work on an accelerator counts until it is done.
        warm_up: rounds of the warm-up; on CUDA as many as every way's time takes to settle, at least two, whose outputs
            are not kept.
    """
    if torch.device(device).type == "cuda":
        settled(ways, device)
        warm_up = 0
    turns = Turns({way: [] for way in ways}, {way: [] for way in ways})
    names = list(ways)
    gc.collect()
    for number in range(warm_up + rounds):
        shift = number % len(names)
        for way in names[shift:] + names[:shift]:
            synchronise(device)
            started = time.perf_counter()
            output = ways[way](number)
            synchronise(device)
            if number >= warm_up:
                turns.seconds[way].append(time.perf_counter() - started)
            turns.outputs[way].append(output)
    return turns


def settled(
    ways: Mapping[str, Callable[[int], Any]],
    device: torch.device | str,
    *,
    limit: float = SETTLING_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Run all ways until none is more than a tenth faster than in the round before; returns the number of rounds.

    Args:
        limit: seconds after which it ends in any case.
    """
    started, before, number = clock(), dict.fromkeys(ways, math.inf), 0
    while True:
        is_steady = True
        for way, run in ways.items():
            synchronise(device)
            began = clock()
            run(number)
            synchronise(device)
            took = clock() - began
            is_steady = is_steady and took > 0.9 * before[way]
            before[way] = took
        number += 1
        if is_steady or clock() - started > limit:
            return number


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations of a call: products of matrices, convolutions and attention. It runs eagerly."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return int(counter.get_total_flops())


def product_rate(device: torch.device | str, dtype: torch.dtype, side: int | None = None) -> float:
    """Floating-point operations a second of the product of two square matrices, the best of several."""
    side = side or (8192 if torch.device(device).type == "cuda" else 2048)
    a = torch.randn(side, side, device=device).to(dtype)
    best = math.inf
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        torch.mm(a, a)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def shares(counted: Mapping[str, int], turns: Turns, rate: float) -> dict[str, float]:
    """Way -> the share of `rate` (operations a second) that its median time reaches."""
    return {way: count / turns.median(way) / rate for way, count in counted.items()}


def compared_in_float32(args: argparse.Namespace, measure_all: Callable[[argparse.Namespace], Any]) -> Any:
    """What `measure_all` finds in float32, in one round of at most three steps; None if the arguments say float32."""
    bf16 = (args.dtype or ("bf16" if torch.device(args.device).type == "cuda" else "fp32")) != "fp32"
    if not bf16:
        return None
    changes: dict[str, Any] = {"dtype": "fp32", "rounds": 1, "warm_up": 1}
    if hasattr(args, "compiled"):
        changes["compiled"] = False
    if hasattr(args, "steps"):
        changes["steps"] = min(args.steps, 3)
    print("in float32, for the outputs:")
    with without_tf32():
        made = measure_all(argparse.Namespace(**{**vars(args), **changes}))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print("timed:")
    return made


@contextmanager
def without_tf32() -> Iterator[None]:
    """A block in which convolutions on CUDA do not round float32 to 10 bits, which is the default."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def synchronise(device: torch.device | str) -> None:
    """Synchronise an accelerator."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference of two tensors."""
    return (a.detach().float() - b.detach().float()).abs().max().item()


def loss_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference of two curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def compared_steps(turns: Turns) -> dict[str, Any]:
    """Training steps of the ways `ours` and `reference`, which returned their losses: pace, ratio, losses compared."""
    return {
        "seconds_a_step": turns.times(),
        "steps_a_second": {way: 1 / turns.median(way) for way in turns.seconds},
        "reference_to_ours": turns.ratio("reference", "ours"),
        "losses": turns.outputs,
        "largest_difference_of_losses": loss_difference(turns.outputs["ours"], turns.outputs["reference"]),
    }


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, accelerator and versions."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "controlkit": __version__,
    }
    facts["environment"] = {name: os.environ[name] for name in _SURROUNDINGS if name in os.environ}
    if torch.device(device).type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    return facts


def processor() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def parser(description: str | None, *, rounds: int, dtype: bool = True) -> argparse.ArgumentParser:
    """The arguments that every benchmark of a base has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano", help="nano, a folder, or with --random-weights sd15, sd21, sdxl")
    parser.add_argument("--random-weights", action="store_true", help="a known base with random weights")
    parser.add_argument("--size", type=int, default=None, help="side of the images in pixels (default: the base's)")
    parser.add_argument("--device", default="cpu")
    if dtype:
        parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: bf16 on CUDA, else fp32")
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds")
    parser.add_argument("--warm-up", type=int, default=1, help="untimed rounds before them; on CUDA until times settle")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file (default: in benchmarks/results)")
    return parser


def base_of(args: argparse.Namespace) -> Base:
    """The base and dtype of the arguments."""
    args.dtype = args.dtype or ("bf16" if torch.device(args.device).type == "cuda" else "fp32")
    if args.random_weights and torch.device(args.device).type == "cuda":
        with torch.device(args.device):  # where a billion random numbers take no time
            return random_base(args.base, DTYPES[args.dtype]).to(args.device)
    return load_base(args.base, device=args.device, dtype=DTYPES[args.dtype], random_weights=args.random_weights)


def base_in_float32(args: argparse.Namespace) -> tuple[Base, bool]:
    """The base with float32 weights, for training, and whether the arithmetic is bf16."""
    dtype = args.dtype or ("bf16" if torch.device(args.device).type == "cuda" else "fp32")
    args.dtype = "fp32"
    base = base_of(args)
    args.dtype = dtype
    return base, dtype == "bf16"


@contextmanager
def unfolded() -> Iterator[None]:
    """A block in which layers add a LoRA's product, as the reference does, and never make W + up @ down."""
    before, lora._FOLD_RATIO = lora._FOLD_RATIO, math.inf
    try:
        yield
    finally:
        lora._FOLD_RATIO = before


@contextmanager
def latents_alone(base: Base) -> Iterator[None]:
    """What `base` draws stays a latent; the sampler's change of range, y = (z + 1) / 2, applies to it."""
    base.decode = lambda z: z  # type: ignore[method-assign]
    try:
        yield
    finally:
        del base.decode


def finish(name: str, args: argparse.Namespace, cases: Sequence[Mapping[str, Any]], **more: Any) -> Path:
    """Write the cases with setting and machine as JSON; returns where.

    Args:
        name: of the benchmark, which its file starts with.
        more: other parts of the file.
    """
    path = _file(name, args)
    _write(path, name, args, cases, **more)
    _partial(path).unlink(missing_ok=True)
    print(f"\nwritten to {path}")
    return path


def so_far(name: str, args: argparse.Namespace, cases: Sequence[Mapping[str, Any]]) -> None:
    """Write the cases that are finished beside the file of `--out`, which `finish` puts in their place."""
    if args.out is not None:
        _write(_partial(Path(args.out)), name, args, cases)


def _file(name: str, args: argparse.Namespace) -> Path:
    device, base = getattr(args, "device", "cpu"), Path(str(getattr(args, "base", "nano"))).name
    parts = [name, base, getattr(args, "size", None), torch.device(device).type]
    return Path(args.out or RESULTS / ("-".join(str(part) for part in parts if part) + ".json"))


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial.json")


def _write(path: Path, name: str, args: argparse.Namespace, cases: Sequence[Mapping[str, Any]], **more: Any) -> None:
    setting = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "out"
    }
    on = machine(getattr(args, "device", "cpu"))
    write_json(path, {"benchmark": name, "setting": setting, "machine": on, "cases": cases, **more})


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An aligned Markdown table."""
    texts = [[cell(value) for value in row] for row in rows]
    widths = [max(len(row[place]) for row in [list(columns), *texts]) for place in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"

    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(columns), ruler, *map(line, texts)])


def cell(value: Any) -> str:
    """A table cell; a median with its spread."""
    if isinstance(value, Mapping):
        return f"{value['median']:.3g} ({value['lowest']:.3g} to {value['highest']:.3g})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
