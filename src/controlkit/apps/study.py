"""run the experiments of a paper; run again to resume

    controlkit study --list
    controlkit study new-condition
    controlkit study new-condition --given openmoji=data/openmoji-pairs@lineart_given --set budgets=[25,100]
    controlkit study several-conditions

new-condition, convergence and community-model need data/nano/icons.npz (step 1 of recipes/nano/README.md), the first
two also matplotlib (pip install 'controlkit[studies]'); ambiguous-content needs pip install 'controlkit[metrics]'.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from controlkit.apps.show import add_json, print_json, print_table
from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.studies.stored_results import StudyResult


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, imported when it is needed."""

    what: str
    """What is measured."""
    settings: str
    """Class of its settings in the module of its name: `CommunityModel` in `controlkit.studies.community_model`."""

    def load(self) -> tuple[type, Callable[[Any], StudyResult]]:
        """Class of its settings, and `run_NAME`, which takes them."""
        name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in self.settings).lstrip("_")
        module = import_module(f"controlkit.studies.{name}")
        return getattr(module, self.settings), getattr(module, f"run_{name}")


STUDIES = {
    "new-condition": Study(
        what="an adapter against a ControlNet on conditions new to the base control; ablation, ranks, pairs",
        settings="NewCondition",
    ),
    "several-conditions": Study(
        what="adapters together and alone: fidelity and cost",
        settings="SeveralConditions",
    ),
    "community-model": Study(
        what="controls on fine-tuned bases, unchanged and transferred; a replaced text encoder",
        settings="CommunityModel",
    ),
    "task-instructions": Study(
        what="a UniControl under its tasks' instructions, with its HyperNet trained and frozen",
        settings="TaskInstructions",
    ),
    "ambiguous-content": Study(
        what="the concept that results show under empty, right and conflicting prompts, by condition",
        settings="AmbiguousContent",
    ),
    "convergence": Study(
        what="steps to half of the gap, of colour against spatial conditions",
        settings="Convergence",
    ),
    "guidance-modes": Study(
        what="every guidance mode on the same seeds, with an empty and with a full prompt",
        settings="GuidanceModes",
    ),
}
"""Studies by name."""


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
        "--control", help="the base control (new-condition, convergence), or the only control: a name or a file"
    )
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
            print_json([{"name": name, "what": study.what} for name, study in STUDIES.items()])
            return
        width = max(map(len, STUDIES)) + 2
        for name, study in STUDIES.items():
            print(f"{name:<{width}}{study.what}")
        return
    if args.name is None:
        raise UserError(f"name a study ({', '.join(STUDIES)}), or use --list", "missing-setting")

    from controlkit.settings import build_settings, describe_settings, read_overrides

    kind, run_study = STUDIES[args.name].load()
    if args.help_settings:
        rows = [(setting.name, str(setting.default), setting.what) for setting in describe_settings(kind)]
        print_table(f"Settings of {args.name}", ("setting", "default", "what it is"), rows)
        return
    values = {name: getattr(args, name) for name in ("control", "out") if hasattr(args, name)}
    if "control" in values and "controls" in {field.name for field in dataclasses.fields(kind)}:
        values["controls"] = (values.pop("control"),)
    if args.given:
        values["given"] = tuple(args.given)
    settings: Any = build_settings(kind, values | read_overrides(args.settings), f"study {args.name}")
    result = run_study(settings)
    if args.json:
        print_json(result.to_json())
        return

    from rich import print as show

    for report in result.reports:
        show(report.table())
    for what, path in result.files.items():
        print(f"{what}: {path}")
