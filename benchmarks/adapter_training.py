"""A step of adapter training: ours against a step that does what the reference does, on the same weights and numbers.

    python benchmarks/adapter_training.py
    python benchmarks/adapter_training.py --base sd15 --random-weights --size 256 --batch 1 --rank 128 --rounds 3
    python benchmarks/adapter_training.py --base sd15 --random-weights --device cuda --batch 1 --rank 128

The reference (xyfJASON/ctrlora, cldm/cldm_ctrlora_finetune.py) encodes the image, the condition image and the prompts
at every step, every weight of the base control and of the UNet's decoder gets a gradient that no one uses, and
activations are computed a second time in the backward pass (its configurations' `use_checkpoint: True`), which costs
time and saves memory; `--no-checkpointing` leaves that out, and compares wasted work alone. Ours reads latents and
embeddings that were computed once, makes gradients for the adapter alone, and has a fused optimiser.
The two take turns; their losses are compared at every step. On CUDA, with `--dtype bf16`, the arithmetic is bf16
(autocast) over float32 weights in both. Peak memory is in benchmarks/memory.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.bases.text import Text
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.training.diffusion import noised
from controlkit.training.graphs import Graphs
from controlkit.training.memory import checkpoint_activations
from controlkit.training.objective import torch_generator

ADAPTER = "measured"
RATE = 1e-4


class Side:
    """A control with a trained adapter, its optimiser, and the inputs of a step."""

    def __init__(self, base: Base, rank: int, *, fused: bool, bf16: bool = False, graphs: str = "off") -> None:
        self.base = base
        self.bf16 = bf16
        self.shared = BaseControlNet.for_base(base)
        generator = torch.Generator().manual_seed(0)
        adapter = self.shared.add_adapter(ADAPTER, rank, seed=0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.01)
        self.shared.train_adapter(ADAPTER)
        self.control = CtrLoRA(self.shared, ADAPTER)
        self.schedule = base.schedule
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=RATE, fused=fused)
        self.graphs = Graphs(graphs, base.device, bf16=bf16)
        self.predict = self.graphs.base(base)

    def step(self, number: int, z: Tensor, hint: Tensor, text: Text) -> float:
        """One optimiser step from latents, hints and embeddings; returns its loss."""
        noisy = noised(self.schedule, z, torch_generator(0, number), len(z), slice(None))
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            residuals = self.control(None, noisy.t, text, hint)
            loss = noisy.loss(self.predict(noisy.x_t, noisy.t, text, residuals))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def as_the_reference(base: Base) -> Base:
    """The same base in the same memory, whose UNet's decoder gets gradients."""
    unet = type(base.unet).from_config(base.unet.config)
    unet.load_state_dict(base.unet.state_dict(), strict=True, assign=True)
    other = StableDiffusion(
        name=base.name,
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        unet=unet,
        scheduler_config=base.scheduler_config,
    )
    other.unet.up_blocks.requires_grad_(True)
    return other


def measure_steps(
    base: Base,
    *,
    size: int,
    batch: int,
    rank: int,
    rounds: int,
    warm_up: int,
    bf16: bool = False,
    checkpointing: bool = True,
    graphs: str = "auto",
) -> dict[str, Any]:
    """Seconds a step of both, their ratio, and how far their losses are apart."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, size, size, generator=generator).to(base.device)
    condition_images = torch.rand(batch, 3, size, size, generator=generator).to(base.device)
    prompts = [f"thing {number}" for number in range(batch)]

    own = Side(base, rank, fused=True, bf16=bf16, graphs=graphs)
    z, hint = base.encode_image(images * 2 - 1), own.control.encode(condition_images, base)
    text = base.encode_text(prompts, (size, size))
    other = Side(as_the_reference(base), rank, fused=False, bf16=bf16)
    other.shared.network.requires_grad_(True)
    if checkpointing:
        checkpoint_activations(other.base, other.control)

    def reference(number: int) -> float:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
            latents = other.base.encode_image(images * 2 - 1).float()
            hints = other.control.encode(condition_images, other.base).float()
            embedded = other.base.encode_text(prompts, (size, size))
        return other.step(number, latents, hints, embedded)

    ways = {"ours": lambda number: own.step(number, z, hint, text), "reference": reference}
    return measured_steps(ways, own, rounds=rounds, warm_up=warm_up)


def measured_steps(ways: dict[str, Any], own: Any, *, rounds: int, warm_up: int) -> dict[str, Any]:
    """`compared_steps` of the ways, with how ours ran, and the share of the machine's rate that the steps reach.

    Args:
        own: with `base`, `bf16`, `graphs` and `predict`: what the way `ours` steps.
    """
    device = own.base.device
    turns = measure.take_turns(ways, rounds, device=device, warm_up=warm_up)
    rate = measure.product_rate(device, torch.bfloat16 if own.bf16 else torch.float32)
    own.predict = own.base.predict  # the operations of a graph are not seen when it is replayed
    counted = {way: measure.operations(lambda run=run: run(0)) for way, run in ways.items()}  # type: ignore[misc]
    return {
        **measure.compared_steps(turns),
        "ours_runs": own.graphs.words,
        "product_rate": rate,
        "share_of_rate": measure.shares(counted, turns, rate),
    }


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """The case that the arguments describe; weights are float32, bf16 is autocast over them, in both."""
    base, bf16 = measure.base_in_float32(args)
    args.size = args.size or base.size
    settings = {"size": args.size, "batch": args.batch, "rank": args.rank, "rounds": args.rounds}
    settings["graphs"] = args.graphs
    return measure_steps(base, **settings, warm_up=args.warm_up, bf16=bf16, checkpointing=args.checkpointing)


def report(
    name: str, args: argparse.Namespace, case: dict[str, Any], reference: str, float32: dict[str, Any] | None = None
) -> None:
    """Print the table and write the file.

    Args:
        float32: from `measure.compared_in_float32`.
    """
    if float32 is not None:
        print(f"largest difference of the losses in float32: {float32['largest_difference_of_losses']:.2g}")
    seconds, rates = case["seconds_a_step"], case["steps_a_second"]
    named = {"ours": "ours", "reference": reference, "compiled": f"{reference}, compiled"}
    rows = [[name, seconds[way], rates[way]] for way, name in named.items() if way in seconds]
    print(measure.table(["step", "seconds", "steps a second"], rows))
    print(f"\n{reference} / ours: {measure.cell(case['reference_to_ours'])}")
    print(f"largest difference of the losses of {len(case['losses']['ours'])} steps:", end=" ")
    print(f"{case['largest_difference_of_losses']:.2g}; ours ran as {case['ours_runs']}")
    measure.finish(name, args, [case], **({} if float32 is None else {"float32": float32}))


def main() -> None:
    """Measure, print, write."""
    parser = measure.parser(__doc__, rounds=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--graphs", default="auto", help="of ours: auto, on or off")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of the reference")
    args = parser.parse_args()
    float32 = measure.compared_in_float32(args, measure_all)
    report("adapter_training", args, measure_all(args), "reference", float32)


if __name__ == "__main__":
    main()
