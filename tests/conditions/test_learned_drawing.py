"""Skeletons, the steps around pose networks, parts of bodies, palettes, and the measures that belong to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from condition_scenes import draw_scene

from controlkit.conditions import find
from controlkit.conditions.coco import COCO_CATEGORIES
from controlkit.conditions.fidelity import class_iou, depth_rmse, normal_angle
from controlkit.conditions.learned import detection, pose, wholebody
from controlkit.conditions.learned.densepose import draw_parts, viridis
from controlkit.conditions.learned.palettes import ADE20K, COCO_PANOPTIC
from controlkit.conditions.learned.skeleton import (
    COLOURS,
    LIMBS,
    Person,
    draw_people,
    from_coco,
    pose_f1,
    read_points,
    whole_body_f1,
)
from refusals import refused


def somebody(x: float = 256, y: float = 60, size: float = 400) -> np.ndarray:
    """OpenPose's 18 points of a person who stands upright, their right hand at the left of the image."""
    places = [(0, 0.08), (0, 0.2), (-0.12, 0.2), (-0.18, 0.36), (-0.2, 0.52), (0.12, 0.2), (0.18, 0.36), (0.2, 0.52)]
    places += [(-0.08, 0.52), (-0.08, 0.76), (-0.08, 0.98), (0.08, 0.52), (0.08, 0.76), (0.08, 0.98)]
    places += [(-0.025, 0.055), (0.025, 0.055), (-0.06, 0.07), (0.06, 0.07)]
    return np.array(places) * size + (x, y)


def test_colours_and_limbs_are_openposes() -> None:
    assert COLOURS[:4] == ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0))
    assert COLOURS[4:10] == (*((170, 255, 0), (85, 255, 0), (0, 255, 0)), (0, 255, 85), (0, 255, 170), (0, 255, 255))
    assert COLOURS[-6:] == (*((0, 0, 255), (85, 0, 255), (170, 0, 255)), (255, 0, 255), (255, 0, 170), (255, 0, 85))
    assert len(LIMBS) == 17 and LIMBS[12] == (1, 0)
    points = somebody()
    image = draw_people([Person(body=points)], 512, 512)
    for point, colour in zip(points.astype(int), COLOURS, strict=True):
        assert tuple(image[point[1], point[0]]) == colour
    for (start, end), colour in zip(LIMBS[:12], COLOURS, strict=False):
        x, y = ((points[start] + points[end]) / 2).astype(int)
        assert tuple(image[y, x]) == tuple(int(part * 0.6) for part in colour)


def test_points_that_were_not_found_are_left_out_with_their_limbs() -> None:
    points = somebody()
    whole = draw_people([Person(body=points)], 512, 512)
    points[4] = np.nan
    image = draw_people([Person(body=points)], 512, 512)
    assert 4 not in read_points(image) and 4 in read_points(whole)
    assert not (image == np.array([int(part * 0.6) for part in COLOURS[3]])).all(axis=2).any()


def test_hands_and_faces_are_drawn() -> None:
    rng = np.random.default_rng(0)
    nobody = np.full((18, 2), np.nan)
    hand = rng.uniform(100, 200, (21, 2))
    image = draw_people([Person(body=nobody, hands=(hand,), face=rng.uniform(300, 400, (68, 2)))], 512, 512)
    assert tuple(image[int(hand[0, 1]), int(hand[0, 0])]) == (0, 0, 255)
    assert (image[300:405, 300:405] == 255).all(axis=2).any()
    for size in ((16, 16), (16, 300)):
        assert draw_people([Person(body=somebody(8, 0, 16), hands=(hand,))], *size).shape == (*size, 3)


def test_cocos_points_become_openposes() -> None:
    points = np.stack([np.arange(17), np.arange(17)], axis=1).astype(float)
    turned = from_coco(points)[:, 0]
    np.testing.assert_array_equal(turned, [0, 5.5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3])


def test_pose_f1() -> None:
    def drawn(*people: np.ndarray) -> np.ndarray:
        return draw_people([Person(body=body) for body in people], 512, 512)

    one = drawn(somebody())
    assert pose_f1(one, one) == 1 and pose_f1(np.zeros_like(one), np.zeros_like(one)) == 1
    assert pose_f1(one, np.zeros_like(one)) == pose_f1(np.zeros_like(one), one) == 0
    assert pose_f1(one, drawn(somebody(262))) == 1, "within 5 % of the image"
    assert pose_f1(one, drawn(somebody(456))) == 0
    two = drawn(somebody(120), somebody(400))
    assert pose_f1(drawn(somebody(120)), two) == pytest.approx(2 / 3)
    points = read_points(two)
    assert all(len(found) == 2 for found in points.values()) and len(points) == 18


@pytest.mark.parametrize("side", [64, 256, 512])
def test_the_pose_f1_of_whole_bodies_is_that_of_the_body(side: int) -> None:
    zoom = side / 512
    rng = np.random.default_rng(0)
    # Fingers spread from the wrist, and a face from ear to ear over nose and eyes.
    fan = np.concatenate([[(0, 0)], rng.uniform(-24, 24, (20, 2))])
    outline = rng.uniform((-24, -14), (24, 24), (68, 2))

    def drawn(
        x: float = 256, *, turned: bool = False, has_body: bool = True, hands: bool = True, face: bool = True
    ) -> np.ndarray:
        body = somebody(x) * ((1, -1) if turned else (1, 1)) + ((0, 512) if turned else (0, 0))
        person = Person(
            body=body * zoom if has_body else np.full((18, 2), np.nan),
            hands=((body[4] + fan) * zoom, (body[7] - fan) * zoom) if hands else (),
            face=(body[0] + outline) * zoom if face else None,
        )
        return draw_people([person], side, side)

    whole = drawn()
    assert whole_body_f1(whole, whole) == 1
    bare = drawn(hands=False, face=False)
    assert whole_body_f1(whole, bare) == whole_body_f1(bare, whole) == whole_body_f1(bare, bare) == 1
    assert whole_body_f1(whole, drawn(has_body=False)) < 0.1, "hands and face alone"
    assert whole_body_f1(whole, np.zeros_like(whole)) == 0
    assert whole_body_f1(whole, drawn(100)) == 0
    assert whole_body_f1(whole, drawn(turned=True)) < 0.3, "only the hips stay in place"
    assert whole_body_f1(drawn(has_body=False), drawn(has_body=False)) == 1, "nobody in either"


def test_measures_of_depth_normals_and_classes() -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    assert depth_rmse(grey, grey) == 0 and depth_rmse(grey, grey + 10) == pytest.approx(10)
    up, right = (np.full((8, 8, 3), colour, np.uint8) for colour in ((128, 128, 255), (255, 128, 128)))
    assert normal_angle(up, up) == 0 and normal_angle(up, right) == pytest.approx(90, abs=0.5)
    left, more = np.zeros((10, 40, 3), np.uint8), np.zeros((10, 40, 3), np.uint8)
    left[:, :20], more[:, :30] = 255, 255
    assert class_iou(left, left) == 1
    assert class_iou(left, more) == pytest.approx((20 / 30 + 10 / 20) / 2)
    more[:, 39] = 7
    assert class_iou(left, more) == pytest.approx((20 / 30 + 9 / 20 + 0) / 3)


def test_palettes_have_every_class() -> None:
    assert ADE20K.shape == (150, 3) and COCO_PANOPTIC.shape == (133, 3)
    assert [tuple(ADE20K[index]) for index in (0, 2, 12, 149)] == [
        *((120, 120, 120), (6, 230, 230)),
        *((150, 5, 61), (92, 0, 255)),
    ]
    assert tuple(COCO_PANOPTIC[0]) == (220, 20, 60) and tuple(COCO_PANOPTIC[79]) == (191, 162, 208)
    assert len({tuple(colour) for colour in ADE20K.tolist()}) == 149
    assert len(COCO_CATEGORIES) == 80 and COCO_CATEGORIES[-1] == 90


def test_joints_are_found_as_transformers_finds_them() -> None:
    pytest.importorskip("scipy")
    from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil
    from transformers.models.vitpose.modeling_vitpose import VitPoseEstimatorOutput

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :48]
    peaks = rng.uniform(4, 40, (2, 17, 2))
    heatmaps = np.exp(-((x - peaks[..., :1, None]) ** 2 + (y - peaks[..., 1:, None]) ** 2) / 8).astype(np.float32)
    boxes = [[10.0, 20.0, 60.0, 150.0], [100.0, 5.0, 90.0, 40.0]]
    processor = VitPoseImageProcessorPil(size={"height": 256, "width": 192})
    answer = processor.post_process_pose_estimation(VitPoseEstimatorOutput(heatmaps=torch.tensor(heatmaps)), [boxes])
    frames = np.array([pose.frame(*box, 192 / 256) for box in boxes])
    points, sure = pose.joints_of(heatmaps, frames)
    for person in range(2):
        theirs = answer[0][person]
        assert np.abs(points[person] - theirs["keypoints"].numpy()).max() < 0.02 * 200 / 64
        np.testing.assert_allclose(sure[person], theirs["scores"].numpy(), rtol=1e-5)
    image = draw_scene(200, 260)
    seen = processor(image, boxes=[boxes], return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"]
    ours = np.stack([pose.crop(image, tuple(one), 256, 192).transpose(2, 0, 1) for one in frames])
    assert np.abs(seen.astype(float) - ours).mean() < 1


def test_a_peak_lies_between_cells() -> None:
    y, x = np.mgrid[:64, :48]
    heatmap = np.exp(-((x - 20.3) ** 2 + (y - 30.75) ** 2) / 8).astype(np.float32)[None, None]
    points, _ = pose.joints_of(heatmap, np.array([[23.5, 31.5, 47.0, 63.0]]))
    np.testing.assert_allclose(points[0, 0], (20.3, 30.75), atol=0.05)
    flat, _ = pose.joints_of(np.zeros((1, 1, 64, 48), np.float32), np.array([[23.5, 31.5, 47.0, 63.0]]))
    assert np.isfinite(flat).all()


def yolox(*people: tuple[int, float, float, float]) -> wholebody.Network:
    """A detector that finds people: (cell of stride 32, width, height, score)."""

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        assert pixels.shape == (1, 3, 640, 640) and pixels.dtype == np.float32
        answer = np.zeros((1, 8400, 85), np.float32)
        for cell, width, height, score in people:
            answer[0, 8000 + cell] = (0.5, 0.5, np.log(width / 32), np.log(height / 32), 1, score, *([0] * 79))
        return [answer]

    return run


def test_people_are_found_and_doubles_dropped() -> None:
    image = draw_scene(320, 160)
    found = wholebody.find_people(image, yolox((0, 128, 256, 0.9), (1, 128, 256, 0.5), (300, 64, 64, 0.2)), 0.3)
    assert len(found) == 1
    np.testing.assert_allclose(found[0], (8 - 32, 8 - 64, 64, 128), atol=1e-3)
    with refused("wrong-kind", "dwpose", "yolox_l.onnx", 8400, 10):
        wholebody.find_people(image, lambda _: [np.zeros((1, 10, 85), np.float32)], 0.3)


def test_the_whole_body_lies_where_the_network_says() -> None:
    def run(pixels: np.ndarray) -> list[np.ndarray]:
        assert pixels.shape == (1, 3, 384, 288)
        across, down = np.zeros((1, 133, 576), np.float32), np.zeros((1, 133, 768), np.float32)
        across[..., 288], down[..., 384] = 0.8, 0.6
        down[0, 5, 384], down[0, 5, 0] = 0, 0.7
        return [down, across]

    points, sure = wholebody.whole_body(draw_scene(200, 300), (100, 50, 60, 80), run)
    np.testing.assert_allclose(points[0], (130, 90), atol=1e-6)
    np.testing.assert_allclose(points[5], (130, 90 - 80 * 1.25 / 2), atol=1e-4)
    np.testing.assert_allclose(sure[[0, 5]], (0.6, 0.7), rtol=1e-5)


def test_dwpose_draws_who_was_found(monkeypatch, tmp_path: Path) -> None:
    def run(pixels: np.ndarray) -> list[np.ndarray]:
        across, down = np.zeros((1, 133, 576), np.float32), np.zeros((1, 133, 768), np.float32)
        places = np.linspace(100, 500, 133).astype(int)
        across[0, np.arange(133), places] = down[0, np.arange(133), places] = 0.9
        return [across, down]

    for file in wholebody.DWPOSE.files:
        (tmp_path / file).touch()
    networks = iter([yolox((150, 200, 400, 0.9)), run] * 3)
    monkeypatch.setattr(wholebody, "load_once", lambda *_: next(networks))
    image = draw_scene(512, 512)
    images = [find("dwpose")(image, model=str(tmp_path), hands=flag, face=flag) for flag in (True, False)]
    assert images[0].shape == image.shape and len(read_points(images[1])) > 6
    assert (images[0] == 255).all(axis=2).any() and not (images[1] == 255).all(axis=2).any()
    assert not find("dwpose")(image, model=str(tmp_path), person_score=0.95).any()


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer."""

    def varint(rest: int) -> bytes:
        return bytes([rest]) if rest < 128 else bytes([rest & 127 | 128]) + varint(rest >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def test_an_onnx_file_is_run_and_a_truncated_one_refused(tmp_path: Path) -> None:
    """The file is written by hand: one Relu from `x` to `y` `[1, 3, 4, 5]`."""
    shape = b"".join(field(1, field(1, side)) for side in (1, 3, 4, 5))
    typed = field(2, field(1, field(1, 1) + field(2, shape)))
    node = field(1, b"x") + field(2, b"y") + field(4, b"Relu")
    graph = field(1, node) + field(2, b"g") + field(11, field(1, b"x") + typed) + field(12, field(1, b"y") + typed)
    (tmp_path / "yolox_l.onnx").write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, b"") + field(2, 13)))
    network = wholebody._loader("yolox_l.onnx")(tmp_path, None)
    pixels = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(network(pixels)[0], np.maximum(pixels, 0))
    (tmp_path / "yolox_l.onnx").write_bytes(b"torn")
    (tmp_path / "dw-ll_ucoco_384.onnx").touch()
    with refused("damaged-file", "dwpose", tmp_path / "yolox_l.onnx", "ONNX"):
        find("dwpose")(draw_scene(), model=str(tmp_path))


def test_detections_are_in_pixels_and_in_cocos_numbers(monkeypatch) -> None:
    class Network(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, kind: str, classes: int) -> None:
            super().__init__()
            self.config = type("Config", (), {"num_labels": classes, "model_type": kind})()
            self.answers = classes + (kind == "yolos")

        def forward(self, pixels: torch.Tensor) -> object:
            logits = torch.full((1, 3, self.answers), -9.0)
            logits[0, 0, 0], logits[0, 1, 11], logits[0, 2, -1] = 3.0, 2.0, 5.0
            boxes = torch.tensor([[[0.5, 0.5, 0.5, 1.0], [0.25, 0.25, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]]])
            return type("Answer", (), {"logits": logits, "pred_boxes": boxes})()

    monkeypatch.setattr(detection, "find_folder", lambda *_: Path("nowhere"))
    monkeypatch.setattr(detection, "read_inputs", lambda *_: detection.prepare.__globals__["Inputs"]())
    for kind, classes, expected in (("rt_detr", 80, [90, 1, 13]), ("yolos", 91, [0, 11])):
        network = Network(kind, classes)
        monkeypatch.setattr(detection, "load_transformers", lambda *_, network=network: network)
        found = detection.detect("bbox_detected", draw_scene(100, 200), detection.RT_DETR, None, 0.4)
        assert [one.category for one in found] == expected
        person = next(one for one in found if one.width == 100)
        assert (person.left, person.top, person.height) == (50, 0, 100)
    image = find("bbox_detected")(draw_scene(100, 200))
    assert image.any() and image.shape == (100, 200, 3)


def test_parts_of_bodies_fill_their_boxes() -> None:
    coarse, fine = np.zeros((2, 2, 4, 4), np.float32), np.zeros((2, 25, 4, 4), np.float32)
    coarse[:, 1, :2] = 1
    fine[0, 3], fine[1, 7] = 1, 1
    parts = draw_parts(np.array([[-4, 0, 16, 20], [10, 10, 30, 30]], float), coarse, fine, 32, 24)
    assert parts[2, 2] == 3 and parts[12, 15] == 7 and parts[30, 2] == 0 and parts[2, 20] == 0
    assert len({tuple(colour) for colour in viridis().tolist()}) == 25 and tuple(viridis()[0]) == (68, 1, 84)
