"""Controls that take more, or something else, than one image: from the command line and from Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit import conditions
from controlkit.apps.cli import main
from controlkit.controls import registry
from controlkit.data.pairs import write_pairs
from controlkit.evaluation.eval_set import EvalSet
from controlkit.evaluation.evaluate_control import evaluate_control
from controlkit.formats.card import card_of
from controlkit.formats.describe import describe, describe_system
from controlkit.formats.load import load_control, save_control
from controlkit.images import read_image
from controlkit.sampling.generate import generate
from controlkit.sampling.image_folder import refuse_overwriting
from controlkit.sampling.inputs import parse_control_use, with_named_inputs
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.residual_cache import ResidualCache
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.uses import ControlUse
from controlkit.training.recipes import build_recipe
from controlkit.training.run import objective_of
from controlkit.training.run import run as train
from refusals import refused

SYSTEMS = Path(__file__).parents[1] / "controls" / "my_inputs.py"
BOXES = [[0, 0, 8, 8, "a red apple"], [8, 8, 16, 16, "a cat"]]
COLOURS = np.full((64, 64, 3), (200, 40, 90), np.uint8)


@pytest.fixture
def folder(fresh_registry, monkeypatch, tmp_path, tiny_base, condition_image, base_folder):
    """Files of each system, two images, and a file that names them."""
    monkeypatch.setenv(registry.VARIABLE, str(SYSTEMS))
    for kind in ("scene", "boxes", "optional"):
        condition = "palette" if kind == "scene" else None
        save_control(tmp_path / f"{kind}.safetensors", registry.find(kind).for_base(tiny_base, condition), tiny_base)
    (tmp_path / "images").mkdir()
    Image.fromarray(condition_image).save(tmp_path / "images" / "edges.png")
    Image.fromarray(COLOURS).save(tmp_path / "images" / "colours.png")
    (tmp_path / "images" / "inputs.json").write_text(
        json.dumps({"edges": "edges.png", "colours": "colours.png", "boxes": BOXES})
    )
    (tmp_path / "boxes.json").write_text(json.dumps(BOXES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def request(*uses, **changes):
    return GenerateRequest(**{"prompt": "cat face", "base": "base", "controls": uses, "steps": 2, **changes})


def scene(**changes):
    inputs = {"edges": "images/edges.png", "colours": "images/colours.png", "boxes": BOXES}
    return ControlUse(control="scene.safetensors", **{"inputs": inputs, **changes})


def pixels(made):
    return np.stack([np.asarray(image.image, np.int16) for image in made.images])


def test_each_input_arrives_as_its_control_takes_it(folder, tiny_base, condition_image):
    control = load_control("scene.safetensors", tiny_base)
    made = generate(request(scene()), base=tiny_base, controls=[control])
    assert control.given == {"edges": (1, 3, 64, 64), "colours": (1, 3, 64, 64), "boxes": BOXES}
    # The condition of an input is its own, or else the control's.
    assert list(made.conditions) == ["condition0-edges", "condition0-colours"]
    assert np.array_equal(made.conditions["condition0-edges"], conditions.find("canny")(condition_image))
    assert np.array_equal(made.conditions["condition0-colours"], conditions.find("palette")(COLOURS))
    prepared = generate(request(scene(prepared=True)), base=tiny_base, controls=[control])
    assert np.array_equal(prepared.conditions["condition0-edges"], condition_image)


def test_the_plan_sees_a_change_of_any_input(folder, tiny_base):
    controls, cache = [load_control("scene.safetensors", tiny_base)], ResidualCache()
    inputs = scene().inputs
    changes = ({}, {"boxes": BOXES[:1]}, {"edges": "images/colours.png"}, {"colours": "images/edges.png"})
    made = []
    for change in changes:
        asked = request(scene(inputs={**inputs, **change}))
        made.append(pixels(generate(asked, base=tiny_base, controls=controls, cache=cache)))
        assert np.array_equal(made[-1], pixels(generate(asked, base=tiny_base, controls=controls)))
    assert [np.abs(one - made[0]).max() > 0 for one in made] == [False, True, True, True]
    asked = request(scene(inputs={name: value for name, value in inputs.items() if name != "colours"}))
    assert np.abs(pixels(generate(asked, base=tiny_base, controls=controls, cache=cache)) - made[0]).max() > 1


def test_the_command_line_takes_a_file_that_names_them(folder, tmp_path, capsys):
    expected = generate(request(scene(weight=0.5)))
    words = ["generate", "cat face", "--base", "base", "--steps", "2", "--out", "out", "--json"]
    assert main([*words, "--control", "scene.safetensors=images/inputs.json@0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    (use,) = told["request"]["controls"]
    assert use["image"] is None
    assert use["inputs"] == {"edges": "images/edges.png", "colours": "images/colours.png", "boxes": BOXES}
    assert np.array_equal(np.asarray(read_image("out/seed0.png")), pixels(expected)[0])
    # A control of one value takes the file as that value.
    assert main([*words[:-2], "two", "--json", "--control", "boxes.safetensors=boxes.json"]) == 0
    (use,) = json.loads(capsys.readouterr().out)["request"]["controls"]
    assert use["inputs"] == {"boxes": BOXES}
    assert [path.name for path in sorted(Path("two").iterdir())] == ["seed0.png", "settings.json"]
    assert not np.array_equal(read_image("two/seed0.png"), read_image("out/seed0.png"))


def test_settings_keep_them_and_draw_the_same_again(folder, capsys):
    before = generate(request(scene(), ControlUse(control="boxes.safetensors", inputs={"boxes": BOXES[:1]})))
    before.save("out")
    settings = json.loads(Path("out/settings.json").read_text())
    first, second = settings["sha256"]["controls"]
    assert set(first["inputs"]) == {"edges", "colours"} and second["inputs"] == {}
    assert all(len(one[part]) == 64 for one in first["inputs"].values() for part in ("image", "condition"))
    drawn = read_settings("out/seed0.png")
    assert drawn.request.controls == before.request.controls
    again = generate(drawn.to_request())
    assert np.array_equal(pixels(again), pixels(before)) and drawn.differences(again) == []
    assert again.sha256 == before.sha256

    # What is gone or has changed: all images of that control are the saved ones, and each is told of.
    Image.fromarray(255 - COLOURS).save("images/colours.png")
    again = generate(drawn.to_request())
    assert np.array_equal(pixels(again), pixels(before))
    use = again.request.controls[0]
    assert use.prepared and use.inputs == {
        "edges": "out/condition0-edges.png", "colours": "out/condition0-colours.png", "boxes": BOXES
    }  # fmt: skip
    assert drawn.differences(again) == [
        "images/colours.png has changed since (SHA-256); its saved condition image out/condition0-colours.png is used",
    ]
    Path("out/condition0-edges.png").unlink()
    with refused("missing-file", "'edges'", "out/condition0-edges.png", "--control scene.safetensors=INPUTS.json"):
        drawn.to_request()


def test_a_request_with_them_survives_json(folder):
    asked = request(scene(), ControlUse(control="optional.safetensors", image="a.png"))
    assert GenerateRequest.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    # Python may give paths and tuples.
    loose = ControlUse(control="scene", inputs={"edges": Path("a.png"), "boxes": tuple(map(tuple, BOXES))})
    assert loose.inputs == {"edges": "a.png", "boxes": BOXES}
    for inputs, facts in (
        ({"a": object()}, ["JSON", "paths"]),
        ({"a": float("nan")}, ["JSON"]),
        ([1], ["mapping", "[1]"]),
        ({}, ["mapping", "{}"]),
    ):
        with refused("wrong-type", "scene", *facts):
            ControlUse(control="scene", inputs=inputs)
    with refused("missing-setting", "scene", "image", "inputs"):
        ControlUse(control="scene")
    with refused("contradiction", "scene", "image", "inputs"):
        ControlUse(control="scene", image="a.png", inputs={"a": 1})
    with refused("wrong-type", "inputs", "mapping", "null", 3):
        GenerateRequest.from_json({"prompt": "x", "controls": [{"control": "scene", "inputs": 3}]})


@pytest.mark.parametrize(
    ("use", "code", "facts"),
    [
        (
            {"control": "scene.safetensors", "image": "images/edges.png"},
            "missing-setting",
            ["a scene", "edges (image), colours (image, optional), boxes (value)", ".json"],
        ),
        (
            {"control": "boxes.safetensors", "image": "images/edges.png"},
            "missing-setting",
            ["boxes (value)", ".json"],
        ),
        (
            {"control": "scene.safetensors", "inputs": {"edges": "a.png"}},
            "missing-setting",
            ["scene.safetensors", "'boxes'", "edges (image)"],
        ),
        (
            {"control": "scene.safetensors", "inputs": {"edge": "a.png", "boxes": BOXES}},
            "unknown-key",
            ["a scene", "'edge'", "did you mean edges?"],
        ),
        (
            {"control": "scene.safetensors", "inputs": {"edges": [1], "boxes": BOXES}},
            "wrong-type",
            ["'edges'", "scene.safetensors", "path", "[1]"],
        ),
        (
            {"control": "scene.safetensors", "inputs": {"edges": "a.png", "boxes": [[1]]}},
            "wrong-type",
            ["'boxes'", "scene.safetensors", "[left, top, ", " phrase]", "[[1]]"],
        ),
        (
            {"control": "scene.safetensors", "image": "boxes.json"},
            "wrong-type",
            ["boxes.json", "mapping", "edges (image)"],
        ),
        ({"control": "scene.safetensors", "image": "missing.json"}, "missing-file", ["missing.json"]),
        (
            {"control": "scene.safetensors", "inputs": {"edges": "gone.png", "boxes": BOXES}},
            "missing-file",
            ["gone.png"],
        ),
        ({"control": "nothing.safetensors", "image": "boxes.json"}, "missing-file", ["'nothing.safetensors'"]),
    ],
)
def test_wrong_inputs_are_refused_before_a_base_is_loaded(folder, use, code, facts, monkeypatch):
    monkeypatch.setattr("controlkit.sampling.models.load_base", lambda *_, **__: pytest.fail("loaded"))
    with refused(code, *facts):
        generate(request(ControlUse(**use)))


def test_one_image_by_its_name_is_that_image(folder, tiny_base):
    """And an input that may be left out makes no control one of several images."""
    control = load_control("optional.safetensors", tiny_base)
    uses = [
        ControlUse(control="optional.safetensors", image="images/edges.png", prepared=True),
        ControlUse(control="optional.safetensors", inputs={"photo": "images/edges.png"}, prepared=True),
        ControlUse(control="optional.safetensors", inputs={"photo": "images/edges.png", "strength": 3}, prepared=True),
    ]
    one, same, stronger = (pixels(generate(request(use), base=tiny_base, controls=[control])) for use in uses)
    assert np.array_equal(one, same) and not np.array_equal(one, stronger)
    plain = ControlUse(control="canny", inputs={"image": "images/edges.png"})
    assert with_named_inputs(request(plain)).controls == (ControlUse(control="canny", image="images/edges.png"),)


def test_no_input_is_written_over(folder):
    asked = request(scene(inputs={"edges": "out/condition0-edges.png", "boxes": BOXES}))
    Path("out").mkdir()
    refuse_overwriting(asked, "out")
    Image.fromarray(COLOURS).save("out/condition0-edges.png")
    with refused("would-overwrite", "condition0-edges.png", "scene.safetensors"):
        refuse_overwriting(asked, "out")


def test_cards_and_inspect_name_them(folder):
    card = card_of("scene.safetensors")
    assert "--control scene.safetensors=INPUTS.json" in card and "edges (image), colours (image, optional)" in card
    facts = describe("scene.safetensors", base="base")
    assert facts["inputs"] == "edges (image), colours (image, optional), boxes (value)"
    assert not [key for key in facts if key.startswith("GFLOP")]  # it depends on the boxes
    assert "inputs" not in describe("canny")
    assert describe_system("optional", "nano")["inputs"] == "photo (image), strength (value, optional)"


def test_what_needs_one_image_is_trained_and_judged_with_one(folder, icons_file, tiny_base):
    """Named hints go through the cache, and each tensor keeps its name and type."""
    settings = {
        "base": "base", "steps": 1, "batch_size": 2, "score_pictures": 1, "warmup_steps": 0, "device": "cpu",
        "out": "run", "learning_rate": 0.1,
    }  # fmt: skip
    write_pairs("pairs", [(COLOURS + n, COLOURS, f"thing {n}") for n in range(4)])
    objective = objective_of(build_recipe({"system": "optional-pairs", "pairs": "pairs", **settings}))
    hint = objective.source.of["identity"].hint(torch.tensor([0, 2, 1]), torch.tensor([False] * 3))
    assert {name: (tuple(value.shape), value.dtype) for name, value in hint.items()} == {
        "strength": ((3, 1), torch.float32), "photo": ((3, 3), torch.float32), "large": ((3, 3 * 64 * 64), torch.bool)
    }  # fmt: skip
    recipe = build_recipe({"system": "optional", "icons": str(icons_file), "condition": "palette", **settings})
    assert list(train(dataclasses.replace(recipe, out="other"))) == ["palette: colour distance, Lab"]
    made = load_control("other/palette.safetensors", tiny_base)
    judged = EvalSet(name="one", condition_images=[COLOURS], targets=[COLOURS], prompts=["cat face"])
    evaluate_control(tiny_base, made, [judged], steps=1)
    for system in ("scene", "boxes-pairs"):
        data = {"pairs": "pairs"} if system == "boxes-pairs" else {"icons": str(icons_file), "condition": "canny"}
        with refused("unsupported", "boxes (value)", "training", "one"):
            objective_of(build_recipe({"system": system, **data, **settings}))
    with refused("unsupported", "a scene", "edges (image)", "one condition image"):
        evaluate_control(tiny_base, load_control("scene.safetensors", tiny_base), [judged], steps=1)


def test_a_plain_input_beside_the_image(folder, capsys):
    """`KEY=VALUE` sets a plain input of a control that has one, as a file of inputs does."""
    words = ["generate", "cat face", "--base", "base", "--steps", "2", "--json"]
    Path("inputs.json").write_text(json.dumps({"photo": "images/edges.png", "strength": 0.5}))
    Path("photo.json").write_text(json.dumps({"photo": "images/edges.png"}))
    told = []
    for out, control in (
        ("file", "optional.safetensors=inputs.json,prepared"),
        ("inline", "optional.safetensors=images/edges.png@1,strength=0.5,prepared"),
        ("both", "optional.safetensors=photo.json,prepared,strength=0.5"),
    ):
        assert main([*words, "--control", control, "--out", out]) == 0
        told.append(json.loads(capsys.readouterr().out)["request"]["controls"][0])
    assert told[0] == told[1] == told[2] and told[0]["inputs"] == {"photo": "images/edges.png", "strength": 0.5}
    assert told[0]["parameters"] is None and told[0]["prepared"]
    assert np.array_equal(read_image("file/seed0.png"), read_image("inline/seed0.png"))
    assert main([*words, "--control", "optional.safetensors=images/edges.png,prepared", "--out", "without"]) == 0
    assert not np.array_equal(read_image("without/seed0.png"), read_image("inline/seed0.png"))
    assert main(["generate", "--from", "inline", "--out", "again"]) == 0
    assert np.array_equal(read_image("again/seed0.png"), read_image("inline/seed0.png"))
    # Python: among the parameters, or as an input.
    use = ControlUse(control="optional.safetensors", image="images/edges.png", parameters={"strength": 0.5})
    (named,) = with_named_inputs(request(use)).controls
    assert named.inputs == {"photo": "images/edges.png", "strength": 0.5} and named.parameters is None
    with refused("contradiction", "strength", "twice"):
        with_named_inputs(request(parse_control_use("optional.safetensors=inputs.json,strength=1")))


def test_parameters_of_one_image_among_several(folder, tiny_base, condition_image):
    use = parse_control_use("scene.safetensors=images/inputs.json,edges.low=20,edges.high=60")
    assert use.parameters == {"edges.low": 20, "edges.high": 60}
    made = generate(request(use), base=tiny_base)
    assert np.array_equal(
        made.conditions["condition0-edges"], conditions.find("canny")(condition_image, low=20, high=60)
    )
    assert np.array_equal(made.conditions["condition0-colours"], conditions.find("palette")(COLOURS))
    assert made.request.controls[0].parameters == use.parameters
    made.save("out")
    again = generate(read_settings("out").to_request(), base=tiny_base)
    assert np.array_equal(pixels(again), pixels(made))
    for key, code, facts in (
        ("low", "contradiction", ["edges.low", "colours"]),
        ("photo.low", "unknown-key", ["'photo'", "edges"]),
        ("edges.lwo", "unknown-key", ["'edges.lwo'"]),
        ("colours.low", "unknown-key", ["'low'", "palette"]),
    ):
        with refused(code, *(facts if key != "edges.lwo" else ["'lwo'", "low"])):
            generate(request(dataclasses.replace(use, parameters={key: 1})), base=tiny_base)


def test_options_are_checked_before_the_base_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("controlkit.sampling.models.load_base", None)
    photo, base = "images/edges.png", {"base": "nano"}
    for text, settings, code, facts in (
        (f"canny={photo},lwo=50", base, "unknown-key", ["'lwo'", "low"]),
        (f"nano/palette={photo},low=50", base, "unknown-key", ["'low'", "palette"]),
        ("scene.safetensors=images/inputs.json,edges.lwo=5", {}, "unknown-key", ["'lwo'", "canny"]),
        (f"canny={photo},layers=1:1", base, "out-of-range", [2, 7, "middle"]),
        (f"nano/palette={photo},layers=1:1", base, "out-of-range", [2, 7, "middle"]),
        (f"optional.safetensors={photo},layers=1:1", {}, "out-of-range", [2, 1, "middle"]),
    ):
        with refused(code, *facts):
            generate(request(parse_control_use(text), **settings))
    with refused("out-of-range", 2, 7):
        layers = {"layers": [[1.0] * 7, [1.0, 1.0]]}
        generate(request(parse_control_use(f"canny={photo}"), **base, vary=(layers,)))


def test_odd_names_of_files_from_the_command_line(folder, capsys):
    """Each control of one call with settings of its own, and names that look like options."""
    Path("a=b@1:2").mkdir()
    Path("scene.safetensors").rename("a=b@1:2/s,mode=soft.safetensors")
    for source, target in (("edges.png", "e@0.5:0-1,low=3.png"), ("colours.png", "c=d,mask=x.png")):
        Image.open(f"images/{source}").save(target)
    Path("in,put=s@2.json").write_text(json.dumps({"edges": "e@0.5:0-1,low=3.png", "boxes": BOXES}))
    Image.new("L", (64, 64), 255).save("m@1,low=2.png")
    words = ["generate", "cat face", "--base", "base", "--steps", "2", "--json", "--out", "out"]
    words += ["--control", "a=b@1:2/s,mode=soft.safetensors=in,put=s@2.json@0.5:0-0.5,edges.low=9,mode=balanced"]
    words += ["--control", "optional.safetensors=c=d,mask=x.png,mask=m@1,low=2.png,prepared,strength=2"]
    assert main(words) == 0
    first, second = json.loads(capsys.readouterr().out)["request"]["controls"]
    assert first["control"] == "a=b@1:2/s,mode=soft.safetensors" and (first["weight"], first["end"]) == (0.5, 0.5)
    assert first["inputs"] == {"edges": "e@0.5:0-1,low=3.png", "boxes": BOXES} and first["mode"] == "balanced"
    assert first["parameters"] == {"edges.low": 9} and first["mask"] is None and not first["prepared"]
    assert second["inputs"] == {"photo": "c=d,mask=x.png", "strength": 2} and second["mask"] == "m@1,low=2.png"
    assert second["prepared"] and (second["weight"], second["mode"]) == (1.0, None)
    assert main(["generate", "--from", "out", "--out", "again"]) == 0
    assert np.array_equal(read_image("again/seed0.png"), read_image("out/seed0.png"))
