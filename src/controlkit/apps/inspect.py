"""show what a file, control, base or system contains

controlkit inspect
controlkit inspect canny
controlkit inspect nano --json
controlkit inspect sdxl --size 1024
controlkit inspect ctrlora --base sd15 --rank 128
controlkit inspect t2i-adapter --base sdxl --json
controlkit inspect somebody-s.safetensors

Without a name it lists the shipped base and controls.
"""

from __future__ import annotations

import argparse
from typing import Any

from controlkit.apps.show import add_json, print_json, print_table

_LONGEST = 300
"""Characters of a fact in the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "name",
        nargs="?",
        default=None,
        help="a base (nano, a folder, a file, a hub id, or sd15, sd21, sdxl, sd3-medium, sd35-medium, sd35-large,"
        " flux1-dev, flux1-schnell, flux2-dev, flux2-klein-4b, flux2-klein-9b, z-image, z-image-turbo, qwen-image,"
        " sana-600m, sana-1600m), a control's name or file, any other file of tensors, or a system"
        " (controlnet, ctrlora, t2i-adapter)",
    )
    parser.add_argument(
        "--base", help="the base of a system (default: nano, or the first it is made for), or of a control file"
    )
    parser.add_argument(
        "--size", type=int, default=None, help="side in pixels at which operations are counted (default: the base's)"
    )
    parser.add_argument("--rank", type=int, default=None, help="also count a CtrLoRA adapter of this rank")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.controls.registry import registry
    from controlkit.errors import UserError
    from controlkit.formats.describe import describe, describe_base, describe_system, is_base
    from controlkit.sampling.request import MAX_SIDE

    base: str | None = getattr(args, "base", None)
    if args.name is None:
        if (base, args.size, args.rank) != (None, None, None):
            raise UserError("--base, --size and --rank need a name: controlkit inspect NAME", "missing-setting")
        _list(args.json)
        return
    if args.size is not None and not 1 <= args.size <= MAX_SIDE:
        raise UserError(f"--size {args.size}: expected 1 to {MAX_SIDE} pixels", "out-of-range")
    systems = registry()
    if args.rank is not None and (args.name not in systems or systems[args.name].companion is None):
        ranked = ", ".join(name for name, kind in systems.items() if kind.companion is not None)
        raise UserError(f"--rank applies to {ranked}, not to {args.name}", "contradiction")
    if args.name in systems:
        facts = describe_system(args.name, base, args.rank, args.size)
    elif is_base(args.name):
        if base is not None:
            raise UserError(f"--base {base} is for systems and controls; {args.name} is a base", "contradiction")
        facts = describe_base(args.name, args.size)
    else:
        facts = describe(args.name, base, args.size)
    if args.json:
        print_json(facts)
        return
    rows = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows += [(f"{key}.{name}", _text(inner)) for name, inner in sorted(value.items())]
        else:
            rows.append((key, _text(value)))
    print_table(args.name, ("fact", "value"), rows)


def _list(as_json: bool) -> None:
    """List what ships, one per line."""
    from controlkit.bases.folders import NANO, nano_folder
    from controlkit.formats.load import shipped_controls
    from controlkit.formats.metadata import read_metadata

    shipped: list[dict[str, Any]] = [{"name": NANO, "kind": "base", "condition": None, "path": str(nano_folder())}]
    for name, path in shipped_controls().items():
        metadata = read_metadata(path)
        condition = metadata.get("control.condition") or None
        shipped.append({"name": name, "kind": metadata["control.kind"], "condition": condition, "path": str(path)})
    if as_json:
        print_json(shipped)
        return
    rows = [("name", "kind", "condition")]
    rows += [(each["name"], each["kind"], each["condition"] or "-") for each in shipped]
    widths = [max(len(row[place]) for row in rows) + 2 for place in (0, 1)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}{row[1]:<{widths[1]}}{row[2]}")


def _text(value: object) -> str:
    if isinstance(value, dict | list) and len(str(value)) > _LONGEST:
        return f"{len(value)} entries (--json shows them)"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... (--json shows all)"
