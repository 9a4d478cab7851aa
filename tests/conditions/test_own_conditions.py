"""A condition of one's own, in one file that the environment names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from controlkit.apps.cli import main
from controlkit.conditions.condition import condition
from controlkit.formats.load import shipped_controls
from refusals import check, refused

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_condition.py"


def controlkit(*words, files, cwd):
    return subprocess.run(
        [sys.executable, "-m", "controlkit", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "CONTROLKIT_CONDITIONS": os.pathsep.join(map(str, files))},
    )


@pytest.fixture
def image(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    Image.fromarray(np.repeat(np.tile(ramp, (48, 1))[..., None], 3, 2)).save(tmp_path / "ramp.png")
    return tmp_path / "ramp.png"


def test_the_example_is_a_condition_like_any_other(image, tmp_path):
    made = controlkit("condition", "dots", image, "--out", "out.png", "--set", "step=6", files=[EXAMPLE], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    drawn = np.asarray(Image.open(tmp_path / "out.png").convert("L"))
    assert drawn.shape == (48, 64)
    # Dark at the left, light at the right.
    assert drawn[:, :20].mean() < drawn[:, -20:].mean() - 80
    listed = controlkit("condition", "--list", "--json", files=[EXAMPLE], cwd=tmp_path)
    assert "halftone" in {entry["name"] for entry in json.loads(listed.stdout)}


def test_a_file_that_fails_is_named(tmp_path, image):
    (tmp_path / "broken.py").write_text("1 / 0")
    made = controlkit("condition", "--list", files=[tmp_path / "broken.py"], cwd=tmp_path)
    assert made.returncode == 2
    assert "broken.py" in made.stderr and "ZeroDivisionError" in made.stderr and "Traceback" not in made.stderr
    made = controlkit("condition", "--list", files=["nothing.py"], cwd=tmp_path)
    assert made.returncode == 2
    check(made.stderr, "missing-file", "CONTROLKIT_CONDITIONS", "nothing.py")


def test_one_that_fails_on_every_image_is_no_fault_of_the_images(tmp_path, image):
    (tmp_path / "own.py").write_text(
        "from controlkit.conditions.condition import condition\n\n\n"
        "@condition('failing')\ndef failing(image):\n    raise RuntimeError('no')\n"
    )
    words = ("pairs", image, "--conditions", "failing", "--out", "pairs", "--workers", 1)
    made = controlkit(*words, files=[tmp_path / "own.py"], cwd=tmp_path)
    assert made.returncode == 2
    check(made.stderr, "plugin-failed", "failing", "RuntimeError")


def test_all_conditions_of_one_image_on_one_sheet(image, tmp_path):
    made = controlkit("condition", "all", image, "--out", "sheet.png", "--json", files=[], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert len(json.loads(made.stdout)["conditions"]) >= 25
    assert Image.open(tmp_path / "sheet.png").width > 900


def test_fields_under_their_former_names(tmp_path, image):
    path = tmp_path / "former.py"
    path.write_text("""
from controlkit.conditions.condition import condition, uniform_int
from controlkit.conditions.fidelity import PSNR

@condition("former", summary="s", fidelity=PSNR, draw={"n": uniform_int(1, 2)}, cuts=False, seen="at 64 x 64")
def former(image, *, n: int = 1):
    return image
""")
    made = controlkit("condition", "former", "--json", files=[path], cwd=tmp_path)
    facts = json.loads(made.stdout)
    assert facts["training"] == {"n": "integers, uniform from 1 to 2"}
    assert facts["cuts"] is False and facts["seen"] == "at 64 x 64"


OWN = """
import numpy as np
from controlkit.conditions.condition import condition

@condition("own"{fields})
def own(image):
    \"\"\"One line.

    And more.
    \"\"\"
    {body}
"""


def write_own(path, body, fields=""):
    path.write_text(OWN.format(body=body, fields=fields))
    return path


@pytest.mark.parametrize(
    ("body", "facts"),
    [
        ("return image[..., 0]", ["uint8 [48, 64]", "uint8 [48, 64, 3]"]),
        ("return image / 255", ["float64 [48, 64, 3]"]),
        ("return image[:20]", ["uint8 [20, 64, 3]"]),
        ("return image > 3", ["bool"]),
        ("return None", ["NoneType"]),
        ("return image @ np.eye(4)", ["ValueError", "own.py, line 11"]),
        ("raise KeyError('x')", ["KeyError", "own.py, line 11"]),
    ],
)
def test_a_result_or_an_exception_is_refused_by_name_by_every_verb(body, facts, image, tmp_path):
    own = write_own(tmp_path / "own.py", body)
    made = controlkit("condition", "own", image, "--out", "out.png", files=[own], cwd=tmp_path)
    assert made.returncode == 2 and "Traceback" not in made.stderr, made.stderr
    check(made.stderr, "plugin-failed", "the condition own", *facts)
    assert not (tmp_path / "out.png").exists()


def test_pairs_and_generate_refuse_a_bad_result_too(image, tmp_path):
    own = write_own(tmp_path / "own.py", "return image[..., 0]")
    (tmp_path / "photos").mkdir()
    image.rename(tmp_path / "photos" / "ramp.png")
    made = controlkit("pairs", "photos", "--conditions", "own", "--out", "made", files=[own], cwd=tmp_path)
    assert made.returncode == 2
    check(made.stderr, "plugin-failed", "the condition own returned uint8 [48, 64]")
    shipped = shipped_controls()["canny"]
    with safe_open(shipped, framework="np") as file:
        metadata = {**file.metadata(), "control.condition": "own"}
    save_file(load_file(shipped), tmp_path / "own.safetensors", metadata)
    words = ("generate", "a", "--control", "own.safetensors=photos/ramp.png", "--steps", "1")
    made = controlkit(*words, files=[own], cwd=tmp_path)
    assert made.returncode == 2
    check(made.stderr, "plugin-failed", "the condition own returned uint8 [64, 64]")


def test_a_function_alone_is_a_condition(tmp_path):
    own = write_own(tmp_path / "own.py", "return image")
    made = controlkit("condition", "own", "--json", files=[own], cwd=tmp_path)
    facts = json.loads(made.stdout)
    assert facts["summary"] == "One line." and facts["fidelity"] == "PSNR, dB"


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        (', aliases=("sobel",)', ["'sobel'", "softedge_sobel"]),
        (', aliases=("canny",)', ["'canny'", "the name of a condition"]),
    ],
)
def test_a_name_that_is_taken_says_by_what(fields, facts, tmp_path):
    own = write_own(tmp_path / "own.py", "return image", fields)
    made = controlkit("condition", "--list", files=[own], cwd=tmp_path)
    assert made.returncode == 2
    check(made.stderr, "contradiction", "own", *facts)


def test_names_are_found_however_they_are_written(tmp_path, image):
    own = tmp_path / "own.py"
    own.write_text(OWN.format(body="return image", fields="").replace('"own"', '"My-Own"'))
    for name in ("my_own", "My-Own"):
        made = controlkit("condition", name, image, "--out", "out.png", files=[own], cwd=tmp_path)
        assert made.returncode == 0, made.stderr
    listed = controlkit("condition", "--list", "--json", files=[own], cwd=tmp_path)
    assert "My-Own" in {entry["name"] for entry in json.loads(listed.stdout)}


def test_a_folder_of_images(tmp_path):
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    square = np.zeros((48, 64, 3), np.uint8)
    square[12:36, 16:48] = 255
    Image.fromarray(square).save(photos / "inner" / "square.png")
    Image.new("RGB", (32, 32), "red").save(photos / "flat.jpg")
    words = ("condition", "canny", photos, "--out", "edges", "--set", "low=20")
    made = controlkit(*words, "--json", files=[], cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    facts = json.loads(made.stdout)
    assert facts["written"] == 2 and facts["parameters"]["low"] == 20 and "1 of 2" in facts["notes"][0]
    assert Image.open(tmp_path / "edges" / "inner" / "square.png").size == (64, 48)
    assert Image.open(tmp_path / "edges" / "flat.png").size == (32, 32)
    (photos / "broken.png").write_bytes(b"no image")
    made = controlkit(*words, files=[], cwd=tmp_path)
    assert made.returncode == 2 and (tmp_path / "edges" / "flat.png").exists()
    check(made.stderr, "bad-image", "broken.png", "1 of 3")
    made = controlkit("condition", "canny", photos, "--out", photos, files=[], cwd=tmp_path)
    assert made.returncode == 2
    check(made.stderr, "would-overwrite", photos)


def test_the_description_says_what_to_do_with_finished_images(capsys):
    for name, said in (
        ("silhouette", ["flipped with its image ", "cropped with its image"]),
        ("inpaint", ["stay in place", "best recomputed from the cropped image"]),
        ("normal", ["vectors mirrored", "cropped with its image"]),
        ("openpose", ["cannot be flipped"]),
    ):
        assert main(["condition", name]) == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert all(" ".join(words.split()) in out for words in said), out


def test_a_folder_notes_renamed_images_and_animations(tmp_path, image, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = Image.open(image).convert("RGB")
    for name in ("a.jpg", "a.png", "the house.v2.png", "plain.png"):
        picture.save(photos / name)
    picture.save(photos / "moving.gif", save_all=True, append_images=[Image.new("RGB", picture.size, "red")])
    assert main(["condition", "canny", "photos", "--out", "edges"]) == 0
    said = capsys.readouterr().err
    assert "a.png -> a_png.png, the house.v2.png -> the_house_v2.png" in said
    assert "a.jpg ->" not in said and "plain.png ->" not in said
    assert "moving.gif has several frames" in said
    for number in range(5):
        picture.save(photos / f"photo {number}.png")
    assert main(["condition", "canny", "photos", "--out", "edges", "--json"]) == 0
    (renamed,) = (note for note in json.loads(capsys.readouterr().out)["notes"] if "->" in note)
    assert renamed.count("->") == 5 and renamed.endswith("and 2 more")


def test_a_condition_that_its_file_registers_again_is_replaced(monkeypatch):
    from controlkit.conditions import condition as module

    module.registry()  # loaded first, to be whole afterwards
    monkeypatch.setattr(module, "_REGISTRY", dict(module._REGISTRY))

    def registered(number, **fields):
        def mine(image):
            """Mine."""
            return np.full_like(image, number)

        return module.condition("mine", channels=1, **fields)(mine)

    image = np.zeros((16, 16, 3), np.uint8)
    registered(1, aliases=("own",))
    registered(2)
    assert (module.find("mine")(image) == 2).all()
    with refused("unknown-name", "own"):
        module.find("own")

    def other(image):
        """Another."""
        return image

    with refused("contradiction", "mine"):
        module.condition("mine", channels=1)(other)
    with refused("contradiction", "canny"):
        registered(3, aliases=("canny",))
    assert (module.find("mine")(image) == 2).all()


HELPED = '''
from controlkit.conditions.condition import condition
from helper import shade


@condition("own", summary="{summary}")
def own(image, *, level: int = {level}):
    """{text}"""
    return image * 0 + shade(level)  # {comment}
'''


def test_pairs_are_made_again_when_the_code_of_their_condition_changed(image, tmp_path):
    (tmp_path / "photos").mkdir()
    image.rename(tmp_path / "photos" / "ramp.png")
    own, helper = tmp_path / "own.py", tmp_path / "helper.py"
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    facts = {"summary": "a", "text": "b", "comment": "c", "level": 1}

    def made():
        words = ("pairs", "photos", "--conditions", "own,canny", "--out", "out", "--json")
        run = subprocess.run(
            [sys.executable, "-m", "controlkit", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "CONTROLKIT_CONDITIONS": str(own), "PYTHONPATH": os.pathsep.join(path)},
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)["made"]

    own.write_text(HELPED.format(**facts))
    helper.write_text("def shade(level):\n    return level\n")
    assert made() == 1
    own.write_text(HELPED.format(**{**facts, "summary": "A", "text": "B", "comment": "C"}))
    assert made() == 0
    own.write_text(HELPED.format(**{**facts, "level": 2}))
    assert made() == 1
    helper.write_text("def shade(level):\n    return 100 * level\n")
    assert made() == 1
    assert np.asarray(Image.open(tmp_path / "out" / "own" / "ramp.png")).max() == 200


def test_links_that_lead_nowhere_and_earlier_output_in_a_folder_of_images(tmp_path, image, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos = tmp_path / "photos"
    photos.mkdir()
    image.rename(photos / "b.png")
    (photos / "a.png").symlink_to("nothing.png")
    assert main(["condition", "canny", "photos", "--out", "photos/canny"]) == 2
    check(capsys.readouterr().err, "missing-file", "a.png", "1 of 2")
    (photos / "a.png").unlink()
    for _ in range(2):
        assert main(["condition", "palette", "photos", "--out", "photos/palette"]) == 0
        written = [path.relative_to(photos).as_posix() for path in photos.rglob("*.png")]
        assert sorted(written) == ["b.png", "canny/b.png", "palette/b.png"]
    # A folder with images of its own stays one.
    (tmp_path / "photos" / "mine").mkdir()
    Image.new("RGB", (32, 32)).save(photos / "mine" / "c.png")
    assert main(["condition", "canny", "photos/palette", "--out", "photos/mine"]) == 0
    assert main(["condition", "canny", "photos", "--out", "edges"]) == 0
    assert sorted(path.name for path in (tmp_path / "edges").rglob("*.png")) == ["b.png", "b.png", "c.png"]


@pytest.mark.parametrize("content", [None, b"mine"])
def test_images_of_others_in_the_folder_of_the_output_stay(content, tmp_path, image, capsys):
    (tmp_path / "photos").mkdir()
    image.rename(tmp_path / "photos" / "b.png")
    (tmp_path / "edges").mkdir()
    if content is None:
        Image.new("RGB", (32, 32)).save(tmp_path / "edges" / "b.png")
    else:
        (tmp_path / "edges" / "b.png").write_bytes(content)
    before = (tmp_path / "edges" / "b.png").read_bytes()
    assert main(["condition", "canny", str(tmp_path / "photos"), "--out", str(tmp_path / "edges")]) == 2
    check(capsys.readouterr().err, "would-overwrite", tmp_path / "edges" / "b.png", "--out")
    assert (tmp_path / "edges" / "b.png").read_bytes() == before


def test_a_missing_model_is_not_taken_for_a_missing_image(tmp_path, image, capsys):
    assert main(["condition", "depth", str(tmp_path), "--out", str(tmp_path / "out"), "--set", "model=./none"]) == 2
    check(capsys.readouterr().err, "missing-file", "none")


def test_an_image_without_out_replaces_nothing(tmp_path, image, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["condition", "canny", "ramp.png"]) == 0
    before = (tmp_path / "canny.png").read_bytes()
    (tmp_path / "canny.png").write_bytes(b"mine")
    assert main(["condition", "canny", "ramp.png"]) == 2
    check(capsys.readouterr().err, "would-overwrite", "canny.png", "--out")
    assert (tmp_path / "canny.png").read_bytes() == b"mine"
    assert main(["condition", "canny", "ramp.png", "--out", "canny.png"]) == 0  # a named file is meant
    assert (tmp_path / "canny.png").read_bytes() == before
    (tmp_path / "conditions.png").write_bytes(b"mine")
    assert main(["condition", "all", "ramp.png"]) == 2
    assert (tmp_path / "conditions.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["../evil", "a/b", "pictures", "", ".hidden", "two words"])
def test_a_name_that_is_no_folder_of_pairs_is_refused(name):
    with refused("out-of-range", repr(name), "letters, digits"):
        condition(name, summary="mine")(lambda image: image)


def test_a_folder_of_another_condition_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "in" / "a.png")
    words = [str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert main(["condition", "canny", *words]) == 0
    before = (tmp_path / "out" / "a.png").read_bytes()
    capsys.readouterr()
    assert main(["condition", "blur", *words]) == 2
    check(capsys.readouterr().err, "would-overwrite", tmp_path / "out" / "a.png", "canny", "--out")
    assert (tmp_path / "out" / "a.png").read_bytes() == before
