"""Face meshes and pose by MediaPipe: the drawing, and its own weights against points marked by hand."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from condition_scenes import draw_scene
from PIL import Image

from controlkit.conditions import find, models
from controlkit.conditions.learned.mediapipe import FACE_COLOURS, PUPILS, draw_face
from controlkit.conditions.learned.skeleton import read_points
from refusals import refused

PHOTOGRAPHS = Path(__file__).with_name("photographs")
SIDE = 512
"""Side of the images here: lines have their exact colours, without scaling."""

# Marked by eye on the photographs of 256 x 256, enlarged under a grid: (x, y). Left and right are the person's.
FACES = {
    "astronaut": {
        "right pupil": (101.9, 51.0),
        "left pupil": (123.3, 51.7),
        "right eye, outer corner": (97.0, 50.5),
        "right eye, inner corner": (106.4, 51.3),
        "left eye, inner corner": (118.4, 52.5),
        "left eye, outer corner": (129.3, 51.5),
        "mouth, right corner": (101.5, 69.9),
        "mouth, left corner": (122.2, 70.1),
        "chin": (112.7, 89.2),
    },
    "hopper": {
        "right pupil": (110.6, 95.6),
        "left pupil": (152.2, 93.1),
        "right eye, outer corner": (103.5, 97.0),
        "right eye, inner corner": (120.9, 97.2),
        "left eye, inner corner": (143.8, 96.6),
        "left eye, outer corner": (162.5, 94.4),
        "mouth, right corner": (114.6, 140.5),
        "mouth, left corner": (153.2, 139.2),
        "chin": (134.5, 164.7),
    },
}
NOSE, RIGHT_SHOULDER, RIGHT_ELBOW, RIGHT_WRIST, LEFT_SHOULDER, LEFT_WRIST = 0, 2, 3, 4, 5, 7
RIGHT_EYE, LEFT_EYE, RIGHT_EAR, LEFT_EAR = 14, 15, 16, 17
BODIES = {
    "astronaut": {
        NOSE: (112.0, 63.5),
        RIGHT_EYE: FACES["astronaut"]["right pupil"],
        LEFT_EYE: FACES["astronaut"]["left pupil"],
        RIGHT_EAR: (89, 60),
        LEFT_EAR: (136, 63),
        RIGHT_SHOULDER: (46, 122),
        LEFT_SHOULDER: (162, 128),
        RIGHT_ELBOW: (28, 210),
    },
    "camera": {
        NOSE: (126.5, 82),
        RIGHT_EYE: (117, 73),
        RIGHT_EAR: (95, 70),
        RIGHT_SHOULDER: (42, 92),
        RIGHT_ELBOW: (38, 148),
        RIGHT_WRIST: (95, 128),
        LEFT_WRIST: (141, 122),
    },
    "hopper": {
        NOSE: (134, 118),
        RIGHT_EYE: FACES["hopper"]["right pupil"],
        LEFT_EYE: FACES["hopper"]["left pupil"],
        RIGHT_EAR: (84, 108),
        LEFT_EAR: (180, 108),
        RIGHT_SHOULDER: (36, 203),
        LEFT_SHOULDER: (232, 207),
    },
}
MISSED = {
    "astronaut": set(),
    "camera": {RIGHT_SHOULDER, RIGHT_ELBOW, RIGHT_WRIST, LEFT_WRIST},
    "hopper": {RIGHT_EAR},
}
"""Points that BlazePose misses: the arms of a man in a dark coat, seen from the side, and an ear by 5.5 %."""


def photograph(name: str) -> np.ndarray:
    image = Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB")
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


@pytest.fixture
def weights():
    """MediaPipe's package, which contains them."""
    pytest.importorskip("mediapipe", reason="needs controlkit[mediapipe]")
    yield
    models.unload_models()


def coloured(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(x, y) `[N, 2]` of the pixels of `colour`."""
    found = np.argwhere((image == colour).all(axis=2))[:, ::-1]
    assert len(found), colour
    return found + 0.5


def extreme(points: np.ndarray, axis: int, sign: int) -> np.ndarray:
    """The middle of the outermost points along an axis."""
    along = sign * points[:, axis]
    return points[along == along.max()].mean(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FACES))
def test_the_points_of_a_face_are_where_a_person_marked_them(name: str, weights) -> None:
    drawn = find("mediapipe_face")(photograph(name))
    right_eye, left_eye, lips, oval = (
        coloured(drawn, FACE_COLOURS[name]) for name in ("RIGHT_EYE", "LEFT_EYE", "LIPS", "FACE_OVAL")
    )
    found = {
        "right pupil": coloured(drawn, PUPILS[468]).mean(axis=0),
        "left pupil": coloured(drawn, PUPILS[473]).mean(axis=0),
        "right eye, outer corner": extreme(right_eye, 0, -1),
        "right eye, inner corner": extreme(right_eye, 0, 1),
        "left eye, inner corner": extreme(left_eye, 0, -1),
        "left eye, outer corner": extreme(left_eye, 0, 1),
        "mouth, right corner": extreme(lips, 0, -1),
        "mouth, left corner": extreme(lips, 0, 1),
        "chin": extreme(oval, 1, 1),
    }
    marked = {point: np.array(place) * SIDE / 256 for point, place in FACES[name].items()}
    # The usual measure: distances as fractions of the distance between the pupils.
    between = np.linalg.norm(marked["left pupil"] - marked["right pupil"])
    errors = {point: np.linalg.norm(found[point] - marked[point]) / between for point in marked}
    assert np.mean(list(errors.values())) < 0.05, errors
    assert max(errors.values()) < 0.1, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BODIES))
def test_the_points_of_a_body_are_where_a_person_marked_them(name: str, weights) -> None:
    found = read_points(find("mediapipe_pose")(photograph(name)))
    radius = 0.05 * SIDE  # that of pose F1
    none = np.full((1, 2), np.inf)
    errors = {
        index: np.linalg.norm(found.get(index, none) - np.array(point) * SIDE / 256, axis=1).min()
        for index, point in BODIES[name].items()
    }
    assert {index for index, error in errors.items() if error > radius} <= MISSED[name], errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mediapipe_face", "mediapipe_pose"])
def test_any_size_the_same_twice_and_black_without_people(name: str, weights) -> None:
    made = find(name)
    first = made(photograph("astronaut"))
    assert first.any()
    for size in [(16, 16), (16, 400), (301, 17)]:
        image = draw_scene(*size)
        image.setflags(write=False)
        assert made(image).shape == image.shape and not made(image).any()
    np.testing.assert_array_equal(made(photograph("astronaut")), first)
    models.unload_models()
    np.testing.assert_array_equal(made(photograph("astronaut")), first)


@pytest.mark.slow
def test_each_face_up_to_the_limit_is_drawn(weights) -> None:
    face = np.asarray(Image.fromarray(photograph("astronaut")[:256, 96:352]).resize((SIDE, SIDE)))
    pair = np.ascontiguousarray(np.concatenate([face, face[:, ::-1]], axis=1))
    drawn = [find("mediapipe_face")(pair, faces=faces) for faces in (1, 2)]
    halves = [[half.any() for half in np.split(image, 2, axis=1)] for image in drawn]
    assert sum(halves[0]) == 1 and sum(halves[1]) == 2


def test_a_face_is_drawn_in_the_colours_of_the_field() -> None:
    mesh = np.full((478, 2), -1.0)
    mesh[[0, 1, 468, 473]] = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75)]
    outlines = {name: () for name in FACE_COLOURS} | {"LIPS": [(0, 1), (1, 2)]}
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    draw_face(canvas, mesh, outlines)
    assert tuple(canvas[128, 256]) == (10, 180, 10) and not canvas[128, 400:].any()
    assert np.array_equal(coloured(canvas, PUPILS[468]).mean(axis=0), (256, 256))
    assert len(coloured(canvas, PUPILS[473])) == 16


def test_mediapipe_says_which_package_it_needs(monkeypatch) -> None:
    for name in ("mediapipe_face", "mediapipe_pose"):
        monkeypatch.setitem(sys.modules, "mediapipe", None)
        with refused("missing-package", name, "Apache-2.0", "pip install 'controlkit[mediapipe]'"):
            find(name)(draw_scene())
        newer = types.ModuleType("mediapipe")
        newer.__version__ = "0.10.30"
        monkeypatch.setitem(sys.modules, "mediapipe", newer)
        with refused("missing-package", name, "0.10.30", "pip install 'controlkit[mediapipe]'"):
            find(name)(draw_scene())
