"""Prompts of pairs in training: which of several is drawn, and what is told of them before it begins."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from controlkit.controls.ctrlora import BaseControlNet
from controlkit.data.pairs import write_pairs
from controlkit.formats.load import save_control
from controlkit.training.control_objective import ControlObjective
from controlkit.training.pair_cache import PairCache
from controlkit.training.recipe import identifying
from controlkit.training.recipes import recipes
from controlkit.training.run import run
from controlkit.training.sources.multigen import MultiGenSource
from refusals import refused

CPU = torch.device("cpu")
CAPTIONS = ["red apple", "a fruit", "something red"]


@pytest.fixture
def folder(tmp_path):
    images = [np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8) for number in range(4)]
    write_pairs(tmp_path / "pairs", [(255 - image, image, "plain") for image in images])
    return tmp_path / "pairs"


@pytest.fixture
def recipe(folder, base_folder, tiny_base, tmp_path):
    control = tmp_path / "base.safetensors"
    save_control(control, BaseControlNet.for_base(tiny_base), tiny_base, dtype=torch.float32)
    settings = {"out": str(tmp_path / "run"), "pairs": str(folder), "base": str(base_folder), "prompt_drop": 0.0}
    return recipes()["ctrlora-adapter"](
        **settings, control=str(control), rank=2, batch_size=4, device="cpu", preview_every=100
    )


def pairs_of(objective):
    (own,) = objective.source.of.values()
    return own


def rewrite(folder, **changes):
    """Change every line of prompt.json."""
    lines = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    (folder / "prompt.json").write_text("\n".join(json.dumps({**line, **changes}) for line in lines))


def test_one_of_several_captions_is_drawn_in_each_step(recipe, folder, monkeypatch):
    plain = ControlObjective(recipe, CPU)
    rewrite(folder, prompt=CAPTIONS)
    objective = ControlObjective(recipe, CPU)
    drawn = Counter()
    for step in range(100):
        seen = objective.samples(step)
        assert seen == objective.samples(step)
        told = [text.rpartition(": ") for text in seen]
        assert [where for where, _, _ in told] == [text.rpartition(": ")[0] for text in plain.samples(step)]
        drawn.update(text.strip("'") for _, _, text in told)
    assert set(drawn) == set(CAPTIONS) and min(drawn.values()) > 80

    given = []
    gather = type(pairs_of(objective).texts).gather
    monkeypatch.setattr(
        type(pairs_of(objective).texts), "gather", lambda self, rows: given.append(rows) or gather(self, rows)
    )
    objective.loss(7)
    prompts = sorted({"", *CAPTIONS})
    assert [repr(prompts[row]) for row in given[0]] == [text.rpartition(": ")[2] for text in objective.samples(7)]


def test_every_caption_has_its_own_embedding(recipe, folder):
    rewrite(folder, prompt=CAPTIONS)
    objective = ControlObjective(recipe, CPU)
    rows, first, empty = pairs_of(objective).cache.texts()
    text = objective.base.encode_text(CAPTIONS)
    assert torch.equal(
        rows.gather(torch.tensor([pairs_of(objective).cache.positions[one] for one in CAPTIONS])).tokens, text.tokens
    )
    assert len(rows) == 4 and pairs_of(objective).cache.positions[""] == empty
    assert first.tolist() == [pairs_of(objective).cache.positions[CAPTIONS[0]]] * len(pairs_of(objective).pairs)
    before = objective.data
    swapped = [dataclasses.replace(pair, more_prompts=pair.more_prompts[::-1]) for pair in pairs_of(objective).pairs]
    assert PairCache(objective.base, swapped).content() != before


@pytest.mark.parametrize("changed", ["prompt", "condition image"])
def test_changed_held_out_pairs_are_told_apart_from_changed_training_pairs(changed, recipe, folder):
    before = ControlObjective(recipe, CPU)
    (pair,) = pairs_of(before).held_out
    place = int(pair.target.stem)
    if changed == "prompt":
        lines = (folder / "prompt.json").read_text().splitlines()
        lines[place] = lines[place].replace("plain", "other")
        (folder / "prompt.json").write_text("\n".join(lines))
    else:
        Image.new("RGB", (64, 64), "red").save(pair.source)
    after = ControlObjective(recipe, CPU)
    assert after.data == before.data and after.held_out_data != before.held_out_data
    assert ControlObjective(recipe, CPU).held_out_data == after.held_out_data


def test_a_run_that_was_interrupted_draws_the_same_captions(recipe, folder, tmp_path):
    rewrite(folder, prompt=CAPTIONS)
    whole = dataclasses.replace(recipe, steps=4, out=str(tmp_path / "whole"), min_lr_rate=1.0, warmup_steps=0)
    run(whole)
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    run(dataclasses.replace(broken, steps=2))
    run(broken)
    one, two = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_empty_and_long_prompts_are_told_before_training(recipe, folder, capsys):
    ControlObjective(recipe, CPU)
    assert "prompts are" not in capsys.readouterr().err
    lines = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    for line, prompt in zip(lines, (" ", None, ["apple " * 100, "short"], "plain"), strict=True):
        line["prompt"] = prompt
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    objective = ControlObjective(recipe, CPU)
    told = capsys.readouterr().err
    assert "note: 2 of 5 prompts are empty\n" in told
    tokens = objective.base.prompt_tokens
    assert (
        f"note: 1 of 5 prompts are longer than the {tokens} tokens that this base reads; the rest is cut (line 3)"
        in told
    )


def test_recipes_name_columns(recipe, folder, capsys):
    rewrite(folder, words="of another column", source="../pairs/source/00000.png")
    objective = ControlObjective(dataclasses.replace(recipe, caption_column="words"), CPU)
    assert {pair.prompt for pair in pairs_of(objective).pairs} == {"of another column"}
    rewrite(folder, source="../elsewhere.png")
    (folder / "source/00000.png").rename(folder.parent / "elsewhere.png")
    ControlObjective(recipe, CPU)
    assert "1 of the 5 files" in capsys.readouterr().err
    with refused("unknown-name", "caption_column is 'word'", "source, target, prompt, words"):
        ControlObjective(dataclasses.replace(recipe, caption_column="word"), CPU)


def test_runs_from_before_columns_could_be_named_go_on(recipe):
    assert not [name for name in identifying(recipe) if name.endswith("_column")]
    assert identifying(dataclasses.replace(recipe, caption_column="x"))["caption_column"] == "x"


def test_empty_and_long_prompts_of_multigen_are_told(tmp_path, tiny_base):
    prompts = ["", " ", None, 'say "prompt": ""', "fine", "apple " * 100, "\t"]
    lines = [{"source": "0.png", "control_hed": "0.png", "prompt": prompt} for prompt in prompts]
    (tmp_path / "json_files").mkdir()
    (tmp_path / "json_files/aesthetics_plus_all_group_hed_all.json").write_text("\n".join(map(json.dumps, lines)))
    recipe = recipes()["controlnet"](out="x", steps=1, multigen=str(tmp_path), condition="hed", score_pictures=2)
    told = MultiGenSource(recipe).notes(tiny_base)
    assert told[0] == "hed: 4 of 7 prompts are empty"
    assert told[1].startswith("hed: 1 of 7 prompts are longer than the")
