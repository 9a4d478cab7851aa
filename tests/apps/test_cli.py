"""The command line: what it makes, and what it says to bad input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from controlkit.apps import demo
from controlkit.apps.cli import main
from controlkit.apps.show import print_json, print_table
from controlkit.apps.study import STUDIES
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.conditions import registry
from controlkit.evaluation import evaluate_control
from controlkit.formats.load import save_control
from controlkit.sampling.request import GenerateRequest
from controlkit.studies.community_model import CommunityModel
from refusals import check, refused
from tiny import fresh_control


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.png"
    made = np.full((80, 80, 3), 200, np.uint8)
    made[20:60, 24:56] = (180, 30, 30)
    Image.fromarray(made).save(path)
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_help_of_every_verb_loads_nothing_heavy():
    """What makes it answer at once: the libraries that take seconds to import, and numpy, stay away."""
    probe = """
import contextlib, io, json, sys
from controlkit.apps.cli import VERBS, main
found = {}
for words in ([], *([verb.__name__.rpartition(".")[2]] for verb in VERBS)):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main([*words, "--help"])
    assert said.getvalue().startswith("usage: controlkit"), words
    heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "cv2", "numpy", "PIL", "scipy", "matplotlib"}
    found[" ".join(words)] = sorted(heavy & set(sys.modules))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {"", "generate", "train", "pairs"} <= set(found)
    assert {words: heavy for words, heavy in found.items() if heavy} == {}


@pytest.mark.parametrize("verb", ["demo", "condition", "generate", "train", "evaluate", "inspect"])
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"controlkit {verb}" in capsys.readouterr().out


def test_condition_writes_a_condition_image(image, tmp_path, capsys):
    out = tmp_path / "edges.png"
    assert run("condition", "canny", image, "--out", out, "--set", "low=50", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == {"low": 50, "high": 200}
    edges = np.asarray(Image.open(out))
    assert edges.shape == (80, 80, 3)
    assert set(np.unique(edges)) == {0, 255}


def test_condition_list_names_canny(capsys):
    assert run("condition", "--list", "--json") == 0
    assert "canny" in {entry["name"] for entry in json.loads(capsys.readouterr().out)}


def test_the_list_of_conditions_has_a_line_for_each(capsys, monkeypatch):
    known = registry()
    assert run("condition", "--list") == 0
    whole = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in whole] == list(known)
    assert all(line.endswith(made.summary) for line, made in zip(whole, known.values(), strict=True))
    assert all(("  a model  " in line) == (known[line.split()[0]].requires is not None) for line in whole)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run("condition", "--list") == 0
        shown = capsys.readouterr().out.splitlines()[1:]
        assert [line.split()[0] for line in shown] == list(known) and max(map(len, shown)) <= columns
        assert any(line.endswith("…") for line in shown)


def test_condition_without_a_image_tells_all_about_it(capsys):
    assert main(["condition", "illusion"]) == 0
    table = capsys.readouterr().out
    assert "0, 127, 255" in table and "1, repeated as RGB" in table and "nearest pixel" in table
    assert main(["condition", "shuffle", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cuts"] is False and facts["channels"] == 3 and facts["least_side"] == 16
    assert main(["condition", "--list", "--json"]) == 0
    assert facts in json.loads(capsys.readouterr().out)


def test_generate_writes_images_that_say_how_to_draw_them_again(image, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("generate", "red apple", "--control", f"canny={image}@0.8:0-0.9", "--seeds", 2, "--seed", 5)
    assert run(*words, "--steps", 4, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in printed["images"]] == ["seed5.png", "seed6.png"]
    settings = json.loads(Image.open(out / "seed6.png").text["controlkit"])
    request = GenerateRequest.from_json(settings["request"])
    assert request.seeds == (6,)

    from controlkit import generate

    again = np.asarray(generate(request).images[0].image, dtype=int)
    assert np.abs(again - np.asarray(Image.open(out / "seed6.png"), dtype=int)).max() <= 1
    assert (out / "condition0.png").exists()


def test_generate_from_settings_draws_the_same_images_bit_for_bit(image, tmp_path, capsys):
    first, second, third, one = (tmp_path / name for name in ("first", "second", "third", "one"))
    words = ("generate", "red apple", "--control", f"canny={image}@0.8", "--seeds", 2, "--seed", 5, "--steps", 3)
    assert run(*words, "--out", first) == 0
    used = json.loads((first / "settings.json").read_text())["used"]
    resolved = {"precision": "fp32", "width": 64, "height": 64, "guidance": 3.0, "mode": "control", "sampler": "ddim"}
    assert used == {"device": "cpu", **resolved}
    assert run("generate", "--from", first / "settings.json", "--out", second) == 0
    for name in ("seed5.png", "seed6.png", "condition0.png"):
        assert (np.asarray(Image.open(first / name)) == np.asarray(Image.open(second / name))).all()
    # What is given besides counts, and nothing else changes.
    words = ("generate", "--from", first / "settings.json", "--steps", 2, "--seeds", 1, "--guidance", 2)
    assert run(*words, "--out", third) == 0
    before, after = (json.loads((folder / "settings.json").read_text()) for folder in (second, third))
    changed = {key for key, value in after["request"].items() if value != before["request"][key]}
    assert changed == {"steps", "seeds", "guidance"} and after["request"]["seeds"] == [5]
    assert run("generate", "--from", first / "settings.json", "--sampler", "unipc", "--out", third) == 0
    other = json.loads((third / "settings.json").read_text())["request"]
    assert other == {**before["request"], "sampler": "unipc"} and other["controls"][0]["mode"] == "control"
    assert (np.asarray(Image.open(first / "seed5.png")) != np.asarray(Image.open(third / "seed5.png"))).any()
    assert run("generate", "--from", first / "settings.json", "--mode", "balanced", "--out", third) == 0
    other = json.loads((third / "settings.json").read_text())["request"]["controls"]
    assert other == [{**before["request"]["controls"][0], "mode": "balanced"}]
    assert (np.asarray(Image.open(first / "seed5.png")) != np.asarray(Image.open(third / "seed5.png"))).any()
    assert run("generate", "--from", first / "seed6.png", "--out", one) == 0
    assert [path.name for path in one.glob("seed*")] == ["seed6.png"]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        ([], "missing-setting", ["prompt", "--from FILE"]),
        (["--from", "none.json"], "missing-file", ["none.json"]),
        (["--from", "{image}"], "wrong-kind", ["image.png", "settings.json"]),
        (["--from", "{tmp}/old.json", "--steps", "0"], "out-of-range", ["steps", 0, 1000]),
        (["--from", "{tmp}/odd.json"], "unknown-key", ["odd.json", "'promt'", "did you mean prompt"]),
        (["x", "--seeds", "0"], "out-of-range", ["--seeds", 0, 1]),
        (["x", "--prepared"], "contradiction", ["--prepared", "--control"]),
        (["x", "--mode", "control"], "contradiction", ["--mode", "controls"]),
        (["x", "--control", "canny={image}", "--mode", "prompt"], "unknown-name", ["mode", "'prompt'"]),
    ],
)
def test_generate_refuses_impossible_requests(words, code, facts, image, tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps({"request": {"prompt": "x"}}))
    (tmp_path / "odd.json").write_text(json.dumps({"request": {"promt": "x"}}))
    assert run("generate", *(word.format(image=image, tmp=tmp_path) for word in words)) == 2
    check(capsys.readouterr().err, code, *facts)


def test_a_cropped_image_is_noted(image, tmp_path, capsys):
    wide = tmp_path / "wide.png"
    Image.open(image).resize((160, 80)).save(wide)
    for source, facts in ((image, []), (wide, ["wide.png", "160 x 80", "64 x 64", "at the sides"])):
        assert run("generate", "x", "--control", f"canny={source}", "--steps", 1, "--out", tmp_path / "out") == 0
        err = capsys.readouterr().err
        assert all(fact in err for fact in facts)
        assert ("note:" in err) == bool(facts)


def test_a_base_for_what_is_no_control_is_refused(tmp_path, capsys):
    save_file({"some.weight": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    assert run("inspect", tmp_path / "other.safetensors") == 0
    assert run("inspect", tmp_path / "other.safetensors", "--base", "nano") == 2
    check(capsys.readouterr().err, "contradiction", "--base nano", tmp_path / "other.safetensors")


def test_inspect_tells_what_the_shipped_control_is(capsys):
    assert run("inspect", "canny", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "controlnet"
    assert facts["condition"] == "canny"
    assert facts["reads"] == "noise, time, text"
    assert facts["metadata"]["control.hint_range"] == [0, 1]
    assert run("inspect", "nano", "--json") == 0
    base = json.loads(capsys.readouterr().out)
    assert base["fingerprint"] == facts["metadata"]["control.base_fingerprint"]


def test_evaluate_control_prints_baseline_and_ceiling(capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    words = ("evaluate", "control", "canny", "--sets", "held-out", "--pictures", 6, "--steps", 4)
    assert run(*words, "--sheet", sheet, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    facts = report["facts"]["held-out"]
    assert facts["baseline"] < facts["control"] < facts["ceiling"]
    assert Image.open(sheet).width > 500
    assert run(*words[:3], "--sets", "seen-again", "--pictures", 2, "--steps", 1, "--sheet", sheet) == 0
    assert f"sheet: {sheet}" in capsys.readouterr().out


def test_a_control_is_judged_with_the_sampler_that_is_asked_for(capsys):
    words = ("evaluate", "control", "canny", "--sets", "held-out", "--pictures", 2, "--steps", 3)
    scores = []
    for sampler in ((), ("--sampler", "ddim", "--mode", "control"), ("--sampler", "dpm++")):
        assert run(*words, *sampler, "--json") == 0
        (report,) = json.loads(capsys.readouterr().out)["reports"]
        scores.append([report["facts"]["held-out"][name] for name in ("baseline", "control", "ceiling")])
    assert scores[0] == scores[1]
    assert scores[0][:2] != scores[2][:2] and scores[0][2] == scores[2][2]
    assert run(*words, "--mode", "balanced", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    balanced = report["facts"]["held-out"]
    assert balanced["baseline"] == scores[0][0] and balanced["control"] != scores[0][1]
    assert run(*words, "--mode", "balance") == 2
    check(capsys.readouterr().err, "unknown-name", "'balance'", "did you mean balanced")
    assert run(*words, "--sampler", "dpm") == 2
    check(capsys.readouterr().err, "unknown-name", "'dpm'", "did you mean dpm++")


def test_several_controls_are_judged_in_one_table(capsys, tmp_path, tiny_base, base_folder):
    from controlkit.formats.load import save_control
    from tiny import fresh_control, randomise_zero_convolutions

    files = []
    for name in ("canny", "grayscale"):
        control = randomise_zero_convolutions(fresh_control(tiny_base, name))
        files.append(save_control(tmp_path / f"{name}.safetensors", control, tiny_base))
    words = ("evaluate", "control", *files, "--base", base_folder, "--pictures", 2, "--steps", 2)
    assert run(*words, "--sets", "held-out", "seen", "--sheet", tmp_path / "sheet.png", "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert [row[1].partition(" (")[0] for row in report["rows"]] == ["edge F1", "edge F1", "PSNR, dB", "PSNR, dB"]
    # The same prompts and seeds without control: judged alone, it has the same numbers.
    alone = ("evaluate", "control", files[1], "--base", base_folder, "--pictures", 2, "--steps", 2, "--sets", "seen")
    assert run(*alone, "--json") == 0
    (single,) = json.loads(capsys.readouterr().out)["reports"]
    assert single["rows"][0][1:] == pytest.approx(report["rows"][3][2:], abs=1e-4)


def test_demo_does_the_main_job_in_few_calls(tmp_path, capsys, monkeypatch):
    """What it costs, whatever the machine: each step runs the base once for all seeds and both halves of guidance."""
    calls = []
    predict = Base.predict
    monkeypatch.setattr(Base, "predict", lambda *given, **named: calls.append(1) or predict(*given, **named))
    assert run("demo", "--out", tmp_path / "demo") == 0
    assert len(calls) <= len(demo.ROWS) * GenerateRequest.steps
    printed = capsys.readouterr().out
    assert Image.open(tmp_path / "demo" / "sheet.png").width > 1000
    assert len(list((tmp_path / "demo").glob("*/seed*.png"))) == 4 * len(demo.ROWS)
    following = [line.strip() for line in printed.partition("try next:")[2].splitlines() if line.strip()]
    assert len(following) == 3
    monkeypatch.chdir(tmp_path)
    for line in following:
        _, *words = shlex.split(line)
        assert run(*words) == 0


GENERATE = ["generate", "x", "--out", "{tmp}/new"]
BAD_INPUTS = {
    "missing image": ([*GENERATE, "--control", "canny={tmp}/none.png"], "missing-file", ["none.png"]),
    "empty image": ([*GENERATE, "--control", "canny={tmp}/empty.png"], "bad-image", ["empty.png"]),
    "truncated image": ([*GENERATE, "--control", "canny={tmp}/cut.png"], "bad-image", ["cut.png"]),
    "text as image": ([*GENERATE, "--control", "canny={tmp}/text.png"], "bad-image", ["text.png"]),
    "unknown control": ([*GENERATE, "--control", "cany={image}"], "missing-file", ["'cany'", "did you mean canny"]),
    "weight of abc": ([*GENERATE, "--control", "canny={image}@abc"], "usage", ["'abc'"]),
    "start after end": ([*GENERATE, "--control", "canny={image}@1:0.9-0.1"], "out-of-range", [0.9, 0.1]),
    "steps of abc": ([*GENERATE, "--steps", "abc"], "usage", ["--steps", "'abc'"]),
    "odd width": ([*GENERATE, "--width", "70"], "wrong-size", [70, "multiple of", "try"]),
    "base without a UNet": ([*GENERATE, "--base", "{tmp}/half"], "wrong-kind", ["half", "unet"]),
    "output under a file": (["generate", "x", "--out", "{tmp}/file/out"], "write-failed", ["file/out"]),
    "unknown condition": (
        ["condition", "cany", "{image}", "--out", "{tmp}/new"],
        "unknown-name",
        ["'cany'", "did you mean canny"],
    ),
    "unknown parameter": (
        ["condition", "canny", "{image}", "--set", "lo=1", "--out", "{tmp}/new"],
        "unknown-key",
        ["'lo'", "did you mean low"],
    ),
    "misspelt recipe key": (
        ["train", "{tmp}/recipe.yaml"],
        "unknown-key",
        ["'learning_rat'", "did you mean learning_rate"],
    ),
    "missing recipe": (["train", "{tmp}/none.yaml"], "missing-file", ["none.yaml"]),
    "unknown set": (
        ["evaluate", "control", "canny", "--sets", "hold-out"],
        "unknown-name",
        ["'hold-out'", "did you mean held-out"],
    ),
    "inspect nothing": (["inspect", "nothing-like-it"], "missing-file", ["'nothing-like-it'"]),
    "unknown verb": (["paint"], "usage", ["'paint'", "generate"]),
}
"""Case -> the command, the code of its error where this room raises it, and what the error names."""


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gets_one_plain_sentence_and_leaves_nothing(case, image, tmp_path, capsys):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(image.read_bytes()[:60])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "recipe.yaml").write_text("system: autoencoder\nout: x\nsteps: 3\nicons: y\nlearning_rat: 1\n")
    (tmp_path / "half" / "vae").mkdir(parents=True)
    (tmp_path / "file").write_text("in the way")
    words, code, facts = BAD_INPUTS[case]
    before = sorted(tmp_path.rglob("*"))
    assert run(*(word.format(tmp=tmp_path, image=image) for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("controlkit: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    check(err, code, *facts)
    assert sorted(tmp_path.rglob("*")) == before


def labelled(tmp_path) -> Path:
    """A map of two labels, 250 x 250."""
    labels = np.zeros((250, 250, 3), np.uint8)
    labels[:, 101:] = (255, 128, 0)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    return tmp_path / "labels.png"


def test_labels_that_are_given_are_not_mixed(tmp_path):
    use = f"nano/color_regions={labelled(tmp_path)}"
    assert run("generate", "house", "--control", use, "--prepared", "--steps", 1, "--out", tmp_path / "out") == 0
    colours = np.asarray(Image.open(tmp_path / "out" / "condition0.png")).reshape(-1, 3)
    assert {tuple(colour) for colour in colours.tolist()} == {(0, 0, 0), (255, 128, 0)}


def test_images_never_take_the_place_of_what_they_are_drawn_from(image, tmp_path, capsys):
    given = tmp_path / "out" / "seed1.png"
    given.parent.mkdir()
    given.write_bytes(image.read_bytes())
    command = ["generate", "house", "--control", f"canny={given}", "--steps", 1, "--out", given.parent]
    assert run(*command, "--seeds", 2) == 2
    check(capsys.readouterr().err, "would-overwrite", given, "canny")
    assert given.read_bytes() == image.read_bytes()
    assert run(*command, "--seeds", 1) == 0


def test_images_that_were_drawn_before_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt in ("red apple", "green pear"):
        assert run("generate", prompt, "--steps", 1) == 0
    kept = [Image.open(path).text["prompt"] for path in sorted((tmp_path / "images").glob("*/seed0.png"))]
    assert kept == ["red apple", "green pear"]


def test_what_a_base_does_not_read_of_a_prompt_is_told(tmp_path, capsys):
    words = " ".join(["apple"] * 60)
    assert run("generate", words, "--steps", 1, "--out", tmp_path / "out", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["request"]["prompt"] == words
    assert "note: the base reads 24 tokens" in err and "apple apple'" in err


def test_controls_of_a_base_of_another_size_are_judged_at_that_size(base_folder, tmp_path, capsys):
    path = base_folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 8}))
    base = load_base(base_folder)
    assert base.size == 32
    save_control(tmp_path / "canny.safetensors", fresh_control(base), base)
    command = ["evaluate", "control", tmp_path / "canny.safetensors", "--base", base_folder, "--pictures", 2]
    assert run(*command, "--steps", 2, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["facts"]["held-out"]["ceiling"] > 0


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (["control", "canny", "--steps", "0"], "out-of-range", ["steps", 0]),
        (["control", "canny", "--steps", "1001"], "out-of-range", ["steps", 1001]),
        (["control", "canny", "--guidance", "nan"], "out-of-range", ["guidance", "nan"]),
        (["control", "canny", "--guidance", "0.5"], "out-of-range", ["guidance", 0.5]),
        (["control", "canny", "--weight", "nan"], "out-of-range", ["--weight", "nan"]),
        (["control", "canny", "--images", "0"], "out-of-range", ["--images", 0, 1]),
        (["control", "canny", "canny"], "contradiction", ["canny"]),
        (["control", "canny", "--sheet", "."], "wrong-kind", ["--sheet .", "folder", "PNG"]),
        (["control", "canny", "--sheet", "canny.safetensors"], "wrong-kind", ["canny.safetensors", ".png"]),
        (["control", "canny", "--sets", "held-out", "--sets", "held-out"], "contradiction", ["held-out repeats"]),
        (["control", "canny", "--prompt-mode", "none", "--prompt-mode", "none"], "contradiction", ["none repeats"]),
        (["control", "canny", "--sets", "held-out", "--images", "1", "--distance"], "out-of-range", ["FD", 2, 1]),
        (["control", "canny", "nano/blur", "--images", "1", "--distance"], "out-of-range", ["FD", 2, 1]),
        (["base", "nano", "--pictures", "3"], "contradiction", ["--images", "controls"]),
        (["base", "nano", "nano"], "usage", ["one base", 2]),
    ],
)
def test_evaluate_refuses_before_it_samples(words, code, facts, capsys, monkeypatch):
    for name in ("generate_baselines", "generate_controlled"):
        monkeypatch.setattr(evaluate_control, name, lambda *_, **__: pytest.fail("it samples"))
    assert run("evaluate", *words) == 2
    check(capsys.readouterr().err, code, *facts)


def test_settings_of_a_study_are_listed_as_json_too(capsys):
    assert run("study", "community-model", "--help-settings", "--json") == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert listed["images"]["default"] == CommunityModel.images and listed["images"]["what"]


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (["generate", "x", "--width", str(2**40)], "out-of-range", ["width", 2**40, 1, 16384]),
        (["inspect", "canny", "--size", str(2**40)], "out-of-range", ["--size", 2**40, 1, 16384]),
        (["inspect", "canny", "--rank", "4"], "contradiction", ["--rank", "ctrlora", "canny"]),
        (["inspect", "nano", "--base", "nothing"], "contradiction", ["--base nothing", "nano is a base"]),
        (["inspect", "canny", "--base", "sdxl"], "incompatible", ["canny", "sdxl", "--base"]),
        (["inspect", "canny", "--base", "nothing"], "missing-file", ["nothing"]),
        (["condition", "canny", "{image}", "--set", "low=2024-13-01"], "wrong-type", ["low=2024-13-01", "YAML"]),
        (["condition", "canny", "{image}", "--set", f"low={'9' * 400}"], "out-of-range", ["low", "0", "1530"]),
        (["condition", "all", "{image}", "--set", "low=3"], "contradiction", ["all", "--set"]),
        (["condition", "canny", "{image}", "--out", "notes.txt"], "usage", ["notes.txt", ".png"]),
        (["condition", "canny", "{image}", "--out", "{image}"], "would-overwrite", ["image.png"]),
        (["condition", "canny", "{image}", "--set", "low=1000000"], "out-of-range", ["low", 1000000, 0, 1530]),
        (["condition", "canny", "{image}", "--set", "low=250"], "contradiction", ["low", 250, "high", 200]),
        (["condition", "canny", "."], "missing-setting", ["--out DIR"]),
        (["condition", "all", "."], "wrong-kind", ["folder"]),
        (["condition", "{image}", "canny"], "usage", ["image.png", "controlkit condition canny"]),
        (["condition", "{image}"], "usage", ["image.png", "controlkit condition NAME"]),
        (
            ["pairs", "photos", "--conditions", "canny", "--out", "p", "--sheet", "s.png"],
            "contradiction",
            ["--sheet s.png", "controlkit pairs --check p"],
        ),
        (["condition", "--list", "canny"], "contradiction", ["--list", "controlkit condition canny"]),
        (["generate", "x", "--control", "canny=src"], "empty-data", ["src", "folder of images"]),
        (
            ["study", "several-conditions", "--set", "mixes=[palette+palette]"],
            "contradiction",
            ["'palette+palette'", "two or more"],
        ),
        (
            ["study", "several-conditions", "--out", "{image}.a", "--set", "out={image}.b"],
            "contradiction",
            ["out is ", ".a", "--set out=", ".b"],
        ),
        (
            ["adapt", "pairs", "--control", "nano/base", "--out", "a", "--set", "out=b"],
            "contradiction",
            ["out is a", "--set out=b"],
        ),
        (
            ["adapt", "pairs", "--control", "nano/base", "--steps", "3", "--set", "steps=4"],
            "contradiction",
            ["steps is 3", "--set steps=4"],
        ),
        (["study", "several-conditions", "--set", "mixes=[]"], "missing-setting", ["mixes", "palette+lineart"]),
        (
            ["study", "several-conditions", "--control", "canny"],
            "contradiction",
            ["--control", "several-conditions", "--help-settings"],
        ),
        *(
            (["study", name, "--out", "{image}"], "write-failed", ["image.png", "--out another folder"])
            for name in STUDIES
        ),
        (["study", "convergence", "--given", "a=b"], "contradiction", ["--given", "convergence"]),
        *(
            (["study", name, "--set", "sampling_steps=1001"], "out-of-range", ["sampling_steps", 1001, 1000])
            for name in STUDIES
        ),
        (["study", "community-model", "--set", "images=0"], "out-of-range", ["images", 0, "at least 1"]),
        (["study", "new-condition", "--set", "budgets=25"], "wrong-type", ["budgets", 25, "a list of", "[25, 50, 100"]),
        (["study", "new-condition", "--set", "rank=[a]"], "wrong-type", ["rank", "['a']", "such as 4"]),
        (["evaluate", "control", "canny", "--sheet", "{image}/x.png"], "write-failed", ["image.png", "--sheet"]),
        (["train", "controlnett"], "missing-file", ["controlnett", "did you mean controlnet"]),
        (["train", "controlnet", "--set", "steps=1"], "contradiction", ["controlnet", "system", "--set"]),
        (
            ["transfer", "canny", "--from", "nano", "--to", "sd15", "--out", "x.safetensors"],
            "missing-file",
            ["sd15", "weights"],
        ),
        (["transfer", "canny", "--from", "nano", "--to", "nano", "--out", "x.pth"], "usage", ["x.pth", ".safetensors"]),
    ],
)
def test_what_would_fail_later_is_refused_at_once(words, code, facts, image, capsys):
    assert run(*(word.format(image=image) if "{image}" in word else word for word in words)) == 2
    check(capsys.readouterr().err, code, *facts)


def test_a_recipe_that_is_not_there_names_the_nearest_beside_it(tmp_path, capsys):
    (tmp_path / "controlnet-canny.yaml").write_text("system: controlnet")
    assert run("train", tmp_path / "controlnet-cany.yaml") == 2
    assert f"did you mean {tmp_path / 'controlnet-canny.yaml'}" in capsys.readouterr().err


def test_what_ships_is_listed_a_line_each(capsys):
    assert run("inspect", "--json") == 0
    shipped = json.loads(capsys.readouterr().out)
    kinds = {one["name"]: (one["kind"], one["condition"]) for one in shipped}
    assert kinds["nano"] == ("base", None) and kinds["canny"] == ("controlnet", "canny")
    assert kinds["nano/base"] == ("ctrlora-base", None) and kinds["nano/palette"] == ("ctrlora", "palette")
    assert run("inspect") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [one["name"] for one in shipped]
    assert run("inspect", "--size", 64) == 2
    check(capsys.readouterr().err, "missing-setting", "controlkit inspect NAME")


def test_settings_without_a_default_are_required(capsys):
    assert run("train", "ctrlora-adapter", "--json") == 0
    required = [one for one in json.loads(capsys.readouterr().out) if one["required"]]
    common = {"out", "control"}
    assert {one["name"] for one in required if "pairs" in one["sources"]} == {"pairs", *common}
    for source in ("icons", "multigen"):
        names = {one["name"] for one in required if source in one["sources"]}
        assert names == {source, "steps", "condition", *common}
    assert run("train", "ctrlora-adapter") == 0
    assert capsys.readouterr().out.count("required") == len(required)
    assert run("train", "base", "--json") == 0
    assert not any(one["sources"] for one in json.loads(capsys.readouterr().out))


def test_out_of_memory_is_one_sentence(image, tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr("controlkit.sampling.single.sample_prompts", full)
    assert run("generate", "x", "--out", tmp_path / "new", "--json") == 2
    out, err = capsys.readouterr()
    check(err, "out-of-memory", "--batch-size", "--device")
    assert err.count("\n") == 1 and json.loads(out)["error"]["code"] == "out-of-memory"
    assert not (tmp_path / "new").exists()


def test_text_in_brackets_is_shown_as_it_is(capsys):
    print_table("model [fp16]", ("fact", "value"), [("tags", "[/b] end")])
    out = capsys.readouterr().out
    assert "model [fp16]" in out and "[/b] end" in out


def test_json_has_null_for_what_is_no_number(capsys):
    print_json({"a": float("nan"), "b": [1.5, {"c": float("inf")}], "prompt": "\u732b"})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, {"c": None}],
        "prompt": "\u732b",
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_draws_nearly_the_same(precision, image, tmp_path):
    command = ["generate", "house", "--control", f"canny={image}", "--control", f"nano/palette={image}"]
    for name in ("fp32", precision):
        assert run(*command, "--steps", 2, "--precision", name, "--out", tmp_path / name) == 0
    one, two = (np.asarray(Image.open(tmp_path / name / "seed0.png"), float) for name in ("fp32", precision))
    assert 0 < np.abs(one - two).mean() < (2 if precision == "fp16" else 12)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-2", 0.01), ("-.5E3", -500), ("1.e+4", 1e4), ("[1e-3, 2]", [1e-3, 2]), ("e4", "e4"), ("1e-2x", "1e-2x")],
)
def test_values_are_numbers_as_in_yaml_1_2(text, value):
    from controlkit.settings import read_overrides

    assert read_overrides([f"sigma={text}"]) == {"sigma": value}


def test_an_option_and_the_same_override_in_other_words_agree():
    from controlkit.settings import check_overrides, read_overrides

    words = ["learning_rate=1e-4", "steps=5", "flip=on", "given=[a, b]"]
    check_overrides(read_overrides(words), {"learning_rate": 1e-4, "steps": 5, "flip": True, "given": ("a", "b")})
    with refused("contradiction", 1e-4, "learning_rate=0.001"):
        check_overrides(read_overrides(["learning_rate=1e-3"]), {"learning_rate": 1e-4})
