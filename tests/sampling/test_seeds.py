"""Seeds: their range, random ones, lists and ranges."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.apps.cli import main
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import initial_noise
from controlkit.sampling.seeds import MAX_SEED, parse_seeds, seeds_of_options
from refusals import check, refused


def test_random_seeds_are_settled_when_the_request_is_built():
    request = GenerateRequest(prompt="x", seeds=(-1, 7, -1))
    assert request.seeds[1] == 7 and len(set(request.seeds)) == 3
    assert all(0 <= seed < 2**32 for seed in request.seeds)
    assert GenerateRequest.from_json(request.to_json()) == request
    assert GenerateRequest(prompt="x", seeds=(-1,)).seeds != GenerateRequest(prompt="x", seeds=(-1,)).seeds


def test_a_seed_is_that_of_a_torch_generator(tiny_base):
    for seed in (0, 2**63, MAX_SEED):
        expected = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(initial_noise(tiny_base, [seed], 64, 64)[0], expected)


def test_seeds_of_the_same_noise_are_noted(tiny_base):
    made = generate(GenerateRequest(prompt="x", seeds=(5, 2**32 + 5, 6), steps=1), base=tiny_base)
    one, same, other = (np.asarray(each.image, int) for each in made.images)
    assert np.abs(one - same).max() <= 1 < np.abs(one - other).max()
    (note,) = (note for note in made.notes if "2^32" in note)
    assert f"5, {2**32 + 5}" in note
    assert not [n for n in generate(GenerateRequest(prompt="x", steps=1), base=tiny_base).notes if "2^32" in n]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", (7,)), ("3,5,9-12", (3, 5, 9, 10, 11, 12)), ("-1, 4", (-1, 4)), (f"{MAX_SEED}", (MAX_SEED,))],
)
def test_lists_and_ranges(text, seeds):
    assert parse_seeds(text, "--seeds") == seeds


@pytest.mark.parametrize(
    ("seed", "seeds", "before", "expected"),
    [
        (None, None, (0,), None),
        (None, "4", (0,), (0, 1, 2, 3)),
        ("7", None, (0,), (7,)),
        ("7", None, (3, 4), (7, 8)),
        ("7", "2", (0,), (7, 8)),
        (None, "2", (5,), (5, 6)),
        ("3,9", None, (0,), (3, 9)),
        (None, "3,5,9-11", (0,), (3, 5, 9, 10, 11)),
        (f"{MAX_SEED - 1}", "2", (0,), (MAX_SEED - 1, MAX_SEED)),
    ],
)
def test_options_of_seeds(seed, seeds, before, expected):
    assert seeds_of_options(seed, seeds, before) == expected


def test_a_random_first_seed_has_consecutive_ones_after_it():
    first, second, third = seeds_of_options("-1", "3")
    assert (second, third) == (first + 1, first + 2) and first != seeds_of_options("-1", None)[0]


@pytest.mark.parametrize(
    ("seed", "seeds", "code", "facts"),
    [
        (None, "0", "out-of-range", [0, 1]),
        (None, "3,x", "usage", ["--seeds", "'x'"]),
        ("1.5", None, "usage", ["--seed", "'1.5'"]),
        (None, "9-5", "out-of-range", ["9-5"]),
        (None, f"0-{MAX_SEED}", "out-of-range", [MAX_SEED]),
        (f"{MAX_SEED}", "2", "out-of-range", ["2^64 - 1"]),
        ("1,2", "3-4", "contradiction", ["--seed", "--seeds"]),
        ("1,2", "3", "contradiction", ["--seed", "--seeds"]),
    ],
)
def test_wrong_seeds_are_refused(seed, seeds, code, facts):
    with refused(code, *facts):
        seeds_of_options(seed, seeds)


def test_a_random_seed_is_written_down(base_folder, tmp_path, capsys):
    words = ["generate", "red apple", "--base", str(base_folder), "--steps", "1"]
    assert main([*words, "--seed", "-1", "--json", "--out", str(tmp_path / "one")]) == 0
    (seed,) = json.loads(capsys.readouterr().out)["request"]["seeds"]
    path = tmp_path / "one" / f"seed{seed}.png"
    assert json.loads(Image.open(path).text["controlkit"])["request"]["seeds"] == [seed]
    assert main(["generate", "--from", str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 0
    assert Image.open(tmp_path / "two" / path.name).tobytes() == Image.open(path).tobytes()
    assert main([*words, "--seeds", str(2**64), "--out", str(tmp_path / "three")]) == 2
    check(capsys.readouterr().err, "out-of-range", 2**64)
