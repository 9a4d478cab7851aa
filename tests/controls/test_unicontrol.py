"""UniControl: the original class's files and outputs, tasks and their selection, training, and what teaches the
HyperNet."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import unicontrol_reference as reference
from PIL import Image
from safetensors.torch import load_file, save_file

from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.bases.text import Text
from controlkit.conditions import find
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Acts, Reads
from controlkit.controls.inputs import encode_images
from controlkit.controls.unicontrol import UniControl
from controlkit.controls.unicontrol.tasks import RELEASED
from controlkit.evaluation.sets import evaluation_set
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.load import load_control, save_control
from controlkit.formats.transfer import transfer
from controlkit.images import to_images, to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.inputs import parse_control_use
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.sampler import sample, sample_prompts
from controlkit.sampling.uses import ControlUse
from controlkit.training.diffusion import noised
from controlkit.training.recipes import build_recipe, read_recipe
from controlkit.training.run import objective_of
from controlkit.training.run import run as train
from refusals import refused

TASKS = {"canny": "canny edge to image", "palette": "palette to image", "grayscale": "gray image to color image"}


def fresh(base, tasks=TASKS, seed=1):
    torch.manual_seed(seed)
    return UniControl.for_base(base, tasks=tasks)


@pytest.fixture(scope="module")
def control(tiny_base):
    """One that changes images. Tests leave it as it is."""
    made = fresh(tiny_base)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def image(condition_image):
    return to_tensor([condition_image])


@pytest.fixture
def path(control, tiny_base, tmp_path):
    return save_control(tmp_path / "uni.safetensors", control, tiny_base, made={"steps": 4}, dtype=torch.float32)


def inputs_of(base, rows=2):
    x_t = torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    return x_t, torch.linspace(20, 900, rows).long(), base.encode_text(["red apple", "cat face"][:rows])


def prediction(control, base, image, **values):
    x_t, t, text = inputs_of(base)
    hint = control.encode({"image": image.expand(2, -1, -1, -1), **values}, base)
    return predict_under(control, base, x_t, t, text, hint)


def furthest(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


class OneInstruction:
    """A base with nothing but the recorded encoding of an instruction."""

    device = torch.device("cpu")

    def encode_text(self, prompts):
        return Text(reference.inputs()["instruction"])


class TestOriginal:
    @pytest.fixture(params=["1.0", "1.1"])
    def version(self, request):
        return request.param

    @pytest.fixture
    def file(self, version, tmp_path):
        path = tmp_path / "unicontrol.safetensors"
        save_file({f"control_model.{name}": value for name, value in reference.original_state(version).items()}, path)
        return path

    def test_outputs_equal_the_original_class(self, version, file):
        control = load_control(file)
        given = reference.inputs()
        hint = control.encode({"image": given["image"], "task": reference.TASK}, OneInstruction())
        residuals = control(given["x_t"], given["t"], Text(given["text"]), hint)
        outputs = [*residuals.family("skip"), residuals["middle"]]
        made = torch.tensor([reference.digest(output) for output in outputs])
        assert furthest(made, torch.tensor(reference.RECORDED[version])) <= 1e-4
        other = control.encode({"image": given["image"], "task": "canny"}, OneInstruction())
        assert furthest(control(given["x_t"], given["t"], Text(given["text"]), other)["middle"], outputs[-1]) > 1e-2

    def test_every_layout_is_read_and_written_bit_for_bit(self, version, file, tmp_path):
        facts = describe(str(file))
        assert (facts["kind"], facts["layout"]) == ("unicontrol", "original")
        assert facts["parameters"] == sum(value.numel() for value in reference.original_state(version).values())
        convert(file, tmp_path / "own.safetensors", "controlkit")
        convert(tmp_path / "own.safetensors", tmp_path / "bare.safetensors", "bare")
        assert describe(str(tmp_path / "bare.safetensors"))["layout"] == "bare"
        convert(tmp_path / "bare.safetensors", tmp_path / "back.safetensors", "original")
        before, after = load_file(file), load_file(tmp_path / "back.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert list(load_control(tmp_path / "own.safetensors").tasks.items()) == list(RELEASED.items())

    def test_it_is_taken_out_of_a_full_checkpoint(self, file, tmp_path):
        others = {
            f"{name}.weight": torch.ones(1)
            for name in (
                "model.diffusion_model.input_blocks.0.0",
                "cond_stage_model.transformer.x",
                "first_stage_model.x",
            )
        }
        save_file({**load_file(file), **others}, tmp_path / "full.safetensors")
        facts = describe(str(tmp_path / "full.safetensors"))
        assert (facts["kind"], facts["layout"]) == ("unicontrol", "full") and "Stable Diffusion" in facts["notes"]

    def test_a_damaged_file_is_refused(self, file, tmp_path):
        state = load_file(file)
        name = "control_model.task_id_layernet.3.bias"
        save_file({key: value for key, value in state.items() if key != name}, tmp_path / "less.safetensors")
        with refused("damaged-file", tmp_path / "less.safetensors", "1 of its 450 tensors", name):
            load_control(tmp_path / "less.safetensors")
        kept = {key: value for key, value in state.items() if "moe.12." not in key}
        save_file(kept, tmp_path / "twelve.safetensors")
        with refused("damaged-file", "12 tasks"):
            load_control(tmp_path / "twelve.safetensors")

    def test_what_the_original_code_would_run_differently_is_not_written_for_it(self, path, tiny_base, tmp_path):
        with refused("unsupported", "fixed tasks", "controlkit"):
            convert(path, tmp_path / "o.safetensors", "original")
        thirteen = save_control(tmp_path / "thirteen.safetensors", fresh(tiny_base, RELEASED), tiny_base)
        with refused("unsupported", "first token"):
            convert(thirteen, tmp_path / "o.safetensors", "original")


def test_it_has_the_known_size_and_cost():
    facts = describe_system("unicontrol", "sd15", size=512)
    assert facts["parameters"] == facts["trainable"] == 377_414_640
    assert facts["task adapters"] == 96_304 and facts["tensors"] == 450
    assert facts["GFLOP at 512 x 512"]["each step of each image"] == pytest.approx(268.6, rel=0.02)


class TestTasks:
    def test_a_new_one_changes_nothing_whatever_the_task(self, tiny_base, image):
        new = fresh(tiny_base)
        assert (new.reads, new.acts) == (Reads.NOISE | Reads.TIME | Reads.TEXT, Acts.RESIDUALS)
        x_t, t, text = inputs_of(tiny_base)
        for task in TASKS:
            assert torch.equal(prediction(new, tiny_base, image, task=task), tiny_base.predict(x_t, t, text))

    def test_the_adapter_and_the_instruction_of_a_task_both_count(self, control, tiny_base, image):
        canny = prediction(control, tiny_base, image, task="canny")
        swapped = prediction(control, tiny_base, image, task="canny", instruction=TASKS["palette"])
        palette = prediction(control, tiny_base, image, task="palette")
        assert min(furthest(canny, swapped), furthest(swapped, palette), furthest(canny, palette)) > 1e-3
        assert torch.equal(prediction(control, tiny_base, image, task="canny", instruction=TASKS["canny"]), canny)
        assert torch.equal(prediction(control.for_condition("canny"), tiny_base, image), canny)
        assert control.mixture is None and control.condition is None

    def test_the_first_token_tells_no_two_instructions_apart(self, control):
        """CLIP's attention is causal: what the paper's code gives its HyperNet is the same for every task."""
        nano = load_base("nano")
        first = UniControl.from_config({**control.config(), "instruction_token": "first"}).embed
        assert torch.equal(*(first(text, nano) for text in list(TASKS.values())[:2]))
        end = [control.embed(text, nano) for text in TASKS.values()]
        assert all(furthest(one, other) > 0.5 for one, other in zip(end, [*end[1:], end[0]], strict=True))

    def test_adapters_are_mixed_by_weights_of_any_sum(self, control, tiny_base, image):
        mixed = control.encode({"image": image, "task": {"canny": 3, "palette": 1, "grayscale": 0}}, tiny_base)
        view = control.for_task({"canny": 0.75, "palette": 0.25})
        assert view.condition is None
        again = view.encode({"image": image}, tiny_base)
        assert all(furthest(mixed[name], again[name]) <= 1e-6 for name in mixed)
        only = control.encode({"image": image, "task": {"canny": 2.0}}, tiny_base)
        plain = control.encode({"image": image, "task": "canny"}, tiny_base)
        assert all(furthest(only[name], plain[name]) <= 1e-6 for name in only)
        assert furthest(mixed["features"], plain["features"]) > 1e-4

        # The mean of the adapters' outputs, before the convolutions that tasks share.
        entered = []
        hook = control.entry[1].register_forward_hook(lambda layer, given, out: entered.append(given[0]))
        for task in ("canny", "palette", {"canny": 3, "palette": 1}):
            control.encode({"image": image, "task": task}, tiny_base)
        hook.remove()
        assert furthest(entered[0] * 0.75 + entered[1] * 0.25, entered[2]) <= 1e-5

    def test_rows_of_a_batch_may_have_tasks_of_their_own(self, control, tiny_base, image):
        x_t, t, text = inputs_of(tiny_base)
        hints = [control.encode({"image": image, "task": task}, tiny_base) for task in ("canny", "palette")]
        together = control(x_t, t, text, {name: torch.cat([hint[name] for hint in hints]) for name in hints[0]})
        for row, hint in enumerate(hints):
            alone = control(x_t[row : row + 1], t[row : row + 1], text.map(lambda part, r=row: part[r : r + 1]), hint)
            for site, residual in alone.items():
                assert furthest(together[site][row : row + 1], residual) <= 1e-5

    @pytest.mark.parametrize(
        ("values", "code", "words"),
        [
            ({}, "missing-setting", ("canny, palette, grayscale", '"task"')),
            ({"task": "cany"}, "unknown-name", ("cany", "canny")),
            ({"task": {"canny": 0}}, "wrong-type", ("above 0",)),
            ({"task": {"canny": -1, "palette": 2}}, "wrong-type", ("canny: -1",)),
        ],
    )
    def test_a_task_that_there_is_not_is_refused(self, control, tiny_base, image, values, code, words):
        with refused(code, *words):
            control.encode({"image": image, **values}, tiny_base)

    def test_other_names_of_conditions_select_their_task(self, control, tiny_base):
        thirteen = fresh(tiny_base, RELEASED)
        assert thirteen.for_task("control_inpainting").condition == "inpaint"
        assert thirteen.for_task("outpainting").condition == "outpaint"
        assert "img" not in thirteen.conditions and len(thirteen.conditions) == 12


class TestSampling:
    def test_images_do_not_depend_on_their_batch_nor_on_a_cache(self, control, tiny_base, image):
        use = ActiveControl(control, control.encode({"image": image, "task": "canny"}, tiny_base), weight=0.7)
        settings = {"prompt": "red apple", "steps": 3, "guidance": 3.0, "uses": [use]}
        together = torch.cat(list(sample(tiny_base, seeds=range(3), **settings)))
        cache = ResidualCache()
        for _ in range(2):
            alone = [torch.cat(list(sample(tiny_base, seeds=[seed], cache=cache, **settings))) for seed in range(3)]
            assert furthest(together, torch.cat(alone)) <= 1e-4

    def test_two_tasks_act_together_each_on_its_image(self, control, tiny_base, image):
        chosen = {"canny": image, "palette": 1 - image}
        hints = [control.encode({"image": each, "task": task}, tiny_base) for task, each in chosen.items()]
        x_t, t, text = inputs_of(tiny_base)
        expected = control(x_t, t, text, hints[0]) + control(x_t, t, text, hints[1])
        assert furthest(tiny_base.predict(x_t, t, text, expected), tiny_base.predict(x_t, t, text)) > 1e-3
        uses = [ActiveControl(control, hint) for hint in hints]
        settings = {"prompt": "red apple", "seeds": (1,), "steps": 2, "guidance": 3.0}
        made = torch.cat(list(sample(tiny_base, uses=uses, **settings)))
        for use in uses:
            assert furthest(made, torch.cat(list(sample(tiny_base, uses=[use], **settings)))) > 1e-4

    def test_generate_takes_the_task_from_the_inputs_and_computes_its_condition(
        self, path, tiny_base, control, tmp_path
    ):
        photo = np.asarray(
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64))
        )
        Image.fromarray(photo).save(tmp_path / "photo.png")
        results = {}
        for task in ("canny", "palette"):
            (tmp_path / f"{task}.json").write_text(json.dumps({"image": "photo.png", "task": task}))
            use = ControlUse(control=str(path), image=str(tmp_path / f"{task}.json"))
            request = GenerateRequest(prompt="red apple", base="tiny", controls=(use,), steps=2)
            results[task] = generate(request, base=tiny_base)
            expected = find(task)(photo)
            assert np.array_equal(np.asarray(results[task].conditions["condition0-image"]), expected)
        first, second = (np.asarray(result.images[0].image, float) for result in results.values())
        assert np.abs(first - second).max() > 0
        use = ControlUse(control=str(path), image=str(tmp_path / "photo.png"))
        with refused("missing-setting", "canny, palette, grayscale"):
            generate(GenerateRequest(prompt="red apple", controls=(use,), steps=2), base=tiny_base)
        wrong = ControlUse(control=str(path), inputs={"image": "photo.png", "task": ["canny"]})
        with refused("wrong-type", "task", "name of a task"):
            generate(GenerateRequest(prompt="red apple", controls=(wrong,), steps=2), base=tiny_base)

    def test_a_file_converted_for_one_condition_needs_no_task(self, path, tiny_base, control, image, tmp_path):
        convert(path, tmp_path / "canny.safetensors", "controlkit", condition="canny")
        one = load_control(tmp_path / "canny.safetensors", tiny_base)
        assert one.conditions == ("canny",)
        assert torch.equal(prediction(one, tiny_base, image), prediction(control, tiny_base, image, task="canny"))
        swapped = prediction(one, tiny_base, image, task="palette")
        assert torch.equal(swapped, prediction(control, tiny_base, image, task="palette"))


class TestFiles:
    def test_it_loads_as_it_was_saved(self, path, control, tiny_base):
        loaded = load_control(path, tiny_base)
        assert loaded.tasks == control.tasks and loaded.conditions == tuple(TASKS)
        assert loaded.config() == json.loads(json.dumps(control.config()))
        for name, value in control.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name

    def test_card_and_inspect_list_its_tasks(self, path, capsys):
        card = card_of(path)
        assert "A UniControl for the base `tiny`" in card and "palette (palette to image)" in card
        assert '"task"' in card
        assert main(["inspect", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["kind"] == "unicontrol" and "canny (canny edge to image)" in facts["tasks"]
        assert "task (value, optional)" in facts["inputs"]

    def test_one_of_another_base_is_refused(self, path, tiny_base):
        with refused("incompatible", path, "nano"):
            load_control(path, load_base("nano"))
        other = fresh(tiny_base)
        other.hint_channels = [16, 32]
        assert "divides the image by 2" in other.incompatibility(tiny_base)

    def test_transfer_moves_the_copy_alone(self, control, tiny_base):
        target = copy.copy(tiny_base)
        target.__dict__.pop("fingerprint", None)
        target.unet = copy.deepcopy(tiny_base.unet)
        with torch.no_grad():
            target.unet.conv_in.weight += 0.25
        moved, offset = transfer(control, tiny_base, target)
        assert offset.moved > 0
        changed = [
            name for name, value in control.state_dict().items() if not torch.equal(value, moved.state_dict()[name])
        ]
        assert changed == ["network.conv_in.weight"]


class TestTraining:
    @pytest.fixture
    def settings(self, tmp_path, base_folder, icons_file):
        return {
            "system": "unicontrol",
            "out": str(tmp_path / "run"),
            "icons": str(icons_file),
            "base": str(base_folder),
            "conditions": ["canny", "palette"],
            "steps": 4,
            "batch_size": 2,
            "variants": 1,
            "score_pictures": 2,
            "warmup_steps": 0,
            "min_lr_rate": 1.0,
            "learning_rate": 0.01,
            "preview_every": 4,
            "device": "cpu",
        }

    def test_one_file_of_all_conditions_is_the_result_and_the_start_of_another_run(self, settings, tmp_path, tiny_base):
        recipe = build_recipe(settings)
        assert recipe.results == ("unicontrol.safetensors",)
        scores = train(recipe)
        assert {name.partition(": ")[0] for name in scores} == {"canny", "palette"}
        made = load_control(tmp_path / "run/unicontrol.safetensors")
        assert made.tasks == {"canny": "canny edge to image", "palette": "palette to image"}
        more = {
            **settings,
            "out": str(tmp_path / "more"),
            "name": "uni",
            "start": str(tmp_path / "run/unicontrol.safetensors"),
            "conditions": ["palette", "blur"],
            "instructions": ["colours to image", "sharpen"],
        }
        train(build_recipe(more))
        further = load_control(tmp_path / "more/uni.safetensors")
        assert further.tasks == {**made.tasks, "palette": "colours to image", "blur": "sharpen"}
        assert len(further.task_adapters) == 3
        kept, still = (list(one.task_adapters[0].parameters()) for one in (made, further))
        assert all(torch.equal(a, b) for a, b in zip(kept, still, strict=True))
        with refused("would-overwrite", "state"):
            build_recipe({**settings, "name": "state"})
        with refused("contradiction", "instructions", "2"):
            objective_of(build_recipe({**settings, "out": str(tmp_path / "third"), "instructions": ["one"]}))

    @pytest.mark.parametrize("trained", [["canny"], ["canny", "palette"], ["palette"]])
    def test_a_file_of_one_task_that_learns_another_selects_neither(self, trained, settings, tiny_base, tmp_path):
        one, out = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
        save_control(one, UniControl.for_base(tiny_base, "canny"), tiny_base)
        recipe = build_recipe({**settings, "start": str(one), "conditions": trained})
        start = load_control(one, tiny_base)
        control = UniControl.for_training(tiny_base, recipe.conditions, recipe.options, name="uni", seed=0, start=start)
        save_control(out, control, tiny_base)
        made = load_control(out)
        if trained == ["canny"]:
            assert made.conditions == ("canny",) and made.mixture == {"canny": 1.0}
        else:
            assert made.conditions == ("canny", "palette")
            with refused("missing-setting", "canny, palette"):
                made.with_values({})

    @pytest.mark.parametrize("frozen", [False, True])
    def test_the_hypernet_learns_unless_it_is_frozen(self, settings, frozen):
        objective = objective_of(build_recipe({**settings, "freeze_hypernet": frozen}))
        control = objective.control
        before = copy.deepcopy(control.state_dict())
        optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
        for step in range(4):  # zero convolutions first: without them no gradient reaches anything else
            optimizer.zero_grad(set_to_none=True)
            objective.loss(step).backward()
            optimizer.step()
        own = ("hypernet.", "zero_scales.", "entry_scales.", "exit_scales.")
        after = control.state_dict()
        changed = {name: not torch.equal(value, after[name]) for name, value in before.items()}
        assert {value for name, value in changed.items() if name.startswith(own)} == {not frozen}
        assert all(value for name, value in changed.items() if not name.startswith(own))

    def test_checkpointing_changes_no_gradient(self, settings):
        gradients = []
        for on in (False, True):
            objective = objective_of(build_recipe({**settings, "gradient_checkpointing": on}))
            with torch.no_grad():
                for parameter in objective.parameters():
                    parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view(parameter.shape))
            objective.loss(0).backward()
            gradients.append([parameter.grad for parameter in objective.parameters()])
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-6)

    def test_the_recipe_of_nano_is_one(self):
        recipe = read_recipe("recipes/nano/unicontrol.yaml")
        assert len(recipe.conditions) == 9 and not recipe.freeze_hypernet

    def test_evaluate_scores_each_condition_of_a_file(self, path, base_folder, capsys):
        arguments = ["evaluate", "control", str(path), "--base", str(base_folder), "--sets", "openmoji"]
        assert main([*arguments, "--images", "2", "--steps", "2", "--json"]) == 0
        (report,) = json.loads(capsys.readouterr().out)["reports"]
        assert [row[0].rpartition(", ")[0].rpartition(", ")[2] for row in report["rows"]] == list(TASKS)


def as_tasks(controlnet, base, tasks):
    """A UniControl that computes what a ControlNet does, whatever the task, with a HyperNet of scales near 1."""
    made = fresh(base, tasks)
    copied = {k: v for k, v in controlnet.network.state_dict().items() if not k.startswith("controlnet_down_blocks.")}
    made.network.load_state_dict(copied)
    made.zero_convs.load_state_dict(controlnet.network.controlnet_down_blocks.state_dict())
    hint = controlnet.hint_network
    first, blocks, last = hint.conv_in, list(hint.blocks), hint.conv_out
    shared = [layer for layer in made.shared_adapter if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        for adapter in made.task_adapters:
            own = [layer for layer in adapter if isinstance(layer, torch.nn.Conv2d)]
            for layer, other in zip(own, [first, *blocks[:2]], strict=True):
                layer.load_state_dict(other.state_dict())
        for layer, other in zip(shared, blocks[2:], strict=True):
            layer.load_state_dict(other.state_dict())
        for layer in (*made.entry, made.exit[1]):
            layer.weight.zero_()
            layer.bias.zero_()
        torch.nn.init.dirac_(made.entry[0].weight)
        made.exit[0].load_state_dict(last.state_dict())
        for layer in (*made.zero_scales, made.entry_scales, made.exit_scales):
            layer.weight *= 0.01
    return made


def test_swapped_instructions_change_which_of_two_images_is_followed():
    """On nano, with its canny control under two tasks of the same adapter. Only the HyperNet is trained, 40 steps of 8:
    under one instruction condition images belong to their targets, under the other to other targets."""
    base = load_base("nano")
    controlnet = load_control("canny", base)
    tasks = {"canny": "canny edge to image", "shuffle": "image without edges"}
    control = as_tasks(controlnet, base, tasks).requires_grad_(False)
    x_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    same = (x_t, torch.tensor([300, 800]), base.encode_text(["red apple", "cat face"]))
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = predict_under(controlnet, base, *same, controlnet.encode(noise, base))
        made = predict_under(control, base, *same, control.encode({"image": noise, "task": "shuffle"}, base))
    assert furthest(made, expected) <= 1e-2

    def encoded(images, task):  # the adapter of canny, the instruction of the task
        return control.encode({"image": images, "task": "canny", "instruction": tasks[task]}, base)

    held_out = evaluation_set("held-out").first(6)
    edges = [find("canny")(image) for image in held_out.images]
    others = [*edges[1:], edges[0]]

    def followed(instruction, instruction_of_others):
        """Edge F1 to `edges` and to `others`, which act together."""
        pairs = ((edges, instruction), (others, instruction_of_others))
        uses = [
            ActiveControl.in_mode(None, base, control=control, hint=encoded(to_tensor(images), task))
            for images, task in pairs
        ]
        with torch.no_grad():
            batches = sample_prompts(base, prompts=[""] * 6, seeds=range(6), uses=uses, steps=8)
            results = [np.asarray(image) for batch in batches for image in to_images(batch)]
        return [find("canny").mean_score(images, results, held_out.images) for images, _ in pairs]

    before = followed("canny", "shuffle")
    assert abs(before[0] - before[1]) < 0.15

    seen = evaluation_set("seen").first(48)
    latents = base.encode_image(to_tensor(seen.images) * 2 - 1)
    conditions = to_tensor([find("canny")(image) for image in seen.images])
    trained = [p.requires_grad_(True) for module in control.hypernet_modules() for p in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        rows, unrelated = torch.randint(48, (2, 8), generator=generator)
        task, given = ("canny", conditions[rows]) if step % 2 == 0 else ("shuffle", conditions[unrelated])
        noisy = noised(base.schedule, latents[rows], generator, 8, slice(0, 8))
        text = base.encode_text([seen.captions[int(row)] if row % 2 else "" for row in rows])
        prediction = predict_under(control, base, noisy.x_t, noisy.t, text, encoded(given, task))
        optimizer.zero_grad()
        noisy.mean(noisy.squared_error(prediction)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    first, second = followed("canny", "shuffle")
    assert first > second + 0.25
    first, second = followed("shuffle", "canny")
    assert second > first + 0.25


def test_previews_and_evaluation_pass_one_image(control, tiny_base, image):
    view = control.for_condition("palette")
    hint = encode_images(view, image, tiny_base)
    again = control.encode({"image": image, "task": "palette"}, tiny_base)
    assert all(torch.equal(hint[name], again[name]) for name in hint)


def test_a_task_on_the_command_line(path, tiny_base, condition_image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(condition_image).convert("RGB").save("photo.png")

    def made(options, **inputs):
        use = parse_control_use(f"uni.safetensors=photo.png{options}") if not inputs else ControlUse(**inputs)
        return generate(GenerateRequest(prompt="cat face", controls=(use,), steps=2), base=tiny_base)

    inline = made(",task=canny,low=20,high=60")
    expected = find("canny")(np.asarray(Image.open("photo.png")), low=20, high=60)
    assert np.array_equal(np.asarray(inline.conditions["condition0-image"]), expected)
    settings = {"control": "uni.safetensors", "inputs": {"image": "photo.png", "task": "canny"}}
    python = made("", **settings, parameters={"low": 20, "high": 60})
    assert inline.images[0].image.tobytes() == python.images[0].image.tobytes()
    mixed = made(',task={"canny": 1, "palette": 3},instruction=palette to image,prepared')
    python = made("", **(settings | {"inputs": mixed.request.controls[0].inputs}), prepared=True)
    assert mixed.request.controls[0].inputs["task"] == {"canny": 1, "palette": 3}
    assert mixed.images[0].image.tobytes() == python.images[0].image.tobytes()
    with refused("missing-setting", ",task=canny"):
        made("")
    with refused("unknown-key", "'lwo'", "low"):
        made(",task=canny,lwo=3")
    with refused("contradiction", "low", "prepared"):
        made(",task=canny,low=3,prepared")
