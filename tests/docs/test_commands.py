"""The commands of the pages do what the pages say: all of them parse, and those that can run here do."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from page_commands import PAGES, ROOT, Block, blocks, commands, page_commands

from controlkit.apps.cli import SHELLS, build_parser
from controlkit.apps.study import load_study
from controlkit.errors import UserError
from controlkit.settings import build_settings, read_overrides
from controlkit.training.recipes import read_recipe

OTHER_PROGRAMS = {".", "cd", "cp", "export", "find", "git", "hf", "mkdir", "npm", "python3"}
"""Programs that are not ours, whose arguments are not checked."""

MADE = {
    "README.md": ["edges.png", *(f"images/00{run}/seed{seed}.png" for run in (1, 2) for seed in range(4))],
    "docs/generate.md": ["images/boat/condition0.png"],
    "docs/conditions.md": ["edges.png", "dots.png"],
    "docs/files.md": ["canny-diffusers/config.json"],
    "docs/pairs.md": ["pairs/pairs.jsonl", "pairs/canny/000.png", "look.png"],
}
"""Page -> files that its quick commands write."""
MADE_SLOWLY = {
    "README.md": ["photos/199.txt", "runs/mine/mine.safetensors", "mine.png", "adapters.png"],
    "docs/generate.md": ["images/boat-unipc/seed3.png"],
    "docs/files.md": ["canny-webui.safetensors"],
    "docs/systems.md": ["runs/modulation/mine.safetensors"],
}

COMMANDS = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}:{line}")
    for page in PAGES
    for line, words in page_commands(page)
    if words[0] not in OTHER_PROGRAMS
]


def parse_controlkit(words: list[str]) -> None:
    if words[-1:] == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args(words)
        return
    if words[:1] == ["--print-completion"]:
        assert words[1] in SHELLS
        return
    args = build_parser().parse_args(words)
    if args.verb == "train" and args.recipe.endswith(".yaml"):
        read_recipe(args.recipe, args.settings)
    if args.verb == "study" and args.settings:
        build_settings(load_study(args.name)[0], read_overrides(args.settings), "study")


class Parsed(Exception):
    """The script's own parser took the arguments."""


def parse_script(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script up to the point where its arguments are parsed."""
    if "parse_args" not in (ROOT / script).read_text(encoding="utf-8"):
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser) -> None:
        parse_args(parser, words)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.syspath_prepend((ROOT / script).parent)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_one_that_its_program_takes(words, monkeypatch, fresh_registry):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CONTROLKIT_CONTROLS", "examples/my_control.py")  # as docs/systems.md exports it
    program, *rest = words
    if program in ("accelerate", "torchrun"):
        assert rest[rest.index("-m") + 1] == "controlkit"
        program, rest = "controlkit", rest[rest.index("-m") + 2 :]
    if program in ("controlkit", ".venv/bin/controlkit"):
        parse_controlkit(rest)
    elif program == "python":
        parse_script(rest[0], rest[1:], monkeypatch)
    elif program == "make":
        assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in rest)
    elif program in ("pip", ".venv/bin/pip"):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"\[(.+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(known)
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    elif program.startswith("benchmarks/") and program.endswith(".sh"):
        # Options are read in order, and --help ends the script.
        subprocess.run(["sh", ROOT / program, *rest, "--help"], check=True, stdout=subprocess.DEVNULL)
    else:
        pytest.fail(f"nothing checks the arguments of {program}; add it to this test, or to OTHER_PROGRAMS")


def test_a_command_that_does_not_parse_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "Run `controlkit train recipes/nano/base.yaml --set stepps=5`.\n\n"
        "<!-- not run: an example -->\n"
        "```bash\n"
        "FOLDER=a controlkit generate 'a  b' \\\n    --weight 3  # no such option\n"
        "(cd x && python benchmarks/memory.py --sise 64)\n"
        "```\n"
    )
    (block,) = blocks(page)
    assert (block.mark, block.reason, block.line) == ("not run", "an example", 5)
    monkeypatch.chdir(ROOT)
    found = dict.fromkeys(" ".join(words) for _, words in page_commands(page))
    train, generate, cd, python = [
        "controlkit train recipes/nano/base.yaml --set stepps=5",
        "controlkit generate a  b --weight 3",
        "cd x",
        "python benchmarks/memory.py --sise 64",
    ]
    assert set(found) == {train, generate, cd, python}
    for words in (train.split()[1:], ["generate", "a  b", "--weight", "3"]):
        with pytest.raises(UserError):
            parse_controlkit(words)
    with pytest.raises(SystemExit):
        parse_script("benchmarks/memory.py", ["--sise", "64"], monkeypatch)


def test_pages_have_commands_and_no_block_that_is_not_fenced():
    assert len(COMMANDS) > 100
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        assert not re.findall(r"^ {4}(?:controlkit|python|pip|make) .*$", text, re.MULTILINE), page


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A folder with what a clone has, and an environment in which `controlkit` and `python` are those under test."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("README.md", "docs", "examples", "recipes", "benchmarks"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "src").symlink_to(ROOT / "src")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, command in {"python": "", "controlkit": " -m controlkit"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{command} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return folder


def run_blocks(chosen: list[Block], folder: Path) -> str:
    """Run blocks in one shell that stops at the first command that fails; returns what they print."""
    parts = [f"echo '# {block.page.name}:{block.line}'\n{block.text}" for block in chosen]
    # As in the README; other pages take it for granted.
    script = "set -eu\n. .venv/bin/activate\n" + "\n".join(parts)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def pages_with(*marks: str | None) -> list[object]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if {block.mark for block in blocks(page)} & set(marks)
    ]


def assert_made(page: Path, folder: Path, expected: dict[str, list[str]]) -> None:
    files = expected.get(str(page.relative_to(ROOT)), [])
    assert [name for name in files if not (folder / name).is_file()] == []


@pytest.mark.parametrize("page", pages_with(None))
def test_the_quick_commands_of_a_page_run_in_order(page, clone):
    run_blocks([block for block in blocks(page) if block.mark is None], clone)
    assert_made(page, clone, MADE)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("slow"))
def test_all_commands_of_a_page_run_in_order(page, clone):
    run_blocks([block for block in blocks(page) if block.mark != "not run"], clone)
    assert_made(page, clone, MADE)
    assert_made(page, clone, MADE_SLOWLY)


def test_the_readme_begins_with_demo_and_tests():
    first = [words for block in blocks(ROOT / "README.md") for words in commands(block.text)]
    assert first[:2] == [["make", "demo"], ["make", "test"]]
