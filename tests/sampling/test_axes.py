"""Settings that vary within one request: prompts, images, any setting, paired and crossed, and sheets of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from controlkit.apps.cli import main
from controlkit.formats.load import save_control
from controlkit.images import write_png
from controlkit.sampling.axes import expand_folders, labels_of, parse_axis, points_of, values_at
from controlkit.sampling.generate import generate
from controlkit.sampling.image_folder import refuse_overwriting
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.saved_settings import read_settings
from controlkit.sampling.sheets import Sheet
from controlkit.sampling.uses import ControlUse, LoraUse
from refusals import check, refused

CANNY = ControlUse(control="canny", image="a.png")
INK, CLAY = LoraUse(file="styles/ink.safetensors", weight=0.5), LoraUse(file="styles/clay.v2.safetensors")


def request(**settings):
    return GenerateRequest(**{"prompt": "x", **settings})


def pixels(path_or_image):
    image = path_or_image if isinstance(path_or_image, Image.Image) else Image.open(path_or_image)
    return np.asarray(image.convert("RGB"), int)


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_base, tiny_control, condition_image, base_folder):
    """A control, two condition images in a folder and one beside it; `base` is the tiny base."""
    monkeypatch.chdir(tmp_path)
    save_control("edges.safetensors", tiny_control, tiny_base)
    edges = Image.fromarray(condition_image).convert("RGB")
    Path("photos").mkdir()
    write_png("photos/one.png", edges)
    write_png("photos/two.png", edges.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    Path("photos/notes.txt").write_text("not an image")
    write_png("same.png", edges)
    return tmp_path


def run(*words):
    return main(["generate", *map(str, words), "--base", "base", "--steps", "2"])


def names(path):
    return sorted(each.name for each in Path(path).iterdir())


class TestAxes:
    def test_axes_are_crossed_and_settings_of_one_advance_together(self):
        asked = request(
            controls=(CANNY,),
            vary=({"prompt": ("a", "b"), "image": ("a.png", "b.png")},),
            xy=({"guidance": [1, 3, 5]}, {"weight": [0.5, 1]}),
        )
        points = points_of(asked)
        assert len(points) == 12 and len({point.name for point in points}) == 12
        last = points[-1]
        assert (last.request.prompt, last.request.controls[0].image) == ("b", "b.png")
        assert (last.request.guidance, last.request.controls[0].weight) == (5, 1)
        assert last.request.vary == last.request.xy == () and last.indices == (1, 2, 1)
        assert values_at(asked, points[0]) == {"prompt": "a", "image": "a.png", "guidance": 1, "weight": 0.5}
        assert GenerateRequest.from_json(json.loads(json.dumps(asked.to_json()))) == asked

    def test_a_setting_of_one_control_among_several(self):
        depth = ControlUse(control="depth", image="b.png", weight=0.3)
        for name, changed in (("0.weight", [0]), ("depth.weight", [1]), ("weight", [0, 1])):
            (point,) = points_of(request(controls=(CANNY, depth), vary=({name: [0.9]},)))
            assert [index for index, use in enumerate(point.request.controls) if use.weight == 0.9] == changed
        (point,) = points_of(request(controls=(CANNY, depth), vary=({"0.low": [50], "1.span": ["0-0.5"]},)))
        assert point.request.controls[0].parameters == {"low": 50} and point.request.controls[1].end == 0.5

    def test_weights_and_files_of_loras(self):
        for name, changed in (
            ("lora.weight", [0, 1]),
            ("lora.0.weight", [0]),
            ("lora.clay.v2.weight", [1]),
            ("lora.styles/ink.safetensors.weight", [0]),
        ):
            asked = request(loras=(INK, CLAY), controls=(CANNY,), xy=({name: [0, 0.9]}, {"weight": [0.3]}))
            first, last = points_of(asked)
            weights = [0.5, 1.0]
            for index in changed:
                weights[index] = 0.9
            assert [use.weight for use in last.request.loras] == weights and first.request.loras[changed[0]].weight == 0
            assert [use.file for use in last.request.loras] == [INK.file, CLAY.file]
            assert last.request.controls[0].weight == 0.3
            assert GenerateRequest.from_json(json.loads(json.dumps(asked.to_json()))) == asked
        (_, point) = points_of(request(loras=(INK,), vary=({"lora.file": ["x.pt", "y.pt"]},)))
        assert point.request.loras == (LoraUse(file="y.pt", weight=0.5),)
        name = points_of(request(loras=(INK, CLAY), vary=({"lora.1.weight": [0.25]}, {"lora.ink.weight": [1]})))[0].name
        assert name == "lora_1_weight0.25-lora_ink_weight1"

    def test_a_control_named_lora_is_a_control(self):
        use = ControlUse(control="lora", image="a.png")
        (point,) = points_of(request(controls=(use,), loras=(INK,), vary=({"lora.weight": [0.1]},)))
        assert point.request.controls[0].weight == 0.1 and point.request.loras == (INK,)

    def test_random_seeds_of_an_axis_are_settled(self):
        (axis,) = request(vary=({"seed": [-1, 4, -1]},)).vary
        assert axis["seed"][1] == 4 and len(set(axis["seed"])) == 3 and min(axis["seed"]) >= 0

    def test_names_are_unique_whatever_the_values(self):
        for values in (["a", "A"], ["a/b", "a:b"], ["", " "], ["x" * 300, "y" * 300], ["\u00e9", "\u00e8"]):
            points = points_of(request(vary=({"negative_prompt": values},)))
            found = [point.name.casefold() for point in points]
            assert len(set(found)) == 2 and all(name.isascii() and "/" not in name and len(name) < 60 for name in found)
        images = ["one/cat.png", "two/cat.png"]
        points = points_of(request(controls=(CANNY,), vary=({"image": images},)))
        assert len({point.name for point in points}) == 2

    @pytest.mark.parametrize(
        ("settings", "code", "facts"),
        [
            ({"vary": ({"gidance": [1]},), "controls": ()}, "unknown-key", ["'gidance'", "guidance"]),
            ({"vary": ({"guidance": [0.5]},)}, "out-of-range", ["guidance", 0.5]),
            ({"vary": ({"guidance": ["much"]},)}, "wrong-type", ["guidance", "much"]),
            ({"vary": ({"guidance": []},)}, "wrong-type", ["guidance"]),
            ({"vary": ({"guidance": 3},)}, "wrong-type", ["guidance", 3]),
            ({"vary": ({"guidance": [1, 2], "steps": [3]},)}, "contradiction", ["2 of guidance", "1 of steps"]),
            ({"vary": ({"steps": [1]},), "xy": ({"steps": [2]},)}, "contradiction", ["steps"]),
            ({"xy": ({"weight": [0, 1]}, {"0.weight": [1]})}, "contradiction", ["weight and 0.weight"]),
            ({"xy": ({"canny.weight": [1]}, {"0.weight": [1]})}, "contradiction", ["canny.weight and 0.weight"]),
            ({"vary": ({"span": ["0-1"], "start": [0.5]},)}, "contradiction", ["span and start"]),
            (
                {"xy": ({"lora.weight": [1]}, {"lora.0.weight": [1]}), "loras": (INK,)},
                "contradiction",
                ["lora.weight and lora.0.weight"],
            ),
            ({"xy": ({"steps": [1]}, {"guidance": [2]}, {"prompt": ["y"]})}, "contradiction", [3]),
            ({"vary": ({"steps": [*range(1, 999)]}, {"guidance": [*range(1, 99)]})}, "out-of-range", ["10000"]),
            ({"vary": ({"depth.weight": [1]},)}, "unknown-name", ["'depth'", "canny"]),
            ({"vary": ({"mode": ["controls"]},)}, "unknown-name", ["'controls'"]),
            ({"vary": ({"lora.weight": [1]},)}, "unknown-key", ["lora.weight", "--lora"]),
            ({"vary": ({"lora.in.weight": [1]},), "loras": (INK,)}, "unknown-name", ["'in'", INK.file]),
            ({"vary": ({"lora.ink.weight": [1]},), "loras": (INK, INK)}, "contradiction", ["0", "1", INK.file]),
            ({"vary": ({"lora.weight": ["much"]},), "loras": (INK,)}, "wrong-type", ["weight", "much"]),
            ({"vary": ({"lora.rank": [1]},), "loras": (INK,), "controls": ()}, "unknown-key", ["'lora.rank'"]),
            ({"vary": ({"seed": ["a"]},)}, "wrong-type", ["seed"]),
            ({"vary": ({"seed": [2**64]},)}, "out-of-range", ["2^64"]),
            ({"vary": ([1],)}, "wrong-type", ["vary"]),
        ],
    )
    def test_impossible_axes_are_refused_when_the_request_is_built(self, settings, code, facts):
        with refused(code, *facts):
            request(**{"controls": (CANNY,), **settings})

    def test_two_uses_of_one_control_go_by_number(self):
        with refused("contradiction", "canny", "0.weight"):
            request(controls=(CANNY, CANNY), vary=({"canny.weight": [1]},))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("guidance=1,3.5", {"guidance": [1, 3.5]}),
        ("negative-prompt=a, b|c", {"negative_prompt": ["a, b", "c"]}),
        ("prompt=1|yes", {"prompt": ["1", "yes"]}),
        ("sampler=ddim,null", {"sampler": ["ddim", "null"]}),
        ("seeds=1,5-7", {"seed": [1, 5, 6, 7]}),
        ("0.weight=0.5,1", {"0.weight": [0.5, 1]}),
        ("canny.layers=1:0.5,0:1", {"canny.layers": ["1:0.5", "0:1"]}),
        ("mode=soft,guess", {"mode": ["soft", "guess"]}),
        ("low=50,100", {"low": [50, 100]}),
        ("lora.weight=0,0.5", {"lora.weight": [0, 0.5]}),
        ("lora.file=1.pt,2.pt", {"lora.file": ["1.pt", "2.pt"]}),
    ],
)
def test_axes_of_the_command_line(text, expected):
    assert parse_axis(text, request(controls=(CANNY,)), "--xy") == expected


@pytest.mark.parametrize("text", ["guidance", "guidance=", "=3", "span=0.5", "layers=1:x"])
def test_wrong_axes_of_the_command_line_are_refused(text):
    with refused("usage", "--xy", text.partition("=")[0]):
        parse_axis(text, request(controls=(CANNY,)), "--xy")


def test_titles():
    assert labels_of({"guidance": [1, 2.5, None]}) == ["guidance 1", "guidance 2.5", "guidance default"]
    assert labels_of({"prompt": ["a cat", ""]}) == ["a cat", "(no prompt)"]
    assert labels_of({"prompt": ["a"], "image": ["x/b.png"]}) == ["a, b"]
    assert labels_of({"control": ["canny", "nano/canny", "nano/depth"]}) == ["canny", "nano/canny", "depth"]
    assert labels_of({"image": ["x/1.png", "y/1.png", "x/2.png", "x/2.png"]}) == ["x/1.png", "y/1.png", "2", "2"]
    assert labels_of({"mask": [None, "m.png"]}) == ["no mask", "m"]
    assert labels_of({"vae": [None, "None.safetensors"]}) == ["default vae", "None"]


def test_folders_and_globs_become_axes(folder):
    use = ControlUse(control="canny", image="photos")
    expanded = expand_folders(request(controls=(use,)))
    assert expanded.vary == ({"0.image": ["photos/one.png", "photos/two.png"]},)
    assert expanded.controls[0].image == "photos/one.png"
    assert expand_folders(request(controls=(ControlUse(control="canny", image="photos/*.png"),))).vary == expanded.vary
    # A name that exists is a file first.
    write_png("photos/t[w]o.png", Image.new("RGB", (8, 8)))
    for image in ("photos/t[w]o.png", "same.png", "missing.png"):
        one = request(controls=(ControlUse(control="canny", image=image),))
        assert expand_folders(one) == one
    prompts = request(controls=(use, use), vary=({"prompt": ["a", "b", "c"]},))
    assert [len(axis) for axis in expand_folders(prompts, pair=True).vary] == [3]
    assert len(points_of(expand_folders(prompts))) == 27
    Path("empty").mkdir()
    for image in ("empty", "empty/*.png"):
        with refused("empty-data", image):
            expand_folders(request(controls=(ControlUse(control="canny", image=image),)))
    with refused("contradiction", "2 of prompt", "3 of 0.image"):
        expand_folders(request(controls=(use,), vary=({"prompt": ["a", "b"]},)), pair=True)
    with refused("contradiction", "several"):
        expand_folders(request(controls=(use,)), pair=True)


def test_each_image_is_that_of_its_own_request(folder, tiny_base):
    use = ControlUse(control="edges.safetensors", image="photos", prepared=True)
    asked = request(
        base="base",
        controls=(use,),
        seeds=(1, 2),
        steps=2,
        vary=({"prompt": ["apple", "cat"]},),
        xy=({"weight": [0, 1]},),
    )
    made = generate(asked)
    assert len(made.images) == 16 and [len(part.images) for part in made.parts] == [2] * 8
    for part, point in zip(made.parts, points_of(made.request), strict=True):
        alone = generate(point.request, base=tiny_base)
        for one, same in zip(alone.images, part.images, strict=True):
            assert one.seed == same.seed and np.abs(pixels(one.image) - pixels(same.image)).max() <= 1
    paths = made.save("out")
    assert len({path.name for path in paths}) == 16
    for path in paths:  # each file restores its own image
        again = generate(read_settings(path).to_request())
        (image,) = again.images
        assert np.abs(pixels(image.image) - pixels(path)).max() <= 1


def test_the_base_is_loaded_once_and_steps_are_counted_over_all(folder, monkeypatch):
    from controlkit.sampling import models as module

    loaded, load = [], module.load_base
    monkeypatch.setattr(module, "load_base", lambda *args, **settings: loaded.append(args) or load(*args, **settings))
    steps = []
    asked = request(base="base", vary=({"steps": [1, 3]}, {"seed": [5, 6]}))
    generate(asked, on_step=lambda step: steps.append((step.done, step.total, [*step.images])))
    assert len(loaded) == 1
    assert [done for done, _, _ in steps] == list(range(1, 9)) and steps[-1][:2] == (8, 8)
    assert steps[0][1] == 8 and [images for _, _, images in steps] == [[0], [1], *[[2]] * 3, *[[3]] * 3]


@pytest.mark.parametrize(
    ("axis", "code", "fact"),
    [
        ({"image": ["same.png", "missing.png"]}, "missing-file", "missing.png"),
        ({"mask": ["same.png", "missing.png"]}, "missing-file", "missing.png"),
        ({"low": [10, 5000]}, "out-of-range", "5000"),
        ({"sampler": ["ddim", "euler"]}, "contradiction", "euler"),
    ],
)
def test_a_wrong_value_is_refused_before_the_first_image(axis, code, fact, folder, tiny_base, tiny_control):
    use = ControlUse(control="edges.safetensors", image="same.png")
    asked = request(base="base", controls=(use,), steps=2, vary=(axis,))
    made = []
    for passed in ({}, {"base": tiny_base, "controls": [tiny_control]}):
        with refused(code, fact):
            generate(asked, on_step=made.append, **passed)
    assert made == []


def test_images_in_memory_are_no_missing_files(folder, tiny_base):
    use = ControlUse(control="edges.safetensors", image="drawn", prepared=True)
    asked = request(controls=(use,), steps=1, vary=({"weight": [0, 1]},))
    assert len(generate(asked, base=tiny_base, images={"drawn": Image.open("same.png")}).images) == 2


def test_what_is_passed_loaded_cannot_vary(tiny_base, tiny_control):
    with refused("contradiction", "base"):
        generate(request(vary=({"precision": ["fp32", "bf16"]},)), base=tiny_base)
    uses = (ControlUse(control="a", image="a.png"),)
    with refused("contradiction", "control"):
        generate(request(controls=uses, vary=({"control": ["a", "b"]},)), base=tiny_base, controls=[tiny_control])


class TestCommandLine:
    def test_prompts_on_an_axis_need_no_other(self, folder, capsys):
        control = ("--control", "edges.safetensors=same.png,prepared")
        assert run(*control, "--xy", "prompt=apple|cat face", "--out", "out") == 0
        made = read_settings(Path("out")).request
        assert made.xy == ({"prompt": ["apple", "cat face"]},)
        assert run("dog", *control, "--xy", "prompt=apple|cat face", "--out", "other") == 2
        check(capsys.readouterr().err, "contradiction", "leave out --prompt")

    def test_prompts_and_images_are_crossed_or_paired(self, folder, capsys):
        Path("prompts.txt").write_text("\ufeffapple\n\n  cat face \n", encoding="utf-8")
        control = ("--control", "edges.safetensors=photos,prepared")
        assert run("--prompts", "prompts.txt", *control, "--seeds", "3,5", "--out", "crossed") == 0
        assert len(list(Path("crossed").glob("*-seed*.png"))) == 8
        assert run("apple", "--prompt", "cat face", *control, "--seeds", "3,5", "--pair", "--out", "paired") == 0
        paired = sorted(Path("paired").glob("*-seed*.png"))
        assert len(paired) == 4
        settings = [read_settings(path).request for path in paired]
        assert {(one.prompt, one.controls[0].image) for one in settings} == {
            ("apple", "photos/one.png"), ("cat face", "photos/two.png")
        }  # fmt: skip
        capsys.readouterr()
        Path("empty.txt").write_text("\n")
        for words, code in (("empty.txt", "empty-data"), ("no.txt", "missing-file"), ("same.png", "damaged-file")):
            assert run("--prompts", words) == 2
            check(capsys.readouterr().err, code, words)

    def test_a_sheet_with_titles_and_json(self, folder, capsys):
        words = ("apple", "--control", "edges.safetensors=same.png,prepared", "--seeds", 2)
        assert run(*words, "--xy", "weight=0.5,1", "--xy", "guidance=1,3,5", "--out", "out", "--json") == 0
        printed = json.loads(capsys.readouterr().out)
        assert len(printed["images"]) == 12
        sheets = json.loads(Path("out/xy.json").read_text())["sheets"]
        assert [sheet["sheet"] for sheet in sheets] == ["xy-seed0.png", "xy-seed1.png"]
        first = sheets[0]
        assert first["columns"] == ["weight 0.5", "weight 1"]
        assert first["rows"] == ["guidance 1", "guidance 3", "guidance 5"]
        place = read_settings(Path("out") / first["images"][2][1]).request
        assert (place.controls[0].weight, place.guidance, place.seeds) == (1, 5, (0,))
        sheet = Image.open("out/xy-seed0.png")
        cell = Image.open(Path("out") / first["images"][2][1]).resize((128, 128), Image.Resampling.NEAREST)
        # The last cell is at the lower right, within the margin.
        box = (sheet.width - 134, sheet.height - 134, sheet.width - 6, sheet.height - 6)
        assert np.array_equal(pixels(sheet.crop(box)), pixels(cell))
        # One axis, of seeds, needs one sheet.
        assert run("apple", "--xy", "seed=4-6", "--out", "seeds") == 0
        assert names("seeds") == [*(f"seed{seed}.png" for seed in (4, 5, 6)), "settings.json", "xy.json", "xy.png"]

    @pytest.mark.parametrize(
        ("given", "axis", "option"),
        [
            (("--guidance", 5), "guidance=2,3", "--guidance"),
            (("--seeds", 4), "seed=1,2", "--seed"),
            (("--seed", 7), "seeds=1,2", "--seed"),
            (("--clip-skip", 3), "clip_skip=1,2", "--clip-skip"),
        ],
    )
    def test_an_option_that_an_axis_replaces_is_refused(self, folder, capsys, given, axis, option):
        assert run("apple", *given, "--xy", axis) == 2
        check(capsys.readouterr().err, "contradiction", f"leave out {option}")

    def test_settings_repeat_the_whole(self, folder, capsys):
        words = ("apple", "--prompt", "cat", "--control", "edges.safetensors=photos,prepared", "--xy", "steps=1,2")
        assert run(*words, "--seed", "-1", "--out", "one") == 0
        assert main(["generate", "--from", "one", "--out", "two"]) == 0
        assert names("one") == names("two") and len(names("one")) == 8 + 4 + 2 + 2
        for name in names("one"):
            if name.endswith(".png"):
                assert np.array_equal(pixels(Path("one") / name), pixels(Path("two") / name)), name
        capsys.readouterr()
        # Options override: one prompt replaces all, other axes stay.
        assert main(["generate", "boat", "--from", "one", "--seeds", "1", "--out", "three"]) == 0
        assert [axis for axis in read_settings("three").request.vary] == [
            {"0.image": ["photos/one.png", "photos/two.png"]}
        ]
        assert "prompt had 2 values here" in capsys.readouterr().err
        # Of settings that vary together, the others stay.
        words = ("apple", "--prompt", "cat", "--pair", "--control", "edges.safetensors=photos,prepared")
        assert run(*words, "--steps", 1, "--out", "paired") == 0
        assert main(["generate", "boat", "--from", "paired", "--out", "boats"]) == 0
        assert read_settings("boats").request.vary == ({"0.image": ["photos/one.png", "photos/two.png"]},)
        assert run("apple", "--control", "edges.safetensors=photos/one.png,prepared", "--steps", 1, "--xy",
                   "mode=soft,control", "--out", "modes") == 0  # fmt: skip
        assert main(["generate", "--from", "modes", "--mode", "guess", "--out", "guess"]) == 0
        guess = read_settings("guess").request
        assert guess.xy == () and [use.mode for use in guess.controls] == ["guess"]
        # An image that has changed is noted; one that is gone ends it.
        write_png("photos/two.png", Image.new("RGB", (64, 64), "red"))
        capsys.readouterr()
        assert main(["generate", "--from", "one", "--out", "four"]) == 0
        assert [line for line in capsys.readouterr().err.splitlines() if "photos/two.png has changed" in line]
        Path("photos/two.png").unlink()
        assert main(["generate", "--from", "one", "--out", "five"]) == 2
        check(capsys.readouterr().err, "missing-file", "photos/two.png")
        # Its own file has its condition image.
        (path,) = (path for path in Path("one").glob("promptapple-0_imagetwo-steps2-*.png"))
        assert main(["generate", "--from", str(path), "--out", "six"]) == 0
        assert np.array_equal(pixels(path), pixels(next(Path("six").glob("seed*.png"))))

    def test_images_of_the_request_are_not_overwritten(self, folder):
        use = ControlUse(control="edges.safetensors", image="weight1-seed0.png", prepared=True)
        write_png("weight1-seed0.png", Image.new("RGB", (64, 64)))
        with refused("would-overwrite", "weight1-seed0.png"):
            refuse_overwriting(request(controls=(use,), vary=({"weight": [0.5, 1]},)), folder)
        write_png("xy.png", Image.new("RGB", (64, 64)))
        use = ControlUse(control="edges.safetensors", image="xy.png", prepared=True)
        with refused("would-overwrite", "xy.png"):
            refuse_overwriting(request(controls=(use,), xy=({"weight": [0.5, 1]},)), folder)
        # Condition images of several combinations are numbered.
        write_png("condition0.1.png", Image.new("RGB", (64, 64)))
        use = ControlUse(control="edges.safetensors", image="condition0.1.png", prepared=True)
        refuse_overwriting(request(controls=(use,)), folder)
        with refused("would-overwrite", "condition0.1.png"):
            refuse_overwriting(request(controls=(use,), vary=({"0.image": ["same.png", use.image]},)), folder)

    def test_a_mask_in_one_combination_only_is_restored(self, folder, tiny_base):
        use = ControlUse(control="edges.safetensors", image="same.png", prepared=True)
        write_png("m.png", Image.new("L", (64, 64), 128))
        asked = request(base="base", steps=2, controls=(use,), xy=({"mask": [None, "m.png"]},))
        made = generate(asked)
        made.save("out")
        assert json.loads(Path("out/xy.json").read_text())["sheets"][0]["columns"] == ["no mask", "m"]
        saved = read_settings("out")
        again = generate(saved.to_request())
        assert saved.differences(again) == []
        for one, other in zip(made.images, again.images, strict=True):
            assert np.array_equal(pixels(one.image), pixels(other.image))

    def test_what_options_replace_has_not_changed(self, folder, capsys):
        for words in (("--control", "edges.safetensors={},prepared"), ("--image", "{}")):
            before, after = ([word.format(path) for word in words] for path in ("same.png", "photos/two.png"))
            assert run("apple", *before, "--xy", "guidance=1,2", "--out", "one") == 0
            capsys.readouterr()
            assert main(["generate", "--from", "one", *after, "--out", "two"]) == 0
            assert "has changed" not in capsys.readouterr().err
        # Fewer controls than before are compared as far as there are any.
        control = ("--control", "edges.safetensors=same.png,prepared")
        assert run("apple", *control, *control, "--xy", "guidance=1,2", "--out", "one") == 0
        assert main(["generate", "--from", "one", *control, "--out", "two"]) == 0


def test_a_long_title_is_wrapped_so_that_values_stay_readable(monkeypatch):
    drawn: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **style: drawn.append(text))
    rows = ["lora.watercolour.weight 0.25", "w" * 300]
    sheet = Sheet("xy", "seed 0", ["guidance 1"], rows, [["a"], ["b"]])
    sheet.draw({name: Image.new("RGB", (128, 128)) for name in "ab"})
    assert {"0.25", "guidance 1"} <= set(drawn)
    assert any(text.startswith("www") and text.endswith("...") for text in drawn)
