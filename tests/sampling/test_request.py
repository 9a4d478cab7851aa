"""The one object that asks for images, and how the command line writes a control."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from controlkit.errors import UserError
from controlkit.sampling.inputs import parse_control_use
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import MODES, ControlUse, LoraUse
from refusals import refused


def test_values_of_python_become_those_of_json():
    use = ControlUse(
        control=Path("canny"), image=Path("a.png"), weight=np.float32(0.5), layers=[1, 2], mask=Path("m.png")
    )
    request = GenerateRequest(
        prompt="a",
        controls=[use],
        seeds=np.arange(3),
        steps=np.int64(2),
        guidance=torch.tensor(3.0),
        image=Path("b.png"),
    )
    assert GenerateRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert request.seeds == (0, 1, 2) and type(request.steps) is int and request.controls == (use,)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"seeds": 5}, ["seeds", 5]),
        ({"seeds": "12"}, ["seeds", "12"]),
        ({"seeds": np.int64(5)}, ["seeds", "a list of integers"]),
        ({"seeds": torch.tensor(5)}, ["seeds", "tensor(5)"]),
        ({"steps": "2"}, ["steps", "2"]),
        ({"steps": 2.5}, ["steps", 2.5]),
        ({"prompt": None}, ["prompt", None]),
        ({"prompt": ["a", "b"]}, ["prompt"]),
        ({"controls": ControlUse(control="canny", image="a.png")}, ["controls"]),
        ({"controls": ["canny=a.png"]}, ["controls", "ControlUse"]),
        ({"tiled": 1}, ["tiled", "true or false"]),
        ({"image": Image.new("RGB", (4, 4))}, ["image", "images="]),
    ],
)
def test_values_of_other_types_are_refused_when_the_request_is_built(settings, facts):
    with refused("wrong-type", *facts):
        GenerateRequest(**{"prompt": "a", **settings})


def test_values_of_other_types_are_refused_in_a_control_and_a_lora():
    with refused("wrong-type", "image", "images="):
        ControlUse(control="canny", image=np.zeros((4, 4, 3), np.uint8))
    with refused("wrong-type", "weight", "half"):
        LoraUse(file="a.safetensors", weight="half")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canny=a.png", ("canny", "a.png", 1.0, 0.0, 1.0)),
        ("canny=a.png@0.8", ("canny", "a.png", 0.8, 0.0, 1.0)),
        ("canny=a.png@0.8:0-0.6", ("canny", "a.png", 0.8, 0.0, 0.6)),
        ("canny=a.png@-1:0.25-1", ("canny", "a.png", -1.0, 0.25, 1.0)),
        ("canny=me@home.png", ("canny", "me@home.png", 1.0, 0.0, 1.0)),
        ("canny=me@home.PNG@0.5", ("canny", "me@home.PNG", 0.5, 0.0, 1.0)),
        ("canny=a@b/c", ("canny", "a@b/c", 1.0, 0.0, 1.0)),
        ("canny=a=b.png@2", ("canny", "a=b.png", 2.0, 0.0, 1.0)),
        ("files/my.safetensors=a b.jpeg", ("files/my.safetensors", "a b.jpeg", 1.0, 0.0, 1.0)),
    ],
)
def test_forms_of_a_control(text, expected):
    use = parse_control_use(text)
    assert (use.control, use.image, use.weight, use.start, use.end) == expected
    assert use.prepared is False
    assert parse_control_use(text, prepared=True).prepared is True


@pytest.mark.parametrize(
    ("text", "code", "facts"),
    [
        ("canny", "usage", ["NAME_OR_FILE=IMAGE"]),
        ("=a.png", "usage", ["NAME_OR_FILE=IMAGE"]),
        ("canny=", "usage", ["NAME_OR_FILE=IMAGE"]),
        ("canny=@0.5", "usage", ["NAME_OR_FILE=IMAGE"]),
        ("canny=a.png@abc", "usage", ["'abc'"]),
        ("canny=a.png@", "usage", ["weight"]),
        ("canny=a.png@1:", "usage", ["start-end"]),
        ("canny=a.png@1:0.2", "usage", ["start-end"]),
        ("canny=a.png@1:0.1-0.2-0.3", "usage", ["start-end"]),
        ("canny=a.png@1:0.8-0.2", "out-of-range", ["start", 0.8, 0.2]),
        ("canny=a.png@1:0-1.5", "out-of-range", ["end", 1.5]),
        ("canny=a.png@nan", "out-of-range", ["canny", "nan", "number"]),
        ("canny=a.png@inf", "out-of-range", ["canny", "inf", "number"]),
    ],
)
def test_wrong_controls_are_refused(text, code, facts):
    with refused(code, *facts):
        parse_control_use(text)


@pytest.mark.parametrize(
    ("settings", "code", "facts"),
    [
        ({"seeds": ()}, "missing-setting", ["seeds"]),
        ({"seeds": (3, 3)}, "contradiction", ["seeds", "[3, 3]"]),
        ({"seeds": (-2,)}, "out-of-range", ["seeds", -2]),
        ({"seeds": (2**64,)}, "out-of-range", ["seeds", 2**64]),
        ({"steps": 0}, "out-of-range", ["steps", 0, 1, 1000]),
        ({"steps": 1001}, "out-of-range", ["steps", 1001]),
        ({"guidance": 0.5}, "out-of-range", ["guidance", 0.5]),
        ({"guidance": math.nan}, "out-of-range", ["guidance", "nan"]),
        ({"sampler": "dim"}, "unknown-name", ["'dim'", "did you mean ddim"]),
        ({"batch_size": 0}, "out-of-range", ["batch_size", 0]),
        ({"width": 0}, "out-of-range", ["width", 0, 16384]),
        ({"height": -64}, "out-of-range", ["height", -64]),
    ],
)
def test_impossible_requests_are_refused(settings, code, facts):
    with refused(code, *facts):
        GenerateRequest(prompt="x", **settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canny=a.png@0.8,mode=guess", {"image": "a.png", "weight": 0.8, "mode": "guess"}),
        ("canny=a.png@0.8:0-0.5,mask=masks/m=1@2.png", {"weight": 0.8, "end": 0.5, "mask": "masks/m=1@2.png"}),
        ("canny=a.png,weight=-0.5,span=0.25-1", {"weight": -0.5, "start": 0.25, "end": 1.0}),
        ("canny=a.png,prepared,mode=control", {"prepared": True, "mode": "control"}),
        ("canny=a.png,prepared=false", {"prepared": False}),
        ("canny=a.png,low=50,high=150", {"parameters": {"low": 50, "high": 150}}),
        ("canny=a.png,model=weights/a:b@c,safe=true", {"parameters": {"model": "weights/a:b@c", "safe": True}}),
        ("canny=a.png@2,layers=0:0.5:1e-1", {"weight": 2.0, "layers": (0.0, 0.5, 0.1)}),
        ("canny=a,b.png@0.5", {"image": "a,b.png", "weight": 0.5}),
        ("canny=a.png@0.5,mode=ControlNet is more important", {"mode": "guess"}),
    ],
)
def test_options_of_a_control(text, expected):
    use = parse_control_use(text)
    assert {name: getattr(use, name) for name in expected} == expected


def test_options_override_what_holds_for_all_controls():
    use = parse_control_use("canny=a.png,prepared=false,mode=guess", prepared=True, mode="balanced")
    assert (use.prepared, use.mode) == (False, "guess")
    assert parse_control_use("canny=a.png", prepared=True, mode="balanced").mode == "balanced"


def test_names_of_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png@0.5", "b.png@1,mode=guess", "c,mask=x.png", "d,mode=guess.png", "e:1=2@3"):
        (tmp_path / name).touch()
    use = parse_control_use("canny=a.png@0.5")
    assert (use.image, use.weight) == ("a.png@0.5", 1.0)
    use = parse_control_use("canny=a.png@0.5@0.7,mode=control")
    assert (use.image, use.weight, use.mode) == ("a.png@0.5", 0.7, "control")
    assert parse_control_use("canny=b.png@1,mode=guess").image == "b.png@1,mode=guess"
    use = parse_control_use("canny=b.png@1,mode=guess,mode=control")
    assert (use.image, use.mode) == ("b.png@1,mode=guess", "control")
    assert parse_control_use("canny=c,mask=x.png").mask is None
    use = parse_control_use("canny=p.png@0.5,mask=d,mode=guess.png,mode=control")
    assert (use.mask, use.mode) == ("d,mode=guess.png", "control")
    use = parse_control_use("canny=e:1=2@3@0.5:0-1")
    assert (use.image, use.weight) == ("e:1=2@3", 0.5)
    # A file whose name is only the beginning of the image's does not shorten it.
    (tmp_path / "me").touch()
    assert parse_control_use("canny=me@home.png").image == "me@home.png"


@pytest.mark.parametrize(
    ("text", "code", "facts"),
    [
        ("canny=a.png@0.8,mode=controls", "unknown-name", ["'controls'", "control"]),
        ("canny=a.png@0.8,weight=1", "contradiction", ["weight", "twice"]),
        ("canny=a.png@0.8:0-1,span=0-1", "contradiction", ["span", "twice"]),
        ("canny=a.png,mask=a.png,mask=b.png", "contradiction", ["mask", "twice"]),
        ("canny=a.png,low=1,low=2", "contradiction", ["low", "twice"]),
        ("canny=a.png,weight=much", "usage", ["weight", "'much'", "number"]),
        ("canny=a.png,span=0.2", "usage", ["span", "'0.2'", "START-END"]),
        ("canny=a.png,layers=1:x", "usage", ["layers", "'1:x'"]),
        ("canny=a.png,layers=nan:1", "out-of-range", ["layers", "canny"]),
        ("canny=a.png,mask=", "usage", ["mask", "empty"]),
        ("canny=a.png,prepared=maybe", "usage", ["prepared", "'maybe'"]),
        ("canny=a.png,prepared,low=5", "contradiction", ["low", "prepared"]),
        ("canny=a.png,low=[", "wrong-type", ["low", "YAML"]),
    ],
)
def test_wrong_options_are_refused(text, code, facts):
    with refused(code, *facts):
        parse_control_use(text)


def test_a_part_without_a_whole_step_is_refused_in_words():
    settings = {"control": "canny", "image": "a.png", "start": 0.5}
    with refused("out-of-range", "canny", 0.5, 0.54, "20 steps"):
        GenerateRequest(prompt="x", controls=(ControlUse(**settings, end=0.54),))
    GenerateRequest(prompt="x", controls=(ControlUse(**settings, end=0.55),))
    GenerateRequest(prompt="x", controls=(ControlUse(**settings, end=0.54, weight=0),))


def test_a_path_may_have_equals_signs(tmp_path):
    control = tmp_path / "rate=1" / "canny.safetensors"
    control.parent.mkdir()
    control.touch()
    use = parse_control_use(f"{control}=a=b.png@0.5")
    assert (use.control, use.image, use.weight) == (str(control), "a=b.png", 0.5)
    assert parse_control_use("canny=a=b.png").image == "a=b.png"


uses = st.builds(
    ControlUse,
    control=st.text(min_size=1),
    image=st.text(min_size=1),
    weight=st.floats(-10, 10),
    start=st.floats(0, 0.25),
    end=st.floats(0.75, 1),
    prepared=st.booleans(),
    mode=st.none() | st.sampled_from(MODES),
    mask=st.none() | st.text(min_size=1),
    layers=st.none() | st.lists(st.floats(-2, 2), min_size=1).map(tuple),
)
requests = st.builds(
    GenerateRequest,
    prompt=st.text(),
    negative_prompt=st.text(),
    base=st.text(min_size=1),
    controls=st.lists(uses, max_size=3).map(tuple),
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4, unique=True).map(tuple),
    steps=st.integers(4, 1000),
    guidance=st.floats(1, 100),
    width=st.none() | st.integers(8, 4096),
    height=st.none() | st.integers(8, 4096),
    batch_size=st.integers(1, 100),
)


@given(requests)
def test_a_request_survives_json(request):
    assert GenerateRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


@settings(max_examples=500)
@given(st.text(alphabet="aB=@:-./0159 ,", max_size=24))
def test_any_text_is_a_control_or_refused_in_words(text):
    try:
        use = parse_control_use(text)
    except UserError:
        return
    assert use.control and use.image and 0 <= use.start <= use.end <= 1 and math.isfinite(use.weight)


@pytest.mark.parametrize(
    ("values", "code", "facts"),
    [
        ({"prompt": "x", "sed": [1]}, "unknown-key", ["'sed'", "did you mean seeds"]),
        ({"negative_prompt": "x"}, "missing-setting", ["prompt"]),
        ({"prompt": 3}, "wrong-type", ["prompt", 3]),
        ({"prompt": "x", "seeds": 3}, "wrong-type", ["seeds", 3]),
        ({"prompt": "x", "seeds": ["a"]}, "wrong-type", ["seeds", "['a']"]),
        ({"prompt": "x", "steps": "many"}, "wrong-type", ["steps", "'many'"]),
        ({"prompt": "x", "steps": True}, "wrong-type", ["steps", True]),
        ({"prompt": "x", "guidance": "much"}, "wrong-type", ["guidance", "'much'"]),
        ({"prompt": "x", "steps": None}, "wrong-type", ["steps", None]),
        ({"prompt": "x", "controls": {"control": "canny"}}, "wrong-type", ["controls"]),
        (
            {"prompt": "x", "controls": [{"control": "canny", "image": "a.png", "wieght": 1}]},
            "unknown-key",
            ["'wieght'", "did you mean weight"],
        ),
        (
            {"prompt": "x", "controls": [{"control": "canny", "image": "a.png", "weight": "abc"}]},
            "wrong-type",
            ["weight", "'abc'"],
        ),
        (
            {"prompt": "x", "controls": [{"control": "canny", "image": "a.png", "layers": ["1"]}]},
            "wrong-type",
            ["layers", "numbers"],
        ),
        (
            {"prompt": "x", "controls": [{"control": "canny", "image": "a.png", "parameters": [1]}]},
            "wrong-type",
            ["parameters", "mapping"],
        ),
        ({"prompt": "x", "controls": [{"control": "canny"}]}, "missing-setting", ["canny", "image"]),
        ({"prompt": "x", "controls": ["canny=a.png"]}, "wrong-type", ["control", "str"]),
        ([], "wrong-type", ["settings", "list"]),
    ],
)
def test_wrong_json_is_refused(values, code, facts):
    with refused(code, *facts):
        GenerateRequest.from_json(values)


def test_numbers_that_no_float_holds_are_refused():
    with refused("out-of-range", "guidance", 10**400):
        GenerateRequest(prompt="x", guidance=10**400)
    with refused("out-of-range", "canny", 10**400):
        ControlUse(control="canny", image="x.png", weight=10**400)


def test_how_many_images_are_drawn_at_once_is_left_to_the_sampler():
    request = GenerateRequest(prompt="x")
    assert request.batch_size is None
    assert GenerateRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert GenerateRequest.from_json({"prompt": "x", "batch_size": 8}).batch_size == 8
    with refused("out-of-range", "batch_size", 0):
        GenerateRequest(prompt="x", batch_size=0)
