"""train any system from a YAML recipe; run again to resume

    controlkit train recipes/nano/controlnet-canny.yaml --set steps=3000
    controlkit train ctrlora-adapter        # lists the settings of a system

Systems: controlnet, controlnet-pairs, ctrlora-base, ctrlora-adapter, ctrlora-full, base, autoencoder
(docs/training.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from controlkit.apps.show import add_json, print_json, print_table
from controlkit.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("recipe", help="YAML file; or the name of a system, whose settings are listed then")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="override a setting"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.training.recipes import read_recipe, recipes

    if not Path(args.recipe).is_file() and args.recipe in recipes():
        if args.settings:
            raise UserError(f"{args.recipe} is a system, whose settings are listed; --set is for a recipe's YAML file")
        _list(recipes()[args.recipe], args.json)
        return
    recipe = read_recipe(args.recipe, args.settings)

    from controlkit.sampling.settings import in_words
    from controlkit.training.run import run_whole

    trained = run_whole(recipe)
    if args.json:
        print_json({"out": recipe.out, "scores": trained.scores, "preview": trained.scored})
        return
    print(f"finished: {recipe.out}")
    how = f" ({in_words(trained.scored)})" if trained.scored else ""
    for name, value in trained.scores.items():
        print(f"{name}: {value:.4g}{how}")


def _list(kind: type, as_json: bool) -> None:
    from controlkit.settings import describe_settings

    told = describe_settings(kind)
    if as_json:
        print_json([vars(setting) for setting in told])
        return
    rows = [(one.name, "required" if one.required else str(one.default), one.what) for one in told]
    print_table(kind.__doc__ or "", ("setting", "default", "what it is"), rows)
