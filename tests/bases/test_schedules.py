"""Noise schedules: what is mixed, predicted and weighted at a time, and solvers that come back to the image."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from controlkit.bases.schedules import SOLVERS, TIME_SAMPLINGS, RectifiedFlow, VariancePreserving
from controlkit.bases.schedules.solvers import FLOW_SOLVERS
from controlkit.training.diffusion import TIME_BINS, noised
from refusals import refused
from tiny import SD1_SCHEDULE

ALL = slice(None)
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}
SCHEDULES = {
    **{name: VariancePreserving({**SD1_SCHEDULE, "prediction_type": name}) for name in ("epsilon", "v_prediction")},
    "sample": VariancePreserving({**SD1_SCHEDULE, "prediction_type": "sample"}),
    "flow": RectifiedFlow(FLOW),
}


def latents(seed: int = 0, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_mixtures_and_targets_are_those_of_diffusers(prediction):
    schedule, theirs = SCHEDULES[prediction], DDIMScheduler.from_config(SD1_SCHEDULE)
    z, noise, t = latents(), latents(1), torch.tensor([0, 300, 600, 999])
    assert torch.equal(schedule.add_noise(z, noise, t), theirs.add_noise(z, noise, t))
    wanted = {"epsilon": noise, "sample": z, "v_prediction": theirs.get_velocity(z, noise, t)}
    assert torch.equal(schedule.target(z, noise, t), wanted[prediction])
    assert torch.allclose(schedule.snr(t), compute_snr(theirs, t))


def test_a_rectified_flow_mixes_as_diffusers_mixes_it():
    theirs = FlowMatchEulerDiscreteScheduler(**FLOW)
    z, noise, t = latents(), latents(1), theirs.timesteps[torch.tensor([0, 10, 500, 999])]
    mixed = SCHEDULES["flow"].add_noise(z, noise, t)
    assert torch.allclose(mixed, theirs.scale_noise(z, t, noise), atol=1e-5)
    assert torch.equal(SCHEDULES["flow"].target(z, noise, t), noise - z)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_error_of_the_image_gets_one_weight_whatever_is_predicted(name):
    """min-SNR weights the error of z by min(SNR, gamma); the same error, said in other predictions, weighs as much."""
    schedule, gamma = SCHEDULES[name], 5.0
    z, noise = latents(), latents(1)
    t = torch.tensor([50, 300, 600, 900])
    wrong = z + 0.1 * latents(2)
    x_t = schedule.add_noise(z, noise, t)
    # The prediction of a network that takes `wrong` for z: x_t holds, so the noise it implies changes with it.
    if name == "flow":
        sigma = (t / schedule.length).view(-1, 1, 1, 1)
        implied = (x_t - (1 - sigma) * wrong) / sigma
        told = implied - wrong
    else:
        zero = torch.zeros_like(z)
        signal, amount = (
            schedule.add_noise(torch.ones_like(z), zero, t),
            schedule.add_noise(zero, torch.ones_like(z), t),
        )
        implied = (x_t - signal * wrong) / amount
        told = {"epsilon": implied, "sample": wrong, "v_prediction": signal * implied - amount * wrong}[name]
    error = (told - schedule.target(z, noise, t)).pow(2).flatten(1).mean(1) * schedule.loss_weight(t, gamma)
    expected = (wrong - z).pow(2).flatten(1).mean(1) * schedule.snr(t).clamp(max=gamma)
    assert torch.allclose(error, expected, rtol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampling", TIME_SAMPLINGS)
def test_times_lie_within_the_schedule_and_follow_their_distribution(name, sampling):
    schedule = SCHEDULES[name]
    t = schedule.draw_times(4000, torch.Generator().manual_seed(0), sampling)
    assert t.min() >= 0 and t.max() <= schedule.length and t.shape == (4000,)
    assert torch.equal(t, schedule.draw_times(4000, torch.Generator().manual_seed(0), sampling))
    share = t.float() / schedule.length
    if name == "flow":  # without its shift
        share = share / (FLOW["shift"] - (FLOW["shift"] - 1) * share)
    means = {"uniform": 0.5, "cubic": 0.75, "logit-normal": 0.5}
    assert share.mean().item() == pytest.approx(means[sampling], abs=0.03)
    middle = ((share > 0.25) & (share < 0.75)).float().mean().item()
    assert (middle > 0.6) == (sampling == "logit-normal")
    assert schedule.part(t, 10).min() >= 0 and schedule.part(t, 10).max() == 9


def test_an_unknown_way_to_draw_times_is_refused():
    with refused("unknown-name", "time_sampling", "even", "uniform, cubic, logit-normal"):
        SCHEDULES["epsilon"].draw_times(1, torch.Generator(), "even")


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_and_times_reach_the_loss(name):
    schedule, z = SCHEDULES[name], latents()
    plain = noised(schedule, z, torch.Generator().manual_seed(3), 4, ALL)
    again = noised(schedule, z, torch.Generator().manual_seed(3), 4, ALL, snr_gamma=5.0, time_sampling="cubic")
    assert plain.weight is None and plain.loss(plain.target).item() == 0
    made = torch.zeros_like(z)
    each = again.squared_error(made).flatten(1).mean(1)
    assert again.loss(made).item() == pytest.approx((each * schedule.loss_weight(again.t, 5.0)).mean().item())
    assert not torch.equal(plain.t, again.t)
    assert plain.by_time(plain.squared_error(made)).shape == (3, TIME_BINS)


@pytest.mark.parametrize("solver", FLOW_SOLVERS)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_a_flow_that_knows_the_image_comes_to_it(solver, steps):
    schedule = SCHEDULES["flow"]
    clean, noise = latents(batch=1), latents(1, batch=1)
    way = schedule.solver(solver, steps, "cpu", "a base")
    assert way.timesteps.shape == (steps,) and (way.timesteps.diff() <= 0).all()
    for _ in range(2):  # the second batch begins anew
        way.begin()
        x_t = noise * way.initial
        for index in range(steps):
            x_t = way.step((way.input(x_t, index) - clean) / (way.timesteps[index] / schedule.length), x_t, index)
        assert (x_t - clean).abs().max() < 1e-2


def test_what_does_not_solve_a_flow_is_refused():
    with refused("contradiction", "a base", "rectified flow", "ddim", "euler"):
        SCHEDULES["flow"].solver("ddim", 20, "cpu", "a base")


@pytest.mark.parametrize("solver", SOLVERS)
def test_noise_is_not_predicted_where_a_schedule_ends_in_pure_noise(solver):
    """Before anything is sampled, and whichever the solver: the image cannot be had from such a prediction."""
    zero = {**SD1_SCHEDULE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with refused("contradiction", "a base", "epsilon", "times the signal", "prediction_type", "scheduler_config.json"):
        VariancePreserving(zero).solver(solver, 20, "cpu", "a base")
    assert VariancePreserving({**zero, "prediction_type": "v_prediction"}).solver("ddim", 20, "cpu", "a base")


def test_what_is_no_prediction_is_refused():
    with refused("unsupported", "prediction_type", "score", "epsilon"):
        VariancePreserving({**SD1_SCHEDULE, "prediction_type": "score"})


def test_training_leaves_the_tables_of_the_solvers_on_the_cpu():
    schedule = VariancePreserving({**SD1_SCHEDULE, "prediction_type": "v_prediction"})
    z, t = torch.zeros(1, 4, 8, 8, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    for call in (schedule.add_noise, schedule.target):
        assert call(z, z, t).is_meta
    before = VariancePreserving(schedule.config)
    x_t = torch.ones(1, 4, 8, 8)
    assert schedule.noise_at_the_end == before.noise_at_the_end
    assert torch.equal(schedule.clean(x_t, x_t, torch.tensor(7)), before.clean(x_t, x_t, torch.tensor(7)))
