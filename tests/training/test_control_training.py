"""A ControlNet is trained on a frozen base: on a tiny base, from a hand-made file of icons."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from controlkit.bases.load import load_base
from controlkit.errors import UserError
from controlkit.formats.load import load_control
from controlkit.formats.metadata import read_metadata
from controlkit.training.control_objective import ControlObjective
from controlkit.training.recipes import recipes
from controlkit.training.run import choose_device, objective_of
from controlkit.training.run import run as train_recipe
from refusals import refused

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path, base_folder, icons_file):
    return recipes()["controlnet"](
        out=str(tmp_path / "run"),
        icons=str(icons_file),
        base=str(base_folder),
        condition="canny",
        steps=3,
        batch_size=2,
        variants=2,
        score_pictures=2,
        warmup_steps=0,
        learning_rate=0.01,
        log_every=1,
        save_every=1,
        preview_every=3,
        device="cpu",
    )


def copies(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before, module):
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def test_a_base_of_another_size_than_that_of_drawings_is_refused(recipe, base_folder, tmp_path):
    larger = tmp_path / "larger"
    shutil.copytree(base_folder, larger)
    config = larger / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 32}))
    with refused("contradiction", "64 x 64", "128 x 128", "base=nano"):
        ControlObjective(dataclasses.replace(recipe, base=str(larger)), CPU)


def test_no_gradient_is_ever_made_for_the_base(recipe):
    objective = ControlObjective(recipe, CPU)
    frozen = [parameter for network in objective.base.networks for parameter in network.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    objective.loss(0).backward()
    assert all(parameter.grad is None for parameter in frozen)
    trained = {id(parameter) for parameter in objective.parameters()}
    assert trained == {id(parameter) for parameter in objective.control.parameters()}
    assert trained.isdisjoint(id(parameter) for parameter in frozen)


def test_the_first_gradient_reaches_the_zero_convolutions_and_nothing_behind_them(recipe):
    objective = ControlObjective(recipe, CPU)
    objective.loss(0).backward()
    moved = {
        name
        for name, parameter in objective.control.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 0
    }
    assert moved
    assert all("controlnet_down_blocks" in name or "controlnet_mid_block" in name for name in moved)


def test_training_changes_the_control_and_only_the_control(recipe):
    objective = ControlObjective(recipe, CPU)
    bases = [copies(network) for network in objective.base.networks]
    before = copies(objective.control)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        objective.loss(step).backward()
        optimizer.step()
    for was, network in zip(bases, objective.base.networks, strict=True):
        assert changed(was, network) == set()
    # After three steps the gradient has passed the zero convolutions into the copy and into the hint network.
    moved = changed(before, objective.control)
    assert any(name.startswith("network.down_blocks") for name in moved)
    assert any(name.startswith("hint_network") for name in moved)


def test_a_step_always_draws_the_same(recipe):
    one, two = ControlObjective(recipe, CPU), ControlObjective(recipe, CPU)
    assert one.loss(4).item() == two.loss(4).item() == one.loss(4).item()
    assert one.loss(4).item() != one.loss(5).item()


def test_a_run_ends_with_a_file_that_loads_on_its_base(recipe, tmp_path, base_folder):
    scores = train_recipe(recipe)
    assert list(scores) == ["canny: edge F1"] and 0 <= scores["canny: edge F1"] <= 1
    base = load_base(base_folder)
    path = tmp_path / "run" / "canny.safetensors"
    control = load_control(path, base)
    assert control.condition == "canny"
    metadata = read_metadata(path)
    assert metadata["control.base_fingerprint"] == base.fingerprint
    assert json.loads(metadata["control.made"])["steps"] == 3
    assert [p.name for p in (tmp_path / "run" / "previews").iterdir()] == ["0000003.png"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "canny: edge F1" in lines[-1]


def test_a_continued_run_equals_one_in_one_go(recipe, tmp_path):
    settings = {"min_lr_rate": 1.0, "preview_every": 100}
    whole = dataclasses.replace(recipe, **settings)
    train_recipe(whole)
    broken = dataclasses.replace(recipe, out=str(tmp_path / "broken"), **settings)
    train_recipe(dataclasses.replace(broken, steps=1))
    train_recipe(broken)
    a = load_control(tmp_path / "run" / "canny.safetensors").state_dict()
    b = load_control(tmp_path / "broken" / "canny.safetensors").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"icons": "nothing.npz"}, ["missing-file", "nothing.npz", "recipes/nano/README.md"]),
        ({"base": "nothing"}, ["missing-file", "nothing"]),
        ({"condition": "cany"}, ["unknown-name", "did you mean canny"]),
        ({"device": "gpu9"}, ["device-unavailable", "gpu9"]),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_written(recipe, tmp_path, change, facts):
    with refused(*facts):
        objective_of(dataclasses.replace(recipe, **change))
    assert not (tmp_path / "run").exists()


def test_devices_by_name():
    assert choose_device("cpu") == CPU
    with pytest.raises(UserError, match="auto"):
        choose_device("tpu-7")


def test_a_control_goes_on_from_one_that_there_is(recipe, tmp_path):
    train_recipe(recipe)
    first = f"{recipe.out}/canny.safetensors"
    made = load_control(first, load_base(recipe.base)).state_dict()
    again = dataclasses.replace(recipe, out=str(tmp_path / "again"), start=first)
    begun = ControlObjective(again, CPU)
    assert {
        name: value for name, value in begun.control.state_dict().items() if not torch.equal(value, made[name])
    } == {}
    assert all(parameter.requires_grad for parameter in begun.parameters())
    train_recipe(again)
    later = f"{again.out}/canny.safetensors"
    assert changed(made, load_control(later, load_base(recipe.base)))
    assert json.loads(read_metadata(later)["control.made"])["start"] == first
    assert "start" not in json.loads(read_metadata(first)["control.made"])


def test_what_a_controlnet_cannot_go_on_from_is_said(recipe, base_folder, tmp_path):
    from controlkit.controls.ctrlora import BaseControlNet
    from controlkit.formats.load import save_control

    base = load_base(base_folder)
    other = save_control(tmp_path / "shared.safetensors", BaseControlNet.for_base(base), base)
    with refused("wrong-kind", other, "a ControlNet"):
        ControlObjective(dataclasses.replace(recipe, start=str(other)), CPU)
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        ControlObjective(dataclasses.replace(recipe, start=str(tmp_path / "nothing.safetensors")), CPU)
