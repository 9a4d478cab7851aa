"""say what a file, a control or a base is: kind, tensors, parameters, metadata

    controlkit inspect canny
    controlkit inspect nano --json
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("name", help="nano, a control's name, a file or a diffusers folder")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.checkpoints.describe import describe

    facts = describe(args.name)
    if args.json:
        print_json(facts)
        return
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{name}", str(inner)) for name, inner in value.items()]
        else:
            rows.append((key, f"{value:,}" if isinstance(value, int) else str(value)))
    print_table(args.name, ("fact", "value"), rows)
