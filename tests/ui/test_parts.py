"""Parts of the page that need no browser."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from controlkit import conditions
from controlkit.data.pairs import read_pairs, write_pairs
from controlkit.errors import UserError
from controlkit.server.catalogue import list_models
from controlkit.server.limits import Limits
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


@pytest.mark.parametrize("listed", ["../../../secret.png", "{folder}/secret.png"])
def test_a_zip_lists_its_own_files_only(tmp_path, listed):
    """Else an upload would show any image of the server, on the contact sheet and in previews."""
    from controlkit.ui.runs import Workplace

    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    path = listed.format(folder=tmp_path)
    row = {"image": "own.png", "conditions": {"canny": path}, "prompt": "x"}
    place = Workplace(tmp_path / "work")
    for name, rows in (("pairs.jsonl", row), ("prompt.json", {"source": path, "target": "own.png", "prompt": "x"})):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.write(tmp_path / "secret.png", "own.png")
            file.writestr(name, json.dumps(rows) + "\n")
        with refused("bad-data", "outside of its folder"):
            place.add_zip("mine", tmp_path / "a.zip")
    assert place.pairs() == []


@pytest.mark.parametrize("target", ["secret.png", "nothing.png"])
def test_a_table_in_a_zip_is_not_followed_out_of_it(tmp_path, target):
    """Nor does the answer tell whether a file is there."""
    import pyarrow
    from pyarrow import parquet

    from controlkit.ui.runs import Workplace

    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    own = io.BytesIO()
    Image.new("RGB", (16, 16)).save(own, "PNG")
    cell = {"bytes": None, "path": str(tmp_path / target)}
    rows = {"image": [cell], "canny": [{"bytes": own.getvalue(), "path": None}], "text": ["x"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "pairs.parquet")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.write(tmp_path / "pairs.parquet", "pairs.parquet")
    place = Workplace(tmp_path / "work")
    with refused("bad-data", "outside of its folder"):
        place.add_zip("mine", tmp_path / "a.zip")
    assert place.pairs() == []


def test_a_damaged_zip_is_told_as_such(tmp_path):
    from controlkit.ui.runs import Workplace

    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("fine.txt", "words " * 1000 + "more")
    whole = (tmp_path / "a.zip").read_bytes()
    place = Workplace(tmp_path / "work")
    for at in range(38, len(whole), 3):
        (tmp_path / "b.zip").write_bytes(whole[:at] + b"\xff\xff\xff" + whole[at + 3 :])
        with pytest.raises(UserError):  # there are no pairs in it, whether it can be read or not
            place.add_zip("mine", tmp_path / "b.zip")
    assert place.pairs() == []


@pytest.mark.parametrize(("steps", "images"), [(10, 2), (20, 1), (100, 4)])
def test_first_values_are_within_the_limits(steps, images):
    from controlkit.sampling.seeds import parse_seeds
    from controlkit.ui.first_values import first_seeds, first_steps

    limits = Limits(steps=steps, images=images)
    assert len(parse_seeds(first_seeds(limits), "Seeds")) == images
    assert first_steps(limits) == min(20, steps)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "control0.png is 90 x 40; Choose a width and height of its aspect ratio, or crop it yourself",
            "the image of control 2 is 90 x 40; Choose a Width and Height in Settings of its aspect ratio, or crop it"
            " yourself",
        ),
        ("control1-mask.png is black", "the mask of control 3 is black"),
        ("image.png has changed", "the start image has changed"),
        ("my-image.png and control1 stay", "my-image.png and control1 stay"),
    ],
)
def test_notes_name_what_the_page_shows(text, shown):
    from controlkit.ui.client import in_words_of_page

    assert in_words_of_page(text, [2, 3]) == shown


def test_a_mask_of_another_shape_is_refused():
    gradio = pytest.importorskip("gradio")

    from controlkit.ui.control_rows import control_row

    with gradio.Blocks():
        row = control_row(1, list_models(), visible=True, control="canny", image=None)
    values = dict.fromkeys(row.inputs) | {row.control: "canny", row.mode: "default", row.masked: True}
    values[row.mask] = {"layers": [Image.new("RGBA", (64, 64), "red")]}
    values[row.image] = {"composite": Image.new("RGB", (64, 64))}
    assert row.body(values, list_models())["mask"]
    values[row.image] = {"composite": Image.new("RGB", (64, 32))}
    with refused("contradiction", "control 2", "canny"):
        row.body(values, list_models())


def test_a_row_chooses_a_task_of_a_control_with_several(unions):
    gradio = pytest.importorskip("gradio")

    from controlkit.ui.control_rows import control_row, offered, task_update

    assert {"union", "depth"} <= set(offered(unions)) and task_update(unions, "canny")["visible"] is False
    assert task_update(unions, "union")["choices"] == ["canny", "depth"]
    assert [task_update(unions, name)["value"] for name in ("union", "depth")] == [None, "depth"]
    assert task_update(unions, "union", "Canny")["value"] == "canny"
    with gradio.Blocks():
        row = control_row(1, unions, visible=True, control="union", image=None)
        recorded = control_row(0, unions, visible=True, control="depth", image=None)
    assert (row.task.value, recorded.task.value) == (None, "depth")
    values = dict.fromkeys(row.inputs) | {row.control: "union", row.mode: "default"}
    values[row.image] = {"composite": Image.new("RGB", (64, 64))}
    with refused("missing-setting", "control 2 (union)", "task"):
        row.body(values, unions)
    assert row.condition(values, unions) is None
    values[row.task] = "depth"
    assert row.body(values, unions)["values"] == {"task": "depth"} and row.condition(values, unions) == "depth"
    assert row.body({**values, row.control: "canny"}, unions)["values"] == {}


def test_condition_images_without_a_model_do_not_wait_for_the_queue(monkeypatch):
    from controlkit.ui.client import Client

    async def never(*_):
        raise AssertionError("it was queued")

    monkeypatch.setattr("controlkit.ui.client.detected", never)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    client, image = Client(None), Image.fromarray(pixels)
    found = asyncio.run(client.condition_image(image, "canny", {"low": 40}))
    assert np.array_equal(found, conditions.find("canny")(pixels, low=40))
    assert np.array_equal(asyncio.run(client.condition_image(image, None, {})), pixels)
    with refused("out-of-range", 1530):
        asyncio.run(client.condition_image(image, "canny", {"low": 9999}))


def _pairs(folder) -> dict:
    """Files of pairs: name -> content."""
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    write_pairs(folder, [(image, image, "a thing") for image in images])
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("above", ["", "mine/", "mine/mine/"])
@pytest.mark.parametrize("system", ["linux", "macos"])
def test_a_zip_is_read_as_systems_make_it(tmp_path, above, system):
    from controlkit.ui.runs import Workplace

    files = {f"{above}{name}": data for name, data in _pairs(tmp_path / "made").items()}
    if system == "macos":
        files |= {f"__MACOSX/{name.rpartition('/')[0]}/._{name.rpartition('/')[2]}": b"\0\5" for name in files}
        files |= {f"{above}.DS_Store": b"\0"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    place = Workplace(tmp_path / "work")
    place.add_zip("mine", tmp_path / "a.zip")
    assert len(read_pairs(place.pairs_folder("mine"))) == 3
    assert [path.name for path in (tmp_path / "work" / "pairs").iterdir()] == ["mine"]


def test_a_zip_without_pairs_leaves_its_name_free(tmp_path):
    from controlkit.ui.runs import Workplace

    files = _pairs(tmp_path / "made")
    with zipfile.ZipFile(tmp_path / "wrong.zip", "w") as file:
        file.writestr("readme.md", "text")
    with zipfile.ZipFile(tmp_path / "right.zip", "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    place = Workplace(tmp_path / "work")
    with refused("wrong-kind") as caught:
        place.add_zip("mine", tmp_path / "wrong.zip")
    assert str(tmp_path) not in str(caught.value)
    assert place.pairs() == [] and list((tmp_path / "work" / "pairs").iterdir()) == []
    place.add_zip("mine", tmp_path / "right.zip")
    assert place.pairs() == ["mine"]
    with refused("would-overwrite", "mine"):
        place.add_zip("mine", tmp_path / "right.zip")


def _training(folder, code: str) -> str:
    """A script to run in place of python, whose training is `code`: it may use `words`, the command, and `out`."""
    script = folder / "python"
    begin = "import json, os, pathlib, signal, sys, time\nwords = sys.argv[3:]\n"
    begin += "out = pathlib.Path(words[words.index('--out') + 1])\nout.mkdir(exist_ok=True)\n"
    script.write_text(f"#!{sys.executable}\n{begin}{code}")
    script.chmod(0o700)
    return str(script)


def _start(place, name: str = "one") -> None:
    place.pairs_folder("mine").mkdir(parents=True, exist_ok=True)
    place.start(name, "mine", base="nano", control="base.safetensors", steps=1, learning_rate=None)


def _until(what) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_adapter_is_offered_when_its_run_ends_and_not_when_it_fails(tmp_path, monkeypatch):
    from controlkit.ui.runs import Workplace

    code = "(out / 'adapter.safetensors').write_text(words[words.index('--control') + 1])\n"
    code += "sys.exit('bad' in out.name)\n"
    monkeypatch.setattr(sys, "executable", _training(tmp_path, code))
    offered = []
    place = Workplace(tmp_path / "work", offer=lambda name, path: offered.append((name, path.read_text())))
    for name in ("good", "bad"):
        _start(place, name)
        _until(lambda name=name: not place.state(name).is_running)
    assert offered == [("good", "base.safetensors")]  # whoever sees the run ended, sees it offered
    assert [path.name for path in place.adapters.iterdir()] == ["good.safetensors"]


def test_an_adapter_of_a_run_that_outlived_its_server_is_kept_by_the_next(tmp_path, monkeypatch):
    from controlkit.ui.runs import Workplace

    code = "print(json.dumps({'report': {}}) if 'good' in out.name else '')\n"
    code += "(out / 'adapter.safetensors').write_text('trained')\n"
    monkeypatch.setattr(sys, "executable", _training(tmp_path, code))
    killed = Workplace(tmp_path / "work")
    monkeypatch.setattr(killed, "_end", lambda name, process: process.wait())
    for name in ("good", "unfinished"):
        _start(killed, name)
        _until(lambda name=name: not killed.state(name).is_running)
    place = Workplace(tmp_path / "work")
    place.keep_finished()
    assert [path.name for path in place.adapters.iterdir()] == ["good.safetensors"]
    (place.adapters / "good.safetensors").write_text("newer")
    place.keep_finished()
    assert (place.adapters / "good.safetensors").read_text() == "newer"


def test_a_report_stays_until_another_training_is_completed(tmp_path, monkeypatch):
    from controlkit.ui.runs import Workplace

    code = "(out / 'begun').touch()\n"
    code += "while not (out / 'answer').exists():\n    time.sleep(0.05)\n"
    code += "print((out / 'answer').read_text())\n(out / 'answer').unlink()\n"
    monkeypatch.setattr(sys, "executable", _training(tmp_path, code))
    place = Workplace(tmp_path / "work")
    folder = place.run_folder("one")
    failed = {"error": {"message": "out of memory", "code": "out-of-memory"}}
    shown = None
    for answer in ({"report": {"title": "first"}}, failed, failed, {}, {"report": {"title": "second"}}):
        _start(place)
        _until((folder / "begun").exists)
        assert place.state("one").report == shown and not place.state("one").is_complete
        (folder / "begun").unlink()
        (folder / "answer.new").write_text(json.dumps(answer))
        (folder / "answer.new").rename(folder / "answer")
        _until(lambda: not place.state("one").is_running)
        state = place.state("one")
        shown = answer.get("report", shown)
        assert state.report == shown and place.reports() == ["one"]
        assert state.is_complete == ("report" in answer)
        assert (state.error is None) == ("error" not in answer)


_COUNTS_SIGNALS = """
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(number))
(out / "ready").touch()
while not signals:
    time.sleep(0.05)
time.sleep(1)
(out / "signals").write_text(str(len(signals)))
"""
"""A second signal ends a training before its state is saved."""


def test_a_run_that_is_stopped_again_gets_one_signal(tmp_path, monkeypatch):
    from controlkit.ui.runs import Workplace

    monkeypatch.setattr(sys, "executable", _training(tmp_path, _COUNTS_SIGNALS))
    place = Workplace(tmp_path / "work")
    for _ in range(2):  # a run that was resumed can be stopped, too
        _start(place)
        folder = place.run_folder("one")
        _until((folder / "ready").exists)
        place.stop("one")
        time.sleep(0.2)
        place.stop("one")
        place.stop_all()
        assert (folder / "signals").read_text() == "1"
        (folder / "ready").unlink()
        _until(lambda: not place.state("one").is_running)
    with refused("unknown-name", "one"):
        place.stop("one")


def test_ctrl_c_in_the_terminal_of_the_server_is_one_signal_for_a_run(tmp_path):
    work, training = tmp_path / "work", _training(tmp_path, _COUNTS_SIGNALS)
    code = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
sys.executable = {training!r}
from controlkit.ui.runs import Workplace
place = Workplace(pathlib.Path({str(work)!r}))
place.pairs_folder("mine").mkdir(parents=True)
try:
    place.start("one", "mine", base="nano", control="base.safetensors", steps=1, learning_rate=None)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)  # as a server that ends its requests first
    place.stop_all()
"""
    server = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    _until((work / "runs" / "one" / "ready").exists)
    os.killpg(server.pid, signal.SIGINT)  # as a terminal does: to all processes of its foreground group
    server.wait(60)
    assert (work / "runs" / "one" / "signals").read_text() == "1"


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
