"""On which halves of guidance a control acts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from controlkit.sampling.saved_settings import SavedSettings
from controlkit.sampling.uses import MODES, ControlUse
from refusals import refused


@pytest.fixture
def drawing(tmp_path, condition_image):
    path = tmp_path / "drawing.png"
    Image.fromarray(np.asarray(condition_image)).save(path)
    return str(path)


def drawn(base, control, drawing, mode, **settings):
    use = ControlUse(control="canny", image=drawing, prepared=True, mode=mode)
    request = GenerateRequest(prompt="red apple", controls=(use,), seeds=(1, 2), steps=3, **settings)
    made = generate(request, base=base, controls=[control])
    return np.stack([np.asarray(image.image, dtype=int) for image in made.images])


def test_guidance_makes_a_control_stronger_that_acts_on_the_prompts_half_alone(
    tiny_base, tiny_control, condition_image
):
    hint = tiny_control.encode(to_tensor([condition_image]), tiny_base)
    asked = []
    predict = tiny_base.predict

    def watched(x_t, t, text, residuals, taps):
        asked.append((predict(x_t, t, text, None), residuals))
        return predict(x_t, t, text, residuals)

    tiny_base.predict = watched
    try:
        use = ActiveControl.in_mode("control", tiny_base, control=tiny_control, hint=hint)
        next(sample(tiny_base, prompt="red apple", seeds=[1], uses=[use], steps=2, guidance=3.0))
    finally:
        del tiny_base.predict
    assert len(asked) == 2
    for _, residuals in asked:
        assert all(not half[0].any() and half[1].any() for half in residuals.tensors())


def test_a_base_has_a_mode_of_its_own_and_a_use_may_name_another(tiny_base, tiny_control, drawing):
    by_mode = {mode: drawn(tiny_base, tiny_control, drawing, mode) for mode in (*MODES, None)}
    assert tiny_base.default_mode == "control"
    assert (by_mode[None] == by_mode["control"]).all()
    assert (by_mode["balanced"] != by_mode["control"]).any()


def test_without_guidance_there_is_one_half_and_modes_are_the_same(tiny_base, tiny_control, drawing):
    control, balanced = (
        drawn(tiny_base, tiny_control, drawing, mode, guidance=1.0) for mode in ("control", "balanced")
    )
    assert np.abs(control - balanced).max() <= 1


def test_bases_that_say_nothing_else_act_as_diffusers_does(sd1_scheduled_base):
    assert sd1_scheduled_base.default_mode == "balanced" and sd1_scheduled_base.default_guidance == 7.5


def test_a_image_is_drawn_again_in_the_mode_that_it_was_drawn_in(drawing):
    asked = GenerateRequest(prompt="red apple", controls=(ControlUse(control="canny", image=drawing),))
    for used, mode in (({"mode": "control"}, "control"), ({"mode": "balanced"}, "balanced"), ({}, "balanced")):
        assert [use.mode for use in SavedSettings(asked, used).to_request().controls] == [mode]
    assert [use.mode for use in SavedSettings(asked, {"mode": "control"}).to_request(base="another").controls] == [None]


def test_a_mode_that_there_is_not_is_refused():
    with refused("unknown-name", "'controls'", "did you mean control"):
        ControlUse(control="canny", image="drawing.png", mode="controls")
