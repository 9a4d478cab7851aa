"""Adapters together and alone, at toy size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.registry import find
from controlkit.formats.load import save_control
from controlkit.studies import several_conditions as study
from controlkit.studies.several_conditions import SeveralConditions, run_several_conditions
from refusals import refused


@pytest.fixture
def adapters(tiny_base, tmp_path):
    """Files of two adapters that steer, on one base control."""
    shared = BaseControlNet.for_base(tiny_base)
    generator = torch.Generator().manual_seed(0)
    save_control(tmp_path / "base.safetensors", shared, tiny_base)
    files = []
    for name in ("palette", "canny"):
        adapter = shared.add_adapter(name, 2, seed=1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        control = CtrLoRA(shared, name, name)
        files.append(save_control(tmp_path / f"{name}.safetensors", control, tiny_base, companion="base"))
    return [str(path) for path in files]


@pytest.fixture
def settings(adapters, base_folder, tmp_path, monkeypatch):
    # Through the autoencoder of the tiny base, whose weights are random, targets may score no better than without
    # control: there would be no gap.
    monkeypatch.setattr(study, "reconstruct", lambda base, images: list(images))
    return SeveralConditions(
        out=str(tmp_path / "study"),
        base=str(base_folder),
        mixes=("+".join(adapters),),
        images=3,
        sampling_steps=2,
        timed=(1, 2, 3),
    )


@pytest.fixture
def sampled(monkeypatch):
    """How many controls acted each time that images were sampled, and a list of what timed them."""
    calls = {"sampled": [], "timed": []}
    generate_uncontrolled, generate_controlled, times = (
        study.generate_uncontrolled,
        study.generate_controlled,
        study._times,
    )

    def without(*args, **more):
        calls["sampled"].append(0)
        return generate_uncontrolled(*args, **more)

    def under(base, uses, *args, **more):
        calls["sampled"].append(len(uses))
        return generate_controlled(base, uses, *args, **more)

    def timed(base, group, drawing):
        calls["timed"].append(len(group))
        return times(base, group, drawing)

    monkeypatch.setattr(study, "generate_uncontrolled", without)
    monkeypatch.setattr(study, "generate_controlled", under)
    monkeypatch.setattr(study, "_times", timed)
    return calls


def test_a_mix_is_judged_by_each_of_its_conditions_and_timed(settings, adapters, tiny_base):
    made = run_several_conditions(settings)
    fidelity, speed = made.reports
    assert [row[1] for row in fidelity.rows] == adapters
    assert all(isinstance(value, float) and math.isfinite(value) for row in fidelity.rows for value in row[2:])
    assert [row[0] for row in speed.rows] == [2, 3]
    assert all(isinstance(value, float) for row in speed.rows for value in row[1:])
    assert all(row[-1] < 1e-4 for row in speed.rows)
    assert all(lowest <= ratio <= highest for *_, ratio, lowest, highest, _ in speed.rows)
    assert made.files["images"].is_file()
    assert fidelity.settings["mode"] == tiny_base.default_mode
    assert fidelity.settings["base"]["fingerprint"] == tiny_base.fingerprint
    assert fidelity.settings["study"]["images"] == fidelity.settings["sets"][0]["images"] == 3
    assert len({control["fingerprint"] for control in fidelity.settings["controls"].values()}) == 2
    assert fidelity.settings["controls"][adapters[1]]["condition"]["parameters"] == {"low": 100, "high": 200}
    assert f"mode {tiny_base.default_mode}, weight 1, guidance 3, 2 ddim steps." in fidelity.notes


def test_a_study_that_ran_resumes(settings, sampled):
    first = run_several_conditions(settings)
    assert sampled == {"sampled": [0, 1, 1, 2], "timed": [2, 3]}
    again = run_several_conditions(settings)
    assert sampled == {"sampled": [0, 1, 1, 2], "timed": [2, 3]}
    assert again.reports == first.reports


def test_a_study_that_was_stopped_goes_on_with_what_is_missing(settings, sampled, monkeypatch):
    generate_controlled = study.generate_controlled

    def stops(base, uses, *args, **more):
        if len(uses) == 2:
            raise KeyboardInterrupt
        return generate_controlled(base, uses, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(study, "generate_controlled", stops)
        with pytest.raises(KeyboardInterrupt):
            run_several_conditions(settings)
    assert sampled["sampled"] == [0, 1, 1]
    run_several_conditions(settings)
    assert sampled["sampled"] == [0, 1, 1, 2]


def test_other_settings_and_other_adapters_are_sampled_anew(settings, sampled, adapters, tmp_path, tiny_base):
    run_several_conditions(settings)
    before = len(sampled["sampled"])
    run_several_conditions(replace(settings, weight=0.5))
    assert sampled["sampled"][before:] == [1, 1, 2]  # what is without control stays
    before = len(sampled["sampled"])
    run_several_conditions(replace(settings, sampling_steps=3))
    assert sampled["sampled"][before:] == [0, 1, 1, 2]
    before = len(sampled["sampled"])
    tensors = load_file(adapters[0])
    name = next(iter(tensors))
    with safe_open(adapters[0], framework="pt") as file:
        metadata = file.metadata()
    save_file({**tensors, name: tensors[name] + 0.5}, adapters[0], metadata)
    run_several_conditions(settings)
    assert sampled["sampled"][before:] == [1, 2]


def test_kept_images_that_are_damaged_are_sampled_again(settings, sampled, capsys):
    run_several_conditions(settings)
    kept = [path for path in (Path(settings.out) / "kept").rglob("*") if path.is_file()]
    assert len(kept) == 6
    for path in kept:
        path.write_bytes(b"torn")
    capsys.readouterr()
    run_several_conditions(settings)
    assert sampled == {"sampled": [0, 1, 1, 2] * 2, "timed": [2, 3] * 2}
    said = capsys.readouterr().err
    assert (said.count("is damaged; sampling again"), said.count("is damaged; measuring again")) == (4, 2)


def test_a_mode_that_there_is_not_is_no_setting():
    with refused("unknown-name", "'balance'", "did you mean balanced"):
        SeveralConditions(mode="balance")


def test_one_adapter_is_no_mix(adapters):
    with refused("contradiction", adapters[0], "two or more"):
        SeveralConditions(mixes=(adapters[0],))


def test_controls_of_several_systems_are_judged_together(settings, adapters, tiny_base, tmp_path):
    files = [adapters[0]]
    for condition, system in (("canny", "controlnet"), ("silhouette", "t2i-adapter")):
        torch.manual_seed(1)
        control = find(system).for_base(tiny_base, condition)
        with torch.no_grad():
            for parameter in control.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        files.append(str(save_control(tmp_path / f"{system}.safetensors", control, tiny_base)))
    made = run_several_conditions(replace(settings, mixes=("+".join(files), "+".join(files[1:]))))
    (fidelity,) = made.reports  # no two of them share a network, so there is no table of one pass for all
    assert [row[1] for row in fidelity.rows] == files + files[1:]
    assert any(note.startswith(("together / alone is", "no ratio for")) for note in fidelity.notes)


def test_conditions_that_lose_much_of_their_gap_are_named():
    kept, lost = ("a+b", "a", 0.5, 0.4), ("a+b", "b", 0.5, 0.39)
    assert study._kept([kept]) == "together / alone is at least 0.8 for every condition."
    assert study._kept([kept, lost]) == "together / alone is below 0.8 for b in a+b (0.50 to 0.39)."


def test_conditions_whose_control_closes_no_gap_alone_have_no_ratio():
    kept, none, nan = ("a+b", "a", 0.5, 0.4), ("a+c", "c", -0.5, -0.45), ("a+d", "d", math.nan, math.nan)
    said = study._kept([kept, none, nan])
    assert "at least 0.8" in said and "below" not in said and "no ratio for c in a+c, d in a+d" in said
    assert "0.8" not in study._kept([none])


def test_both_ways_are_timed_first_in_turns_and_the_ratio_is_of_the_rounds(tiny_base, monkeypatch):
    """A clock whose second measurement of each round takes twice as long: the order must not decide the ratio."""
    shared = BaseControlNet.for_base(tiny_base)
    shared.add_adapter("palette", 2, seed=1)
    (example,) = study.evaluation_set("held-out").take(1).examples
    now, calls = 0.0, 0

    def clock() -> float:
        nonlocal now, calls
        now += (0.0, 1.0, 0.0, 2.0)[calls % 4]
        calls += 1
        return now

    monkeypatch.setattr(study.time, "perf_counter", clock)
    times = study._times(tiny_base, [CtrLoRA(shared, "palette", "palette")] * 2, example)
    assert (times["lowest"], times["highest"]) == (0.5, 2.0) and calls == 4 * study._ROUNDS
    assert {times["together"], times["apart"]} == {1000.0, 2000.0}


def test_one_condition_is_not_timed(settings):
    assert len(run_several_conditions(replace(settings, timed=(1,))).reports) == 1


def test_a_control_without_one_condition_is_refused(settings, tiny_base, tmp_path):
    path = save_control(tmp_path / "several.safetensors", find("unicontrol").for_base(tiny_base), tiny_base)
    other = save_control(tmp_path / "one.safetensors", find("t2i-adapter").for_base(tiny_base, "canny"), tiny_base)
    with refused("wrong-kind", path, "a UniControl", "one condition"):
        run_several_conditions(replace(settings, mixes=(f"{path}+{other}",)))
