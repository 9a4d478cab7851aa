"""What `controlkit pairs --check` finds, and what it must not find."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from pair_files import encoded, scene, write_archive, write_images
from PIL import Image

from controlkit.conditions import find
from controlkit.data.check import check_pairs, check_sheet
from controlkit.data.engine import make_pairs
from controlkit.data.input_images import list_images
from controlkit.data.making import MakeSettings
from controlkit.data.pairs import write_pairs
from controlkit.data.swap_check import find_swapped_sides
from refusals import refused

ABSTRACT = ("canny", "sketch", "scribble", "grayscale", "palette", "silhouette", "lines_lsd", "illusion")
DAMAGED = ("noise", "rain", "snow", "jpeg", "blur", "inpaint_brush", "shuffle", "pixel", "color_regions", "low_light")


@pytest.fixture
def made(tmp_path):
    write_images(tmp_path / "in", 6)
    settings = MakeSettings(conditions=("canny", "noise"), size=48, copy=True)
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "pairs", settings, workers=1)
    return tmp_path / "pairs"


def pairs_of(name, count=8, size=64):
    images = [scene(number, size, size) for number in range(count)]
    kind = find(name)
    return [(kind(p, **kind.random_parameters(np.random.default_rng(n))), p) for n, p in enumerate(images)]


def test_good_pairs_have_no_problems(made):
    report = check_pairs(made)
    assert (report.problems, report.notes, report.pairs) == ([], [], 6)
    assert report.conditions == ["canny", "noise"]
    assert check_sheet(report).width > 300


def test_everything_is_found_at_once(made):
    lines = [json.loads(line) for line in (made / "pairs.jsonl").read_text().splitlines()]
    (made / "canny/image0.png").unlink()
    (made / "noise/image1.png").write_bytes((made / "noise/image1.png").read_bytes()[:50])
    Image.fromarray(scene(2, 48, 24)).save(made / "canny/image2.png")
    shutil.copy(made / "pictures/image4.png", made / "pictures/image3.png")
    lines[5]["prompt"] = "  "
    (made / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{truncated\n")
    report = check_pairs(made, strict=True)
    found = {(problem.kind, problem.where) for problem in report.problems}
    assert {("file", "line 1"), ("file", "line 2"), ("size", "line 3"), ("changed", "line 3")} <= found
    assert {("changed", "line 4"), ("duplicate", "line 5"), ("not drawn", "line 4"), ("prompt", "line 6")} <= found
    assert ("entry", "line 7") in found
    assert sum(report.counts.values()) == len(report.problems)
    assert check_sheet(report).height > 200


def test_swapped_folders_of_a_manifest_are_certain(made):
    lines = [json.loads(line) for line in (made / "pairs.jsonl").read_text().splitlines()]
    for line in lines:
        line["picture"], line["conditions"] = line["conditions"]["canny"], {"canny": line["picture"]}
        del line["sha256"]
    (made / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = check_pairs(made)
    assert report.counts == {"swapped": 6}
    assert "certain" in report.problems[0].text


@pytest.mark.parametrize("name", ABSTRACT)
def test_swapped_sides_are_likely_where_a_condition_leaves_much_out(name):
    pairs = pairs_of(name)
    assert find_swapped_sides(pairs) is None
    verdict = find_swapped_sides([(target, source) for source, target in pairs])
    assert verdict is not None and verdict.certainty == "likely"


@pytest.mark.parametrize("name", DAMAGED)
def test_conditions_that_add_something_are_never_called_swapped(name):
    verdict = find_swapped_sides(pairs_of(name))
    assert verdict is None or verdict.certainty == "possible"


def test_a_prompt_json_with_source_and_target_swapped(tmp_path):
    write_pairs(tmp_path, [(target, source, "x") for source, target in pairs_of("canny")])
    report = check_pairs(tmp_path)
    assert report.counts == {"swapped": 1} and "most likely" in report.problems[0].text
    write_pairs(tmp_path, [(source, target, "x") for source, target in pairs_of("canny")])
    assert check_pairs(tmp_path).problems == []


def test_too_few_pairs_give_no_verdict():
    assert find_swapped_sides([(target, source) for source, target in pairs_of("canny", 3)]) is None


def test_one_condition_can_be_checked_alone(made):
    (made / "noise/image1.png").unlink()
    assert check_pairs(made, ["canny"]).problems == []
    assert check_pairs(made, ["noise"]).counts == {"file": 1}
    with refused("unknown-name", made, "'depth'", "canny, noise"):
        check_pairs(made, ["canny", "depth"])


def test_shards_of_other_tools_may_say_anything_in_their_json(tmp_path):
    for strange in ({"sha256": "ab", "parameters": 3}, {"sha256": {"conditions": []}}, {"parameters": {"canny": "x"}}):
        files = {"1.png": encoded(scene(1)), "1.canny.png": encoded(find("canny")(scene(1)))}
        write_archive(tmp_path / "a.tar", {**files, "1.json": json.dumps({"caption": "x", **strange}).encode()})
        assert check_pairs(tmp_path / "a.tar").problems == []


def test_shards_of_ours_are_checked_like_the_manifest(tmp_path):
    write_images(tmp_path / "in", 4)
    settings = MakeSettings(conditions=("canny",))
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1, shards=1)
    assert check_pairs(tmp_path / "out").problems == []
    (path,) = (tmp_path / "out").glob("*.tar")
    data = path.read_bytes()
    at = data.index(b"IDAT", data.index(b"image2.canny.png")) + 20
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    (problem,) = check_pairs(tmp_path / "out").problems
    assert "image2" in problem.where and problem.kind in ("file", "changed")


def test_inverted_edges_are_noted(tmp_path):
    write_pairs(tmp_path / "pairs", [(255 - source, target, "x") for source, target in pairs_of("canny")])
    report = check_pairs(tmp_path / "pairs", ["canny"])
    assert any("canny" in note and "8 images" in note and "inverted" in note for note in report.notes)
    write_pairs(tmp_path / "good", [(source, target, "x") for source, target in pairs_of("canny")])
    assert not any("inverted" in note for note in check_pairs(tmp_path / "good", ["canny"]).notes)
    # A silhouette may fill its image.
    filled = np.full((64, 64, 3), 255, np.uint8)
    filled[:9] = 0
    write_pairs(tmp_path / "filled", [(filled, scene(n, 64, 64), "x") for n in range(4)])
    assert not any("inverted" in note for note in check_pairs(tmp_path / "filled", ["silhouette"]).notes)


def test_segmentation_maps_of_indices_are_noted(tmp_path):
    labels = np.arange(64 * 64).reshape(64, 64) // 512 % 150
    palette = find("seg").palette
    for name, source in (
        ("indices", np.repeat(labels[..., None], 3, axis=2).astype(np.uint8)),
        ("map", palette[labels]),
    ):
        write_pairs(tmp_path / name, [(source, scene(n, 64, 64), "x") for n in range(4)])
    (note,) = (note for note in check_pairs(tmp_path / "indices", ["seg"]).notes if "colours" in note)
    assert "4 images" in note and "line 1" in note
    assert not any("colours" in note for note in check_pairs(tmp_path / "map", ["seg"]).notes)
