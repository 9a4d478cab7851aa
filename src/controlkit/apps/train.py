"""train any system from a YAML recipe; run again to resume

controlkit train recipes/nano/controlnet-canny.yaml --set steps=3000
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="override a setting"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.training.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.settings)

    from controlkit.training.run import run as train

    scores = train(recipe)
    if args.json:
        print_json({"out": recipe.out, "scores": scores})
        return
    print(f"finished: {recipe.out}")
    for name, value in scores.items():
        print(f"{name}: {value:.4g}")
