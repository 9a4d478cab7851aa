"""make a new control from pairs: a CtrLoRA adapter on a base control

    controlkit adapt pairs/ --control nano/base --name mine --steps 500

`pairs/` may have any layout of docs/pairs.md, such as what `controlkit pairs` makes; `pairs/canny` is one of several
conditions in it. Run again to resume.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.apps.show import add_columns, add_json, named_columns, print_json

if TYPE_CHECKING:
    from controlkit.data.readers.columns import Columns

_SETTINGS = (
    *("steps", "base", "name", "condition", "rank", "batch_size", "learning_rate", "flip"),
    *("precision", "gradient_checkpointing", "optimizer", "seed", "device"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb. Other defaults are those of the recipe."""
    parser.add_argument("pairs", help="pairs in any layout of docs/pairs.md")
    parser.add_argument("--control", required=True, help="the base control: a file or a name")
    parser.add_argument("--base", help="the base that it steers: nano, a diffusers folder, a single file, or a hub id")
    parser.add_argument("--name", help="name of the adapter")
    parser.add_argument(
        "--condition",
        help="what the condition images are (default: what the pairs say, or PAIRS/NAME; else judged by the image)",
    )
    add_columns(parser)
    parser.add_argument("--rank", type=int, help="of every LoRA (default: 4 for nano, 128 for others)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: 500 for nano, 1000 for others)")
    parser.add_argument("--batch-size", type=int, help="pairs a step (default: 16 for nano, 4 for others)")
    parser.add_argument("--learning-rate", type=float, help="peak rate (default: 1e-3 for nano, 1e-5 for others)")
    parser.add_argument("--flip", action="store_true", help="mirror half of the pairs at random")
    parser.add_argument("--precision", help="fp32, bf16 or auto (default: fp32 for nano, auto for others)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--optimizer", help="adamw, or adamw8bit for less memory (needs bitsandbytes)")
    parser.add_argument("--seed", type=int, help="everything random follows from it")
    parser.add_argument("--device", help="cpu, cuda, mps or auto (default: auto)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="any other setting of the recipe, such as preview_every=1000 (docs/training.md)",
    )
    parser.add_argument("--out", default=None, metavar="DIR", help="folder of the run (default: runs/NAME)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit import conditions
    from controlkit.settings import read_overrides
    from controlkit.training.recipes import adapter_settings, build_recipe

    values = {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)}
    values |= named_columns(args) | read_overrides(args.overrides)
    name = values.get("name", "adapter")
    if "condition" not in values and (told := _told_condition(args.pairs, _columns(values))) is not None:
        values["condition"] = told
    recipe = build_recipe(
        {
            "system": "ctrlora-adapter",
            "pairs": args.pairs,
            "control": args.control,
            "out": args.out or f"runs/{name}",
            **adapter_settings(str(values.get("base", "nano"))),
            **values,
        },
        origin="controlkit adapt",
    )

    from rich import print as show

    from controlkit.evaluation.adapt import adapt

    made = adapt(recipe)
    if args.json:
        print_json({"adapter": str(made.path), "report": made.report.to_json(), "seconds": made.seconds})
        return
    show(made.report.table())
    print(f"adapter: {made.path}")
    print(f"sheet: {made.sheet}")
    prepared = " --prepared" if conditions.find(values.get("condition", "identity")).provided else ""
    file = str(made.path)
    if Path(args.control).is_file() and Path(args.control).parent.resolve() != made.path.parent.resolve():
        file += f"+{args.control}"  # a base control that does not ship has to be named, or lie beside the adapter
    base = values.get("base", "nano")
    steered = f" --base {shlex.quote(base)}" if base != "nano" else ""
    control = shlex.quote(f"{file}=IMAGE")
    print(f'try next: controlkit generate "PROMPT"{steered} --control {control}{prepared} --seeds 4')


def _columns(values: Mapping[str, Any]) -> Columns:
    from controlkit.data.readers.columns import Columns

    names = ("image", "conditioning_image", "caption")
    return Columns(**{name: values.get(f"{name}_column") for name in names})


def _told_condition(pairs: str, columns: Columns) -> str | None:
    """The condition that PAIRS/NAME names, or the only one that pairs tell of; None if they do not say."""
    from controlkit import conditions
    from controlkit.data.readers.listing import short_name
    from controlkit.data.readers.recognise import read_listing

    if Path(pairs).name in conditions.registry():
        return Path(pairs).name
    names = {short_name(name) for name in read_listing(pairs, columns=columns).conditions}
    return names.pop() if len(names) == 1 and names <= set(conditions.registry()) else None
