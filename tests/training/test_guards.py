"""The watch over a loss: no healthy run is stopped, a diverged one is, and a resumed run watches on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_training import Toy, toy_recipe

from controlkit.training.control_objective import ControlObjective
from controlkit.training.diffusion import TIME_BINS
from controlkit.training.guards import LossMonitor
from controlkit.training.recipes import recipes
from controlkit.training.state import load_state
from controlkit.training.trainer import train
from refusals import refused

RUNS = 24
STEPS = 1000
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # Stable Diffusion's


def loss_at(t, kind, steepness):
    """Expected squared error of the noise at time `t`: three families, all near 1 at t = 0 and steep after it."""
    if kind == 0:
        return 0.003 + np.exp(-t / (10 + 60 * steepness))
    if kind == 1:
        return 0.002 + 1 / (1 + (t / (5 + 30 * steepness)) ** 1.5)
    signal = ALPHAS[t] / (1 - ALPHAS[t]) * (0.003 + 0.02 * steepness)
    return 0.002 + signal / (1 + signal)


def simulated(number, steps=STEPS, seed=0):
    """Times and losses `[steps]` of a healthy run at batch size 1: steep in t, and of all sorts of images."""
    rng = np.random.default_rng((seed, number))
    t = rng.integers(1000, size=steps)
    return t, loss_at(t, number % 3, rng.random()) * np.exp(rng.normal(0, 0.6, steps))


def by_time(t, loss):
    """What `Noised.by_time` gives for one sample, whose target has unit power."""
    rows = np.zeros((3, TIME_BINS))
    rows[:, t * TIME_BINS // 1000] = loss, 1.0, 1.0
    return rows.tolist()


def stopped_at(monitor, t, losses, first=0):
    """The first step at which the watch ends the run, or None."""
    for step, (time, loss) in enumerate(zip(t, losses, strict=True), start=first):
        if monitor.has_diverged(float(loss), step, by_time(time, loss)):
            return step
    return None


@pytest.mark.parametrize("number", range(RUNS))
def test_no_healthy_run_at_batch_size_1_is_stopped(number):
    assert stopped_at(LossMonitor(0), *simulated(number)) is None


def test_these_losses_are_as_hard_to_watch_as_they_should_be():
    """Without their times, most of these runs would be stopped: the simulation tells one watch from another."""
    stopped = 0
    for number in range(RUNS):
        monitor = LossMonitor(0)
        stopped += any(monitor.has_diverged(float(loss), step) for step, loss in enumerate(simulated(number)[1]))
    assert stopped > RUNS / 2


def test_a_few_odd_samples_stop_no_run():
    for number in range(RUNS):
        t, losses = simulated(number)
        losses[500:503] *= 1e4
        monitor = LossMonitor(0)
        assert stopped_at(monitor, t, losses) is None
        assert monitor.healthy_step > 900  # and it is calm again afterwards


EXPLOSIONS = {
    "ten times as high": lambda loss, _: loss * 10,
    "rising by a tenth a step": lambda loss, step: loss * 1.1**step,
    "predicts nothing any more": lambda loss, _: np.maximum(loss, 1.0),
    "beyond all bounds": lambda loss, _: loss * 0 + 1e6,
}


@pytest.mark.parametrize("how", EXPLOSIONS)
@pytest.mark.parametrize("onset", [300, 900])
def test_an_explosion_is_caught_within_a_few_steps(how, onset):
    for number in range(RUNS):
        t, losses = simulated(number)
        losses[onset:] = EXPLOSIONS[how](losses[onset:], np.arange(STEPS - onset))
        monitor = LossMonitor(0)
        step = stopped_at(monitor, t, losses)
        assert step is not None and onset < step <= onset + 60, number
        assert monitor.healthy_step <= onset + 30  # by which states are told that are worth keeping


def test_an_explosion_before_all_times_are_known_is_measured_by_the_target():
    for number in range(RUNS):
        t, losses = simulated(number)
        losses[40:] = 30.0
        step = stopped_at(LossMonitor(0), t, losses)
        assert step is not None and 40 <= step <= 50


def test_samples_of_one_batch_count_as_samples_of_as_many_steps():
    one, batch = LossMonitor(0), LossMonitor(0)
    t, losses = simulated(0, 160)
    stopped_at(one, t, losses)
    for first in range(0, 160, 16):
        rows = sum(
            np.array(by_time(*sample)) for sample in zip(t[first : first + 16], losses[first : first + 16], strict=True)
        )
        assert not batch.has_diverged(0.0, first, rows.tolist())
    many, few = (monitor.state()["times"] for monitor in (batch, one))
    assert [seen for seen, *_ in many] == [seen for seen, *_ in few]
    assert [mean for _, mean, _ in many] == pytest.approx([mean for _, mean, _ in few], rel=0.2)


@pytest.mark.parametrize("seen", [3, 30, 700])
def test_a_restored_watch_goes_on_as_if_it_had_never_stopped(seen):
    t, losses = simulated(5)
    whole, first, second = LossMonitor(0), LossMonitor(0), LossMonitor(seen)
    assert stopped_at(whole, t, losses) is None
    stopped_at(first, t[:seen], losses[:seen])
    second.restore(json.loads(json.dumps(first.state())), seen)
    stopped_at(second, t[seen:], losses[seen:], seen)
    assert second.state() == whole.state()


def test_a_restored_watch_without_times_goes_on_too():
    losses = np.random.default_rng(0).exponential(0.1, 200)
    for seen in (4, 20, 120):
        whole, first, second = LossMonitor(0), LossMonitor(0), LossMonitor(seen)
        for step, loss in enumerate(losses):
            assert not whole.has_diverged(loss, step)
            if step < seen:
                first.has_diverged(loss, step)
        second.restore(json.loads(json.dumps(first.state())), seen)
        assert not any(second.has_diverged(loss, step) for step, loss in enumerate(losses[seen:], start=seen))
        assert second.state() == whole.state()


def test_a_state_that_was_saved_while_the_loss_rose_is_not_a_good_one_after_a_restart():
    monitor = LossMonitor(0)
    for step in range(300):
        monitor.has_diverged(1.0 if step < 250 else 3.5, step)
    again = LossMonitor(300)
    again.restore(monitor.state(), 300)
    assert 250 <= again.healthy_step < 280
    calm = LossMonitor(0)
    assert not any(calm.has_diverged(1.0, step) for step in range(300))
    again.restore(calm.state(), 300)
    assert again.healthy_step == 300


class Timed(Toy):
    """The toy's loss, as if its sixteen samples were of the first of two parts of a schedule."""

    def loss(self, step):
        loss = super().loss(step)
        self.by_time = torch.tensor([[16 * loss.item(), 0.0], [16.0, 0.0], [16.0, 0.0]])
        return loss


def watch_in(out):
    with safe_open(out / "state.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["watch"])


def flat(by=1.0, steps=range(0)):
    return {step: lambda loss: loss * 0 + by for step in steps}


@pytest.mark.parametrize("kind", [Toy, Timed])
def test_a_run_that_was_interrupted_watches_on_with_what_it_knew(tmp_path, kind):
    """It would take fifty steps to know again how low the loss was."""
    recipe = toy_recipe(tmp_path / "whole", 120, preview_every=500, save_every=20)
    at = {**flat(1.0, range(100)), **flat(8.0, range(100, 120))}
    with refused("diverged", "times the lowest") as whole:
        train(kind(recipe, at), recipe)

    def power_cut(_loss):
        raise RuntimeError("power cut")

    broken = toy_recipe(tmp_path / "broken", 120, preview_every=500, save_every=20)
    with pytest.raises(RuntimeError, match="power cut"):
        train(kind(broken, {**at, 99: power_cut}), broken)
    assert load_state(tmp_path / "broken" / "state.safetensors").step == 80
    with refused("diverged", "times the lowest") as again:
        train(kind(broken, at), broken)
    assert str(again.value) == str(whole.value).replace("whole", "broken")
    assert ("compared at similar times t" in str(again.value)) == (kind is Timed)
    assert watch_in(tmp_path / "broken") == watch_in(tmp_path / "whole")


def test_a_state_without_a_watch_goes_on(tmp_path):
    """As earlier versions saved them."""
    recipe = toy_recipe(tmp_path, 6)
    train(Toy(recipe), recipe)
    path = tmp_path / "state.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "watch"}
    save_file(load_file(path), path, metadata)
    assert load_state(path).loss_monitor is None
    more = toy_recipe(tmp_path, 9)
    toy = Toy(more)
    train(toy, more)
    assert toy.steps_seen == [6, 7, 8]
    assert watch_in(tmp_path)["all"][0] == 3  # what this process saw


def test_other_data_is_not_measured_by_the_losses_of_before(tmp_path):
    recipe = toy_recipe(tmp_path, 6)
    first = Toy(recipe)
    first.data = "these pairs"
    train(first, recipe)
    assert watch_in(tmp_path)["all"][0] == 6
    more = toy_recipe(tmp_path, 9)
    second = Toy(more)
    second.data = "others"
    train(second, more)
    assert watch_in(tmp_path)["all"][0] == 3


def test_objectives_tell_their_losses_by_time(tmp_path, base_folder, icons_file):
    recipe = recipes()["controlnet"](
        out=str(tmp_path / "run"), icons=str(icons_file), base=str(base_folder), condition="canny", steps=3,
        batch_size=6, variants=2, score_pictures=2, device="cpu",
    )  # fmt: skip
    objective = ControlObjective(recipe, torch.device("cpu"))
    assert objective.by_time is None
    loss = objective.loss(1)
    error, power, count = objective.by_time
    assert error.shape == (TIME_BINS,)
    assert not objective.by_time.requires_grad
    assert error.sum() / 6 == pytest.approx(loss.item(), rel=1e-5)
    assert count.sum() == 6
    assert torch.equal(count > 0, error > 0) and torch.equal(count > 0, power > 0)
    generator = objective.torch_generator(1)
    torch.randn((6, 4, 16, 16), generator=generator)
    t = torch.randint(0, 1000, (6,), generator=generator)
    assert torch.equal(count, torch.bincount(t // 100, minlength=TIME_BINS).float())
