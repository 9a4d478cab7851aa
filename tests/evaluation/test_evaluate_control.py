"""Judging controls at toy size: whose numbers are whose, and what they depend on."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import controlkit
from controlkit.apps.cli import main
from controlkit.controls.controlnet_xs import ControlNetXS
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.unicontrol import UniControl
from controlkit.data.engine import make_pairs
from controlkit.data.input_images import list_images
from controlkit.data.making import MakeSettings
from controlkit.data.pair import SOURCE
from controlkit.data.pairs import read_pairs
from controlkit.evaluation.eval_set import EvalSet, pairs_eval_set
from controlkit.evaluation.evaluate_control import evaluate_control, evaluate_controls
from controlkit.evaluation.metrics import frechet_distance
from controlkit.evaluation.report import Report, read_reports
from controlkit.evaluation.sampling import EvalControl, generate_controlled
from controlkit.evaluation.sets import EvaluationSet, evaluation_set
from controlkit.formats.load import save_control
from controlkit.progress import Progress
from controlkit.sampling.prompts import find_captioner
from refusals import check, refused


def eval_set_from(first, count):
    """`count` images of those that ship, from number `first` on."""
    drawings = evaluation_set("held-out").examples[first : first + count]
    targets = [drawing.image for drawing in drawings]
    given = [controlkit.find_condition("canny")(target) for target in targets]
    return EvalSet(
        name="held-out pairs", condition_images=given, targets=targets, prompts=[one.caption for one in drawings]
    )


def write_examples(folder, count):
    """Images of the held-out set as PNG files."""
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, example in zip(paths, evaluation_set("held-out").examples, strict=False):
        Image.fromarray(example.image).save(path)
    return paths


def test_two_sets_of_one_name_have_baselines_and_ceilings_of_their_own(tiny_base, tiny_control):
    sets = [eval_set_from(0, 2), eval_set_from(2, 3)]
    together, sheet = evaluate_control(tiny_base, tiny_control, sets, steps=2)
    alone = [evaluate_control(tiny_base, tiny_control, [one], steps=2) for one in sets]
    assert [row[1:] for row in together.rows] == [report.rows[0][1:] for report, _ in alone]
    assert [row[0] for row in together.rows] == ["held-out pairs (2)", "held-out pairs 2 (3)"]
    assert list(together.facts) == ["held-out pairs", "held-out pairs 2"]
    # Every set has its four strips in the sheet.
    assert sheet.height > 1.8 * alone[0][1].height


def test_sets_of_one_name_are_told_apart_for_several_controls_too(tiny_base, tiny_control):
    drawings = evaluation_set("seen").examples
    sets = [EvaluationSet("seen", drawings[:2]), EvaluationSet("seen", drawings[2:4])]
    report, _ = evaluate_controls(tiny_base, {"one": tiny_control}, sets, steps=2)
    alone = [evaluate_control(tiny_base, tiny_control, [one], steps=2)[0].rows[0][1:] for one in sets]
    assert [row[2:] for row in report.rows] == alone
    assert list(report.facts["one"]) == ["seen", "seen 2"]


def test_what_is_known_beforehand_is_refused_before_anything_is_sampled(tiny_base, tiny_control, monkeypatch):
    def unexpected(*_args, **_settings):
        raise AssertionError("sampled")

    monkeypatch.setattr("controlkit.evaluation.evaluate_control.generate_controlled", unexpected)
    bare = copy.copy(tiny_control)
    bare.condition = None
    with refused("missing-setting", "the control bare records no condition"):
        evaluate_controls(tiny_base, {"one": tiny_control, "bare": bare}, [eval_set_from(0, 2)], steps=2)
    learned = copy.copy(tiny_control)
    learned.condition = "hed"
    with refused("missing-weights", "hed"):
        evaluate_controls(tiny_base, {"one": tiny_control, "hed": learned}, [evaluation_set("seen").first(2)], steps=2)
    with refused("unsupported", "no default prompt"):
        evaluate_control(tiny_base, tiny_control, [eval_set_from(0, 2)], steps=2, prompt_modes=("given", "default"))
    with refused("missing-weights", "nosuch"):
        evaluate_control(
            tiny_base,
            tiny_control,
            [eval_set_from(0, 2)],
            steps=2,
            prompt_modes=("given", "automatic"),
            captioner="nosuch/model",
        )


def test_baselines_are_shared_by_content_and_settings_not_by_name(tiny_base, tiny_control):
    baselines = {}
    first = eval_set_from(0, 2)
    evaluate_control(tiny_base, tiny_control, [first], steps=2, baselines=baselines)
    assert len(baselines) == 1
    evaluate_control(tiny_base, tiny_control, [replace(first, name="other")], steps=2, baselines=baselines)
    assert len(baselines) == 1
    shared, _ = evaluate_control(tiny_base, tiny_control, [first], steps=3, baselines=baselines)
    assert len(baselines) == 2
    assert shared.rows == evaluate_control(tiny_base, tiny_control, [first], steps=3)[0].rows


def test_each_prompt_mode_has_a_row_whose_baseline_has_the_same_prompts(tiny_base, tiny_control):
    eval_set = eval_set_from(0, 3)
    report, _ = evaluate_control(
        tiny_base, tiny_control, [eval_set], steps=2, prompt_modes=("given", "none", "automatic")
    )
    names = [f"held-out pairs{more} (3)" for more in ("", ", prompt none", ", prompt automatic")]
    assert [row[0] for row in report.rows] == names
    given = evaluate_control(tiny_base, tiny_control, [eval_set], steps=2)[0]
    empty = evaluate_control(tiny_base, tiny_control, [replace(eval_set, prompts=[""] * 3)], steps=2)[0]
    assert [row[1:] for row in report.rows[:2]] == [given.rows[0][1:], empty.rows[0][1:]]
    settings = report.settings["sets"]
    assert [each.get("prompt_mode") for each in settings] == [None, "none", "automatic"]
    assert [each.get("captioner") for each in settings] == [None, None, "concepts"]
    # Automatic: the captions of what the control makes without a prompt.
    first = generate_controlled(
        tiny_base,
        [EvalControl(control=tiny_control, condition_images=eval_set.condition_images)],
        [""] * 3,
        steps=2,
    )
    captions = find_captioner(None, tiny_base)([Image.fromarray(image) for image in first])
    again = evaluate_control(tiny_base, tiny_control, [replace(eval_set, prompts=captions)], steps=2)[0]
    assert again.rows[0][1:] == report.rows[2][1:]
    several, _ = evaluate_controls(
        tiny_base, {"one": tiny_control}, [evaluation_set("seen").first(2)], steps=2, prompt_modes=("none", "given")
    )
    assert [row[0] for row in several.rows] == ["one, seen, prompt none (2)", "one, seen (2)"]


def test_a_mode_that_a_control_cannot_act_in_is_refused_before_anything_is_sampled(tiny_base, monkeypatch):
    control = ControlNetXS.for_base(tiny_base, condition="canny", size_ratio=0.5)
    monkeypatch.setattr("controlkit.evaluation.evaluate_control.generate_baselines", lambda *_: pytest.fail("sampled"))
    with refused("unsupported", control.title, "cfg-rw"):
        evaluate_control(tiny_base, control, [eval_set_from(0, 1)], steps=1, mode="cfg-rw")


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (("canny", "canny"), ["evaluate control", "canny"]),
        (("canny", "--sets", "seen", "seen"), ["--sets", "seen"]),
        (("canny", "--prompt-mode", "none", "none"), ["--prompt-mode", "none"]),
    ],
)
def test_a_repeated_name_is_refused(words, facts, capsys):
    assert main(["evaluate", "control", *words]) == 2
    check(capsys.readouterr().err, "contradiction", *facts)


def test_pairs_of_another_condition_are_refused(tiny_base, tiny_control, base_folder, tmp_path, capsys):
    file = save_control(tmp_path / "ours.safetensors", tiny_control, tiny_base)
    write_examples(tmp_path / "images", 2)
    settings = MakeSettings(conditions=("canny", "grayscale"))
    make_pairs(list_images([tmp_path / "images"]), tmp_path / "pairs", settings, workers=1)
    words = ["evaluate", "control", str(file), "--base", str(base_folder), "--steps", "1", "--share", "1", "--pairs"]
    assert main([*words, str(tmp_path / "pairs" / "grayscale")]) == 2
    check(capsys.readouterr().err, "contradiction", file, "canny", tmp_path / "pairs" / "grayscale", "PAIRS/canny")
    assert main([*words, str(tmp_path / "pairs" / "canny")]) == 0


def test_a_control_of_several_conditions_is_evaluated_in_that_of_the_pairs(tiny_base, base_folder, tmp_path, capsys):
    tasks = {"canny": "canny edge to image", "palette": "palette to image"}
    control = UniControl.for_base(tiny_base, tasks=tasks)
    file = save_control(tmp_path / "ours.safetensors", control, tiny_base)
    write_examples(tmp_path / "images", 2)
    settings = MakeSettings(conditions=("canny", "grayscale"))
    make_pairs(list_images([tmp_path / "images"]), tmp_path / "pairs", settings, workers=1)
    words = ["evaluate", "control", str(file), "--base", str(base_folder), "--steps", "1", "--share", "1", "--pairs"]
    assert main([*words, str(tmp_path / "pairs" / "canny")]) == 0
    assert "canny: edge F1" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "pairs" / "grayscale")]) == 2
    check(capsys.readouterr().err, "contradiction", file, "canny, palette", "are grayscale")


def test_the_pairs_held_out_are_those_that_the_control_records(tiny_base, tiny_control, base_folder, tmp_path, capsys):
    file = save_control(tmp_path / "ours.safetensors", tiny_control, tiny_base, made={"held_out": 0.5})
    write_examples(tmp_path / "images", 4)
    make_pairs(list_images([tmp_path / "images"]), tmp_path / "pairs", MakeSettings(conditions=("canny",)), workers=1)
    words = ["evaluate", "control", str(file), "--base", str(base_folder), "--steps", "1"]
    words += ["--pairs", str(tmp_path / "pairs"), "--out", str(tmp_path / "out")]
    for further, count, noted in ((), 2, False), (("--share", "0.25"), 1, False), (("--share", "1"), 4, True):
        assert main([*words, *further]) == 0
        rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
        assert len({row["image"] for row in rows}) == count
        assert {row["set"] for row in rows} == {"pairs" if further == ("--share", "1") else "held-out pairs"}
        said = capsys.readouterr().err
        assert ("held_out 0.5" in said) == noted and "fewer" not in said
    assert main([*words, "--share", "1", "--images", "5"]) == 0
    assert "4 pairs, fewer than 5" in capsys.readouterr().err
    assert main([*words, "--images", "2"]) == 0
    assert "fewer" not in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [None, "identity", "somebody_elses"])
def test_pairs_of_no_known_condition_are_evaluated(recorded, tiny_base, tiny_control, base_folder, tmp_path):
    file = save_control(tmp_path / "ours.safetensors", tiny_control, tiny_base)
    (image,) = write_examples(tmp_path / "images", 1)
    entry = {"file_name": image.name, "text": "a scene", f"{recorded or 'conditioning'}_image": image.name}
    (image.parent / "metadata.jsonl").write_text(json.dumps(entry))
    words = ["evaluate", "control", str(file), "--base", str(base_folder), "--steps", "1", "--share", "1"]
    assert main([*words, "--pairs", str(image.parent)]) == 0


def test_a_report_holds_the_settings_that_its_numbers_depend_on(tiny_base, tiny_control, base_folder, tmp_path, capsys):
    file = save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    words = ["evaluate", "control", str(file), "--base", str(base_folder), "--pictures", "2", "--sets", "held-out"]
    assert main([*words, "--steps", "2", "--weight", "0.5", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["asked"] == {
        "what": "control",
        "names": [str(file)],
        "base": str(base_folder),
        "sets": ["held-out"],
        "images": 2,
    }
    assert made["graphs"]["graph"] == 0 and list(made["graphs"]["why"]) == ["graphs need CUDA, the device is cpu"]
    settings = made["reports"][0]["settings"]
    assert settings["steps"] == 2 and settings["sampler"] == "ddim"
    assert settings["guidance"] == tiny_base.default_guidance
    assert settings["device"] == "cpu" and settings["precision"] == "fp32"
    assert settings["base"]["fingerprint"] == tiny_base.fingerprint
    assert settings["control"]["mode"] == tiny_base.default_mode
    assert settings["control"]["weight"] == 0.5
    assert settings["condition"]["name"] == "canny"
    assert settings["condition"]["parameters"] == {"low": 100, "high": 200}
    assert settings["versions"]["controlkit"] == controlkit.__version__
    assert settings["versions"]["torch"] == torch.__version__
    (images,) = settings["sets"]
    assert images["name"] == "held-out" and images["images"] == 2 and images["seeds"] == [0, 1]


def test_other_weights_images_or_parameters_are_other_settings(tiny_base, tiny_control):
    first = eval_set_from(0, 2)

    def told(control=tiny_control, eval_set=first, **how):
        return evaluate_control(tiny_base, control, [eval_set], steps=1, **how)[0].settings

    same = told()
    assert told() == same
    json.dumps(same, allow_nan=False)
    darker = replace(first, targets=[target // 2 for target in first.targets])
    assert told(eval_set=darker)["sets"] != same["sets"]
    inverted = replace(first, condition_images=[255 - given for given in first.condition_images])
    assert told(eval_set=inverted)["sets"] != same["sets"]
    low = replace(first, parameters=[{"low": 20}, {"low": 30}])
    assert told(eval_set=low)["sets"][0]["condition_parameters"] == [{"low": 20}, {"low": 30}]
    assert told(mode="balanced")["control"]["mode"] == "balanced"

    shared = BaseControlNet.for_base(tiny_base)
    adapters = [CtrLoRA(shared, name, "canny") for name in ("a", "b") if shared.add_adapter(name, 2, seed=ord(name))]
    with torch.no_grad():
        next(iter(shared.adapters["b"].parameters())).add_(1)
    ours, theirs = (told(control=adapter)["control"] for adapter in adapters)
    assert ours["fingerprint"] != theirs["fingerprint"]
    assert ours["companion"] == theirs["companion"] == shared.fingerprint()


def test_controls_in_different_modes_are_named_with_theirs(tiny_base, tiny_control):
    class HalfAlone(type(tiny_control)):
        conditional_only = True

    half = copy.copy(tiny_control)
    half.__class__ = HalfAlone
    images = [evaluation_set("seen").first(1)]
    both = {"one": tiny_control, "two": half}
    same, _ = evaluate_controls(tiny_base, both, images, steps=1, mode="control")
    assert "mode control, weight 1, guidance 3, 1 ddim steps." in same.notes
    apart, _ = evaluate_controls(tiny_base, both, images, steps=1, mode="balanced")
    assert "one: mode balanced, weight 1, guidance 3, 1 ddim steps." in apart.notes
    assert "two: mode control, weight 1, guidance 3, 1 ddim steps." in apart.notes


def test_the_mode_stands_beside_the_numbers(tiny_base, tiny_control):
    report, _ = evaluate_control(tiny_base, tiny_control, [eval_set_from(0, 2)], steps=2)
    assert any(note.startswith("mode control, weight 1, guidance 3, 2 ddim steps") for note in report.notes)


def test_tables_show_whole_numbers_and_small_ones_readably():
    report = Report(title="t", columns=("a", "b", "c"), rows=((1234567, 3e-4, 0.25), (2, 1e-3, np.nan)))
    assert "| 1,234,567 | 0.0003 | 0.250 |" in report.to_markdown()
    assert "| 2 | 0.001 | - |" in report.to_markdown()
    assert report.to_json()["rows"][0] == (1234567, 3e-4, 0.25)


def test_a_ceiling_below_no_control_leaves_no_gap_to_close(tiny_base, tiny_control, monkeypatch):
    scores = iter(([0.275], [0.257], [0.259]))  # no control, control, ceiling; higher is better
    monkeypatch.setattr(EvalSet, "scores", lambda *_: next(scores))
    report, _ = evaluate_control(tiny_base, tiny_control, [eval_set_from(0, 1)], steps=1)
    assert "| held-out pairs (1) | 0.275 | 0.257 | 0.259 | - |" in report.to_markdown()
    assert any("held-out pairs (1): no gap to close" in note for note in report.notes)


def test_reports_are_read_from_what_the_verbs_print(tmp_path):
    first, second = (Report(title=title, columns=("images", "score"), rows=(("a", 1.0),)) for title in ("one", "two"))
    path = tmp_path / "printed.json"
    path.write_text(json.dumps({"asked": {}, "reports": [first.to_json(), second.to_json()]}))
    assert [report.to_markdown() for report in read_reports(path)] == [first.to_markdown(), second.to_markdown()]
    path.write_text(json.dumps({"report": first.to_json()}))
    assert [report.to_markdown() for report in read_reports(path)] == [first.to_markdown()]
    for other in ([], {"reports": [{}]}, {"reports": 5}, {"report": 1}, {}):
        path.write_text(json.dumps(other))
        with refused("wrong-kind", "holds no report"):
            read_reports(path)


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (("control", "canny", "--prompt-mode", "nothing"), "unknown-name", ["'nothing'"]),
        (("control", "canny", "--captioner", "concepts"), "contradiction", ["--captioner", "automatic"]),
        (("base", "nano", "--prompt-mode", "none"), "contradiction", ["--prompt-mode"]),
    ],
)
def test_wrong_prompt_modes_are_refused(words, code, facts, capsys):
    assert main(["evaluate", *words]) == 2
    check(capsys.readouterr().err, code, *facts)


def test_prompt_modes_on_the_command_line(tmp_path, capsys):
    words = ("--prompt-mode", "given", "none", "--images", "2", "--steps", "1", "--sets", "held-out", "--json")
    assert main(["evaluate", "control", "canny", "--mode", "ControlNet is more important", *words]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    assert [row[0] for row in report["rows"]] == ["held-out (2)", "held-out, prompt none (2)"]
    assert report["settings"]["control"]["mode"] == "guess"


def test_progress_counts_every_call_of_the_network(sd1_scheduled_base, tiny_control, monkeypatch):
    reports = []
    monkeypatch.setattr(Progress, "__call__", lambda self, done, total: reports.append((done, total)))
    use = EvalControl(control=tiny_control, condition_images=eval_set_from(0, 3).condition_images)
    generate_controlled(sd1_scheduled_base, [use], ["x"] * 3, steps=2, sampler="heun", batch_size=2)
    total = len(reports)
    assert total > 2 * 2  # heun calls it twice in a step
    assert reports == [(done, total) for done in range(1, total + 1)]


def test_scores_of_single_images_average_to_those_of_the_table_and_follow_the_seed(tiny_base, tiny_control):
    images = eval_set_from(0, 3)
    report, _ = evaluate_control(tiny_base, tiny_control, [images], steps=2)
    assert [row["seed"] for row in report.images] == [0, 1, 2]
    for name, column in (("no_control", "no control"), ("score", "control"), ("ceiling", "ceiling")):
        mean = np.mean([row[name] for row in report.images])
        assert mean == pytest.approx(report.rows[0][report.columns.index(column)])
    shifted = replace(
        images,
        condition_images=images.condition_images[1:],
        targets=images.targets[1:],
        prompts=images.prompts[1:],
    )
    later, _ = evaluate_control(tiny_base, tiny_control, [shifted], steps=2, seed=1)
    assert [row["seed"] for row in later.images] == [1, 2]
    for mine, theirs in zip(later.images, report.images[1:], strict=True):
        assert mine["score"] == pytest.approx(theirs["score"]) and mine["prompt"] == theirs["prompt"]
        assert mine["no_control"] == pytest.approx(theirs["no_control"])
    assert later.settings["sets"][0]["seeds"] == [1, 2]
    assert "images" not in report.to_json()


def test_reports_are_written_into_a_folder(tmp_path, capsys):
    words = ["evaluate", "control", "canny", "--sets", "held-out", "--images", "2", "--steps", "1", "--seed", "5"]
    assert main([*words, "--out", str(tmp_path / "o"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((tmp_path / "o" / "report.json").read_text())
    assert stored["reports"] == printed["reports"] and printed["out"] == str(tmp_path / "o")
    assert "gap closed" in (tmp_path / "o" / "report.md").read_text()
    head, *rows = (tmp_path / "o" / "scores.csv").read_text().splitlines()
    assert head.startswith("set,image,seed,prompt") and len(rows) == 2 and ",5," in rows[0]
    assert main(["evaluate", "base", "nano", "--seed", "1"]) == 2
    check(capsys.readouterr().err, "contradiction", "--seed")


def test_distances_to_the_targets_are_those_of_the_images(tiny_base, tiny_control, monkeypatch):
    from controlkit.evaluation import baselines as module

    seen = []
    monkeypatch.setattr(module, "lite0_features", lambda images: seen.append(images) or brightness(images))
    first = EvaluationSet("held-out", evaluation_set("held-out").examples[:3])
    report, _ = evaluate_control(tiny_base, tiny_control, [first], steps=2, distance=True)
    facts = report.facts["held-out"]
    targets, without, ceiling, made = (brightness(images) for images in [seen[1], seen[0], seen[2], seen[3]])
    expected = [frechet_distance(features, targets) for features in (without, made, ceiling)]
    assert [facts[name] for name in ("fd_lite0_baseline", "fd_lite0", "fd_lite0_ceiling")] == expected
    assert report.rows[0][-1] == "{1:.1f} ({0:.1f}, {2:.1f})".format(*expected)
    again, _ = evaluate_controls(tiny_base, {"a": tiny_control, "b": tiny_control}, [first], steps=2, distance=True)
    assert again.facts["a"] == again.facts["b"] == report.facts
    assert len(seen) == 4 + 5  # the targets, the baseline and the ceiling once
    plain, _ = evaluate_control(tiny_base, tiny_control, [first], steps=2)
    assert len(plain.columns) == len(report.columns) - 1 and "fd_lite0" not in plain.facts["held-out"]


def brightness(images):
    return torch.stack([torch.from_numpy(np.asarray(image, np.float32)).mean((0, 1)) for image in images])


@pytest.mark.parametrize(
    ("settings", "code", "fact"),
    [
        ({"prompt_modes": "none"}, "wrong-type", "prompt_modes"),
        ({"prompt_modes": ()}, "wrong-type", "prompt_modes"),
        ({"prompt_modes": ("foo",)}, "unknown-name", "foo"),
        ({"prompt_modes": ("none", "given", "none")}, "contradiction", "none repeats"),
        ({"captioner": "concepts"}, "contradiction", "automatic"),
        ({"steps": 0}, "out-of-range", "steps"),
        ({"guidance": 0.5}, "out-of-range", "guidance"),
        ({"weight": "1"}, "out-of-range", "weight"),
        ({"sets": []}, "wrong-type", "sets"),
        ({"sets": evaluation_set("held-out")}, "wrong-type", "sets"),
        ({"sets": [evaluation_set("held-out").first(0)]}, "empty-data", "held-out"),
    ],
)
def test_settings_are_checked_before_anything_is_sampled(settings, code, fact, tiny_base, tiny_control):
    with refused(code, fact):
        evaluate_control(tiny_base, tiny_control, **{"sets": [evaluation_set("held-out").first(1)], **settings})


def test_images_of_another_condition_are_refused(tiny_base, tiny_control, tmp_path):
    write_examples(tmp_path / "images", 2)
    settings = MakeSettings(conditions=("grayscale",))
    make_pairs(list_images([tmp_path / "images"]), tmp_path / "pairs", settings, workers=1)
    pairs = pairs_eval_set(read_pairs(tmp_path / "pairs" / "grayscale"), 64)
    with refused("contradiction", "canny", "grayscale"):
        evaluate_control(tiny_base, tiny_control, [pairs], steps=1)


@pytest.mark.parametrize("condition", ["identity", "lineart_given", "bbox"])
def test_a_control_of_finished_pairs_is_evaluated_on_pairs_only(condition, tiny_base, tiny_control, tmp_path):
    other = copy.copy(tiny_control)
    other.condition = condition
    with refused("unsupported", condition, "--pairs"):
        evaluate_control(tiny_base, other, [evaluation_set("held-out").first(1)], steps=1)
    with refused("unsupported", f"mine is of {condition}"):
        evaluate_controls(tiny_base, {"mine": other}, [evaluation_set("held-out").first(1)], steps=1)
    assert evaluate_control(tiny_base, other, [replace(eval_set_from(0, 1), condition=condition)], steps=1)


def test_pairs_of_another_size_than_the_base_are_refused(tiny_base, tiny_control):
    larger = [np.zeros((128, 128, 3), np.uint8)]
    for name in ("targets", "condition_images", "references"):
        with refused("wrong-size", "128 x 128", "pairs_eval_set(pairs, 64)"):
            evaluate_control(tiny_base, tiny_control, [replace(eval_set_from(0, 1), **{name: larger})], steps=1)


def test_the_targets_of_larger_pairs_score_perfectly(tiny_base, tiny_control, tmp_path):
    (tmp_path / "images").mkdir()
    for index, image in enumerate(evaluation_set("held-out").first(2).images):
        Image.fromarray(image).resize((288, 256), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{index}.png")
    make_pairs(list_images([tmp_path / "images"]), tmp_path / "pairs", MakeSettings(conditions=("canny",)), workers=1)
    canny = controlkit.find_condition("canny")

    pairs = read_pairs(tmp_path / "pairs" / "canny")
    ours = pairs_eval_set(pairs, 64)
    assert ours.scores(canny, ours.targets) == [1, 1] and (ours.scaled, ours.rescaled) == (0, 2)
    assert all(
        np.array_equal(image, pair.side(SOURCE, 64)) for image, pair in zip(ours.condition_images, pairs, strict=True)
    )
    same_size = pairs_eval_set(pairs, 256)
    assert same_size.references is None  # cropped, not scaled
    assert same_size.scores(canny, same_size.targets) == pytest.approx([1, 1], abs=0.01)

    foreign = pairs_eval_set([replace(pair, parameters={}) for pair in pairs], 64)
    assert foreign.scaled == 2 and foreign.references is None
    own = np.mean(foreign.scores(canny, foreign.targets))
    assert own < 0.8
    notes, other = (evaluate_control(tiny_base, tiny_control, [each], steps=1)[0].notes for each in (foreign, ours))
    assert any(f"the targets themselves score {own:.3f}" in note for note in notes)
    assert not any("themselves" in note for note in other)
    assert any("2 condition images" in note and "--size 64" in note for note in other)
    assert not any("--size 64" in note for note in notes)
