"""say what a file, a control or a base is: kind, tensors, parameters, metadata

controlkit inspect canny
controlkit inspect nano --json
controlkit inspect ctrlora --base sd15 --rank 128
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("name", help="nano, a control's name, a file, a diffusers folder, or a system")
    parser.add_argument("--base", default="nano", help="the base of a system: nano, sd15 or a folder (default: nano)")
    parser.add_argument("--rank", type=int, default=None, help="also count a CtrLoRA adapter of this rank")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.checkpoints.describe import SYSTEMS, describe, describe_system

    system = args.name in SYSTEMS
    facts = describe_system(args.name, args.base, args.rank) if system else describe(args.name)
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
