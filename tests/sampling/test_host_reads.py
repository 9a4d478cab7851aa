"""The denoising loop never waits for the device: no number of a tensor on it reaches Python."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from fake_control import FakeControl
from host_reads import HostReads

import tiny
from controlkit.bases.schedules.solvers import FLOW_SOLVERS, _WithoutWaiting
from controlkit.controls.control import Acts, Reads
from controlkit.controls.hints import map_hint
from controlkit.controls.inputs import encode_images
from controlkit.controls.registry import find
from controlkit.sampling.plan import ActiveControl, Plan
from controlkit.sampling.request import SAMPLERS
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample
from controlkit.sampling.start_image import StartImage
from tiny import (
    OF_TRANSFORMERS,
    build_tiny_flux,
    build_tiny_flux2,
    build_tiny_qwen_image,
    build_tiny_sana,
    build_tiny_sd3,
    build_tiny_z_image,
    tiny_of_known,
)

SETTINGS = {"prompt": "red apple", "seeds": [3, 4], "steps": 3, "guidance": 3.0}


def reads_of_loop(base, **changes) -> list[str]:
    """Host reads between the first and the last step of each batch, on the meta device."""
    found: list[str] = []
    with HostReads() as watched:

        def on_step(step):
            if step.step > 1:
                found.extend(watched.reads)
            watched.reads.clear()

        list(sample(base, on_step=on_step, **{**SETTINGS, **changes}))
    return found


@pytest.fixture
def on_meta(sd1_scheduled_base, tiny_control):
    """A base and a control without data."""
    base, control = copy.deepcopy((sd1_scheduled_base, tiny_control))
    base.to("meta")
    control.to("meta")
    return base, ActiveControl(control, control.encode(torch.zeros(1, 3, 64, 64), base), weight=0.8, end=0.7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_reads_the_device(sampler, on_meta):
    base, _ = on_meta
    assert reads_of_loop(base, sampler=sampler) == []


@pytest.mark.parametrize(
    "build",
    [build_tiny_sd3, build_tiny_flux, build_tiny_z_image, build_tiny_qwen_image, build_tiny_flux2, build_tiny_sana],
)
@pytest.mark.parametrize("sampler", FLOW_SOLVERS)
def test_no_step_of_a_rectified_flow_reads_the_device(sampler, build):
    assert reads_of_loop(build().to("meta"), sampler=sampler) == []


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "euler", "plms"])
def test_no_step_of_inpainting_reads_the_device(sampler, on_meta):
    base, use = on_meta
    start = StartImage(pixels=torch.zeros(1, 3, 64, 64), strength=0.9, mask=torch.ones(1, 1, 64, 64))
    assert reads_of_loop(base, sampler=sampler, uses=[use], start=start) == []


@pytest.mark.parametrize("kind", [name for name, each in tiny.unet_systems().items() if each.companion is None])
def test_no_control_reads_the_device(kind, sd1_scheduled_base):
    base = copy.deepcopy(sd1_scheduled_base)
    options = {"size_ratio": 0.5} if Acts.TAPS in tiny.unet_systems()[kind].acts else {}
    control = tiny.unet_systems()[kind].for_base(base, **options).eval().requires_grad_(False)
    inputs = [each for each in control.inputs if each.kind == "image"]
    if [each.name for each in control.inputs] != ["image"] or len(inputs) != 1:
        pytest.skip("has named inputs")
    hint = control.encode(torch.zeros(1, 3, 64, 64), base)
    base.to("meta")
    control.to("meta")
    use = ActiveControl.in_mode(
        "control", base, control=control, hint=map_hint(hint, lambda tensor: tensor.to("meta")), weight=0.5
    )
    assert reads_of_loop(base, uses=[use]) == []


@pytest.mark.parametrize("system", OF_TRANSFORMERS)
def test_no_control_of_a_transformer_reads_the_device(system):
    base = tiny_of_known(OF_TRANSFORMERS[system])
    control = find(system).for_base(base).eval().requires_grad_(False)
    hint = encode_images(control, torch.zeros(1, 3, 64, 64), base).to("meta")
    base.to("meta")
    assert reads_of_loop(base, uses=[ActiveControl(control.to("meta"), hint, weight=0.5)], sampler="euler") == []


def test_a_read_is_noticed(on_meta):
    base, _ = on_meta

    class Reading(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.config, self.device, self.dtype = network, network.config, network.device, network.dtype

        def forward(self, x_t, t, *args, **kwargs):
            return self.network(x_t, float(t), *args, **kwargs)

    base.unet = Reading(base.unet)
    assert reads_of_loop(base) == ["item"] * 2


@pytest.mark.parametrize("reads", [Reads.TIME, Reads.TIME | Reads.TEXT, Reads.TEXT])
def test_the_cache_hashes_before_the_first_step(reads, on_meta):
    base, _ = on_meta
    use = ActiveControl(FakeControl(reads).to("meta"), torch.ones(1, 1, device="meta"), end=0.7)
    watched = HostReads()
    with watched:
        plan = Plan(
            [use], base.schedule.solver("ddim", 5, "meta", "").timesteps, [base.encode_text([""])], ResidualCache()
        )
        assert "copy to the CPU" in watched.reads
        watched.reads.clear()
        for index in range(5):
            plan.residuals(index, torch.zeros(1, 4, 16, 16, device="meta"))
    assert watched.reads == []


@pytest.mark.parametrize("sampler", ["unipc", "euler-a", "ddpm", "lcm", "dpm2-a", "dpm++-2m-sde"])
def test_steps_that_do_not_wait_give_the_same_latents(sampler, sd1_scheduled_base):
    """What CUDA devices get; on the CPU it runs all the same."""
    x_t, *predictions = torch.randn(6, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def latents(context):
        solver = sd1_scheduled_base.schedule.solver(sampler, 5, "cpu", "tiny")
        solver.begin(0, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
        after = x_t
        for index in range(len(solver.timesteps)):
            with context():
                after = solver.step(predictions[index % 5], after, index)
        return after

    assert torch.equal(latents(lambda: _WithoutWaiting(torch.device("cpu"))), latents(nullcontext))
