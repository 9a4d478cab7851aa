"""A system of one's own in one file outside the package: every verb knows it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny
from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.controls import registry
from controlkit.controls.apply import predict_under
from controlkit.controls.control import Acts, Reads
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.file_format import FileFormat, renaming
from controlkit.data.pairs import write_pairs
from controlkit.errors import UserError
from controlkit.evaluation.eval_set import EvalSet
from controlkit.evaluation.evaluate_control import evaluate_control
from controlkit.formats.card import card_of
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.detect import detect
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.uses import ControlUse
from controlkit.training.control_objective import ControlObjective
from controlkit.training.recipes import build_recipe, read_recipe, recipes
from controlkit.training.run import objective_of
from controlkit.training.run import run as train
from refusals import refused

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_control.py"
PAGE = Path(__file__).parents[2] / "docs" / "systems.md"


def shift_of_the_page() -> str:
    """The first block of Python in docs/systems.md, which acts by residuals and says nothing but what it has to."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.fixture
def own(fresh_registry, monkeypatch, tmp_path):
    (tmp_path / "shift.py").write_text(shift_of_the_page())
    monkeypatch.setenv(registry.VARIABLE, os.pathsep.join(map(str, (EXAMPLE, tmp_path / "shift.py"))))
    return registry.registry()


@pytest.fixture
def settings(tmp_path, base_folder, icons_file):
    return {
        "out": str(tmp_path / "run"),
        "icons": str(icons_file),
        "base": str(base_folder),
        "condition": "palette",
        "steps": 4,
        "batch_size": 2,
        "variants": 1,
        "score_pictures": 2,
        "warmup_steps": 0,
        "min_lr_rate": 1.0,
        "learning_rate": 0.05,
        "save_every": 1,
        "preview_every": 4,
        "device": "cpu",
    }


def acting(kind, base, **options):
    """One that changes images."""
    torch.manual_seed(3)
    control = kind.for_base(base, "palette", **options)
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return control.eval().requires_grad_(False)


@pytest.fixture
def control(own, tiny_base):
    return acting(own["modulation"], tiny_base, width=8)


@pytest.fixture
def path(control, tiny_base, tmp_path):
    return save_control(tmp_path / "mine.safetensors", control, tiny_base, made={"steps": 4}, dtype=torch.float32)


def test_it_inherits_from_no_system_of_ours_reads_the_text_alone_and_acts_by_a_tap(own):
    kind = own["modulation"]
    assert {base.__module__ for base in kind.__mro__[1:]}.isdisjoint({other.__module__ for other in own.values()})
    assert (kind.reads, kind.acts) == (Reads.TEXT, Acts.TAPS)
    assert (own["shift"].reads, own["shift"].acts) == (Reads.TEXT, Acts.RESIDUALS)


def test_its_recipe_is_one(own):
    recipe = read_recipe(EXAMPLE.with_suffix(".yaml"))
    assert (recipe.system, recipe.width, recipe.options) == ("modulation-pairs", 32, {"width": 32})


@pytest.mark.parametrize("system", ["modulation", "shift"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not_bit_by_bit(own, settings, tmp_path, system, monkeypatch):
    scores = train(build_recipe({"system": system, **settings}))
    assert list(scores) == ["palette: colour distance, Lab"]
    broken = build_recipe({"system": system, **settings, "out": str(tmp_path / "broken")})
    loss = ControlObjective.loss

    def dies(self, step):
        if step == 2:
            raise RuntimeError("power cut")
        return loss(self, step)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(ControlObjective, "loss", dies)
        train(broken)
    assert train(broken) == scores
    one, other = (load_control(tmp_path / name / "palette.safetensors").state_dict() for name in ("run", "broken"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    changed = [name for name, value in one.items() if value.abs().max() > 0]
    assert set(changed) == set(one)


@pytest.mark.parametrize("system", ["modulation", "shift"])
def test_a_new_one_changes_nothing_and_checkpointing_changes_no_gradient(own, settings, system):
    gradients = []
    for on in (False, True):
        objective = objective_of(build_recipe({"system": system, **settings, "gradient_checkpointing": on}))
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.add_(torch.linspace(-0.2, 0.3, parameter.numel()).view(parameter.shape))
        objective.loss(0).backward()
        gradients.append([parameter.grad for parameter in objective.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))
    base = load_base(settings["base"])
    new = own[system].for_base(base, "palette")
    image = torch.rand(1, 3, 64, 64)
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([500]), base.encode_text(["cat face"]))
    with torch.no_grad():
        made = predict_under(new, base, *inputs, new.encode(image, base))
        assert torch.equal(made, base.predict(*inputs))


@pytest.mark.parametrize("flip", [False, True])
def test_it_trains_from_pairs_with_its_options_and_hints_from_the_cache(own, settings, tmp_path, flip):
    rng = np.random.default_rng(0)
    images = [np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((64, 64))) for _ in range(5)]
    write_pairs(tmp_path / "pairs", [(255 - image, image, f"thing {n}") for n, image in enumerate(images)])
    kept = {key: value for key, value in settings.items() if key not in ("icons", "variants", "condition")}
    recipe = build_recipe(
        {"system": "modulation-pairs", **kept, "pairs": str(tmp_path / "pairs"), "name": "mine", "width": 8,
         "held_out": 0.4, "flip": flip}
    )  # fmt: skip
    objective = objective_of(recipe)
    chosen, flipped = torch.tensor([0, 2]), torch.tensor([False, flip])
    pairs = objective.source.of["identity"]
    sources = [pairs.pairs[index].side("source", 64, bool(turn)) for index, turn in zip((0, 2), flipped, strict=True)]

    encoded = objective.control.encode(to_tensor(sources), objective.base)
    assert torch.allclose(pairs.hint(chosen, flipped), encoded, atol=1e-3)
    assert list(train(recipe)) == ["identity: PSNR to the target, dB"]
    made = load_control(tmp_path / "run" / "mine.safetensors")
    assert made.gate.out_features == 8 and made.condition == "identity"
    assert json.loads(read_metadata(tmp_path / "run" / "mine.safetensors")["control.made"])["pairs"] == 3
    with pytest.raises(UserError, match=r"'widht'.* width"):
        build_recipe({"system": "modulation-pairs", **kept, "pairs": "pairs", "widht": 8})


def test_its_file_loads_on_its_base_and_is_refused_on_another(path, control, tiny_base):
    loaded = load_control(path, tiny_base)
    assert type(loaded) is type(control) and loaded.condition == "palette"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())
    with refused("incompatible", path, "other", "16", "24"):
        other = tiny.build_tiny_base(text_width=24)
        other.name = "other"
        load_control(path, other)
    with refused("incompatible", path, "nano", "[32, 32, 32, 16]"):
        load_control(path, load_base("nano"))


def test_its_card_says_what_it_is(path):
    card = card_of(path)
    assert "A modulation for the base `tiny`." in card and '"modulation", "spatial-control", "palette"' in card
    assert "| steps | 4 |" in card and "--control mine.safetensors=IMAGE" in card


def test_inspect_tells_of_a_file_and_of_the_system(path, control, base_folder, capsys):
    facts = describe(path, base=str(base_folder))
    assert (facts["kind"], facts["layout"], facts["condition"]) == ("modulation", "controlkit", "palette")
    assert (facts["reads"], facts["enters at"]) == ("text, the base's features", "the decoder's hidden states")
    assert facts["parameters"] == sum(value.numel() for value in control.state_dict().values())
    # Taps act at each step of each image, so what they cost is counted there and nowhere else.
    assert list(facts["GFLOP at 64 x 64"]) == ["each step of each image"]
    assert main(["inspect", "modulation", "--base", "nano", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == 443_392 and told["GFLOP at 64 x 64"] == {"each step of each image": 0.079}
    assert list(describe_system("shift", "nano")["GFLOP at 64 x 64"]) == ["once for a condition"]


def test_it_is_converted_to_the_names_of_another_tool_and_back(path, control, tiny_base, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    made = convert(path, foreign, "spade")
    assert (made.kind, made.from_format, made.to_format) == ("modulation", "controlkit", "spade")
    assert set(detect(foreign).file.tensors) == {
        name.replace("features.", "trunk.").replace("gate.", "text_gate.").replace("heads.", "spade.")
        for name in control.state_dict()
    }
    back = tmp_path / "back.safetensors"
    assert convert(foreign, back, "controlkit").from_format == "spade"
    assert read_metadata(back)["control.condition"] == "palette"
    # A file that the other tool has written says nothing but names and shapes.
    bare = tmp_path / "bare.safetensors"
    save_file(dict(detect(foreign).file.tensors), bare)
    save_file(dict(control.state_dict()), tmp_path / "own names.safetensors")
    for file, layout in (
        (foreign, "spade"),
        (back, "controlkit"),
        (bare, "spade"),
        ("own names.safetensors", "controlkit"),
    ):
        assert detect(tmp_path / file).format_name == layout
        loaded = load_control(tmp_path / file, tiny_base)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in control.state_dict().items())
    with refused("unsupported", path, "a modulation", "original", "spade"):
        convert(path, tmp_path / "no.safetensors", "original")


def test_formats_of_earlier_plugins_are_described_by_says():
    assert FileFormat(name="a", says="its names").description == "its names"
    assert renaming(name="a", says="its names", title="a shift", prefixes={"a.": "b."}).description == "its names"


def test_a_foreign_file_that_is_not_whole_is_refused_in_words(control, tmp_path):
    names = {"features.": "trunk.", "gate.": "text_gate.", "heads.": "spade."}
    tensors = {
        names[name.split(".")[0] + "."] + name.partition(".")[2]: value for name, value in control.state_dict().items()
    }
    cases = [
        (
            {key: value for key, value in tensors.items() if key != "trunk.2.bias"},
            "1 of its",
        ),
        ({**tensors, "trunk.2.bias": torch.zeros(3)}, "features.2.bias has the shape (3,), not (8,)"),
        (
            {key: value for key, value in tensors.items() if key != "text_gate.weight"},
            "a modulation",
        ),
    ]
    for case, fact in cases:
        save_file(case, tmp_path / "case.safetensors")
        with refused("damaged-file", tmp_path / "case.safetensors", fact):
            load_control(tmp_path / "case.safetensors")
    save_file({**tensors, "other.weight": torch.zeros(3)}, tmp_path / "case.safetensors")
    with refused("wrong-kind", tmp_path / "case.safetensors"):
        load_control(tmp_path / "case.safetensors")


@pytest.mark.parametrize("system", ["modulation", "shift"])
def test_it_generates_together_with_another_control(own, system, tiny_base, base_folder, tmp_path, condition_image):
    Image.fromarray(condition_image).save(tmp_path / "image.png")
    mine, other = tmp_path / "mine.safetensors", tmp_path / "other.safetensors"
    save_control(mine, acting(own[system], tiny_base), tiny_base)
    save_control(other, tiny.randomise_zero_convolutions(ControlNet.for_base(tiny_base, "canny")), tiny_base)
    uses = tuple(ControlUse(control=str(file), image=str(tmp_path / "image.png")) for file in (mine, other))

    def draw(*chosen):
        request = GenerateRequest(
            prompt="red apple", base=str(base_folder), controls=chosen, seeds=(1, 2), steps=2, device="cpu"
        )
        return generate(request)

    def pixels(made):
        return np.stack([np.asarray(image.image, np.float32) for image in made.images])

    both = draw(*uses)
    for fewer in ((), uses[:1], uses[1:]):
        assert np.abs(pixels(both) - pixels(draw(*fewer))).max() > 2
    both.save(tmp_path / "out")
    again = generate(read_settings(tmp_path / "out").to_request())
    assert np.array_equal(pixels(again), pixels(both))


def test_it_is_evaluated_against_no_control_and_the_truth(control, tiny_base, condition_image):
    judged = EvalSet(
        name="two", condition_images=[condition_image] * 2, targets=[condition_image] * 2, prompts=["cat face"] * 2
    )
    report, sheet = evaluate_control(tiny_base, control, [judged], steps=2)
    assert report.rows[0][0] == "two (2)" and len(report.rows[0]) == 5
    assert set(report.facts["two"]) >= {"baseline", "control", "ceiling", "gap_closed"}
    assert report.facts["two"]["control"] != report.facts["two"]["baseline"] and sheet.width > 96


class TestWhereItIsFound:
    """By the environment (a file, an import path), and by an entry point of a package that is installed."""

    def test_by_the_path_of_its_file_in_a_process_of_its_own(self, tmp_path):
        made = subprocess.run(
            [sys.executable, "-c", "from controlkit.training.recipes import recipes; print(*recipes())"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, registry.VARIABLE: str(EXAMPLE)},
        )
        assert made.returncode == 0, made.stderr
        assert {"controlnet", "modulation", "modulation-pairs"} <= set(made.stdout.split())

    def test_by_an_import_path(self, fresh_registry, monkeypatch):
        monkeypatch.syspath_prepend(EXAMPLE.parent)
        monkeypatch.setenv(registry.VARIABLE, "my_control")
        assert registry.find("modulation").__module__ == "my_control"
        assert {"modulation", "modulation-pairs"} <= set(recipes())

    def test_by_an_entry_point(self, fresh_registry, monkeypatch, tmp_path):
        (tmp_path / "my_package-1.0.dist-info").mkdir()
        (tmp_path / "my_package-1.0.dist-info" / "METADATA").write_text("Name: my-package\nVersion: 1.0\n")
        (tmp_path / "my_package-1.0.dist-info" / "entry_points.txt").write_text(
            "[controlkit.controls]\nmodulation = my_package_control\n"
        )
        (tmp_path / "my_package_control.py").write_text(EXAMPLE.read_text())
        monkeypatch.syspath_prepend(tmp_path)
        assert registry.find("modulation").__module__ == "my_package_control"
        (tmp_path / "my_package-1.0.dist-info" / "entry_points.txt").write_text(
            "[controlkit.controls]\nmodulation = my_missing_package\n"
        )
        registry._load.cache_clear()
        with pytest.raises(UserError, match=r"my_missing_package.*modulation.*ModuleNotFoundError"):
            registry.registry()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("class :", r"SyntaxError: invalid syntax"),
            ("1 / 0", r"ZeroDivisionError: division by zero$"),
            ("raise SystemExit(3)", r"SystemExit: 3$"),
            ("import nothing_of_this_name", r"ModuleNotFoundError: .*nothing_of_this_name"),
            ("raise SystemError('two\\nlines')", r"SystemError: two lines$"),
            (
                "from controlkit.controls.control import OneImage\nfrom controlkit.controls.registry import control\n"
                "@control\nclass Empty(OneImage):\n    kind = 'empty'\n",
                r"Empty lacks title, reads, enters, config, encode, for_base, from_config, trainable_par",
            ),
            (
                EXAMPLE.read_text().replace('kind = "modulation"', 'kind = "controlnet"'),
                r"'controlnet' is taken by ControlNet",
            ),
        ],
        ids=["syntax", "fails", "ends", "import", "two lines", "lacks methods", "taken"],
    )
    def test_a_file_that_does_not_do_is_told_of_in_one_sentence(
        self, fresh_registry, monkeypatch, tmp_path, text, says, capsys
    ):
        (tmp_path / "broken.py").write_text(text)
        monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "broken.py"))
        with pytest.raises(UserError, match=says) as caught:
            registry.registry()
        message = str(caught.value)
        assert "broken.py" in message and "CONTROLKIT_CONTROLS" in message and "\n" not in message
        assert main(["inspect", "canny"]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told and "broken.py" in told

    def test_options_may_put_a_setting_into_another_form(self, fresh_registry, monkeypatch, tmp_path):
        field = '    """Channels of the features."""\n'
        text = EXAMPLE.read_text().replace(
            field,
            f"{field}\n    def __post_init__(self) -> None:\n"
            "        object.__setattr__(self, 'width', 8 * round(self.width / 8))\n",
        )
        (tmp_path / "own.py").write_text(text)
        monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "own.py"))
        values = {"system": "modulation", "out": "run", "icons": "icons.npz", "condition": "canny", "steps": 1}
        assert build_recipe({**values, "width": 30}).width == 32

    def test_what_a_file_prints_is_no_result(self, fresh_registry, monkeypatch, tmp_path, capsys):
        (tmp_path / "talks.py").write_text("print('hello')")
        monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "talks.py"))
        registry.registry()
        assert capsys.readouterr() == ("", "hello\n")

    def test_one_that_is_missing_or_trains_by_a_taken_name_is_told_of(self, fresh_registry, monkeypatch, tmp_path):
        monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "nothing.py"))
        with refused("missing-file", "CONTROLKIT_CONTROLS", tmp_path / "nothing.py"):
            registry.registry()
        taken = 'trainings = (Training(system="controlnet"),)'
        text = shift_of_the_page().replace("import OneImage, Reads", "import OneImage, Reads, Training")
        (tmp_path / "taken.py").write_text(
            text.replace("    reads = Reads.TEXT", f"    reads = Reads.TEXT\n    {taken}")
        )
        monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "taken.py"))
        with refused("plugin-failed", "a shift", "'controlnet'"):
            recipes()

    def test_a_system_that_is_registered_again_is_trained_as_it_is_now(self, fresh_registry, monkeypatch, tmp_path):
        # As a notebook does that runs a cell again, or a script that imports the file that the environment names.
        (tmp_path / "shift.py").write_text(shift_of_the_page())
        monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "shift.py"))
        first = recipes()["shift"].control_class
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "shift", raising=False)
        second = importlib.import_module("shift").Shift
        assert second is not first
        assert registry.find("shift") is second and recipes()["shift"].control_class is second

    def test_two_files_of_one_name_are_two_modules(self, fresh_registry, monkeypatch, tmp_path):
        files = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            files.append(tmp_path / name / "system.py")
            files[-1].write_text(shift_of_the_page().replace('"shift"', f'"shift-{name}"'))
        monkeypatch.setenv(registry.VARIABLE, os.pathsep.join(map(str, files)))
        assert {"shift-one", "shift-two"} <= set(registry.registry())
        modules = {registry.find(f"shift-{name}").__module__ for name in ("one", "two")}
        assert len(modules) == 2 and modules <= set(sys.modules)
