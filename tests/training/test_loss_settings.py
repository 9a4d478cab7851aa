"""Settings of the loss: batches whose gradients are averaged, how times are drawn, and weights by min-SNR."""

from __future__ import annotations

import pytest
import torch
from toy_training import Toy, toy_recipe

from controlkit.training.objective import Objective, torch_generator
from controlkit.training.recipes import build_recipe, recipes
from controlkit.training.run_folder import fingerprint
from controlkit.training.trainer import train
from refusals import refused


def test_gradients_of_several_batches_are_averaged(tmp_path):
    recipe = toy_recipe(tmp_path / "two", 3, gradient_accumulation_steps=2, max_grad_norm=None)
    toy = Toy(recipe)
    train(toy, recipe)
    assert toy.steps_seen == [0, 1, 2, 3, 4, 5]

    class Pairwise(Toy):
        """One batch a step, of what the other has in two."""

        def loss(self, step):
            return (super().loss(2 * step) + super().loss(2 * step + 1)) / 2

    other = toy_recipe(tmp_path / "one", 3, max_grad_norm=None)
    expected = Pairwise(other)
    train(expected, other)
    for name, value in toy.weights().items():
        torch.testing.assert_close(value, expected.weights()[name], rtol=1e-4, atol=1e-6)


def test_a_run_with_accumulation_goes_on_where_it_stopped(tmp_path):
    settings = {"gradient_accumulation_steps": 3, "min_lr_rate": 1.0, "save_every": 2}
    whole, parts = toy_recipe(tmp_path / "a", 4, **settings), toy_recipe(tmp_path / "b", 2, **settings)
    straight = Toy(whole)
    train(straight, whole)
    train(Toy(parts), parts)
    more = toy_recipe(tmp_path / "b", 4, **settings)
    resumed = Toy(more)
    train(resumed, more)
    assert resumed.steps_seen == [6, 7, 8, 9, 10, 11]
    assert all(torch.equal(value, straight.weights()[name]) for name, value in resumed.weights().items())


def test_what_is_listed_of_a_step_that_diverged_is_all_of_its_batches(tmp_path):
    recipe = toy_recipe(tmp_path / "run", 4, gradient_accumulation_steps=2)
    with refused("diverged", "step 2"):
        train(Toy(recipe, {3: lambda loss: loss * float("nan")}), recipe)
    assert '"numbers of step 2"' in (tmp_path / "run" / "diverged.json").read_text()
    assert '"numbers of step 3"' in (tmp_path / "run" / "diverged.json").read_text()


def icons_recipe(**changes):
    return recipes()["controlnet"](out="a", steps=5, icons="i", condition="canny", **changes)


def test_times_and_weights_of_a_recipe_reach_the_loss(sd1_scheduled_base):
    class Drawing(Objective):
        loss = preview = save = None

    def noised(**changes):
        objective = Drawing.__new__(type("Drawing", (Drawing,), {"__abstractmethods__": frozenset()}))
        objective.recipe = icons_recipe(batch_size=64, **changes)
        z = torch.zeros(64, 4, 2, 2)
        schedule = sd1_scheduled_base.schedule
        return objective.noised(schedule, z, objective.draw(schedule, z.shape[1:], torch_generator(0, 0)))

    plain, changed = noised(), noised(time_sampling="cubic", snr_gamma=5.0)
    assert plain.weight is None and changed.weight.shape == (64,)
    assert changed.t.float().mean() > plain.t.float().mean() + 100


def test_runs_from_before_there_were_these_settings_are_the_same_runs():
    assert fingerprint(icons_recipe()) == fingerprint(icons_recipe(snr_gamma=None, gradient_accumulation_steps=None))
    for change in ({"snr_gamma": 5.0}, {"time_sampling": "cubic"}, {"gradient_accumulation_steps": 4}):
        assert fingerprint(icons_recipe(**change)) != fingerprint(icons_recipe())


@pytest.mark.parametrize(
    ("change", "code", "facts"),
    [
        ({"gradient_accumulation_steps": 0}, "out-of-range", ["is 0", "at least 1"]),
        ({"snr_gamma": -1.0}, "out-of-range", ["is -1.0", "above 0"]),
        ({"time_sampling": "even"}, "unknown-name", ["'even'", "uniform, cubic, logit-normal"]),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, code, facts):
    with refused(code, *change, *facts):
        build_recipe({"system": "controlnet", "out": "a", "steps": 1, "icons": "i", "condition": "canny", **change})
