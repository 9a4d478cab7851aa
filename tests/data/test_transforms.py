"""Crops and flips that keep a pair a pair; buckets."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_files import scene
from PIL import Image

from controlkit.conditions import find
from controlkit.data.buckets import BucketBatches, Buckets
from controlkit.data.pair import Pair
from controlkit.data.transforms import CENTRE, View, apply_view, apply_view_to_pair, compute_pair, random_view
from controlkit.errors import UserError
from refusals import refused

VIEWS = st.builds(View, place=st.floats(0, 1), flip=st.booleans())
SIDES = st.integers(16, 80)


@given(view=VIEWS, width=SIDES, height=SIDES, factor=st.integers(1, 4), size=st.integers(8, 64))
def test_both_sides_show_the_same_part_whatever_their_resolutions(view, width, height, factor, size):
    image = scene(width * height, height, width)
    larger = image.repeat(factor, axis=0).repeat(factor, axis=1)
    source, target = apply_view_to_pair(larger, image, view, size)
    assert source.shape == target.shape == (size, size, 3)
    assert np.abs(source.astype(int) - target).mean() < 40
    same, _ = apply_view_to_pair(image, larger, view, size)
    assert np.array_equal(same, target)


@given(view=VIEWS, width=SIDES, height=SIDES, size=st.integers(8, 64))
def test_a_flip_turns_what_is_shown_without_it(view, width, height, size):
    image = scene(width, height, width)
    straight, turned = (apply_view(image, View(place=view.place, flip=flip), size) for flip in (False, True))
    assert np.array_equal(turned, straight[:, ::-1])


@settings(max_examples=30)
@given(name=st.sampled_from(["canny", "palette", "blur", "inpaint", "noise", "haze", "shuffle"]), view=VIEWS)
def test_a_flipped_computed_pair_is_the_pair_flipped(name, view):
    condition, image = find(name), scene(4, 48, 64)
    source, target = compute_pair(image, condition, View(place=view.place, flip=True), 48)
    straight = compute_pair(image, condition, View(place=view.place), 48)
    assert np.array_equal(target, straight[1][:, ::-1])
    if condition.mirrors:
        assert np.array_equal(source, condition(target))
        assert np.abs(source.astype(int) - straight[0][:, ::-1]).mean() < 8
    else:
        # The mask or noise is flipped with the image, which computing it again would not do.
        assert np.array_equal(source, straight[0][:, ::-1])


def test_a_finished_pair_is_mirrored_as_its_condition_is():
    source, target, flipped = scene(1), scene(2), View(flip=True)
    normals, _ = apply_view_to_pair(source, target, flipped, 48, find("normal"))
    assert np.array_equal(normals[..., 0], 255 - source[:, ::-1, 0])
    assert np.array_equal(apply_view_to_pair(source, target, flipped, 48)[0], source[:, ::-1])
    with pytest.raises(UserError, match=r"openpose.* left from right"):
        apply_view_to_pair(source, target, flipped, 48, find("openpose"))
    labels, _ = apply_view_to_pair(source, target, CENTRE, 31, find("seg"))
    assert {tuple(c) for c in labels.reshape(-1, 3)} <= {tuple(c) for c in source.reshape(-1, 3)}


def test_labels_keep_their_colours():
    labels = np.zeros((50, 50, 3), np.uint8)
    labels[:, 20:] = (200, 10, 90)
    colours = {tuple(colour) for colour in apply_view(labels, CENTRE, 33, nearest=True).reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), (200, 10, 90)}


def test_views_are_sampled_alike_whatever_is_asked_for():
    for crop in (False, True):
        for flip in (False, True):
            rng = np.random.default_rng(5)
            views = [random_view(rng, crop=crop, flip=flip) for _ in range(20)]
            assert len({view.place for view in views}) == (20 if crop else 1)
            assert len({view.flip for view in views}) == (2 if flip else 1)
    assert rng.random() == np.random.default_rng(5).random(41)[40]
    with pytest.raises(ValueError, match=r"place is 1\.1, not from 0 to 1"):
        View(place=1.1)


@given(size=st.sampled_from([256, 512, 1024]), step=st.sampled_from([8, 32, 64]), longest=st.floats(1, 4))
def test_buckets_have_sides_of_multiples_and_no_more_pixels_than_the_square(size, step, longest):
    sizes = Buckets(size=size, step=step, longest=longest).sizes
    assert (size, size) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0 and width * height <= size * size
        assert max(width, height) <= longest * min(width, height)
        assert (height, width) in sizes


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_no_other_bucket_is_nearer_in_shape(width, height):
    buckets = Buckets()
    chosen = buckets.assign(width, height)
    far = [abs(np.log(w / h) - np.log(width / height)) for w, h in buckets.sizes]
    assert abs(np.log(chosen[0] / chosen[1]) - np.log(width / height)) <= min(far) + 1e-6
    assert buckets.assign(height, width) == chosen[::-1]
    assert buckets.assign(*chosen) == chosen


def test_impossible_buckets_are_refused():
    for wrong, code in (
        ({"size": 500}, "wrong-size"),
        ({"size": 32}, "wrong-size"),
        ({"longest": 0.5}, "out-of-range"),
    ):
        ((name, value),) = wrong.items()
        with refused(code, f"buckets: {name} is {value}"):
            Buckets(**wrong)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_an_epoch_shows_everything_and_every_batch_has_one_bucket(counts, batch_size, seed, epoch):
    buckets = [(64 * (kind + 1), 64) for kind, count in enumerate(counts) for _ in range(count)]
    batches = BucketBatches(buckets=buckets, batch_size=batch_size, seed=seed)
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    shown = Counter()
    for step in steps:
        batch = batches.batch(step)
        assert len(batch) == batch_size and len({buckets[index] for index in batch}) == 1
        shown.update(batch)
    assert set(shown) == set(range(len(buckets)))
    fresh = BucketBatches(buckets=buckets, batch_size=batch_size, seed=seed)
    assert fresh.batch(steps[-1]) == batch


def test_epochs_and_seeds_differ():
    first, second = (BucketBatches(buckets=[(64, 64)] * 30, batch_size=5, seed=seed) for seed in (0, 1))
    assert first.batch(0) != first.batch(6) and first.batch(0) != second.batch(0)


def test_reversed_normals_are_flipped_in_their_third_channel(tmp_path):
    normals = np.full((32, 32, 3), (200, 90, 250), np.uint8)
    for name, pixels in (("plain", normals), ("reversed", normals[..., ::-1])):
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{name}.png")
    plain, turned = (
        Pair(
            source=tmp_path / f"{name}.png", target=tmp_path / "plain.png", prompt="", condition="normal", **parameters
        )
        for name, parameters in (("plain", {}), ("reversed", {"parameters": {"reverse": True}}))
    )
    assert np.array_equal(plain.side("source", 32, mirrored=True)[..., ::-1], turned.side("source", 32, mirrored=True))
    assert turned.side("source", 32, mirrored=True)[0, 0].tolist() == [250, 90, 55]
    view = View(flip=True)
    pixels = np.ascontiguousarray(normals[..., ::-1])
    made, _ = apply_view_to_pair(pixels, normals, view, 32, find("normal"), {"reverse": True})
    assert made[0, 0].tolist() == [250, 90, 55]
