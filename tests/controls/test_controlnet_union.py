"""ControlNet Union: parity with diffusers' pipeline, tasks, several images in one pass, files, training, errors."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetUnionModel,
    DDIMScheduler,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.controlnets.multicontrolnet_union import MultiControlNetUnionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from controlkit.apps.cli import main
from controlkit.apps.evaluate import _of_the_pairs
from controlkit.bases.meta import meta_base
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.controlnet_union import RELEASED, ControlNetUnion
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.detect import detect
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.formats.transfer import transfer
from controlkit.sampling.axes import points_of
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from controlkit.sampling.uses import ControlUse
from controlkit.server.catalogue import list_models
from controlkit.training.recipes import build_recipe
from controlkit.training.run import objective_of
from controlkit.training.run import run as train
from refusals import refused
from tiny import build_tiny_sdxl

SEEDS = (3, 11)
SETTINGS = {"prompt": "red apple", "seeds": SEEDS, "steps": 4, "guidance": 4.0}


@pytest.fixture(scope="module")
def base():
    return build_tiny_sdxl()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def as_trained(control, seed=1):
    """The control as after training: every weight changed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return control.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def control(base):
    """One of the eight released types. Tests leave it as it is."""
    torch.manual_seed(5)
    return as_trained(ControlNetUnion.for_base(base))


def parts(base):
    """Arguments of diffusers' pipelines."""
    own = {one.name: getattr(base, one.name) for one in base.components if not one.is_scheduler}
    return {**own, "scheduler": DDIMScheduler.from_config(base.scheduler_config), "add_watermarker": False}


def network_of(control):
    """diffusers' network of the same weights."""
    network = ControlNetUnionModel.from_config(control.network.config)
    network.load_state_dict(control.file_state())
    return network.eval()


def theirs(base, network, images, types, **settings):
    pipeline = StableDiffusionXLControlNetUnionPipeline(**parts(base), controlnet=network)
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for seed in SEEDS:  # the pipeline takes several images as those of several types
        made.append(
            pipeline(
                SETTINGS["prompt"],
                control_image=images,
                control_mode=types,
                generator=torch.Generator().manual_seed(seed),
                num_inference_steps=SETTINGS["steps"],
                guidance_scale=SETTINGS["guidance"],
                output_type="pt",
                **settings,
            ).images
        )
    return torch.cat(made)


def ours(base, *uses):
    return torch.cat(list(sample(base, uses=list(uses), **SETTINGS)))


@pytest.mark.parametrize(
    ("task", "kind"), [("openpose", 0), ("hed", 2), ("lineart", 3), ("canny", 3), ("tile", 6), ("inpaint", 7)]
)
def test_a_task_is_a_control_type_of_diffusers(base, control, image, task, kind):
    expected = theirs(base, network_of(control), [image], [kind], controlnet_conditioning_scale=0.7)
    made, other = (
        ours(base, ActiveControl(control, control.encode({"image": image, "task": each}, base), 0.7))
        for each in (task, "depth")
    )
    assert (made - expected).abs().max() < 1e-3
    assert (other - expected).abs().max() > 1e-2 and (ours(base) - expected).abs().max() > 1e-2


def test_several_images_pass_the_network_together_as_in_diffusers(base, control, image):
    expected = theirs(base, network_of(control), [image, 1 - image], [0, 1])
    hint = control.encode({"image": image, "task": "openpose", "depth": 1 - image}, base)
    assert hint["types"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    made = ours(base, ActiveControl(control, hint))
    assert (made - expected).abs().max() < 1e-3
    swapped = control.encode({"image": 1 - image, "task": "depth", "openpose": image}, base)
    assert (ours(base, ActiveControl(control, swapped)) - made).abs().max() < 1e-4
    alone = control.encode({"image": image, "task": "openpose"}, base)
    assert (ours(base, ActiveControl(control, alone)) - made).abs().max() > 1e-2


def test_two_controls_add_up_as_in_diffusers(base, control, image):
    networks = MultiControlNetUnionModel([network_of(control)] * 2)
    expected = theirs(base, networks, [image, 1 - image], [3, 1], controlnet_conditioning_scale=[0.7, 0.4])
    uses = [
        ActiveControl(control, control.encode({"image": image, "task": "canny"}, base), 0.7),
        ActiveControl(control, control.encode({"image": 1 - image, "task": "depth"}, base), 0.4),
    ]
    assert (ours(base, *uses) - expected).abs().max() < 1e-3


def test_a_new_one_copies_the_base_and_leaves_it_unchanged(base, image):
    new = ControlNetUnion.for_base(base, "canny").eval()
    own = new.network.state_dict()
    shared = own.keys() & base.unet.state_dict().keys()
    assert {"add_embedding.linear_1.weight", "conv_in.weight", "mid_block.resnets.0.conv1.weight"} <= shared
    assert all(torch.equal(own[name], base.unet.state_dict()[name]) for name in shared)
    assert torch.equal(ours(base, ActiveControl(new, new.encode({"image": image}, base))), ours(base))


def test_it_has_the_known_size():
    """The file of xinsir/controlnet-union-sdxl-1.0 in half precision has 2,513,342,408 bytes with ProMax's 8 types."""
    with torch.device("meta"):
        large = ControlNetUnion.for_base(meta_base("sdxl"))
    assert 2 * large.parameter_counts()["parameters"] == pytest.approx(2_513_342_408, abs=200_000)
    assert large.facts(large.config())["tasks"].startswith("openpose, dwpose; depth,")


# Tasks


def test_it_needs_a_task_that_it_has(base, control, image):
    with refused("missing-setting", "openpose, dwpose, depth", "task=openpose"):
        control.encode({"image": image}, base)
    with refused("unknown-name", "'cany'", "canny"):
        control.encode({"image": image, "task": "cany"}, base)
    with refused("unknown-name", "'palette'"):
        control.for_condition("palette")
    for task in ("depth", "depth_zoe"):  # of one type
        with refused("contradiction", "two images", task, "depth"):
            control.encode({"image": image, "task": task, "depth": image}, base)
    with pytest.raises(ValueError, match="0, 1"):
        control.encode({"image": image * 3, "task": "depth"}, base)
    assert control.conditions == ("openpose", "depth", "hed", "canny", "normal", "seg", "downscale", "inpaint")
    assert control.for_condition("pidinet").condition == "pidinet" and control.condition is None


def test_pairs_of_every_task_are_followed(control):
    for name, found in (("scribble", ["scribble"]), ("canny", ["canny"]), (None, list(control.conditions))):
        assert _of_the_pairs("union", control, [SimpleNamespace(condition=name)], "pairs") == found
    with refused("contradiction", "palette"):
        _of_the_pairs("union", control, [SimpleNamespace(condition="palette")], "pairs")


def test_the_first_release_has_six_types(base, image):
    first = ControlNetUnion.from_config({**ControlNetUnion.for_base(base).config(), "num_control_type": 6})
    assert "seg" in first.tasks and "inpaint" not in first.tasks
    with refused("unknown-name", "'inpaint'"):
        first.encode({"image": image, "task": "inpaint"}, base)


def test_new_tasks_join_those_of_a_release_and_change_no_other(base, control, image, tmp_path):
    before = control.encode({"image": image, "task": "canny"}, base)
    expected = ours(base, ActiveControl(control, before))
    path = save_control(tmp_path / "union.safetensors", control, base, dtype=torch.float32)
    more = ControlNetUnion.for_training(
        base, ["canny", "palette"], {}, name="union", seed=0, start=load_control(path, base)
    ).eval()
    assert more.tasks == {**RELEASED, "palette": 8} and len(more.network.task_embedding) == 9
    assert (
        ours(base, ActiveControl(more, more.encode({"image": image, "task": "canny"}, base))) - expected
    ).abs().max() < 1e-4
    again = load_control(save_control(tmp_path / "more.safetensors", more, base, dtype=torch.float32), base)
    assert again.tasks == more.tasks and [one.name for one in again.inputs][-1] == "palette"
    hints = [each.encode({"image": image, "task": "palette"}, base) for each in (more, again)]
    first, second = (ours(base, ActiveControl(each, hint)) for each, hint in zip((more, again), hints, strict=True))
    assert torch.equal(first, second)


def test_aliases_of_conditions_are_their_tasks(base):
    assert ControlNetUnion.for_base(base, tasks=["canny", "deblur", "blur"]).tasks == {"canny": 0, "blur": 1}
    started = ControlNetUnion.for_training(
        base, ["tile", "soft_edge"], {}, name="union", seed=0, start=ControlNetUnion.for_base(base)
    )
    assert started.tasks == dict(RELEASED)


@pytest.mark.parametrize("tasks", [{"canny": [1]}, {"canny": "x"}, {"canny": 9}, {"canny": -1}, ["canny"]])
def test_a_file_with_malformed_tasks_is_damaged(base, tmp_path, tasks):
    path = save_control(tmp_path / "union.safetensors", ControlNetUnion.for_base(base, "canny"), base)
    metadata = read_metadata(path)
    config = json.dumps({**json.loads(metadata["control.config"]), "tasks": tasks})
    save_file(load_file(path), path, {**metadata, "control.config": config})
    with refused("damaged-file", path):
        load_control(path, base)
    (said,) = list_models(controls=[str(path)]).skipped
    assert said.startswith("union: ") and "damaged" not in said


def test_the_card_shows_tasks_that_the_file_has(base, tmp_path):
    two = ControlNetUnion.for_base(base, tasks=["canny", "palette"])
    card = card_of(save_control(tmp_path / "two.safetensors", two, base))
    assert '{"image": "first.png", "task": "canny", "palette": "second.png"}' in card
    one = card_of(save_control(tmp_path / "one.safetensors", ControlNetUnion.for_base(base, "canny"), base))
    assert "task=canny" in one and "second.png" not in one


def test_a_task_is_an_axis_and_stays_when_the_image_is_one():
    def uses(xy, **use):
        control = ControlUse(control="union.safetensors", **use)
        return [
            point.request.controls[0] for point in points_of(GenerateRequest(prompt="a", controls=(control,), xy=xy))
        ]

    saved = {"inputs": {"image": "a.png", "task": "canny", "depth": "d.png"}}
    images = uses(({"image": ["b.png", "c.png"]},), **saved)
    assert [use.inputs for use in images] == [{**saved["inputs"], "image": name} for name in ("b.png", "c.png")]
    tasks = uses(({"task": ["canny", "hed"]},), prepared=True, **saved)
    assert [use.inputs["task"] for use in tasks] == ["canny", "hed"]


def test_tasks_on_the_command_line(base, control, tmp_path, monkeypatch):
    StableDiffusionXLPipeline(**parts(base)).save_pretrained(folder := tmp_path / "base")
    save_control(tmp_path / "union.safetensors", control, base, dtype=torch.float32)
    monkeypatch.chdir(tmp_path)
    for name in ("photo", "depth"):
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (64, 64, 3), np.uint8)).save(f"{name}.png")
    words = ["generate", "red apple", "--base", str(folder), "--steps", "2"]
    assert main([*words, "--control", "union.safetensors=photo.png,task=canny,low=20", "--out", "a"]) == 0
    inputs = {"image": "photo.png", "task": "canny", "depth": "depth.png"}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    assert main([*words, "--control", "union.safetensors=inputs.json,prepared", "--out", "b"]) == 0
    assert main([*words, "--control", "union.safetensors=photo.png", "--out", "c"]) == 2
    xy = ["--prepared", "--xy", "task=canny,depth"]
    assert main([*words, "--control", "union.safetensors=photo.png", *xy, "--out", "sheet"]) == 0
    (tmp_path / "inputs.json").write_text(json.dumps({**inputs, "palette": "depth.png"}))
    assert main([*words, "--control", "union.safetensors=inputs.json,prepared", "--out", "c"]) == 2
    use = ControlUse(control="union.safetensors", inputs=inputs, prepared=True)
    made = generate(GenerateRequest(prompt="red apple", base=str(folder), controls=(use,), steps=2))
    assert len(made.conditions) == 2


# Files


def test_a_bare_file_of_diffusers_names(base, control, image, tmp_path):
    save_file(control.file_state(), tmp_path / "bare.safetensors")
    read = load_control(tmp_path / "bare.safetensors", base)
    assert isinstance(read, ControlNetUnion) and read.tasks == dict(RELEASED)
    assert same(base, control, read, image)


def same(base, first, second, image):
    inputs = {"image": image, "task": "canny"}
    return torch.equal(*(ours(base, ActiveControl(one, one.encode(inputs, base))) for one in (first, second)))


def test_diffusers_folder_is_read_and_written(base, control, image, tmp_path):
    path = save_control(tmp_path / "union.safetensors", control, base, dtype=torch.float32)
    convert(path, tmp_path / "folder", to="diffusers")
    network = ControlNetUnionModel.from_pretrained(tmp_path / "folder")
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in control.file_state().items())
    assert same(base, control, load_control(tmp_path / "folder", base), image)


@pytest.mark.parametrize("name", ["ControlNetModel", "ControlNetModel_Union"])
@pytest.mark.parametrize("count", [6, 8])
def test_the_folder_of_the_release(base, image, tmp_path, name, count):
    """Its config is that of a ControlNet, of the first release without the number of types."""
    torch.manual_seed(5)
    made = as_trained(
        ControlNetUnion.from_config({**ControlNetUnion.for_base(base).config(), "num_control_type": count})
    )
    network_of(made).save_pretrained(tmp_path / "union")
    path = tmp_path / "union" / "config.json"
    own = ("num_trans", "num_proj", *(["num_control_type"] if count == 6 else []))
    config = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith(own)}
    path.write_text(json.dumps({**config, "_class_name": name}))
    read = load_control(tmp_path / "union", base)
    assert detect(tmp_path / "union").format_name == "xinsir" and len(read.network.task_embedding) == count
    assert same(base, made, read, image)
    tensors = load_file(tmp_path / "union" / "diffusion_pytorch_model.safetensors")
    tensors.pop("spatial_ch_projs.bias")
    save_file(tensors, tmp_path / "union" / "diffusion_pytorch_model.safetensors")
    with refused("damaged-file", tmp_path / "union", "spatial_ch_projs.bias"):
        load_control(tmp_path / "union", base)


def test_a_controlnet_in_such_a_folder_is_none(base, tmp_path):
    ControlNet.for_base(base).to_diffusers().save_pretrained(tmp_path / "cn")
    assert isinstance(load_control(tmp_path / "cn", base), ControlNet)


def test_one_task_of_a_file_becomes_its_condition(base, control, image, tmp_path):
    save_control(tmp_path / "union.safetensors", control, base, dtype=torch.float32)
    convert(tmp_path / "union.safetensors", tmp_path / "depth.safetensors", to="controlkit", condition="depth")
    assert load_control(tmp_path / "depth.safetensors", base).encode({"image": image}, base)["type.0"].tolist() == [1]
    with refused("unknown-name", "palette"):
        convert(tmp_path / "union.safetensors", tmp_path / "p.safetensors", to="controlkit", condition="palette")


def test_a_damaged_file_is_refused(base, control, tmp_path):
    path = save_control(tmp_path / "union.safetensors", control, base)
    tensors = load_file(path)
    tensors.pop("task_embedding")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "task_embedding"):
        load_control(path, base)


def test_original_names_are_named(tmp_path):
    names = ("control_add_embedding.linear_1.weight", "task_embedding", "input_blocks.0.0.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "union.safetensors")
    with refused("wrong-kind", "Union", "diffusers' names"):
        load_control(tmp_path / "union.safetensors")


def test_it_moves_to_another_model_of_its_family(base, control):
    other = build_tiny_sdxl(seed=7)
    moved, _ = transfer(ControlNetUnion.for_base(base), base, other)
    name = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.allclose(moved.network.state_dict()[name], other.unet.state_dict()[name], atol=1e-6)


# Training


@pytest.fixture
def settings(base_folder, icons_file, tmp_path):
    return {
        "system": "controlnet-union",
        "base": str(base_folder),
        "conditions": ["canny", "palette"],
        "icons": str(icons_file),
        "out": str(tmp_path / "run"),
        "batch_size": 2,
        "steps": 2,
        "variants": 1,
        "score_pictures": 2,
        "warmup_steps": 0,
        "device": "cpu",
    }


def test_one_file_of_all_conditions_is_the_result_and_the_start_of_another_run(settings, tmp_path):
    recipe = build_recipe(settings)
    assert recipe.results == ("union.safetensors",)
    scores = train(recipe)
    assert {name.partition(": ")[0] for name in scores} == {"canny", "palette"}
    made = load_control(tmp_path / "run/union.safetensors")
    assert made.tasks == {"canny": 0, "palette": 1} and made.conditions == ("canny", "palette")
    more = {**settings, "start": str(tmp_path / "run/union.safetensors"), "conditions": ["palette", "blur"]}
    train(build_recipe({**more, "out": str(tmp_path / "more"), "name": "mine"}))
    assert load_control(tmp_path / "more/mine.safetensors").tasks == {"canny": 0, "palette": 1, "blur": 2}


def test_every_part_learns(settings):
    objective = objective_of(build_recipe(settings))
    before = {name: value.clone() for name, value in objective.control.state_dict().items()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
    for step in range(6):  # zero convolutions first: without them no gradient reaches anything else
        optimizer.zero_grad(set_to_none=True)
        objective.loss(step).backward()
        optimizer.step()
    after = objective.control.state_dict()
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


def test_evaluate_scores_each_task_of_a_file(settings, base_folder, tmp_path, capsys):
    train(build_recipe({**settings, "steps": 1}))
    path = str(tmp_path / "run/union.safetensors")
    arguments = ["evaluate", "control", path, "--base", str(base_folder), "--sets", "openmoji"]
    assert main([*arguments, "--images", "2", "--steps", "2", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert [row[0].rpartition(", ")[0].rpartition(", ")[2] for row in report["rows"]] == ["canny", "palette"]
