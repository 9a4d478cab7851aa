"""What the command line answers to habits, interruptions and silence."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import subprocess
import sys

import pytest

from controlkit import progress
from controlkit.apps import habits
from controlkit.apps.cli import VERBS, build_parser, main
from controlkit.apps.show import print_table
from controlkit.apps.study import STUDIES
from controlkit.evaluation.report import Report
from controlkit.progress import Progress
from controlkit.training.trainer import _Loop
from refusals import check

NAMES = [verb.__name__.rpartition(".")[2] for verb in VERBS]
SPELLINGS = {
    "--scheduler": "--sampler",
    "--cfg": "--guidance",
    "--guidance-scale": "--guidance",
    "--guidance_scale": "--guidance",
    "--num-images": "--seeds N",
    "--init": "--image",
    "--mask-image": "--mask",
    "--denoising-strength": "--strength",
}
"""Options that people bring along, and what the answer of `generate` names."""


def run(*words: object) -> int:
    return main([str(word) for word in words])


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return action.choices


def test_bare_controlkit_prints_its_help(capsys):
    assert run() == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: controlkit") and all(name in out for name in NAMES) and err == ""


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["genrate", "x"], ["'genrate'", "generate"]),
        (["txt2img", "x"], ["'txt2img'", "generate"]),
        (["study", "new-conditon"], ["new-condition"]),
        (["evaluate", "controls", "canny"], ["'controls'", "control"]),
        (["generate", "x", "--stps", "3"], ["--stps", "--steps"]),
        (["generate", "x", "--neg", "y"], ["no option --neg;", "--negative-prompt"]),
        (["evaluate", "control", "canny", "--condition", "x"], ["no option --condition;"]),
        (["adapt", "--train_batch_size", "4", "--max_train_steps=10"], ["--batch-size", "--steps"]),
        (["train", "recipe.yaml", "--max_train_steps", "10"], ["--set steps="]),
        (["train", "recipe.yaml", "--train_batch_size", "4"], ["--set batch_size="]),
        (["train", "recipe.yaml", "--lr_warmup_steps", "5"], ["--set warmup_steps="]),
        (["train", "recipe.yaml", "--preview_step", "5"], ["--set preview_every="]),
        (["adapt", "pairs", "--num_train_epochs", "5"], ["--steps"]),
        (["adapt", "pairs", "--lr_scheduler=constant"], ["min_lr_rate=1"]),
        (["adapt", "pairs", "--resolution", "64"], ["no option --resolution", "--size", "pairs"]),
        (["condition", "canny", "a.png", "--low", "50"], ["--set low="]),
        (["inspect", "canny", "--scheduler", "ddim"], ["--sampler", "generate", "evaluate"]),
        (["adapt", "--train_data_dir", "pairs", "--control", "nano/base"], ["adapt PAIRS"]),
        (["generate", "x", "--nothing-like-it"], ["--nothing-like-it", "controlkit generate --help"]),
    ],
)
def test_what_is_mistyped_is_answered_with_the_nearest(words, facts, capsys):
    assert run(*words) == 2
    out, err = capsys.readouterr()
    check(err, "usage", *facts)
    assert out == "" and err.count("\n") == 1


@pytest.mark.parametrize("option", SPELLINGS)
def test_spellings_of_other_tools_name_our_option(option, capsys):
    assert run("generate", "x", option, "1") == 2
    check(capsys.readouterr().err, "usage", option, SPELLINGS[option])


def test_hints_name_options_that_exist():
    known = {option for parser in verbs().values() for option in habits._options(parser)}
    positional = {name for parser in verbs().values() for name in habits._positional(parser)}
    assert {ours for ours in habits._OURS.values() if f"--{ours}" not in known} <= positional
    taken = {option.removeprefix("--") for option in habits._options(verbs()["generate"])}
    assert not taken & {*habits._OURS, *habits._ANSWERS, *habits._UNSUPPORTED}


def test_options_that_are_known_or_come_behind_two_dashes_get_no_hint():
    assert habits.explain(verbs(), ["generate", "x", "--negative-prompt", "y", "--", "--cfg"]) is None
    assert habits.explain(verbs(), ["--cfg"]) is None


def test_a_usage_error_is_json_too(capsys):
    assert run("generate", "x", "--cfg", "7", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_studies_are_listed(capsys):
    assert run("study", "--list") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(STUDIES)
    assert run("study", "--list", "--json") == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == listed
    assert run("study") == 2
    check(capsys.readouterr().err, "missing-setting", "--list", *listed)


def test_tab_completion(capsys, monkeypatch, tmp_path):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        run("--print-completion", "bash")
    assert end.value.code == 0
    script = capsys.readouterr().out
    if bash := shutil.which("bash"):
        (tmp_path / "completion").write_text(script)
        for words, found in (
            ("gen", "generate"),
            ("generate --gui", "--guidance"),
            ("study sev", "several-conditions"),
        ):
            probe = f"source completion; COMP_WORDS=(controlkit {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1));"
            done = subprocess.run(
                [bash, "-c", f"{probe} _shtab_controlkit; echo ${{COMPREPLY[@]}}"],
                capture_output=True,
                text=True,
                cwd=tmp_path,
            )
            assert done.stdout.split() == [found], done.stderr


def test_tab_completion_names_its_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run("--print-completion", "bash") == 2
    check(capsys.readouterr().err, "missing-package", "controlkit[completion]")
    assert run("--print-completion", "csh") == 2
    check(capsys.readouterr().err, "usage", "csh")


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_is_quiet_or_verbose_but_not_both(name):
    known = habits._options(verbs()[name])
    assert "--quiet" in known and "--verbose" in known
    groups = [[action.dest for action in group._group_actions] for group in verbs()[name]._mutually_exclusive_groups]
    assert ["quiet", "verbose"] in groups


def test_quiet_leaves_results_and_errors(tmp_path, capsys):
    words = ("generate", " ".join(["apple"] * 60), "--steps", 1, "--out", tmp_path)
    assert run(*words) == 0
    assert "note: " in capsys.readouterr().err
    assert run(*words, "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == "" and "seed0.png" in out
    assert run(*words[:2], "--steps", 0, "-q") == 2
    check(capsys.readouterr().err, "out-of-range", 0, 1000)


def test_sampling_shows_progress_where_it_is_wanted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SILENT", 0)
    monkeypatch.setattr(progress, "_INTERVAL_PLAIN", 0)
    words = ("generate", "x", "--seeds", 3, "--batch-size", 2, "--steps", 2, "--out", tmp_path)
    assert run(*words) == 0
    assert capsys.readouterr().err == ""
    assert run(*words, "--verbose") == 0
    *lines, calls = capsys.readouterr().err.splitlines()
    assert calls.startswith("network calls: 4 ")
    assert [line.partition(" denoising")[0] for line in lines] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert " left" in lines[1] and " left" not in lines[3]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("live", [True, False])
def test_progress_is_for_long_work_on_a_terminal(live, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = Terminal() if live else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    short, long = Progress("steps", 3), Progress("steps", 10)
    for _ in range(3):
        short.advance()
    for _ in range(10):
        now[0] += 2
        long.advance()
    text = stream.getvalue()
    assert bool(text) == live
    if live:
        updates = [update.strip() for update in text.split("\r")]
        assert updates[1] == "3 of 10 steps, 2.0 s each, 0:14 left"
        assert updates[-1] == "10 of 10 steps" and text.endswith("\n")


def test_an_error_begins_on_a_line_of_its_own(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "_SILENT", 0)
    monkeypatch.setattr(progress, "_INTERVAL", 0)
    Progress("steps", 3).advance()
    assert not stream.getvalue().endswith("\n")
    assert run("study") == 2
    assert stream.getvalue().splitlines()[-1].startswith("controlkit: ")


PROBE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it runs behind it
from controlkit.apps import cli, demo
def run(args):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep({cleaning})
demo.run = run
sys.argv = ["controlkit", "demo"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("twice", [False, True])
def test_signals_have_exit_codes_and_no_traceback(number, twice):
    words = [sys.executable, "-c", PROBE.format(cleaning=60 if twice else 0)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "cleaning\n"
    if twice:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err == ("" if twice else f"controlkit: {'interrupted' if number == signal.SIGINT else 'terminated'}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_saves_its_state_and_ends_with_the_code_of_the_signal(
    number, icons_file, tmp_path, capsys, monkeypatch
):
    step_of = _Loop._step

    def interrupted(self, step):
        if step == 1:
            signal.raise_signal(number)
        return step_of(self, step)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"system: autoencoder\nout: {tmp_path}/run\nsteps: 4\nbatch_size: 2\nicons: {icons_file}\n")
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "_step", interrupted)
        assert run("train", recipe, "--json") == 128 + number
    out, err = capsys.readouterr()
    check(err, "interrupted", "step 2 of 4", "resume")
    assert json.loads(out)["error"]["code"] == "interrupted"
    assert (tmp_path / "run" / "state.safetensors").is_file() and signal.getsignal(number) == before


def test_tables_align_prose_left_and_numbers_right(capsys):
    rows = [("tensors", "1,234"), ("reads", "noise, time, text")]
    print_table("canny", ("fact", "value"), rows)
    print_table("time", ("part", "seconds"), [("load", "1.5"), ("sample", "120.25"), ("rest", "-")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "│ 1,234  " in lines[0]
    assert "│     1.5 │" in lines[2] and "│  120.25 │" in lines[3]
    report = Report(title="t", columns=("a", "measure", "score"), rows=(("x", "F1", 0.5), ("y", "PSNR, dB", 12.0)))
    assert [column.justify for column in report.table().columns] == ["left", "left", "right"]
