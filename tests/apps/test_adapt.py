"""The maker's verb at toy size: pairs in, an adapter and its score out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import controlkit
from controlkit.apps.cli import main
from controlkit.bases.load import load_base
from controlkit.conditions import find
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.data.pairs import read_pairs, write_pairs
from controlkit.evaluation.eval_set import pairs_eval_set
from controlkit.evaluation.evaluate_control import evaluate_control
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.nano.icons import IconSets, draw
from controlkit.training.recipes import adapter_settings
from refusals import check, refused


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The held-out pairs are drawn in a few steps: no score here is compared with one of other steps."""
    monkeypatch.setitem(evaluate_control.__kwdefaults__, "steps", 4)


@pytest.fixture
def base_control(tiny_base, tmp_path):
    path = tmp_path / "base.safetensors"
    save_control(path, BaseControlNet.for_base(tiny_base), tiny_base, dtype=torch.float32)
    return path


@pytest.fixture
def pairs(icons_file, tmp_path):
    """Twelve pairs of palette and image."""
    folder = tmp_path / "pairs"
    (folder / "source").mkdir(parents=True)
    (folder / "target").mkdir()
    icons, rng, lines = IconSets(icons_file).icons, np.random.default_rng(0), []
    for index in range(12):
        drawing = draw(icons[index], rng)
        Image.fromarray(drawing.image).save(folder / f"target/{index}.png")
        Image.fromarray(find("palette")(drawing.image)).save(folder / f"source/{index}.png")
        entry = {"source": f"source/{index}.png", "target": f"target/{index}.png", "prompt": drawing.caption}
        lines.append(json.dumps(entry))
    (folder / "prompt.json").write_text("\n".join(lines))
    return folder


def adapt(pairs, base_control, base_folder, out, *more):
    words = ["adapt", pairs, "--base", base_folder, "--control", base_control, "--name", "mine", "--rank", 2]
    return main([str(word) for word in (*words, "--condition", "palette", "--steps", 4, "--out", out, *more)])


def test_pairs_in_adapter_and_score_out(pairs, base_control, base_folder, tmp_path, tiny_base, capsys):
    out = tmp_path / "run"
    assert adapt(pairs, base_control, base_folder, out, "--json") == 0
    printed, progress = capsys.readouterr()
    made = json.loads(printed)
    facts = made["report"]["facts"]["held-out pairs"]
    assert {"baseline", "control", "ceiling", "gap_closed"} == set(facts)
    assert "encoding 11 pairs" in progress
    metadata = read_metadata(made["adapter"])
    assert (metadata["control.condition"], metadata["control.rank"]) == ("palette", "2")
    base_file = load_control(base_control)
    loaded = load_control(made["adapter"], shared={base_file.fingerprint(): base_file})
    assert isinstance(loaded, CtrLoRA)

    # The second run finds the latents and the finished steps.
    assert adapt(pairs, base_control, base_folder, tmp_path / "again") == 0
    printed, progress = capsys.readouterr()
    assert "encoding" not in progress
    (line,) = (line for line in printed.splitlines() if line.startswith("try next: controlkit "))
    words = [word.replace("IMAGE", str(pairs / "target/0.png")) for word in shlex.split(line)[3:]]
    assert main([*words, "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0


def test_what_to_try_next_names_a_base_control_that_was_given_by_name(
    pairs, base_control, base_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "several").mkdir(parents=True)
    base_control.rename(tmp_path / "runs" / "several" / "several.safetensors")
    assert adapt(pairs, "several", base_folder, tmp_path / "runs" / "mine") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("try next: controlkit "))
    words = [word.replace("IMAGE", str(pairs / "target/0.png")) for word in shlex.split(line)[3:]]
    assert main([*words, "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0


def test_a_control_of_several_conditions_is_not_adapted(tmp_path):
    recipe = controlkit.build_recipe(
        {"system": "ctrlora-base", "pairs": "p", "conditions": ["canny", "palette"], "out": str(tmp_path), "steps": 2}
    )
    with refused("wrong-kind", "canny, palette", "controlkit train", "controlkit evaluate"):
        controlkit.adapt(recipe)


def test_a_run_that_goes_on_with_other_pairs_says_so(pairs, base_control, base_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert adapt(pairs, base_control, base_folder, out) == 0
    assert adapt(pairs, base_control, base_folder, out, "--steps", "5") == 0
    assert "the data has changed" not in capsys.readouterr().err
    lines = (pairs / "prompt.json").read_text().splitlines()
    (pairs / "prompt.json").write_text("\n".join(lines[:-1]))
    assert adapt(pairs, base_control, base_folder, out, "--steps", "6") == 0
    assert f"the data has changed since the run in {out} stopped" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_base_control(pairs, base_control, base_folder, tmp_path, tiny_base, capsys):
    out = tmp_path / "run"
    assert adapt(pairs, base_control, base_folder, out) == 0
    capsys.readouterr()
    other = BaseControlNet.for_base(tiny_base)
    with torch.no_grad():
        other.network.conv_in.weight.mul_(2)
    save_control(base_control, other, tiny_base, dtype=torch.float32)
    before = (out / "mine.safetensors").read_bytes()
    assert adapt(pairs, base_control, base_folder, out, "--steps", "6") == 2
    check(capsys.readouterr().err, "resume-mismatch", out, "base control", "weights")
    assert (out / "mine.safetensors").read_bytes() == before


def test_an_adapter_never_takes_the_place_of_its_base_control(pairs, base_control, base_folder, capsys):
    before = base_control.read_bytes()
    assert adapt(pairs, base_control, base_folder, base_control.parent, "--name", "base") == 2
    check(capsys.readouterr().err, "would-overwrite", base_control)
    assert base_control.read_bytes() == before
    for name, code in (("state", "would-overwrite"), ("..", "wrong-type"), ("a/b", "wrong-type")):
        assert adapt(pairs, base_control, base_folder, base_control.parent / "run", "--name", name) == 2
        check(capsys.readouterr().err, code, "name", repr(name))


def test_a_sheet_of_another_run_is_not_overwritten(pairs, base_control, base_folder, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "held-out.png").write_bytes(b"another's")
    assert adapt(pairs, base_control, base_folder, out) == 2
    check(capsys.readouterr().err, "would-overwrite", out / "held-out.png", "another out")
    assert [path.name for path in out.iterdir()] == ["held-out.png"]
    assert (out / "held-out.png").read_bytes() == b"another's"


def test_an_adapter_is_judged_on_the_device_of_the_recipe(pairs, base_control, base_folder, tmp_path, monkeypatch):
    from controlkit.evaluation import adapt as judging

    asked = []

    def load(name, **settings):
        asked.append(settings)
        return load_base(name, **settings)

    monkeypatch.setattr(judging, "load_base", load)
    assert adapt(pairs, base_control, base_folder, tmp_path / "run", "--device", "cpu") == 0
    assert asked == [{"device": torch.device("cpu")}]


def test_only_the_adapter_changes_and_nothing_else_gets_a_gradient(pairs, base_control, base_folder, tmp_path):
    from controlkit.training.control_objective import ControlObjective
    from controlkit.training.recipes import recipes

    recipe = recipes()["ctrlora-adapter"](
        out=str(tmp_path / "run"), pairs=str(pairs), control=str(base_control), base=str(base_folder), rank=2
    )
    objective = ControlObjective(recipe, torch.device("cpu"))
    for parameter in objective.parameters():
        parameter.data.add_(0.01)
    objective.loss(0).backward()
    shared = objective.control.base_control
    assert all(parameter.grad is None for parameter in shared.network.parameters())
    assert all(parameter.grad is None for network in objective.base.networks for parameter in network.parameters())
    trained = objective.parameters()
    assert len(trained) == len(list(shared.adapters["adapter"].parameters()))
    assert all(parameter.grad is not None for parameter in trained)


def test_every_bad_pair_is_listed_before_anything_is_trained(pairs, base_control, base_folder, tmp_path, capsys):
    (pairs / "source/3.png").unlink()
    (pairs / "target/5.png").write_bytes((pairs / "target/5.png").read_bytes()[:80])
    Image.new("RGB", (64, 32)).save(pairs / "target/7.png")
    with (pairs / "prompt.json").open("a") as stream:
        stream.write('\n{"source": "source/0.png"}')
    assert adapt(pairs, base_control, base_folder, tmp_path / "run") == 2
    check(capsys.readouterr().err, "bad-data", "4 problems", "line 4", "line 6", "line 8", "line 13")
    assert not (tmp_path / "run").exists()


def test_a_controlnet_is_not_taken_for_a_base_control(pairs, base_folder, tiny_control, tiny_base, tmp_path, capsys):
    from controlkit.formats.load import save_control

    save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    assert adapt(pairs, tmp_path / "canny.safetensors", base_folder, tmp_path / "run") == 2
    check(capsys.readouterr().err, "wrong-kind", "canny.safetensors", "base control")


def test_any_setting_of_the_recipe_can_be_given(pairs, base_control, base_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert adapt(pairs, base_control, base_folder, out, "--set", "preview_every=2", "--set", "held_out=0.25") == 0
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["preview_every"], recipe["held_out"]) == (2, 0.25)
    assert sorted(path.stem for path in (out / "previews").glob("*.png")) == ["0000002", "0000004"]
    assert adapt(pairs, base_control, base_folder, tmp_path / "other", "--set", "preview_evry=2") == 2
    check(capsys.readouterr().err, "unknown-key", "'preview_evry'", "did you mean preview_every")


def test_an_adapter_can_be_judged_on_its_held_out_pairs_later(pairs, base_control, base_folder, tmp_path, capsys):
    assert adapt(pairs, base_control, base_folder, tmp_path / "run", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    command = ["evaluate", "control", f"{made['adapter']}+{base_control}", "--base", str(base_folder), "--json"]
    assert main([*command, "--pairs", str(pairs)]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["rows"] == made["report"]["rows"]
    assert main([*command, "--pairs", str(pairs), "--share", "1", "--pictures", "5"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["rows"][0][0] == "pairs (5)"
    for words, code, facts in (
        (["--share", "0.5"], "contradiction", ["--share", "--pairs"]),
        (["--pairs", str(pairs), "--share", "2"], "out-of-range", ["--share 2.0"]),
        (["--pairs", str(pairs), "--sets", "seen"], "contradiction", ["--sets", "--pairs"]),
    ):
        assert main([*command, *words]) == 2
        check(capsys.readouterr().err, code, *facts)


def test_a_base_control_is_judged_on_pairs_by_their_condition(pairs, base_control, base_folder, tmp_path, capsys):
    command = ["evaluate", "control", str(base_control), "--base", str(base_folder), "--json"]
    assert main([*command, "--pairs", str(pairs)]) == 2  # which do not record their condition
    check(capsys.readouterr().err, "missing-setting", "records no condition")
    made = str(tmp_path / "made")
    assert main(["pairs", str(pairs / "target"), "--conditions", "canny", "--size", "64", "--out", made]) == 0
    capsys.readouterr()
    assert main([*command, "--pairs", made]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert report["title"].startswith("canny: edge F1") and len(report["rows"]) == 1


def test_pairs_of_another_size_than_they_are_drawn_at_are_told_of(pairs, base_control, base_folder, tmp_path, capsys):
    assert adapt(pairs, base_control, base_folder, tmp_path / "run") == 0
    assert "note: condition images" not in capsys.readouterr().err
    for path in pairs.rglob("*.png"):
        Image.open(path).resize((96, 96)).save(path)
    assert adapt(pairs, base_control, base_folder, tmp_path / "larger") == 0
    assert "scaled from 96 to 64 pixels" in capsys.readouterr().err


def test_what_is_not_given_suits_the_size_of_the_base(base_folder):
    assert adapter_settings("nano") == adapter_settings(str(base_folder))
    recipe = yaml.safe_load(Path("recipes/sd15/ctrlora-adapter.yaml").read_text())
    settings = adapter_settings("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert {key: settings[key] for key in recipe.keys() & settings.keys()} == {
        key: recipe[key] for key in recipe.keys() & settings.keys()
    }


def test_condition_images_and_networks_count_as_what_a_run_is_of(pairs, base_control, base_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert adapt(pairs, base_control, base_folder, out) == 0
    for path in (pairs / "source").iterdir():
        Image.new("RGB", (64, 64), "red").save(path)
    assert adapt(pairs, base_control, base_folder, out, "--steps", "5") == 0
    assert "the data has changed" in capsys.readouterr().err
    weights = base_folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.3 * value for name, value in load_file(weights).items()}, weights)
    assert adapt(pairs, base_control, base_folder, out, "--steps", "6") == 2
    check(capsys.readouterr().err, "resume-mismatch", out, "base", "weights")


def test_what_is_no_base_control_is_told_before_anything_is_encoded(
    pairs, base_folder, tiny_control, tmp_path, tiny_base, capsys
):
    save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    assert adapt(pairs, tmp_path / "canny.safetensors", base_folder, tmp_path / "run") == 2
    said = capsys.readouterr().err
    check(said, "wrong-kind", "canny.safetensors", "base control", "CtrLoRA")
    assert "encoding" not in said


def made_pairs(folder, tmp_path, *conditions):
    assert main(["pairs", str(folder / "target"), "--conditions", *conditions, "--out", str(tmp_path / "made")]) == 0
    return tmp_path / "made"


def test_pairs_of_one_condition_need_no_name_of_it(pairs, base_control, base_folder, tmp_path):
    words = ["adapt", made_pairs(pairs, tmp_path, "blur"), "--base", base_folder, "--control", base_control]
    words += ["--rank", 2, "--steps", 2, "--out", tmp_path / "run"]
    assert main([str(word) for word in words]) == 0
    assert read_metadata(tmp_path / "run" / "adapter.safetensors")["control.condition"] == "blur"


def test_the_condition_that_pairs_record_counts_more_than_the_name_of_their_folder(tmp_path):
    from controlkit.apps.adapt import _condition_of
    from controlkit.data.readers.columns import Columns

    write_pairs(tmp_path / "blur", [(np.zeros((32, 32, 3), np.uint8),) * 2 + ("x",)])
    assert _condition_of(str(tmp_path / "blur"), Columns()) == "blur"
    lines = [{"picture": "target/00000.png", "conditions": {"canny": "source/00000.png"}, "prompt": "x"}]
    (tmp_path / "blur" / "pairs.jsonl").write_text(json.dumps(lines[0]))
    assert _condition_of(str(tmp_path / "blur"), Columns()) == "canny"
    lines = [{"picture": "target/00000.png", "conditions": {"Canny_Edges": "source/00000.png"}, "prompt": "x"}]
    (tmp_path / "blur" / "pairs.jsonl").write_text(json.dumps(lines[0]))
    assert _condition_of(str(tmp_path / "blur"), Columns()) == "canny"


def test_scores_draw_a_result_s_condition_with_the_parameters_of_the_given_one(pairs, tmp_path):
    """Pairs are made with random parameters: the true image is a perfect result all the same."""
    judged = pairs_eval_set(read_pairs(made_pairs(pairs, tmp_path, "color_regions"), "color_regions"), 64)
    condition = find("color_regions")
    assert len({repr(parameters) for parameters in judged.parameters}) > 1
    assert condition.mean_score(
        judged.condition_images, judged.targets, judged.targets, judged.parameters
    ) == pytest.approx(1)
    assert condition.mean_score(judged.condition_images, judged.targets, judged.targets) < 0.99


def test_a_condition_whose_model_is_not_there_is_learned_and_judged_by_the_image(
    pairs, base_control, base_folder, tmp_path, capsys
):
    out = tmp_path / "run"
    assert adapt(pairs, base_control, base_folder, out, "--condition", "depth", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert read_metadata(made["adapter"])["control.condition"] == "depth"
    assert "PSNR to the target" in made["report"]["title"]
    assert any(note.startswith("depth of results cannot be computed") for note in made["report"]["notes"])


def test_captions_of_a_table_reach_training_or_are_missed_aloud(pairs, base_control, base_folder, tmp_path, capsys):
    lines = [json.loads(line) for line in (pairs / "prompt.json").read_text().splitlines()]
    (pairs / "prompt.json").unlink()
    rows = [{"image": e["target"], "conditioning_image": e["source"], "words": e["prompt"]} for e in lines]
    (pairs / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = (pairs, base_control, base_folder)
    assert adapt(*words, tmp_path / "empty", "--steps", 1) == 0
    told = capsys.readouterr().err
    assert "note: 12 of 12 prompts are empty" in told and "--caption-column" in told
    assert adapt(*words, tmp_path / "run", "--steps", 1, "--caption-column", "words") == 0
    assert "prompts are empty" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run/recipe.json").read_text())["caption_column"] == "words"
    assert adapt(*words, tmp_path / "no", "--steps", 1, "--caption-column", "word") == 2
    check(capsys.readouterr().err, "unknown-name", "image, conditioning_image, words", "did you mean words?")
    assert not (tmp_path / "no").exists()


def test_evaluate_reads_named_columns(capsys):
    assert main(["evaluate", "control", "canny", "--caption-column", "words"]) == 2
    check(capsys.readouterr().err, "contradiction", "--caption-column", "--pairs")
