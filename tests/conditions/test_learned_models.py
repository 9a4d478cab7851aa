"""Where weights are looked for, what is refused, and images brought to networks as transformers does it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from condition_scenes import draw_scene

from controlkit.conditions import find, models
from controlkit.conditions.learned.inputs import network_size, prepare, read_inputs, to_resolution
from controlkit.conditions.learned.segmentation import labels_at
from refusals import refused


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    for kind in ("dpt", "depth_anything", "segformer"):
        getattr(tiny_models, kind)(folder / kind)
    return folder


@pytest.fixture(autouse=True)
def _fresh():
    models.unload_models()
    yield
    models.unload_models()


def test_weights_are_loaded_once_for_each_folder(kept: Path, monkeypatch) -> None:
    import transformers

    loaded = []
    real = transformers.AutoModelForDepthEstimation.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForDepthEstimation,
        "from_pretrained",
        lambda folder, **more: loaded.append(folder) or real(folder, **more),
    )
    for _ in range(2):
        find("depth")(draw_scene(), model=str(kept / "dpt"))
        find("normal")(draw_scene(), model=str(kept / "dpt"))
    assert len(loaded) == 1
    find("depth")(draw_scene(), model=str(kept / "depth_anything"))
    assert len(loaded) == 2


def test_a_shelf_of_models_is_found(kept: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(kept / "dpt", tmp_path / "Intel" / "dpt-large")
    shutil.copytree(kept / "dpt", tmp_path / "some" / "other")
    monkeypatch.setenv("CONTROLKIT_MODELS", str(tmp_path))
    image = find("depth")(draw_scene())
    np.testing.assert_array_equal(image, find("depth")(draw_scene(), model=str(kept / "dpt")))
    np.testing.assert_array_equal(image, find("depth")(draw_scene(), model="some/other"))


def test_the_hubs_cache_is_used_without_the_network(kept: Path, tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "models--Intel--dpt-large" / "snapshots" / "abc"
    shutil.copytree(kept / "dpt", snapshot)
    (tmp_path / "models--Intel--dpt-large" / "refs").mkdir()
    (tmp_path / "models--Intel--dpt-large" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("CONTROLKIT_MODELS", raising=False)
    assert find("depth")(draw_scene()).any()


def test_what_is_refused(kept: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = shutil.copytree(kept / "dpt", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"torn")
    bare = shutil.copytree(kept / "dpt", tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    odd = shutil.copytree(kept / "dpt", tmp_path / "odd")
    (odd / "preprocessor_config.json").write_text(json.dumps({"size": {"tall": 3}}))
    for folder, code, *facts in [
        ("/nowhere/at/all", "missing-file", "model", "Intel/dpt-large"),
        (empty, "missing-weights", "config.json", "*.safetensors"),
        (kept / "segformer", "wrong-kind", "dpt, depth_anything", "type segformer"),
        (broken, "damaged-file"),
        (bare, "missing-file", "preprocessor_config.json"),
        (odd, "damaged-file", "preprocessor_config.json"),
    ]:
        with refused(code, "depth", folder, *facts):
            find("depth")(draw_scene(), model=str(folder))
    with refused("wrong-kind", "seg_coco", "133 classes", 150, kept / "segformer"):
        find("seg_coco")(draw_scene(), model=str(kept / "segformer"))
    with refused("missing-weights", "hed", empty, "ControlNetHED.pth"):
        find("hed")(draw_scene(), model=str(empty))


def test_weights_that_are_missing_are_not_made_up(kept: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(kept / "dpt", tmp_path / "holes")
    state = load_file(folder / "model.safetensors")
    unused = {name: tensor for name, tensor in state.items() if "fusion_stage.layers.0.residual_layer1" not in name}
    assert len(unused) < len(state)
    save_file(unused, folder / "model.safetensors", metadata={"format": "pt"})
    whole = find("depth")(draw_scene(), model=str(kept / "dpt"))
    np.testing.assert_array_equal(find("depth")(draw_scene(), model=str(folder)), whole)
    models.unload_models()
    unused.pop("head.head.0.weight")
    save_file(unused, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("damaged-file", folder, "1 tensors", "head.head.0.weight"):
        find("depth")(draw_scene(), model=str(folder))


def test_files_of_tensors_that_are_truncated_or_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "ControlNetHED.pth"
    path.write_bytes(b"torn")
    with refused("damaged-file", "hed", path):
        find("hed")(draw_scene(), model=str(tmp_path))
    torch.save({"norm": torch.zeros(1, 3, 1, 1)}, path)
    with refused("wrong-kind", path, "HED"):
        find("hed")(draw_scene(), model=str(tmp_path))
    torch.save({"norm": {1, 2}}, path)
    with refused("wrong-kind", "hed", path):
        find("hed")(draw_scene(), model=str(tmp_path))


def test_an_unknown_device_is_said(kept: Path, monkeypatch) -> None:
    monkeypatch.setenv("CONTROLKIT_CONDITION_DEVICE", "toaster")
    with refused("device-unavailable", "CONTROLKIT_CONDITION_DEVICE=toaster"):
        find("depth")(draw_scene(), model=str(kept / "dpt"))


def test_controlnet_aux_gets_the_size_that_it_gives_back(tmp_path: Path, monkeypatch) -> None:
    """A stand-in for the package, which cannot be installed everywhere: what it is asked and what is done after it."""
    asked = []

    class Detector:
        @classmethod
        def from_pretrained(cls, folder: str) -> Detector:
            asked.append(folder)
            return cls()

        def to(self, device: torch.device) -> Detector:
            return self

        def __call__(self, made: np.ndarray, **settings: object) -> np.ndarray:
            asked.append((made.shape, settings))
            return 255 - made

    package = types.ModuleType("controlnet_aux")
    package.PidiNetDetector = package.MLSDdetector = package.LeresDetector = Detector
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    (tmp_path / "table5_pidinet.pth").touch()
    (tmp_path / "mlsd_large_512_fp32.pth").touch()
    image = np.full((100, 150, 3), 55, np.uint8)
    made = find("pidinet")(image, safe=True, resolution=128, model=str(tmp_path))
    assert made.shape == image.shape and np.all(made == 200)
    shape, settings = asked[1]
    assert shape == (128, 192, 3) and asked[0] == str(tmp_path)
    assert settings == {"detect_resolution": 128, "image_resolution": 128, "output_type": "np", "safe": True}
    assert np.all(find("mlsd")(image, model=str(tmp_path)) == 255)
    for name in ("res101.pth", "latest_net_G.pth"):
        (tmp_path / name).touch()
    made = find("depth_leres")(image, boost=True, far=5, resolution=128, model=str(tmp_path))
    assert made.shape == image.shape and np.all(made == 200)
    shape, settings = asked[-1]
    assert shape == (128, 192, 3)
    assert settings["boost"] is True and (settings["thr_a"], settings["thr_b"]) == (0, 5)
    band = np.where(np.abs(np.subtract.outer(np.arange(100), np.arange(150))) < 8, np.uint8(0), np.uint8(255))
    strokes = find("scribble_pidinet")(np.dstack([band] * 3), resolution=128, model=str(tmp_path))
    assert strokes.shape == image.shape and set(np.unique(strokes)) == {0, 255} and strokes[50, 50].all()


SIZES = [(64, 64), (48, 80), (200, 120), (333, 500), (37, 41)]


@pytest.mark.parametrize("kind", ["dpt", "depth_anything", "segformer"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_are_prepared_as_transformers_does(kind: str, size: tuple[int, int], kept: Path) -> None:
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    processor = {"segformer": SegformerImageProcessorPil}.get(kind, DPTImageProcessorPil).from_pretrained(kept / kind)
    image = draw_scene(*size)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = prepare(image, read_inputs("depth", kept / kind))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("size", [*SIZES, (50, 400)], ids=str)
def test_edges_are_fitted_as_transformers_does(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers.image_transforms import get_size_with_aspect_ratio

    for facts in (
        {"size": {"shortest_edge": 64, "longest_edge": 128}},
        {"size": 64, "max_size": 128},
        {"size": {"shortest_edge": 90}},
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
        inputs = read_inputs("seg", tmp_path)
        assert network_size(inputs, *size) == get_size_with_aspect_ratio(size, inputs.shortest, inputs.longest)


def test_no_side_vanishes(kept: Path) -> None:
    inputs = read_inputs("depth", kept / "depth_anything")
    assert network_size(inputs, 16, 2000, least=14) == (14, 56)
    assert to_resolution(draw_scene(16, 2000), 512).shape == (64, 2048, 3)
    assert to_resolution(draw_scene(600, 900), 512).shape == (512, 768, 3)


def test_classes_are_scaled_a_few_at_a_time_without_changing_the_answer() -> None:
    scores = torch.randn(37, 9, 11, generator=torch.Generator().manual_seed(0))
    scaled = torch.nn.functional.interpolate(scores[None], (50, 63), mode="bilinear", align_corners=False)[0]
    assert torch.equal(labels_at(scores, 50, 63, at_once=8), scaled.argmax(dim=0))


def test_a_condition_is_told_apart_by_its_weights(tmp_path: Path, monkeypatch) -> None:
    def hashes() -> tuple[str, str]:
        condition = dataclasses.replace(find("depth"))  # with an empty cache
        return condition.content, condition.revision

    found = []
    for number, name in enumerate(("a", "b")):
        folder = tmp_path / name / "Intel" / "dpt-large"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x" * (7 + number))
        monkeypatch.setenv("CONTROLKIT_MODELS", str(tmp_path / name))
        found += [hashes(), hashes()]
    assert found[0] == found[1] and found[2] == found[3]
    assert not set(found[0]) & set(found[2])
    monkeypatch.setenv("CONTROLKIT_MODELS", str(tmp_path / "none"))
    assert hashes()[0] != found[0][0]  # without weights there is a hash too, and no download
