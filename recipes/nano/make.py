"""Make nano: from icons or given weights to all that ships, and to every figure and image of it in the pages.

    python recipes/nano/make.py --dry-run                   # the plan
    python recipes/nano/make.py --base WEIGHTS --budget 60  # other base weights; at most an hour for each training
    python recipes/nano/make.py --only pages                # the figures of the pages from their JSON

Run again to resume. A step runs if its inputs (files, recipe, settings) have changed since it last ran. What is made is
staged in runs/nano and moved into place at the end, after checks.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from adopt import adopt, changes
from making import MakeSettings
from measuring_steps import MeasuringSteps
from steps import SHIPPED, Planned, Records, Step, outdated, plan, plan_table, run_plan
from training_steps import TrainingSteps
from workshop import PACKAGE, RESULTS, Workshop

import controlkit
from controlkit.errors import UserError
from controlkit.files import locked, write_json
from controlkit.settings import build_settings, read_overrides

ROOT = Path(__file__).resolve().parents[2]
ADOPT = "adopt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument(
        "--base",
        default="shipped",
        metavar="WEIGHTS",
        help="the base: shipped (default); scratch, to train it from the icons; further, to train the shipped one on;"
        " or a diffusers folder, or parts of one (unet.safetensors, text_encoder/), the rest as it ships",
    )
    parser.add_argument(
        "--controls",
        type=Path,
        metavar="FOLDER",
        help="controls to start from: canny.safetensors, ctrlora/base.safetensors (default: those beside the weights)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="for each training and study; what is unfinished is used, and resumes next time (0: controls as given)",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run these steps alone")
    parser.add_argument("--leave", nargs="+", default=[], metavar="STEP", help="leave what these steps make as it is")
    parser.add_argument("--device", help="of trainings, evaluations and studies: cpu, cuda, mps or auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="for trials")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and end")
    parser.add_argument("--accept-lower", action="store_true", help="adopt lower scores than those of the pages")


def make(args: argparse.Namespace, root: Path = ROOT) -> None:
    """Carry out, or show, what the arguments ask for."""
    if not Path(controlkit.__file__).is_relative_to(root):
        raise UserError(
            f"controlkit is imported from {Path(controlkit.__file__).parent}, not from {root / PACKAGE}", "unsupported"
        )
    if args.budget is not None and not args.budget >= 0:
        raise UserError(f"--budget {args.budget}: expected minutes", "out-of-range")
    folder = Path(args.base)
    if args.base not in ("shipped", "scratch", "further") and not folder.exists():
        raise UserError(
            f"--base {args.base}: there is no such file or folder; or give shipped, scratch or further", "missing-file"
        )
    if args.controls is not None and not args.controls.is_dir():
        raise UserError(f"--controls {args.controls}: there is no such folder", "missing-file")
    given = args.controls or (folder if folder.is_dir() else folder.parent if folder.is_file() else None)
    settings = build_settings(MakeSettings, read_overrides(args.settings), "make")
    shop = Workshop(root, budget=args.budget, device=args.device, given=given, say=_say)
    shop.work.mkdir(parents=True, exist_ok=True)
    with locked(shop.work / ".make.lock", "another make is running here; wait for it"):
        shop.prepare(keep_base=args.base != "shipped")
        steps = [*TrainingSteps(shop, settings, args.base).steps(), *MeasuringSteps(shop, settings).steps()]
        records = Records(root, shop.work / "make.json", root / RESULTS / "made.json")
        only, leave = ([name for name in names if name != ADOPT] for names in (args.only, args.leave))
        nothing = bool(args.only) and not only  # adopt alone
        planned = plan(steps, records, only=only, leave=[step.name for step in steps] if nothing else leave)
        adopts = ADOPT in args.only if args.only else ADOPT not in args.leave
        _show(planned, records, shop, adopts)
        if args.dry_run:
            return
        run_plan(planned, records, _say)
        if adopts:
            left = set(args.leave)
            unfinished = [
                step.name for step in steps if step.name not in left and not step.data and not _is_usable(step, records)
            ]
            _adopt(shop, records, steps, unfinished, accept_lower=args.accept_lower)


def _is_usable(step: Step, records: Records) -> bool:
    """Whether a step was run on what is there now; a training may be unfinished."""
    known = records.values.get(step.name)
    if known is None:
        return False
    return outdated(step, records) is None or (step.training and not known["complete"])


def _adopt(
    shop: Workshop, records: Records, steps: Sequence[Step], unfinished: Sequence[str], *, accept_lower: bool
) -> None:
    # The base's own step depends on where its weights were given, which is no part of the repository.
    made = {
        step.name: {name: value for name, value in records.values[step.name].items() if name != SHIPPED}
        for step in steps
        if step.name in records.values and step.name != "nano"
    }
    if changes(shop):
        write_json(shop.results / "made.json", {"steps": made})
    told = adopt(shop, unfinished, accept_lower=accept_lower)
    for line in told or ["nothing to adopt"]:
        _say(f"{ADOPT}: {line}")
    for step in steps:
        if told and records.note(step):
            _say(f"note: {step.name}: {records.note(step)}")


def _show(planned: Sequence[Planned], records: Records, shop: Workshop, adopts: bool) -> None:
    rows, minutes = plan_table(planned, records)
    waiting = any(one.runs for one in planned) or bool(changes(shop))
    how = "skipped: not asked for" if not adopts else "runs" if waiting else "skipped: up to date"
    rows.append((ADOPT, how, "", "check all, and move it into place"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, why, took, what in rows:
        _say(f"{name:{widths[0]}}  {took:>{widths[2]}}  {why:{widths[1]}}  {what}")
    limit = "" if shop.budget is None else f"; each training and study at most {shop.budget:g}"
    _say(f"about {minutes:.0f} minutes on two CPU cores without a budget{limit}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stop(number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        make(arguments)
    except UserError as error:
        sys.exit(f"make: {error}")
    except KeyboardInterrupt:
        print("make: interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(130)
