"""Making nano with one command: which steps run, figures in the pages, and all of it on a tiny base."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from controlkit.bases.load import load_base
from controlkit.files import read_json, write_json
from controlkit.formats.load import save_control
from controlkit.nano.base_objective import save_base
from refusals import refused

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "nano"))

import adopt
import figures
import make
import making
import pages
import results as results_of
import steps
import workshop
from steps import Outcome, Records, Step

ROOT = Path(__file__).parents[2]

# Steps


@pytest.fixture
def chain(tmp_path):
    """`copy` reads `source` and writes `middle`; `double` reads that and writes `end`. Returns steps and what ran."""
    source, middle, end = (tmp_path / name for name in ("source", "middle", "end"))
    source.write_text("1")
    ran: list[str] = []

    def copy() -> Outcome:
        ran.append("copy")
        middle.write_text(source.read_text().strip())
        return Outcome()

    def double() -> Outcome:
        ran.append("double")
        end.write_text(middle.read_text() * 2)
        return Outcome()

    def build(**more):
        return [
            Step(name="copy", what="", inputs=(source,), outputs=(middle,), run=copy, **more),
            Step(name="double", what="", inputs=(middle,), outputs=(end,), run=double),
        ]

    def go(made, **choice):
        ran.clear()
        records = Records(tmp_path, tmp_path / "make.json")
        planned = steps.plan(made, records, **choice)
        steps.run_plan(planned, records, lambda text: None)
        return list(ran), {one.step.name: one.why for one in planned}

    return build, go, tmp_path


def test_a_step_runs_once_and_again_when_the_content_of_its_inputs_changes(chain):
    build, go, folder = chain
    assert go(build())[0] == ["copy", "double"]
    assert go(build()) == ([], {"copy": "up to date", "double": "up to date"})
    os.utime(folder / "source", (1, 1))
    assert go(build())[0] == []
    (folder / "source").write_text("2")
    ran, why = go(build())
    assert ran == ["copy", "double"] and why == {"copy": "source changed", "double": "after copy"}
    assert (folder / "end").read_text() == "22"


def test_a_step_whose_inputs_are_made_anew_but_alike_is_skipped(chain):
    build, go, folder = chain
    go(build())
    (folder / "source").write_text("1\n")  # copied without the line's end
    assert go(build())[0] == ["copy"]


def test_a_step_runs_when_its_settings_or_version_change_or_its_outputs_are_not_what_it_wrote(chain):
    build, go, folder = chain
    go(build())
    assert go(build(settings={"images": 8}))[1]["copy"] == "its settings changed"
    assert go(build(settings={"images": 8}, version=2))[1]["copy"] == "its settings changed"
    (folder / "end").unlink()
    assert go(build(settings={"images": 8}, version=2)) == (
        ["double"],
        {"copy": "up to date", "double": "end is missing"},
    )
    (folder / "end").write_text("by hand")
    assert go(build(settings={"images": 8}, version=2))[1]["double"] == "end was changed"


def test_what_only_other_steps_read_may_be_missing_until_one_of_them_runs(chain):
    build, go, folder = chain
    go(build(intermediate=True))
    (folder / "middle").unlink()
    assert go(build(intermediate=True))[0] == []
    assert go(build(intermediate=True), only=["copy"]) == (
        ["copy"],
        {"copy": "middle is missing", "double": "not asked for"},
    )
    (folder / "middle").unlink()
    (folder / "end").unlink()
    assert go(build(intermediate=True)) == (["copy", "double"], {"copy": "double needs it", "double": "end is missing"})


def test_steps_are_chosen_and_left_by_name(chain):
    build, go, folder = chain
    assert go(build(), leave=["double"])[0] == ["copy"]
    assert go(build(), only=["double"])[0] == ["double"]
    with refused("unknown-name", "duble", "double"):
        go(build(), only=["duble"])
    (folder / "middle").unlink()
    (folder / "source").unlink()
    with refused("missing-file", "copy", "source"):
        go(build())


def test_an_unfinished_step_runs_again_and_its_result_is_used(chain):
    build, go, _ = chain
    made = build()
    partial = Step(
        name="copy",
        what="",
        inputs=made[0].inputs,
        outputs=made[0].outputs,
        run=lambda: (made[0].run(), Outcome(complete=False, note="3 of 9 steps are done"))[1],
        training=True,
    )
    assert go([partial, made[1]])[0] == ["copy", "double"]
    assert go([partial, made[1]]) == (["copy"], {"copy": "3 of 9 steps are done", "double": "after copy"})


def test_data_that_is_there_is_taken_and_records_that_ship_are_known(chain):
    build, go, folder = chain
    (folder / "middle").write_text("5")
    assert go(build(data=True))[0] == ["double"]
    shipped = shutil.move(folder / "make.json", folder / "shipped.json")
    records = Records(folder, folder / "make.json", shipped)
    assert [one.why for one in steps.plan(build(data=True), records)] == ["up to date", "up to date"]


def test_an_unfinished_step_that_ships_has_nothing_to_resume_from(chain):
    build, _, folder = chain
    records = Records(folder, folder / "make.json")
    step = build(training=True)[0]
    step.run()
    records.write(step, Outcome(complete=False, note="3 of 9 steps are done; it resumes"), 1.0)
    assert steps.outdated(step, Records(folder, folder / "make.json")) == "3 of 9 steps are done; it resumes"
    shipped = shutil.move(folder / "make.json", folder / "shipped.json")
    for _ in range(2):  # the same where the records of another step are written
        records = Records(folder, folder / "make.json", shipped)
        assert steps.outdated(step, records) == "unfinished; starts anew" and records.note(step) == ""
        starting = build(training=True, starts=True)[0]
        assert steps.outdated(starting, records) == "unfinished; starts from the one that ships"
        other = build()[1]
        other.run()
        records.write(other, Outcome(), 1.0)
    records.write(step, Outcome(complete=False, note="4 of 9 steps are done; it resumes"), 1.0)
    assert steps.outdated(step, Records(folder, folder / "make.json")) == "4 of 9 steps are done; it resumes"


def test_controls_that_are_not_there_are_refused():
    with refused("missing-file", "--controls", "nowhere"):
        make.make(argparse.Namespace(budget=None, base="shipped", controls=Path("nowhere")))


def test_data_without_a_record_counts_as_what_was_last_read_until_a_step_needs_it(chain):
    build, go, folder = chain
    data = {"data": True, "intermediate": True}
    (folder / "middle").write_text("5")
    assert go(build(**data))[0] == ["double"]
    (folder / "middle").unlink()
    assert go(build(**data)) == ([], {"copy": "up to date", "double": "up to date"})
    (folder / "end").unlink()
    assert go(build(**data))[0] == ["copy", "double"]


def test_a_step_without_a_record_runs_when_it_is_asked_for_together_with_the_one_before_it(chain):
    build, go, folder = chain
    source = folder / "source"
    source.unlink()

    def fetch() -> Outcome:
        source.write_text("1")
        return Outcome()

    data = {"data": True, "intermediate": True}
    made = [Step(name="fetch", what="", outputs=(source,), run=fetch, **data), *build(**data)]
    assert go(made, only=["fetch", "copy"])[0] == ["copy"]


# Pages


def test_the_figures_of_the_pages_are_those_of_their_json():
    results, missing = results_of.Results(ROOT / "benchmarks" / "results" / "nano"), set()
    marked = [page for page in pages.pages(ROOT) if pages.marked(page.read_text(encoding="utf-8"))]
    assert {"README.md", "nano.md", "ctrlora.md", "benchmarks.md", "files.md"} <= {page.name for page in marked}
    for page in marked:
        text = page.read_text(encoding="utf-8")
        rendered, without = pages.render(text, results, page.name)
        assert pages.changed_figures(text, rendered) == []
        assert rendered == text
        missing |= {figures.FIGURES[name].file for name in without}
    assert missing == set()


def test_every_figure_is_in_a_page():
    texts = "".join(page.read_text(encoding="utf-8") for page in pages.pages(ROOT))
    assert [name for name in figures.FIGURES if f"<!-- nano:{name} -->" not in texts] == []


@pytest.mark.parametrize(
    ("text", "code", "facts"),
    [
        ("a <!-- nano:base.top6 -->0.66<!-- /nano -->", "unknown-name", ("base.top6", "base.top5")),
        ("a <!-- nano:base.top5 -->0.66", "bad-data", ()),
        ("a 0.66<!-- /nano -->", "bad-data", ()),
        ("a\n<!-- nano:base.top5 -->0.66<!-- /nano -->", "bad-data", ("base.top5",)),
    ],
)
def test_a_mark_that_cannot_be_filled_is_refused(text, code, facts, tmp_path):
    with refused(code, *facts):
        pages.render(text, results_of.Results(tmp_path))


def test_a_figure_follows_its_json_and_figures_of_an_earlier_base_say_so(tmp_path):
    shipped = ROOT / "benchmarks" / "results" / "nano"
    earlier = results_of.Results(shipped).base_of("canny")
    for name in ("base.json", "canny.json"):
        shutil.copy(shipped / name, tmp_path)
    value = read_json(tmp_path / "base.json")
    reports = value["runs"]["default"]["reports"]
    reports[4]["rows"][1][1] = 0.805
    for report in reports:
        report["settings"]["base"]["fingerprint"] = "another"
    write_json(tmp_path / "base.json", value)
    page = (
        "Right for <!-- nano:base.top5 -->0.66<!-- /nano -->, F1 <!-- nano:canny.row -->0<!-- /nano -->"
        "\n\n<!-- nano:canny.table -->\n\n|\n\n<!-- /nano -->\n"
    )
    text, missing = pages.render(page, results_of.Results(tmp_path))
    assert "0.805<!-- /nano -->" in text and missing == []
    assert f"Measured with earlier weights of nano (base {earlier})." in text
    assert "(earlier nano weights)<!-- /nano -->" in text
    changed = pages.changed_figures(page, text)
    assert (changed[0], changed[2]) == ("base.top5: 0.66 -> 0.805", "canny.table: table")
    assert pages.render("a <!-- nano:several.table -->x<!-- /nano -->", results_of.Results(tmp_path))[1] == [
        "several.table"
    ]


def test_lower_scores_are_told_as_the_pages_round_them():
    before = {"canny": 0.9929, "palette": 0.62, "gone": 0.5}
    assert adopt.lower_scores(before, {"canny": 0.9871, "palette": 0.617}) == ["gone: 0.50 -> missing"]
    assert adopt.lower_scores(before, {"canny": 0.97, "palette": 0.7, "gone": 0.5}) == ["canny: 0.99 -> 0.97"]


def test_files_are_moved_into_place_together_or_not_at_all(tmp_path, monkeypatch):
    shop = workshop.Workshop(tmp_path)
    for name, text in (("a.json", "new"), ("b.json", "new"), ("c.json", "new")):
        (shop.results / name).parent.mkdir(parents=True, exist_ok=True)
        (shop.results / name).write_text(text)
    place = tmp_path / workshop.RESULTS
    place.mkdir(parents=True)
    (place / "a.json").write_text("old")
    paths = adopt.changes(shop)
    assert [path.name for path in paths] == ["a.json", "b.json", "c.json"]
    replace = os.replace

    def fail(source, destination):
        if Path(destination).name == "c.json":
            raise OSError("no space")
        replace(source, destination)

    monkeypatch.setattr(adopt.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        adopt._move(shop, paths)
    assert {path.name: path.read_text() for path in place.iterdir()} == {"a.json": "old"}
    monkeypatch.setattr(adopt.os, "replace", replace)
    adopt._move(shop, paths)
    assert {path.read_text() for path in place.iterdir()} == {"new"} and adopt.changes(shop) == []


# Weights


@pytest.fixture
def shop(tmp_path, tiny_base):
    """A workshop in a folder of its own, whose staged base is the tiny one, and what it says."""
    root = tmp_path / "root"
    (root / workshop.ASSETS / "controls").mkdir(parents=True)
    made = workshop.Workshop(root, given=tmp_path / "given")
    save_base(tiny_base, made.assets / "nano")
    (tmp_path / "given").mkdir()
    return made


def test_a_base_is_assembled_from_parts_and_what_ships(shop, tmp_path):
    other = tiny.build_tiny_base(seed=7)
    save_base(other, tmp_path / "other", dtype=torch.float32)
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "other/text_encoder", parts / "text_encoder")
    shutil.copy(tmp_path / "other/unet/diffusion_pytorch_model.safetensors", parts / "unet.safetensors")
    shipped, out = shop.assets / "nano", tmp_path / "out"
    (shipped / "README.md").write_text("a card")
    workshop.assemble_base(parts, shipped, out)
    made, before = load_base(out), load_base(shipped)
    assert made.fingerprint == other.fingerprint != before.fingerprint
    assert made.defaults == before.defaults
    assert steps.digest(out / "tokenizer") == steps.digest(shipped / "tokenizer")
    assert steps.digest(out / "vae") == steps.digest(shipped / "vae")
    assert load_file(out / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    assert not (out / "README.md").exists()
    workshop.assemble_base(parts, shipped, tmp_path / "again")
    assert steps.digest(tmp_path / "again") == steps.digest(out)
    with refused("missing-file", tmp_path / "given"):
        workshop.assemble_base(tmp_path / "given", shipped, out)
    save_base(tiny.build_tiny_base(text_width=32), tmp_path / "wide")
    shutil.rmtree(parts / "text_encoder")
    shutil.copytree(tmp_path / "wide/text_encoder", parts / "text_encoder")
    with refused("incompatible"):
        workshop.assemble_base(parts, shipped, out)
    assert load_base(out).fingerprint == other.fingerprint


def test_text_that_was_edited_in_place_is_staged_anew_and_figures_that_were_made_stay(shop):
    plain, figures = shop.root / "docs" / "plain.md", shop.root / "docs" / "figures.md"
    plain.parent.mkdir()
    plain.write_text("before")
    figures.write_text("<!-- nano:base.top5 -->0.1<!-- /nano --> before")
    shop.prepare(keep_base=True)
    staged = shop.staged / "docs"
    (staged / "figures.md").write_text("<!-- nano:base.top5 -->0.2<!-- /nano --> before")
    plain.write_text("after")
    shop.prepare(keep_base=True)
    assert (staged / "plain.md").read_text() == "after"
    assert (staged / "figures.md").read_text() == "<!-- nano:base.top5 -->0.2<!-- /nano --> before"
    figures.write_text("<!-- nano:base.top5 -->0.1<!-- /nano --> after")
    shop.prepare(keep_base=True)
    assert (staged / "figures.md").read_text() == figures.read_text()


_EMPTY = '{"runs": {}}'


@pytest.fixture
def staged(tmp_path):
    """A workshop whose root has a page with a figure, one without, and two results; the first result is made anew."""
    made = workshop.Workshop(tmp_path)
    shutil.copytree(ROOT / workshop.RESULTS, tmp_path / workshop.RESULTS)
    (tmp_path / workshop.ASSETS).mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/figures.md").write_text("Top 5: <!-- nano:base.top5 -->0.1<!-- /nano --> before")
    (tmp_path / "docs/plain.md").write_text("before")
    made.prepare(keep_base=True)
    value = read_json(made.results / "base.json")
    value["runs"]["default"]["reports"][4]["rows"][1][1] = 0.805
    write_json(made.results / "base.json", value)
    (made.staged / "docs/figures.md").write_text("Top 5: <!-- nano:base.top5 -->0.805<!-- /nano --> before")
    return made


def test_what_was_edited_while_steps_ran_is_not_reverted(staged):
    root = staged.root
    (root / "docs/plain.md").write_text("after")
    (root / "docs/figures.md").write_text("Top 5: <!-- nano:base.top5 -->0.1<!-- /nano --> after")
    (root / workshop.RESULTS / "canny.json").write_text(_EMPTY)
    resumed = workshop.Workshop(root)
    assert {path.name for path in adopt.changes(resumed)} == {"base.json", "figures.md"}
    told = adopt.adopt(resumed, [], accept_lower=True)
    assert (root / "docs/plain.md").read_text() == "after"
    assert (root / "docs/figures.md").read_text() == "Top 5: <!-- nano:base.top5 -->0.805<!-- /nano --> after"
    assert "docs/figures.md: base.top5: 0.1 -> 0.805" in told
    assert (root / workshop.RESULTS / "canny.json").read_text() == _EMPTY
    resumed.prepare(keep_base=True)
    assert (staged.results / "canny.json").read_text() == _EMPTY and adopt.changes(resumed) == []


def test_a_result_that_was_both_edited_and_made_anew_is_refused_until_one_is_chosen(staged):
    place = staged.root / workshop.RESULTS / "base.json"
    place.write_text(_EMPTY)
    os.utime(place, (1, 1))  # the staged one is newer
    for _ in range(2):
        with refused("would-overwrite", workshop.RESULTS / "base.json", staged.results.relative_to(staged.root)):
            adopt.adopt(staged, [], accept_lower=True)
        staged = workshop.Workshop(staged.root)
        staged.prepare(keep_base=True)  # the next run knows it, too
    assert place.read_text() == _EMPTY
    assert "0.1" in (staged.root / "docs/figures.md").read_text()
    shutil.copy(staged.results / "base.json", place)
    staged.prepare(keep_base=True)
    assert [path.name for path in adopt.changes(staged)] == ["figures.md"]


def test_a_control_that_was_replaced_in_place_is_staged_unless_one_was_made(tmp_path):
    shop = workshop.Workshop(tmp_path)
    place = tmp_path / workshop.ASSETS / "controls"
    place.mkdir(parents=True)
    for name in ("kept.bin", "made.bin"):
        (place / name).write_text("before")
    shop.prepare(keep_base=False)
    staged = shop.assets / "controls"
    (staged / "made.bin").write_text("made")
    (place / "kept.bin").write_text("after")
    shop.prepare(keep_base=False)
    assert (staged / "kept.bin").read_text() == "after" and (staged / "made.bin").read_text() == "made"
    assert [path.name for path in adopt.changes(shop)] == ["made.bin"]


def test_a_training_starts_from_a_control_of_this_base_else_from_one_that_fits(shop, tiny_control, tmp_path):
    shipped = shop.root / workshop.ASSETS / "controls" / "canny.safetensors"
    other = tiny.build_tiny_base(seed=7)
    save_control(shipped, tiny_control, other)
    results = ("canny.safetensors", "sketch.safetensors")
    path, told = shop._start(tmp_path / "a", "canny", ("",), results)
    assert (steps.digest(path), told) == (steps.digest(shipped), "started from the one that ships, of another base")
    given = shop.given / "canny.safetensors"
    save_control(given, tiny_control, load_base(shop.assets / "nano"))
    save_control(shop.given / "sketch.safetensors", tiny_control, load_base(shop.assets / "nano"))
    path, told = shop._start(tmp_path / "b", "canny", ("",), results)
    assert (steps.digest(path), told) == (steps.digest(given), "started from the one that was given, of this base")
    assert path.with_name("sketch.safetensors").is_file()  # results go on with the control that is started from
    again = shop._start(tmp_path / "a", "canny", ("",), results)
    assert again == (tmp_path / "a-start" / "canny.safetensors", "")  # the run goes on
    wide = tiny.build_tiny_base(text_width=32)
    for place in (shipped, given):
        save_control(place, tiny.fresh_control(wide), wide)
    assert shop._start(tmp_path / "c", "canny", ("",), results) == (None, "")


def test_a_run_resumes_with_the_start_that_it_records(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(workshop, "_steps_done", lambda out: 5)
    for start, expected in (("runs/a/canny.safetensors", shop.root / "runs/a/canny.safetensors"), (None, None)):
        write_json(tmp_path / "run" / "recipe.json", {"start": start})
        assert shop._start(tmp_path / "run", "canny", ("",), ()) == (expected, "")


def test_controls_that_are_given_are_taken_where_nothing_is_trained(shop, tiny_control, tmp_path):
    place = tmp_path / "canny.safetensors"
    with refused("missing-file", "canny.safetensors"):
        shop._taken("canny", {"canny.safetensors": place}, ("",))
    save_control(shop.given / "canny.safetensors", tiny_control, load_base(shop.assets / "nano"))
    outcome = shop._taken("canny", {"canny.safetensors": place}, ("",))
    assert place.is_file() and not outcome.complete and "as given" in outcome.note


# All of it


def edit_yaml(path: Path, **values) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


def smaller_sets(path: Path, count: int) -> None:
    """Cut the evaluation sets to a few images."""
    with np.load(path, allow_pickle=False) as archive:
        index = json.loads(archive["index"].tobytes())
        arrays = {name: archive[name][:count] for name in archive.files if name != "index"}
    cut = {name: entries[:count] for name, entries in index.items()}
    np.savez_compressed(path, index=np.frombuffer(json.dumps(cut).encode(), np.uint8), **arrays)


KNOWN = ("pencil", "tulip", "bathtub")
"""Concepts of the recipes and of the evaluation sets."""


def icons_of_known_concepts(source: Path, copy: Path) -> None:
    """A copy of icons whose first concepts, those to train on, are `KNOWN`."""
    with np.load(source, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "index"}
        index = json.loads(archive["index"].tobytes())
    index["names"] = {style: [*KNOWN, *names[len(KNOWN) :]] for style, names in index["names"].items()}
    index["groups"] = {name: "Objects" for names in index["names"].values() for name in names}
    np.savez_compressed(copy, index=np.frombuffer(json.dumps(index).encode(), np.uint8), **arrays)


@pytest.fixture
def repository(tmp_path, tiny_base, icons_file) -> Path:
    """A copy of the repository whose nano is the tiny base, without controls, and whose recipes take two steps."""
    root = tmp_path / "repository"
    for name in ("src", "docs", "examples", "recipes", "README.md", "benchmarks/results"):
        source, copy = ROOT / name, root / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    assets = root / "src/controlkit/assets"
    shutil.rmtree(assets / "controls")
    (assets / "controls").mkdir()
    save_base(tiny_base, assets / "nano")
    smaller_sets(assets / "evaluation" / "nano.npz", 24)
    (root / "data/nano").mkdir(parents=True)
    icons_of_known_concepts(icons_file, root / "data/nano/icons.npz")
    for recipe in root.glob("recipes/nano/*.yaml"):
        small = {"steps": 2, "batch_size": 2, "save_every": 1, "preview_every": 1000, "warmup_steps": 0}
        values = yaml.safe_load(recipe.read_text())
        small |= {"score_pictures": 1} if "score_pictures" in values else {}
        edit_yaml(recipe, **small)
    return root


def run_make(root: Path, *arguments: str, code: int = 0) -> str:
    """What `make.py` of a copy says."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "recipes/nano/make.py"), *arguments]
    done = subprocess.run(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def plan_of(said: str) -> dict[str, str]:
    """Step => whether it runs and why, from a printed plan."""
    found = (re.match(r"(\S+) +(?:\d+ min)? +((?:runs|skipped)\S*(?: \S+)*)", line) for line in said.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_the_plan_names_every_step_why_it_runs_and_how_long_it_takes(repository):
    (repository / "benchmarks/results/nano/made.json").unlink(missing_ok=True)
    said = run_make(repository, "--dry-run", "--budget", "5")
    told = plan_of(said)
    names = [
        "canny",
        "ctrlora",
        "adapter-palette",
        "system-controlnet-xs",
        "evaluate-base",
        "study-several",
        "pages",
        "adopt",
    ]
    assert set(names) <= set(told)
    assert told["canny"].startswith("runs: never run")
    assert told["adapter-palette"].startswith("runs: after ctrlora")
    assert "minutes on two CPU cores" in said and "at most 5" in said
    assert not (repository / "runs/nano/make.json").exists()
    told = plan_of(run_make(repository, "--dry-run", "--base", "scratch", "--only", "demo"))
    assert {"autoencoder", "base", "concepts", "nano"} <= set(told)
    assert told["canny"].startswith("skipped: not asked for")


def test_figures_are_written_from_their_json_without_making_anything_else(repository):
    page = repository / "docs/nano-notes.md"
    right = page.read_text(encoding="utf-8")
    wrong = re.sub(r"(<!-- nano:base.top5 -->)0\.\d+", r"\g<1>0.999", right)
    assert wrong != right
    page.write_text(wrong, encoding="utf-8")
    said = run_make(repository, "--only", "pages", "adopt")
    assert page.read_text(encoding="utf-8") == right
    assert "docs/nano-notes.md: base.top5: 0.999 -> " in said and "assets" not in said
    assert "nothing to adopt" in run_make(repository, "--only", "pages", "adopt")

    path = repository / "benchmarks/results/controlnet_training-sd15-256-cpu.json"
    value = read_json(path)
    value["cases"][0]["reference_to_ours"]["median"] = 7.5
    write_json(path, value)
    said = run_make(repository, "--only", "pages", "adopt")
    assert "docs/benchmarks.md: speed.controlnet-ratio: 1.59 -> 7.50" in said


SMALL = {
    "adapter_steps": "[palette=2, pixel=2, lineart_color_hints=2, lineart=2]",
    "pairs": "12",
    "systems": "[controlnet-mlp, controlnet-precomputed-text]",
    "systems_steps": "2",
    "further_steps": "[raindrop=2, low_light=2, illusion=2]",
    "local_steps": "2",
    "global_steps": "2",
    "gligen_steps": "2",
    "unicontrol_steps": "2",
    "several_systems": "[images=2, sampling_steps=2, 'timed=[1]']",
    "several_canny": "[images=2, sampling_steps=2, 'timed=[1]']",
    "several_balanced": "[images=2, sampling_steps=2, 'timed=[1]']",
    "guidance_modes": "[images=2, sampling_steps=2]",
    "image_prompt": "[images=2, sampling_steps=2]",
    "task_instructions": "[images=2, sampling_steps=2]",
    "scenes": "2",
    "convergence": "[images=2, sampling_steps=2, 'budgets=[1,2]', pairs=6, batch_size=2, rank=2]",
    "images": "2",
    "adapter_images": "2",
    "guidance_images": "2",
    "sampling_steps": "2",
    "quick_start_steps": "1",
    "gallery_steps": "1",
    "several_conditions": "[images=2, sampling_steps=2, 'timed=[1,2]']",
    "ambiguous_content": "[images=2, sampling_steps=2, 'controls=[canny]']",
    "community_model": "[images=2, sampling_steps=2, steps=2, text_steps=2, batch_size=2]",
    "new_condition": (
        "[images=2, sampling_steps=2, 'budgets=[1,2]', pairs=6, batch_size=2, rank=2, 'ranks=[2,3]',"
        " 'pair_counts=[4,6]', detail_steps=2, 'conditions=[palette,lineart_color_hints]']"
    ),
}


def adopted_files(root: Path) -> list[Path]:
    """Files of a copy that adoption may write."""
    folders = ("src/controlkit/assets", "benchmarks/results/nano", "docs")
    return [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]


NOT_OF_TRIALS = {
    *("new-condition.pixel", "new-condition.hints", "new-condition.hints-control", "new-condition.seconds"),
}
"""Figures of 25 and 500 steps, which a trial does not train."""


@pytest.mark.slow
def test_new_weights_are_adopted_with_all_that_follows_from_them(repository, tmp_path):
    from controlkit.data.pairs import write_pairs

    rng = np.random.default_rng(0)
    images = (rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(24))
    write_pairs(repository / "data/openmoji-pairs", ((image, 255 - image, "a thing") for image in images))
    save_base(tiny.build_tiny_base(seed=7), tmp_path / "trained")
    weights = tmp_path / "weights"
    shutil.copytree(tmp_path / "trained" / "text_encoder", weights / "text_encoder")
    shutil.copy(tmp_path / "trained/unet/diffusion_pytorch_model.safetensors", weights / "unet.safetensors")
    small = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    arguments = ["--base", str(weights), *small]

    before = (repository / "docs/nano.md").read_text()
    refused = run_make(repository, *arguments, code=1)
    assert "nothing was moved into place" in refused and "--accept-lower takes it" in refused
    assert "is not finished" not in refused and "another base" not in refused
    assert (repository / "docs/nano.md").read_text() == before
    assert not list((repository / "src/controlkit/assets/controls").rglob("*.safetensors"))

    said = run_make(repository, *arguments, "--accept-lower")
    assert "canny.table: table" in said and "right concept among five" in said
    assets = repository / "src/controlkit/assets"
    names = {path.stem for path in (assets / "controls/nano").glob("*.safetensors")}
    assert names == {"base", *making.BASE_CONDITIONS, *making.ADAPTERS}
    assert (assets / "nano/README.md").is_file()
    results = results_of.Results(repository / "benchmarks/results/nano")
    for page in pages.pages(repository):
        text = page.read_text(encoding="utf-8")
        if pages.marked(text):
            rendered, missing = pages.render(text, results)
            assert rendered == text and set(missing) <= NOT_OF_TRIALS
            assert "earlier weights of nano" not in text

    for path in adopted_files(repository):
        assert str(tmp_path).encode() not in path.read_bytes(), path

    told = plan_of(run_make(repository, *arguments, "--dry-run"))
    assert all(why.startswith("skipped: up to date") for why in told.values()), told
    shutil.rmtree(repository / "runs")  # as in a new clone
    told = plan_of(run_make(repository, *small, "--dry-run"))
    assert all(why.startswith("skipped: up to date") for why in told.values()), told


@pytest.mark.slow
def test_a_budget_interrupts_a_training_whose_result_is_used_and_which_resumes(repository):
    recipe = repository / "recipes/nano/controlnet-canny.yaml"
    edit_yaml(recipe, steps=1_000_000, save_every=1_000_000, preview_every=1_000_000, log_every=1_000_000)
    state = repository / "runs/nano/make.json"

    def done() -> int:
        said = run_make(repository, "--only", "canny", "--budget", "1")
        told = re.search(r"canny: ([\d,]+) of 1,000,000 steps are done; it resumes", said)
        assert told is not None, said
        return int(told[1].replace(",", ""))

    first = done()
    assert first > 0 and not read_json(state)["steps"]["canny"]["complete"]
    assert (repository / "runs/nano/staged/src/controlkit/assets/controls/canny.safetensors").is_file()
    assert done() > first


@pytest.mark.slow
def test_the_base_is_trained_from_icons_or_trained_further(repository):
    (repository / "recipes/nano/concepts.txt").write_text("\n".join(tiny.concepts(False, 3)) + "\n")
    shipped = load_base(repository / "src/controlkit/assets/nano")
    staged = repository / "runs/nano/staged/src/controlkit/assets/nano"
    run_make(repository, "--base", "further", "--only", "concepts", "nano")
    further = load_base(staged)
    assert further.fingerprint != shipped.fingerprint
    assert further.unet.config.block_out_channels == shipped.unet.config.block_out_channels
    run_make(repository, "--base", "scratch", "--only", "autoencoder", "base", "concepts", "nano")
    assert load_base(staged).unet.config.block_out_channels == [48, 96, 160]
    said = run_make(repository, "--base", "scratch", "--only", "autoencoder", "base", "concepts", "nano")
    told = plan_of(said)
    assert {told[name] for name in ("autoencoder", "base", "concepts", "nano")} == {"skipped: up to date"}
