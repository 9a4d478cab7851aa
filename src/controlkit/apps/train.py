"""train any system from a YAML recipe; run again to resume

    controlkit train recipes/sd15/controlnet.yaml --set pairs=pairs/canny --set condition=canny
    controlkit train ctrlora-adapter        # list the settings of a system

docs/training.md lists the systems. A recipe of a control has `icons`, `scenes`, `multigen` or `pairs` as its source of
data.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from controlkit.apps.show import add_json, print_json, print_table
from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.settings import Setting
    from controlkit.training.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("recipe", help="YAML file; or the name of a system, to list its settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="override a setting; repeat"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.training.recipes import read_recipe, recipes

    if not Path(args.recipe).is_file() and args.recipe in recipes():
        if args.settings:
            raise UserError(
                f"{args.recipe} is a system, which lists its settings; --set needs a recipe file", "contradiction"
            )
        _list(recipes()[args.recipe], args.json)
        return
    recipe = read_recipe(args.recipe, args.settings)

    from controlkit.sampling.settings import in_words
    from controlkit.training.processes import Processes
    from controlkit.training.run import run_recipe

    trained = run_recipe(recipe)
    if not Processes.is_first():
        return
    if args.json:
        print_json({"out": recipe.out, "scores": trained.scores, "preview": trained.scored})
        return
    print(f"{'stopped' if trained.stopped_before else 'finished'}: {recipe.out}")
    how = f" ({in_words(trained.scored)})" if trained.scored else ""
    for name, value in trained.scores.items():
        print(f"{name}: {value:.4g}{how}")


def _list(kind: type[Recipe], as_json: bool) -> None:
    """List every setting with the data sources that have it; a setting with two defaults is listed twice."""
    from controlkit.settings import as_written, describe_settings
    from controlkit.training.recipes import by_source

    choice: dict[str, type[Recipe]] = {**by_source(kind)}
    listed: dict[str, tuple[Setting, list[str]]] = {}
    for source, recipe in (choice or {"": kind}).items():
        for setting in describe_settings(recipe):
            listed.setdefault(repr(setting), (setting, []))[1].append(source)
    if as_json:
        print_json([{**vars(each), "sources": [name for name in found if name]} for each, found in listed.values()])
        return
    everywhere = [*choice] or [""]
    rows = [
        (
            each.name,
            "required" if each.required else as_written(each.default),
            "" if found == everywhere else ", ".join(found),
            each.what,
        )
        for each, found in sorted(listed.values(), key=lambda row: row[1] != everywhere)
    ]
    print_table(kind.__doc__ or "", ("setting", "default", "only with", "description"), rows)
