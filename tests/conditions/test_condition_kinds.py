"""What single conditions promise."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from condition_scenes import draw_scene
from PIL import Image

from controlkit.apps.cli import main
from controlkit.conditions import find, masks
from controlkit.conditions.coco import BOX_COLOURS
from controlkit.conditions.fidelity import psnr
from controlkit.conditions.pixels import enlarge
from controlkit.conditions.provided import category_colour
from refusals import check, refused


def disc_image(size: int, colour: tuple[int, int, int] = (220, 40, 40)) -> np.ndarray:
    """A disc of a quarter of `size` in the middle of plain blue."""
    image = np.full((size, size, 3), (40, 90, 200), np.uint8)
    return cv2.circle(image, (size // 2, size // 2), size // 4, colour, -1, cv2.LINE_AA)


@pytest.mark.parametrize("name", ["canny", "softedge_sobel", "scribble", "lineart_xdog"])
@pytest.mark.parametrize("size", [64, 512, 1200])
def test_outlines_lie_on_the_outline_at_every_size(name: str, size: int) -> None:
    image = find(name)(disc_image(size))[..., 0]
    rows, columns = np.nonzero(image > 127)
    assert len(rows) > size
    radii = np.hypot(rows - size / 2, columns - size / 2) / size
    assert np.all(np.abs(radii - 0.25) < 0.05)
    angles = np.unique(np.round(np.degrees(np.arctan2(rows - size / 2, columns - size / 2)) / 10))
    assert len(angles) > 30, "the outline has gaps"


def test_sketch_is_dark_on_white_and_looks_harder_where_little_is_found() -> None:
    faint = disc_image(128, (52, 100, 206))
    image = find("sketch")(faint)
    assert image[0, 0, 0] == 255
    assert find("sketch")(disc_image(128))[..., 0].min() == 0
    nearly = disc_image(128, (80, 110, 180))
    assert (find("sketch")(nearly)[..., 0] < 192).mean() > 0.005


def test_safe_soft_edges_have_three_levels() -> None:
    assert set(np.unique(find("softedge_sobel")(draw_scene(), safe=True))) <= {0, 127, 128, 255}


def test_scribble_strokes_get_broader_and_short_ones_vanish() -> None:
    image = disc_image(256)
    thin, broad = (find("scribble")(image, width=width) > 0 for width in (0.005, 0.04))
    assert broad.mean() > 4 * thin.mean()
    assert not find("scribble")(image, shortest=0.7).any()


@pytest.mark.parametrize("size", [64, 512])
def test_lsd_finds_the_sides_of_a_square(size: int) -> None:
    image = np.zeros((size, size, 3), np.uint8)
    quarter = size // 4
    image[quarter : 3 * quarter, quarter : 3 * quarter] = 255
    made = find("lines_lsd")(image)[..., 0] > 0
    for side in (quarter, 3 * quarter):
        assert made[:, side - 2 : side + 2].any(axis=1).sum() > 1.6 * quarter
        assert made[side - 2 : side + 2].any(axis=0).sum() > 1.6 * quarter
    assert not find("lines_lsd")(image, shortest=0.9).any()


def test_color_hints_are_the_colours_of_the_image() -> None:
    plain = np.full((64, 64, 3), (10, 200, 90), np.uint8)
    image = find("lineart_color_hints")(plain)
    coloured = image[image.any(axis=2)]
    assert len(coloured) > 10
    assert np.all(coloured == (10, 200, 90))
    few, many = (find("lineart_color_hints")(plain, least=n, more=0.0).any(axis=2).sum() for n in (1, 40))
    assert many > 10 * few


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512), (100, 150), (16, 16)])
def test_palette_is_eight_cells_along_the_short_side(height: int, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    made = find("palette")(image)
    short = made[:, 0] if height <= width else made[0]
    assert np.count_nonzero((short[1:] != short[:-1]).any(axis=1)) == 7
    assert abs(made.mean() - image.mean()) < 2


def test_pixel_has_large_pixels_of_few_colours() -> None:
    image = find("pixel")(draw_scene(64, 64, 4), colours=8)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) <= 8
    np.testing.assert_array_equal(image, enlarge(image[::2, ::2], 64, 64))


def test_grayscale_is_grey_and_luma() -> None:
    image = find("grayscale")(np.full((16, 16, 3), (255, 0, 0), np.uint8))
    assert np.all(image == 76)


def test_illusion_has_three_tones_by_value_and_not_by_blue() -> None:
    image = np.full((64, 64, 3), (250, 250, 0), np.uint8)
    assert np.all(find("illusion")(image) == 255)
    assert set(np.unique(find("illusion")(draw_scene(96, 96, 5)))) <= {0, 127, 255}


def test_shuffle_keeps_colours_and_moves_them() -> None:
    image = draw_scene(128, 128, 6)
    made = find("shuffle")(image)
    assert psnr(image, made) < 25
    assert find("shuffle").score(made, image) == 0


def test_degradations_get_worse_with_their_strength() -> None:
    image = draw_scene(96, 96, 7)
    for name, key, values in [
        ("blur", "sigma", (0.005, 0.02, 0.05)),
        ("jpeg", "quality", (95, 40, 5)),
        ("noise", "sigma", (0.02, 0.1, 0.4)),
        ("downscale", "factor", (1.5, 3.0, 8.0)),
        ("haze", "density", (0.3, 1.0, 3.0)),
        ("rain", "amount", (0.1, 0.5, 2.0)),
        ("snow", "amount", (0.1, 0.5, 2.0)),
        ("raindrop", "drops", (1.0, 10.0, 60.0)),
        ("low_light", "gain", (0.9, 0.5, 0.2)),
    ]:
        quality = [psnr(image, find(name)(image, **{key: value})) for value in values]
        assert quality == sorted(quality, reverse=True), name


def test_noise_has_the_given_deviation_and_blur_scales_with_the_image() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    assert find("noise")(grey, sigma=0.1).std() == pytest.approx(25.5, rel=0.05)
    step = np.zeros((512, 512, 3), np.uint8)
    step[:, 256:] = 255
    large = find("blur")(step)[256, :, 0].astype(int)
    small = find("blur")(step[::4, ::4])[64, :, 0].astype(int)
    assert np.abs(large[2::4] - small).max() < 12


def test_masks_hide_in_black_and_leave_the_rest() -> None:
    image = np.full((100, 140, 3), 200, np.uint8)
    for name in ("inpaint", "inpaint_brush"):
        for seed in range(20):
            made = find(name)(image, seed=seed)
            assert set(np.unique(made)) == {0, 200}
            assert 0.01 < (made == 0).mean() < 0.9, name


def test_inpaint_hides_a_quarter_and_reaches_further_after_the_middle() -> None:
    """CtrLoRA's rectangles have two extents between 20 and 80 %, the larger one after the middle."""
    image = np.full((80, 80, 3), 200, np.uint8)
    shares = []
    for seed in range(200):
        hidden = find("inpaint")(image, seed=seed)[..., 0] == 0
        shares.append(hidden.mean())
        for axis in (0, 1):
            (inside,) = np.nonzero(hidden.any(axis=axis))
            before, after = 40 - inside[0], inside[-1] + 1 - 40
            assert 8 <= before <= after <= 32
    assert 0.2 < np.mean(shares) < 0.3
    assert np.percentile(shares, 5) < 0.14 and np.percentile(shares, 95) > 0.36


def test_brush_strokes_zigzag_up_and_down(monkeypatch) -> None:
    """Each step is 48 to 96 degrees off the horizontal, up and down by turns, as CtrLoRA's are."""
    strokes = []
    monkeypatch.setattr(masks.cv2, "polylines", lambda _mask, paths, *_: strokes.append(paths[0][:, 0]))
    for seed in range(20):
        find("inpaint_brush")(np.full((4000, 4000, 3), 200, np.uint8), seed=seed)
    lengths = [len(stroke) - 1 for stroke in strokes]
    assert min(lengths) == 4 and max(lengths) == 18
    angles = []
    for stroke in strokes:
        inside = np.all((stroke > 0) & (stroke < 3999), axis=1)  # a point at the border was moved there
        steps = np.diff(stroke, axis=0)
        signs = np.where(np.arange(len(steps)) % 2, 1, -1)
        long = (np.hypot(*steps.T) > 50) & inside[1:]
        angles += np.degrees(np.arctan2(steps[:, 1] * signs, steps[:, 0]))[long].tolist()
    assert min(angles) > 47 and max(angles) < 97 and 65 < np.mean(angles) < 79


def test_random_parameters_are_normal_within_their_range() -> None:
    rng = np.random.default_rng(0)
    values = np.array([find("jpeg").random["quality"](rng) for _ in range(2000)])
    assert values.min() == 10 and values.max() == 30
    assert 4.5 < values.std() < 6.5  # a normal distribution within one standard deviation has 0.54 of it


def test_inpaint_takes_a_given_box() -> None:
    image = np.full((80, 80, 3), 200, np.uint8)
    made = find("inpaint")(image, box=[0.25, 0, 0.5, 1])
    assert np.all(made[:, 20:40] == 0) and np.all(made[:, :20] == 200) and np.all(made[:, 40:] == 200)
    for box, code in (
        ([0, 0, 1], "wrong-type"),
        ("left", "wrong-type"),
        ([0.5, 0, 0.2, 1], "out-of-range"),
        ([0, 0, 2, 1], "out-of-range"),
    ):
        with refused(code, "inpaint", "box", repr(box)):
            find("inpaint")(image, box=box)


def test_lists_are_asked_for_as_the_command_line_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(disc_image(64)).save(tmp_path / "photo.png")
    words = ["condition", "inpaint", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out.png"), "--set"]
    assert main([*words, "box=0.1,0.1,0.5,0.5"]) == 2
    said = capsys.readouterr().err
    check(said, "wrong-type", "[left,top,right,bottom]", "[0.1,0.1,0.5,0.5]")
    assert main([*words, "box=[0.1,0.1,0.5,0.5]"]) == 0
    with refused("wrong-type", "bbox", "[width,height]"):
        find("bbox")(disc_image(64), boxes=[[0, 0, 9, 9]], size="640,480")


def test_outpaint_keeps_the_middle() -> None:
    image = np.full((60, 80, 3), 200, np.uint8)
    made = find("outpaint")(image, keep_width=0.5, keep_height=1.0)
    assert np.all(made[:, 20:60] == 200) and not made[:, :20].any() and not made[:, 60:].any()


def test_color_regions_are_few_and_right() -> None:
    image = find("color_regions")(disc_image(128), colours=2)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 2
    assert np.abs(image[64, 64].astype(int) - (220, 40, 40)).max() < 12
    assert np.abs(image[0, 0].astype(int) - (40, 90, 200)).max() < 12


def test_silhouette_is_the_foreground() -> None:
    size = 128
    mask = find("silhouette")(disc_image(size))[..., 0] == 255
    assert mask.mean() == pytest.approx(np.pi / 16, rel=0.08)
    ring = cv2.circle(disc_image(size), (64, 64), 12, (40, 90, 200), -1)
    assert not find("silhouette")(ring)[64, 64].any()
    assert find("silhouette")(ring, fill_holes=True)[64, 64].all()


def test_boxes_are_filled_the_largest_first_and_scaled() -> None:
    image = np.zeros((50, 100, 3), np.uint8)
    small = {"bbox": [20, 20, 20, 20], "category_id": 2}
    large = {"bbox": [0, 0, 100, 100], "category_id": 1}
    made = find("bbox")(image, boxes=[small, large], size=[200, 100])
    assert tuple(made[15, 15]) == (0, 255, 0)  # UniControl's bicycle
    assert tuple(made[5, 5]) == (255, 0, 0)  # and its person
    assert not made[:, 60:].any()
    bare = find("bbox")(image, boxes=[[-10, -10, 20, 20]])
    assert tuple(bare[9, 9]) == category_colour(0) and not bare[10:].any()
    assert len({category_colour(number) for number in range(91)}) == 91
    last = find("bbox")(image, boxes=[{"bbox": [0, 0, 20, 20], "category_id": 90}])
    assert tuple(last[5, 5]) == (160, 96, 96) and len(set(BOX_COLOURS.values())) == len(BOX_COLOURS) == 80


@pytest.mark.parametrize("name", ["bbox", "segments"])
def test_absent_or_wrong_annotations_are_said(name: str) -> None:
    made, key = find(name), {"bbox": "boxes", "segments": "segments"}[name]
    image = draw_scene()
    with refused("missing-setting", name, f"{key}="):
        made(image)
    for wrong in ("text", 3, {"bbox": [1, 2, 3, 4]}):
        with refused("wrong-type", name, key, type(wrong).__name__):
            made(image, **{key: wrong})
    for wrong in ([[1, 2, 3]], [{"category_id": 1}], [None]):
        with refused("bad-data", name, wrong[0]):
            made(image, **{key: wrong})
    with refused("out-of-range", name, "size", [0, 5]):
        made(image, **{key: [], "size": [0, 5]})
    assert not made(image, **{key: []}).any()


def test_polygons_and_both_kinds_of_run_lengths_draw_the_same() -> None:
    image = np.zeros((36, 40, 3), np.uint8)  # Four times the size of the annotation.
    # Columns 2 to 5, rows 3 to 6: 23 zeros, then four times 4 ones with 5 zeros between.
    counts = [21, 4, 5, 4, 5, 4, 5, 4, 38]
    polygon = {"segmentation": [[2, 3, 6, 3, 6, 7, 2, 7]], "category_id": 4}
    plain = {"segmentation": {"size": [9, 10], "counts": counts}, "category_id": 4}
    packed = {"segmentation": {"size": [9, 10], "counts": pack(counts)}, "category_id": 4}
    images = [find("segments")(image, segments=[entry]) for entry in (plain, packed)]
    assert tuple(images[0][18, 14]) == category_colour(4)
    assert images[0].any(axis=2).sum() == 16 * 16
    np.testing.assert_array_equal(images[0], images[1])
    outline = find("segments")(np.zeros((90, 100, 3), np.uint8), segments=[polygon], size=[10, 9])
    enlarged = find("segments")(np.zeros((90, 100, 3), np.uint8), segments=[packed])
    assert (outline.any(axis=2) == enlarged.any(axis=2)).mean() > 0.98


def pack(counts: list[int]) -> str:
    """COCO's compressed run lengths, written anew from the format."""
    text = ""
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            text += chr(48 + (bits if done else bits | 32))
            if done:
                break
    return text


def test_identity_is_a_copy_scored_against_the_pair() -> None:
    image, sketched = draw_scene(), draw_scene(number=9)
    made = find("identity")
    np.testing.assert_array_equal(made(image), image)
    assert made.score(sketched, image, target=image) == 100
    with pytest.raises(ValueError, match="target"):
        made.score(sketched, image)
