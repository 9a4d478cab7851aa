"""Captions reach training whatever a table calls them, several of them too, and missing ones are reported."""

from __future__ import annotations

import json

import pytest
from pair_files import encoded, scene, write_archive, write_images
from PIL import Image

from controlkit.apps.cli import main
from controlkit.conditions import find
from controlkit.data.check import check_pairs
from controlkit.data.engine import make_pairs
from controlkit.data.input_images import list_images
from controlkit.data.making import MakeSettings
from controlkit.data.pairs import load_pairs, read_pairs
from controlkit.data.prompts import PromptLimit
from controlkit.data.readers.columns import CAPTION_COLUMNS, Columns, captions_in
from controlkit.data.sources import members
from refusals import check, refused

COUNT = 3
CANNY = find("canny")


def draw_images(folder, count=COUNT):
    """`images/N.png` and `conditioning_images/N.png`."""
    for number in range(count):
        for name, image in (("images", scene(number)), ("conditioning_images", CANNY(scene(number)))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name / f"{number}.png")


def write_table(path, captions, image="image", condition_image="conditioning_image", caption="text"):
    """A table of the images of `draw_images`: JSON lines, CSV or Parquet, by the ending."""
    draw_images(path.parent, len(captions))
    rows = [
        {image: f"images/{number}.png", condition_image: f"conditioning_images/{number}.png", caption: text}
        for number, text in enumerate(captions)
    ]
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {
            image: [{"bytes": None, "path": row[image]} for row in rows],
            condition_image: [{"bytes": None, "path": row[condition_image]} for row in rows],
            caption: list(captions),
        }
        parquet.write_table(arrow.table(columns), path)
    elif path.suffix == ".csv":
        texts = ['"' + str(text).replace('"', '""') + '"' for text in captions]
        lines = [f"{row[image]},{row[condition_image]},{text}" for row, text in zip(rows, texts, strict=True)]
        path.write_text("\n".join([f"{image},{condition_image},{caption}", *lines]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


KINDS = ("train.jsonl", "train.csv", "train.parquet")


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("name", ["train.jsonl", "metadata.jsonl", "data.csv", "part/train.jsonl", "train.parquet"])
def test_a_table_of_images_beside_its_folders_is_read_with_its_captions(name, as_file, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    path = write_table(tmp_path / name, ["one", "two", "three"])
    pairs = load_pairs(path if as_file else tmp_path)
    assert [pair.prompt for pair in pairs.pairs] == ["one", "two", "three"]
    assert pairs.notes == []
    source, target = pairs.pairs[1].images(48)
    assert (target == scene(1)).all() and (source == CANNY(scene(1))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("caption", [*CAPTION_COLUMNS, "TEXT", "Caption"])
def test_captions_of_every_common_name_are_read(kind, caption, tmp_path):
    write_table(tmp_path / kind, ["one"], caption=caption)
    assert [pair.prompt for pair in read_pairs(tmp_path)] == ["one"]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_any_name_are_read_where_they_are_named(kind, tmp_path):
    write_table(tmp_path / kind, ["one", "two"], image="rgb", condition_image="edges", caption="words")
    named = Columns(image="rgb", conditioning_image="edges", caption="words")
    for path in (tmp_path, tmp_path / kind):
        pairs = load_pairs(path, columns=named)
        assert [pair.prompt for pair in pairs.pairs] == ["one", "two"] and pairs.notes == []
        assert (pairs.pairs[0].images(48)[1] == scene(0)).all()
    for wrong in ({"image": "rbg"}, {"conditioning_image": "edge"}, {"caption": "word"}):
        ((option, name),) = wrong.items()
        facts = (f"{option}_column is {name!r}", "rgb, edges, words; did you mean")
        with refused("unknown-name", tmp_path / kind, *facts):
            read_pairs(tmp_path, columns=Columns(**{**vars(named), **wrong}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_without_a_column_of_captions_says_so(kind, tmp_path):
    write_table(tmp_path / kind, ["one", "two"], caption="words")
    pairs = load_pairs(tmp_path)
    assert [pair.prompt for pair in pairs.pairs] == ["", ""]
    (note,) = pairs.notes
    assert str(tmp_path / kind) in note and "text" in note and "words" in note and "--caption-column" in note
    report = check_pairs(tmp_path)
    assert note in report.notes and "2 of 2 prompts are empty" in report.notes and not report.problems
    assert check_pairs(tmp_path, strict=True).counts["prompt"] == 2
    assert [pair.prompt for pair in read_pairs(tmp_path, columns=Columns(caption="words"))] == ["one", "two"]


def test_which_of_several_columns_of_captions_is_read_is_noted(tmp_path):
    path = write_table(tmp_path / "train.jsonl", ["one", ""])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**line, "caption": "other"}) for line in lines))
    pairs = load_pairs(tmp_path)
    assert [pair.prompt for pair in pairs.pairs] == ["one", "other"]
    assert all(fact in pairs.notes[0] for fact in (str(path), "'text'", "'caption'", "--caption-column"))
    assert pairs.notes[0].index("'text'") < pairs.notes[0].index("'caption'")
    assert read_pairs(tmp_path, columns=Columns(caption="caption"))[0].prompt == "other"


def test_a_prompt_json_may_call_its_captions_otherwise(tmp_path):
    draw_images(tmp_path, 1)
    entry = {"source": "conditioning_images/0.png", "target": "images/0.png"}
    (tmp_path / "prompt.json").write_text(json.dumps({**entry, "caption": "one", "words": "two"}))
    assert read_pairs(tmp_path)[0].prompt == "one"
    assert read_pairs(tmp_path, columns=Columns(caption="words"))[0].prompt == "two"


def test_layouts_without_columns_refuse_them(tmp_path):
    write_archive(tmp_path / "a.tar", {"1.png": encoded(scene(1)), "1.c.png": encoded(scene(2)), "1.txt": b"x"})
    with refused("contradiction", "caption_column is 'words'", tmp_path, "tar shards"):
        read_pairs(tmp_path, columns=Columns(caption="words"))
    (tmp_path / "a.tar").unlink()
    draw_images(tmp_path)
    with refused("contradiction", "caption_column is 'words'", tmp_path, "folders of images"):
        read_pairs(tmp_path, columns=Columns(caption="words"))


@pytest.mark.parametrize("home", ["images", "."])
def test_kohyas_caption_files_are_read(home, tmp_path):
    for number in range(2):
        for name, image in ((home, scene(number)), ("conditioning", CANNY(scene(number)))):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / name / f"{number}.png")
    (tmp_path / home / "0.caption").write_text("a scene\n")
    (tmp_path / home / "1.caption").write_text("in one file")
    (tmp_path / home / "1.txt").write_text("in the other")
    pairs = load_pairs(tmp_path)
    assert [pair.prompt for pair in pairs.pairs] == ["a scene", "in the other"]
    assert all(fact in pairs.notes[0] for fact in ("1 images", ".txt", ".caption", str(tmp_path / home / "1.png")))


def test_pairs_are_made_with_captions_of_caption_files(tmp_path, capsys):
    photos = tmp_path / "in"
    for path in write_images(photos, 3, captions=False):
        path.with_suffix(".caption").write_text(f"caption of {path.stem}")
    (photos / "image1.txt").write_text("")
    (photos / "image2.txt").write_text("another")
    words = ["pairs", str(photos), "--conditions", "canny", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(words) == 0
    note = capsys.readouterr().err
    assert all(fact in note for fact in ("1 images", ".txt", ".caption", "image2.png"))
    prompts = [pair.prompt for pair in read_pairs(tmp_path / "out")]
    assert prompts == ["caption of image0", "caption of image1", "another"]
    stamps = [image.stamp() for image in list_images([photos])]
    (photos / "image0.caption").write_text("a new one")
    assert [a == b.stamp() for a, b in zip(stamps, list_images([photos]), strict=True)] == [False, True, True]
    assert [image.name for image in list_images([photos / "*"])] == [f"image{number}.png" for number in range(3)]


def test_captions_of_tars_are_read_from_caption_files_and_by_common_names(tmp_path):
    files = {f"{n}.png": encoded(scene(n)) for n in range(3)} | {f"{n}.c.png": encoded(scene(9)) for n in range(3)}
    files |= {
        "0.caption": b"one",
        "1.json": b'{"text": null, "blip_caption": "two"}',
        "2.json": b'{"captions": ["a", "b"]}',
    }
    write_archive(tmp_path / "a.tar", files)
    assert [pair.captions for pair in read_pairs(tmp_path)] == [("one",), ("two",), ("a", "b")]
    assert [image.prompt for image in list_images([write_archive(tmp_path / "b/b.tar", files)])] == [
        "one",
        "two",
        "a",
    ]


@pytest.mark.parametrize("kind", ["train.jsonl", "train.parquet", "prompt.json", "pairs.jsonl"])
def test_a_list_of_captions_stays_a_list(kind, tmp_path):
    captions = [["a", "b"], ["c"], [], None]
    if kind.startswith("train"):
        write_table(tmp_path / kind, captions)
    else:
        draw_images(tmp_path, 4)
        sides = [(f"conditioning_images/{number}.png", f"images/{number}.png") for number in range(4)]
        if kind == "prompt.json":
            lines = [{"source": a, "target": b, "prompt": text} for (a, b), text in zip(sides, captions, strict=True)]
        else:
            lines = [
                {"conditions": {"canny": a}, "picture": b, "prompt": text}
                for (a, b), text in zip(sides, captions, strict=True)
            ]
        (tmp_path / kind).write_text("\n".join(map(json.dumps, lines)))
    pairs = read_pairs(tmp_path)
    assert [pair.captions for pair in pairs] == [("a", "b"), ("c",), ("",), ("",)]
    assert [pair.prompt for pair in pairs] == ["a", "c", "", ""]
    assert "2 of 5 prompts are empty" in check_pairs(tmp_path).notes


@pytest.mark.parametrize("text", ['["a", "b"]', "['a', 'b']"])
def test_a_list_in_a_cell_of_a_csv_is_a_list(text, tmp_path):
    write_table(tmp_path / "train.csv", [text, "[a] b", "[x, y]"])
    assert [pair.captions for pair in read_pairs(tmp_path)] == [("a", "b"), ("[a] b",), ("[x, y]",)]


@pytest.mark.parametrize("caption", [7, ["a", 7], {"en": "a"}, [["a"]], True])
@pytest.mark.parametrize("kind", ["train.jsonl", "train.parquet", "1.tar"])
def test_captions_that_are_no_text_are_listed(kind, caption, tmp_path):
    if kind == "1.tar":
        text = json.dumps({"text": caption}).encode()
        write_archive(tmp_path / kind, {"1.png": encoded(scene(1)), "1.c.png": encoded(scene(2)), "1.json": text})
    elif kind == "train.parquet" and caption == ["a", 7]:
        pytest.skip("parquet has no such lists")
    else:
        write_table(tmp_path / kind, [caption])
    where = {"train.jsonl": "line 1", "train.parquet": "row 0", "1.tar": "1.tar:1"}[kind]
    with refused("bad-data", "1 problems", f"{where}: its caption is "):
        read_pairs(tmp_path)


def test_a_list_of_prompts_in_our_manifest_survives_another_run(tmp_path):
    write_images(tmp_path / "in", 1)
    settings, out = MakeSettings(conditions=("canny",), size=32), tmp_path / "out"
    make_pairs(list_images([tmp_path / "in"]), out, settings, workers=1)
    (out / "pairs.jsonl").write_text((out / "pairs.jsonl").read_text().replace('"scene 0"', '["a", "b"]'))
    (out / "canny/image0.png").unlink()
    make_pairs(list_images([tmp_path / "in"]), out, settings, workers=1)
    assert read_pairs(out)[0].captions == ("a", "b")


LIMIT = PromptLimit(reader="this base", tokens=4, cut_from=lambda prompt: " ".join(prompt.split()[2:]))


def test_prompts_that_are_too_long_are_counted(tmp_path):
    write_table(tmp_path / "train.jsonl", [["a b", "one two three"], "x" * 9, "four five six"])
    report = check_pairs(tmp_path, limit=LIMIT)
    (note,) = load_pairs(tmp_path).prompt_notes(LIMIT)
    assert all(fact in note for fact in ("2 of 4 prompts", "4 tokens", "this base", "(line 1, line 3)"))
    assert note in report.notes and report.problems == []


def test_the_check_counts_what_stable_diffusion_or_a_named_base_cuts(tmp_path, capsys):
    write_table(tmp_path / "train.jsonl", ["apple " * 30, "apple " * 76, "apple " * 75])
    words = ["pairs", "--check", str(tmp_path)]
    assert main(words) == 0
    assert "1 of 3 prompts are longer than the 77 tokens that Stable Diffusion reads" in capsys.readouterr().out
    assert main([*words, "--base", "nano", "--caption-column", "text"]) == 0
    assert "3 of 3 prompts are longer than the 24 tokens that nano reads" in capsys.readouterr().out
    assert main([*words, "--base", str(tmp_path / "nothing")]) == 2
    assert "there is no base at" in capsys.readouterr().err
    assert main([*words, "--caption-column", "words"]) == 2
    assert "its columns are image, conditioning_image, text" in capsys.readouterr().err
    assert main(["pairs", str(tmp_path), "--conditions", "canny", "--out", "x", "--caption-column", "text"]) == 2
    check(capsys.readouterr().err, "contradiction", "--caption-column", "--check")


@pytest.mark.parametrize("absolute", [False, True])
def test_files_outside_of_the_folder_of_their_list_are_counted(absolute, tmp_path):
    draw_images(tmp_path / "secret", 2)
    inside = tmp_path / "pairs"
    draw_images(inside, 2)
    away = str(tmp_path / "secret") if absolute else "../secret"
    entries = [
        {"source": f"{away}/conditioning_images/0.png", "target": "images/0.png", "prompt": "a"},
        {"source": str(inside / "conditioning_images/1.png"), "target": "images/../images/1.png", "prompt": "b"},
    ]
    (inside / "prompt.json").write_text("\n".join(map(json.dumps, entries)))
    pairs = load_pairs(inside)
    assert (pairs.pairs[0].images(48)[0] == CANNY(scene(0))).all()
    (note,) = pairs.notes
    assert "1 of the 4 files" in note and str(inside / "prompt.json") in note and "secret" in note
    assert check_pairs(inside).notes == [note]


def test_images_outside_that_a_parquet_file_names_are_counted(tmp_path):
    path = write_table(tmp_path / "train.parquet", ["one", "two"])
    (tmp_path / "in").mkdir()
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(path).to_pydict()
    rows["image"] = [{"bytes": None, "path": f"../{cell['path']}"} for cell in rows["image"]]
    rows["conditioning_image"] = [{"bytes": encoded(CANNY(scene(n))), "path": "/x.png"} for n in range(2)]
    parquet.write_table(arrow.table(rows), tmp_path / "in/train.parquet")
    for _ in range(2):  # also when it has been unpacked before
        pairs = load_pairs(tmp_path / "in")
        assert (pairs.pairs[1].images(48)[1] == scene(1)).all()
        assert "2 of the 2 files" in pairs.notes[0] and str(tmp_path / "in") in pairs.notes[0]


def test_names_in_shards_never_lead_out_of_a_folder(tmp_path):
    names = {"/etc/a": 0, "../../b": 1, "C:\\x\\c": 2, "./d": 3}
    write_archive(tmp_path / "in/odd.tar", {f"{name}.png": encoded(scene(number)) for name, number in names.items()})
    settings = MakeSettings(conditions=("canny",))
    make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", settings, workers=1, shards=1)
    (shard,) = (tmp_path / "out").glob("*.tar")
    import tarfile

    with tarfile.open(shard) as archive:
        written = archive.getnames()
    assert {name.partition(".")[0] for name in written} == {"etc/a", "b", "x/c", "d"}
    assert b"../" not in shard.read_bytes() and b"/etc" not in shard.read_bytes()
    assert {piece.name.partition(".")[0] for piece in members(tmp_path / "in/odd.tar")} == {"etc/a", "b", "x/c", "d"}


def test_two_members_of_one_name_are_reported(tmp_path):
    files = {"a.png": encoded(scene(0)), "/a.png": encoded(scene(1)), "a.c.png": encoded(scene(2)), "a.txt": b"x"}
    path = write_archive(tmp_path / "a.tar", files)
    with refused("bad-data", "a.tar:a.png:"):
        read_pairs(path)
    with refused("bad-data", "a.tar:a.png:"):
        list_images([path])


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (20, 30, 40)])
def test_condition_images_of_one_flat_colour_are_listed(colour, tmp_path):
    write_table(tmp_path / "train.jsonl", ["one", "two", "three"])
    Image.new("RGB", (48, 48), colour).save(tmp_path / "conditioning_images/1.png")
    report = check_pairs(tmp_path)
    assert [(problem.kind, problem.where) for problem in report.problems] == [("flat", "line 2")]
    assert f"one flat colour, {colour}" in report.problems[0].text


def test_flat_conditions_that_are_computed_on_read_are_listed_too(tmp_path):
    write_images(tmp_path / "images", 2)
    images = [{"id": n, "file_name": f"image{n}.png", "width": 48, "height": 48} for n in range(2)]
    box = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [4, 8, 16, 24]}
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": [box]}))
    report = check_pairs(tmp_path / "instances.json", ["bbox"])
    assert [problem.where for problem in report.problems if problem.kind == "flat"] == ["image1.png"]


def test_a_caption_file_that_cannot_be_read_is_reported(tmp_path):
    draw_images(tmp_path, 2)
    (tmp_path / "images/0.txt").write_text("a scene")
    (tmp_path / "images/1.caption").mkdir()
    with refused("bad-data", "1.png:", "1.caption"):
        read_pairs(tmp_path)


@pytest.mark.parametrize(("caption", "prompt"), [(None, "second"), (" ", "second"), (["", "a  b"], "a b"), (7, None)])
def test_captions_of_coco_are_texts(caption, prompt, tmp_path):
    write_images(tmp_path, 1)
    texts = [{"id": n, "image_id": 0, "caption": text} for n, text in enumerate((caption, "second"))]
    listed = {"images": [{"id": 0, "file_name": "image0.png"}], "annotations": texts}
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    if prompt is None:
        with refused("bad-data", tmp_path / "captions.json", "its caption is 7"):
            read_pairs(tmp_path / "captions.json", "canny")
    else:
        assert read_pairs(tmp_path / "captions.json", "canny")[0].prompt == prompt


def test_a_caption_cut_off_by_an_unquoted_comma_is_refused(tmp_path):
    draw_images(tmp_path)
    header = "image,conditioning_image,text\n"
    rows = [f"images/{n}.png,conditioning_images/{n}.png," for n in range(COUNT)]
    table = tmp_path / "train.csv"
    table.write_text(header + rows[0] + "a red apple, on a wooden table\n" + rows[1] + '"a pear, ripe"\n')
    with refused("bad-data", "1 problems", "line 2:", "quotes"):
        read_pairs(tmp_path)
    # Empty cells at the end of a line, as spreadsheets write them, are no text.
    table.write_text(header + rows[0] + "a red apple,,\n" + rows[1] + '"a pear, ripe"\n')
    assert [pair.prompt for pair in read_pairs(tmp_path)] == ["a red apple", "a pear, ripe"]


def test_an_unquoted_comma_in_the_captions_of_an_image_folder_is_refused(tmp_path):
    write_images(tmp_path, 1, captions=False)
    (tmp_path / "metadata.csv").write_text("file_name,text\nimage0.png,a red apple, on a wooden table\n")
    with refused("bad-data", "line 2:", "quotes"):
        list_images([tmp_path])


def write_linked(folder):
    """A Parquet file that names its images by path."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw_images(folder, 2)
    names = ("images", "conditioning_images")
    cells = [[{"bytes": None, "path": f"{name}/{number}.png"} for number in range(2)] for name in names]
    table = arrow.table({"image": cells[0], "conditioning_image": cells[1], "text": ["one", "two"]})
    parquet.write_table(table, folder / "train.parquet")


def test_images_that_a_parquet_file_names_are_read_again_when_they_change(tmp_path):
    write_linked(tmp_path)
    assert (read_pairs(tmp_path)[1].images(48)[1] == scene(1)).all()
    (shard,) = (tmp_path / ".controlkit").glob("*.tar")
    unpacked = shard.stat().st_mtime_ns
    assert len(read_pairs(tmp_path)) == 2 and shard.stat().st_mtime_ns == unpacked
    Image.fromarray(scene(9)).save(tmp_path / "images/1.png")
    assert (read_pairs(tmp_path)[1].images(48)[1] == scene(9)).all()
    # A shard of an earlier version does not say what it was made from.
    write_archive(shard, {member.name: member.read_bytes() for member in members(shard) if member.name[0] != "."})
    Image.fromarray(scene(8)).save(tmp_path / "images/1.png")
    assert (read_pairs(tmp_path)[1].images(48)[1] == scene(8)).all()


def test_images_that_a_parquet_file_names_and_that_are_missing_are_listed(tmp_path):
    write_linked(tmp_path)
    (tmp_path / "images/1.png").rename(tmp_path / "away.png")
    (tmp_path / "conditioning_images/0.png").unlink()
    with refused("bad-data", "2 problems", "row 0: there is no conditioning_images/0.png", "row 1:", "images/1.png"):
        read_pairs(tmp_path)
    assert not list((tmp_path / ".controlkit").glob("*.tar"))
    (tmp_path / "away.png").rename(tmp_path / "images/1.png")
    Image.fromarray(CANNY(scene(0))).save(tmp_path / "conditioning_images/0.png")
    assert len(read_pairs(tmp_path)) == 2


def test_what_a_killed_unpacking_left_is_removed(tmp_path):
    write_table(tmp_path / "train.parquet", ["one", "two"])
    read_pairs(tmp_path)
    (shard,) = (tmp_path / ".controlkit").glob("*.tar")
    shard.unlink()
    left = shard.with_name(f".{shard.name}.abc.tar")
    left.write_bytes(b"half a shard")
    assert len(read_pairs(tmp_path)) == 2
    assert not left.exists() and shard.exists()


def test_a_blank_caption_hides_no_other():
    assert captions_in({"text": " ", "caption": "a dog"}) == captions_in({"text": None, "caption": "a dog"}) == "a dog"
    assert captions_in({"text": ["a", "b"]}) == ["a", "b"] and captions_in({"text": "", "caption": []}) is None


def test_pairs_are_made_of_columns_of_other_names(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    cells = [{"bytes": encoded(scene(number)), "path": None} for number in range(2)]
    table = pyarrow.table({"img": cells, "words": ["a cat", "a dog"]})
    pyarrow.parquet.write_table(table, tmp_path / "photos.parquet")
    make = [
        "pairs",
        str(tmp_path / "photos.parquet"),
        "--conditions",
        "canny",
        "--size",
        "32",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(make) == 2
    assert "--image-column" in capsys.readouterr().err
    assert main([*make, "--image-column", "img", "--caption-column", "words"]) == 0
    lines = (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["a cat", "a dog"]
    assert main([*make, "--conditioning-image-column", "img"]) == 2
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(encoded(scene(1)))
    make[1] = str(tmp_path / "folder")
    assert main([*make, "--image-column", "img"]) == 2
    assert "Parquet files and datasets" in capsys.readouterr().err
