"""The learning rate: warm-up fits the run, and a continued run says where its rate goes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_training import Toy, toy_recipe

from controlkit.training.recipes import recipes
from controlkit.training.run_folder import fingerprint
from controlkit.training.schedule import Schedule
from controlkit.training.trainer import train
from refusals import refused


def run(out, steps, at=None, **changes):
    recipe = toy_recipe(out, steps, **changes)
    toy = Toy(recipe, at)
    train(toy, recipe)
    return toy


def rates(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines}


def power_cut(_loss):
    raise RuntimeError("power cut")


def adapting(steps, **changes):
    return recipes()["ctrlora-adapter"](out="x", pairs="p", control="c", steps=steps, **changes)


@given(st.integers(1, 2000))
def test_every_run_reaches_its_learning_rate(steps):
    recipe = adapting(steps)
    assert Schedule.of(recipe).highest >= 0.9 * recipe.learning_rate


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (25, 5), (60, 12), (499, 99), (500, 100), (5000, 100)])
def test_warm_up_takes_a_fifth_of_a_run_or_a_hundred_steps(steps, warmup):
    values = [Schedule.of(adapting(steps, min_lr_rate=1.0)).at(step) for step in range(steps)]
    assert values.index(max(values)) == warmup - 1
    assert values[0] == pytest.approx(1e-3 / warmup)


def test_a_warm_up_that_is_set_is_kept(tmp_path, capsys):
    run(tmp_path, 6, warmup_steps=4, min_lr_rate=1.0)
    assert list(rates(tmp_path).values()) == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])
    assert "note" not in capsys.readouterr().err


def test_a_short_run_says_how_long_it_warms_up(tmp_path, capsys):
    run(tmp_path / "short", 15, warmup_steps=None)
    assert "over 3 of 15 steps" in capsys.readouterr().err
    run(tmp_path / "long", 8, warmup_steps=16, min_lr_rate=1.0)
    note = capsys.readouterr().err
    assert "warmup_steps is 16, more than the 8 steps of this run" in note
    assert "reaches 0.025, not 0.05" in note


def test_a_run_that_goes_on_unchanged_says_nothing(tmp_path, capsys):
    for settings in ({"warmup_steps": None}, {"warmup_steps": 2}, {"min_lr_rate": 1.0}):
        out = tmp_path / str(settings)
        for stop in (7, 15):
            with pytest.raises(RuntimeError, match="power cut"):
                run(out, 20, {stop: power_cut}, **settings)
        capsys.readouterr()
        run(out, 20, **settings)
        run(out, 20, **settings)  # nothing is left to do
        assert "note" not in capsys.readouterr().err
        assert list(rates(out).values()) == [Schedule.of(toy_recipe(out, 20, **settings)).at(n) for n in range(20)]


def as_of_an_earlier_version(out):
    """Recorded recipes had no `data_workers` when every run without `warmup_steps` had 100."""
    path = Path(out) / "recipe.json"
    recipe = json.loads(path.read_text())
    del recipe["data_workers"]
    path.write_text(json.dumps(recipe))


def test_a_run_from_before_warm_up_was_bounded_goes_on_bit_for_bit(tmp_path, capsys):
    """There every run without the setting had a warm-up of 100 steps."""
    before, now = {"warmup_steps": 100}, {"warmup_steps": None}
    assert fingerprint(toy_recipe(tmp_path, **before)) == fingerprint(toy_recipe(tmp_path, **now))
    whole = run(tmp_path / "whole", 9, **before)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "broken", 9, {5: power_cut}, **before)
    as_of_an_earlier_version(tmp_path / "broken")
    capsys.readouterr()
    continued = run(tmp_path / "broken", 9, **now)
    assert "keeps the 100 warm-up steps" in capsys.readouterr().err
    assert continued.steps_seen == [3, 4, 5, 6, 7, 8]
    for name, value in whole.weights().items():
        assert torch.equal(value, continued.weights()[name]), name


def test_the_warm_up_of_before_is_no_difference_between_recipes(tmp_path):
    run(tmp_path, 6, warmup_steps=100)
    as_of_an_earlier_version(tmp_path)
    with refused("resume-mismatch", "(seed: 0 there, 1 now)"):
        run(tmp_path, 6, warmup_steps=None, seed=1)


@pytest.mark.parametrize(("there", "now"), [(None, 100), (100, None), (None, 2), (2, None)])
def test_another_warm_up_is_another_recipe(there, now, tmp_path):
    run(tmp_path, 6, warmup_steps=there)
    before = (tmp_path / "recipe.json").read_bytes()
    with refused("resume-mismatch", f"(warmup_steps: {there} there, {now} now)"):
        run(tmp_path, 9, warmup_steps=now)
    assert (tmp_path / "recipe.json").read_bytes() == before


@pytest.mark.parametrize(("there", "now", "steps"), [(None, 1, 9), (1, None, 9), (None, 100, 500), (100, None, 500)])
def test_a_warm_up_may_be_said_in_other_words(there, now, steps, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, steps, {5: power_cut}, warmup_steps=there, log_every=100, preview_every=500)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, steps, {8: power_cut}, warmup_steps=now, log_every=100, preview_every=500)
    assert json.loads((tmp_path / "recipe.json").read_text())["warmup_steps"] == now


def test_a_finished_run_with_more_steps_says_where_its_rate_goes(tmp_path, capsys):
    run(tmp_path, 6)
    last = rates(tmp_path)[6]
    capsys.readouterr()
    run(tmp_path, 12)
    said = capsys.readouterr().err
    now = rates(tmp_path)
    assert now[7] > 4 * last
    assert f"the learning rate jumps from {last:.3g} at step 6 to {now[7]:.3g} at step 7" in said
    assert "(steps: 6 there, 12 now)" in said
    assert said.index("note") < said.index("step 7/12")
    run(tmp_path, 12)
    assert "note" not in capsys.readouterr().err


def test_a_finished_run_goes_on_at_its_last_rate_as_the_note_says(tmp_path, capsys):
    run(tmp_path, 6)
    run(tmp_path / "more", 6)
    capsys.readouterr()
    run(tmp_path, 7)
    advice = re.search(r"set learning_rate=(\S+) min_lr_rate=(\S+)", capsys.readouterr().err)
    rate, least = map(float, advice.groups())
    run(tmp_path / "more", 12, learning_rate=rate, min_lr_rate=least)
    assert "note" not in capsys.readouterr().err
    assert [rates(tmp_path / "more")[step] for step in range(7, 13)] == [rate] * 6


@pytest.mark.parametrize("warmup", [None, 40])
def test_a_run_that_goes_on_at_its_last_rate_does_not_warm_up_again(warmup, tmp_path, capsys):
    """The warm-up of the longer run is longer than the steps done."""
    run(tmp_path, 20, warmup_steps=warmup)
    rate = float(f"{rates(tmp_path)[20]:.3g}")
    stays = {"warmup_steps": warmup, "learning_rate": rate, "min_lr_rate": 1.0}
    capsys.readouterr()
    for stop in (26, 50):
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path, 200, {stop: power_cut}, **stays)
    run(tmp_path, 200, **stays)
    assert "note" not in capsys.readouterr().err
    assert [rates(tmp_path)[step] for step in range(21, 201)] == [rate] * 180


def test_another_rate_in_the_middle_of_a_run_is_said(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, 9, {5: power_cut})
    capsys.readouterr()
    run(tmp_path, 9, learning_rate=0.01)
    assert "(learning_rate: 0.05 there, 0.01 now)" in capsys.readouterr().err


def test_a_recipe_without_warm_up_is_the_same_however_it_is_written():
    recipe = adapting(60)
    assert recipe.warmup_steps is None
    assert fingerprint(dataclasses.replace(recipe, warmup_steps=50)) != fingerprint(recipe)
