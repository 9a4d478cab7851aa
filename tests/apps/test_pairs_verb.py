"""`controlkit pairs`: pairs in a folder, a killed run that goes on, a check with its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from controlkit.apps.cli import main
from controlkit.data.pairs import read_pairs
from refusals import check


def scene(number: int, size: int = 40) -> np.ndarray:
    rng = np.random.default_rng(number)
    image = np.full((size, size, 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(3):
        left, top = rng.integers(0, size - 12, 2)
        image[top : top + 12, left : left + 12] = rng.integers(0, 256, 3)
    return image


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(scene(number)).save(folder / f"{number}.png")
        if number:
            (folder / f"{number}.txt").write_text(f"squares {number}")
    return folder


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_images_in_pairs_out(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    words = ("pairs", photos, "--conditions", "canny,palette", "--size", 32, "--out", out, "--workers", 1)
    assert run(*words) == 0
    printed, progress = capsys.readouterr()
    assert "made 6 pairs" in printed and "1 pairs have an empty prompt" in printed
    assert "6 of 6 images" in progress
    assert run(*words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["made"], report["kept"], report["empty_prompts"]) == (0, 6, 1)
    assert len(read_pairs(out, "palette")) == len(read_pairs(out / "canny")) == 6


def test_a_condition_added_later_keeps_the_prompts(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    words = ("pairs", photos, "--size", 32, "--out", out, "--workers", 1)
    assert run(*words, "--conditions", "canny", "--prompt", "number {name}") == 0
    manifest = out / "pairs.jsonl"
    manifest.write_text(manifest.read_text().replace("number 0", "my own words"))
    assert run(*words, "--conditions", "palette") == 0
    expected = ["my own words", *(f"squares {number}" for number in range(1, 6))]
    assert sorted(json.loads(line)["prompt"] for line in manifest.read_text().splitlines()) == sorted(expected)
    assert "edited" not in capsys.readouterr().err
    (photos / "5.txt").unlink()
    assert run(*words, "--conditions", "palette", "--prompt", "an image") == 0  # given again, it is another one
    expected = ["my own words", *(f"squares {number}" for number in range(1, 5)), "an image"]
    assert sorted(json.loads(line)["prompt"] for line in manifest.read_text().splitlines()) == sorted(expected)


def test_torn_images_are_listed_with_a_count(photos, tmp_path, capsys):
    (photos / "2.png").write_bytes(b"torn")
    assert run("pairs", photos, "--conditions", "canny", "--out", tmp_path / "o", "--workers", 1) == 0
    printed, progress = capsys.readouterr()
    assert "made 5 pairs" in printed and "skipped 1" in printed
    assert "skipped 2.png: 2.png is not an image" in progress


def test_the_check_tells_all_draws_a_sheet_and_ends_with_2(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    (photos / "0.txt").write_text("now with a caption")
    assert run("pairs", photos, "--conditions", "canny", "--out", out, "--copy", "--workers", 1) == 0
    capsys.readouterr()
    assert run("pairs", "--check", out) == 0
    assert "nothing wrong" in capsys.readouterr().out
    (out / "canny/1.png").unlink()
    Image.fromarray(scene(3)).save(out / "pictures/4.png")
    assert run("pairs", "--check", out, "--json", "--sheet", tmp_path / "sheet.png") == 2
    printed, told = capsys.readouterr()
    report = json.loads(printed)
    assert report["error"]["code"] == "bad-data"
    assert {"file", "changed", "duplicate", "not drawn"} == set(report["counts"])
    check(told, "bad-data", out)
    assert Image.open(tmp_path / "sheet.png").width > 100
    assert run("pairs", "--check", out) == 2
    assert "canny/1.png" in capsys.readouterr().out


def test_a_run_that_is_killed_goes_on_where_it_stopped(photos, tmp_path):
    for number in range(6, 60):
        Image.fromarray(scene(number, 200)).save(photos / f"{number}.png")
    out = tmp_path / "pairs"
    words = ["pairs", photos, "--conditions", "canny,color_regions", "--out", out, "--workers", 2]
    command = [sys.executable, "-m", "controlkit", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / ".controlkit/pairs/journal.jsonl"
    while process.poll() is None and not (journal.is_file() and journal.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(journal.read_text().splitlines())
    assert finished and not (out / "pairs.jsonl").exists()
    assert run(*words[:-1], 1) == 0
    assert run(*words[:4], "--out", tmp_path / "clean", "--workers", 1) == 0
    left, clean = ({p.relative_to(f): p.read_bytes() for p in f.glob("*/*.png")} for f in (out, tmp_path / "clean"))
    assert left == clean
    entries = [[json.loads(line) for line in (f / "pairs.jsonl").open()] for f in (out, tmp_path / "clean")]
    assert entries[0] == entries[1] and len(entries[0]) == 60


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (("{photos}",), "missing-setting", ["--conditions", "--out"]),
        (("{photos}", "--conditions", "cany", "--out", "{out}"), "unknown-name", ["'cany'", "did you mean canny"]),
        (("{photos}", "--conditions", "canny,canny", "--out", "{out}"), "contradiction", ["canny"]),
        (("{out}", "--conditions", "canny", "--out", "{out}"), "missing-file", ["{out}"]),
        (("{photos}", "--conditions", "canny", "--out", "{out}", "--size", "3"), "out-of-range", ["size", 3, 16]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--size", "100", "--buckets"),
            "wrong-size",
            ["size", 100, "multiple of 8"],
        ),
        (("{photos}", "--conditions", "canny", "--out", "{out}", "--shards", "9"), "out-of-range", ["shards", 9, 1, 6]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--engine", "spark"),
            "unknown-name",
            ["'spark'", "local, ray"],
        ),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--workers", "0"),
            "out-of-range",
            ["--workers 0", "at least 1"],
        ),
        (("{photos}", "--conditions", "bbox", "--out", "{out}"), "missing-companion", ["instances"]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--base", "nano"),
            "contradiction",
            ["--base", "--check"],
        ),
        (("--check", "{out}"), "missing-file", ["{out}"]),
        (("--check", "{out}", "--out", "{out}"), "contradiction", ["--check", "--out"]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--caption", "blip", "--caption-model", "{photos}"),
            "missing-weights",
            ["{photos}", "config.json"],
        ),
    ],
)
def test_bad_input_gets_one_plain_sentence(words, code, facts, photos, tmp_path, capsys):
    names = {"photos": photos, "out": tmp_path / "out"}
    assert run("pairs", *(word.format(**names) for word in words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("controlkit: ") and err.count("\n") == 1
    check(err, code, *(str(fact).format(**names) for fact in facts))


def test_help_loads_nothing_heavy():
    probe = (
        "import sys\nfrom controlkit.apps.cli import main\n"
        "try: main(['pairs', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'cv2', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "controlkit pairs photos" in done.stdout and done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shards", [(), ("--shards", 1)])
def test_frames_that_are_left_out_are_told(photos, tmp_path, capsys, shards):
    frames = [Image.fromarray(scene(number)) for number in range(3)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    words = (photos, "--conditions", "canny", "--out", tmp_path / "pairs", "--workers", 1, *shards)
    assert run("pairs", *words, "--json") == 0
    out, err = capsys.readouterr()
    assert "note: moving.gif has several frames; only the first is used" in err
    assert len(json.loads(out)["notes"]) == 1


def test_pairs_without_captions_pass_the_check_that_making_them_advises(photos, tmp_path, capsys):
    for text in photos.glob("*.txt"):
        text.unlink()
    out = tmp_path / "pairs"
    assert run("pairs", photos, "--conditions", "canny", "--out", out, "--workers", 1) == 0
    printed = capsys.readouterr().out
    assert "6 pairs have an empty prompt" in printed and f"controlkit pairs --check {out}" in printed
    assert run("pairs", "--check", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"] and report["notes"][1:] == ["6 of 6 prompts are empty"]
    assert run("pairs", "--check", out, "--strict") == 2
    check(capsys.readouterr().err, "bad-data", out, "6 problems")


def test_condition_images_of_twice_the_size_are_what_training_takes(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    assert run("pairs", photos, "--conditions", "palette", "--out", out, "--copy", "--workers", 1) == 0
    entries = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    (out / "pairs.jsonl").unlink()
    lines = [{"source": entry["conditions"]["palette"], "target": entry["picture"], "prompt": "x"} for entry in entries]
    (out / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    path = out / entries[2]["conditions"]["palette"]
    with Image.open(path) as image:
        image.resize((80, 80), Image.Resampling.NEAREST).save(path)
    assert len(read_pairs(out)) == 6
    capsys.readouterr()
    assert run("pairs", "--check", out, "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("1 condition images" in note and "80 x 80 and 40 x 40" in note for note in notes)
    assert run("pairs", "--check", out, "--strict", "--json") == 2
    assert json.loads(capsys.readouterr().out)["counts"] == {"scale": 1}


@pytest.mark.parametrize(
    "words",
    [
        *(("--size", 32), ("--tiles",), ("--buckets",), ("--copy",), ("--seed", 0), ("--fixed",), ("--prompt", "x")),
        *(("--images-folder", "x"), ("--caption", "blip"), ("--caption-model", "x"), ("--device", "cuda")),
        *(("--workers", 1), ("--shards", 2), ("--engine", "ray")),
    ],
)
def test_a_check_refuses_options_of_making(words, tmp_path, capsys):
    assert run("pairs", "--check", tmp_path, *words) == 2
    check(capsys.readouterr().err, "contradiction", words[0], "--check")


@pytest.mark.parametrize("words", [("--caption-model", "x"), ("--device", "cuda")])
def test_options_of_the_caption_model_need_it(words, photos, tmp_path, capsys):
    assert run("pairs", photos, "--conditions", "canny", "--out", tmp_path / "o", *words) == 2
    check(capsys.readouterr().err, "contradiction", words[0], "--caption blip")


def test_a_folder_of_coco_images_needs_annotations(photos, tmp_path, capsys):
    words = ("--conditions", "canny", "--out", tmp_path / "o", "--images-folder", tmp_path)
    assert run("pairs", photos, *words) == 2
    check(capsys.readouterr().err, "contradiction", "--images-folder", photos)


def test_a_template_is_the_prompt_of_images_without_a_caption(photos, tmp_path, capsys):
    (photos / "0.png").rename(photos / "red_big-barn.png")
    words = ("pairs", photos, "--conditions", "canny", "--out", tmp_path / "o", "--workers", 1, "--prompt")
    assert run(*words, "{name} in {place}") == 2
    check(capsys.readouterr().err, "unknown-key", "{place}", "{name}", "{folder}")
    assert run(*words, "a {name} of {folder}") == 0
    prompts = {pair.prompt for pair in read_pairs(tmp_path / "o")}
    assert prompts == {"a red big barn of photos", *(f"squares {number}" for number in range(1, 6))}


def test_large_photos_are_cut_into_tiles(photos, tmp_path, capsys):
    large = scene(9, 110)[:75]
    Image.fromarray(large).save(photos / "large.jpg", quality=95)
    (photos / "large.txt").write_text("large")
    words = ("pairs", photos, "--conditions", "canny", "--out", tmp_path / "o", "--workers", 1, "--tiles")
    assert run(*words) == 2
    check(capsys.readouterr().err, "contradiction", "tiles", "size")
    assert run(*words, "--size", 32) == 0
    tiles = [pair for pair in read_pairs(tmp_path / "o") if pair.prompt == "large"]
    assert len(tiles) == 6  # 3 x 2 in 110 x 75; the other photos are 40 x 40 and stay whole
    decoded = np.asarray(Image.open(photos / "large.jpg").convert("RGB"))
    found = [pair.images(32)[1] for pair in tiles]
    assert all((tile == part).all() for tile, part in zip(found, _grid(decoded, 7, 5, 32), strict=True))
    assert len(read_pairs(tmp_path / "o")) == 12
    assert run(*words, "--size", 32, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kept"] == 12


def _grid(image, left, top, side):
    for row in range((image.shape[0] - top) // side):
        for column in range((image.shape[1] - left) // side):
            yield image[top + row * side :, left + column * side :][:side, :side]


def test_a_condition_added_later_writes_over_nothing(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    words = ("pairs", photos, "--size", 32, "--out", out, "--workers", 1, "--conditions")
    assert run(*words, "canny") == 0
    own = out / "blur" / "0.png"
    own.parent.mkdir()
    own.write_text("mine")
    assert run(*words, "canny,blur") == 2
    check(capsys.readouterr().err, "would-overwrite", own.parent)
    assert own.read_text() == "mine"
    own.unlink()
    assert run(*words, "canny,blur") == 0 and own.is_file()


def test_a_folder_of_pairs_is_no_folder_of_photos(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    assert run("pairs", photos, "--conditions", "canny", "--size", 32, "--out", out, "--workers", 1) == 0
    for words in (("pairs", out, "--conditions", "blur"), ("condition", "blur", out)):
        assert run(*words, "--out", tmp_path / "other") == 2
        check(capsys.readouterr().err, "wrong-kind", out, "folder of its images")


def test_a_sheet_is_written_over_no_file_of_the_pairs(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    assert run("pairs", photos, "--conditions", "canny", "--size", 32, "--out", out, "--workers", 1) == 0
    before = {path: path.read_bytes() for path in (out / "pairs.jsonl", out / "canny" / "1.png")}
    for path, code in zip(before, ("usage", "would-overwrite"), strict=True):
        assert run("pairs", "--check", out, "--sheet", path) == 2
        check(capsys.readouterr().err, code, path)
        assert path.read_bytes() == before[path]
    assert run("pairs", "--check", out, "--sheet", out / "sheet.png") == 0
    assert (out / "sheet.png").is_file()


def test_edited_prompts_of_images_that_are_gone_are_named(photos, tmp_path, capsys):
    out = tmp_path / "pairs"
    words = ("pairs", photos, "--conditions", "canny", "--size", 32, "--out", out, "--workers", 1)
    assert run(*words) == 0
    manifest = out / "pairs.jsonl"
    manifest.write_text(manifest.read_text().replace("squares 3", "edited by hand"))
    (photos / "3.png").rename(tmp_path / "3.png")
    capsys.readouterr()
    assert run(*words) == 0
    said = capsys.readouterr().err
    assert "1 prompts edited" in said and "set aside" in said and said.rstrip().endswith(": 3")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"picture": "a\ud800.png"}, "not valid text"),
        ({"picture": "x" * 5000}, "too long"),
        ({"prompt": "a\ud800"}, "not valid text"),
        ({"conditions": {"canny\ud800": "canny/0.png"}}, "not valid text"),
        (None, "4300 digits"),
    ],
)
def test_an_odd_line_is_one_problem_among_others(photos, tmp_path, capsys, entry, said):
    out = tmp_path / "pairs"
    assert run("pairs", photos, "--conditions", "canny", "--size", 32, "--out", out, "--workers", 1) == 0
    first, *others = (out / "pairs.jsonl").read_text().splitlines()
    changed = "1" * 5000 if entry is None else json.dumps({**json.loads(first), **entry})
    (out / "pairs.jsonl").write_text("\n".join([changed, *others]))
    capsys.readouterr()
    assert run("pairs", "--check", out) == 2
    printed = capsys.readouterr().out
    assert "line 1" in printed and said in printed


def test_a_template_of_other_fields_is_refused(photos, tmp_path, capsys):
    assert run("pairs", photos, "--conditions", "canny", "--out", tmp_path / "pairs", "--prompt", "{name[x]}") == 2
    check(capsys.readouterr().err, "unknown-key", "{name}", "{folder}")


def test_a_home_folder_after_an_option_is_expanded(photos, tmp_path, monkeypatch):
    """Shells leave the `~` of `--out=~/pairs` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(photos)
    assert run("pairs", photos, "--conditions", "canny", "--size", 32, "--out=~/made", "--workers", 1) == 0
    assert len(read_pairs(tmp_path / "made", "canny")) == 6 and not (photos / "~").exists()
