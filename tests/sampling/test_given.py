"""What is passed to `generate` in place of files: images in memory, a loaded base, loaded controls."""

from __future__ import annotations

import copy
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import controlkit as ck
from controlkit.formats.load import save_control
from refusals import refused


@pytest.fixture
def file(tiny_base, tiny_control, tmp_path) -> Path:
    return save_control(tmp_path / "mine.safetensors", tiny_control, tiny_base)


@pytest.fixture
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def request_of(file, image="photo", **settings):
    use = ck.ControlUse(control=file, image=image)
    return ck.GenerateRequest(prompt="a", steps=2, guidance=1.0, controls=(use,), **settings)


def pixels(generation) -> np.ndarray:
    return np.stack([np.asarray(made.image) for made in generation.images])


def test_images_in_memory_are_those_of_their_files(file, photo, tiny_base, tiny_control, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    passed = {"base": tiny_base, "controls": [tiny_control]}
    of_file = ck.generate(request_of(file, tmp_path / "photo.png"), **passed)
    for image in (photo, Image.fromarray(photo), Image.fromarray(photo).convert("RGBA")):
        made = ck.generate(request_of(file), images={"photo": image}, **passed)
        assert np.array_equal(pixels(made), pixels(of_file))
    varied = request_of(file, vary=({"prompt": ["a", "b"]},))
    assert len(ck.generate(varied, images={"photo": photo}, **passed).images) == 2


def test_a_mask_and_an_image_to_start_from_may_be_in_memory(photo, tiny_base):
    request = ck.GenerateRequest(prompt="a", steps=2, image="photo", mask="left", strength=0.5)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    made = ck.generate(request, base=tiny_base, images={"photo": photo, "left": mask})
    kept = pixels(made)[0][:, 32:].astype(int) - photo[:, 32:]
    assert np.abs(kept).max() <= 1


@pytest.mark.parametrize(
    ("image", "facts"),
    [
        (np.zeros((4, 4, 3)), ["float64"]),
        (np.zeros((4, 4, 2), np.uint8), ["[4, 4, 2]"]),
        (np.zeros((0, 4, 3), np.uint8), ["[0, 4, 3]"]),
        ("photo.png", ["str"]),
    ],
)
def test_what_is_no_image_is_refused(image, facts, file, tiny_base, tiny_control):
    with refused("wrong-type", "photo", *facts):
        ck.generate(request_of(file), base=tiny_base, controls=[tiny_control], images={"photo": image})


def test_an_image_that_the_request_does_not_name_is_refused(file, photo, tiny_base, tiny_control):
    with refused("contradiction", "foto"):
        ck.generate(request_of(file), base=tiny_base, controls=[tiny_control], images={"photo": photo, "foto": photo})


def test_a_base_that_is_passed_is_the_one_that_settings_name(tiny_base, tmp_path):
    made = ck.generate(ck.GenerateRequest(prompt="a", base="another", steps=1), base=tiny_base)
    made.save(tmp_path / "images")
    assert ck.read_settings(tmp_path / "images").request.base == tiny_base.name


@pytest.mark.parametrize("settings", [{"precision": "bf16"}, {"device": "cuda"}, {"vae": "other"}])
def test_settings_that_contradict_a_base_that_is_passed_are_refused(settings, tiny_base):
    with refused("contradiction", *settings.values()):
        ck.generate(ck.GenerateRequest(prompt="a", **settings), base=tiny_base)


def test_controls_that_are_not_those_of_the_request_are_refused(file, photo, tiny_base, tiny_control):
    for controls in ([], [tiny_control] * 2):
        with refused("contradiction", len(controls)):
            ck.generate(request_of(file), base=tiny_base, controls=controls, images={"photo": photo})
    with refused("contradiction", file, "canny", "palette"):
        palette = ck.load_control(file, tiny_base)
        palette.condition = "palette"
        ck.generate(request_of(file), base=tiny_base, controls=[palette], images={"photo": photo})
    with refused("incompatible", file, torch.float64):
        double = ck.load_control(file, tiny_base).double()
        ck.generate(request_of(file), base=tiny_base, controls=[double], images={"photo": photo})


def test_calls_in_threads_with_one_base_run_one_after_another(tiny_base):
    steps: list[int] = []
    request = ck.GenerateRequest(prompt="a", steps=8, guidance=1.0)
    lock = tiny_base.in_use

    def call(number):
        def on_step(step):
            steps.append(number)
            if step.done == 1 and number < 3:  # while this call goes on
                threads.append(threading.Thread(target=call, args=(number + 1,)))
                threads[-1].start()

        ck.generate(request, base=tiny_base, on_step=on_step)

    threads = [threading.Thread(target=call, args=(0,))]
    threads[0].start()
    for thread in threads:  # which grows
        thread.join()
    assert [number for number, _ in itertools.groupby(steps)] == [0, 1, 2, 3] and len(steps) == 32
    assert tiny_base.in_use is lock


def test_a_base_can_be_copied(tiny_base):
    copied = copy.deepcopy(tiny_base)
    assert copied.in_use is not tiny_base.in_use and copied.fingerprint == tiny_base.fingerprint


def test_settings_that_name_the_vae_of_a_base_that_is_passed_are_kept(tiny_base, tmp_path):
    tiny_base.vae.save_pretrained(tmp_path / "vae")
    base = copy.copy(tiny_base)
    base.vae_name = str(tmp_path / "vae")
    for vae in (None, base.vae_name):
        made = ck.generate(ck.GenerateRequest(prompt="a", steps=1, vae=vae), base=base)
        assert made.request.vae == base.vae_name
