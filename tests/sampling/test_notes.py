"""Notes of `generate` and `condition`: what would fail in silence is said."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.bases.prompt_encoding import Embedding
from controlkit.sampling.notes import request_notes
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse


def run(*words: object) -> int:
    return main([str(word) for word in words])


def notes_of(capsys, *words):
    assert run(*words) == 0
    err = capsys.readouterr().err.splitlines()
    return [line.removeprefix("note: ") for line in err if line.startswith("note: ")]


@pytest.fixture
def lines(tmp_path):
    """White lines on transparency."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[20:44, 20:22] = rgba[20:44, 42:44] = rgba[20:22, 20:44] = 255
    Image.fromarray(rgba).save(tmp_path / "lines.png")
    return tmp_path / "lines.png"


def test_white_lines_on_transparency_stay_white_lines(lines, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("generate", "x", "--control", f"canny={lines}", "--prepared", "--steps", 1, "--out", out)
    assert notes_of(capsys, *words) == []
    read = np.asarray(Image.open(out / "condition0.png"))
    assert (read == np.asarray(Image.open(lines))[..., 3:]).all() and read.any()
    # A photo lies over white, as ever: nothing can be seen of white lines, and that is said.
    (note,) = notes_of(capsys, *(word for word in words if word != "--prepared"))
    assert f"canny of {lines} is one flat colour" in note
    # So it is of conditions whose images are drawn on white.
    words = ("generate", "x", "--control", f"nano/palette={lines}", "--prepared", "--steps", 1, "--out", out)
    (note,) = notes_of(capsys, *words)
    assert str(lines) in note and "nano/palette" in note and "is one flat colour: check" in note


def test_a_black_mask_is_noted(lines, tmp_path, capsys):
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    control = f"canny={lines},mask={tmp_path / 'black.png'}"
    words = ("generate", "x", "--control", control, "--prepared", "--steps", 1, "--out", tmp_path / "out")
    assert notes_of(capsys, *words) == ["the mask of canny is black everywhere, so the control does not act"]


def test_black_lines_on_transparency_are_flat_where_white_ones_are_expected(lines, tmp_path, capsys):
    rgba = np.array(Image.open(lines))
    rgba[..., :3] = 0
    Image.fromarray(rgba).save(lines)
    words = ("generate", "x", "--control", f"canny={lines}", "--prepared", "--steps", 1, "--out", tmp_path / "out")
    (note,) = notes_of(capsys, *words)
    assert "is one flat colour" in note and "polarity" in note and "transparency" in note


def test_a_condition_that_finds_nothing_says_so(tmp_path, capsys):
    blank, out = tmp_path / "blank.png", tmp_path / "out.png"
    Image.new("RGB", (64, 64), (200, 180, 160)).save(blank)
    (note,) = notes_of(capsys, "condition", "canny", blank, "--out", out)
    assert f"canny of {blank} is one flat colour" in note
    (note,) = notes_of(capsys, "condition", "all", blank, "--out", out)
    assert "one flat colour" in note and f"{blank}: canny, " in note and "noise" not in note
    assert run("condition", "canny", blank, "--out", out, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1
    assert notes_of(capsys, "condition", "noise", blank, "--out", out) == []


def test_frames_that_are_left_out_are_told(tmp_path, capsys):
    scene = np.zeros((64, 64, 3), np.uint8)
    scene[16:48, 16:48] = 200
    frames = [Image.fromarray(scene), Image.fromarray(255 - scene)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    note = f"{tmp_path / 'a.gif'} has several frames; only the first is used"
    assert notes_of(capsys, "condition", "canny", tmp_path / "a.gif", "--out", tmp_path / "out.png") == [note]
    use = f"canny={tmp_path / 'a.gif'}"
    assert notes_of(capsys, "generate", "x", "--control", use, "--steps", 1, "--out", tmp_path / "out") == [note]


@pytest.mark.parametrize(
    ("size", "width", "height", "far"),
    [
        (512, 512, 512, False),
        (512, 512, 768, False),
        (512, 640, 640, False),
        (1024, 1536, 640, False),
        (512, 768, 768, True),
        (512, 512, 1024, True),
        (512, 256, 512, True),
        (512, 256, 256, True),
        (64, 128, 32, True),
    ],
)
def test_sizes_far_from_what_a_base_was_trained_at_are_told(size, width, height, far):
    base = SimpleNamespace(
        name="a base", size=size, cut_from=lambda prompt: "", default_guidance=3, reads_guidance=False
    )
    notes = request_notes(GenerateRequest(prompt="x"), base, width, height)  # type: ignore[arg-type]
    assert bool(notes) == far
    assert not far or f"a base was trained at {size} x {size}; at {width} x {height} expect" in notes[0]


def test_a_negative_weight_is_told_and_no_other():
    base = SimpleNamespace(name="a base", size=64, cut_from=lambda prompt: "", default_guidance=3, reads_guidance=False)
    uses = tuple(ControlUse(control=f"c{weight}", image="x.png", weight=weight) for weight in (-0.5, 0, 1, 1.5))
    (note,) = request_notes(GenerateRequest(prompt="x", controls=uses), base, 64, 64)  # type: ignore[arg-type]
    assert note.startswith("the weight of c-0.5 is -0.5: ") and "negative" in note


@pytest.mark.parametrize(
    ("guidance", "default", "negative", "told"),
    [
        (1, 3, "blue", True),
        (None, 1, "blue", True),
        (1, 3, " ", False),
        (None, 3, "blue", False),
        (2, 1, "blue", False),
    ],
)
def test_a_negative_prompt_without_guidance_is_told(guidance, default, negative, told):
    base = SimpleNamespace(
        name="a base", size=64, cut_from=lambda prompt: "", default_guidance=default, reads_guidance=False
    )
    request = GenerateRequest(prompt="x", negative_prompt=negative, guidance=guidance)
    notes = request_notes(request, base, 64, 64)  # type: ignore[arg-type]
    assert len(notes) == told
    assert not told or ("guidance 1 " in notes[0] and "negative prompt" in notes[0])


def test_the_vectors_of_a_learned_word_count_as_tokens_that_are_read():
    nano = load_base("nano")
    prompt = "emb style, red apple on a blue background with stars"
    width = nano.text_encoder.get_input_embeddings().weight.shape[1]

    def notes(vectors, text=prompt):
        learned = [Embedding("emb", {"text_encoder": torch.zeros(vectors, width)})]
        return request_notes(GenerateRequest(prompt=text), nano, nano.size, nano.size, learned)

    assert notes(1) == []
    (note,) = notes(nano.prompt_tokens - 2 - 3)
    assert note.endswith("'apple on a blue background with stars'")
    (note,) = notes(12, "emb and emb, emb")
    assert note.endswith("'emb , emb'")


def test_size_and_weight_are_told_by_generate(lines, tmp_path, capsys):
    use = f"canny={lines}@-1"
    words = ("generate", "x", "--control", use, "--prepared", "--steps", 1, "--width", 128, "--height", 128)
    notes = notes_of(capsys, *words, "--out", tmp_path / "out")
    assert [note.split(":")[0].split(";")[0] for note in notes] == [
        "nano was trained at 64 x 64",
        "the weight of canny is -1",
    ]
