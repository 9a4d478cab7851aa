"""Base training of CtrLoRA: one condition a step, all equally often, from icons and from MultiGen-20M's layout."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from several_processes import together, torchrun

from controlkit.bases.load import load_base
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.data.multigen import MultiGen
from controlkit.errors import UserError
from controlkit.formats.load import load_control
from controlkit.formats.metadata import read_metadata
from controlkit.training.control_objective import ControlObjective
from controlkit.training.recipes import read_recipe, recipes
from controlkit.training.run import objective_of, run
from controlkit.training.sources.multigen import MultiGenSource
from controlkit.training.sources.source import Step
from controlkit.training.state import load_state
from controlkit.training.trainer import train
from refusals import refused

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(tmp_path, base_folder, icons_file):
    return recipes()["ctrlora-base"](
        out=str(tmp_path / "run"),
        icons=str(icons_file),
        base=str(base_folder),
        conditions=("canny", "palette", "inpaint"),
        rank=2,
        steps=6,
        batch_size=2,
        variants=1,
        score_pictures=2,
        warmup_steps=0,
        min_lr_rate=1.0,
        learning_rate=0.01,
        preview_every=100,
        device="cpu",
    )


@pytest.fixture
def multigen(tmp_path):
    """Two tasks of six images in MultiGen-20M's layout; conditions and images differ in resolution."""
    folder = tmp_path / "multigen"
    for task in ("canny", "hed"):
        lines = []
        for number in range(6):
            blocks = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
            image = Image.fromarray(blocks).resize((160, 120))
            (folder / "images").mkdir(parents=True, exist_ok=True)
            (folder / "conditions" / task).mkdir(parents=True, exist_ok=True)
            image.save(folder / f"images/{number}.jpg")
            image.convert("L").resize((80, 60)).save(folder / f"conditions/{task}/{number}.png")
            entry = {"source": f"./{number}.jpg", "prompt": f"thing {number}"}
            lines.append(json.dumps({**entry, f"control_{task}": f"./{task}/{number}.png"}))
        (folder / "json_files").mkdir(exist_ok=True)
        (folder / f"json_files/aesthetics_plus_all_group_{task}_all.json").write_text("\n".join(lines) + "\n")
    return folder


def test_every_condition_gets_the_same_number_of_optimiser_steps(recipe):
    objective = ControlObjective(recipe, CPU)
    counts = collections.Counter(objective.condition_at(step) for step in range(30))
    assert set(counts.values()) == {10}
    optimizers = []
    original = torch.optim.AdamW

    class Kept(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            optimizers.append(self)

    torch.optim.AdamW = Kept
    try:
        train(objective, recipe)
    finally:
        torch.optim.AdamW = original
    steps = {name: set() for name in recipe.conditions}
    for name in recipe.conditions:
        for parameter in objective.control.adapters[name].parameters():
            steps[name].add(int(optimizers[0].state[parameter]["step"]))
    assert steps == {name: {2} for name in recipe.conditions}


def test_base_training_ends_with_a_base_and_whole_adapters(recipe, tmp_path, base_folder):
    run(recipe)
    base = load_base(base_folder)
    for name in recipe.conditions:
        control = load_control(tmp_path / "run" / f"{name}.safetensors", base)
        assert isinstance(control, CtrLoRA) and control.condition == name
    shared = load_control(tmp_path / "run" / "base.safetensors", base)
    # The file of an adapter has its own copy of what base training shares.
    path = next(path for path in control.base_control.layers if path.startswith("controlnet_down_blocks.0"))
    mine = control.base_control.adapters[control.adapter].state_dict()[f"{path}.weight"]
    assert torch.equal(mine, shared.network.state_dict()[f"{path}.weight"])


def test_base_training_goes_on_with_the_adapters_beside_its_start(recipe, tmp_path, capsys):
    run(recipe)
    names = ("canny", "inpaint", "grayscale")
    start = str(tmp_path / "run" / "base.safetensors")
    further = dataclasses.replace(recipe, out=str(tmp_path / "further"), start=start, conditions=names)
    objective = ControlObjective(further, CPU)
    assert "goes on with canny, inpaint and begins grayscale anew" in capsys.readouterr().err
    control = objective.control
    assert list(control.adapters) == ["canny", "inpaint", "grayscale"]
    for name in ("canny", "inpaint"):
        saved = load_file(tmp_path / "run" / f"{name}.safetensors")
        mine = control.adapters[name]
        assert mine.shares_base and all(parameter.requires_grad for parameter in mine.parameters())
        assert all(torch.equal(value, saved[key].float()) for key, value in mine.state_dict().items())
    run(further)
    run(dataclasses.replace(further, steps=7))  # resumes
    load_control(tmp_path / "further" / "canny.safetensors", load_base(recipe.base))


def test_base_training_refuses_adapters_that_it_cannot_go_on_with(recipe, tmp_path, capsys):
    run(recipe)
    start = str(tmp_path / "run" / "base.safetensors")
    further = dataclasses.replace(recipe, out=str(tmp_path / "further"), start=start)
    with refused("contradiction", "canny", "rank=2"):
        ControlObjective(dataclasses.replace(further, rank=3), CPU)
    file = tmp_path / "run" / "canny.safetensors"
    tensors = load_file(file)
    tensors[next(name for name in tensors if name.startswith("controlnet_down_blocks"))] += 1
    save_file(tensors, file, read_metadata(file))
    capsys.readouterr()
    with refused("incompatible", "canny", "alone"):
        ControlObjective(further, CPU)
    assert "goes on with" not in capsys.readouterr().err


def test_shipped_adapters_that_were_trained_alone_begin_anew(recipe, capsys):
    changes = {"base": "nano", "start": "nano/base", "conditions": ("canny", "palette"), "rank": 4}
    control = ControlObjective(dataclasses.replace(recipe, **changes), CPU).control
    assert "goes on with canny and begins palette anew" in capsys.readouterr().err
    assert list(control.adapters) == ["canny", "palette"]
    assert all(adapter.shares_base for adapter in control.adapters.values())


def test_multigen_crops_condition_and_image_alike(multigen):
    lines = MultiGen(multigen, "canny")
    assert len(lines) == 6
    given, image, prompt = lines.pair(3, 64, np.random.default_rng(0))
    assert given.shape == image.shape == (64, 64, 3) and prompt == "thing 3"
    grey = np.asarray(Image.fromarray(image).convert("L"), float)
    assert np.corrcoef(grey.ravel(), given[..., 0].astype(float).ravel())[0, 1] > 0.95
    shifted, _, _ = lines.pair(3, 64, np.random.default_rng(1))
    assert not np.array_equal(given, shifted)
    with pytest.raises(UserError, match=r"no task 'cany'.*canny"):
        MultiGen(multigen, "cany")


def test_truncated_pairs_are_skipped_and_counted(multigen, tiny_base, tiny_control, capsys):
    (multigen / "images/4.jpg").write_bytes(b"torn")
    recipe = recipes()["controlnet"](out="x", steps=1, multigen=str(multigen), condition="canny", score_pictures=2)
    source = MultiGenSource(recipe)
    source.prepare(tiny_base, tiny_control)

    def batch(count):
        return source.batch(
            "canny", Step(number=0, seed=0, global_batch=count, local_slice=slice(None), generator=None)
        )

    first, again = batch(8), batch(8)
    assert first.condition_images.shape == first.images.shape == (8, 3, 64, 64)
    assert set(first.text) <= {"", "thing 2", "thing 3", "thing 5"}
    skipped = capsys.readouterr().err
    assert "so far" in skipped and "images/4.jpg" in skipped
    assert torch.equal(first.condition_images, again.condition_images) and torch.equal(first.images, again.images)
    assert list(source.held_out("canny").prompts) == ["thing 0", "thing 1"]
    for number in (2, 3, 5):
        (multigen / f"images/{number}.jpg").unlink()
    with refused("bad-data", 100, "canny"):
        batch(2)


def test_the_recipe_for_stable_diffusion_trains_on_multigen(multigen, base_folder, tmp_path):
    recipe = read_recipe(
        RECIPES / "sd15" / "ctrlora-base.yaml",
        [
            f"multigen={multigen}",
            f"base={base_folder}",
            f"out={tmp_path / 'run'}",
            "conditions=[canny, hed]",
            "rank=2",
            "steps=2",
            "batch_size=2",
            "score_pictures=2",
            "precision=fp32",
            "device=cpu",
        ],
    )
    scores = run(recipe)
    # hed has no annotator without weights here, so only canny can be scored.
    assert [name.partition(":")[0] for name in scores] == ["canny"]
    assert (tmp_path / "run" / "hed.safetensors").is_file()


def test_multigen_as_pairs_encodes_no_image_in_a_step(multigen, base_folder, tmp_path, monkeypatch):
    changes = [f"pairs={multigen}", "multigen=null", "crops=2", f"base={base_folder}", f"out={tmp_path / 'run'}"]
    changes += ["conditions=[canny, hed]", "rank=2", "steps=2", "batch_size=2", "precision=fp32", "device=cpu"]
    recipe = read_recipe(RECIPES / "sd15" / "ctrlora-base.yaml", changes)
    objective = objective_of(recipe)
    monkeypatch.setattr(type(objective.base), "encode_image", lambda *_: pytest.fail("encoded in a step"))
    assert all(objective.loss(step).isfinite() for step in range(4))


def test_no_source_of_data_or_two_are_refused(recipe):
    for change, code, *facts in (
        ({"icons": None}, "missing-setting"),
        ({"pairs": "pairs"}, "contradiction", "not icons and pairs"),
    ):
        with refused(code, "icons, multigen, pairs or scenes", *facts):
            recipes()["ctrlora-base"](**{**vars(recipe), **change})


def train_together(recipe, tmp_path, start, **environment):
    """Train in two processes of this machine; returns what they said on standard error."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"system": recipe.system, **vars(recipe)}))
    words = ["-m", "controlkit", "train", path]
    if start == "environment":
        return together(words, tmp_path, **environment)
    made = torchrun(words, **environment)
    assert made.returncode == 0, made.stderr
    return made.stderr


HOW = {
    # A configuration of accelerate's with mixed precision changes nothing: the recipe says float32.
    "DDP": {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "bf16"},
    "FSDP": {"ACCELERATE_USE_FSDP": "true"},
    "ZeRO": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.fixture
def one_thread():
    """As many threads as each of several processes has, so that sums are rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("how", "start"),
    [
        pytest.param("DDP", "environment", id="DDP"),
        # Slow: each launch by torchrun is three imports of torch and diffusers, on top of another two or three runs.
        pytest.param("DDP", "torchrun", id="DDP by torchrun", marks=pytest.mark.slow),
        pytest.param("FSDP", "torchrun", id="FSDP", marks=pytest.mark.slow),
        pytest.param("ZeRO", "torchrun", id="ZeRO", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_with_the_whole_batch_trains(recipe, tmp_path, how, start, one_thread):
    # Adam moves a weight whose gradient is rounding alone by a whole learning rate, up or down, and the next losses
    # tell: with a small rate they differ by less than what is looked for, on whatever processor rounds.
    recipe = dataclasses.replace(recipe, learning_rate=recipe.learning_rate / 10)
    whole = dataclasses.replace(recipe, steps=4, batch_size=4, log_every=1, ema=0.9, out=str(tmp_path / "whole"))
    run(whole)
    halves = dataclasses.replace(whole, batch_size=2, out=str(tmp_path / "halves"))
    environment = HOW[how]
    if how == "FSDP":  # in two parts, so that what is split is saved and read again
        train_together(dataclasses.replace(halves, steps=2), tmp_path, start, **environment)
    said = train_together(halves, tmp_path, start, **environment)
    assert said.count("step 4/4") == 1
    assert said.count("mixed precision, bf16, is not used") == (how == "DDP")
    assert said.count("ZeRO stage 3 runs as torch's FSDP") == (how == "ZeRO")

    def losses(out):
        return [json.loads(line)["loss"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]

    assert losses(halves.out) == pytest.approx(losses(whole.out), abs=1e-5)
    # The loss monitor has the samples of all processes.
    mine, theirs = (load_state(Path(out) / "state.safetensors").loss_monitor for out in (halves.out, whole.out))
    assert sum(seen for seen, _, _ in theirs["times"]) == 4 * 4
    for some, same in zip(mine["times"], theirs["times"], strict=True):
        assert some[:2] == pytest.approx(same[:2], rel=1e-3)
    # The moments are means of gradients and of their squares: what one batch and its two halves must agree on.
    one, two = (load_file(Path(out) / "state.safetensors") for out in (whole.out, halves.out))
    assert one.keys() == two.keys()
    for moment in ("exp_avg", "exp_avg_sq"):
        named = [key for key in one if key.startswith("optimizer/") and key.endswith(f"/{moment}")]
        size, apart = (
            sum((one[key] - times * two[key]).pow(2).sum().item() for key in named) ** 0.5 for times in (0, 1)
        )
        assert named and apart < 1e-3 * size, (moment, apart / size)
    # Nearly all weights agree.
    start = tmp_path / "start"
    ControlObjective(whole, CPU).save(start, 0)
    for name in ("base", *recipe.conditions):
        before, one, two = (load_file(Path(out) / f"{name}.safetensors") for out in (start, whole.out, halves.out))
        assert before.keys() == one.keys() == two.keys()
        learned, apart = (
            torch.cat([(a[key].float() - b[key].float()).abs().flatten() for key in one])
            for a, b in ((one, before), (one, two))
        )
        assert learned.max() > recipe.learning_rate / 2
        astray = (apart > 0.5 * recipe.learning_rate).float().mean().item()
        assert astray < 0.005, (name, astray)
