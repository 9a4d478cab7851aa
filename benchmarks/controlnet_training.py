"""A step of training a ControlNet: ours against what diffusers' example script does at each step.

    python benchmarks/controlnet_training.py
    python benchmarks/controlnet_training.py --base sd15 --random-weights --size 256 --batch 1 --rounds 3
    python benchmarks/controlnet_training.py --base sd15 --random-weights --device cuda --batch 4

The script (huggingface/diffusers, examples/controlnet/train_controlnet.py) encodes images and prompts at each step,
runs ControlNet and UNet, whose weights are frozen, takes the mean squared error, clips the gradient's norm, and steps
AdamW. Ours does the same from latents and embeddings that were computed once, with a fused optimiser. Both start from
the same weights and draw the same noise and times; the script's latents are here the mode of the posterior, not a
sample of it, so that the losses can be compared, which they are, at every step.
"""

from __future__ import annotations

import argparse
from typing import Any

import measure
import torch
from adapter_training import measured_steps, report
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.text import Text, token_ids
from controlkit.controls.controlnet import ControlNet
from controlkit.training.diffusion import noised
from controlkit.training.graphs import Graphs
from controlkit.training.objective import torch_generator

RATE = 1e-5
CLIP = 1.0


class Ours:
    """A step as `training/pairs.py` and the training loop take it."""

    def __init__(self, base: Base, *, bf16: bool = False, graphs: str = "auto") -> None:
        self.base = base
        self.bf16 = bf16
        self.graphs = Graphs(graphs, base.device, bf16=bf16)
        self.predict = self.graphs.base(base)
        self.control = fresh(base)
        self.schedule = base.schedule
        self.parameters = self.control.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)

    def step(self, number: int, z: Tensor, condition_images: Tensor, text: Text) -> float:
        """One optimiser step from latents, condition images and embeddings; returns its loss."""
        noisy = noised(self.schedule, z, torch_generator(0, number), len(z), slice(None))
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            residuals = self.control(noisy.x_t, noisy.t, text, self.control.encode(condition_images, self.base))
            loss = noisy.loss(self.predict(noisy.x_t, noisy.t, text, residuals))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return float(loss.detach())


class Script:
    """A step as diffusers' example script takes it, with diffusers' networks alone.

    Args:
        compiled: both networks by `torch.compile`.
    """

    def __init__(self, base: Base, *, bf16: bool = False, compiled: bool = False) -> None:
        self.base = base
        self.bf16 = bf16
        self.network = fresh(base).to_diffusers().train().requires_grad_(True)
        self.unet = torch.compile(base.unet) if compiled else base.unet
        self.called = torch.compile(self.network) if compiled else self.network
        self.schedule = base.schedule
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE)

    def step(self, number: int, images: Tensor, condition_images: Tensor, ids: Tensor) -> float:
        """One optimiser step from images in [-1, 1], condition images and token ids; returns its loss."""
        vae, unet = self.base.vae, self.unet
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            z = vae.encode(images).latent_dist.mode().float() * vae.config.scaling_factor
            embedded = self.base.text_encoder(ids)[0]
            noisy = noised(self.schedule, z, torch_generator(0, number), len(z), slice(None))
            down, mid = self.called(
                noisy.x_t, noisy.t, encoder_hidden_states=embedded, controlnet_cond=condition_images, return_dict=False
            )
            predicted = unet(
                noisy.x_t,
                noisy.t,
                encoder_hidden_states=embedded,
                down_block_additional_residuals=down,
                mid_block_additional_residual=mid,
            ).sample
            loss = nn.functional.mse_loss(predicted.float(), noisy.target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def fresh(base: Base) -> ControlNet:
    """A new ControlNet, the same every time; its last zero convolutions are a little above zero, so that all of it
    trains from the first step on."""
    torch.manual_seed(0)
    control = ControlNet.for_base(base).train().requires_grad_(True)
    with torch.no_grad():
        for module in (*control.network.controlnet_down_blocks, control.network.controlnet_mid_block):
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.01)
    return control


def measure_steps(
    base: Base,
    *,
    size: int,
    batch: int,
    rounds: int,
    warm_up: int,
    bf16: bool = False,
    graphs: str = "auto",
    compiled: bool = False,
) -> dict[str, Any]:
    """Seconds a step of both, their ratio, and how far their losses are apart."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, size, size, generator=generator).to(base.device) * 2 - 1
    condition_images = torch.rand(batch, 3, size, size, generator=generator).to(base.device)
    prompts = [f"thing {number}" for number in range(batch)]
    ids = token_ids(base.tokenizer, prompts).to(base.device)
    z, text = base.encode_image(images), base.encode_text(prompts, (size, size))
    own, script = Ours(base, bf16=bf16, graphs=graphs), Script(base, bf16=bf16)
    ways = {
        "ours": lambda number: own.step(number, z, condition_images, text),
        "reference": lambda number: script.step(number, images, condition_images, ids),
    }
    if compiled:
        fast = Script(base, bf16=bf16, compiled=True)
        ways["compiled"] = lambda number: fast.step(number, images, condition_images, ids)
    return measured_steps(ways, own, rounds=rounds, warm_up=warm_up)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """The case that the arguments describe; weights are float32, bf16 is autocast over them, in both."""
    base, bf16 = measure.base_in_float32(args)
    args.size = args.size or base.size
    settings = {"size": args.size, "batch": args.batch, "rounds": args.rounds, "warm_up": args.warm_up}
    settings |= {"graphs": args.graphs, "compiled": args.compiled}
    return measure_steps(base, **settings, bf16=bf16)


def main() -> None:
    """Measure, print, write."""
    parser = measure.parser(__doc__, rounds=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--graphs", default="auto", help="of ours: auto, on or off")
    parser.add_argument("--compiled", action="store_true", help="the script with torch.compile, too")
    args = parser.parse_args()
    float32 = measure.compared_in_float32(args, measure_all)
    report("controlnet_training", args, measure_all(args), "diffusers' script", float32)


if __name__ == "__main__":
    main()
