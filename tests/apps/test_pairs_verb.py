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
        (("{photos}", "--conditions", "cany", "--out", "{out}"), None, ["'cany'", "did you mean canny"]),
        (("{photos}", "--conditions", "canny,canny", "--out", "{out}"), None, ["canny"]),
        (("{out}", "--conditions", "canny", "--out", "{out}"), None, ["{out}"]),
        (("{photos}", "--conditions", "canny", "--out", "{out}", "--size", "3"), None, ["size", 3, 16]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--size", "100", "--buckets"),
            None,
            ["size", 100, "multiple of 8"],
        ),
        (("{photos}", "--conditions", "canny", "--out", "{out}", "--shards", "9"), None, ["shards", 9, 1, 6]),
        (("{photos}", "--conditions", "canny", "--out", "{out}", "--engine", "spark"), None, ["'spark'", "local, ray"]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--workers", "0"),
            "out-of-range",
            ["--workers 0", "at least 1"],
        ),
        (("{photos}", "--conditions", "bbox", "--out", "{out}"), None, ["instances"]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--base", "nano"),
            "contradiction",
            ["--base", "--check"],
        ),
        (("--check", "{out}"), None, ["{out}"]),
        (("--check", "{out}", "--out", "{out}"), "contradiction", ["--check", "--out"]),
        (
            ("{photos}", "--conditions", "canny", "--out", "{out}", "--caption", "blip", "--caption-model", "{photos}"),
            None,
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
