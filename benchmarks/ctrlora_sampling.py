"""What CtrLoRA conditions cost while sampling: the plan, what the reference does, and no control at all.

    python benchmarks/ctrlora_sampling.py
    python benchmarks/ctrlora_sampling.py --base sd15 --random-weights --size 256 --steps 2 --rounds 3
    python benchmarks/ctrlora_sampling.py --base sd15 --random-weights --device cuda --steps 20 --rounds 5

For one and two conditions, and one and four seeds, the same images in four ways, in turns:

- base: no control at all;
- reference: as xyfJASON/ctrlora does (cldm/cldm_ctrlora_inference.py), every condition image goes through the
  autoencoder, and the control runs, at every step, for both halves of guidance, for every image and every condition;
- plan: the residuals of all steps are computed before sampling, once for all images;
- again: the plan a second time with other seeds, its residuals kept from the call before.

Timed is the denoising of `--steps` steps. Prompts, hints (once, in ours) and images (decoding) cost the same however
many steps there are; they are timed by themselves, and the last columns count a whole image of 20 steps from the
parts. Outputs are latents, of about unit variance.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import measure
import torch
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.controls.control import Control, Reads
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.evaluation.sets import evaluation_set
from controlkit.formats.load import load_control
from controlkit.images import to_tensor
from controlkit.sampling.graphs import NetworkCalls
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample

SHIPPED = ("nano/palette", "nano/canny")
WHOLE = 20
"""Steps of a whole image."""


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
        with measure.unfolded():
            return super().forward(x_t, t, text, super().encode(hint.expand(len(x_t), -1, -1, -1), self.base))


def shipped(base: Base, names: Sequence[str]) -> tuple[list[CtrLoRA], list[Tensor], str]:
    """Adapters by name, condition images of a held-out image, and its caption."""
    shared: dict[str, Control] = {}
    drawing = evaluation_set("held-out").examples[0]
    controls, images = [], []
    for name in names:
        control = load_control(name, base, shared=shared)
        if not isinstance(control, CtrLoRA):
            raise SystemExit(f"{name} is no CtrLoRA adapter")
        kind = conditions.find(control.condition or "identity")
        controls.append(control)
        images.append(to_tensor([kind(drawing.image)]).to(base.device))
    return controls, images, drawing.caption


def made_up(base: Base, count: int, size: int, rank: int) -> tuple[list[CtrLoRA], list[Tensor], str]:
    """As many adapters with random weights, and random condition images."""
    generator = torch.Generator().manual_seed(0)
    shared = BaseControlNet.for_base(base)
    controls, images = [], []
    for number in range(count):
        adapter = shared.add_adapter(str(number), rank, seed=number)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01)
        controls.append(CtrLoRA(shared, str(number)).eval())
        images.append(torch.rand(1, 3, size, size, generator=generator).to(base.device))
    return controls, images, "a red apple on a table"


@contextmanager
def prompts_once(base: Base) -> Iterator[None]:
    """Every prompt is encoded once."""
    encode = base.encode_text
    kept = cache(lambda prompts, *settings: encode(prompts, *settings))
    base.encode_text = lambda prompts, *settings: kept(tuple(prompts), *settings)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del base.encode_text


def measure_case(
    base: Base,
    controls: Sequence[CtrLoRA],
    images: Sequence[Tensor],
    prompt: str,
    *,
    seeds: int,
    size: int,
    steps: int,
    rounds: int,
    warm_up: int = 1,
    graphs: str = "auto",
) -> dict[str, Any]:
    """Seconds of the four ways, ratios, and how far their latents are apart."""
    kept = ResidualCache(megabytes=4096)
    reports: dict[str, Any] = {}
    hints = [control.encode(image, base) for control, image in zip(controls, images, strict=True)]
    planned = [ActiveControl(control, hint) for control, hint in zip(controls, hints, strict=True)]
    each = [ActiveControl(EveryStep(c, base), image) for c, image in zip(controls, images, strict=True)]

    def draw(way: str, number: int, mode: str = graphs) -> Tensor:
        uses = {"base": [], "reference": each}.get(way, planned)
        # The reference's own code captures no graphs.
        calls = NetworkCalls(base, "off" if way == "reference" else mode)
        wanted = range(1000 * number, 1000 * number + seeds)
        settings = {"width": size, "height": size, "steps": steps, "cache": kept if way == "again" else None}
        latents = list(sample(base, prompt=prompt, seeds=wanted, uses=uses, calls=calls, **settings))
        reports[way] = calls.report.to_json()
        return torch.cat(latents) * 2 - 1

    ways: dict[str, Any] = {way: partial(draw, way) for way in ("base", "reference", "plan", "again")}
    with prompts_once(base), measure.latents_alone(base):
        draw("again", 10**6)
        turns = measure.take_turns(ways, rounds, device=base.device, warm_up=warm_up)
        ran = dict(reports)
        counted = {way: measure.operations(partial(draw, way, 0, "off")) for way in ways}
        rate = measure.product_rate(base.device, base.dtype)
    latents = {way: made[-1] for way, made in turns.outputs.items()}
    fixed = measure.take_turns(
        {
            "prompts": lambda _: [base.encode_text([text], (size, size)) for text in (prompt, "")],
            "hints": lambda _: [c.encode(image, base) for c, image in zip(controls, images, strict=True)],
            "decoding": lambda _: base.decode(latents["plan"]),
        },
        max(1, min(rounds, 3)),
        device=base.device,
        warm_up=min(warm_up, 1),
    )
    image_seconds = {
        "base": _whole(turns, fixed, "base", steps, ["prompts", "decoding"]),
        "reference": _whole(turns, fixed, "reference", steps, ["prompts", "decoding"]),
        "plan": _whole(turns, fixed, "plan", steps, ["prompts", "hints", "decoding"]),
        "again": _whole(turns, fixed, "again", steps, ["prompts", "decoding"]),
    }
    return {
        "conditions": len(controls),
        "seeds": seeds,
        "seconds": turns.times(),
        "network_calls": ran,
        "product_rate": rate,
        "share_of_rate": measure.shares(counted, turns, rate),
        "reference_to_plan": turns.ratio("reference", "plan"),
        "reference_to_again": turns.ratio("reference", "again"),
        "plan_to_base": turns.ratio("plan", "base"),
        "again_to_base": turns.ratio("again", "base"),
        "seconds_of_fixed_parts": fixed.times(),
        f"counted_for_{WHOLE}_steps": {
            "seconds": image_seconds,
            "reference_to_plan": image_seconds["reference"] / image_seconds["plan"],
            "again_to_base": image_seconds["again"] / image_seconds["base"],
        },
        "largest_difference_to_plan": {
            way: measure.largest_difference(latents[way], latents["plan"]) for way in ("reference", "again")
        },
        "largest_change_by_control": measure.largest_difference(latents["base"], latents["plan"]),
    }


def _whole(turns: measure.Turns, fixed: measure.Turns, way: str, steps: int, parts: Sequence[str]) -> float:
    """Seconds of all images with `WHOLE` steps."""
    return turns.median(way) / steps * WHOLE + sum(fixed.median(part) for part in parts)


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case."""
    base = measure.base_of(args)
    args.size = args.size or base.size
    most = max(args.conditions)
    controls, images, prompt = (
        made_up(base, most, args.size, args.rank) if args.random_weights else shipped(base, args.control or SHIPPED)
    )
    cases = []
    for count in args.conditions:
        for seeds in args.seeds:
            print(f"{count} conditions, {seeds} seeds ...", flush=True)
            settings = {"seeds": seeds, "size": args.size, "steps": args.steps, "rounds": args.rounds}
            chosen = controls[:count], images[:count], prompt
            cases.append(measure_case(base, *chosen, **settings, warm_up=args.warm_up, graphs=args.graphs))
            measure.so_far("ctrlora_sampling", args, cases)
    return cases


def main() -> None:
    """Measure, print, write."""
    parser = measure.parser(__doc__, rounds=9)
    parser.add_argument("--control", action="append", default=None, help="adapters (default: two that ship)")
    parser.add_argument("--rank", type=int, default=128, help="of adapters with random weights")
    parser.add_argument("--conditions", type=int, nargs="+", default=[1, 2], help="how many at once")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4], help="images at once")
    parser.add_argument("--steps", type=int, default=WHOLE)
    parser.add_argument("--graphs", default="auto", help="of ours: auto, on or off")
    args = parser.parse_args()
    float32 = measure.compared_in_float32(args, measure_all)
    cases = measure_all(args)
    rows = []
    for case in cases:
        counted = case[f"counted_for_{WHOLE}_steps"]
        rows.append(
            [
                case["conditions"],
                case["seeds"],
                *(case["seconds"][way]["median"] for way in ("base", "reference", "plan", "again")),
                case["reference_to_plan"],
                case["again_to_base"],
                counted["reference_to_plan"],
                counted["again_to_base"],
                max(case["largest_difference_to_plan"].values()),
            ]
        )
    columns = ["conditions", "seeds", "base s", "reference s", "plan s", "again s", "reference / plan", "again / base"]
    columns += [f"{WHOLE} steps: reference / plan", f"{WHOLE} steps: again / base", "difference"]
    print(measure.table(columns, rows))
    more = {} if float32 is None else {"float32": float32}
    for case in float32 or ():
        print(f"in float32, largest difference: {max(case['largest_difference_to_plan'].values()):.2g}")
    measure.finish("ctrlora_sampling", args, cases, **more)


if __name__ == "__main__":
    main()
