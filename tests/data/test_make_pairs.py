"""Making pairs: the same whatever the order and the workers, resumable, and nothing lost."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pair_files import contents, encoded, scene, write_archive, write_images
from PIL import Image

from controlkit.conditions import find
from controlkit.data.engine import make_pairs
from controlkit.data.input_images import InputImage, list_images, with_tiles
from controlkit.data.jobs import Outcome, ShardJob
from controlkit.data.making import MakeSettings, condition_seed, make_pair, png
from controlkit.data.pairs import read_pairs
from controlkit.data.sources import decode_pixels, members, open_image
from controlkit.errors import UserError
from controlkit.images import decode_image, read_image, to_rgb
from icc import ADOBE_RGB, SRGB
from refusals import refused

CANNY_AND_NOISE = MakeSettings(conditions=("canny", "noise"), size=32)


def lines(report):
    return [json.loads(line) for line in report.out.read_text().splitlines()]


def test_what_the_manifest_says_is_true(tmp_path):
    paths = write_images(tmp_path / "in", 3)
    report = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    assert (report.made, report.kept, report.skipped, report.empty_prompts) == (3, 0, {}, 0)
    for entry, path in zip(lines(report), paths, strict=True):
        assert entry["key"] == path.stem and entry["prompt"] == path.with_suffix(".txt").read_text().strip()
        assert entry["original"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        image = tmp_path / "out" / entry["picture"]
        assert entry["sha256"]["picture"] == hashlib.sha256(image.read_bytes()).hexdigest()
        pixels = np.asarray(read_image(image))
        assert pixels.shape == (32, 32, 3) and entry["size"] == [32, 32]
        for name, place in entry["conditions"].items():
            file = tmp_path / "out" / place
            assert entry["sha256"]["conditions"][name] == hashlib.sha256(file.read_bytes()).hexdigest()
            again = find(name)(pixels, **entry["parameters"][name])
            assert np.array_equal(np.asarray(read_image(file)), again)
    pair = read_pairs(tmp_path / "out", "canny")[0]
    assert pair.prompt == "scene 0"
    assert read_pairs(tmp_path / "out" / "noise")[0].target == pair.target


def test_images_that_stay_are_referred_to_or_copied(tmp_path):
    (path,) = write_images(tmp_path / "in", 1)
    where = make_pairs(list_images([path.parent]), tmp_path / "a", MakeSettings(conditions=("canny",)), workers=1)
    assert (where.out.parent / lines(where)[0]["picture"]).resolve() == path.resolve()
    copied = MakeSettings(conditions=("canny",), copy=True)
    where = make_pairs(list_images([path.parent]), tmp_path / "b", copied, workers=1)
    assert (tmp_path / "b" / lines(where)[0]["picture"]).read_bytes() == path.read_bytes()


def test_images_that_other_tools_would_see_otherwise_are_written_anew(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(scene(0, 20, 40)).save(tmp_path / "in/turned.jpg", exif=exif)
    Image.fromarray(np.dstack([scene(1), np.full((48, 48), 90, np.uint8)])).save(tmp_path / "in/clear.png")
    settings = MakeSettings(conditions=("canny",))
    report = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1)
    for entry in lines(report):
        with Image.open(tmp_path / "out" / entry["picture"]) as image:
            assert image.mode == "RGB" and list(image.size) == entry["size"]
    assert lines(report)[1]["size"] == [20, 40]
    assert len(read_pairs(tmp_path / "out")) == 2


def test_order_workers_and_company_change_nothing(tmp_path):
    write_images(tmp_path / "in", 7)
    images = list_images([tmp_path / "in"])
    make_pairs(images, tmp_path / "one", CANNY_AND_NOISE, workers=1)
    make_pairs(images[::-1], tmp_path / "two", CANNY_AND_NOISE, workers=2)
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == expected
    alone = MakeSettings(conditions=("noise",), size=32)
    make_pairs(images[3:4], tmp_path / "three", alone, workers=1)
    assert contents(tmp_path / "three")["noise/image3.png"] == expected["noise/image3.png"]


def test_seeds_tell_images_conditions_and_runs_apart():
    seeds = {condition_seed(run, content, name) for run in (0, 1) for content in "ab" for name in ("canny", "noise")}
    assert len(seeds) == 8
    assert condition_seed(0, "a", "canny") == condition_seed(0, "a", "canny")


def test_fixed_parameters_are_the_defaults(tmp_path):
    write_images(tmp_path / "in", 2)
    images = list_images([tmp_path / "in"])
    fixed = MakeSettings(conditions=("canny",), fixed=True)
    assert make_pair(images[0], fixed).entry["parameters"] == {"canny": {"low": 100, "high": 200}}
    sampled = [make_pair(p, MakeSettings(conditions=("canny",))).entry["parameters"]["canny"]["low"] for p in images]
    assert sampled[0] != sampled[1]


def test_a_second_run_does_nothing_and_a_changed_input_is_noticed(tmp_path):
    paths = write_images(tmp_path / "in", 4)
    out = tmp_path / "out"

    def go(*names):
        return make_pairs(list_images([tmp_path / "in"]), out, MakeSettings(conditions=names, size=32), workers=1)

    go("canny")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    report = go("canny")
    assert (report.made, report.kept) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before

    Image.fromarray(scene(99)).save(paths[1])
    (out / "canny/image2.png").unlink()
    paths[3].with_suffix(".txt").write_text("another caption")
    report = go("canny")
    assert (report.made, report.kept) == (3, 1)
    assert [entry["prompt"] for entry in lines(report)][3] == "another caption"

    paths[2].unlink()
    report = go("palette")  # the edges stay
    assert set(lines(report)[0]["conditions"]) == {"canny", "palette"} and len(lines(report)) == 3


def test_a_prompt_edited_in_the_manifest_stays(tmp_path):
    write_images(tmp_path / "in", 2)
    report = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    report.out.write_text(report.out.read_text().replace("scene 0", "edited by hand"))
    Image.fromarray(scene(9)).save(tmp_path / "in/new.png")
    again = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    assert again.made == 1
    assert sorted(entry["prompt"] for entry in lines(again)) == ["", "edited by hand", "scene 1"]


def test_a_line_removed_from_the_manifest_comes_back(tmp_path):
    """As the error says that names a damaged line."""
    write_images(tmp_path / "in", 3)
    report = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    before = report.out.read_text()
    report.out.write_text("".join(before.splitlines(keepends=True)[::2]))
    again = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    assert (again.made, again.kept) == (0, 3) and again.out.read_text() == before


def test_an_image_with_the_name_of_a_tile_has_a_key_of_its_own(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(scene(0, 24, 48)).save(tmp_path / "in/apple.png")
    Image.fromarray(scene(1, 24, 24)).save(tmp_path / "in/apple_tile_0_0.png")
    settings = MakeSettings(conditions=("canny",), size=24, tiles=True)
    for made, kept in ((3, 0), (0, 3)):
        images = with_tiles(list_images([tmp_path / "in"]), 24)
        report = make_pairs(images, tmp_path / "out", settings, workers=1)
        assert (report.made, report.kept) == (made, kept)
    assert len({entry["key"].casefold() for entry in lines(report)}) == 3


def test_an_edited_prompt_that_a_changed_image_undoes_is_reported(tmp_path, capsys):
    write_images(tmp_path / "in", 3)
    report = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    first, second = (entry["key"] for entry in lines(report)[:2])
    report.out.write_text(report.out.read_text().replace("scene 0", "edited by hand").replace("scene 1", "edited, too"))
    Image.fromarray(scene(9)).save(tmp_path / "in" / f"{first}.png")
    again = make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    assert [entry["prompt"] for entry in lines(again)] == ["scene 0", "edited, too", "scene 2"]
    note = capsys.readouterr().err
    assert "note: 1 prompts" in note and "pairs.jsonl" in note
    assert note.rstrip().endswith(f": {first}") and second not in note


def test_other_settings_do_not_mix_in_one_folder(tmp_path):
    write_images(tmp_path / "in", 2)
    images = list_images([tmp_path / "in"])
    make_pairs(images, tmp_path / "out", CANNY_AND_NOISE, workers=1)
    with refused("resume-mismatch", tmp_path / "out", "seed: 0 here, 3 now"):
        make_pairs(images, tmp_path / "out", MakeSettings(conditions=("canny",), size=32, seed=3), workers=1)
    with refused("resume-mismatch", tmp_path / "out", "shards: none here, 2 now"):
        make_pairs(images, tmp_path / "out", CANNY_AND_NOISE, workers=1, shards=2)


@pytest.mark.parametrize(
    ("name", "shards"),
    [("canny/0.png", None), ("pictures/0.png", None), ("pairs.jsonl", None), ("pairs-00001-of-00002.tar", 2)],
)
def test_files_of_others_are_not_written_over(name, shards, tmp_path):
    write_images(tmp_path / "in", 2)
    theirs = tmp_path / "out" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"mine")
    settings = MakeSettings(conditions=("canny",), size=32)
    images = list_images([tmp_path / "in"])
    with refused("would-overwrite", theirs if shards or "/" not in name else theirs.parent, "--out"):
        make_pairs(images, tmp_path / "out", settings, workers=1, shards=shards)
    assert theirs.read_bytes() == b"mine"
    theirs.unlink()
    assert make_pairs(images, tmp_path / "out", settings, workers=1, shards=shards).made == 2


def test_a_run_that_fails_at_once_leaves_the_folder_free(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 2)
    images = list_images([tmp_path / "in"])

    def failing(jobs_function, jobs, workers):
        (tmp_path / "out" / "canny").mkdir()
        (tmp_path / "out" / "canny" / "0.png").write_bytes(b"part")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("controlkit.data.engine.run_jobs", failing)
        make_pairs(images, tmp_path / "out", MakeSettings(conditions=("canny",)), workers=1)
    assert make_pairs(images, tmp_path / "out", MakeSettings(conditions=("canny",), seed=1), workers=1).made == 2


def test_shards_that_fail_at_once_leave_a_folder_of_others(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 2)
    theirs = tmp_path / "out" / "canny" / "mine.png"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"mine")

    def failing(jobs_function, jobs, workers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("controlkit.data.engine.run_jobs", failing)
        make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1, shards=2)
    assert theirs.read_bytes() == b"mine"


def test_truncated_images_are_skipped_and_reported(tmp_path):
    paths = write_images(tmp_path / "in", 4)
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[2].write_bytes(b"")
    for shards in (None, 2):
        out = tmp_path / f"out{shards}"
        report = make_pairs(list_images([tmp_path / "in"]), out, CANNY_AND_NOISE, workers=1, shards=shards)
        assert (report.made, sorted(report.skipped)) == (2, ["image1.png", "image2.png"])
        assert len(read_pairs(out, "canny")) == 2
    for path in paths:
        path.write_bytes(b"none")
    with refused("bad-image", "none of 4 images", "image0.png"):
        make_pairs(list_images([tmp_path / "in"]), tmp_path / "new", CANNY_AND_NOISE, workers=1)
    # A run that made nothing stands in nobody's way.
    write_images(tmp_path / "in", 4)
    other = MakeSettings(conditions=("canny",), size=16)
    assert make_pairs(list_images([tmp_path / "in"]), tmp_path / "new", other, workers=1).made == 4


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    write_images(tmp_path / "in", 6)
    images = list_images([tmp_path / "in"])

    class Killed(Exception):
        pass

    def kill(done, total):
        if done >= 3:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        make_pairs(images, out, CANNY_AND_NOISE, workers=1, progress=kill)
    assert not (out / "pairs.jsonl").exists()
    journal = out / ".controlkit/pairs/journal.jsonl"
    journal.write_text(journal.read_text() + '{"key": "image5", "na')  # as a killed process leaves it
    stood = {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
    report = make_pairs(images, out, CANNY_AND_NOISE, workers=1)
    assert report.kept == 3 and report.made == 3
    assert all(path.stat().st_mtime_ns == before for path, before in stood.items())
    make_pairs(images, tmp_path / "clean", CANNY_AND_NOISE, workers=1)
    assert contents(out) == contents(tmp_path / "clean")


def test_a_killed_process_of_the_pool_costs_nothing(tmp_path):
    write_images(tmp_path / "in", 24)
    images = list_images([tmp_path / "in"])
    killed, ended = threading.Event(), threading.Event()

    def kill_one():
        while not (killed.is_set() or ended.is_set()):
            children = multiprocessing.active_children()
            if children and list((tmp_path / "out").glob("canny/*.png")):
                os.kill(children[0].pid, signal.SIGKILL)
                killed.set()
            time.sleep(0.002)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        report = make_pairs(images, tmp_path / "out", CANNY_AND_NOISE, workers=2)
    finally:
        ended.set()
        thread.join()
    assert killed.is_set() and report.made == 24
    make_pairs(images, tmp_path / "clean", CANNY_AND_NOISE, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_shards_are_the_same_bytes_every_time_and_hold_the_same_pairs(tmp_path):
    write_images(tmp_path / "in", 5)
    images = list_images([tmp_path / "in"])
    for name, workers in (("one", 1), ("two", 2)):
        make_pairs(images, tmp_path / name, CANNY_AND_NOISE, workers=workers, shards=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == ["pairs-00000-of-00002.tar", "pairs-00001-of-00002.tar"]
    names = [piece.name for piece in members(tmp_path / "one/pairs-00000-of-00002.tar")]
    assert names[:5] == [f"image0.{end}" for end in ("png", "canny.png", "noise.png", "txt", "json")]
    make_pairs(images, tmp_path / "files", CANNY_AND_NOISE, workers=1)
    both = (read_pairs(tmp_path / name, "noise") for name in ("one", "files"))
    for in_shard, in_files in zip(*both, strict=True):
        assert in_shard.prompt == in_files.prompt and in_shard.key() == in_files.key()
    report = make_pairs(images, tmp_path / "one", CANNY_AND_NOISE, workers=1, shards=2)
    assert (report.made, report.kept) == (0, 5)
    # Shards are images to make pairs of, too.
    again = make_pairs(list_images([tmp_path / "one"]), tmp_path / "again", CANNY_AND_NOISE, workers=1)
    assert [entry["prompt"] for entry in lines(again)] == [f"scene {n}" for n in range(5)]


@pytest.mark.parametrize("name", ["shards.tar", "part/table.parquet"])
def test_a_folder_of_images_and_shards_is_refused(name, tmp_path):
    (image,) = write_images(tmp_path / "in", 1)
    shard = tmp_path / "in" / name
    shard.parent.mkdir(exist_ok=True)
    write_archive(shard, {"a.png": encoded(scene(0))})
    with refused("contradiction", tmp_path / "in", image, shard):
        list_images([tmp_path / "in"])
    assert len(list_images([image])) == 1


def test_captions_in_a_table_and_earlier_output_are_no_shards_among_images(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 2, captions=False)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"file_name": ["image0.png"], "text": ["a caption"]})
    parquet.write_table(table, folder / "metadata.parquet")
    (folder / "out").mkdir()
    write_archive(folder / "out" / "shard.tar", {"a.png": encoded(scene(0))})
    assert [image.caption() for image in list_images([folder], without=folder / "out")] == ["a caption", ""]


def test_entries_of_a_caption_table_that_cannot_be_read_are_refused(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, 2, captions=False)
    good = '{"file_name": "image0.png", "text": "a caption"}'
    (folder / "metadata.jsonl").write_text(good + '\n{"file_name": "image1.png", "text": "broken}\n')
    with refused("bad-data", folder / "metadata.jsonl", "line 2"):
        list_images([folder])
    (folder / "metadata.jsonl").write_text(good)
    assert [image.caption() for image in list_images([folder])] == ["a caption", ""]


def test_images_come_from_folders_globs_tars_and_coco(tmp_path):
    paths = write_images(tmp_path / "in/deep", 3)
    (tmp_path / "in/.hidden").mkdir()
    write_images(tmp_path / "in/.hidden", 1)
    assert [p.key for p in list_images([tmp_path / "in"])] == [f"deep/image{n}" for n in range(3)]
    assert len(list_images([tmp_path / "in/**/*.png"])) == 3
    assert len(list_images([tmp_path / "in/deep", tmp_path / "in/deep/image1.png"])) == 3
    tar = write_archive(tmp_path / "a.tar", {"x/1.jpg": encoded(scene(1), "JPEG"), "x/1.txt": b"one", "note.md": b""})
    (found,) = list_images([tar])
    assert (found.key, found.caption()) == ("x/1", "one")
    coco = {
        "images": [{"id": n, "file_name": path.name, "width": 48, "height": 48} for n, path in enumerate(paths)],
        "annotations": [{"id": 7, "image_id": 1, "caption": " two\n words "}, {"id": 9, "image_id": 1, "caption": "b"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    listed = list_images([tmp_path / "captions.json"], images=tmp_path / "in/deep")
    assert [image.caption() for image in listed] == ["", "two words", ""]
    assert InputImage.from_json(json.loads(json.dumps(listed[1].to_json()))) == listed[1]
    with refused("contradiction", tmp_path / "in", "--out"):
        list_images([tmp_path / "in"], without=tmp_path / "in")
    for missing in ("none", "none/*.png"):
        with refused("missing-file", tmp_path / missing):
            list_images([tmp_path / missing])


def test_annotations_are_drawn_before_the_crop(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(scene(0, 40, 80)).save(tmp_path / "in/a.png")
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 40, 40]}
    coco = {"images": [{"id": 0, "file_name": "a.png", "width": 80, "height": 40}], "annotations": [box]}
    (tmp_path / "in/instances.json").write_text(json.dumps(coco))
    images = list_images([tmp_path / "in/instances.json"])
    made = make_pair(images[0], MakeSettings(conditions=("bbox",), size=20))
    image = np.asarray(to_rgb(decode_image(made.conditions["bbox"], "bbox")))
    assert image.shape == (20, 20, 3) and image[:, :10].any(axis=2).all() and not image[:, 10:].any()
    with refused("missing-companion", "bbox", "instances"):
        make_pairs(list_images([tmp_path / "in/a.png"]), tmp_path / "out", MakeSettings(conditions=("bbox",)))


def test_names_that_meet_get_different_keys(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.jpg", "a b.png", "a.b.png"):
        Image.fromarray(scene(len(name))).save(tmp_path / "in" / name)
    keys = [image.key for image in list_images([tmp_path / "in"])]
    assert len(set(keys)) == 4 and not any("." in key or " " in key for key in keys)


MODES = ["RGB", "L", "P", "RGBA", "LA", "I;16", "1"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(MODES),
    width=st.integers(16, 90) | st.sampled_from([500, 2000]),
    height=st.integers(16, 90),
    turn=st.sampled_from([1, 3, 6, 8]),
    size=st.sampled_from([None, 16, 64]),
    buckets=st.booleans(),
)
def test_images_of_every_kind_become_pairs(tmp_path, mode, width, height, turn, size, buckets):
    image = Image.fromarray(scene(width + height, height, width))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "x.png"
    image.save(path, exif=exif)
    wanted = read_image(path)
    piece = next(members(write_archive(tmp_path / "x.tar", {"x.png": path.read_bytes()})))
    assert np.array_equal(np.asarray(open_image(piece)), np.asarray(wanted))
    setting = MakeSettings(conditions=("canny", "palette"), size=size, buckets=buckets)
    made = make_pair(InputImage(key="x", name="x.png", source=path), setting)
    assert tuple(made.entry["size"]) == setting.target_size(*wanted.size)
    for data in made.conditions.values():
        assert list(to_rgb(decode_image(data, "x")).size) == made.entry["size"]
    if size is None and not buckets:
        kept = wanted if made.image is None else to_rgb(decode_image(made.image, "x"))
        assert np.array_equal(np.asarray(kept), np.asarray(wanted))


def jpeg(pixels, **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="JPEG", **options)
    return stream.getvalue()


@settings(max_examples=60)
@given(
    number=st.integers(0, 1000),
    width=st.integers(16, 70),
    height=st.integers(16, 70),
    grey=st.booleans(),
    quality=st.integers(5, 100),
    subsampling=st.sampled_from([0, 1, 2]),
    progressive=st.booleans(),
    restart=st.integers(0, 3),
    turn=st.sampled_from([None, 1, 6]),
)
def test_jpeg_files_have_the_same_pixels_as_everywhere_else(
    number, width, height, grey, quality, subsampling, progressive, restart, turn
):
    pixels = scene(number, height, width)
    noise = np.random.default_rng(number).integers(0, 40, pixels.shape, np.uint8)
    pixels = np.maximum(pixels, noise)
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive, "exif": exif}
    data = jpeg(pixels[..., 0] if grey else pixels, restart_marker_blocks=restart, **options)
    found, plain = decode_pixels(data, "x")
    assert np.array_equal(found, np.asarray(to_rgb(decode_image(data, "x"))))
    assert plain == (turn != 6) and not found.flags.writeable
    # Truncated files stay errors, wherever they are cut; OpenCV alone would fill the rest with grey.
    with refused("bad-image", "x is"):
        decode_pixels(data[: 2 + number * (len(data) - 40) // 1000], "x")


@settings(max_examples=100)
@given(
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3), number=st.integers(0, 9)
)
@example(places=[(0.9, 0xFF), (0.9, 0xDF)], number=0)
def test_damaged_jpeg_files_are_errors_or_pixels_as_everywhere_else(places, number):
    data = bytearray(jpeg(scene(number, 60, 80), quality=95))
    for offset, (place, value) in enumerate(places):
        data[2 + round(place * (len(data) - 10)) + offset] = value
    try:
        expected = np.asarray(to_rgb(decode_image(bytes(data), "x")))
    except UserError as error:
        with refused("bad-image", error):
            decode_pixels(bytes(data), "x")
    else:
        assert np.array_equal(decode_pixels(bytes(data), "x")[0], expected)


def test_plain_jpeg_files_go_the_fast_way(monkeypatch):
    monkeypatch.setattr("controlkit.data.sources.decode_image", lambda *_: pytest.fail("slow"))
    for number in range(5):
        data = jpeg(scene(number, 60, 80), quality=90, subsampling=number % 3)
        pixels, plain = decode_pixels(data, "x")
        assert plain and np.array_equal(pixels, np.asarray(to_rgb(decode_image(data, "x"))))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_jpeg_files_that_are_not_plain_are_read_as_everywhere_else():
    cmyk = io.BytesIO()
    Image.fromarray(scene(1)).convert("CMYK").save(cmyk, format="JPEG")
    plain = jpeg(scene(1))
    broken_exif = jpeg(scene(1), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03")
    no_exif = jpeg(scene(1), exif=b"Exif\0\0rubbish")
    for data, is_plain in (
        (cmyk.getvalue(), False),
        (plain, True),
        (plain + b"\0" * 30, True),
        (broken_exif, True),
        (no_exif, True),
    ):
        found, found_plain = decode_pixels(data, "x")
        assert found_plain == is_plain
        assert np.array_equal(found, np.asarray(to_rgb(decode_image(data, "x"))))
    with refused("bad-image", "0 bytes"):
        decode_pixels(b"", "x")
    with refused("bad-image", "x is"):
        decode_pixels(b"\xff\xd8\xff\xe0" + b"\xff\xd9", "x")


def test_images_of_another_colour_space_are_made_srgb_and_those_of_srgb_kept(tmp_path, monkeypatch):
    for name, profile in (("adobe.jpg", ADOBE_RGB), ("srgb.jpg", SRGB)):
        Image.new("RGB", (32, 32), (60, 180, 60)).save(tmp_path / name, quality=100, subsampling=0, icc_profile=profile)
        data = (tmp_path / name).read_bytes()
        found, plain = decode_pixels(data, "x")
        assert np.array_equal(found, np.asarray(to_rgb(decode_image(data, "x")))) and plain == (profile == SRGB)
        piece = next(members(write_archive(tmp_path / "x.tar", {"x.jpg": data})))
        assert np.array_equal(np.asarray(open_image(piece)), found)
        made = make_pair(InputImage(key="x", name=name, source=tmp_path / name), MakeSettings(conditions=("palette",)))
        assert (made.image is None) == (profile == SRGB)
        wanted = (0, 181, 42) if profile == ADOBE_RGB else (60, 180, 60)
        for image in filter(None, (made.image, made.conditions["palette"])):
            assert to_rgb(decode_image(image, "x")).getpixel((9, 9)) == pytest.approx(wanted, abs=2)
    monkeypatch.setattr("controlkit.data.sources.decode_image", lambda *_: pytest.fail("slow"))
    decode_pixels((tmp_path / "srgb.jpg").read_bytes(), "x")


def test_files_go_where_they_belong_also_where_folders_vanish(tmp_path):
    paths = write_images(tmp_path / "in", 3)
    images = list_images([tmp_path / "in"])
    (tmp_path / "link").symlink_to(tmp_path / "out", target_is_directory=True)
    (tmp_path / "out").mkdir()

    def remove(done, total):
        shutil.rmtree(tmp_path / "out/canny", ignore_errors=True)
        shutil.rmtree(tmp_path / "out/.controlkit/pairs/aside", ignore_errors=True)

    report = make_pairs(images, tmp_path / "link", MakeSettings(conditions=("canny",)), workers=1, progress=remove)
    assert [(tmp_path / "out" / entry["picture"]).resolve() for entry in lines(report)] == paths
    report = make_pairs(images, tmp_path / "link", MakeSettings(conditions=("canny",)), workers=1)
    assert len(read_pairs(tmp_path / "out")) == 3
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/canny").write_text("a file in the way")
    with refused("write-failed", tmp_path / "blocked/canny"):
        make_pairs(images, tmp_path / "blocked", MakeSettings(conditions=("canny",)), workers=1)


@given(number=st.integers(0, 1000), grey=st.booleans())
def test_png_keeps_every_pixel(number, grey):
    pixels = scene(number, 20, 30)
    pixels = np.repeat(pixels[..., :1], 3, axis=2) if grey else pixels
    image = decode_image(png(pixels), "x")
    assert image.mode == ("L" if grey else "RGB")
    assert np.array_equal(np.asarray(to_rgb(image)), pixels)


def same_time(*paths):
    """Give files one modification time, as an unpacked archive has."""
    for path in paths:
        os.utime(path, (1.7e9, 1.7e9))


def write_bitmaps(folder, count=3):
    """Images and captions of one size in bytes and one modification time."""
    folder.mkdir()
    paths = [folder / f"{number}.bmp" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(scene(number)).save(path)
        path.with_suffix(".txt").write_text(f"scene {number}")
        same_time(path, path.with_suffix(".txt"))
    return paths


@pytest.mark.parametrize("shards", [None, 1])
def test_images_that_were_exchanged_are_made_again(tmp_path, shards):
    first, second, _ = write_bitmaps(tmp_path / "in")

    def go():
        return make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1, shards=shards)

    go()
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    report = go()
    assert report.made == (2 if shards is None else 3)
    for pair, number in zip(read_pairs(tmp_path / "out", "noise"), (1, 0, 2), strict=True):
        assert np.array_equal(pair.images(32)[1], Image.fromarray(scene(number)).resize((32, 32), Image.LANCZOS))
    assert go().made == 0


def test_an_image_that_takes_the_key_of_another_is_made(tmp_path):
    (path,) = write_bitmaps(tmp_path / "in", 1)
    make_pairs(list_images([path.parent]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    Image.fromarray(scene(5)).save(tmp_path / "in/0.BMP", format="BMP")
    same_time(tmp_path / "in/0.BMP")
    report = make_pairs(list_images([path.parent]), tmp_path / "out", CANNY_AND_NOISE, workers=1)
    assert report.made == 2
    for entry in lines(report):
        digest = hashlib.sha256((tmp_path / "in" / entry["original"]["name"]).read_bytes()).hexdigest()
        assert entry["original"]["sha256"] == digest


@pytest.mark.parametrize("shards", [None, 2])
def test_pairs_of_copied_images_are_kept(tmp_path, shards):
    write_images(tmp_path / "in", 3)

    def go(conditions=("canny", "noise")):
        settings = MakeSettings(conditions=conditions, size=32)
        return make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1, shards=shards)

    report = go()
    if shards is None:
        report.out.write_text(report.out.read_text().replace("scene 0", "edited by hand"))
    shutil.copytree(tmp_path / "in", tmp_path / "copy")  # other times
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "copy").rename(tmp_path / "in")
    before = contents(tmp_path / "out")
    report = go()
    assert (report.made, report.kept) == (0, 3)
    assert contents(tmp_path / "out") == before
    if shards is None:
        (tmp_path / "in/image0.png").chmod(0o600)
        assert go(("canny", "noise", "palette")).made == 3
        assert lines(report)[0]["prompt"] == "edited by hand"


@pytest.mark.parametrize("shards", [None, 1])
def test_pairs_recorded_by_earlier_versions_are_kept_where_the_image_is_the_same(tmp_path, shards):
    write_bitmaps(tmp_path / "in")
    images = list_images([tmp_path / "in"])
    out = tmp_path / "out"
    make_pairs(images, out, CANNY_AND_NOISE, workers=1, shards=shards)

    def as_before(record):
        (image,) = (image for image in images if image.key == record["key"])
        return {
            **{name: record[name] for name in ("key", "name", "entry", "files", "error", "note")},
            "stamp": image.former_stamp(),
        }

    state = out / ".controlkit/pairs"
    if shards is None:
        records = map(json.loads, (state / "journal.jsonl").read_text().splitlines())
        (state / "journal.jsonl").write_text("".join(json.dumps(as_before(record)) + "\n" for record in records))
    else:
        (path,) = state.glob("pairs-*.json")
        record = json.loads(path.read_text())
        outcomes = [as_before(outcome) for outcome in record["outcomes"]]
        job = ShardJob(images=images, settings=CANNY_AND_NOISE, path=out / "pairs-00000-of-00001.tar")
        job.write_record([Outcome(**outcome) for outcome in outcomes])
    assert make_pairs(images, out, CANNY_AND_NOISE, workers=1, shards=shards).made == 0
    Image.fromarray(scene(7)).save(tmp_path / "in/0.bmp")
    same_time(tmp_path / "in/0.bmp")
    assert make_pairs(images, out, CANNY_AND_NOISE, workers=1, shards=shards).made == (1 if shards is None else 3)


def turned_photo(folder, orientation):
    """A white object on black in a photo of 120 x 60 pixels with an EXIF rotation, and COCO's list of it."""
    folder.mkdir()
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[10:30, 80:110] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "a.jpg", exif=exif, quality=95)
    corners = [80, 10, 110, 10, 110, 30, 80, 30]
    objects = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [80, 10, 30, 20], "segmentation": [corners]}]
    return objects


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("scale", [1, 2])
def test_objects_of_turned_photos_are_drawn_where_they_are(tmp_path, orientation, scale):
    objects = turned_photo(tmp_path / "in", orientation)
    for entry in objects:  # the list may be of a larger version of the photo
        entry["bbox"] = [scale * side for side in entry["bbox"]]
        entry["segmentation"] = [[scale * side for side in entry["segmentation"][0]]]
    listed = {"images": [{"id": 0, "file_name": "a.jpg", "width": 120 * scale, "height": 60 * scale}]}
    path = tmp_path / "in/instances.json"
    path.write_text(json.dumps({**listed, "annotations": objects}))
    shown = np.asarray(read_image(tmp_path / "in/a.jpg")).min(axis=2) > 128
    settings = MakeSettings(conditions=("bbox", "segments"))
    make_pairs(list_images([path]), tmp_path / "out", settings, workers=1)
    for name in settings.conditions:
        for source in (read_pairs(tmp_path / "out", name)[0].source, read_pairs(path, name)[0].source):
            drawn = np.asarray(open_image(source)).any(axis=2)
            assert drawn.shape == shown.shape and (drawn == shown).mean() > 0.99


@pytest.mark.parametrize("orientation", [1, 6])
def test_annotations_of_an_image_of_another_shape_are_refused(tmp_path, orientation):
    objects = turned_photo(tmp_path / "in", orientation)
    path = tmp_path / "in/instances.json"
    Image.fromarray(scene(0, 60, 120)).save(tmp_path / "in/b.png")
    objects += [{**objects[0], "id": 2, "image_id": 1}]
    images = [
        {"id": 0, "file_name": "a.jpg", "width": 100, "height": 100},
        {"id": 1, "file_name": "b.png", "width": 120, "height": 60},
    ]
    path.write_text(json.dumps({"images": images, "annotations": objects}))
    report = make_pairs(list_images([path]), tmp_path / "out", MakeSettings(conditions=("bbox",)), workers=1)
    assert report.made == 1 and "100 x 100" in report.skipped["a.jpg"]
    with refused("bad-data", "1 problems", "a.jpg:", "100 x 100"):
        read_pairs(path, "bbox")


@pytest.mark.parametrize("shards", [None, 2])
def test_pairs_are_made_again_when_a_condition_changed(tmp_path, monkeypatch, shards):
    write_images(tmp_path / "in", 3)

    def made():
        images = list_images([tmp_path / "in"])
        return make_pairs(images, tmp_path / "out", CANNY_AND_NOISE, workers=1, shards=shards).made

    assert [made(), made()] == [3, 0]
    monkeypatch.setitem(vars(find("noise")), "revision", "another")
    assert [made(), made()] == [3, 0]


@pytest.mark.parametrize("shards", [None, 1])
def test_an_image_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch, shards):
    write_images(tmp_path / "in", 3)
    (tmp_path / "in/image0.png").write_bytes(b"no image")
    (tmp_path / "in/image1.png").rename(tmp_path / "away.png")
    (tmp_path / "in/image1.png").symlink_to(tmp_path / "later.png")

    def go():
        return make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", CANNY_AND_NOISE, workers=1, shards=shards)

    assert (go().made, sorted(go().skipped)) == (1, ["image0.png", "image1.png"])

    def offline(self):
        raise OSError("stale file handle")

    with monkeypatch.context() as patch:  # a disk that fails for a moment changes no stamp
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "in/image1.png").unlink()
        (tmp_path / "away.png").rename(tmp_path / "in/image1.png")
        real = type(tmp_path).read_bytes
        patch.setattr(type(tmp_path), "read_bytes", lambda p: (offline if p.name == "image1.png" else real)(p))
        assert sorted(go().skipped) == ["image0.png", "image1.png"]
    report = go()
    assert len(read_pairs(tmp_path / "out", "canny")) == 2 and sorted(report.skipped) == ["image0.png"]
    # A file that is no image does not cost its shard in every run.
    assert go().made == 0


def test_an_unexpected_error_of_one_image_costs_only_this_image(tmp_path, monkeypatch):
    write_images(tmp_path / "in", 3)
    real = find("canny").function

    def fails(image, **parameters):
        if np.array_equal(image, read_image(tmp_path / "in/image1.png").resize((32, 32), Image.LANCZOS)):
            raise RuntimeError("the detector is confused")
        return real(image, **parameters)

    monkeypatch.setitem(vars(find("canny")), "function", fails)
    for shards in (None, 1):
        out = tmp_path / f"out{shards}"
        report = make_pairs(list_images([tmp_path / "in"]), out, CANNY_AND_NOISE, workers=1, shards=shards)
        assert report.made == 2
        assert report.skipped == {"image1.png": "RuntimeError: the detector is confused"}


@pytest.mark.parametrize("turn", [1, 6])
def test_tiles_of_a_photograph_that_is_read_scaled_down(tmp_path, monkeypatch, turn):
    # The photographs of telephones, in small: 67 megapixels would take this test a minute.
    monkeypatch.setattr("controlkit.images.MAX_PIXELS", 100 * 100)
    monkeypatch.setattr("controlkit.data.sources.MAX_PIXELS", 100 * 100)
    exif = Image.Exif()
    exif[0x0112] = turn
    (tmp_path / "in").mkdir()
    Image.fromarray(scene(0, 120, 160)).save(tmp_path / "in/a.jpg", exif=exif)
    settings = MakeSettings(conditions=("canny",), size=24, tiles=True)
    images = with_tiles(list_images([tmp_path / "in"]), 24)
    wanted = read_image(tmp_path / "in/a.jpg")
    assert wanted.size == ((80, 60) if turn == 1 else (60, 80)) and len(images) == 6
    report = make_pairs(images, tmp_path / "out", settings, workers=1)
    assert report.made == 6 and not report.skipped
    first = read_pairs(tmp_path / "out")[0].images(24)[1]
    left, top, side = images[0].tile
    assert np.array_equal(first, np.asarray(wanted)[top : top + side, left : left + side])
