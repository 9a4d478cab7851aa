"""What people's disks are full of: odd names, captions of other editors, folders in folders, two runs at once."""

from __future__ import annotations

import json
import os
import types

import numpy as np
import pytest
from filelock import FileLock
from pair_files import scene, write_images
from PIL import Image

from controlkit.data.captions import with_captions
from controlkit.data.check import check_pairs
from controlkit.data.engine import make_pairs
from controlkit.data.input_images import InputImage, list_images, with_prompts
from controlkit.data.making import MakeSettings
from controlkit.data.pairs import pairs_folder, read_pairs, write_pairs
from controlkit.data.readers.recognise import read_listing
from controlkit.errors import UserError
from controlkit.files import decode_text
from refusals import refused

CANNY = MakeSettings(conditions=("canny",), size=32)


def make(source, out, settings=CANNY, **options):
    return make_pairs(list_images([source], without=out), out, settings, workers=1, **options)


def prompts(out):
    return {pair["key"]: pair["prompt"] for pair in map(json.loads, (out / "pairs.jsonl").read_text().splitlines())}


def test_an_edited_prompt_stays_when_its_pair_is_made_again(tmp_path):
    write_images(tmp_path / "in", 3)
    out = tmp_path / "out"
    make(tmp_path / "in", out)
    manifest = out / "pairs.jsonl"
    # As an editor that writes a byte order mark saves it.
    manifest.write_bytes(b"\xef\xbb\xbf" + manifest.read_bytes().replace(b"scene", b"edited"))
    (out / "canny/image0.png").unlink()
    make(tmp_path / "in", out)
    make(tmp_path / "in", out, MakeSettings(conditions=("palette",), size=32))
    assert prompts(out) == {f"image{n}": f"edited {n}" for n in range(3)}
    (tmp_path / "in/image1.txt").write_text("a new caption")
    make(tmp_path / "in", out)
    assert prompts(out)["image1"] == "a new caption"


@pytest.mark.parametrize(("damage", "fact"), [(b'{"key": "image0", ', "line 1"), (b"\xe9", "UTF-8")])
def test_a_manifest_that_was_edited_badly_is_not_overwritten(tmp_path, damage, fact):
    write_images(tmp_path / "in", 2)
    out = tmp_path / "out"
    make(tmp_path / "in", out)
    manifest = out / "pairs.jsonl"
    damaged = damage + b"\n" + manifest.read_bytes()
    manifest.write_bytes(damaged)
    write_images(tmp_path / "in", 3)
    with refused("damaged-file", manifest, fact):
        make(tmp_path / "in", out)
    assert manifest.read_bytes() == damaged


def test_captions_may_hold_every_character(tmp_path):
    paths = write_images(tmp_path / "in", 2)
    caption = "a red apple\u2028on\x85a\u2029table"
    paths[0].with_suffix(".txt").write_text(caption, encoding="utf-8")
    out = tmp_path / "out"
    make(tmp_path / "in", out)
    again = make(tmp_path / "in", out)
    assert (again.made, again.kept) == (0, 2)
    assert not check_pairs(out).problems
    assert [pair.prompt for pair in read_pairs(out, "canny")] == [caption, "scene 1"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_of_other_editors_are_read(tmp_path, encoding):
    (path,) = write_images(tmp_path / "in", 1)
    path.with_suffix(".txt").write_text("ein grüner Ballon\r\n", encoding=encoding)
    make(tmp_path / "in", tmp_path / "out")
    assert prompts(tmp_path / "out") == {"image0": "ein grüner Ballon"}


def test_a_caption_that_is_no_text_is_told(tmp_path):
    paths = write_images(tmp_path / "in", 2)
    paths[0].with_suffix(".txt").write_bytes("grün".encode("latin-1"))
    report = make(tmp_path / "in", tmp_path / "out")
    assert report.made == 1 and "image0.txt is not UTF-8" in report.skipped["image0.png"]
    assert with_captions(list_images([tmp_path / "in"]), tmp_path / "out", lambda: pytest.fail("has one"))


def test_a_name_that_is_not_utf8_is_skipped(tmp_path):
    write_images(tmp_path / "in", 1)
    odd = os.fsencode(tmp_path / "in") + b"/caf\xe9.png"
    Image.fromarray(scene(4)).save(os.fsdecode(odd))
    for shards in (None, 1):
        report = make(tmp_path / "in", tmp_path / f"out{shards}", shards=shards)
        assert report.made == 1
        (reason,) = report.skipped.values()
        assert "rename it" in reason


def test_names_as_long_as_the_file_system_takes(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(scene(0)).save(tmp_path / "in" / f"{'写真' * 40}.png")
    assert make(tmp_path / "in", tmp_path / "out").made == 1


def test_a_model_s_caption_goes_to_its_own_image(tmp_path):
    """Two files of one size and one time, as archives unpack them."""
    (tmp_path / "in").mkdir()
    for number, name in enumerate(("a", "b")):
        path = tmp_path / "in" / f"{name}.bmp"
        Image.fromarray(np.full((32, 32, 3), 100 * number, np.uint8)).save(path)
        os.utime(path, (1e9, 1e9))
    images = list_images([tmp_path / "in"])

    def captioner(files):
        return [f"mean {np.asarray(image).mean():.0f}" for image in files]

    for load in (lambda: captioner, lambda: pytest.fail("loaded again")):
        captioned = with_captions(images, tmp_path / "out", load)
        assert [image.prompt for image in captioned] == ["mean 0", "mean 100"]


def test_pairs_below_the_input_are_no_images(tmp_path):
    write_images(tmp_path / "in", 2)
    make(tmp_path / "in", tmp_path / "in/pairs")
    assert len(list_images([tmp_path / "in"])) == 2
    (tmp_path / "link").symlink_to(tmp_path / "in/pairs")
    report = make(tmp_path / "in", tmp_path / "link")
    assert (report.made, report.kept) == (0, 2)


def test_linked_folders_are_searched_once(tmp_path):
    write_images(tmp_path / "elsewhere", 2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "in")
    assert [image.key for image in list_images([tmp_path / "in"])] == ["linked/image0", "linked/image1"]


def test_a_run_that_writes_there_already_is_told(tmp_path):
    write_images(tmp_path / "in", 1)
    make(tmp_path / "in", tmp_path / "out")
    with (
        FileLock(tmp_path / "out/.controlkit/pairs/lock"),
        refused("in-use", tmp_path / "out"),
    ):
        make(tmp_path / "in", tmp_path / "out")


def test_a_run_that_made_nothing_leaves_its_settings_open(tmp_path, monkeypatch):
    from controlkit.data import engine

    write_images(tmp_path / "in", 1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(engine, "run_jobs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        make(tmp_path / "in", tmp_path / "out")
    assert make(tmp_path / "in", tmp_path / "out", MakeSettings(conditions=("canny",), size=48)).made == 1


def test_images_that_left_the_input_are_counted(tmp_path):
    paths = write_images(tmp_path / "in", 3)
    make(tmp_path / "in", tmp_path / "out")
    for path in paths[1:]:
        path.unlink()
    report = make(tmp_path / "in", tmp_path / "out")
    assert (report.kept, report.gone) == (1, 2)


def test_files_that_are_not_called_like_images_can_be_read_back_from_shards(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jfif", "without", "c.jpg"):
        Image.fromarray(scene(1)).save(tmp_path / "in" / name, format="JPEG")
    (tmp_path / "in/c.txt").write_text("a caption")
    settings = MakeSettings(conditions=("canny",))
    assert make(tmp_path / "in" / "*", tmp_path / "out", settings, shards=1).made == 3
    assert len(read_pairs(tmp_path / "out", "canny")) == 3


def test_what_a_killed_run_left_beside_a_shard_is_no_shard(tmp_path):
    write_images(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    left = tmp_path / "out/.pairs-00000-of-00001.tar.abcdefgh.tar"
    left.write_bytes(b"half")
    make(tmp_path / "in", tmp_path / "out", shards=1)
    assert not left.exists()
    (tmp_path / "out/._pairs.tar").write_bytes(b"of another system")
    assert len(read_pairs(tmp_path / "out", "canny")) == 2


def test_compressed_shards_are_told_what_to_do(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with refused("damaged-file", tmp_path / "x.tar.gz", "gunzip"):
        list_images([tmp_path / "x.tar.gz"])


def test_lists_of_other_tools_are_read_as_they_mean_it(tmp_path):
    Image.fromarray(scene(0)).save(tmp_path / "0.png")
    line = {"source": "0.png", "target": "0.png", "prompt": None}
    (tmp_path / "prompt.json").write_text(json.dumps(line) + "\n")
    assert read_listing(tmp_path / "prompt.json").records[0].prompt == ""
    (tmp_path / "metadata.csv").write_text('file_name,text,url,edges\n0.png,"a red\napple",https://x.org/0.png,0.png\n')
    (record,) = read_listing(tmp_path / "metadata.csv").records
    assert record.prompt == "a red\napple" and list(record.conditions) == ["edges"]


def test_coco_without_sizes_and_far_from_its_images(tmp_path):
    listed = {"id": 1, "file_name": "a.png", "width": None}
    (tmp_path / "captions.json").write_text(json.dumps({"images": [listed], "annotations": []}))
    with refused("missing-file", "a.png", tmp_path / "captions.json", "--images-folder"):
        list_images([tmp_path / "captions.json"])
    Image.fromarray(scene(0)).save(tmp_path / "a.png")
    (image,) = list_images([tmp_path / "captions.json"])
    assert image.source == tmp_path / "a.png"


def test_the_folder_of_a_glob_has_no_stars(tmp_path):
    (tmp_path / "g/x").mkdir(parents=True)
    assert pairs_folder(tmp_path / "g/*/pairs*.tar") == tmp_path / "g"


def test_text_is_decoded_as_it_was_saved():
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert decode_text("grün 日本".encode(encoding)) == "grün 日本"
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"\xe9")


def test_a_report_comes_even_where_no_sheet_can_be_written(tmp_path, capsys):
    from controlkit.apps import pairs

    write_images(tmp_path / "in", 2)
    out = tmp_path / "out"
    make(tmp_path / "in", out)
    (out / "canny/image1.png").unlink()
    (out / ".controlkit/check.png").mkdir()
    named = {"images": [], "out": None, "conditions": "", "sheet": None, "strict": False, "json": False}
    args = types.SimpleNamespace(check=str(out), **named)
    with pytest.raises(UserError, match=f"1 problems in {out}"):
        pairs.run(args)
    captured = capsys.readouterr()
    assert "image1" in captured.out and "no sheet" in captured.err


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["canny", "image.png", "--out", "image.png"], ["image.png", "--out"]),
        (["canny", "image.png", "--out", "edges.jpg"], ["edges.jpg", ".png", "--out"]),
        (["canny", "image.png", "--set", "low=["], ["--set low=[", "'['", "[wrong-type]"]),
        (["bbox", "image.png", "--set", "boxes=[[0, 0, .inf, 2]]"], ["[left, top, width, height]", "inf"]),
        (["bbox", "image.png", "--set", "boxes=[[0, 0, .nan, 2]]"], ["[left, top, width, height]", "nan"]),
        (["segments", "image.png", "--set", "segments=[{segmentation: [[]]}]"], ["COCO `segmentation`", "[[]]"]),
    ],
)
def test_a_condition_refuses_bad_input_and_loses_nothing(tmp_path, monkeypatch, arguments, facts, capsys):
    from controlkit.apps.cli import main

    monkeypatch.chdir(tmp_path)
    Image.fromarray(scene(0)).save("image.png")
    before = (tmp_path / "image.png").read_bytes()
    assert main(["condition", *arguments]) == 2
    message = capsys.readouterr().err
    assert all(fact in message for fact in facts), message
    assert (tmp_path / "image.png").read_bytes() == before


def test_half_a_character_in_a_caption_is_told_and_costs_only_its_image(tmp_path):
    folder = tmp_path / "pairs"
    image = np.zeros((64, 64, 3), np.uint8)
    write_pairs(folder, [(image, image, "complete"), (image, image, "other")])
    listed = folder / "prompt.json"
    listed.write_text(listed.read_text().replace("other", "half \\ud83d"))
    with refused("bad-data", "line 2: the prompt 'half"):
        read_pairs(folder)
    images = [
        InputImage(key=str(number), name=f"{number}.png", source=folder / f"target/0000{number}.png", prompt=prompt)
        for number, prompt in enumerate(("complete", "half \ud83d"))
    ]
    assert images[0].caption() == "complete"
    with refused("bad-data", "its caption 'half"):
        images[1].caption()


def test_a_stray_quote_in_a_large_table_is_told_with_its_line(tmp_path):
    rows = "".join(f"{number}.png,{number}.png,thing\n" for number in range(12_000))
    (tmp_path / "metadata.csv").write_text('file_name,conditioning_image,text\n0.png,0.png,"open\n' + rows)
    with refused("bad-data", "line 2:", "field larger than field limit"):
        read_pairs(tmp_path)


def test_captions_in_utf_16_without_a_byte_order_mark_are_refused(tmp_path):
    write_images(tmp_path / "in", 2)
    (tmp_path / "in/image0.txt").write_bytes("a red apple".encode("utf-16-le"))
    report = make(tmp_path / "in", tmp_path / "out")
    assert report.made == 1 and "byte order mark" in report.skipped["image0.png"]
    (tmp_path / "in/image0.txt").write_bytes("a red apple".encode("utf-16"))
    make(tmp_path / "in", tmp_path / "out")
    assert prompts(tmp_path / "out")["image0"] == "a red apple"


def edit(out, before, after):
    manifest = out / "pairs.jsonl"
    assert before in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(before, after))


def test_an_edited_prompt_stays_when_others_get_one_by_a_template(tmp_path, capsys):
    paths = write_images(tmp_path / "in", 3)
    for path in paths:
        path.with_suffix(".txt").unlink()
    make(tmp_path / "in", tmp_path / "out")
    manifest = tmp_path / "out" / "pairs.jsonl"
    first, *others = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [{**first, "prompt": "by hand"}, *others]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for template in ("photo of {name}", "a {name}"):
        images = with_prompts(list_images([tmp_path / "in"], without=tmp_path / "out"), template)
        make_pairs(images, tmp_path / "out", CANNY, workers=1)
        word = template.partition("{")[0]
        assert prompts(tmp_path / "out") == {
            "image0": "by hand",
            "image1": f"{word}image1",
            "image2": f"{word}image2",
        }
    assert "set aside" not in capsys.readouterr().err


def test_an_edited_prompt_follows_its_image_to_another_key(tmp_path):
    write_images(tmp_path / "in", 2)
    make(tmp_path / "in", tmp_path / "out")
    edit(tmp_path / "out", "scene 0", "by hand")
    Image.fromarray(scene(9)).save(tmp_path / "in/image0.jpg")  # which takes the key, as it is sorted before
    make(tmp_path / "in", tmp_path / "out")
    assert prompts(tmp_path / "out")["image0_png"] == "by hand"
    assert prompts(tmp_path / "out")["image0"] == "scene 0"


@pytest.mark.parametrize("away", ["missing", "damaged", "changed"])
def test_an_edited_prompt_returns_with_its_image(tmp_path, capsys, away):
    path = write_images(tmp_path / "in", 3)[0]
    make(tmp_path / "in", tmp_path / "out")
    edit(tmp_path / "out", "scene 0", "by hand")
    data = path.read_bytes()
    if away == "missing":
        path.rename(tmp_path / path.name)
    elif away == "damaged":
        path.write_bytes(data[:50])
    else:
        Image.fromarray(scene(9)).save(path)
    make(tmp_path / "in", tmp_path / "out")
    assert prompts(tmp_path / "out").get("image0") == ("scene 0" if away == "changed" else None)
    assert "1 prompts edited in pairs.jsonl are set aside" in capsys.readouterr().err
    path.write_bytes(data)
    for _ in range(2):
        make(tmp_path / "in", tmp_path / "out")
        assert prompts(tmp_path / "out")["image0"] == "by hand"
    assert "set aside" not in capsys.readouterr().err


def test_lines_that_come_back_are_told_of(tmp_path, capsys):
    write_images(tmp_path / "in", 3)
    make(tmp_path / "in", tmp_path / "out")
    manifest = tmp_path / "out" / "pairs.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[1:]))
    make(tmp_path / "in", tmp_path / "out")
    note = capsys.readouterr().err
    assert "1 pairs that pairs.jsonl did not list are listed again" in note and "image0" in note
    make(tmp_path / "in", tmp_path / "out")
    assert "listed again" not in capsys.readouterr().err


def test_condition_images_are_not_taken_for_photos(tmp_path):
    for folder in ("images", "canny"):
        write_images(tmp_path / "twins" / folder, 2)
    with refused("wrong-kind", tmp_path / "twins", tmp_path / "twins" / "canny", "looks like pairs"):
        list_images([tmp_path / "twins"])
    assert len(list_images([tmp_path / "twins" / "images"])) == 2
    for day in ("monday", "tuesday"):  # photos of the same names in folders of other names
        write_images(tmp_path / "days" / day, 2)
    assert len(list_images([tmp_path / "days"])) == 4
    write_images(tmp_path / "table", 2)
    write_images(tmp_path / "table" / "cond", 2)
    rows = [{"file_name": f"image{n}.png", "text": "a", "conditioning_image": f"cond/image{n}.png"} for n in range(2)]
    (tmp_path / "table" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = []
    assert [image.key for image in list_images([tmp_path / "table"], notes=notes)] == ["image0", "image1"]
    assert any("2 condition images" in note for note in notes)


def test_captions_of_tables_that_are_not_used_are_told_of(tmp_path):
    write_images(tmp_path / "in", 2)
    rows = [("image0.png", "a"), ("image0.png", "b"), ("IMAGE1.PNG", "c"), ("images/image1.png", "d")]
    text = "".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in rows)
    (tmp_path / "in" / "metadata.jsonl").write_text(text)
    notes = []
    list_images([tmp_path / "in"], notes=notes)
    assert any("captions of 2 images that are not" in note and "IMAGE1.PNG" in note for note in notes)
    assert any("lists 1 images again" in note and "image0.png" in note for note in notes)


def test_archives_beside_images_are_told_of(tmp_path):
    write_images(tmp_path / "in", 1)
    for name in ("more.zip", "more.tgz"):
        (tmp_path / "in" / name).write_bytes(b"")
    notes = []
    assert len(list_images([tmp_path / "in"], notes=notes)) == 1
    assert any("2 archives" in note and "unpack" in note for note in notes)


def test_captions_of_a_glob_that_the_shell_expanded_are_no_images(tmp_path):
    paths = sorted(tmp_path.glob("in/*")) or write_images(tmp_path / "in", 2)
    given = sorted((tmp_path / "in").iterdir())
    assert len(given) == 2 * len(paths)
    assert [image.key for image in list_images(given)] == ["image0", "image1"]


@pytest.mark.parametrize("name", ["identity", "lineart_given"])
def test_conditions_that_are_not_computed_make_no_pairs(tmp_path, name):
    write_images(tmp_path / "in", 1)
    with refused("contradiction", name, "finished"):
        make(tmp_path / "in", tmp_path / "out", MakeSettings(conditions=(name,)))
    assert not (tmp_path / "out").exists()


def test_skipped_images_are_all_listed_and_much_enlarged_ones_are_noted(tmp_path):
    write_images(tmp_path / "in", 1)
    for number in range(25):
        (tmp_path / "in" / f"torn{number}.png").write_bytes(b"torn")
    Image.fromarray(scene(3)).resize((8, 6)).save(tmp_path / "in" / "tiny.png")
    report = make(tmp_path / "in", tmp_path / "out")
    assert len(report.skipped) == 25 and report.skipped_list is not None
    listed = report.skipped_list.read_text().splitlines()
    assert len(listed) == 25 and listed[0].startswith("torn0.png: ")
    (note,) = report.notes
    assert note == "tiny.png has 8 x 6 pixels and was enlarged 5 times"
    for path in (tmp_path / "in").glob("torn*"):
        path.unlink()
    assert make(tmp_path / "in", tmp_path / "out").skipped_list is None and not report.skipped_list.exists()
