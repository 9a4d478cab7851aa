"""Captions by BLIP, at toy size."""

from __future__ import annotations

import shutil

import pytest
from pair_files import scene, write_images
from PIL import Image

from controlkit.data.captions import BLIP, Captioner, with_captions
from controlkit.data.input_images import list_images
from controlkit.errors import UserError
from refusals import refused
from tiny_blip import save_tiny_blip


@pytest.fixture(scope="module")
def tiny_blip(tmp_path_factory):
    """A BLIP of random weights as a folder."""
    return save_tiny_blip(tmp_path_factory.mktemp("blip"))


def test_images_without_a_caption_get_one_and_it_is_kept(tiny_blip, tmp_path):
    paths = write_images(tmp_path / "in", 4)
    paths[0].with_suffix(".txt").unlink()
    paths[2].with_suffix(".txt").write_text(" \n")
    paths[3].with_suffix(".txt").unlink()
    paths[3].write_bytes(b"not an image")
    images = list_images([tmp_path / "in"])
    captioned = with_captions(images, tmp_path / "out", lambda: Captioner(tiny_blip), tiny_blip)
    assert captioned[0].caption() and captioned[2].caption() and captioned[3].caption() == ""
    assert captioned[1] == images[1]
    # The damaged one is tried again; captions of another model are not reused.
    paths[3].unlink()
    again = with_captions(
        list_images([tmp_path / "in"]), tmp_path / "out", lambda: pytest.fail("loaded again"), tiny_blip
    )
    assert again == captioned[:3]
    with pytest.raises(ZeroDivisionError):
        with_captions(images, tmp_path / "out", lambda: 1 / 0, "another")


def test_the_same_image_gets_the_same_caption_in_any_company(tiny_blip):
    captioner = Captioner(tiny_blip)
    images = [Image.fromarray(scene(number)) for number in range(3)]
    assert captioner(images) == [captioner([image])[0] for image in images]


def test_missing_weights_are_told_with_what_to_do(tiny_blip, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"BSD-3-Clause.*hf download Salesforce.*--caption-model"):
        Captioner()
    with pytest.raises(UserError, match=r"config.json with weights.*--caption-model"):
        Captioner(str(tmp_path))
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_blip, damaged)
    (damaged / "model.safetensors").write_bytes(b"not weights")
    with refused("damaged-file", damaged, "hf download Salesforce"):
        Captioner(str(damaged))
    with refused("device-unavailable", "--device nonsense"):
        Captioner(tiny_blip, "nonsense")


def test_weights_are_looked_for_on_the_shelf_of_models(tiny_blip, tmp_path, monkeypatch):
    shutil.copytree(tiny_blip, tmp_path / BLIP)
    monkeypatch.setenv("CONTROLKIT_MODELS", str(tmp_path))
    assert Captioner()([Image.fromarray(scene(1))])[0]
