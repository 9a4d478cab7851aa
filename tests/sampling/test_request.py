"""The one object that asks for images, and how the command line writes a control."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlkit.errors import UserError
from controlkit.sampling.request import ControlUse, GenerateRequest


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
    use = ControlUse.parse(text)
    assert (use.control, use.image, use.weight, use.start, use.end) == expected
    assert use.prepared is False
    assert ControlUse.parse(text, prepared=True).prepared is True


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("canny", "NAME_OR_FILE=IMAGE"),
        ("=a.png", "NAME_OR_FILE=IMAGE"),
        ("canny=", "NAME_OR_FILE=IMAGE"),
        ("canny=@0.5", "NAME_OR_FILE=IMAGE"),
        ("canny=a.png@abc", "'abc'"),
        ("canny=a.png@", "weight"),
        ("canny=a.png@1:", "start-end"),
        ("canny=a.png@1:0.2", "start-end"),
        ("canny=a.png@1:0.1-0.2-0.3", "start-end"),
        ("canny=a.png@1:0.8-0.2", "start"),
        ("canny=a.png@1:0-1.5", "end"),
        ("canny=a.png@nan", "number"),
        ("canny=a.png@inf", "number"),
    ],
)
def test_wrong_controls_are_refused_in_words(text, says):
    with pytest.raises(UserError, match=says):
        ControlUse.parse(text)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seeds": ()}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": (2**63,)}, "seeds"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"guidance": 0.5}, "guidance"),
        ({"guidance": math.nan}, "guidance"),
        ({"sampler": "dim"}, "did you mean ddim"),
        ({"batch_size": 0}, "batch_size"),
        ({"width": 0}, "width"),
        ({"height": -64}, "height"),
    ],
)
def test_requests_that_cannot_be_drawn_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        GenerateRequest(prompt="x", **settings)


def test_a_part_without_a_whole_step_is_refused_in_words():
    settings = {"control": "canny", "image": "a.png", "start": 0.5}
    with pytest.raises(UserError, match=r"canny acts from 0.5 to 0.54 .* none of 20 steps"):
        GenerateRequest(prompt="x", controls=(ControlUse(**settings, end=0.54),))
    GenerateRequest(prompt="x", controls=(ControlUse(**settings, end=0.55),))
    GenerateRequest(prompt="x", controls=(ControlUse(**settings, end=0.54, weight=0),))


def test_a_path_may_have_equals_signs(tmp_path):
    control = tmp_path / "rate=1" / "canny.safetensors"
    control.parent.mkdir()
    control.touch()
    use = ControlUse.parse(f"{control}=a=b.png@0.5")
    assert (use.control, use.image, use.weight) == (str(control), "a=b.png", 0.5)
    assert ControlUse.parse("canny=a=b.png").image == "a=b.png"


uses = st.builds(
    ControlUse,
    control=st.text(min_size=1),
    image=st.text(min_size=1),
    weight=st.floats(-10, 10),
    start=st.floats(0, 0.25),
    end=st.floats(0.75, 1),
    prepared=st.booleans(),
)
requests = st.builds(
    GenerateRequest,
    prompt=st.text(),
    negative_prompt=st.text(),
    base=st.text(min_size=1),
    controls=st.lists(uses, max_size=3).map(tuple),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True).map(tuple),
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
@given(st.text(alphabet="aB=@:-./0159 ", max_size=24))
def test_any_text_is_a_control_or_refused_in_words(text):
    try:
        use = ControlUse.parse(text)
    except UserError:
        return
    assert use.control and use.image and 0 <= use.start <= use.end <= 1 and math.isfinite(use.weight)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": "x", "sed": [1]}, "did you mean seeds"),
        ({"negative_prompt": "x"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "x", "seeds": 3}, "seeds"),
        ({"prompt": "x", "seeds": ["a"]}, "seeds"),
        ({"prompt": "x", "steps": "many"}, "steps"),
        ({"prompt": "x", "steps": True}, "steps"),
        ({"prompt": "x", "guidance": "much"}, "guidance"),
        ({"prompt": "x", "steps": None}, "steps"),
        ({"prompt": "x", "controls": {"control": "canny"}}, "controls"),
        (
            {"prompt": "x", "controls": [{"control": "canny", "image": "a.png", "wieght": 1}]},
            "did you mean weight",
        ),
        ({"prompt": "x", "controls": [{"control": "canny", "image": "a.png", "weight": "abc"}]}, "weight"),
        ({"prompt": "x", "controls": [{"control": "canny"}]}, "image"),
        ({"prompt": "x", "controls": ["canny=a.png"]}, "controls"),
        ([], "settings"),
    ],
)
def test_wrong_json_is_refused_in_words(values, says):
    with pytest.raises(UserError, match=says):
        GenerateRequest.from_json(values)


def test_numbers_that_no_float_holds_are_refused():
    with pytest.raises(UserError, match="guidance is 1000"):
        GenerateRequest(prompt="x", guidance=10**400)
    with pytest.raises(UserError, match="the weight of canny is 1000"):
        ControlUse(control="canny", image="x.png", weight=10**400)


def test_how_many_images_are_drawn_at_once_is_left_to_the_sampler():
    request = GenerateRequest(prompt="x")
    assert request.batch_size is None
    assert GenerateRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert GenerateRequest.from_json({"prompt": "x", "batch_size": 8}).batch_size == 8
    with pytest.raises(UserError, match="batch_size is 0"):
        GenerateRequest(prompt="x", batch_size=0)
