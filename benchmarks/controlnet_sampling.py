"""Sampling with a ControlNet: ours against diffusers' StableDiffusionControlNetPipeline, on the same weights and seeds.

    python benchmarks/controlnet_sampling.py
    python benchmarks/controlnet_sampling.py --base sd15 --random-weights --size 256 --steps 4 --rounds 3
    python benchmarks/controlnet_sampling.py --base sd15 --random-weights --device cuda --seeds 4 --rounds 5

Both run DDIM with guidance in one batch of two halves, from the same noise. Three cases, each like with like:

- always: the control acts at every step;
- first half: it ends at half of the steps. The pipeline runs it to the end and multiplies by 0; ours does not run it;
- conditional half: the control acts on the half of guidance that has the prompt, in diffusers called `guess_mode`,
  which also weights the residuals from 0.1 at the outermost to 1 in the middle; so does ours here.

Timed from the prompt and the condition image to the last latent. Decoding is the same code in both and is left out of
the times; the images are compared.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import measure
import torch
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.controls.controlnet import ControlNet
from controlkit.evaluation.sets import evaluation_set
from controlkit.formats.load import load_control
from controlkit.images import to_tensor
from controlkit.sampling.graphs import NetworkCalls
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample

GUIDANCE = 4.0


def shipped(base: Base) -> tuple[ControlNet, Tensor, str]:
    """The ControlNet that ships, the edges of a held-out image, and its caption."""
    drawing = evaluation_set("held-out").examples[0]
    control = load_control("canny", base)
    assert isinstance(control, ControlNet)
    return control, to_tensor([conditions.find("canny")(drawing.image)]).to(base.device), drawing.caption


def made_up(base: Base, size: int) -> tuple[ControlNet, Tensor, str]:
    """A ControlNet whose zero convolutions have random weights, and a random condition image."""
    torch.manual_seed(0)
    control = ControlNet.for_base(base).eval().requires_grad_(False)
    zero = (*control.network.controlnet_down_blocks, control.network.controlnet_mid_block)
    with torch.no_grad():
        for parameter in (parameter for module in zero for parameter in module.parameters()):
            parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return control, torch.rand(1, 3, size, size).to(base.device), "a red apple on a table"


def pipeline_of(base: Base, control: ControlNet) -> StableDiffusionControlNetPipeline:
    """diffusers' pipeline on the same weights, in the same memory."""
    pipeline = StableDiffusionControlNetPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=control.to_diffusers(),
        scheduler=DDIMScheduler.from_config(base.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cases_of(layers: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Case -> settings of our `ActiveControl`, settings of the pipeline."""
    weights = tuple(torch.logspace(-1, 0, layers).tolist())
    return {
        "always": ({}, {}),
        "first half": ({"end": 0.5}, {"control_guidance_end": 0.5}),
        "conditional half": ({"weight": weights, "conditional_only": True}, {"guess_mode": True}),
    }


def compiled_ratio(turns: measure.Turns) -> dict[str, Any]:
    """The compiled pipeline to ours, if it ran."""
    name = "diffusers, compiled"
    return {"compiled_to_ours": turns.ratio(name, "ours")} if name in turns.seconds else {}


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case."""
    base = measure.base_of(args)
    args.size = size = args.size or base.size
    control, image, prompt = made_up(base, size) if args.random_weights else shipped(base)
    pipeline = pipeline_of(base, control)
    compiled_pipeline = pipeline_of(base, control) if args.compiled else None
    if compiled_pipeline is not None:
        compiled_pipeline.unet = torch.compile(compiled_pipeline.unet)
        compiled_pipeline.controlnet = torch.compile(compiled_pipeline.controlnet)
    layers = len(control.network.controlnet_down_blocks) + 1

    reports: dict[str, Any] = {}

    def ours(number: int, acting: dict[str, Any], mode: str = args.graphs) -> Tensor:
        calls = NetworkCalls(base, mode)
        use = ActiveControl(control, control.encode(image, base), **acting)
        wanted = range(1000 * number, 1000 * number + args.seeds)
        settings = {"width": size, "height": size, "steps": args.steps, "guidance": GUIDANCE, "calls": calls}
        with measure.latents_alone(base):
            latents = list(sample(base, prompt=prompt, seeds=wanted, uses=[use], **settings))
        reports["ours"] = calls.report.to_json()
        return torch.cat(latents) * 2 - 1

    def pipeline_latents(number: int, settings: dict[str, Any], pipeline: Any = pipeline) -> Tensor:
        wanted = range(1000 * number, 1000 * number + args.seeds)
        return pipeline(
            [prompt] * args.seeds,
            image=image.expand(args.seeds, -1, -1, -1),
            negative_prompt=[""] * args.seeds,
            generator=[torch.Generator().manual_seed(seed) for seed in wanted],
            num_inference_steps=args.steps,
            guidance_scale=GUIDANCE,
            width=size,
            height=size,
            output_type="latent",
            **settings,
        ).images

    cases = []
    for name, (own_settings, pipeline_settings) in cases_of(layers).items():
        print(f"{name} ...", flush=True)
        ways = {
            "ours": lambda number, settings=own_settings: ours(number, settings),
            "diffusers": lambda number, pipeline_settings=pipeline_settings: pipeline_latents(
                number, pipeline_settings
            ),
        }
        if args.compiled:
            ways["diffusers, compiled"] = partial(
                pipeline_latents, settings=pipeline_settings, pipeline=compiled_pipeline
            )
        with torch.inference_mode():
            turns = measure.take_turns(ways, args.rounds, device=base.device, warm_up=args.warm_up)
            images = {way: (base.decode(made[-1]) + 1) / 2 for way, made in turns.outputs.items()}
            ran = dict(reports)
            counted = {way: measure.operations(partial(run, 0)) for way, run in ways.items() if way != "ours"}
            counted["ours"] = measure.operations(partial(ours, 0, own_settings, "off"))
            rate = measure.product_rate(base.device, base.dtype)
            without = (base.decode(ours(len(turns.outputs["ours"]) - 1, {"weight": 0.0})) + 1) / 2
        cases.append(
            {
                "case": name,
                "seconds": turns.times(),
                "network_calls": ran,
                "product_rate": rate,
                "share_of_rate": measure.shares(counted, turns, rate),
                "diffusers_to_ours": turns.ratio("diffusers", "ours"),
                **compiled_ratio(turns),
                "largest_difference_of_images": measure.largest_difference(images["ours"], images["diffusers"]),
                "largest_change_by_control": measure.largest_difference(images["ours"], without),
            }
        )
        measure.so_far("controlnet_sampling", args, cases)
    return cases


def main() -> None:
    """Measure, print, write."""
    parser = measure.parser(__doc__, rounds=9)
    parser.add_argument("--seeds", type=int, default=1, help="images at once")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--graphs", default="auto", help="of ours: auto, on or off")
    parser.add_argument("--compiled", action="store_true", help="the pipeline with torch.compile, too")
    args = parser.parse_args()
    float32 = measure.compared_in_float32(args, measure_all)
    cases = measure_all(args)
    rows = [
        [
            case["case"],
            case["seconds"]["ours"]["median"],
            case["seconds"]["diffusers"]["median"],
            case["diffusers_to_ours"],
            case["largest_difference_of_images"],
            case["largest_change_by_control"],
        ]
        for case in cases
    ]
    columns = ["case", "ours s", "diffusers s", "diffusers / ours", "difference", "change by the control"]
    print(measure.table(columns, rows))
    more = {} if float32 is None else {"float32": float32}
    for case in float32 or ():
        print(f"{case['case']}, in float32: difference {case['largest_difference_of_images']:.2g}")
    measure.finish("controlnet_sampling", args, cases, **more)


if __name__ == "__main__":
    main()
