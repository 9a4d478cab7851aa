"""run a paper's table or figure as an experiment; run again to resume

    controlkit study new-condition
    controlkit study new-condition --given openmoji=data/openmoji-pairs@lineart_given --set budgets=[25,100]

It needs the rendered icons of recipes/nano/README.md, and a base control. `--help-settings` lists what `--set` takes.
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb. Defaults of the settings are those of the study's class."""
    parser.add_argument("name", choices=("new-condition",), help="which study")
    parser.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="NAME=FOLDER[@CONDITION]",
        help="also study a folder of pairs, scored by CONDITION",
    )
    parser.add_argument("--control", help="the base control: a file or a name")
    parser.add_argument("--out", metavar="DIR", help="folder of the study")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="change a setting"
    )
    parser.add_argument("--help-settings", action="store_true", default=False, help="list the settings and end")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.settings import build_settings, describe_settings, read_overrides
    from controlkit.studies.new_condition import NewCondition, run_new_condition

    if args.help_settings:
        rows = [(name, str(default), told) for name, default, told in describe_settings(NewCondition)]
        print_table(f"Settings of {args.name}", ("setting", "default", "what it is"), rows)
        return
    values = {name: getattr(args, name) for name in ("control", "out") if hasattr(args, name)}
    if args.given:
        values["given"] = tuple(args.given)
    values |= read_overrides(args.settings)
    made = run_new_condition(build_settings(NewCondition, values, f"study {args.name}"))
    if args.json:
        print_json(
            {
                "reports": [report.to_json() for report in made.reports],
                "cells": [{**vars(cell), "gap_closed": cell.gap_closed} for cell in made.cells],
                "files": made.files,
            }
        )
        return

    from rich import print as show

    for report in made.reports:
        show(report.table())
    for kind, path in made.files.items():
        print(f"{kind}: {path}")
