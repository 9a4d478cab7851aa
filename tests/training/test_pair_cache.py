"""Training from pairs reads what frozen networks made of them from the cache, and is the same as without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from several_processes import torchrun

import tiny
from controlkit.bases.load import load_base
from controlkit.bases.stable_diffusion import StableDiffusion
from controlkit.controls.ctrlora import BaseControlNet
from controlkit.data.pair import Pair
from controlkit.data.pairs import read_pairs, write_pairs
from controlkit.data.readers.archives import write_tar
from controlkit.data.sources import ComputedCondition
from controlkit.errors import UserError
from controlkit.formats.load import save_control
from controlkit.images import to_tensor
from controlkit.training.control_objective import ControlObjective
from controlkit.training.diffusion import noised
from controlkit.training.pair_cache import PairCache
from controlkit.training.recipe import identifying
from controlkit.training.recipes import recipes
from controlkit.training.run import run
from controlkit.training.run_folder import fingerprint
from controlkit.training.sources.pairs import PairSource
from refusals import refused

CPU = torch.device("cpu")
COUNT = 6


def drawing(number: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Another pair for every number, which is not its own mirror image."""
    rng = np.random.default_rng(number)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((64, 64)))
    return 255 - image, image, f"thing {number % 4}"


@pytest.fixture
def folder(tmp_path):
    write_pairs(tmp_path / "pairs", [drawing(number) for number in range(COUNT)])
    return tmp_path / "pairs"


@pytest.fixture
def recipe(folder, base_folder, tiny_base, tmp_path):
    control = tmp_path / "base.safetensors"
    save_control(control, BaseControlNet.for_base(tiny_base), tiny_base, dtype=torch.float32)
    settings = {"out": str(tmp_path / "run"), "pairs": str(folder), "base": str(base_folder)}
    return recipes()["ctrlora-adapter"](**settings, control=str(control), rank=2, batch_size=4, device="cpu")


@pytest.mark.parametrize(
    ("recorded", "condition", "says"),
    [("canny", None, True), ("Canny_Edges", None, True), ("mine", None, False), ("canny", "canny", False)],
)
def test_a_recipe_that_names_no_condition_says_which_one_the_pairs_record(
    folder, recipe, tiny_base, recorded, condition, says
):
    lines = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    entries = [{"image": e["target"], "conditions": {recorded: e["source"]}, "prompt": e["prompt"]} for e in lines]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    if condition is not None:
        recipe = dataclasses.replace(recipe, condition=condition)
    notes = PairSource(recipe).notes(tiny_base)
    assert any("identity" in note and "set condition=canny" in note for note in notes) == says


@pytest.fixture
def encoded(monkeypatch):
    """How many images (of both sides) and prompts went through a network, counted."""
    from controlkit.bases.base import Base

    counts = {"images": 0, "prompts": 0}
    image, text = Base.encode_image, StableDiffusion.encode_text

    def encode_image(self, x):
        counts["images"] += len(x)
        return image(self, x)

    def encode_text(self, prompts, *more):
        counts["prompts"] += len(prompts)
        return text(self, prompts, *more)

    monkeypatch.setattr(Base, "encode_image", encode_image)
    monkeypatch.setattr(StableDiffusion, "encode_text", encode_text)
    return counts


def pairs_of(objective):
    (own,) = objective.source.of.values()
    return own


def flips_of(objective, step):
    return pairs_of(objective).flips(objective.sampling_step(step))


def everything(rows):
    return rows.gather(torch.arange(len(rows)))


def damage_rows(cache, kind):
    """Flip a bit in the last row of every segment of a kind."""
    for path in cache.glob(f"{kind}-*/*.safetensors"):
        data = bytearray(path.read_bytes())
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        name = next(name for name in ("tokens", kind) if name in header)
        data[8 + length + header[name]["data_offsets"][1] - 1] ^= 1
        path.write_bytes(bytes(data))


def test_rows_are_what_the_networks_make_bit_for_bit(tiny_base, folder, encoded):
    pairs = read_pairs(folder)
    given, truths = zip(*(pair.images(64) for pair in pairs), strict=True)
    control = BaseControlNet.for_base(tiny_base)
    latents = tiny_base.encode_image(to_tensor(truths) * 2 - 1).half()
    hints = control.encode(to_tensor(given), tiny_base).half()
    prompts = sorted({"", *(pair.prompt for pair in pairs)})
    text = tiny_base.encode_text(prompts)
    encoded.update(images=0, prompts=0)
    for _ in range(2):
        kept = PairCache(tiny_base, pairs)
        assert torch.equal(everything(kept.latents()), latents)
        assert torch.equal(everything(kept.hints(control)), hints)
        rows, prompt_of, empty = kept.texts()
        assert torch.equal(everything(rows).tokens, text.tokens)
        assert [prompts[place] for place in prompt_of] == [pair.prompt for pair in pairs]
        assert prompts[empty] == ""
    assert encoded == {"images": 2 * COUNT, "prompts": 5}  # the second time nothing was encoded


def test_a_image_that_changes_and_a_part_of_the_pairs_are_found_by_content(tiny_base, folder, encoded):
    pairs = read_pairs(folder)
    before = everything(PairCache(tiny_base, pairs).latents())
    assert encoded["images"] == COUNT
    part = everything(PairCache(tiny_base, [pairs[4], pairs[1]]).latents())
    assert torch.equal(part, before[[4, 1]])
    assert encoded["images"] == COUNT
    Image.fromarray(drawing(99)[1]).save(folder / "target/00002.png")
    after = everything(PairCache(tiny_base, read_pairs(folder)).latents())
    assert encoded["images"] == COUNT + 1
    changed = [number for number in range(COUNT) if not torch.equal(before[number], after[number])]
    assert changed == [2]


def test_tar_shards_of_the_same_files_have_the_same_rows(tiny_base, folder, tmp_path, encoded):
    pairs = read_pairs(folder)
    before = everything(PairCache(tiny_base, pairs).latents())
    files = []
    for number, pair in enumerate(pairs):
        files += [(f"{number}.png", pair.target.read_bytes()), (f"{number}.canny.png", pair.source.read_bytes())]
        files.append((f"{number}.txt", pair.prompt.encode()))
    write_tar(tmp_path / "shards" / "pairs.tar", files)
    shards = read_pairs(tmp_path / "shards", "canny")
    assert torch.equal(everything(PairCache(tiny_base, shards).latents()), before)
    assert encoded["images"] == COUNT


def test_a_image_that_changes_under_the_run_is_not_kept_under_its_old_name(tiny_base, folder, cache):
    pairs = read_pairs(folder)
    kept = PairCache(tiny_base, pairs)
    latents = kept.latents()
    damage_rows(cache, "latents")
    Image.fromarray(drawing(99)[1]).save(pairs[-1].target)
    latents = PairCache(tiny_base, pairs[:-1] + read_pairs(folder)[-1:]).latents()
    damage_rows(cache, "latents")
    Image.fromarray(drawing(98)[1]).save(pairs[-1].target)
    with refused("bad-data", pairs[-1].target):
        everything(latents)


def test_a_base_of_other_weights_or_type_has_rows_of_its_own(tiny_base, folder, base_folder, cache):
    pairs = read_pairs(folder)
    PairCache(tiny_base, pairs).latents()
    other = load_base(base_folder)
    with torch.no_grad():
        next(other.vae.parameters()).add_(0.1)
    latents = everything(PairCache(other, pairs).latents())
    truths = to_tensor([pair.images(64)[1] for pair in pairs]) * 2 - 1
    assert torch.equal(latents, other.encode_image(truths).half())
    PairCache(load_base(base_folder).to(dtype=torch.bfloat16), pairs).latents()
    assert len(list(cache.iterdir())) == 3


def test_embeddings_of_several_parts_and_of_bfloat16_come_back(folder):
    from tiny import build_tiny_sdxl

    base = build_tiny_sdxl().to(dtype=torch.bfloat16)
    pairs = read_pairs(folder)
    for _ in range(2):
        text = everything(PairCache(base, pairs).texts()[0])
        truth = base.encode_text(sorted({"", *(pair.prompt for pair in pairs)}))
        assert len(text.tensors()) == 3 and text.tokens.dtype == torch.bfloat16
        for mine, theirs in zip(text.tensors(), truth.tensors(), strict=True):
            assert torch.equal(mine.view(torch.int16), theirs.contiguous().view(torch.int16))


def plain_loss(objective, step):
    """The loss as it is without a cache and without flips."""
    pairs, base = pairs_of(objective).pairs, objective.base
    given, truths = zip(*(pair.images(64) for pair in pairs), strict=True)
    z = base.encode_image(to_tensor(truths) * 2 - 1).half()
    hint = objective.control.encode(to_tensor(given), base).half()
    generator = objective.torch_generator(step)
    chosen = torch.from_numpy(objective.numpy_generator(step).integers(len(pairs), size=objective.global_batch))
    dropped = torch.rand(objective.global_batch, generator=generator) < objective.recipe.prompt_drop
    prompts = ["" if drop else pairs[index].prompt for index, drop in zip(chosen.tolist(), dropped, strict=True)]
    text = base.encode_text(prompts)
    drawn = noised(objective.base.schedule, z[chosen].float(), generator, objective.global_batch, slice(None))
    residuals = objective.control(drawn.x_t, drawn.t, text, hint[chosen].float())
    return drawn.loss(base.predict(drawn.x_t, drawn.t, text, residuals))


def moved(objective):
    for parameter in objective.parameters():
        parameter.data.add_(0.02)
    return objective


def test_a_step_draws_what_it_drew_before_there_was_a_cache(recipe):
    objective = moved(ControlObjective(recipe, CPU))
    for step in (0, 7):
        assert torch.allclose(objective.loss(step), plain_loss(objective, step), atol=1e-6)


def test_prompts_are_dropped_at_random_in_every_step(recipe):
    objective = ControlObjective(dataclasses.replace(recipe, prompt_drop=0.5, batch_size=8), CPU)
    asked = []
    gather = pairs_of(objective).texts.gather
    pairs_of(objective).texts.gather = lambda chosen: (
        asked.append(chosen == pairs_of(objective).empty) or gather(chosen)
    )
    for step in range(12):
        objective.loss(step)
    dropped = torch.stack(asked).float()
    assert 0.3 < dropped.mean() < 0.7 and len({tuple(row.tolist()) for row in dropped}) > 6


def test_damaged_rows_are_made_again_in_the_middle_of_a_step_that_runs_under_autocast(recipe, cache, encoded, capsys):
    truth = ControlObjective(recipe, CPU)
    for kind in ("latents", "hints", "texts"):
        damage_rows(cache, kind)
    encoded.update(images=0, prompts=0)
    objective = ControlObjective(recipe, CPU)
    assert encoded == {"images": 0, "prompts": 0}
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(6):
            objective.loss(step).backward()
    assert encoded == {"images": 2, "prompts": 1}
    assert capsys.readouterr().err.count("damaged rows") == 3
    for mine, theirs in (
        (pairs_of(objective).latents, pairs_of(truth).latents),
        (pairs_of(objective).hints, pairs_of(truth).hints),
    ):
        rebuilt = everything(mine)
        # One image at a time is rounded otherwise than a batch, at the last of fp16's bits.
        assert torch.allclose(rebuilt.float(), everything(theirs).float(), atol=2e-3)


def test_a_run_that_stores_frozen_weights_in_bf16_looks_at_every_row_before(recipe, cache, encoded):
    truth = everything(pairs_of(ControlObjective(recipe, CPU)).latents)
    for kind in ("latents", "hints", "texts"):
        damage_rows(cache, kind)
    encoded.update(images=0, prompts=0)
    objective = ControlObjective(dataclasses.replace(recipe, precision="bf16"), CPU)
    assert encoded == {"images": 2, "prompts": 1}
    with torch.autocast("cpu", torch.bfloat16):
        for step in range(4):
            objective.loss(step)
    assert encoded == {"images": 2, "prompts": 1}
    rebuilt = everything(pairs_of(objective).latents)
    assert torch.allclose(rebuilt.float(), truth.float(), atol=2e-3)  # bf16 would be further away
    assert torch.equal(everything(pairs_of(ControlObjective(recipe, CPU)).latents), rebuilt)


def test_pairs_are_scaled_and_mirrored_as_their_condition_is(recipe, encoded):
    plain = ControlObjective(dataclasses.replace(recipe, flip=True), CPU)
    encoded.update(images=0)
    normals = ControlObjective(dataclasses.replace(recipe, flip=True, condition="normal"), CPU)
    # The images are the same and their latents stay; the condition images are turned in another way.
    assert encoded["images"] == 2 * len(pairs_of(normals).pairs)
    assert torch.equal(everything(pairs_of(plain).latents), everything(pairs_of(normals).latents))
    chosen, flipped = torch.tensor([0, 1]), torch.tensor([False, True])
    given = [pairs_of(normals).pairs[index].images(64)[0] for index in (0, 1)]
    given[1] = given[1][:, ::-1].copy()
    given[1][..., 0] = 255 - given[1][..., 0]
    hints = normals.control.encode(to_tensor(given), normals.base)
    assert torch.allclose(pairs_of(normals).hint(chosen, flipped), hints, atol=2e-3)
    with refused("unsupported", "openpose", "flip"):
        ControlObjective(dataclasses.replace(recipe, flip=True, condition="openpose"), CPU)
    ControlObjective(dataclasses.replace(recipe, condition="openpose"), CPU)


def test_flipped_pairs_are_flipped_on_both_sides_half_of_the_time(recipe, encoded):
    objective = ControlObjective(dataclasses.replace(recipe, flip=True, batch_size=16), CPU)
    assert encoded["images"] == 2 * 2 * len(pairs_of(objective).pairs)
    flips = torch.stack([flips_of(objective, step) for step in range(20)])
    assert 0.35 < flips.float().mean() < 0.65
    assert torch.equal(flips_of(objective, 3), flips_of(objective, 3)) and not torch.equal(flips[3], flips[4])
    chosen, flipped = torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, True])
    given, truths = zip(*(pairs_of(objective).pairs[index].images(64) for index in chosen.tolist()), strict=True)

    def turned(images):
        return to_tensor([image[:, ::-1] if flip else image for image, flip in zip(images, flipped, strict=True)])

    latents = objective.base.encode_image(turned(truths) * 2 - 1).half()
    assert torch.allclose(pairs_of(objective).latents.gather(chosen, flipped).float(), latents.float(), atol=2e-3)
    hints = objective.control.encode(turned(given), objective.base)
    assert torch.allclose(pairs_of(objective).hint(chosen, flipped), hints, atol=2e-3)
    settings = {**vars(recipe), "flip": True}
    shared = {key: settings[key] for key in ("out", "pairs", "base", "flip")}
    network = ControlObjective(recipes()["controlnet-pairs"](**shared, device="cpu"), CPU)
    with torch.no_grad():
        expected = network.control.encode(turned(given), network.base)
        images = pairs_of(network).condition_images(chosen, flipped).float() / 255
        assert torch.equal(network.control.encode(images, network.base), expected)
    assert pairs_of(network).hint(chosen, flipped) is None
    # A step that mirrors some of its pairs trains on them mirrored.
    assert flips_of(objective, 0).any() and flips_of(network, 0).any()
    for one in (objective, network):
        moved(one)
        mirrored = one.loss(0)
        pairs_of(one).flips = lambda step: torch.zeros(step.global_batch, dtype=torch.bool)
        assert mirrored.isfinite() and not torch.equal(one.loss(0), mirrored)


def test_pairs_are_cropped_at_several_places_on_both_sides_alike(recipe, folder, tmp_path, encoded):
    wide = tmp_path / "wide"
    write_pairs(wide, [(np.tile(a, (1, 2, 1)), np.hstack([b, 255 - b]), text) for a, b, text in map(drawing, range(4))])
    for name in ("source", "target"):  # a square pair among them
        Image.fromarray(drawing(9)[name == "target"]).save(wide / name / "00000.png")
    cropped = dataclasses.replace(recipe, pairs=str(wide), crops=2)
    objective = ControlObjective(cropped, CPU)
    pairs = pairs_of(objective).pairs
    assert len(pairs) == 2 * objective.source.facts()["pairs"] == 6
    squares = sum(pair.place == 0.5 for pair in pairs) // 2
    assert encoded["images"] == 2 * (6 - squares)  # a square image has only one crop
    for index, pair in enumerate(pairs):
        whole = np.asarray(Image.open(pair.target))
        left = int(pair.place * (whole.shape[1] - 64))
        assert np.array_equal(pair.images(64)[1], whole[:, left : left + 64])
        chosen = torch.tensor([index])
        latent = objective.base.encode_image(to_tensor([pair.images(64)[1]]) * 2 - 1).half()
        assert torch.allclose(pairs_of(objective).latents.gather(chosen).float(), latent.float(), atol=2e-3)
        hint = objective.control.encode(to_tensor([pair.images(64)[0]]), objective.base)
        assert torch.allclose(pairs_of(objective).hint(chosen, torch.tensor([False])), hint, atol=2e-3)
    before = dict(encoded)
    objective.loss(0)
    ControlObjective(cropped, CPU).loss(1)
    assert encoded == before
    assert "crops" not in identifying(recipe) and fingerprint(cropped) != fingerprint(
        dataclasses.replace(cropped, crops=3)
    )
    with refused("out-of-range", "crops"):
        dataclasses.replace(recipe, crops=0)


def test_pairs_with_objects_of_coco_have_keys(tiny_base, tmp_path):
    Image.fromarray(drawing(0)[1]).save(tmp_path / "0.png")
    boxes = ((("objects", [{"bbox": [4, 8, 16, 24], "category_id": 3}])),)
    source = ComputedCondition(target=tmp_path / "0.png", condition="bbox", parameters=boxes)
    pair = Pair(source=source, target=tmp_path / "0.png", prompt="x", condition="bbox")
    assert PairCache(tiny_base, pair.crops(1)).content() == PairCache(tiny_base, pair.crops(2)[:1]).content()


def test_flips_change_neither_what_else_a_step_draws_nor_runs_without_them(recipe):
    without, flipping = ControlObjective(recipe, CPU), ControlObjective(dataclasses.replace(recipe, flip=True), CPU)
    pairs_of(flipping).flips = pairs_of(without).flips
    assert torch.equal(without.loss(5), flipping.loss(5))
    # As it was before there was this setting.
    counted = identifying(recipe)
    assert "flip" not in counted
    assert fingerprint(dataclasses.replace(recipe, flip=False)) == fingerprint(recipe)
    assert identifying(dataclasses.replace(recipe, flip=True)) == {**counted, "flip": True}
    assert fingerprint(dataclasses.replace(recipe, flip=True)) != fingerprint(recipe)


def test_a_cache_that_cannot_be_written_is_named_before_training(recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="CONTROLKIT_CACHE"):
        ControlObjective(recipe, CPU)


def test_a_whole_cache_that_cannot_be_written_is_read(recipe, cache, encoded):
    expected = ControlObjective(recipe, CPU).loss(0)
    assert encoded["images"] > 0 and encoded["prompts"] > 0
    encoded.update(images=0, prompts=0)
    paths = [cache, *cache.rglob("*")]
    before = {path: path.read_bytes() for path in paths if path.is_file()}
    for path in paths:
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    try:
        loss = ControlObjective(recipe, CPU).loss(0)
    finally:
        for path in paths:
            os.chmod(path, 0o755)
    assert torch.equal(loss, expected)
    assert encoded == {"images": 0, "prompts": 0}
    # Whoever may write everywhere, as the administrator may, has nothing to write either.
    assert before and {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


@pytest.mark.slow  # a launch by torchrun: three imports of torch and diffusers
def test_two_processes_that_train_together_make_rows_and_train_what_one_trains(recipe, tmp_path, cache):
    whole = dataclasses.replace(recipe, steps=3, batch_size=4, log_every=1, flip=True, out=str(tmp_path / "whole"))
    run(whole)
    shutil.rmtree(cache)
    halves = dataclasses.replace(whole, batch_size=2, out=str(tmp_path / "halves"))
    (tmp_path / "recipe.json").write_text(json.dumps({"system": recipe.system, **dataclasses.asdict(halves)}))
    done = torchrun(["-m", "controlkit", "train", tmp_path / "recipe.json"])
    assert done.returncode == 0, done.stderr

    def losses(out):
        return [json.loads(line)["loss"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]

    assert losses(halves.out) == pytest.approx(losses(whole.out), abs=1e-5)


def test_settings_of_a_network_count_as_its_weights_do(folder, base_folder, encoded):
    pairs = read_pairs(folder)
    before = everything(PairCache(load_base(base_folder), pairs).texts()[0]).tokens
    config = base_folder / "text_encoder" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "hidden_act": "relu"}))
    changed = load_base(base_folder)
    after = everything(PairCache(changed, pairs).texts()[0]).tokens
    assert torch.equal(after, changed.encode_text(sorted({"", *(pair.prompt for pair in pairs)})).tokens)
    assert not torch.equal(before, after)


def test_a_condition_s_code_counts_where_its_images_are_computed(tmp_path, monkeypatch):
    from controlkit.conditions import condition

    def drawn(number):
        path = tmp_path / "own.py"
        path.write_text(f"""
import numpy as np
from controlkit.conditions.condition import Condition
from controlkit.conditions.fidelity import PSNR

def flat(image):
    return np.full_like(image, {number})

made = Condition(name="flat", summary="one grey", fidelity=PSNR, function=flat)
""")
        spec = importlib.util.spec_from_file_location("own", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(condition._REGISTRY, "flat", module.made)
        return ComputedCondition(target=tmp_path / "a.png", condition="flat").read_bytes()

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert drawn(10) == drawn(10)
    assert drawn(10) != drawn(20)


def test_families_that_share_a_text_encoder_share_no_embeddings(tmp_path):
    """Z-Image and FLUX.2 klein have Qwen3-4B, and read other layers of it."""
    klein, z_image = tiny.build_tiny_flux2_klein(), tiny.build_tiny_z_image()
    z_image.text_encoder, z_image.tokenizer = klein.text_encoder.model, klein.tokenizer
    made = {}
    for base in (z_image, klein):
        rows, _, empty = PairCache(base, []).texts()
        made[base.family_title] = rows.gather(torch.tensor([empty]))
    assert made["Z-Image"].tokens.shape[2] == 16 and "mask" in made["Z-Image"]
    assert made["FLUX.2"].tokens.shape[2] == 48 and "mask" not in made["FLUX.2"]
