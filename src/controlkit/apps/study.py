"""run the experiments of a paper; run again to resume

    controlkit study --list
    controlkit study new-condition
    controlkit study new-condition --given openmoji=data/openmoji-pairs@lineart_given --set budgets=[25,100]
    controlkit study several-conditions

new-condition, convergence and community-model need data/nano/icons.npz (step 1 of recipes/nano/README.md), the first
two also matplotlib (pip install 'controlkit[studies]'); ambiguous-content and image-prompt need pip install
'controlkit[metrics]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from controlkit.apps.show import add_json, print_json, print_table
from controlkit.errors import UserError
from controlkit.progress import is_verbose

if TYPE_CHECKING:
    from controlkit.studies.stored_results import StudyResult


STUDIES = {
    "new-condition": "an adapter against a ControlNet on conditions new to the base control; ablation, ranks, pairs",
    "several-conditions": "controls together and alone: fidelity and cost",
    "community-model": "controls on fine-tuned bases, unchanged and transferred; a replaced text encoder",
    "task-instructions": "a UniControl under its tasks' instructions, with its HyperNet trained and frozen",
    "ambiguous-content": "the concept that results show under empty, right and conflicting prompts, by condition",
    "convergence": "steps to half of the gap, of colour against spatial conditions",
    "image-prompt": "what results take from an image prompt, by its weight, with and without a caption",
    "guidance-modes": "every guidance mode on the same seeds, with an empty and with a full prompt",
}
"""Name -> what is measured."""


def load_study(name: str) -> tuple[type, Callable[[Any], StudyResult]]:
    """Class of a study's settings and the function that takes them: `CommunityModel` and `run_community_model` in
    `controlkit.studies.community_model`.
    """
    module = name.replace("-", "_")
    found = import_module(f"controlkit.studies.{module}")
    return getattr(found, name.title().replace("-", "")), getattr(found, f"run_{module}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb. Defaults of settings are those of the study's class."""
    parser.add_argument("name", nargs="?", default=None, choices=tuple(STUDIES), help=", ".join(STUDIES))
    parser.add_argument("--list", action="store_true", default=False, help="list the studies")
    parser.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="NAME=FOLDER[@CONDITION]",
        help="new-condition: add a condition from a folder of pairs, scored by CONDITION",
    )
    parser.add_argument(
        "--control",
        help="the base control (new-condition, convergence), or the only control (others but several-conditions): a"
        " name or a file",
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the study")
    parser.add_argument("--device", help="cpu, cuda, mps or auto (default: auto)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="override a setting"
    )
    parser.add_argument("--help-settings", action="store_true", default=False, help="list the settings of a study")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    if args.list:
        if args.json:
            print_json([{"name": name, "what": what} for name, what in STUDIES.items()])
            return
        width = max(map(len, STUDIES)) + 2
        for name, what in STUDIES.items():
            print(f"{name:<{width}}{what}")
        return
    if args.name is None:
        raise UserError(f"name a study ({', '.join(STUDIES)}), or use --list", "missing-setting")

    from controlkit.files import output_folder
    from controlkit.sampling.graphs import tallied
    from controlkit.settings import build_settings, check_overrides, read_overrides

    kind, run_study = load_study(args.name)
    if args.help_settings:
        _list_settings(args.name, kind, args.json)
        return
    values = _values_of(args, kind)
    overrides = read_overrides(args.settings)
    check_overrides(overrides, values)
    settings: Any = build_settings(kind, values | overrides, f"study {args.name}")
    with output_folder(settings.out), tallied() as calls:
        result = run_study(settings)
    if args.json:
        print_json(result.to_json() | {"graphs": calls().to_json()})
        return

    from rich import print as show

    for report in result.reports:
        show(report.table())
    for what, path in result.files.items():
        print(f"{what}: {path}")
    if is_verbose():
        print(calls(), file=sys.stderr)


def _values_of(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Settings of the study `kind` that options give.

    Raises:
        UserError: it has no such setting.
    """
    values = {name: getattr(args, name) for name in ("control", "out", "device") if hasattr(args, name)}
    if args.given:
        values["given"] = tuple(args.given)
    known = {field.name for field in dataclasses.fields(kind)}
    if "control" in values and "controls" in known:
        values["controls"] = (values.pop("control"),)
    if unknown := [name for name in ("control", "given") if name in values and name not in known]:
        raise UserError(
            f"--{unknown[0]} has no effect on {args.name}; controlkit study {args.name} --help-settings lists its"
            " settings",
            "contradiction",
        )
    return values


def _list_settings(name: str, kind: type, as_json: bool) -> None:
    from controlkit.settings import as_written, describe_settings

    settings = describe_settings(kind)
    if as_json:
        print_json([vars(setting) for setting in settings])
        return
    rows = [(setting.name, as_written(setting.default), setting.what) for setting in settings]
    print_table(f"Settings of {name}", ("setting", "default", "description"), rows)
