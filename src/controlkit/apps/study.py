"""run a paper's table or figure as an experiment; run again to resume

    controlkit study new-condition
    controlkit study new-condition --given openmoji=data/openmoji-pairs@lineart_given --set budgets=[25,100]
    controlkit study several-conditions

new-condition: an adapter against a ControlNet on conditions that the base control does not know, the ablation, ranks
and numbers of pairs; it needs data/nano/icons.npz (step 1 of recipes/nano/README.md) and matplotlib
(pip install 'controlkit[studies]').
several-conditions: adapters together and alone, and what they cost.
community-model: a control on a model that was fine-tuned from its base, as it is and transferred; it needs the icons
too.
"""

from __future__ import annotations

import argparse
from typing import Any

from controlkit.apps.show import add_json, print_json, print_table

STUDIES = ("new-condition", "several-conditions", "community-model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb. Defaults of the settings are those of the study's class."""
    parser.add_argument("name", choices=STUDIES, help="which study")
    parser.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="NAME=FOLDER[@CONDITION]",
        help="new-condition: also study a folder of pairs, scored by CONDITION",
    )
    parser.add_argument("--control", help="new-condition: the base control, a file or a name")
    parser.add_argument("--out", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a setting"
    )
    parser.add_argument("--help-settings", action="store_true", default=False, help="list the settings and end")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.settings import build_settings, describe_settings, read_overrides
    from controlkit.studies.community_model import CommunityModel, run_community_model
    from controlkit.studies.new_condition import NewCondition, run_new_condition
    from controlkit.studies.several_conditions import SeveralConditions, run_several_conditions

    kinds: dict[str, type] = dict(zip(STUDIES, (NewCondition, SeveralConditions, CommunityModel), strict=True))
    kind = kinds[args.name]
    if args.help_settings:
        rows = [(told.name, str(told.default), told.what) for told in describe_settings(kind)]
        print_table(f"Settings of {args.name}", ("setting", "default", "what it is"), rows)
        return
    values = {name: getattr(args, name) for name in ("control", "out") if hasattr(args, name)}
    if args.given:
        values["given"] = tuple(args.given)
    settings: Any = build_settings(kind, values | read_overrides(args.settings), f"study {args.name}")
    result: dict[str, Any] = {}
    made: Any
    if isinstance(settings, NewCondition):
        made = run_new_condition(settings)
        result["cells"] = [{**vars(cell), "gap_closed": cell.gap_closed} for cell in made.cells]
    elif isinstance(settings, SeveralConditions):
        made = run_several_conditions(settings)
    else:
        made = run_community_model(settings)
    if args.json:
        print_json({"reports": [report.to_json() for report in made.reports], "files": made.files, **result})
        return

    from rich import print as show

    for report in made.reports:
        show(report.table())
    for what, path in made.files.items():
        print(f"{what}: {path}")
