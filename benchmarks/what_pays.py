"""Switches that might make things faster, each against the same work without it, with outputs compared.

    python benchmarks/what_pays.py
    python benchmarks/what_pays.py --base sd15 --random-weights --size 256 --batch 1 --rounds 3
    python benchmarks/what_pays.py --base sd15 --random-weights --device cuda --batch 4

- channels_last: the UNet's weights and the latents in that memory format, one call under guidance;
- bf16: the same call with weights and latents in bf16;
- torch.compile: the same call compiled (with `--compiled`; compiling is not in the time);
- bf16 steps: a forward and backward pass of the UNet under autocast, as training does it, over weights in float32;
- fp32 attention in bf16 steps (on the CPU): the same, against autocast's attention;
- guidance in one batch: both halves in one call, against one call for each;
- LoRA folded: one CtrLoRA condition whose layers make W + up @ down for the call where that is less work, against
  layers that always add the LoRA's product;
- fused optimiser: AdamW's step on the weights of a ControlNet, against torch's default.

"without / with" above 1 means that it pays.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import measure
import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import BaseControlNet
from controlkit.training.precision import attention_precision


def inputs(base: Base, size: int, rows: int) -> tuple[Tensor, Tensor, Text]:
    """Random latents, times and texts."""
    generator = torch.Generator().manual_seed(0)
    side = size // base.factor
    x = torch.randn(rows, base.latent_channels, side, side, generator=generator).to(base.device, base.dtype)
    text = base.encode_text([f"thing {number}" for number in range(rows)], (size, size))
    return x, torch.full((rows,), 500, device=base.device), text.map(lambda part: part.to(base.dtype))


def unet_switches(base: Base, size: int, batch: int, compiled: bool) -> dict[str, tuple[Any, Any]]:
    """Switch -> the call without it, and with it."""
    x, t, text = inputs(base, size, 2 * batch)

    def plain(_: int) -> Tensor:
        return base.predict(x, t, text)

    last = copy.deepcopy(base.unet).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    half = copy.deepcopy(base.unet)
    torch.nn.Module.to(half, torch.bfloat16)
    x_half, text_half = x.bfloat16(), text.map(lambda part: part.bfloat16())

    def halves(_: int) -> Tensor:
        parts = [slice(0, batch), slice(batch, 2 * batch)]
        return torch.cat([base.predict(x[part], t[part], text.map(lambda y: y[part])) for part in parts])  # noqa: B023

    switches: dict[str, tuple[Any, Any]] = {
        "channels_last": (plain, lambda _: last(x_last, t, **unet_inputs(text), return_dict=False)[0]),
        "bf16": (plain, lambda _: half(x_half, t, **unet_inputs(text_half), return_dict=False)[0]),
        "guidance in one batch": (halves, plain),
    }
    if compiled:
        fast = torch.compile(base.unet)
        switches["torch.compile"] = (plain, lambda _: fast(x, t, **unet_inputs(text), return_dict=False)[0])
    return switches


def step_switches(base: Base, size: int, batch: int) -> dict[str, tuple[Any, Any]]:
    """Switch -> passes forward and backward without it, and with it; the gradient of the first layer's weight."""
    x, t, text = inputs(base, size, batch)
    unet = copy.deepcopy(base.unet).float().requires_grad_(True).train()
    first = next(unet.parameters())

    def passes(*, bf16: bool, suited: bool) -> Callable[[int], Tensor]:
        def step(_: int) -> Tensor:
            unet.zero_grad()
            with attention_precision(base.device, bf16=bf16 and suited):
                with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
                    made = unet(x.float(), t, **unet_inputs(text), return_dict=False)[0]
                made.float().square().mean().backward()
            assert first.grad is not None
            return first.grad.clone()

        return step

    in_bf16 = passes(bf16=True, suited=True)
    switches: dict[str, tuple[Any, Any]] = {"bf16 steps": (passes(bf16=False, suited=True), in_bf16)}
    if base.device.type == "cpu":
        switches["fp32 attention in bf16 steps"] = (passes(bf16=True, suited=False), in_bf16)
    return switches


def folded(base: Base, size: int, batch: int, rank: int) -> tuple[Any, Any]:
    """A pass of one adapter that is added in every layer, and one that is folded where that is less work."""
    generator = torch.Generator().manual_seed(0)
    shared = BaseControlNet.for_base(base).eval()
    adapter = shared.add_adapter("one", rank, seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01)
    shared.select("one")
    x, t, text = inputs(base, size, 2 * batch)

    def call(_: int) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in shared(None, t, text, x).tensors()])

    def added(_: int) -> Tensor:
        with measure.unfolded():
            return call(_)

    return added, call


def optimisers(base: Base) -> tuple[Any, Any]:
    """AdamW's step on a ControlNet's weights: torch's default, and fused."""

    def of(**settings: Any) -> Callable[[int], Tensor]:
        torch.manual_seed(0)
        parameters = ControlNet.for_base(base).trainable_parameters()
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, **settings)

        def step(_: int) -> Tensor:
            optimizer.step()
            return parameters[0]

        return step

    return of(), of(fused=True)


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every switch."""
    base = measure.base_of(args)
    args.size = size = args.size or base.size
    rows = []

    def compare(name: str, without: Any, switched: Any) -> None:
        if args.only and name not in args.only:
            return
        print(f"{name} ...", flush=True)
        ways = {"without": without, "with": switched}
        turns = measure.take_turns(ways, args.rounds, device=base.device, warm_up=args.warm_up)
        plain, other = (turns.outputs[way][-1] for way in ways)
        rows.append(
            {
                "switch": name,
                "seconds": turns.times(),
                "without_to_with": turns.ratio("without", "with"),
                "largest_relative_difference": measure.largest_difference(plain, other) / plain.abs().max().item(),
            }
        )
        measure.so_far("what_pays", args, rows)

    with torch.inference_mode():
        for name, (without, switched) in unet_switches(base, size, args.batch, args.compiled).items():
            compare(name, without, switched)
        if not args.only or "LoRA folded" in args.only:
            compare("LoRA folded", *folded(base, size, args.batch, args.rank))
    for name, (without, switched) in step_switches(base, size, args.batch).items():
        compare(name, without, switched)
    if not args.only or "fused optimiser" in args.only:
        compare("fused optimiser", *optimisers(base))
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = measure.parser(__doc__, rounds=9)
    parser.add_argument("--batch", type=int, default=4, help="images; calls under guidance have twice as many rows")
    parser.add_argument("--rank", type=int, default=128, help="of the LoRA that is folded")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, which takes minutes to compile")
    parser.add_argument("--only", nargs="+", metavar="SWITCH", help="of those above by name, such as bf16")
    args = parser.parse_args()
    rows = measure_all(args)
    cells = [
        [
            row["switch"],
            row["seconds"]["without"]["median"],
            row["seconds"]["with"]["median"],
            row["without_to_with"],
            row["largest_relative_difference"],
        ]
        for row in rows
    ]
    print(measure.table(["switch", "without s", "with s", "without / with", "difference"], cells))
    measure.finish("what_pays", args, rows)


if __name__ == "__main__":
    main()
