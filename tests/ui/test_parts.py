"""Parts of the page that need no browser."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import zipfile

import pytest
from PIL import Image

from refusals import check, refused


def test_the_page_says_which_package_is_missing():
    code = """
import sys
sys.modules["gradio"] = None
import controlkit.apps.cli
sys.exit(controlkit.apps.cli.main(["ui", "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    check(done.stderr, "missing-package", "controlkit[ui]")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "ä", "a" * 61])
def test_names_are_no_paths(name):
    from controlkit.ui.files import checked_name

    with refused("out-of-range"):
        checked_name(name)


@pytest.mark.parametrize("entry", ["../out.png", "/etc/x.png", "a/../../x.png", "..\\x.png"])
def test_a_zip_stays_in_its_folder(tmp_path, entry):
    from controlkit.ui.runs import Workplace

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("fine.png", b"x")
        file.writestr(entry, b"x")
    place = Workplace(tmp_path / "work")
    with refused("bad-data"):
        place.add_zip("mine", tmp_path / "a.zip")
    assert place.pairs() == [] and not (tmp_path / "out.png").exists()
    (tmp_path / "b.zip").write_bytes(b"no zip")
    with refused("unreadable-file"):
        place.add_zip("mine", tmp_path / "b.zip")


def test_an_adapter_is_offered_when_its_run_ends_and_not_when_it_fails(tmp_path, monkeypatch):
    """With a script in place of the training, which writes what `adapt` writes."""
    from controlkit.ui.runs import Workplace

    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "words = sys.argv[3:]\n"
        "out = pathlib.Path(words[words.index('--out') + 1])\n"
        "out.mkdir()\n"
        "(out / 'adapter.safetensors').write_text(words[words.index('--control') + 1])\n"
        "sys.exit('bad' in out.name)\n"
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    offered = []
    place = Workplace(tmp_path / "work", offer=lambda name, path: offered.append((name, path.read_text())))
    place.pairs_folder("mine").mkdir(parents=True)
    for name in ("good", "bad"):
        place.start(name, "mine", base="nano", control="base.safetensors", steps=1, learning_rate=None)
        for _ in range(600):
            if not place.state(name).is_running:
                break
            time.sleep(0.1)
    assert offered == [("good", "base.safetensors")]  # whoever sees the run ended, sees it offered
    assert [path.name for path in place.adapters.iterdir()] == ["good.safetensors"]


def test_uploads_of_the_same_name_are_all_made_into_pairs(tmp_path):
    from controlkit.ui.runs import Workplace

    def upload(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            Image.new("RGB", (64, 64), content).save(path)
        return str(path)

    place = Workplace(tmp_path / "work")
    colours = {
        "a/cat.png": (200, 0, 0),
        "b/cat.png": (0, 200, 0),
        "c/Cat.webp": (0, 0, 200),
        "a/cat-2.png": (90, 90, 90),
    }
    files = [upload(name, colour) for name, colour in colours.items()] + [upload("a/cat-2.txt", "a grey cat")]
    asyncio.run(place.make_pairs("mine", files, "grayscale", None))
    lines = [json.loads(line) for line in (place.pairs_folder("mine") / "pairs.jsonl").read_text().splitlines()]
    folder = place.pairs_folder("mine")
    made = {Image.open(folder / line["picture"]).convert("RGB").getpixel((9, 9))[:2]: line["prompt"] for line in lines}
    assert len(lines) == len(made) == 4  # no picture is lost
    assert [line["prompt"] for line in lines if line["key"] == "cat-2"] == ["a grey cat"]
    assert made[90, 90] == "a grey cat" and sorted(made.values()) == ["", "", "", "a grey cat"]
    two = [*files[:2], upload("b/cat.txt", "a green cat")]
    with refused("bad-data", "cat"):
        asyncio.run(place.make_pairs("other", two, "grayscale", None))
    assert place.pairs() == ["mine"]
