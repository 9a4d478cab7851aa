"""Recipes: every setting typed, and what is wrong said in words before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from controlkit.errors import UserError
from controlkit.files import write_atomically
from controlkit.nano.recipes import AutoencoderRecipe
from controlkit.training.recipe import ControlRecipe
from controlkit.training.recipes import build_recipe, by_source, read_recipe, recipes
from controlkit.training.run_folder import fingerprint
from controlkit.training.schedule import Schedule
from refusals import refused

SHIPPED = sorted(path for path in Path(__file__).parents[2].glob("recipes/**/*.yaml"))
MINIMAL = {"system": "controlnet", "out": "runs/x", "steps": 100, "icons": "icons.npz", "condition": "canny"}


@pytest.fixture
def file(tmp_path):
    def write(values):
        path = tmp_path / "recipe.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write


def test_recipes_ship():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    recipe = read_recipe(path)
    values = yaml.safe_load(path.read_text())
    assert isinstance(recipe, recipes()[values["system"]])
    for key, value in values.items():
        mine = getattr(recipe, key)
        assert (list(mine) if isinstance(mine, tuple) else mine) == value


@pytest.mark.parametrize(
    ("change", "code", "facts"),
    [
        ({"learning_rat": 1e-4}, "unknown-key", ["'learning_rat'", "did you mean learning_rate"]),
        ({"varients": 3}, "unknown-key", ["varients", "did you mean variants"]),
        ({1: 2}, "unknown-key", ["'1'"]),
        ({"system": "controlent"}, "unknown-name", ["controlent", "did you mean controlnet"]),
        ({"system": None}, "missing-setting", ["system", "None"]),
        ({"steps": "many"}, "wrong-type", ["steps", "many"]),
        ({"steps": 1.5}, "wrong-type", ["steps", 1.5]),
        ({"steps": True}, "wrong-type", ["steps", "True"]),
        ({"steps": None}, "wrong-type", ["steps"]),
        ({"condition": None}, "wrong-type", ["condition is null", "text"]),
        ({"min_lr_rate": None}, "wrong-type", ["min_lr_rate is null", "a number"]),
        ({"steps": 0}, "out-of-range", ["steps", 0, 1]),
        ({"batch_size": -1}, "out-of-range", ["batch_size", -1, "at least 1"]),
        ({"learning_rate": "fast"}, "wrong-type", ["learning_rate", "fast"]),
        ({"learning_rate": 0}, "out-of-range", ["learning_rate", "above 0"]),
        ({"learning_rate": math.nan}, "out-of-range", ["learning_rate", "above 0"]),
        ({"learning_rate": math.inf}, "out-of-range", ["learning_rate", "inf"]),
        ({"max_grad_norm": -1}, "out-of-range", ["max_grad_norm", -1, "above 0"]),
        ({"snr_gamma": 0}, "out-of-range", ["snr_gamma", 0, "above 0"]),
        ({"precision": "fp8"}, "unknown-name", ["precision", "fp8", "fp32, bf16 or auto"]),
        ({"ema": 1.0}, "out-of-range", ["ema", 1.0, 0]),
        ({"prompt_drop": 2}, "out-of-range", ["prompt_drop", 2, "0 and 1"]),
        ({"min_lr_rate": -0.1}, "out-of-range", ["min_lr_rate", -0.1, "0 and 1"]),
        ({"beta2": 1.0}, "out-of-range", ["beta2", 1.0]),
        ({"weight_decay": -1}, "out-of-range", ["weight_decay", -1]),
        ({"seed": -1}, "out-of-range", ["seed", -1, "at least 0"]),
        ({"variants": 0}, "out-of-range", ["variants", 0, 1]),
        ({"condition": ["canny"]}, "wrong-type", ["condition"]),
    ],
)
def test_wrong_recipes_are_refused_in_words(file, change, code, facts):
    path = file({**MINIMAL, **change})
    with refused(code, *facts) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("system", "change", "facts"),
    [
        ("uni-controlnet-global", {"keep_all": -1}, ["keep_all", -1, "0 and 1"]),
        ("uni-controlnet-global", {"drop_each": math.nan}, ["drop_each", "nan"]),
        ("uni-controlnet-local", {"keep_all": 0.7, "drop_all": 0.7}, ["keep_all + drop_all", 1.4]),
        ("controlnet-xs", {"size_ratio": 0}, ["size_ratio", 0]),
        ("controlnet-xs", {"time_embedding_mix": 5}, ["time_embedding_mix", 5, "0 and 1"]),
        ("controlnet-xs", {"time_embedding_mix": math.nan}, ["time_embedding_mix", "nan"]),
        ("t2i-adapter", {"colours": 2}, ["colours", 2, "3 (RGB) or 1 (grey)"]),
        ("controlnet-sd3", {"num_layers": 0}, ["num_layers", 0, 1]),
        ("controlnet-flux", {"num_layers": 0}, ["num_layers", 0, 1]),
        ("flux-control-lora", {"rank": 0}, ["rank", 0, 1]),
        ("controlnet-flux", {"num_single_layers": -1}, ["num_single_layers", -1, 0]),
        ("controlnet-z-image", {"num_layers": 0}, ["num_layers", 0, 1]),
        ("controlnet-qwen-image", {"num_layers": 0}, ["num_layers", 0, 1]),
        ("gligen", {"gate": 1}, ["gate", "below 1"]),
        ("gligen", {"gate": math.nan}, ["gate", "nan"]),
        ("gligen", {"max_objects": 31}, ["max_objects", 31, 30]),
        ("t2i-adapter", {"steps": 0, "colours": 3}, ["steps", 0, 1]),
        ("uni-controlnet-global", {"token_count": 0}, ["token_count", 0, "at least 1"]),
    ],
)
def test_settings_of_systems_are_checked_before_anything_is_loaded(file, system, change, facts):
    values = {**MINIMAL, "system": system, **change}
    if system == "uni-controlnet-local":
        values |= {"conditions": ["canny", "palette"]}
        del values["condition"]
    with refused("out-of-range", *facts):
        read_recipe(file(values))


@pytest.mark.parametrize(
    ("system", "change", "code", "facts"),
    [
        ("controlnet-z-image", {"design": "2.0"}, "unknown-name", ["design", "'2.0'", "1.0 or 2.1"]),
        ("controlnet-xs", {"time_embedding_mix": 0.5}, "contradiction", ["0.5", "learn_time_embedding"]),
        ("controlnet-xs", {"name": "a/b"}, "wrong-type", ["a/b"]),  # checked beside the system's own
    ],
)
def test_options_of_systems_that_are_no_numbers_are_checked_as_well(file, system, change, code, facts):
    with refused(code, *facts):
        read_recipe(file({**MINIMAL, "system": system, **change}))


def test_the_page_names_the_systems_whose_prompt_drop_does_not_depend_on_the_source():
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (named,) = re.findall(r"`prompt_drop` stays 0.5 for ([^.]*), which", page)
    drops = {}
    for system, kind in recipes().items():
        ships = issubclass(kind, ControlRecipe) and kind.control_class.__module__.startswith("controlkit.")
        for recipe in [by_source(kind)["pairs"]] if ships else []:
            defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
            assert (defaults["steps"], defaults["batch_size"]) == (500, 16)
            drops[system.removesuffix("-pairs")] = defaults["prompt_drop"]
    assert set(drops.values()) == {0.3, 0.5}
    assert {system for system, drop in drops.items() if drop == 0.5} == set(re.findall("`(.*?)`", named))


def test_a_tilde_is_the_home_folder_in_every_path(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = read_recipe(file({**MINIMAL, "out": "~/runs/x"}), ["icons=~/icons.npz", "start=~"])
    assert (recipe.out, recipe.icons) == ("/home/someone/runs/x", "/home/someone/icons.npz")
    assert recipe.start is None  # in YAML, ~ alone is null
    assert read_recipe(file({**MINIMAL, "base": "~"})).base == "/home/someone"
    assert read_recipe(file({**MINIMAL, "name": "~x", "base": "a/~/b"})).base == "a/~/b"


@pytest.mark.parametrize("name", ["base", "state", "latents", "state.previous"])
def test_conditions_do_not_overwrite_the_files_of_their_run(file, name):
    values = {**MINIMAL, "system": "ctrlora-base", "conditions": ["canny", name]}
    del values["condition"]
    with refused("would-overwrite", f"condition {name!r}"):
        read_recipe(file(values))
    one = {**MINIMAL, "condition": name}
    if name != "base":
        with refused("would-overwrite", f"condition {name!r}"):
            read_recipe(file(one))
    assert read_recipe(file({**one, "name": "mine"})).results == ("mine.safetensors",)


@pytest.mark.parametrize("letter", ["n", "é", "\udce9"])
def test_a_name_is_not_too_long_for_a_file(file, letter, tmp_path):
    size = len(os.fsencode(letter))
    values = {**MINIMAL, "name": letter * (200 // size)}
    (name,) = build_recipe(values).results
    write_atomically(tmp_path / name, lambda temporary: temporary.write_text("of a control"))
    with refused("out-of-range", "name has", "200"):
        build_recipe({**values, "name": letter * (200 // size + 1)})
    with refused("out-of-range", "condition has", "200"):
        build_recipe({**MINIMAL, "condition": letter * 245})


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_conditions_with_a_file_each_are_names_of_files(file, name):
    values = {**MINIMAL, "system": "ctrlora-base", "conditions": ["canny", name]}
    del values["condition"]
    with refused("wrong-type", f"condition {name!r}"):
        read_recipe(file(values))


@pytest.mark.parametrize(("channels", "said"), [([8] * 7, "7 entries"), ([8, 12], "[8, 12]"), ([], "[]")])
def test_levels_of_an_autoencoder_that_do_not_fit_its_images(channels, said):
    with refused("out-of-range", "channels", said):
        build_recipe({"system": "autoencoder", "out": "run", "icons": "icons.npz", "steps": 2, "channels": channels})


@pytest.mark.parametrize("name", ["kl_weight", "gradient_weight", "square_weight"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_weights_of_losses_are_checked(name, value):
    with refused("out-of-range", name, value, "at least 0"):
        AutoencoderRecipe(out="x", icons="i", steps=1, **{name: value})


@pytest.mark.parametrize("missing", ["out", "steps", "condition"])
def test_what_has_no_default_must_be_said(file, missing):
    with pytest.raises(UserError, match=missing):
        read_recipe(file({key: value for key, value in MINIMAL.items() if key != missing}))


@pytest.mark.parametrize(
    ("text", "code", "fact"),
    [
        ("", "wrong-type", "NoneType"),
        ("- a\n- b\n", "wrong-type", "list"),
        ("just words", "wrong-type", "str"),
        ("a: [1, 2\n", "damaged-file", "YAML"),
        ("\tx: 1", "damaged-file", "YAML"),
        ("\x00", "damaged-file", "YAML"),
    ],
)
def test_what_is_not_a_recipe_is_refused_in_words(file, text, code, fact):
    with refused(code, "recipe.yaml", fact):
        read_recipe(file(text))


def test_a_setting_that_is_set_twice_is_refused(file):
    with refused("damaged-file", "steps is set twice"):
        read_recipe(file("\n".join(f"{k}: {v}" for k, v in MINIMAL.items()) + "\nsteps: 3\nsteps: 7\n"))


def test_a_missing_file_is_named(tmp_path):
    with refused("missing-file", "nothing.yaml"):
        read_recipe(tmp_path / "nothing.yaml")
    with refused("unreadable-file", tmp_path):
        read_recipe(tmp_path)


def test_numbers_that_yaml_takes_for_text_are_numbers(file):
    recipe = read_recipe(file("\n".join(f"{k}: {v}" for k, v in MINIMAL.items()) + "\nlearning_rate: 3e-4\n"))
    assert recipe.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("text", "steps"), [("010", 10), ("089", 89), ("1e3", 1000), ("1.5e3", 1500), ("7.0", 7), ("10_000", 10_000)]
)
def test_whole_numbers_are_those_of_yaml_1_2(file, text, steps):
    values = "\n".join(f"{k}: {v}" for k, v in {**MINIMAL, "steps": text}.items())
    assert read_recipe(file(values)).steps == steps
    assert read_recipe(file(MINIMAL), [f"steps={text}"]).steps == steps
    assert read_recipe(file({**MINIMAL, "steps": text})).steps == steps  # in quotes
    autoencoder = {"system": "autoencoder", "out": "x", "steps": 3, "icons": "i.npz"}
    assert read_recipe(file(autoencoder), ["channels=[1.6e1, 010_000]"]).channels == (16, 10_000)


@pytest.mark.parametrize("text", ["60:0", "1:30.5", "0b11", "1__0", "[", "true", "1.5e0", "1e-3", ".inf", "2024-01-01"])
def test_what_is_no_whole_number_in_yaml_1_2_is_refused(file, text):
    values = "\n".join(f"{k}: {v}" for k, v in {**MINIMAL, "steps": text}.items())
    for change in ({"steps": text}, {"batch_size": text}):
        with refused("wrong-type", next(iter(change)), "expected a whole number"):
            read_recipe(file({**MINIMAL, **change}))
    if text != "[":
        with refused("wrong-type", "steps", "expected a whole number"):
            read_recipe(file(values))


@pytest.mark.parametrize("text", ["1:30", "1:30.5", "0x"])
def test_what_is_no_number_in_yaml_1_2_is_refused(file, text):
    with refused("wrong-type", "learning_rate", repr(text), "expected a number"):
        read_recipe(file(MINIMAL), [f"learning_rate={text}"])
    with refused("wrong-type", "snr_gamma", repr(text), "a number or null"):
        read_recipe(file(MINIMAL), [f"snr_gamma={text}"])


@pytest.mark.parametrize("word", ["on", "off"])
def test_words_that_are_booleans_in_old_yaml_are_text_where_text_is_expected(file, word):
    text = "\n".join(f"{k}: {v}" for k, v in MINIMAL.items())
    assert read_recipe(file(f"{text}\ngraphs: {word}\n")).graphs == word
    assert read_recipe(file(text), [f"graphs={word}"]).graphs == word
    for name in ("no", "Yes", "true-colours"):
        assert read_recipe(file(text), [f"name={name}"]).name == name


@pytest.mark.parametrize(("word", "value"), [("on", True), ("Yes", True), ("TRUE", True), ("off", False)])
def test_the_same_words_are_booleans_where_a_boolean_is_expected(file, word, value):
    text = "\n".join(f"{k}: {v}" for k, v in {**MINIMAL, "gradient_checkpointing": word}.items())
    assert read_recipe(file(text)).gradient_checkpointing is value
    assert read_recipe(file(MINIMAL), [f"gradient_checkpointing={word}"]).gradient_checkpointing is value
    with refused("wrong-type", "gradient_checkpointing", "'maybe'", "true or false"):
        read_recipe(file(MINIMAL), ["gradient_checkpointing=maybe"])


def test_settings_on_the_command_line_win(file):
    path = file({**MINIMAL, "seed": 3})
    recipe = read_recipe(path, ["steps=7", "learning_rate=3e-4", "ema=null", "base=other/folder", "seed = 5"])
    assert (recipe.steps, recipe.learning_rate, recipe.ema, recipe.seed) == (7, 3e-4, None, 5)
    assert recipe.base == "other/folder"
    autoencoder = file({"system": "autoencoder", "out": "x", "steps": 3, "icons": "i.npz"})
    assert read_recipe(autoencoder, ["channels=[8, 16]"]).channels == (8, 16)


@pytest.mark.parametrize(
    ("override", "code", "facts"),
    [
        ("steps", "usage", ["key=value"]),
        ("stepz=3", "unknown-key", ["did you mean steps"]),
        ("steps=a", "wrong-type", ["steps"]),
        ("steps=[", "wrong-type", ["steps"]),
        ("=3", "unknown-key", ["key"]),
    ],
)
def test_wrong_settings_on_the_command_line_are_refused_in_words(file, override, code, facts):
    with refused(code, *facts):
        read_recipe(file(MINIMAL), [override])


def test_a_recipe_can_be_rebuilt_from_its_own_values():
    recipe = build_recipe(MINIMAL)
    again = build_recipe({"system": recipe.system, **dataclasses.asdict(recipe)})
    assert again == recipe and fingerprint(again) == fingerprint(recipe)


def test_the_fingerprint_tells_runs_apart_that_cannot_go_on_from_each_other():
    recipe = recipes()["controlnet"](out="a", steps=5, icons="i", condition="canny")
    may_change = dataclasses.replace(recipe, out="b", steps=9, save_every=7, device="cpu")
    assert fingerprint(may_change) == fingerprint(recipe)
    for change in ({"seed": 1}, {"condition": "hed"}, {"batch_size": 4}, {"ema": 0.9}, {"prompt_drop": 0.1}):
        assert fingerprint(dataclasses.replace(recipe, **change)) != fingerprint(recipe)


def rates(**settings):
    recipe = AutoencoderRecipe(out="x", icons="i", **settings)
    return [Schedule.of(recipe).at(step) for step in range(recipe.steps)]


def test_the_learning_rate_rises_then_falls_to_its_end():
    values = rates(steps=200, warmup_steps=10, learning_rate=1.0, min_lr_rate=0.1)
    top = values.index(max(values))
    assert top == 9
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert values[0] == pytest.approx(0.1, rel=1e-3)
    assert values[99] == pytest.approx(0.55, abs=0.01)
    assert values[-1] == pytest.approx(0.1, abs=1e-3)


@given(st.integers(1, 300), st.integers(0, 400), st.floats(1e-6, 10), st.floats(0, 1))
def test_the_learning_rate_is_always_between_nothing_and_its_peak(steps, warmup, peak, final):
    values = rates(steps=steps, warmup_steps=warmup, learning_rate=peak, min_lr_rate=final)
    assert all(0 < value <= peak * (1 + 1e-9) for value in values)
    if warmup == 0 and final == 1:
        assert values == pytest.approx([peak] * steps)


def test_reading_a_recipe_of_a_base_loads_neither_torch_nor_diffusers():
    """Those of controls ask the registry of systems, which loads both."""
    (recipe,) = (path for path in SHIPPED if path.match("nano/autoencoder.yaml"))
    code = (
        "import sys\n"
        "from controlkit.training.recipes import read_recipe\n"
        "from controlkit.sampling.request import GenerateRequest\n"
        f"read_recipe({str(recipe)!r})\n"
        "GenerateRequest(prompt='x')\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
