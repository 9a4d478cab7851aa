"""say what a file, a control, a base or a system is: kind, tensors, parameters, operations, metadata

controlkit inspect canny
controlkit inspect nano --json
controlkit inspect sdxl --size 1024
controlkit inspect ctrlora --base sd15 --rank 128
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("name", help="a base (nano, a folder, sd15, sd21, sdxl), a control's name or file, or a system")
    parser.add_argument("--base", default="nano", help="the base of a system (default: nano)")
    parser.add_argument("--size", type=int, default=None, help="count operations at this side (default: the base's)")
    parser.add_argument("--rank", type=int, default=None, help="also count a CtrLoRA adapter of this rank")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.checkpoints.describe import describe
    from controlkit.checkpoints.systems import SYSTEMS, describe_base, describe_system, is_base

    if args.name in SYSTEMS:
        facts = describe_system(args.name, args.base, args.rank, args.size)
    elif is_base(args.name):
        facts = describe_base(args.name, args.size)
    else:
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
