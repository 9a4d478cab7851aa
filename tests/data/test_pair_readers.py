"""Every layout gives the same pairs, and all problems are reported at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from pair_files import encoded, scene, write_archive, write_images
from PIL import Image, features

from controlkit.conditions import find
from controlkit.data.check import check_pairs
from controlkit.data.engine import make_pairs
from controlkit.data.input_images import list_images, with_tiles
from controlkit.data.making import MakeSettings
from controlkit.data.multigen import MultiGen
from controlkit.data.pairs import Pair, load_pairs, pairs_folder, read_pairs, split_pairs, write_pairs
from controlkit.data.sources import members, read_condition_image
from controlkit.files import sha256_of
from refusals import refused

COUNT = 5
CANNY = find("canny")


def example(number: int) -> tuple[np.ndarray, np.ndarray, str]:
    image = scene(number)
    return CANNY(image), image, f"scene {number}"


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def lay_out(layout, root):
    """The five pairs of `example` in a layout; returns the path to read."""
    root.mkdir(parents=True, exist_ok=True)
    _LAYOUTS[layout](root, [example(number) for number in range(COUNT)])
    return root


def lay_prompt_json(root, pairs):
    assert write_pairs(root, pairs) == COUNT


def lay_metadata(folder, pairs, kind="jsonl"):
    rows = [("file_name", "conditioning_image", "text")]
    for number, (source, target, prompt) in enumerate(pairs):
        save(folder / f"images/{number}.png", target)
        save(folder / f"conditioning_images/{number}.png", source)
        rows.append((f"images/{number}.png", f"conditioning_images/{number}.png", prompt))
    as_csv = [",".join(row) for row in rows]
    as_json = [json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:]]
    if kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True))
        parquet.write_table(arrow.table(columns), folder / "metadata.parquet")
        return
    (folder / f"metadata.{kind}").write_text("\n".join(as_csv if kind == "csv" else as_json))


def lay_array(root, pairs, name="prompt.json", indent=None):
    """The table of `write_pairs` as a JSON array."""
    lay_prompt_json(root, pairs)
    lines = (root / "prompt.json").read_text().splitlines()
    (root / "prompt.json").unlink()
    (root / name).write_text(json.dumps([json.loads(line) for line in lines], indent=indent))


def lay_saved(root, pairs):
    saved_dataset(pairs).save_to_disk(root)


def saved_dataset(pairs):
    """A `datasets.Dataset` with the pairs in its cells."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "image": [{"bytes": encoded(target), "path": None} for _, target, _ in pairs],
        "conditioning_image": [{"bytes": encoded(source), "path": None} for source, _, _ in pairs],
        "text": [prompt for _, _, prompt in pairs],
    }
    kinds = {"image": datasets.Image(), "conditioning_image": datasets.Image(), "text": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def lay_twins(root, pairs, home="pictures"):
    for number, (source, target, prompt) in enumerate(pairs):
        save(root / home / f"{number}.png", target).with_suffix(".txt").write_text(prompt + "\n")
        save(root / f"conditioning/{number}.png", source)


def lay_tar(root, pairs):
    for shard in range(2):
        files = {}
        for number in range(shard, COUNT, 2):
            source, target, prompt = pairs[number]
            key = f"{number:04d}"
            files |= {f"{key}.png": encoded(target), f"{key}.cond.png": encoded(source)}
            text = {f"{key}.txt": prompt.encode()}
            files |= text if number % 3 else {f"{key}.json": json.dumps({"caption": prompt}).encode()}
        write_archive(root / f"{shard}.tar", files)


def lay_parquet(root, pairs):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {
        "image": [{"bytes": encoded(target), "path": None} for _, target, _ in pairs],
        "conditioning_image": [{"bytes": encoded(source), "path": "x.png"} for source, _, _ in pairs],
        "text": [prompt for _, _, prompt in pairs],
    }
    (root / "data").mkdir()
    parquet.write_table(arrow.table(columns), root / "data" / "train-00000-of-00001.parquet", row_group_size=2)


def lay_multigen(root, pairs):
    lines = []
    for number, (source, target, prompt) in enumerate(pairs):
        save(root / f"images/a/{number}.png", target)
        save(root / f"conditions/c/{number}.png", source)
        entry = {"source": f"./a/{number}.png", "control_canny": f"c/{number}.png", "prompt": prompt}
        lines.append(json.dumps(entry))
    (root / "json_files").mkdir()
    (root / "json_files" / "aesthetics_plus_all_group_canny_all.json").write_text("\n".join(lines))


def lay_coco(root, pairs):
    images, annotations = [], []
    for number, (_, target, prompt) in enumerate(pairs):
        save(root / f"val2017/{number:012d}.png", target)
        images.append({"id": number, "file_name": f"{number:012d}.png", "width": 48, "height": 48})
        annotations += [{"id": 2 * number + 1, "image_id": number, "caption": "second"}]
        annotations += [{"id": 2 * number, "image_id": number, "caption": prompt}]
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_val2017.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations})
    )


_LAYOUTS = {
    "prompt.json": lay_prompt_json,
    "metadata.jsonl": lay_metadata,
    "metadata.csv": lambda root, pairs: lay_metadata(root, pairs, "csv"),
    "metadata.parquet": lambda root, pairs: lay_metadata(root, pairs, "parquet"),
    "array": lay_array,
    "array of another name": lambda root, pairs: lay_array(root, pairs, "data.json", indent=1),
    "save_to_disk": lay_saved,
    "train/metadata.jsonl": lambda root, pairs: lay_metadata(root / "train", pairs),
    "twins": lay_twins,
    "twins beside": lambda root, pairs: lay_twins(root, pairs, "."),
    "tar": lay_tar,
    "parquet": lay_parquet,
    "multigen": lay_multigen,
    "coco": lay_coco,
}


@pytest.mark.parametrize("layout", _LAYOUTS)
def test_every_layout_gives_the_same_pairs(layout, tmp_path):
    path = lay_out(layout, tmp_path / "pairs")
    for _ in range(2):
        pairs = sorted(read_pairs(path, "canny"), key=lambda pair: pair.prompt)
        assert [pair.prompt for pair in pairs] == [f"scene {number}" for number in range(COUNT)]
        for number, pair in enumerate(pairs):
            source, target = pair.images(48)
            assert source.dtype == np.uint8 and source.shape == (48, 48, 3)
            assert np.array_equal(target, example(number)[1])
            assert np.array_equal(source, example(number)[0])
    assert len({pair.key() for pair in pairs}) == COUNT
    trained, held_out = split_pairs(pairs)
    assert len(trained) == COUNT - 1 and len(held_out) == 1


@pytest.mark.parametrize("layout", ["prompt.json", "metadata.jsonl", "metadata.csv", "tar", "parquet", "coco"])
def test_a_single_file_is_read_as_its_folder_is(layout, tmp_path):
    root = lay_out(layout, tmp_path / "pairs")
    if layout == "tar":
        files = [root / "*.tar"]
        assert len(read_pairs(root / "0.tar")) == 3
    else:
        files = [path for path in root.rglob("*.*") if path.suffix in (".json", ".jsonl", ".csv", ".parquet")]
    (path,) = files
    assert len(read_pairs(path, "canny")) == COUNT
    assert pairs_folder(path) == path.parent


def test_the_plain_pair_is_as_it_was(tmp_path):
    write_pairs(tmp_path, [example(0)])
    pair = Pair(source=tmp_path / "source/00000.png", target=tmp_path / "target/00000.png", prompt="scene 0")
    assert read_pairs(tmp_path) == [pair]
    assert pair.key() == read_pairs(tmp_path / "prompt.json")[0].key()


def test_several_conditions_have_to_be_chosen_from(tmp_path):
    lines = []
    for number in range(3):
        save(tmp_path / f"p/{number}.png", scene(number))
        for name in ("canny", "palette"):
            save(tmp_path / f"{name}/{number}.png", find(name)(scene(number)))
        conditions = {name: f"{name}/{number}.png" for name in ("canny", "palette")}
        lines.append(json.dumps({"picture": f"p/{number}.png", "conditions": conditions, "prompt": "x"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    for chosen in ("palette", "color_palette"):
        source, _ = read_pairs(tmp_path, chosen)[1].images(48)
        assert np.array_equal(source, find("palette")(scene(1)))
    assert read_pairs(tmp_path / "palette") == read_pairs(tmp_path, "palette")
    for requested in (None, "identity"):
        with refused("missing-setting", "canny, palette", f"{tmp_path}/canny"):
            read_pairs(tmp_path, requested)
    with refused("unknown-name", "'cany'", "did you mean canny"):
        read_pairs(tmp_path, "cany")
    with refused("missing-file", tmp_path / "palete"):
        read_pairs(tmp_path / "palete")


def test_pairs_that_are_read_as_another_condition_than_they_record_say_so(tmp_path):
    write_images(tmp_path / "in", 2)
    settings = MakeSettings(conditions=("canny",), size=32)
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1)
    assert load_pairs(tmp_path / "out").notes == load_pairs(tmp_path / "out", "canny").notes == []
    assert load_pairs(tmp_path / "out", "identity").notes == []
    assert load_pairs(tmp_path / "out", "identity").recorded == "canny"
    (note,) = load_pairs(tmp_path / "out", "blur").notes
    assert "canny" in note and "blur" in note


def test_a_manifest_may_call_its_image_image(tmp_path):
    write_images(tmp_path / "in", 2)
    settings = MakeSettings(conditions=("canny",), size=32)
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1)
    expected = read_pairs(tmp_path / "out")
    manifest = tmp_path / "out/pairs.jsonl"
    manifest.write_text(manifest.read_text().replace('"picture"', '"image"'))
    assert read_pairs(tmp_path / "out") == expected == read_pairs(manifest)
    (tmp_path / "out/again.jsonl").write_bytes(manifest.read_bytes())
    assert read_pairs(tmp_path / "out/again.jsonl") == expected
    assert check_pairs(tmp_path / "out").problems == []
    shutil.copy(tmp_path / "out" / "pictures/image1.png", tmp_path / "out" / "pictures/image0.png")
    assert ("changed", "line 1") in {(p.kind, p.where) for p in check_pairs(tmp_path / "out").problems}


def test_conditions_of_a_tar_are_chosen_by_path_too(tmp_path):
    shard = {f"{n}.jpg": encoded(scene(n), "JPEG") for n in range(2)}
    shard |= {f"{n}.{name}.png": encoded(find(name)(scene(n))) for n in range(2) for name in ("canny", "palette")}
    write_archive(tmp_path / "shards" / "a.tar", shard)
    pairs = read_pairs(tmp_path / "shards" / "canny")
    assert np.array_equal(pairs[0].images(48)[0], CANNY(scene(0)))
    assert pairs_folder(tmp_path / "shards" / "canny") == tmp_path / "shards"


def test_coco_objects_become_condition_images(tmp_path):
    root = lay_out("coco", tmp_path)
    value = json.loads((root / "annotations/captions_val2017.json").read_text())
    box = {"id": 1, "image_id": 2, "category_id": 3, "bbox": [4, 8, 16, 24], "segmentation": [[4, 8, 20, 8, 20, 32]]}
    (root / "annotations/instances_val2017.json").write_text(json.dumps({**value, "annotations": [box]}))
    pairs = read_pairs(root / "annotations/instances_val2017.json", "bbox")
    assert pairs[2].prompt == "scene 2"
    source, _ = pairs[2].images(48)
    assert source[10:30, 6:18].any(axis=2).all() and not source[:8].any()
    assert not pairs[0].images(48)[0].any()
    assert read_pairs(root / "annotations/instances_val2017.json", "segments")[2].images(48)[0].any()
    # The folder has them, too, and what is computed from images.
    for name in ("bbox", "segments", "canny"):
        (pair,) = (pair for pair in read_pairs(root / name) if pair.prompt == "scene 2")
        assert pair.condition == name and pair.images(48)[0].any()
    assert np.array_equal(read_pairs(root / "canny")[2].images(48)[0], CANNY(scene(2)))


def test_everything_that_is_wrong_is_listed_at_once(tmp_path):
    lay_out("prompt.json", tmp_path)
    (tmp_path / "source/00001.png").unlink()
    (tmp_path / "target/00002.png").write_bytes((tmp_path / "target/00002.png").read_bytes()[:70])
    save(tmp_path / "target/00003.png", scene(3, 20, 48))
    with (tmp_path / "prompt.json").open("a") as stream:
        stream.write('{"source": "source/00000.png"}\n[1]\n')
    with refused("bad-data", "5 problems", *(f"line {line}:" for line in (2, 3, 4, 6, 7))):
        read_pairs(tmp_path)


@pytest.mark.parametrize(
    ("files", "code", "facts"),
    [
        ({"1.tar/1.cond.png": b"x"}, "bad-data", ["1.tar:1", "cond.png"]),
        (
            {"1.tar/a.png": b"x", "1.tar/a.cond.png": b""},
            "bad-data",
            ["1.tar:a.png is", "1.tar:a.cond.png is", "0 bytes"],
        ),
        (
            {"metadata.jsonl": b'{"file_name": "a.png", "text": "x"}'},
            "empty-data",
            ["metadata.jsonl", "controlkit pairs"],
        ),
        ({"prompt.json": b""}, "empty-data", ["prompt.json"]),
        ({"pairs.jsonl": b'{"image": 3}'}, "bad-data", ["line 1:", "image, conditions"]),
        ({"prompt.json": b'[{"source": 3, "target": "b.png", "prompt": "x"}]'}, "bad-data", ["entry 1: 'source' is 3"]),
        ({"prompt.json": b'{"source": "a.png"}'}, "bad-data", ["line 1: there is no 'target'"]),
        ({"prompt.json": b'[{"source": "a.png",\n}]'}, "damaged-file", ["prompt.json", "line 2"]),
        ({"metadata.parquet": b"PAR1 and no more"}, "damaged-file", ["metadata.parquet"]),
        ({"dataset_info.json": b"{}", "state.json": b"{"}, "damaged-file", ["save_to_disk"]),
        ({"a/1.png": b"", "b/1.png": b""}, "bad-data", ["a, b", "images"]),
        ({"1.png": b"", "2.png": b""}, "empty-data", ["controlkit pairs"]),
        ({"x.txt": b"hello"}, "wrong-kind", ["pairs.jsonl", "MultiGen-20M"]),
        ({"1.tar/": b""}, "damaged-file", ["1.tar"]),
        ({"1.parquet": b"PAR1 and then nothing"}, "damaged-file", ["1.parquet"]),
    ],
)
def test_what_is_no_layout_or_a_broken_one(files, code, facts, tmp_path):
    for name, data in files.items():
        path = tmp_path / name
        if ".tar/" in name and not name.endswith("/"):
            inside = {key.partition("/")[2]: value for key, value in files.items()}
            write_archive(path.parent, inside)
            break
        path = path if not name.endswith("/") else tmp_path / "1.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data or (b"not a tar" if name.endswith("/") else b""))
    with refused(code, tmp_path, *facts):
        read_pairs(tmp_path)


def test_twins_that_do_not_match_are_reported(tmp_path):
    root = lay_out("twins", tmp_path)
    (root / "conditioning/0.png").unlink()
    save(root / "conditioning/stray.png", scene(9))
    with refused("bad-data", "2 problems", "conditioning/stray.png:", "0.png: there is no condition image"):
        read_pairs(root)


def test_a_shard_that_was_cut_off_is_refused(tmp_path):
    files = {f"{n}.png": encoded(scene(n)) for n in range(3)} | {f"{n}.c.png": encoded(scene(n)) for n in range(3)}
    path = write_archive(tmp_path / "a.tar", files)
    path.write_bytes(path.read_bytes()[:3000])
    with refused("damaged-file", path):
        read_pairs(path)


def test_multigen_still_reads_single_lines(tmp_path):
    lines = MultiGen(lay_out("multigen", tmp_path), "canny")
    source, target, prompt = lines.pair(3, 48)
    assert np.array_equal(source, example(3)[0]) and np.array_equal(target, example(3)[1]) and prompt == "scene 3"


def test_transparent_condition_images_lie_over_the_background_of_their_condition(tmp_path):
    for number in range(2):
        edges, image = find("canny")(scene(number)), scene(number)
        white = np.dstack([np.full_like(edges, 255), edges[..., 0]])  # white lines on transparency
        for name, made in (("source", white), ("target", image)):
            save(tmp_path / f"{name}/{number}.png", made)
    pairs = read_pairs(tmp_path, "canny")
    assert all(np.array_equal(pair.images(48)[0], find("canny")(pair.images(48)[1])) for pair in pairs)
    assert not [problem for problem in check_pairs(tmp_path, ["canny"]).problems if problem.kind != "prompt"]
    # Where the condition draws on white, or is not known, the lines vanish.
    for name in ("sketch", None):
        assert all(replace(pair, condition=name).images(48)[0].min() == 255 for pair in pairs)
    archive = write_archive(tmp_path / "a.tar", {"a.png": encoded(white)})
    piece = next(members(archive))
    assert np.array_equal(np.asarray(read_condition_image(piece, "canny")), edges)
    multigen = lay_out("multigen", tmp_path / "multigen")
    save(multigen / "conditions/c/0.png", white)
    assert np.array_equal(MultiGen(multigen, "canny").pair(0, 48)[0], edges)


def test_a_plain_folder_of_images_gets_the_command_to_run(tmp_path):
    write_images(tmp_path)
    with refused("empty-data", f"controlkit pairs {tmp_path} --conditions canny"):
        read_pairs(tmp_path)


def test_a_problem_is_told_without_pythons_terms(tmp_path):
    entries = ['{"source": 3, "target": "a.png", "prompt": "x"}', '{"source": "x.png"}', "[1]", "3", "null", "{"]
    (tmp_path / "prompt.json").write_text("\n".join(entries))
    with refused("bad-data", *(f"line {number}:" for number in range(1, 7))) as caught:
        read_pairs(tmp_path)
    assert not any(word in str(caught.value) for word in ("Error(", "subscriptable", "unsupported operand", "indices"))


def test_a_saved_dataset_of_several_splits_has_to_be_chosen_from(tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = [example(number) for number in range(COUNT)]
    splits = {"train": saved_dataset(pairs), "test": saved_dataset(pairs[:2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    with refused("missing-setting", "train, test", f"{tmp_path}/train"):
        read_pairs(tmp_path)
    assert len(read_pairs(tmp_path / "test")) == 2


def test_a_dataset_of_the_hub_is_read_by_its_address(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pairs = [example(number) for number in range(COUNT)]
    for name, count in (("train", COUNT), ("test", 2)):
        saved_dataset(pairs[:count]).save_to_disk(tmp_path / name)
    splits = {name: datasets.load_from_disk(tmp_path / name) for name in ("train", "test")}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or splits)
    address = "hf://datasets/owner/name"
    with refused("missing-setting", "train, test", f"{address}/train"):
        read_pairs(address)
    assert [pair.prompt for pair in read_pairs(f"{address}/test")] == ["scene 0", "scene 1"]
    assert (read_pairs(f"{address}/train/conditioning")[3].images(48)[0] == CANNY(scene(3))).all()
    with refused("unknown-name", "'colour'", "conditioning"):
        read_pairs(f"{address}/train/colour")
    assert [image.prompt for image in list_images([f"{address}/test"])] == ["scene 0", "scene 1"]
    assert set(asked) == {"owner/name"}


def test_a_dataset_of_the_hub_that_cannot_be_had_is_refused(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused("download-failed", "owner/name", "HF_HUB_OFFLINE"):
        read_pairs("hf://datasets/owner/name")


@pytest.mark.parametrize("layout", ["parquet", "save_to_disk"])
def test_pairs_are_made_from_the_images_and_texts_of_tables(layout, tmp_path):
    path = lay_out(layout, tmp_path / "table")
    made = tmp_path / "made"
    report = make_pairs(list_images([path]), made, MakeSettings(conditions=("canny",), fixed=True), workers=1)
    assert report.made == COUNT and not report.skipped and not report.empty_prompts
    pairs = sorted(read_pairs(made, "canny"), key=lambda pair: pair.prompt)
    assert [pair.prompt for pair in pairs] == [f"scene {number}" for number in range(COUNT)]
    assert all((pair.images(48)[1] == scene(number)).all() for number, pair in enumerate(pairs))


def test_pairs_are_made_with_the_captions_of_a_table_of_the_image_folder(tmp_path):
    write_images(tmp_path / "a", 3, captions=False)
    lines = [{"file_name": f"a/image{number}.png", "text": f"scene {number}"} for number in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "a/image0.txt").write_text("beside")
    images = list_images([tmp_path])
    assert [image.caption() for image in images] == ["beside", "scene 1", ""]


def test_files_that_changed_since_the_pairs_were_made_are_listed(tmp_path):
    paths = write_images(tmp_path / "in", 4)
    out = tmp_path / "out"
    make_pairs(list_images([tmp_path / "in"]), out, MakeSettings(conditions=("canny", "palette")), workers=1)
    assert len(read_pairs(out, "canny")) == 4
    save(paths[0], scene(9))
    save(out / "canny/image2.png", CANNY(scene(9)))
    with refused("bad-data", "2 problems", f"line 1: {out}", "image0.png", "line 3:", "canny/image2.png", "sha256"):
        read_pairs(out, "canny")
    with refused("bad-data", "1 problems", "line 1:"):
        read_pairs(out, "palette")
    # Lines without hashes, as other tools write them, are taken as they are.
    lines = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    (out / "pairs.jsonl").write_text("\n".join(json.dumps({**line, "sha256": {}}) for line in lines))
    assert len(read_pairs(out, "canny")) == 4


def test_shards_of_ours_whose_bytes_changed_are_listed(tmp_path):
    write_images(tmp_path / "in", 2)
    settings = MakeSettings(conditions=("canny",))
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1, shards=1)
    (path,) = (tmp_path / "out").glob("*.tar")
    files = {member.name: member.read_bytes() for member in members(path)}
    write_archive(path, {**files, "image0.png": files["image1.png"]})
    with refused("bad-data", "1 problems", "image0.png"):
        read_pairs(path)


def hashed_split(pairs, share):
    """The split of pairs without tiles: by the hash of each original, or of each image."""
    ranked = sorted(pairs, key=lambda pair: sha256_of(pair.original or pair.target.read_bytes()))
    count = min(len(pairs) - 1, max(1, round(share * len(pairs))))
    return ranked[count:], ranked[:count]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_tiles_of_one_image_are_held_out_together_or_not_at_all(tmp_path, share):
    write_images(tmp_path / "in", 4, height=64, width=64)
    save(tmp_path / "in/small.png", scene(7, 40, 40))
    save(tmp_path / "in/wide.png", scene(8, 32, 512))
    settings = MakeSettings(conditions=("canny",), size=32, tiles=True)
    make_pairs(with_tiles(list_images([tmp_path / "in"]), 32), tmp_path / "out", settings, workers=1)
    pairs = read_pairs(tmp_path / "out")
    training, held_out = split_pairs(pairs, share)
    assert len(training) + len(held_out) == len(pairs) == 33
    assert 1 <= len(held_out) <= max(1, round(share * len(pairs)))
    assert not {pair.original for pair in training} & {pair.original for pair in held_out}
    # Tiles of a single image can only be split among themselves.
    training, held_out = split_pairs([pair for pair in pairs if pair.original == pairs[0].original], share)
    assert training and held_out


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_pairs_without_tiles_are_split_by_the_hash_of_each_image(tmp_path, share):
    write_images(tmp_path / "in", 12)
    shutil.copy(tmp_path / "in/image3.png", tmp_path / "in/copy.png")
    settings = MakeSettings(conditions=("canny",), size=32)
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1)
    pairs = read_pairs(tmp_path / "out")
    assert split_pairs(pairs, share) == hashed_split(pairs, share)
    pairs = [replace(pair, original=None) for pair in pairs]
    assert split_pairs(pairs, share) == hashed_split(pairs, share)


def test_pairs_made_again_hold_out_the_same_images(tmp_path):
    write_images(tmp_path / "in", 12, height=64, width=64)
    held_out = []
    for name, settings in (
        ("one", MakeSettings(conditions=("canny",), size=32)),
        ("larger", MakeSettings(conditions=("canny",), size=48)),
        ("other", MakeSettings(conditions=("palette",), size=32)),
    ):
        make_pairs(list_images([tmp_path / "in"]), tmp_path / name, settings, workers=1)
        held_out.append([pair.original for pair in split_pairs(read_pairs(tmp_path / name), 0.25)[1]])
    assert held_out[0] == held_out[1] == held_out[2] and len(set(held_out[0])) == 3


def test_twins_in_folders_are_matched_by_path(tmp_path):
    for name in ("a", "b/c"):
        save(tmp_path / f"images/{name}/0.png", scene(len(name))).with_suffix(".txt").write_text(f"scene {name}")
        save(tmp_path / f"canny/{name}/0.png", CANNY(scene(len(name))))
    pairs = read_pairs(tmp_path)
    assert [pair.prompt for pair in pairs] == ["scene a", "scene b/c"]
    assert all(np.array_equal(pair.images(48)[0], CANNY(pair.images(48)[1])) for pair in pairs)
    (tmp_path / "canny/a/0.png").unlink()
    save(tmp_path / "canny/d/0.png", scene(3))
    with refused("bad-data", "2 problems", "a/0.png: there is no condition image", "canny/d/0.png:"):
        read_pairs(tmp_path)


def test_images_further_down_beside_a_flat_layout_are_problems(tmp_path):
    root = lay_out("twins", tmp_path)
    save(root / "conditioning/more/7.png", scene(7))
    save(root / "pictures/more/8.png", scene(8))
    with refused("bad-data", "2 problems", "conditioning/more/7.png:", "more/8.png: there is no condition image"):
        read_pairs(root)


def test_files_of_other_image_formats_are_counted(tmp_path):
    root = lay_out("twins", tmp_path)
    for name in ("pictures/8.HEIC", "conditioning/8.jp2", "pictures/._8.heic"):
        (root / name).write_bytes(b"x")
    (note,) = load_pairs(root).notes
    assert note.startswith(f"2 files in {root}") and ".heic, .jp2" in note
    notes = []
    assert len(list_images([root / "pictures"], notes=notes)) == COUNT
    assert len(notes) == 1 and notes[0].startswith("1 files in") and ".heic" in notes[0]


def test_avif_files_are_images_where_pillow_reads_them(tmp_path):
    if not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    (tmp_path / "in").mkdir()
    Image.fromarray(scene(1)).save(tmp_path / "in/a.avif")
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", MakeSettings(conditions=("canny",)), workers=1)
    assert read_pairs(tmp_path / "out")[0].images(48)[1].std() > 0


def test_captions_are_found_by_suffixes_in_upper_case(tmp_path):
    for name, suffix in (("a.PNG", ".TXT"), ("b.png", ".CAPTION")):
        path = save(tmp_path / name, scene(1))
        path.with_suffix(suffix).write_text("in capitals")
    assert [image.caption() for image in list_images([tmp_path])] == ["in capitals"] * 2
    save(tmp_path / "canny/a.png", CANNY(scene(1)))
    save(tmp_path / "canny/b.png", CANNY(scene(1)))
    assert [pair.prompt for pair in read_pairs(tmp_path)] == ["in capitals"] * 2


def test_an_empty_caption_file_leaves_the_caption_of_the_table(tmp_path):
    write_images(tmp_path, 1, captions=False)
    (tmp_path / "image0.txt").write_text(" \n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "image0.png", "text": "of the table"}')
    assert [image.caption() for image in list_images([tmp_path])] == ["of the table"]


def test_a_table_of_captions_under_an_unknown_name_is_noted(tmp_path):
    write_images(tmp_path, 1, captions=False)
    (tmp_path / "metadata.csv").write_text("file_name,beschreibung\nimage0.png,ein Apfel\n")
    notes = []
    assert [image.caption() for image in list_images([tmp_path], notes=notes)] == [""]
    assert len(notes) == 1 and str(tmp_path / "metadata.csv") in notes[0]
