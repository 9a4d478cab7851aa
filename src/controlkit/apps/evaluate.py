"""measure a base or controls on held-out pictures

controlkit evaluate base nano --sheet grid.png
controlkit evaluate control canny --base nano --sheet canny.png
controlkit evaluate control nano/canny nano/palette nano/blur --sheet adapters.png
"""

from __future__ import annotations

import argparse
from typing import Any

from controlkit.apps.show import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("what", choices=("base", "control"), help="what is measured")
    parser.add_argument("names", nargs="+", metavar="name", help="a base; or controls, by name or file")
    parser.add_argument("--base", default="nano", help="the base that a control steers (default: nano)")
    parser.add_argument(
        "--sets",
        nargs="+",
        default=["held-out", "openmoji"],
        help="pictures for a control (held-out openmoji seen)",
    )
    parser.add_argument("--pictures", type=int, default=96, help="pictures of each set for a control (default: 96)")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance scale")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps")
    parser.add_argument("--sheet", default=None, metavar="FILE", help="also write a contact sheet as PNG")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from rich import print as show

    from controlkit.bases.load import load_base
    from controlkit.errors import UserError, nearest
    from controlkit.evaluation.pictures import SETS, evaluation_set
    from controlkit.images import write_png

    settings = {name: getattr(args, name) for name in ("steps", "guidance") if hasattr(args, name)}
    for name in args.sets:
        if name not in SETS:
            raise UserError(f"there is no set of pictures called {name!r}{nearest(name, list(SETS))}")
    if args.pictures < 1:
        raise UserError(f"--pictures {args.pictures}: at least one is needed")
    if args.what == "base":
        from controlkit.evaluation.base import base_grid, evaluate_base

        if len(args.names) > 1:
            raise UserError(f"one base at a time, not {len(args.names)}")
        base = load_base(args.names[0], device=args.device)
        if args.sheet:
            write_png(args.sheet, base_grid(base, **settings))
        reports = evaluate_base(base, **settings)
    else:
        from controlkit.checkpoints.controls import load_control
        from controlkit.evaluation.control import evaluate_control, evaluate_controls

        base = load_base(args.base, device=args.device)
        shared: dict[str, Any] = {}
        controls = {name: load_control(name, base, shared=shared) for name in args.names}
        sets = [evaluation_set(name).first(args.pictures) for name in args.sets]
        if len(controls) == 1:
            report, sheet = evaluate_control(base, next(iter(controls.values())), sets, **settings)
        else:
            report, sheet = evaluate_controls(base, controls, sets, **settings)
        if args.sheet:
            write_png(args.sheet, sheet)
        reports = [report]
    if args.json:
        print_json({"reports": [report.to_json() for report in reports]})
        return
    for report in reports:
        show(report.table())
