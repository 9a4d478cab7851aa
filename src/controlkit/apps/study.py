"""run the experiments of a paper; run again to resume

    controlkit study --list
    controlkit study new-condition
    controlkit study new-condition --given openmoji=data/openmoji-pairs@lineart_given --set budgets=[25,100]
    controlkit study several-conditions

new-condition and community-model need data/nano/icons.npz (step 1 of recipes/nano/README.md), new-condition also
matplotlib (pip install 'controlkit[studies]').
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from controlkit.apps.show import add_json, print_json, print_table
from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.studies.stored_results import StudyResult

STUDIES = {
    "new-condition": "an adapter against a ControlNet on conditions new to the base control; ablation, ranks, pairs",
    "several-conditions": "adapters together and alone: fidelity and cost",
    "community-model": "a control on a fine-tuned base, unchanged and transferred",
    "task-instructions": "a UniControl under its tasks' instructions, with its HyperNet trained and frozen",
    "guidance-modes": "every guidance mode on the same seeds, with an empty and with a full prompt",
}
"""Name -> what is measured."""


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
    parser.add_argument("--control", help="the control of the study: a name or a file")
    parser.add_argument("--out", metavar="DIR", help="folder of the study")
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

    from controlkit.settings import build_settings, describe_settings, read_overrides
    from controlkit.studies.community_model import CommunityModel, run_community_model
    from controlkit.studies.guidance_modes import GuidanceModes, run_guidance_modes
    from controlkit.studies.new_condition import NewCondition, NewConditionResult, run_new_condition
    from controlkit.studies.several_conditions import SeveralConditions, run_several_conditions
    from controlkit.studies.task_instructions import TaskInstructions, run_task_instructions

    studies: dict[str, tuple[type, Callable[[Any], StudyResult]]] = {
        "new-condition": (NewCondition, run_new_condition),
        "several-conditions": (SeveralConditions, run_several_conditions),
        "community-model": (CommunityModel, run_community_model),
        "task-instructions": (TaskInstructions, run_task_instructions),
        "guidance-modes": (GuidanceModes, run_guidance_modes),
    }
    kind, run_study = studies[args.name]
    if args.help_settings:
        rows = [(setting.name, str(setting.default), setting.what) for setting in describe_settings(kind)]
        print_table(f"Settings of {args.name}", ("setting", "default", "what it is"), rows)
        return
    values = {name: getattr(args, name) for name in ("control", "out") if hasattr(args, name)}
    if args.given:
        values["given"] = tuple(args.given)
    settings: Any = build_settings(kind, values | read_overrides(args.settings), f"study {args.name}")
    result = run_study(settings)
    cells: dict[str, Any] = {}
    if isinstance(result, NewConditionResult):
        cells["cells"] = [{**vars(cell), "gap_closed": cell.gap_closed} for cell in result.cells]
    if args.json:
        print_json({"reports": [report.to_json() for report in result.reports], "files": result.files, **cells})
        return

    from rich import print as show

    for report in result.reports:
        show(report.table())
    for what, path in result.files.items():
        print(f"{what}: {path}")
