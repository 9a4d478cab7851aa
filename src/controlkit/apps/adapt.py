"""train a CtrLoRA adapter from pairs (other systems: train)

    controlkit adapt pairs/ --control nano/base --name mine --steps 500
    controlkit adapt pairs/palette --base stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --control sd15_basecn700k.ckpt --name mine

`pairs/` may have any format of docs/pairs.md, such as the output of `controlkit pairs`; `pairs/canny` selects one of
its conditions. Run again to resume.
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
    *("steps", "base", "name", "condition", "rank", "batch_size", "learning_rate", "flip", "crops"),
    *("precision", "gradient_checkpointing", "optimizer", "seed", "device"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb. Other defaults are those of the recipe."""
    parser.add_argument("pairs", help="pairs in any format of docs/pairs.md")
    parser.add_argument("--control", required=True, help="the base control: a name or a file")
    parser.add_argument("--base", help="base of the control: nano, a diffusers folder, a single file, or a hub id")
    parser.add_argument("--name", help="name of the adapter")
    parser.add_argument(
        "--condition",
        help="condition of the pairs, which scores them (default: recorded in the pairs, or PAIRS/NAME; else scores"
        " compare results with the targets)",
    )
    add_columns(parser)
    parser.add_argument("--rank", type=int, help="rank of the LoRAs (default: 4 for nano, else 128)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: 500 for nano, else 1000)")
    parser.add_argument("--batch-size", type=int, help="pairs per step (default: 16 for nano, else 4)")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate (default: 1e-3 for nano, else 1e-5)")
    parser.add_argument("--flip", action="store_true", help="flip half of the pairs at random")
    parser.add_argument("--crops", type=int, help="square crops of each pair (default: 1, at the centre)")
    parser.add_argument("--precision", help="fp32, bf16 or auto (default: fp32 for nano, else auto)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--optimizer", help="adamw, or adamw8bit for less memory (needs bitsandbytes)")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
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
    from controlkit.settings import check_overrides, read_overrides
    from controlkit.training.recipes import adapter_settings, build_recipe

    values = {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)}
    values |= named_columns(args)
    fixed = {"system": "ctrlora-adapter", "pairs": args.pairs, "control": args.control}
    overrides = read_overrides(args.overrides)
    check_overrides(overrides, values | fixed | ({} if args.out is None else {"out": args.out}))
    values |= overrides
    name = values.get("name", "adapter")
    if "condition" not in values and (found := _condition_of(args.pairs, _columns(values))) is not None:
        values["condition"] = found
    recipe = build_recipe(
        {
            **fixed,
            "out": args.out or f"runs/{name}",
            **adapter_settings(str(values.get("base", "nano"))),
            **values,
        },
        origin="controlkit adapt",
    )

    from rich import print as show

    from controlkit.evaluation.adapt import adapt
    from controlkit.formats.load import find_control, shipped_controls
    from controlkit.training.processes import Processes
    from controlkit.training.run import run_recipe

    if not Processes.is_first():
        run_recipe(recipe)  # the first process evaluates, and prints
        return
    adapted = adapt(recipe)
    if args.json:
        report, networks = adapted.report.to_json(), adapted.graphs.to_json()
        print_json({"adapter": str(adapted.path), "report": report, "seconds": adapted.seconds, "graphs": networks})
        return
    show(adapted.report.table())
    print(f"adapter: {adapted.path}")
    print(f"sheet: {adapted.sheet}")
    prepared = " --prepared" if conditions.find(values.get("condition", "identity")).provided else ""
    file = str(adapted.path)
    control_file = find_control(args.control)
    ships = control_file in shipped_controls().values()
    if not ships and control_file.parent.resolve() != adapted.path.parent.resolve():
        file += f"+{args.control}"  # a base control that does not ship has to be named, or lie beside the adapter
    base = values.get("base", "nano")
    base_option = f" --base {shlex.quote(base)}" if base != "nano" else ""
    control = shlex.quote(f"{file}=IMAGE")
    print(f'try next: controlkit generate "PROMPT"{base_option} --control {control}{prepared} --seeds 4')


def _columns(values: Mapping[str, Any]) -> Columns:
    from controlkit.data.readers.columns import Columns

    names = ("image", "conditioning_image", "caption")
    return Columns(**{name: values.get(f"{name}_column") for name in names})


def _condition_of(pairs: str, columns: Columns) -> str | None:
    """The condition that the pairs record: the one named by PAIRS/NAME if there are several, else the only one. If none
    is known, that of the folder's name; else None."""
    from controlkit import conditions
    from controlkit.data.readers.recognise import read_listing

    if (recorded := read_listing(pairs, columns=columns).recorded) is not None:
        return recorded
    return Path(pairs).name if Path(pairs).name in conditions.registry() else None
